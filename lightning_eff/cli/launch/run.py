"""`lightning-eff launch`: a fault-tolerant run on this machine, or this machine's part of one."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lightning_eff import _launched
from lightning_eff._launched import Progress
from lightning_eff.arguments import check_address
from lightning_eff.cli.launch.heartbeats import Heartbeats
from lightning_eff.cli.launch.supervisor import RUN, Child, Output, end_all, kill_leftovers
from lightning_eff.cli.lighthouse import (
    _MISSING,
    add_timing_arguments,
    check_timing,
    is_loopback,
    timing_arguments,
)
from lightning_eff.cli.parser import Parser

_LIGHTHOUSE_WAIT = 60.0  # seconds for another machine's lighthouse to be there
_LIGHTHOUSE_DEATHS = 5  # within _LIGHTHOUSE_WAIT: it does not die, it does not work

_DESCRIPTION = """\
Start the replicas of a fault-tolerant run, each under an elastic agent of torch that restarts it when it dies, and a
lighthouse at which they meet. The script makes a Trainer with strategy="ddp_ft".
"""

_EPILOG = """\
On several machines: start `lightning-eff lighthouse --bind HOST:PORT` once, and on each machine
  lightning-eff launch --lighthouse HOST:PORT --host OWN_ADDRESS --replicas 4 --first-replica 4 --total-replicas 16 ...
