"""What a test may leave behind: nothing. A photograph of the process before and after, and the difference in words."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import StrategyRegistry

from harness import REPOSITORY
from harness.pool import live_pids

_CACHES = {".git", ".venv", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache"}

# What `L.seed_everything` leaves for its workers on purpose: no leak, and taken back.
_SEEDS = {"PL_GLOBAL_SEED", "PL_SEED_WORKERS"}

# pytest's own, and the one that torch.compile sets for the life of the process (torch 2.8 with any backend).
# The last one is set by Lightning where there is a GPU.
_KNOWN_VARIABLES = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "CUDA_DEVICE_ORDER"} | _SEEDS

# Global switches of torch: name -> (read, write).
_SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, lambda device: torch.set_default_device(None)),
    "deterministic algorithms": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "gradients enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
    "anomaly detection": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "float32 matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "working directory": (os.getcwd, os.chdir),
}
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


@dataclass
class Photograph:
    """What is there now."""

    processes: set[int]
    threads: set[threading.Thread]
    variables: dict[str, str]
    switches: dict[str, Any]
    strategies: set[str]
    signals: dict[int, Any]

    @classmethod
    def take(cls) -> Photograph:
        """Now."""
        return cls(
            _children(),
            {thread for thread in threading.enumerate() if not thread.daemon},
            {name: value for name, value in os.environ.items() if name not in _KNOWN_VARIABLES},
            {name: read() for name, (read, _) in _SWITCHES.items()},
            set(StrategyRegistry.available_strategies()),
            {number: signal.getsignal(number) for number in _SIGNALS},
        )


def leaks_since(before: Photograph, patience: float = 2.0) -> list[str]:
    """Describe what was left behind, and put back what can be put back, so that only one test is blamed.

    What ends by itself (a process, a thread) gets `patience` seconds to do so.
    """
    deadline = time.monotonic() + patience
    while True:
        after = Photograph.take()
        ending = (after.processes - before.processes) | (after.threads - before.threads)
        if not ending or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    found = [f"process {pid}: {_command(pid)}" for pid in sorted(after.processes - before.processes)]
    found += [f"thread {thread.name}" for thread in after.threads - before.threads]
    for name in sorted(before.variables.keys() | after.variables.keys()):
        old, new = before.variables.get(name), after.variables.get(name)
        if old != new:
            found.append(f"environment variable {name}: {old!r} became {new!r}")
            if old is None:
                del os.environ[name]
            else:
                os.environ[name] = old
    for name in _SEEDS:
        os.environ.pop(name, None)
    for name, (_, write) in _SWITCHES.items():
        if before.switches[name] != after.switches[name]:
            found.append(f"{name}: {before.switches[name]} became {after.switches[name]}")
            write(before.switches[name])
    for name in after.strategies - before.strategies:
        found.append(f"registered strategy {name}")
        StrategyRegistry.remove(name)
    for number, handler in before.signals.items():
        if after.signals[number] != handler:
            found.append(f"signal handler of {signal.Signals(number).name}")
            signal.signal(number, handler)
    if dist.is_available() and dist.is_initialized():
        found.append("initialised process group")
        dist.destroy_process_group()
    return found


class WrittenFiles:
    """Files and folders that this process makes in the repository.

    It listens to Python's own audit events instead of comparing folders, so work that goes on beside the tests is not
    taken for theirs. What C++ opens by itself (`torch.save` to a string path) is not heard.
    """

    def __init__(self) -> None:
        self._made: dict[Path, None] = {}
        self._listening = False
        sys.addaudithook(self._hear)  # cannot be removed again: one for the session

    def start(self) -> None:
        """Listen from now on."""
        self._made.clear()
        self._listening = True

    def stop(self) -> list[str]:
        """Listen no longer; what was made since `start` and is still there."""
        self._listening = False
        left = [path for path in self._made if path.exists()]
        return [f"{'folder' if path.is_dir() else 'file'} {path.relative_to(REPOSITORY)}" for path in left]

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._listening:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & os.O_CREAT:
                self._note(path)
        elif event == "os.mkdir":
            self._note(arguments[0])
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._note(arguments[1])

    def _note(self, path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a descriptor
        absolute = Path(os.path.abspath(os.fsdecode(path)))
        if absolute.is_relative_to(REPOSITORY) and not _CACHES & set(absolute.parts) and not absolute.exists():
            self._made[absolute] = None


def _children() -> set[int]:
    """The process ids of this process's children, without the pool's and multiprocessing's own helper."""
    from multiprocessing.resource_tracker import _resource_tracker

    known = live_pids() | {getattr(_resource_tracker, "_pid", None)}
    tasks = Path(f"/proc/{os.getpid()}/task")
    children = {child.pid for child in multiprocessing.active_children()}
    for task in tasks.iterdir() if tasks.exists() else ():
        with contextlib.suppress(OSError):  # the thread has ended, or the kernel does not keep this file
            children |= {int(pid) for pid in (task / "children").read_text().split()}
    # Where MPI is installed, Lightning's question whether it runs under it starts that daemon.
    return {pid for pid in children if pid is not None and not _command(pid).startswith("orted ")} - known


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "?"
    return b" ".join(words).decode().strip() or "ended, never waited for"
