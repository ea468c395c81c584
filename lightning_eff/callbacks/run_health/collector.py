"""Python's garbage collector on all ranks in the same step, so that none waits for another's."""

from __future__ import annotations

import gc

_PYTHONS_OWN = 1000  # objects, at most, that are frozen in a process where nobody has done it: 375 with Python 3.12


class Collector:
    """Switches automatic collection off and collects in chosen steps.

    What is there at the start (modules, the model) is left out of each collection, which makes it a short one.

    Args:
        every_n_steps: >= 1; None leaves Python's own way.
    """

    def __init__(self, every_n_steps: int | None) -> None:
        self.every_n_steps = every_n_steps
        self.collections = 0
        self._on = False
        self._froze = False

    def attach(self) -> None:
        """From now on."""
        if self.every_n_steps is not None and not self._on and gc.isenabled():
            gc.collect()
            self._froze = gc.get_freeze_count() < _PYTHONS_OWN
            if self._froze:
                gc.freeze()
            gc.disable()
            self._on = True

    def step(self, number: int) -> None:
        """A step has ended, the same number on all ranks."""
        if self._on and self.every_n_steps is not None and number % self.every_n_steps == 0:
            gc.collect()
            self.collections += 1

    def detach(self) -> None:
        """As it was."""
        if self._on:
            self._on = False
            gc.enable()
            if self._froze:
                gc.unfreeze()
