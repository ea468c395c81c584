"""Where the news comes from that this process has to end: signals, a file, a callable that is polled, a clock."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from lightning_eff.arguments import check

# A scheduler may send one signal over two ways at the same time (srun and slurmstepd): that is one and not two.
SAME_SIGNAL_SECONDS = 1.0


def signal_numbers(names: Any) -> list[signal.Signals]:
    """``["SIGTERM"]`` -> their numbers; None for just that one.

    Raises:
        ValueError: there is no such signal here, or it cannot be handled.
    """
    known = signal.Signals.__members__
    usable = sorted(word for word in known if word.startswith("SIG") and word not in ("SIGKILL", "SIGSTOP"))
    listed = ["SIGTERM"] if names is None else names
    ok = isinstance(listed, list | tuple) and all(isinstance(name, str) and name in usable for name in listed)
    check("signals", names, ok, f"a list of some of {', '.join(usable)}, or None for ['SIGTERM']")
    return [known[name] for name in listed]


class Notices:
    """Takes note that the process has to end, and of the first reason why. Asking costs nothing.

    In a signal's handler nothing is done but that: the main thread may hold any lock there. A second signal, more than
    a second behind the first, ends the process at once, as it would have without a handler.

    Args:
        signals: that are handled.
        file: its existence is a notice.
        notice: polled, says why in words, or None.
        poll_seconds: how often the file is looked for and ``notice`` is asked.
        seconds: after so many since ``begin``; None for never.
    """

    def __init__(
        self,
        signals: Sequence[signal.Signals],
        file: str | None,
        notice: Callable[[], str | None] | None,
        poll_seconds: float,
        seconds: float | None,
    ) -> None:
        self.signals = tuple(signals)
        self.file = file
        self.notice = notice
        self.poll_seconds = poll_seconds
        self.seconds = seconds
        self._signal: int | None = None
        self._signalled = 0.0  # when, by the monotonic clock
        self._polled: str | None = None
        self._began = 0.0
        self._before: dict[int, Any] = {}
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    @property
    def reason(self) -> str | None:
        """Why the process has to end; None if it has not."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._polled is not None:
            return self._polled
        if self.seconds is not None and time.monotonic() - self._began >= self.seconds:
            return f"max_time of {self.seconds:g} s"
        return None

    def begin(self) -> None:
        """The clock starts, and so does polling."""
        self._signal = self._polled = None
        self._began = time.monotonic()
        if (self.file is not None or self.notice is not None) and self._thread is None:
            self._ended.clear()
            self._thread = threading.Thread(target=self._poll, name="lightning_eff preemption", daemon=True)
            self._thread.start()

    def handle_signals(self) -> None:
        """Put this in the place of the signals' handlers, of whatever came there since the last time."""
        if threading.current_thread() is not threading.main_thread():
            if self.signals:
                warnings.warn("Preemption hears no signals: training does not run in the main thread", stacklevel=2)
            return
        for number in self.signals:
            before = signal.getsignal(number)
            if before != self._handle:
                self._before.setdefault(number, before)
                signal.signal(number, self._handle)

    def end(self) -> None:
        """Put the handlers of before back, and stop polling."""
        for number, before in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, before if before is not None else signal.SIG_DFL)
        self._before = {}
        if self._thread is not None:
            self._ended.set()
            self._thread.join(timeout=self.poll_seconds + 5)
            self._thread = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._signalled = number, now
        elif now - self._signalled > SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _poll(self) -> None:
        while not self._ended.wait(self.poll_seconds):
            if self.file is not None and os.path.exists(self.file):
                self._polled = f"the file {self.file}"
                return
            if self.notice is not None:
                try:
                    self._polled = self.notice()
                except Exception as error:  # a metadata service that does not answer is no reason to end
                    warnings.warn(f"Preemption: the notice could not be asked: {error!r}", stacklevel=2)
                if self._polled is not None:
                    return

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_thread": None, "_ended": None, "_before": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._ended = threading.Event()