The exit status is 0 if a replica came to its end with 0, 1 if none did, 128 + N after signal N.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the replicas to their end and return the exit status."""
    parser = make_parser()
    args = parser.parse_args(argv)
    _check(parser, args)
    if find_spec("torchft") is None:
        print(f"lightning-eff launch: {_MISSING}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="lightning-eff-launch-") as folder:
        return _Run(args, Path(folder)).run()


def make_parser() -> Parser:
    """The arguments."""
    parser = Parser(
        "lightning-eff launch",
        usage="lightning-eff launch --replicas N [OPTIONS] [-m] SCRIPT [ARGUMENTS ...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--replicas", type=int, required=True, metavar="N", help="replicas on this machine")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=10,
        metavar="K",
        help="how often each replica is restarted after it was killed or has lost the others (default %(default)s)",
    )
    parser.add_argument(
        "--max-exceptions",
        type=int,
        default=2,
        metavar="E",
        help="how often each replica is restarted after an exception, in a row without a step more than before"
        " (default %(default)s)",
    )
    parser.add_argument(
        "--nproc-per-node",
        type=int,
        default=1,
        metavar="M",
        help="processes of a replica, one for each device, which live and die together: Trainer(devices=M)"
        " (default %(default)s)",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long replicas may take to end after a signal, or after the first of them has ended well"
        " (default %(default)s)",
    )
    parser.add_argument(
        "--lighthouse", metavar="HOST:PORT", help="one that runs already; without it there is one on loopback"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address of this machine on which the replicas listen and are reached (default %(default)s)",
    )
    parser.add_argument(
        "--first-replica", type=int, default=0, metavar="I", help="number of the first one here (default %(default)s)"
    )
    parser.add_argument(
        "--total-replicas", type=int, metavar="N", help="replicas on all machines (default: those on this one)"
    )
    parser.add_argument(
        "--run-id",
        metavar="ID",
        help="a text of your own, the same on all machines: replicas of another run are turned away (default: one of"
        " this launcher's own, or none with --lighthouse)",
    )
    timing = parser.add_argument_group("the lighthouse on loopback")
    add_timing_arguments(timing, heartbeat_timeout=0.5)
    parser.add_argument("-m", "--module", action="store_true", help="SCRIPT is a module's name, as with `python -m`")
    parser.add_argument("script", metavar="SCRIPT", help="what each replica runs")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS", help="its arguments")
    return parser


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    check_timing(parser, args)
    args.total_replicas = args.first_replica + args.replicas if args.total_replicas is None else args.total_replicas
    for name, least in (
        ("replicas", 1),
        ("nproc_per_node", 1),
        ("max_restarts", 0),
        ("max_exceptions", 0),
        ("first_replica", 0),
    ):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if args.total_replicas < args.first_replica + args.replicas:
        parser.error(
            f"--total-replicas {args.total_replicas} is less than --first-replica {args.first_replica} + --replicas"
            f" {args.replicas}"
        )
    if args.min_replicas > args.total_replicas:
        parser.error(f"--min-replicas {args.min_replicas} is more than there are: {args.total_replicas}")
    if args.grace < 0:
        parser.error(f"--grace must not be negative, got {args.grace}")
    if args.lighthouse is not None:
        try:
            host, _ = check_address("--lighthouse", args.lighthouse)
        except ValueError as error:
            parser.error(str(error))
        if not is_loopback(host) and is_loopback(args.host):
            parser.error(
                f"--lighthouse {args.lighthouse} is on a network, but --host {args.host} is reached from this machine"
                " only: give the address under which the other machines reach this one"
            )
    elif args.total_replicas > args.replicas:
        parser.error("replicas on other machines need a lighthouse that they reach: --lighthouse HOST:PORT")
    if not args.module and not Path(args.script).is_file():
        parser.error(f"there is no script {args.script!r} (a module is run with -m)")


class _Run:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.mark = uuid.uuid4().hex
        self.finished = folder / "finished"
        self.output = Output()
        self.signals: list[int] = []
        self.lighthouse: Child | None = None
        self.lighthouse_deaths: list[float] = []
        self.errors: dict[str, str] = {}
        address = args.lighthouse
        if address is None:
            address = f"127.0.0.1:{_free_port()}"
            command = [sys.executable, "-m", "lightning_eff", "lighthouse", "--bind", address, *timing_arguments(args)]
            self.lighthouse = Child("lighthouse", command, {RUN: self.mark})
        self.host, self.port = check_address("--lighthouse", address)
        self.address = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        run_id = args.run_id or ("" if args.lighthouse else self.mark)
        script = ["-m", args.script] if args.module else [args.script]
        visible = _visible_devices(args.replicas, args.nproc_per_node)
        (folder / "progress").mkdir()
        self.progress = [folder / "progress" / str(args.first_replica + number) for number in range(args.replicas)]
        self.heartbeats = Heartbeats(f"http://{self.address}", self.progress)
        self.replicas: list[Child] = []
        for offset in range(args.replicas):
            number = args.first_replica + offset
            environment = {
                RUN: self.mark,
                _launched.FINISHED: str(self.finished),
                _launched.LIGHTHOUSE: f"http://{self.address}",
                _launched.REPLICA: str(number),
                _launched.REPLICAS: str(args.total_replicas),
                _launched.HOST: args.host,
                _launched.PROGRESS: str(self.progress[offset]),
                **({_launched.RUN_ID: run_id} if run_id else {}),
                "RUST_LOG": os.environ.get("RUST_LOG", "error"),
                # Else DDP warns once of each replica that it looks for unused parameters, which it has to.
                "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(_threads(args))),
                **({"CUDA_VISIBLE_DEVICES": visible[offset]} if visible else {}),
            }
            # The worker is tethered to its agent, and the agent to this process.
            tethered = Child("", [sys.executable, *script, *args.arguments], {}, unless=self.finished).command
            command = [
                sys.executable,
                "-m",
                "lightning_eff.cli.launch.agent",
                str(number),
                str(args.nproc_per_node),
                str(args.max_restarts),
                str(args.max_exceptions),
            ]
            self.replicas.append(Child(f"replica {number}", [*command, str(folder), *tethered], environment))

    def run(self) -> int:
        previous = {
            number: signal.signal(number, lambda received, _: self.signals.append(received))
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        try:
            return self._run()
        finally:
            self.heartbeats.end()
            everything = [*self.replicas, *([self.lighthouse] if self.lighthouse else [])]
            end_all(everything, self.output, signal.SIGTERM, 5.0, lambda: False)
            for _ in range(100):
                if not kill_leftovers(self.mark):
                    break
                time.sleep(0.02)
            self.output.drain()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        if self.lighthouse is None and not self._reach_lighthouse():
            return 1
        for child in [*([self.lighthouse] if self.lighthouse else []), *self.replicas]:
            self._start(child)
        self.heartbeats.start()
        gone: set[str] = set()
        end: float | None = None
        while not self.signals:
            self.output.copy(0.1)
            if self.lighthouse and not self.lighthouse.running and not self._restart_lighthouse():
                return 1
            for child in self.replicas:
                status = child.status
                if status is None or child.name in gone:
                    continue
                ended = Progress.read(self.progress[self.replicas.index(child)])
                if ended.left and not ended.over and end is None:
                    gone.add(child.name)
                    self._say(f"{child.name} has left the run after {ended.step} steps, as it was told to")
                elif status == 0 and end is None:
                    self.finished.touch()
                    self._say_how_it_ended(child)
                    end = time.monotonic() + self.args.grace
                elif status < 0 and end is None and child.starts <= self.args.max_restarts:
                    self._say(
                        f"the agent of {child.name} ended with {signal.Signals(-status).name}, it is started again"
                    )
                    self._start(child)
                elif status != 0:
                    gone.add(child.name)
                    self._say(f"{child.name} ended with exit status {status} and is not started again")
                    self.errors[child.name] = self.output.errors.get(child.name, f"exit status {status}")
            if end is not None and (time.monotonic() > end or not any(child.running for child in self.replicas)):
                return self._conclude()
            if end is None and self._too_few(len(gone)):
                return 1
        received = self.signals[0]
        self._say(f"{signal.Signals(received).name}: ending all replicas; once more kills them")
        end_all(self.replicas, self.output, received, self.args.grace, lambda: len(self.signals) > 1)
        return 128 + received

    def _start(self, child: Child) -> None:
        child.start()
        self.output.add(child)

    def _say_how_it_ended(self, child: Child) -> None:
        ended = Progress.read(self.progress[self.replicas.index(child)])
        if ended.step >= 0 and not ended.over:
            self._say(
                f"{child.name} ended with exit status 0 after {ended.step} steps, before the training was over: with it"
                " the run ends, and nobody is restarted"
            )

    def _conclude(self) -> int:
        late = [child for child in self.replicas if child.running]
        if late:
            names = ", ".join(child.name for child in late)
            self._say(f"the run is over, but {names} still runs after {self.args.grace:g} s: ending it")
            end_all(late, self.output, signal.SIGTERM, 5.0, lambda: bool(self.signals))
        return 0

    def _too_few(self, gone: int) -> bool:
        """Whether the replicas that are left, here and elsewhere, can make no step."""
        left = self.args.total_replicas - gone
        if left >= self.args.min_replicas and gone < self.args.replicas:
            return False
        here = self.args.replicas - gone
        if self.errors:
            self._say(f"{here} replicas are left here: the run has failed")
            # Each once, by the first who had it.
            causes = {error: name for name, error in reversed(self.errors.items())}
            self._say("; ".join(f"{name}: {error}" for error, name in causes.items()))
        else:
            self._say(f"{here} replicas are left here, after the others were told to leave: the run is not over")
        return True

    def _restart_lighthouse(self) -> bool:
        assert self.lighthouse is not None
        now = time.monotonic()
        self.lighthouse_deaths = [*(t for t in self.lighthouse_deaths if now - t < _LIGHTHOUSE_WAIT), now]
        if len(self.lighthouse_deaths) > _LIGHTHOUSE_DEATHS:
            self._say(
                f"the lighthouse has ended {len(self.lighthouse_deaths)} times in {_LIGHTHOUSE_WAIT:g} s: giving up"
            )
            return False
        self._say(f"the lighthouse has ended, it is started again on {self.address}")
        self._start(self.lighthouse)
        return True

    def _reach_lighthouse(self) -> bool:
        host, port = self.host, self.port
        began = time.monotonic()
        while (problem := _cannot_connect(host, port)) and not self.signals:
            waited = time.monotonic() - began
            if waited > _LIGHTHOUSE_WAIT:
                self._say(f"no lighthouse on {host}, port {port}, in {waited:.0f} s ({problem})")
                return False
            time.sleep(0.5)
        return not problem

    def _say(self, text: str) -> None:
        print(f"[launch] {text}", file=sys.stderr, flush=True)


def _cannot_connect(host: str, port: int) -> OSError | None:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        return error
    return None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def _threads(args: argparse.Namespace) -> int:
    """Threads of each process, such that all of them together have a core each."""
    cores: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(args.replicas * args.nproc_per_node))


def _visible_devices(replicas: int, processes: int) -> list[str]:
    """Each replica's own GPUs; nothing where there are none, or too few for all, who then see all of them."""
    if not Path("/proc/driver/nvidia/gpus").is_dir():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        visible = ",".join(map(str, range(torch.cuda.device_count())))
    devices = [device for device in visible.split(",") if device]
    if len(devices) < replicas * processes:
        return []
    return [",".join(devices[n * processes : (n + 1) * processes]) for n in range(replicas)]
