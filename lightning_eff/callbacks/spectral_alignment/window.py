"""What was counted in a step that is not over: each rank keeps its own beside a checkpoint that comes within one."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_eff.callbacks.spectral_alignment.probe import AlignmentProbe
from lightning_eff.training.rank_state import RankState
from lightning_eff.training.trainer import accumulates


class ProbeWindow:
    """Follows the checkpoints of a run whose steps have several batches."""

    def __init__(self) -> None:
        self._probe: AlignmentProbe | None = None
        self._saved: dict[str, Any] | None = None
        self._state = RankState("spectral_alignment", save=self._save, load=self._load)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In ``setup``."""
        self._probe = self._saved = None
        if accumulates(trainer, pl_module):
            self._state.attach(trainer.strategy)

    def begin(self, probe: AlignmentProbe) -> None:
        """A run begins with a probe, or goes on with it."""
        self._probe, saved, self._saved = probe, self._saved, None
        if saved is not None:
            probe.take(saved)

    def _save(self) -> dict[str, Any]:
        return {} if self._probe is None else self._probe.counted()

    def _load(self, saved: dict[str, Any] | None) -> None:
        self._saved = saved

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
