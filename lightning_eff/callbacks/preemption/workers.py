"""Workers of a loader, which a signal to the whole job reaches too, and which the step in flight still needs."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from lightning_eff.training.wrapping import Wrapper


class Workers:
    """Lets the workers of a fit outlive the signals that end it.

    Slurm, systemd and a terminal send a signal to every process of a job. A worker would die of it at once, which torch
    makes an error in whatever the rank is at, long before the step at which it is to stop.

    They are started with these signals held back, so that none comes too early, and end as ever when the rank is done
    with them. Where the system does not tell who has sent a signal (all but Linux), nothing is done.

    Args:
        signals: which.
    """

    def __init__(self, signals: Sequence[signal.Signals]) -> None:
        self.signals = tuple(signals)
        self._wrappers: list[Wrapper] = []

    def follow(self, combined: CombinedLoader | None) -> None:
        """Do so for these loaders, which are there and have not been iterated, until ``detach``."""
        if combined is None or not self.signals or not hasattr(signal, "sigwaitinfo"):
            return
        for outer in combined.flattened:
            loader = getattr(outer, "loader", outer)  # under `ddp_ft` the user's, from which it makes its own
            if isinstance(loader, DataLoader) and not isinstance(loader.worker_init_fn, _WorkerStart):
                loader.worker_init_fn = _WorkerStart(loader.worker_init_fn, self.signals)
                self._wrappers.append(Wrapper(loader, "_get_iterator", self._started))

    def detach(self) -> None:
        """Leave the loaders as they were."""
        for wrapper in self._wrappers:
            wrapper.remove()
            if isinstance(start := wrapper.target.worker_init_fn, _WorkerStart):
                wrapper.target.worker_init_fn = start.function
        self._wrappers = []

    def _started(self, inner: Callable[[], Any]) -> Any:
        """A process begins with the signals blocked that its parent has blocked."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)
        try:
            return inner()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _WorkerStart:
    """Stands in front of ``worker_init_fn``."""

    def __init__(self, function: Callable[[int], None] | None, signals: Sequence[signal.Signals]) -> None:
        self.function = function
        self.signals = signals
        self.parent = os.getpid()

    def __call__(self, worker: int) -> None:
        """Called in a worker when it starts."""
        signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)
        threading.Thread(target=self._listen, name="lightning_eff preemption", daemon=True).start()
        if self.function is not None:
            self.function(worker)

    def _listen(self) -> None:
        """A worker that the rank terminates has to end, or the rank waits for it for ever when it exits."""
        while True:
            came = signal.sigwaitinfo(self.signals)
            if came.si_signo == signal.SIGTERM and came.si_pid == self.parent:
                os._exit(0)
