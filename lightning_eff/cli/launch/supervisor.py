"""Child processes under one roof: prefixed output, restarts, one end for all of them."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

from lightning_eff.cli.launch import tether

RUN = "LIGHTNING_EFF_RUN"
"""In the environment of every process of a run: what is left over is found by it, whatever its session or parent."""

_PARTIAL_LINE_AFTER = 2.0  # seconds: a progress bar's line has no end


class Child:
    """A process in a session of its own that ends when this process does.

    Args:
        name: what its lines of output begin with.
        command: what it runs.
        environment: variables beside those of this process.
        unless: a file; if it exists when the process starts, the command is not run.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], unless: Path | None = None
    ) -> None:
        self.name = name
        # Isolated and without site-packages: a bare interpreter is there in no time.
        tethered = [sys.executable, "-I", "-S", tether.__file__, *(["--unless", str(unless)] if unless else [])]
        self.command = [*tethered, *command]
        self.environment = environment
        self.starts = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0

    def start(self) -> None:
        """Start it, for the first time or again."""
        self.starts += 1
        self.started_at = time.monotonic()
        self.process = subprocess.Popen(
            self.command,
            env={**os.environ, **self.environment, tether.PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal reaches this process, and it decides
        )

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self.process.poll() if self.process else None

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self.process is not None and self.process.poll() is None

    def send(self, number: int) -> None:
        """Send a signal if it still runs."""
        if self.running and self.process:
            self.process.send_signal(number)


class Output:
    """Copies the output of processes line by line, each line with its process's name."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._streams: dict[int, _Stream] = {}
        self.errors: dict[str, str] = {}
        """The last exception that each process, by its name, has written a traceback of."""

    def add(self, child: Child) -> None:
        """Follow a process that has just been started."""
        assert child.process is not None
        for pipe, sink in ((child.process.stdout, sys.stdout), (child.process.stderr, sys.stderr)):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            self._streams[pipe.fileno()] = _Stream(child.name, pipe, sink, self.errors)
            self._selector.register(pipe, selectors.EVENT_READ)

    def copy(self, seconds: float) -> None:
        """Copy what comes, and wait for it for at most so long."""
        if not self._streams:
            time.sleep(seconds)
            return
        for key, _ in self._selector.select(seconds):
            if self._streams[key.fd].read() == b"":
                self._forget(key.fd)
        for stream in self._streams.values():
            if time.monotonic() - stream.last > _PARTIAL_LINE_AFTER:
                stream.write_rest()

    def drain(self) -> None:
        """Copy what is there already, and follow nothing any more."""
        for descriptor in list(self._streams):
            while self._streams[descriptor].read():
                pass
            self._forget(descriptor)
        self._selector.close()

    def _forget(self, descriptor: int) -> None:
        stream = self._streams.pop(descriptor)
        stream.write_rest()
        self._selector.unregister(stream.pipe)
        stream.pipe.close()


class _Stream:
    def __init__(self, name: str, pipe: IO[bytes], sink: IO[str], errors: dict[str, str]) -> None:
        self.name, self.pipe, self.sink, self.errors = name, pipe, sink, errors
        self.in_traceback = False
        self.buffer = b""
        self.last = time.monotonic()

    def read(self) -> bytes | None:
        """What is there: nothing at the end of the stream, None where more may come."""
        try:
            data = os.read(self.pipe.fileno(), 1 << 16)
        except BlockingIOError:
            return None
        self.last = time.monotonic()
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            self._write(line)
        return data

    def write_rest(self) -> None:
        if self.buffer:
            self._write(self.buffer)
        self.buffer = b""

    def _write(self, line: bytes) -> None:
        # Of a progress bar, which goes back to the start of its line, the last state.
        text = line.rstrip(b"\r").rsplit(b"\r", 1)[-1].decode(errors="replace")
        text_at = text.partition("]: ")[2] if text.startswith("[rank") else text  # as torch prefixes them
        if text_at.startswith("Traceback (most recent call last)"):
            self.in_traceback = True
        elif self.in_traceback and text_at and not text_at[0].isspace():  # frames are indented
            self.in_traceback, self.errors[self.name] = False, text_at
        try:
            self.sink.write(f"[{self.name}] {text}\n")
            self.sink.flush()
        except (BrokenPipeError, ValueError):  # nobody reads any more; the run goes on
            pass


def end_all(children: Iterable[Child], output: Output, number: int, patience: float, hurry: Callable[[], bool]) -> None:
    """Send a signal to all, wait until they have ended, and kill what has not.

    Args:
        children: the processes.
        output: goes on copying meanwhile.
        number: the signal.
        patience: seconds before they are killed.
        hurry: says that they are to be killed at once.
    """
    children = list(children)
    for child in children:
        child.send(number)
    deadline = time.monotonic() + patience
    while any(child.running for child in children) and time.monotonic() < deadline and not hurry():
        output.copy(0.05)
    for child in children:
        child.send(signal.SIGKILL)
    for child in children:
        if child.process:
            child.process.wait()


def kill_leftovers(run: str) -> int:
    """Kill every other process that has inherited this run's mark; returns how many there were.

    Tethered ones have gone by now. What a training script has started itself may not have: in a session of its own, or
    as the child of a process that was killed.
    """
    mark = f"{RUN}={run}".encode()
    return sum(_kill_if_marked(int(folder.name), mark) for folder in Path("/proc").glob("[0-9]*"))


def _kill_if_marked(process: int, mark: bytes) -> bool:
    try:
        if process == os.getpid() or mark not in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
            return False
        os.kill(process, signal.SIGKILL)
    except OSError:  # it has ended, or is another user's
        return False
    return True
