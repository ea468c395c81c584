"""`lightning-eff doctor`: what is installed, which kernels run where, what is missing and how to get it."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from typing import Any

from lightning_eff import __version__
from lightning_eff.cli import environment, tables
from lightning_eff.cli.parser import Parser, did_you_mean

_EPILOG = "The exit status is 0 when everything that is required is there and in the supported range, and 1 otherwise."

# GPUs for data centres and desktops that torch's wheels and Triton support.
_TARGETS = (
    *(f"cuda:{capability}" for capability in (75, 80, 86, 89, 90, 100, 103, 120)),
    *(f"hip:gfx{architecture}" for architecture in ("90a", "942", "950", "1100", "1101", "1200", "1201")),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; return 0 where all that is required is fine."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.compile is not None and (wrong := _no_target(args.compile)):
        parser.error(f"argument --compile: {wrong}")
    try:
        report = collect(args.compile)
    except PackageNotFoundError:  # run from a folder of sources: what it needs is in the metadata of an installation
        print(
            "Problem: lightning-eff is not installed.\nTo get it: pip install lightning-eff, or `pip install -e .` here"
        )
        return 1
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 0 if report["ok"] else 1


def make_parser() -> Parser:
    """The arguments."""
    parser = Parser("lightning-eff doctor", description=__doc__.split(": ", 1)[1], epilog=_EPILOG)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--compile",
        metavar="TARGET",
        help="compile every kernel for a GPU that need not be here (cuda:90, hip:gfx942): registers, shared memory, "
        "spills",
    )
    return parser


def _no_target(target: str) -> str:
    """Why there is no such GPU: a compiler answers with a page, or makes another one's code."""
    if target in _TARGETS:
        return ""
    return f"{target} is no target.{did_you_mean(target, _TARGETS)} There are {', '.join(_TARGETS)}"


def collect(compile_for: str | None = None) -> dict[str, Any]:
    """Everything that the report says, as JSON can hold it.

    Args:
        compile_for: also compile the kernels for this target, ``"cuda:90"`` or ``"hip:gfx942"``.
    """
    packages = [environment.python(), *environment.packages()]
    report: dict[str, Any] = {
        "version": __version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": [{**asdict(package), "command": package.command} for package in packages],
        "devices": [],
        "distributed": {},
        "kernels": [],
        "problems": [_in_words(p) for p in packages if p.extra is None and p.state != "ok"],
        "notes": [_in_words(p) for p in packages if p.extra is not None and p.state in ("broken", "unsupported")],
    }
    # Everything below needs torch; without it the table of packages has said what to do.
    if any(package.name == "torch" and package.state in ("ok", "unsupported") for package in packages):
        report["devices"] = [asdict(device) for device in environment.devices()]
        report["distributed"] = environment.backends()
        _add_kernels(report, compile_for)
    report["ok"] = not report["problems"]
    return report


def _add_kernels(report: dict[str, Any], compile_for: str | None) -> None:
    import torch

    from lightning_eff import kernels

    try:
        for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
            report["kernels"] += [{"device": device, **row._asdict()} for row in kernels.status(device)]
        if compile_for is not None:
            report["compiled_for"] = compile_for
            report["compiled"] = [row._asdict() for row in kernels.compile_report(compile_for)]
    except (ImportError, RuntimeError, ValueError) as error:  # a wrong environment variable or target, no Triton
        # Of a compiler that stopped, which is a process of its own, the last line says why.
        lines = str(error).splitlines()
        report["problems"].append(f"kernels: {' '.join(lines[:1] + lines[1:][-1:])}")


def _in_words(package: environment.Package) -> str:
    if package.state == "missing":
        return f"{package.name} is not installed"
    if package.state == "broken":
        return f"{package.name} {package.installed} cannot be imported: {package.detail}"
    return f"{package.name} {package.installed} is outside of the supported range {package.supported}"


def show(report: dict[str, Any]) -> None:
    """Print a report of `collect` as tables."""
    print(f"lightning-eff {report['version']} on {report['platform']}")
    needed_for: dict[Any, str] = {None: "required", **environment.EXTRAS}
    tables.table(
        "Packages",
        ["package", "installed", "supported", "state", "needed for"],
        [[p["name"], p["installed"], p["supported"], p["state"], needed_for[p["extra"]]] for p in report["packages"]],
    )
    tables.table("Devices", ["device", "name", "detail"], [list(device.values()) for device in report["devices"]])
    backends = [[name, "yes" if there else "no"] for name, there in report["distributed"].items()]
    tables.table("Backends of torch.distributed", ["backend", "available"], backends)
    tables.table(
        "Kernels",
        ["device", "op", "runs", "reason"],
        [[row["device"], row["op"], row["implementation"], row["reason"]] for row in report["kernels"]],
    )
    tables.table(
        f"Kernels compiled for {report.get('compiled_for')}: registers a thread, bytes of shared memory",
        ["op", "kernel", "warps", "registers", "shared", "spills"],
        [
            [row["op"], row["kernel"], row["num_warps"], row["registers"], row["shared"], row["spills"]]
            for row in report.get("compiled", [])
        ],
    )
    _show_conclusion(report)


def _show_conclusion(report: dict[str, Any]) -> None:
    by_command: dict[str, list[str]] = {}
    for package in report["packages"]:
        if package["command"]:
            by_command.setdefault(package["command"], []).append(package["name"])
    print()
    # Plain lines and no table: a command must stay in one piece to be copied, however narrow the terminal.
    for command, names in by_command.items():
        print(f"To get {', '.join(names)}: {command}")
    for note in report["notes"]:
        print(f"Note: {note}")
    for problem in report["problems"]:
        print(f"Problem: {problem}")
    if report["ok"]:
        print("Everything that is required is there.")
