"""A slow network on one machine: network namespaces joined by a bridge, each end of each cable shaped.

    with Network(2, mbit=200) as network:
        results = network.run(fn, argument)         # on every rank, in its own namespace, a gloo group over the cable
        network.shape(mbit=50)                      # also while something runs
        network.cut(1)                              # rank 1's cable is pulled: packets vanish, no socket is told
        network.mend(1)
        network.traffic(0).sent                     # bytes that rank 0's interface has sent so far

Every rank is a machine of its own: it has the address `network.address(rank)` on the device `eth0`, its own loopback
and its own free ports, and torchrun's variables say that it is one of as many nodes with one process each. The bridge
is in a namespace of its own too, so nothing of the machine's own network is touched or reached. All of it, and every
process in it, is gone on the way out, and what a killed test run has left is removed by the next one.

Linux, root and iproute2 are needed; `why_not()` says what is missing, and the fixture `network` skips with that reason.
This file is also what a worker runs: it imports torch in the worker only.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import pickle
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple

from typing_extensions import Self

from harness import REPOSITORY
from harness.pool import GRACE, WorkerError, check_sendable, failure, listed

DEVICE = "eth0"
PORT = 29400  # of rank 0's store: every network has all ports to itself
TIME_LIMIT = 150.0  # of one task, with the start of its processes

_NAME = "leff{process}x{number}-"
_OURS = re.compile(r"leff(\d+)x\d+-")
_numbers = itertools.count(1)


class NetworkUnavailableError(RuntimeError):
    """This machine cannot make network namespaces; the text says why."""


class Traffic(NamedTuple):
    """Bytes that an interface has counted, with the headers of the packets that the kernel handed to it."""

    sent: int
    received: int


@functools.cache
def why_not() -> str | None:
    """What keeps this machine from a shaped network, or None."""
    if platform.system() != "Linux":
        return f"network namespaces need Linux, this is {platform.system()}"
    if missing := [name for name in ("ip", "tc", "setpriv") if shutil.which(name) is None]:
        return f"{', '.join(missing)} cannot be found: network namespaces need iproute2 and util-linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = _NAME.format(process=os.getpid(), number=0) + "probe"
    try:
        _run("ip", "netns", "add", name)
        _run("tc", "-n", name, "qdisc", "add", "dev", "lo", "root", *_bucket(100))
    except subprocess.CalledProcessError as error:  # root of a container without the rights, a kernel without tbf
        return f"`{' '.join(error.cmd)}` says: {error.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return None


class Network:
    """`ranks` namespaces on one bridge. A context manager.

    Args:
        ranks: Number of machines.
        mbit: Speed of every cable in both directions, in Mbit/s; None: as fast as the kernel.
        time_limit: Seconds that a task of `run` or `start` may take.
        timeout: Seconds after which a collective of a task gives up.
    """

    def __init__(
        self, ranks: int, mbit: float | None = None, *, time_limit: float = TIME_LIMIT, timeout: float = 60.0
    ) -> None:
        if not 1 <= ranks <= 200:
            raise ValueError(f"ranks must lie between 1 and 200, got {ranks}")
        self.ranks = ranks
        self.mbit = mbit
        self.time_limit = time_limit
        self.timeout = timeout
        self._prefix = _NAME.format(process=os.getpid(), number=next(_numbers))
        self._processes: list[subprocess.Popen[Any]] = []

    # --- the cables ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if reason := why_not():
            raise NetworkUnavailableError(reason)
        _remove_stale()
        try:
            self._lay()
            self.shape(self.mbit)
        except BaseException as error:
            self._remove()
            if isinstance(error, subprocess.CalledProcessError):
                raise NetworkUnavailableError(f"`{' '.join(error.cmd)}` says: {error.stderr.strip()}") from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _lay(self) -> None:
        hub = self._hub
        _run("ip", "netns", "add", hub)
        _run("ip", "-n", hub, "link", "add", "bridge", "type", "bridge", "forward_delay", "0")
        _quiet_up(hub, "bridge")
        for rank in range(self.ranks):
            name = self.namespace(rank)
            _run("ip", "netns", "add", name)
            # Both ends are made where they belong: no device appears on the machine itself, not even for a moment.
            _run("ip", "-n", hub, "link", "add", _port(rank), "type", "veth", "peer", "name", DEVICE, "netns", name)
            _run("ip", "-n", hub, "link", "set", _port(rank), "master", "bridge")
            _run("ip", "-n", name, "address", "add", f"{self.address(rank)}/24", "dev", DEVICE)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _quiet_up(name, DEVICE)
            _quiet_up(hub, _port(rank))

    def _remove(self) -> None:
        names = [name for name in namespaces() if name.startswith(self._prefix)]
        for name in names:
            _kill_inside(name)
        for process in self._processes:
            process.wait()
        for name in names:
            _delete(name)

    @property
    def _hub(self) -> str:
        return self._prefix + "hub"

    def namespace(self, rank: int) -> str:
        """Name of a rank's namespace, for `ip -n` and `tc -n`."""
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank must lie between 0 and {self.ranks - 1}, got {rank}")
        return f"{self._prefix}{rank}"

    def address(self, rank: int) -> str:
        """A rank's address on the bridge."""
        return f"10.77.0.{rank + 1}"

    def shape(self, mbit: float | None, rank: int | None = None) -> None:
        """Set the speed of one rank's cable, or of all, in both directions; None: as fast as the kernel."""
        for each in range(self.ranks) if rank is None else (rank,):
            for namespace, device in ((self.namespace(each), DEVICE), (self._hub, _port(each))):
                if mbit is None:
                    subprocess.run(  # fails where there is none
                        ["tc", "-n", namespace, "qdisc", "del", "dev", device, "root"], capture_output=True, check=False
                    )
                else:
                    _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *_bucket(mbit))
        if rank is None:
            self.mbit = mbit

    def cut(self, rank: int) -> None:
        """Pull a rank's cable at the bridge: what is sent is lost, and its connections stay open and silent."""
        self.namespace(rank)
        _run("ip", "-n", self._hub, "link", "set", _port(rank), "down")

    def mend(self, rank: int) -> None:
        """Put a cable back that was cut."""
        self.namespace(rank)
        _run("ip", "-n", self._hub, "link", "set", _port(rank), "up")

    def traffic(self, rank: int) -> Traffic:
        """What a rank's interface has counted so far."""
        (link,) = json.loads(_run("ip", "-n", self.namespace(rank), "-json", "-statistics", "link", "show", DEVICE))
        counted = link["stats64"]
        return Traffic(counted["tx"]["bytes"], counted["rx"]["bytes"])

    # --- what runs on them --------------------------------------------------------------------------------------------

    def environment(self, rank: int) -> dict[str, str]:
        """Torchrun's variables of a rank: one of `ranks` nodes with one process each, in a world over the cables."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "GROUP_RANK": str(rank),
            "ROLE_RANK": str(rank),
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_WORLD_SIZE": "1",
            "ROLE_WORLD_SIZE": str(self.ranks),
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": str(PORT),
            "TORCHELASTIC_RUN_ID": "network",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "GLOO_SOCKET_IFNAME": DEVICE,
            "OMP_NUM_THREADS": "1",
        }

    def popen(
        self, rank: int, command: Sequence[str | Path], env: Mapping[str, str] | None = None, **arguments: Any
    ) -> subprocess.Popen[Any]:
        """Start a command on a rank, as `subprocess.Popen` does; the variables of `environment(rank)` come first.

        The process has the id of the command itself, and dies with the thread that has started it.
        """
        enter = ["ip", "netns", "exec", self.namespace(rank), "setpriv", "--pdeathsig", "KILL", "--"]
        variables = {**os.environ, **self.environment(rank), **(env or {})}
        process = subprocess.Popen([*enter, *map(str, command)], env=variables, **arguments)
        self._processes.append(process)
        return process

    def start(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Task:
        """Call a module's function on every rank, each in a process of its own, and go on: see `Task`."""
        check_sendable(fn)
        return Task(self, fn, args, kwargs)

    def run(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a module's function on every rank and return the results in the order of the ranks.

        The default process group (gloo, over the cables) exists; a Lightning `Trainer(num_nodes=ranks, devices=1)`
        uses it. Raises `harness.pool.WorkerError` if a rank fails, dies or hangs.
        """
        return self.start(fn, *args, **kwargs).results()


class Task:
    """A function that runs on every rank of a network.

    Attributes:
        processes: One a rank, to be killed by a test that wants to.
    """

    def __init__(self, network: Network, fn: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self._name = getattr(fn, "__qualname__", str(fn))
        self._deadline = time.monotonic() + network.time_limit
        self._folder = tempfile.TemporaryDirectory(prefix="network-")
        folder = Path(self._folder.name)
        task = pickle.dumps((fn, args, kwargs, network.timeout))
        self._replies = [folder / f"{rank}.reply" for rank in range(network.ranks)]
        self._outputs = [folder / f"{rank}.output" for rank in range(network.ranks)]
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank, (reply, output) in enumerate(zip(self._replies, self._outputs, strict=True)):
            command = [sys.executable, "-m", "harness.network", reply]
            # The interpreter of the worker finds the modules that this one finds, in the same order.
            paths = os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)])
            with output.open("wb") as stream:
                process = network.popen(
                    rank, command, {"PYTHONPATH": paths}, stdin=subprocess.PIPE, stdout=stream, stderr=stream
                )
            with contextlib.suppress(BrokenPipeError), _of(process.stdin) as pipe:
                pipe.write(task)
            self.processes.append(process)

    def results(self, grace: float = GRACE) -> list[Any]:
        """Wait for every rank. After the first one has failed the others have `grace` seconds to report.

        Raises:
            WorkerError: a rank failed, died or ran past the network's time limit. `results` has what the others
                returned, `tracebacks` what was raised or printed.
        """
        deadline, expired = self._deadline, []
        try:
            waiting = dict(enumerate(self.processes))
            while waiting and time.monotonic() < deadline:
                time.sleep(0.02)
                for rank, process in list(waiting.items()):
                    if process.poll() is not None:
                        del waiting[rank]
                        if "result" not in self._reply(rank):
                            deadline = min(deadline, time.monotonic() + grace)
            expired = sorted(waiting)
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
            replies = {rank: self._reply(rank) for rank in range(len(self.processes))}
            self._folder.cleanup()
        results = {rank: reply["result"] for rank, reply in replies.items() if "result" in reply}
        if len(results) == len(replies):
            return [results[rank] for rank in range(len(replies))]
        tracebacks = {rank: reply["traceback"] for rank, reply in replies.items() if "traceback" in reply}
        failed = sorted(set(tracebacks) - set(expired))
        what = f"failed on rank {listed(failed)}" if failed else f"was still running on rank {listed(expired)}"
        cause = next((replies[rank].get("exception") for rank in failed if replies[rank].get("exception")), None)
        raise WorkerError(f"{self._name} {what}", tracebacks, results) from cause

    def _reply(self, rank: int) -> dict[str, Any]:
        if self._replies[rank].exists():
            return dict(pickle.loads(self._replies[rank].read_bytes()))
        text = self._outputs[rank].read_text(errors="replace")[-4000:]
        code = self.processes[rank].poll()
        return {"traceback": f"no answer, exit code {code}; the end of what it printed:\n{text}"}


# --- one rank ---------------------------------------------------------------------------------------------------------


def _work(reply: Path) -> None:
    """A worker's whole life: one task from standard input, its result into a file."""
    fn, args, kwargs, timeout = pickle.load(sys.stdin.buffer)
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        _write(reply, pickle.dumps({"result": fn(*args, **kwargs)}))
    except BaseException as error:
        _write(reply, failure(error))
        return
    with contextlib.suppress(RuntimeError):  # another rank has failed, and says so itself
        # A rank that closes its connections while another still reads from them is an error there.
        dist.barrier()
        dist.destroy_process_group()


def _write(reply: Path, answer: bytes) -> None:
    """In one piece: the parent takes the file for the whole answer."""
    partial = reply.with_suffix(".partial")
    partial.write_bytes(answer)
    partial.rename(reply)


# --- ip and tc --------------------------------------------------------------------------------------------------------


def _bucket(mbit: float) -> list[str]:
    """A token bucket that holds one millisecond, and at least one segment: what lies idle hardly runs ahead later."""
    bits = round(mbit * 1e6)
    return ["tbf", "rate", f"{bits}bit", "burst", str(max(20_000, bits // 8000)), "latency", "200ms"]


def _port(rank: int) -> str:
    return f"port{rank}"


def _quiet_up(namespace: str, device: str) -> None:
    """Bring a device up without an IPv6 address, so that nothing but the ranks' own packets is counted.

    It sends segments of 16 KB, as a network card takes them: packet by packet, the bucket's timers would take up to a
    quarter of a second a step of the ranks' own cores (20 MB at 200 Mbit/s).
    """
    _run("ip", "-n", namespace, "link", "set", device, "addrgenmode", "none")
    _run("ip", "-n", namespace, "link", "set", device, "gso_max_size", "16384")
    _run("ip", "-n", namespace, "link", "set", device, "up")


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def namespaces() -> list[str]:
    """Names of all that there are on this machine."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    return [line.split()[0] for line in listed.splitlines() if line]


def _kill_inside(namespace: str) -> None:
    """Kill whatever runs in a namespace of ours, children of children too."""
    inside = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False).stdout
    for process in map(int, inside.split()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _delete(namespace: str) -> None:
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def _remove_stale() -> None:
    """Remove the networks of processes that are no more: a test run that was killed had no chance to."""
    for name in namespaces():
        owner = _OURS.match(name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            _kill_inside(name)
            _delete(name)


def _of(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
