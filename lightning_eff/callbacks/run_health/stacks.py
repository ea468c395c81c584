"""Where a process stands: the Python stacks of its threads, as text and as a few lines for the others."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch

_FRAMES = 12  # of the main thread, for the others
_COLLECTIVES = "distributed_c10d.py"  # torch's, in which a collective is a function
_COMPILERS = ("torch/_dynamo/", "torch/_inductor/", "torch/_functorch/", "triton/compiler/")
LIVES = "its process is there and does not answer"
_WRAPPERS = ("wrapper", "func_wrapper", "<lambda>")


def main_stack() -> list[traceback.FrameSummary]:
    """Of the main thread, outermost first; may be asked by any thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return [] if frame is None else list(traceback.extract_stack(frame))


def innermost(stack: list[traceback.FrameSummary]) -> list[str]:
    """The last lines of a stack, each as one line of text."""
    return [f"{entry.filename}:{entry.lineno} in {entry.name}" for entry in stack[-_FRAMES:]]


def collective_in(stack: list[traceback.FrameSummary]) -> str | None:
    """The name of the collective that a stack stands in; None for none that Python knows of."""
    for entry in reversed(stack):
        if entry.filename.endswith(_COLLECTIVES) and entry.name not in _WRAPPERS and not entry.name.startswith("_"):
            return entry.name
    return None


def is_compiling(stack: list[traceback.FrameSummary]) -> bool:
    """Whether a stack stands in a compiler, which may take its time in any step."""
    return any(part in entry.filename for entry in stack[-60:] for part in _COMPILERS)


def waits_for_replicas(stack: list[traceback.FrameSummary]) -> bool:
    """Whether a stack stands in what ``ddp_ft`` does to hear of the other replicas."""
    return any(part in entry.filename for entry in stack[-6:] for part in ("/strategies/fault_tolerant/", "/torchft/"))


def waits_for_a_disk(stack: list[traceback.FrameSummary]) -> bool:
    """Whether a stack stands in what AsyncCheckpoint does until an earlier checkpoint is written."""
    return any("/plugins/async_checkpoint/" in entry.filename for entry in stack[-6:])


def all_stacks() -> str:
    """Of all threads, the main one first, with their names."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames: list[tuple[int, FrameType]] = sorted(sys._current_frames().items(), key=lambda pair: pair[0] != main)
    blocks = [
        f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames
        if not str(names.get(ident)).startswith("run-health")
    ]
    return "\n".join(blocks)


def write_stacks(folder: Path, rank: int, head: str) -> Path | None:
    """Append the stacks of this process to a file, and torch's flight recorder to another where it records.

    Returns:
        The file; None if it could not be written, which the run goes on without.
    """
    path = folder / f"rank{rank}.stacks.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{head}\n\n{all_stacks()}\n")
        _write_flight_recorder(folder / f"rank{rank}.flight_recorder.json")
    except OSError:
        return None
    return path


def _write_flight_recorder(path: Path) -> None:
    size = os.environ.get("TORCH_FR_BUFFER_SIZE") or os.environ.get("TORCH_NCCL_TRACE_BUFFER_SIZE") or "0"
    if size.isdecimal() and int(size) > 0 and torch.distributed.is_available():
        from torch._C import _distributed_c10d as c10d

        with suppress(AttributeError, RuntimeError):
            path.write_bytes(c10d._dump_fr_trace_json())  # type: ignore[attr-defined]


def state_of(pid: int) -> str:
    """What the system says of a process of this machine, in words."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "its process is gone"
    words = {"T": "its process is stopped", "t": "a debugger holds its process", "Z": "its process has ended"}
    return words.get(letter, LIVES)
