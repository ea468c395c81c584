"""TrainingGuard: what goes back and what goes on, exactness, and every action."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_eff.callbacks import EMA, CheckpointAveraging, TrainingGuard, ZClip
from lightning_eff.training.alarms import Alarm, sound
from tests.suite.models import MODELS, Net
from tests.suite.runs import SaveAt, _full, differences, fit
from tests.suite.table import DDP, FSDP2, SINGLE, Strategy

GUARD: dict[str, Any] = {
    "rules": [],
    "every_n_steps": 2,
    "keep": 4,
    "margin": 1,
    "check_every_n_steps": 1,
    "lr_factor": 1.0,
    "lr_steps": None,
}


class Scheduled(Net):
    """With a schedule that depends on its own past."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


MODELS["scheduled"] = Scheduled


class Sounder(L.Callback):
    """Sounds an alarm the first time that a step is done, on one rank alone."""

    def __init__(self, *steps: int, rank: int = 0, severity: float = 1.0, source: str = "test") -> None:
        self.steps = list(steps)
        self.rank = rank
        self.severity = severity
        self.source = source

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.steps and trainer.global_step == self.steps[0]:
            step = self.steps.pop(0)
            if trainer.global_rank == self.rank:
                sound(trainer, pl_module, Alarm(self.source, step, "it is broken", self.severity))


class Randomness(L.Callback):
    """Keeps the random state of a step, or begins with it."""

    def __init__(self, step: int | None = None, begin: dict[str, Any] | None = None) -> None:
        self.step = step
        self.begin = begin
        self.kept: dict[str, Any] = {}

    def on_train_batch_start(self, *_: Any) -> None:
        if self.begin is not None:
            begin, self.begin = self.begin, None
            torch.set_rng_state(begin["torch"])

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.kept:
            self.kept = {"torch": torch.get_rng_state()}


class SaveOnce(SaveAt):
    """Saves a step the first time that it is done."""

    saved = False

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        if trainer.global_step == self.step and not self.saved:
            self.saved = True
            super().on_train_batch_end(trainer, *arguments)


def _others() -> list[L.Callback]:
    return [
        ZClip(warmup_steps=3, z_thresh=1.5, alpha=0.9, max_grad_norm=1e3),
        CheckpointAveraging(window=2, every_n_steps=1, save="none", validate_with="current"),
        EMA(decay=0.9, save="none", validate_with="current"),
    ]


def _state(run: Any, callbacks: list[L.Callback]) -> dict[str, Any]:
    trainer = run.trainer
    return {
        "parameters": run.parameters(),
        "optimizers": [_full(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "callbacks": [_full(callback.state_dict()) for callback in callbacks],
        "window": _full(callbacks[1].window.state_dict()),
        "ema": _full(callbacks[2]._state()),
        "global_step": trainer.global_step,
        "random": torch.get_rng_state(),
    }


def _rolled_back_and_resumed(strategy: Strategy, folder: Path, rank: int, model: str = "scheduled") -> tuple[Any, Any]:
    """An alarm at step 7, heard at step 8, goes back to step 6; and a run that resumes there with later batches."""
    arguments: dict[str, Any] = {"strategy": strategy, "model": model, "steps": 11}
    batches: dict[str, Any] = {"micro_batches": 2, "dropout": 0.5}
    trainer: dict[str, Any] = {"accumulate_grad_batches": 2, "val_check_interval": 6}
    if model == "gan":
        batches, trainer = {}, {}
    per_step = MODELS[model].optimizer_count
    alarm, restored, path = 7 * per_step, 6 * per_step, folder / "restored.ckpt"
    others, random_state = _others(), Randomness(restored)
    guard = TrainingGuard(**{**GUARD, "every_n_steps": 2 * per_step})
    around = [*others, Sounder(alarm, rank=rank), random_state, SaveOnce(restored, path)]
    run = fit(None, folder, callback=guard, around=around, model_arguments=batches, **arguments, **trainer)
    assert (guard.rollbacks, guard.undone_steps) == (1, 2 * per_step)
    assert run.trainer.fit_loop.epoch_loop.total_batch_idx + 1 == 13 * len(batches or "x")
    rolled_back = _state(run, others)

    others = _others()
    around = [*others, Randomness(begin=random_state.kept)]
    later = {**batches, "skip_steps": 2}
    guard = TrainingGuard(**GUARD)
    run = fit(None, folder, callback=guard, around=around, resume=path, model_arguments=later, **arguments, **trainer)
    return rolled_back, _state(run, others)


class TestExact:
    def test_on_one_device(self, tmp_path):
        rolled_back, resumed = _rolled_back_and_resumed(SINGLE, tmp_path, 0)
        assert not differences(resumed, rolled_back)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_on_two_ranks_wherever_the_alarm_is_sounded(self, pool, tmp_path, rank):
        for rolled_back, resumed in pool.run(_rolled_back_and_resumed, DDP, tmp_path, rank):
            assert not differences(resumed, rolled_back)

    def test_with_sharded_weights(self, pool, tmp_path):
        for rolled_back, resumed in pool.run(_rolled_back_and_resumed, FSDP2, tmp_path, 1):
            assert not differences(resumed, rolled_back)

    def test_the_rollback_matters(self, tmp_path):
        undisturbed = fit(None, tmp_path, model="scheduled", steps=11).parameters()
        around = [Sounder(7)]
        run = fit(None, tmp_path, callback=TrainingGuard(**GUARD), around=around, model="scheduled", steps=11)
        assert differences(undisturbed, run.parameters())
