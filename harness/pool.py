"""Worker processes for distributed runs: started once per session, cleaned between tasks, replaced after a failure.

A test asks for the `pool` fixture and sends a module-level function to every rank:

    def _world_sum(value):
        tensor = torch.tensor(value)
        torch.distributed.all_reduce(tensor)
        return tensor.item()

    def test_sum(pool):
        assert pool.run(_world_sum, 3.0) == [6.0, 6.0]

In a worker the default process group (gloo) exists and torchrun's variables are set, so a Lightning `Trainer(devices=2,
strategy="ddp")` built there recognises torchrun's environment and launches nothing itself. Warnings are handled as in
the test that called `run`: where they are errors, they are errors in the workers.

This module imports neither torch nor lightning at its top: a worker sets its rank and its thread count first.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.leaks import WrittenFiles

START_LIMIT = 150.0  # importing torch and lightning on a loaded two-core machine
TIME_LIMIT = 90.0  # of one task; below pytest's own limit, so that the pool can say which rank hangs where
GRACE = 3.0  # what the other ranks get to report after the first one has failed

_ALL_RANKS_ARE_DONE = b"all ranks are done"

_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def live_pids() -> set[int]:
    """Process ids of every live pool: the leak police leaves them alone."""
    return {pid for pool in _pools for pid in pool.pids}


def check_sendable(fn: Callable[..., Any]) -> None:
    """Refuse a function that another process could not import."""
    if "<" in getattr(fn, "__qualname__", ""):
        raise TypeError(f"{fn.__qualname__} cannot be sent to a worker: it must be defined at the top of a module")


class WorkerError(RuntimeError):
    """At least one rank failed, died or hung.

    `tracebacks` maps a failed rank to its text, `results` maps the ranks that did return to what they returned.
    The first failed rank's own exception is the `__cause__`, when it can be pickled.
    """

    def __init__(self, what: str, tracebacks: dict[int, str], results: dict[int, Any]) -> None:
        self.tracebacks = tracebacks
        self.results = results
        details = "".join(f"\n--- rank {rank} ---\n{text.rstrip()}" for rank, text in sorted(tracebacks.items()))
        super().__init__(f"{what}{details}")


class PoolTimeoutError(WorkerError):
    """At least one rank was still running when the time was up; its stacks are in the text."""


class Pool:
    """`world_size` gloo workers. They start with the first `run` and again with the first `run` after a failure.

    As a context manager it ends them on the way out.
    """

    def __init__(self, world_size: int = 2) -> None:
        self.world_size = world_size
        self._workers: list[_Worker] = []
        _pools.add(self)
        atexit.register(_close_if_alive, weakref.ref(self))

    @property
    def pids(self) -> set[int]:
        """Process ids of the workers; none before the first `run`."""
        return {worker.process.pid for worker in self._workers if worker.process.pid is not None}

    def run(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Any]:
        """Call `fn(*args, **kwargs)` on every rank and return the results in the order of the ranks."""
        return self._run(fn, args, kwargs, TIME_LIMIT, GRACE, True)

    def using(self, *, time_limit: float = TIME_LIMIT, grace: float = GRACE, process_group: bool = True) -> _Options:
        """The same pool with other limits, or without a process group: `pool.using(time_limit=5).run(fn)`.

        `grace` is how long the other ranks may go on after one has failed; what they return in that time is in
        `WorkerError.results`.
        """
        return _Options(self, time_limit, grace, process_group)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers: between tasks they hold nothing, and an interpreter with torch takes seconds to leave."""
        self._kill()

    def _run(
        self, fn: Callable[..., Any], args: Any, kwargs: Any, time_limit: float, grace: float, process_group: bool
    ) -> list[Any]:
        check_sendable(fn)
        if not self._workers:
            self._start()
        # The parent holds the store, as torchrun's agent does: the system chose its port and nobody can take it.
        # A store for every task: the groups of the next one must not find addresses of this one.
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        task = pickle.dumps((fn, args, kwargs, store.port, warnings.filters, process_group, time_limit))
        try:
            self._send(task)
            replies, hung = self._collect(time.monotonic() + time_limit, grace)
            for worker in self._workers:
                worker.pass_on_stderr()
            if len(replies) == self.world_size and all("result" in reply for reply in replies.values()):
                self._send(_ALL_RANKS_ARE_DONE)
        except BaseException:  # also pytest's own time limit: a pool with a task half done is of no further use
            self._kill()
            raise
        results = {rank: reply["result"] for rank, reply in replies.items() if "result" in reply}
        if len(results) == self.world_size:
            return [results[rank] for rank in range(self.world_size)]
        tracebacks = {rank: reply["traceback"] for rank, reply in replies.items() if "traceback" in reply}
        failed = sorted(tracebacks)  # in which order they failed is a matter of luck
        tracebacks.update({rank: self._workers[rank].stacks() for rank in hung})
        self._kill()
        name = getattr(fn, "__qualname__", fn)
        if failed:
            raise WorkerError(f"{name} failed on rank {listed(failed)}", tracebacks, results) from next(
                (replies[rank]["exception"] for rank in failed if replies[rank]["exception"] is not None), None
            )
        raise PoolTimeoutError(f"{name} hung for {time_limit:g} s on rank {listed(hung)}", tracebacks, results)

    def _collect(self, deadline: float, grace: float) -> tuple[dict[int, dict[str, Any]], list[int]]:
        replies: dict[int, dict[str, Any]] = {}
        waiting = {worker.connection: worker for worker in self._workers}
        while waiting and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), timeout=left):
                worker = waiting.pop(connection)  # type: ignore[index]
                reply = worker.receive()
                if "result" not in reply and all("result" in other for other in replies.values()):
                    deadline = min(deadline, time.monotonic() + grace)  # the others may be stuck in a collective
                replies[worker.rank] = reply
        return replies, sorted(worker.rank for worker in waiting.values())

    def _send(self, message: bytes) -> None:
        for worker in self._workers:
            with contextlib.suppress(OSError):  # it died: `_collect` says so
                worker.connection.send_bytes(message)

    def _start(self) -> None:
        self._workers = [_Worker(rank, self.world_size) for rank in range(self.world_size)]
        replies, hung = self._collect(time.monotonic() + START_LIMIT, GRACE)
        tracebacks = {rank: reply["traceback"] for rank, reply in replies.items() if "traceback" in reply}
        if tracebacks or hung:
            self._kill()
            raise WorkerError("the workers did not start", tracebacks | dict.fromkeys(hung, "still starting"), {})

    def _kill(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []


class _Options:
    def __init__(self, pool: Pool, time_limit: float, grace: float, process_group: bool) -> None:
        self._pool = pool
        self._options = (time_limit, grace, process_group)

    def run(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Any]:
        return self._pool._run(fn, args, kwargs, *self._options)


class _Worker:
    """The parent's end of one worker."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self._folder = Path(tempfile.mkdtemp(prefix="pool-"))
        (self._folder / "stderr").touch()
        self._passed_on = 0
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # Not a daemon: a daemon may not have children, and a test may want a DataLoader with workers.
        self.process = context.Process(
            target=_work, args=(theirs, rank, world_size, self._folder), name=f"pool-rank-{rank}", daemon=False
        )
        self.process.start()
        theirs.close()  # so that the end of the worker is the end of the stream

    def receive(self) -> dict[str, Any]:
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            self.process.join(5)
            # What C++ said, and where faulthandler found it.
            last = "\n".join(self._said().decode(errors="replace").splitlines()[-100:])
            text = f"the process ended with exit code {self.process.exitcode}\n{last}"
            return {"traceback": text, "exception": None}

    def pass_on_stderr(self) -> None:
        """Write to this process's stderr what the worker has written to its own."""
        said = self._said()
        self._passed_on += len(said)
        sys.stderr.write(said.decode(errors="replace"))

    def _said(self) -> bytes:
        with open(self._folder / "stderr", "rb") as stream:
            stream.seek(self._passed_on)
            return stream.read()

    def stacks(self) -> str:
        """Where every thread of a hanging worker is."""
        with contextlib.suppress(OSError, TypeError):
            os.kill(self.process.pid, signal.SIGUSR1)  # type: ignore[arg-type]
            for _ in range(20):
                time.sleep(0.05)
                if text := (self._folder / "stacks").read_text():
                    return text
        return "still running (no stacks to show)"

    def kill(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _work(connection: Connection, rank: int, world_size: int, folder: Path) -> None:
    """A worker's whole life."""
    with open(folder / "stderr", "ab") as stream:
        os.dup2(stream.fileno(), 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        ROLE_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        ROLE_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        TORCHELASTIC_RUN_ID="pool",
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
        OMP_NUM_THREADS="1",
        # The host's name need not resolve to an address that gloo can bind.
        GLOO_SOCKET_IFNAME=next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo"),
    )
    with open(folder / "stacks", "w") as stream:
        faulthandler.enable()  # also where C++ aborts
        faulthandler.register(signal.SIGUSR1, file=stream)
        try:
            import lightning  # noqa: F401  (with the rank already known)
            import torch

            from harness.leaks import WrittenFiles

            torch.set_num_threads(1)
            files = WrittenFiles()
            connection.send_bytes(pickle.dumps({"result": "ready"}))
            with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
                while True:
                    with _clean_state():
                        connection.send_bytes(_answer(connection.recv_bytes(), files))
                        # A rank that closes its connections while another still reads from them is an error there.
                        connection.recv_bytes()
        except BaseException as error:  # the parent raises it
            connection.send_bytes(failure(error))
            raise


def _answer(task: bytes, files: WrittenFiles) -> bytes:
    """Do one task; the reply is pickled by value: a tensor must not outlive its worker in shared memory."""
    try:
        fn, args, kwargs, port, filters, process_group, time_limit = pickle.loads(task)
        os.environ["MASTER_PORT"] = str(port)
        with warnings.catch_warnings():
            warnings.resetwarnings()
            warnings.filters.extend(filters)  # type: ignore[attr-defined]
            if process_group:
                import torch.distributed as dist

                dist.init_process_group("gloo", timeout=timedelta(seconds=time_limit + 30))
            files.start()
            try:
                result = fn(*args, **kwargs)
            finally:
                left = files.stop()
            if left:
                raise AssertionError("left behind: " + "; ".join(left))
            return pickle.dumps({"result": result})
    except BaseException as error:
        return failure(error)


def failure(error: BaseException) -> bytes:
    """What a worker sends in place of a result: the traceback, and the exception itself where it can be sent."""
    reply = {"traceback": "".join(traceback.format_exception(error)), "exception": error}
    try:
        pickle.loads(pickle.dumps(reply))  # some exceptions can be pickled but not be built again
    except Exception:
        reply["exception"] = None
    return pickle.dumps(reply)


@contextlib.contextmanager
def _clean_state() -> Iterator[None]:
    """Start every task from the same state, whatever the task before it has left."""
    import random

    import numpy
    import torch
    import torch.distributed as dist

    environment, directory = dict(os.environ), Path.cwd()
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    try:
        yield
    finally:
        gc.collect()  # what holds on to a process group (a DDP reducer in a reference cycle) goes first
        if dist.is_initialized():
            dist.destroy_process_group()
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device() != torch.device("cpu"):  # torch 2.8 cannot say it once it has been set to None
            torch.set_default_device(None)
        torch.set_num_threads(1)
        torch.set_grad_enabled(True)
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")


def _close_if_alive(reference: weakref.ref[Pool]) -> None:
    pool = reference()
    if pool is not None:
        pool.close()


def listed(ranks: list[int]) -> str:
    """Ranks in words."""
    return ", ".join(map(str, ranks))
