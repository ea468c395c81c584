"""Processes of our own: where they start, what they have in common, and where they listen."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from harness import REPOSITORY


def spawned(workers: int = 1) -> ProcessPoolExecutor:
    """Processes that begin with nothing of this one: no threads, no memory in use, no seeds."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module's function in a process of its own."""
    with spawned() as pool:
        return pool.submit(function, *arguments).result()


def environment(**more: str) -> dict[str, str]:
    """Of a process that finds this repository's modules from any folder and computes on one thread."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **more}


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def eventually(condition: Callable[[], Any], seconds: float = 40.0, what: str = "") -> Any:
    """Wait for something to be true; what it is then. After so many seconds ``what`` says that it did not come."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(what or f"it did not come in {seconds:g} s")
        time.sleep(0.02)
    return result


def listeners(pids: Iterable[int]) -> set[str]:
    """Local addresses, in hexadecimal, on which processes listen over TCP (Linux)."""
    sockets = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            for link in list(Path(f"/proc/{pid}/fd").iterdir()):
                with contextlib.suppress(OSError):  # it has closed this one, such as a connection that was just tried
                    sockets.add(os.readlink(link))
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].split(":")[0])
    return found
