"""What this machine has: the facts that `lightning-eff doctor` reports."""

import platform
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from os import cpu_count
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

State = Literal["ok", "missing", "unsupported", "broken", "not for this platform"]

# What each extra of pyproject.toml is for. An extra that is not here is for the suite's developers.
EXTRAS = {
    "triton": "kernels on a GPU",
    "tensorboard": "logs for TensorBoard",
    "cli": "this command line",
    "plots": "heat maps",
    "ft": "fault-tolerant training",
    "examples": "the examples",
}
_MODULES = {"scikit-learn": "sklearn"}


@dataclass(frozen=True)
class Package:
    """A package that the suite needs, or uses where it is there."""

    name: str
    state: State
    installed: str | None
    supported: str
    extra: str | None  # None: required
    detail: str = ""

    @property
    def command(self) -> str | None:
        """The command that mends it."""
        if self.state in ("ok", "not for this platform"):
            return None
        if self.state == "missing" and self.extra is not None:
            return f"pip install 'lightning-eff[{self.extra}]'"
        force = "--force-reinstall " if self.state == "broken" else ""
        return f"pip install {force}'{self.name}{self.supported}'"


@dataclass(frozen=True)
class Device:
    """A device that training could run on."""

    device: str
    name: str
    detail: str


def python() -> Package:
    """The running interpreter, as if it were a package."""
    supported = metadata.metadata("lightning-eff")["Requires-Python"]
    version = platform.python_version()
    state: State = "ok" if SpecifierSet(supported).contains(version, prereleases=True) else "unsupported"
    return Package("python", state, version, supported, extra=None)


def packages() -> list[Package]:
    """Every runtime dependency, the required ones first. The ranges are those of the installed distribution."""
    by_extra: dict[str | None, list[Requirement]] = {None: [], **{extra: [] for extra in EXTRAS}}
    for line in metadata.requires("lightning-eff") or []:
        requirement = Requirement(line)
        extra = re.search(r'extra == "([^"]+)"', str(requirement.marker or ""))
        by_extra.setdefault(extra[1] if extra else None, []).append(requirement)
    found: dict[str, Package] = {}
    for name in (None, *EXTRAS):
        for requirement in by_extra[name]:
            # A package that two extras ask for is shown with the first; `examples` repeats those that it is made of.
            if requirement.name != "lightning-eff" and requirement.name not in found:
                found[requirement.name] = _inspect(requirement, name)
    return list(found.values())


def _inspect(requirement: Requirement, extra: str | None) -> Package:
    name = requirement.name
    supported = ",".join(sorted(map(str, requirement.specifier), reverse=True))  # ">=2.6,<3", the lower bound first
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": extra or ""})
        return Package(name, "missing" if wanted else "not for this platform", None, supported, extra)
    # Imported, because that is what fails in practice: a half-finished upgrade, a missing shared library.
    error = _import_error(_MODULES.get(name, name.replace("-", "_")))
    if error:
        return Package(name, "broken", installed, supported, extra, error)
    if not requirement.specifier.contains(installed, prereleases=True):
        return Package(name, "unsupported", installed, supported, extra)
    return Package(name, "ok", installed, supported, extra)


def _import_error(module: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module(module)
    except Exception as error:  # a broken package may raise anything
        return f"{type(error).__name__}: {error}"
    return ""


def devices() -> list[Device]:
    """The accelerators that torch can use, or why it cannot use one, and the CPU."""
    import torch

    threads = f"{cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    return [*_gpus(), *_mps(), Device("cpu", platform.machine(), threads)]


def _gpus() -> Iterator[Device]:
    import torch

    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
    if torch.version.cuda is None and torch.version.hip is None:
        tool = shutil.which("nvidia-smi") or shutil.which("rocminfo")
        if tool:
            yield Device(
                "gpu", "not usable", "this torch is built without GPU support: https://pytorch.org/get-started"
            )
        return
    with warnings.catch_warnings(record=True) as reasons:  # torch says what is wrong with a driver in a warning
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        reason = str(reasons[0].message).splitlines()[0] if reasons else "no device was found"
        yield Device("gpu", "not usable", f"torch is built for {built_for}, but {reason}")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"compute capability {properties.major}.{properties.minor}, "
        if torch.version.hip:
            capability = f"{properties.gcnArchName}, "
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        yield Device(f"cuda:{index}", properties.name, f"{capability}{memory}, {built_for}")


def _mps() -> Iterator[Device]:
    import torch

    if torch.backends.mps.is_available():
        yield Device("mps", "Apple GPU", "float32 statistics: MPS has no float64")


def backends() -> dict[str, bool]:
    """The backends of torch.distributed, and whether this torch has them."""
    import torch.distributed as dist

    names = ("gloo", "nccl", "mpi", "ucc", "xccl")
    return {
        name: dist.is_available() and bool(getattr(dist, f"is_{name}_available", lambda: False)()) for name in names
    }
