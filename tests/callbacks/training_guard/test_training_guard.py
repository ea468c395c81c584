"""TrainingGuard: what goes back and what goes on, exactness, and every action."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from harness.faults import InjectedError
from lightning_eff.callbacks import (
    EMA,
    MISA,
    Alarm,
    AlarmRule,
    CheckpointAveraging,
    ExactResume,
    ExplodingLoss,
    GradES,
    GradientSpikes,
    NonFiniteLoss,
    SpectralAlignmentMonitor,
    TrainingDivergedError,
    TrainingGuard,
    ZClip,
    sound,
)
from lightning_eff.training.trainable import set_trainable
from tests.callbacks.training_guard.guard_models import GUARD, AtBatch, Poison, Sounder, kill
from tests.suite.models import MODELS, Net
from tests.suite.runs import Place, SaveAt, differences, fit, full
from tests.suite.table import ARC_TOPK, DDP, FSDP2, ROWS, SINGLE, Strategy


class Scheduled(Net):
    """With a schedule that depends on its own past."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


MODELS["scheduled"] = Scheduled


class ScaleTo(L.Callback):
    """Sets the scale of a GradScaler behind a step, once."""

    def __init__(self, scale: float, step: int) -> None:
        self.scale = scale
        self.step: int | None = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.step = None
            trainer.precision_plugin.scaler._scale.fill_(self.scale)


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
        CheckpointAveraging(window=6, every_n_steps=1, save="none", validate_with="current"),
        EMA(decay=0.9, save="none", validate_with="current"),
    ]


def _state(run: Any, callbacks: list[L.Callback]) -> dict[str, Any]:
    trainer = run.trainer
    return {
        "parameters": run.parameters(),
        "optimizers": [full(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "callbacks": [full(callback.state_dict()) for callback in callbacks],
        "window": full(callbacks[1].window.state_dict()),
        "ema": full(callbacks[2].average.state()),
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


class SaveWithin(Checkpoint):
    """Saves between the two batches of a step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 * self.step:
            trainer.save_checkpoint(self.path)


class Remembers(AlarmRule):
    """Keeps the loss of each step."""

    name = "remembers"

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def value(self, trainer, pl_module, loss):
        return loss

    def judge(self, step, value):
        self.losses[step] = value

    def state_dict(self):
        return {"losses": dict(self.losses)}

    def load_state_dict(self, state_dict):
        self.losses = dict(state_dict["losses"])


def _saved_within_a_step(strategy: Strategy, folder: Path) -> tuple[Any, Any]:
    """The losses that a rule is given, in a run and in one that resumes between the two batches of its step 4."""
    path, found = folder / "within.ckpt", []
    for resume in (None, path):
        guard = TrainingGuard(**{**GUARD, "rules": [Remembers()]})
        around = [ExactResume(), *([SaveWithin(3, path)] if resume is None else [])]
        batches = {"model_arguments": {"micro_batches": 2}, "accumulate_grad_batches": 2}
        run = fit(None, folder, strategy=strategy, callback=guard, around=around, resume=resume, steps=5, **batches)
        found.append({**run.parameters(), **guard.state_dict()["rules"][0]})
    return found[0], found[1]


class TestExact:
    @pytest.mark.parametrize("strategy", [SINGLE, DDP], ids=lambda strategy: strategy.name)
    def test_a_checkpoint_within_a_step_has_the_losses_of_its_first_batches(self, pool, tmp_path, strategy):
        for whole, resumed in Place(strategy, tmp_path, pool).run(_saved_within_a_step, strategy, tmp_path):
            assert list(whole["losses"]) == [1, 2, 3, 4, 5]
            assert differences(whole, resumed) == []

    def test_on_one_device(self, tmp_path):
        rolled_back, resumed = _rolled_back_and_resumed(SINGLE, tmp_path, 0)
        assert not differences(resumed, rolled_back)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_on_two_ranks_wherever_the_alarm_is_sounded(self, pool, tmp_path, rank):
        for rolled_back, resumed in pool.run(_rolled_back_and_resumed, DDP, tmp_path, rank):
            assert not differences(resumed, rolled_back)

    def test_with_the_error_memory_of_a_compressor(self, pool, tmp_path):
        for rolled_back, resumed in pool.run(_rolled_back_and_resumed, ARC_TOPK, tmp_path, 0):
            assert not differences(resumed, rolled_back)

    def test_with_sharded_weights(self, pool, tmp_path):
        for rolled_back, resumed in pool.run(_rolled_back_and_resumed, FSDP2, tmp_path, 1):
            assert not differences(resumed, rolled_back)

    def test_with_two_optimizers_by_hand(self, tmp_path):
        rolled_back, resumed = _rolled_back_and_resumed(SINGLE, tmp_path, 0, "gan")
        assert not differences(resumed, rolled_back)

    def test_with_a_grad_scaler(self, tmp_path):
        """An overflow between the restored step and the alarm lowers the scale, and that is undone as well."""

        def run(guard: TrainingGuard | None, *around: L.Callback, **arguments: Any) -> tuple[Any, float]:
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
            precision = MixedPrecision("16-mixed", "cpu", scaler)
            run = fit(None, tmp_path, callback=guard, around=around, steps=11, plugins=[precision], **arguments)
            return run.outcome(), scaler.get_scale()

        path = tmp_path / "restored.ckpt"
        rolled_back = run(TrainingGuard(**GUARD), Sounder(7), ScaleTo(2.0**60, step=6), SaveOnce(6, path))
        resumed = run(TrainingGuard(**GUARD), resume=path, model_arguments={"skip_steps": 2})
        for outcome in (rolled_back[0], resumed[0]):
            outcome.pop("callback")
        assert rolled_back[1] == resumed[1] < 2.0**20
        assert not differences(resumed[0], rolled_back[0])

    def test_the_rollback_matters(self, tmp_path):
        undisturbed = fit(None, tmp_path, model="scheduled", steps=11).parameters()
        around = [Sounder(7)]
        run = fit(None, tmp_path, callback=TrainingGuard(**GUARD), around=around, model="scheduled", steps=11)
        assert differences(undisturbed, run.parameters())


class Closes(L.Callback):
    """Closes parameters behind a step, and drops their optimizer state."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            change = set_trainable(trainer, {"head.weight": False, "head.bias": False})
            for parameter in change.frozen.values():
                trainer.optimizers[0].state.pop(parameter)


def _closed_and_rolled_back(strategy: Strategy, folder: Path) -> tuple[Any, Any]:
    path = folder / "restored.ckpt"
    arguments: dict[str, Any] = {"strategy": strategy, "steps": 11}
    around = [Closes(7), Sounder(7, rank=strategy.ranks - 1), SaveOnce(6, path)]
    # The reference: the same parameters are closed in step 7, which the run has undone and does again.
    run = fit(None, folder, callback=TrainingGuard(**GUARD), around=around, **arguments)
    one = run.outcome()["parameters"], [p.requires_grad for p in run.model.parameters()]
    skipped = {"skip_steps": 2}
    run = fit(None, folder, around=[Closes(7)], resume=path, model_arguments=skipped, **arguments)
    return one, (run.outcome()["parameters"], [p.requires_grad for p in run.model.parameters()])


def _method_rolled_back(strategy: Strategy, folder: Path, name: str) -> tuple[Any, Any, dict[int, list[bool]]]:
    """A run that opens and closes parameters in the steps that are undone, one that resumes; and who was open when."""
    row = next(row for row in ROWS if row.id == name)
    path, trained = folder / "restored.ckpt", {}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            trained.setdefault(trainer.global_step, [parameter.requires_grad for parameter in pl_module.parameters()])

    def run(*around: L.Callback, **more: Any) -> Any:
        method, guard = row.build(), TrainingGuard(**GUARD)
        run = fit(None, folder, strategy=strategy, callback=guard, around=[method, *around], steps=11, **more)
        trainable = [parameter.requires_grad for parameter in run.model.parameters()]
        return {**run.outcome(), "callback": full(method.state_dict()), "trainable": trainable}

    rolled_back = run(Watch(), Sounder(9), SaveOnce(8, path))  # the set changes in step 9 or 10, which are undone
    return rolled_back, run(resume=path, model_arguments={"skip_steps": 2}), trained


class TestChangingParameters:
    """Methods that open and close parameters, GradES and MISA, between a snapshot and an alarm."""

    @pytest.mark.parametrize("name", ["GradES", "MISA-official-layers"])
    def test_a_method_does_again_what_was_undone(self, name, tmp_path):
        """What was frozen or sampled between the snapshot and the alarm is undone, and comes again on later batches."""
        rolled_back, resumed, trained = _method_rolled_back(SINGLE, tmp_path, name)
        assert not differences(resumed, rolled_back)
        assert trained[8] != trained[10]  # before the rollback

    @pytest.mark.parametrize("name", ["GradES", "MISA-official-layers"])
    def test_a_method_on_two_ranks(self, name, pool, tmp_path):
        for rolled_back, resumed, trained in pool.run(_method_rolled_back, DDP, tmp_path, name):
            assert not differences(resumed, rolled_back)
            assert trained[8] != trained[10]

    @pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
    def test_what_was_closed_is_open_again(self, tmp_path):
        rolled_back, resumed = _closed_and_rolled_back(SINGLE, tmp_path)
        assert not differences(resumed, rolled_back)
        assert False in rolled_back[1]

    @pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
    def test_on_two_ranks(self, pool, tmp_path):
        for rolled_back, resumed in pool.run(_closed_and_rolled_back, DDP, tmp_path):
            assert not differences(resumed, rolled_back)

    def test_they_are_trained_in_the_meantime(self, tmp_path):
        """The head moves between the rollback and the second time that it is closed."""
        heads = {}

        class Watch(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, *_):
                heads[trainer.fit_loop.total_batch_idx] = (trainer.global_step, pl_module.head.weight.detach().clone())

        fit(None, tmp_path, callback=TrainingGuard(**GUARD), around=[Closes(7), Sounder(7), Watch()], steps=11)
        # Batch 8 is the one in which the run goes back to step 6, behind `Watch`; 9 trains the head; then it is closed.
        assert [step for step, _ in heads.values()] == [1, 2, 3, 4, 5, 6, 7, 8, 7, 8, 9, 10, 11]
        assert not torch.equal(heads[5][1], heads[8][1])
        assert torch.equal(heads[8][1], heads[12][1])


class TestGoingBack:
    def test_an_older_snapshot_when_the_newest_has_not_helped(self, tmp_path):
        guard = TrainingGuard(**GUARD)
        fit(None, tmp_path, callback=guard, around=[Sounder(7, 7)], steps=10)
        assert (guard.rollbacks, guard._last_restored) == (2, 4)

    def test_the_newest_one_when_the_run_has_got_further(self, tmp_path):
        guard = TrainingGuard(**GUARD)
        fit(None, tmp_path, callback=guard, around=[Sounder(5, 9)], steps=10)
        assert (guard.rollbacks, guard._last_restored) == (2, 8)

    def test_a_margin(self, tmp_path):
        guard = TrainingGuard(**{**GUARD, "margin": 4})
        fit(None, tmp_path, callback=guard, around=[Sounder(9)], steps=10)
        assert guard._last_restored == 4

    def test_the_oldest_one_at_the_start_of_a_run(self, tmp_path):
        guard = TrainingGuard(**{**GUARD, "margin": 4})
        untrained = Net().state_dict()
        starts = []

        class Watch(L.Callback):
            def on_train_batch_start(self, trainer, pl_module, *_):
                if trainer.global_step == 0:
                    starts.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})

        fit(None, tmp_path, callback=guard, around=[Sounder(3), Watch()], steps=10)
        assert guard._last_restored == 0
        assert len(starts) == 2
        assert not differences(starts[1], dict(untrained))

    def test_at_the_last_step(self, tmp_path):
        """Nothing follows in which the last losses could be read: they are read at once, and the run goes on."""
        guard = TrainingGuard(**{**GUARD, "read_every_n_steps": 4})
        run = fit(None, tmp_path, callback=guard, around=[Sounder(10)], steps=10)
        assert (guard.rollbacks, run.trainer.global_step) == (1, 10)

    def test_it_gives_up(self, tmp_path):
        guard = TrainingGuard(**{**GUARD, "max_rollbacks": 2})
        with pytest.raises(TrainingDivergedError, match=r"test at step 7: it is broken, after 2 rollbacks") as error:
            fit(None, tmp_path, callback=guard, around=[Sounder(7, 7, 7)], steps=10)
        path = tmp_path / "training_guard-step=2.ckpt"
        assert str(path) in str(error.value)
        assert torch.load(path, weights_only=True)["global_step"] == 2

    def test_the_count_begins_anew(self, tmp_path):
        guard = TrainingGuard(**{**GUARD, "max_rollbacks": 1, "forget_after": 2})
        fit(None, tmp_path, callback=guard, around=[Sounder(3, 7)], steps=10)
        assert guard.rollbacks == 2

    def test_without_a_snapshot_from_before(self, tmp_path):
        class Late(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, *_):
                if trainer.global_step == 9:
                    sound(trainer, Alarm("test", 2, "it was broken"))

        guard = TrainingGuard(**{**GUARD, "keep": 3})
        with pytest.raises(TrainingDivergedError, match="no snapshot from before it, the oldest is of step 4"):
            fit(None, tmp_path, callback=guard, around=[Late()], steps=10)

    def test_alarms_that_are_not_severe_are_told_only(self, tmp_path, caplog):
        guard = TrainingGuard(**GUARD, min_severity=0.5)
        fit(None, tmp_path, callback=guard, around=[Sounder(7, severity=0.4)], steps=10)
        assert guard.rollbacks == guard.alarms == 0
        assert "test at step 7: it is broken" in caplog.text


class Rates(L.Callback):
    """What the optimizer steps with, and what the scheduler has set."""

    def __init__(self) -> None:
        self.used: list[float] = []
        self.set: list[float] = []

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        optimizer = trainer.optimizers[0]
        self.handle = optimizer.register_step_post_hook(lambda o, *_: self.used.append(o.param_groups[0]["lr"]))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.set.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_end(self, *_: Any) -> None:
        self.handle.remove()


class TestLearningRate:
    def _used(self, tmp_path: Path, model: str, *alarms: int, **changes: Any) -> Rates:
        rates = Rates()
        guard = TrainingGuard(**{**GUARD, "lr_factor": 0.5, **changes})
        # The monitor comes first, so that it sees the rate before the guard's own hook puts it back.
        fit(None, tmp_path, callback=rates, around=[guard, Sounder(*alarms)], steps=10, model=model)
        return rates

    def test_it_is_lower_for_a_while(self, tmp_path):
        rates = self._used(tmp_path, "net", 5, lr_steps=3)
        assert rates.used == [1e-2] * 6 + [5e-3] * 3 + [1e-2] * 3  # goes back from 6 to 4
        assert rates.set == [1e-2] * 12

    def test_to_the_end_and_again(self, tmp_path):
        rates = self._used(tmp_path, "net", 5, 9)
        assert rates.used == [1e-2] * 6 + [5e-3] * 6 + [2.5e-3] * 2

    def test_the_schedule_goes_on_as_it_was(self, tmp_path):
        """A schedule that computes the next rate from the last one does not see the factor."""
        plain, rates = self._used(tmp_path, "scheduled"), self._used(tmp_path, "scheduled", 5)
        assert rates.set == plain.set[:5] + plain.set[3:4] * 0 + [plain.set[5]] + plain.set[4:]
        assert rates.used[6:] == [rate / 2 for rate in plain.used[4:]]

    def test_optimizers_that_are_made_anew_have_it_too(self, tmp_path, monkeypatch):
        monkeypatch.setitem(MODELS, "anew", OptimizersAnew)
        guard = TrainingGuard(**{**GUARD, "lr_factor": 0.5})
        run = fit(None, tmp_path, callback=guard, around=[Sounder(5)], steps=10, model="anew")
        assert run.model.used == [5e-3] * 6  # the first epoch ends with a rollback from 6 to 4

    @pytest.mark.parametrize("lr", [{}, {"lr": None}], ids=["none", "None"])
    def test_an_optimizer_without_a_rate_has_no_factor(self, tmp_path, monkeypatch, lr):
        class OwnRate(Net):
            def configure_optimizers(self):
                return FindsItsRate(self.parameters(), lr)

        monkeypatch.setitem(MODELS, "own rate", OwnRate)
        guard = TrainingGuard(**{**GUARD, "lr_factor": 0.5})
        run = fit(None, tmp_path, callback=guard, around=[Sounder(5)], steps=10, model="own rate")
        assert (guard.rollbacks, run.trainer.global_step) == (1, 10)


class OptimizersAnew(Net):
    """Makes them in its second epoch."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.used: list[float] = []
            self.trainer.strategy.setup_optimizers(self.trainer)
            (optimizer,) = self.trainer.optimizers
            optimizer.register_step_post_hook(lambda o, *_: self.used.append(o.param_groups[0]["lr"]))


class FindsItsRate(torch.optim.Optimizer):
    """Like an Adafactor with relative steps."""

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            closure()
        for parameter in self.param_groups[0]["params"]:
            parameter -= 1e-3 * parameter.grad


class Scored(Net):
    """The batch that leads to step 6 has the best score."""

    def on_train_batch_start(self, *_: Any) -> None:
        self.log("score", float(self.trainer.global_step != 5))


class TestCheckpoints:
    @pytest.mark.parametrize("save_last", [True, "link"])
    def test_a_run_that_iskilled_behind_a_rollback_resumes_what_was_restored(self, tmp_path, save_last):
        """Its last checkpoint was saved in a step that has been undone."""

        def run(folder: Path, *around: L.Callback, **more: Any) -> Any:
            saver = ModelCheckpoint(folder, every_n_train_steps=7, save_last=save_last, save_top_k=-1)
            return fit(
                None, tmp_path, callback=TrainingGuard(**GUARD), around=[*around, saver], steps=11, **more
            )  # fmt: skip

        unbroken = run(tmp_path / "unbroken", Sounder(7))
        assert unbroken.callback.rollbacks == 1
        last = tmp_path / "broken" / "last.ckpt"
        with pytest.raises(InjectedError):
            run(tmp_path / "broken", Sounder(7), AtBatch(8, kill))
        assert torch.load(last, weights_only=True)["global_step"] == 6
        resumed = run(tmp_path / "broken", resume=last)
        assert resumed.callback.rollbacks == 1
        assert not differences(unbroken.outcome(), resumed.outcome())

    def test_what_is_undone_is_neither_the_best_nor_the_last(self, tmp_path, caplog, monkeypatch):
        monkeypatch.setitem(MODELS, "scored", Scored)
        saver = ModelCheckpoint(
            tmp_path, monitor="score", save_top_k=2, every_n_train_steps=1, save_last=True, filename="{step}"
        )
        best = []

        def look(trainer: L.Trainer) -> None:
            best.append([Path(path).name for path in (saver.best_model_path, *saver.best_k_models)])

        around = [Sounder(6), AtBatch(6, look), AtBatch(7, look), saver]  # heard behind batch 6, goes back to step 4
        fit(None, tmp_path, callback=TrainingGuard(**GUARD), around=around, model="scored", steps=8)
        before, after = best
        assert before[0] == "step=6.ckpt"
        assert after == [before[1], before[1]]
        assert (tmp_path / "step=6.ckpt").exists()
        assert f"checkpoints of undone steps stay on disk: {tmp_path / 'step=6.ckpt'}" in caplog.text
        assert torch.load(saver.last_model_path, weights_only=True)["global_step"] == 8


class TestActions:
    def test_warn(self, tmp_path, caplog):
        plain = fit(None, tmp_path).parameters()
        guard = TrainingGuard("warn", rules=[Always()], read_every_n_steps=2)
        run = fit(None, tmp_path, callback=guard)
        assert not differences(plain, run.parameters())
        assert guard.alarms == 10
        assert [record.message for record in caplog.records if "always" in record.message] == [
            "TrainingGuard: always at step 1: the value is 1"
        ]

    def test_stop(self, tmp_path):
        guard = TrainingGuard("stop", rules=[], read_every_n_steps=1)
        run = fit(None, tmp_path, callback=guard, around=[Sounder(4)])
        assert run.trainer.global_step == 5
        path = tmp_path / "training_guard-step=5.ckpt"
        saved = torch.load(path, weights_only=True)
        assert not differences(dict(run.model.state_dict()), dict(saved["state_dict"]))

    def test_stop_on_two_ranks(self, pool, tmp_path):
        assert pool.run(_stop, tmp_path) == [5, 5]


def _stop(folder: Path) -> int:
    guard = TrainingGuard("stop", rules=[], read_every_n_steps=1)
    return fit(None, folder, strategy=DDP, callback=guard, around=[Sounder(4, rank=1)]).trainer.global_step


class Always(AlarmRule):
    name = "always"

    def value(self, trainer, pl_module, loss):
        return 1.0

    def judge(self, step, value):
        return f"the value is {value:g}"


def _poisoned(strategy: Strategy, folder: Path) -> tuple[int, int, bool]:
    guard = TrainingGuard(every_n_steps=2, keep=5, margin=2, read_every_n_steps=3)
    run = fit(None, folder, strategy=strategy, callback=guard, around=[Poison(6)], steps=10)
    finite = all(bool(parameter.isfinite().all()) for parameter in run.parameters().values())
    return guard.rollbacks, run.trainer.global_step, finite


class TestRules:
    def test_weights_that_are_not_finite_are_undone(self, tmp_path):
        assert _poisoned(SINGLE, tmp_path) == (1, 10, True)

    @pytest.mark.parametrize("strategy", [DDP, FSDP2], ids=lambda strategy: strategy.name)
    def test_on_two_ranks(self, pool, tmp_path, strategy):
        assert pool.run(_poisoned, strategy, tmp_path) == [(1, 10, True)] * 2

    def test_zclip_can_be_the_one_that_speaks(self, tmp_path):
        clip = ZClip(warmup_steps=4, z_thresh=1.5, alpha=0.9, max_grad_norm=1e3)
        guard = TrainingGuard(**{**GUARD, "margin": 2, "rules": [GradientSpikes(count=2, within=2)]})
        fit(None, tmp_path, callback=guard, around=[clip])
        assert guard.rollbacks == 1  # batches 5 and 6 are spikes, 8 is one alone

    def test_one_of_ones_own(self, tmp_path):
        class TooLong(AlarmRule):
            name = "too_long"

            def value(self, trainer, pl_module, loss):
                return pl_module.head.weight.norm()

            def judge(self, step, value):
                return f"norm {value:.2f}" if value > 100 else None

        class Grows(L.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                if trainer.fit_loop.total_batch_idx == 7:
                    pl_module.head.weight.data.mul_(1000)

        guard = TrainingGuard(**{**GUARD, "rules": [TooLong()]})
        run = fit(None, tmp_path, callback=guard, around=[Grows()])
        assert (guard.rollbacks, guard._last_alarm) == (1, 8)
        assert run.model.head.weight.norm() < 10

    def test_without_a_loss_the_rules_on_it_are_silent(self, tmp_path):
        guard = TrainingGuard(rules=[ExplodingLoss(over_n_steps=2, patience=1)], read_every_n_steps=1)
        fit(None, tmp_path, callback=guard, model="gan")
        assert guard.alarms == 0


def test_tensorboard_shows_what_was_undone_and_writes_no_step_twice(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    guard = TrainingGuard(**GUARD)
    fit(None, tmp_path, callback=guard, around=[Sounder(7)], logger=logger, log_every_n_steps=1)
    events = EventAccumulator(logger.log_dir).Reload()
    values = {name: events.Scalars(f"training_guard/{name}") for name in ("rollbacks", "undone_steps", "lr_factor")}
    for scalars in values.values():
        assert [value.step for value in scalars] == list(range(12))  # 10 steps, and 2 that were undone
    assert [value.value for value in values["rollbacks"]] == [0.0] * 7 + [1.0] * 5
    assert [value.value for value in values["undone_steps"]] == [0.0] * 7 + [2.0] * 5


@dataclass(frozen=True)
class _Built:
    """Like a column of the contract's table, of a strategy that is there already."""

    strategy: Any
    ranks: int = 1
    sharded: bool = False
    package: str = "lightning.pytorch"

    def build(self, optimizers: int) -> Any:
        return self.strategy


class TestRefused:
    def _refused(self, tmp_path: Path, words: str, guard: TrainingGuard, *around: L.Callback, **arguments: Any) -> None:
        with pytest.raises(MisconfigurationException, match=words):
            fit(None, tmp_path, callback=guard, around=around, **arguments)

    def test_averages_that_cannot_go_back(self, tmp_path):
        self._refused(tmp_path, "WeightAveraging keeps an average", TrainingGuard(), WeightAveraging())

    def test_a_rule_without_what_it_looks_at(self, tmp_path):
        self._refused(tmp_path, "no ZClip", TrainingGuard("warn", rules=[GradientSpikes()]))

    def test_parameters_without_a_shape(self, tmp_path, monkeypatch):
        monkeypatch.setitem(MODELS, "lazy", LazyNet)
        for callback in (TrainingGuard(), GradES(), MISA(), SpectralAlignmentMonitor()):
            words = rf"{type(callback).__name__} needs the shapes .* head\.weight of a lazy module"
            with pytest.raises(MisconfigurationException, match=words):
                fit(None, tmp_path, callback=callback, model="lazy", num_sanity_val_steps=0)

    def test_more_than_fits(self, tmp_path, monkeypatch):
        guard = TrainingGuard(**GUARD)
        monkeypatch.setattr(guard._snapshots.window, "free_bytes", lambda device: 10_000)
        self._refused(tmp_path, r"keep=4\) keeps 4 x 24.7 kB .* and 10 kB are free", guard)

    def test_a_strategy_that_says_so(self, tmp_path):
        strategy = L.pytorch.strategies.SingleDeviceStrategy("cpu")
        strategy.rollback_refused = "its replicas heal each other"
        with pytest.raises(MisconfigurationException, match="its replicas heal each other"):
            fit(None, tmp_path, callback=TrainingGuard(), **{"strategy": _Built(strategy)})

    def test_an_optimizer_that_divides_its_state(self, pool, tmp_path):
        assert all("ZeroRedundancyOptimizer" in words for words in pool.run(_zero, tmp_path))


class LazyNet(Net):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.head = nn.LazyLinear(1)


class Divided(Net):
    def configure_optimizers(self):
        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.AdamW, lr=1e-3)


def _zero(folder: Path) -> str:
    MODELS["divided"] = Divided
    with pytest.raises(MisconfigurationException) as error:
        fit(None, folder, strategy=DDP, callback=TrainingGuard(), model="divided")
    return str(error.value)


def test_a_checkpoint_that_is_only_validated_is_no_run_that_goes_on(tmp_path):
    """With the same guard the next run, another fold, begins as with a new one."""
    guard, saved, rules = TrainingGuard(rules=[NonFiniteLoss(), ExplodingLoss()]), tmp_path / "step=4.ckpt", []
    first = fit(None, tmp_path, callback=guard, around=[SaveAt(4, saved)], steps=8)
    before = guard.state_dict()
    first.trainer.validate(first.model, ckpt_path=saved, verbose=False)
    assert differences(guard.state_dict(), before) == []
    for each in (guard, TrainingGuard(rules=[NonFiniteLoss(), ExplodingLoss()])):
        fit(None, tmp_path, callback=each, steps=3)
        rules.append(each.state_dict())
    assert differences(*rules) == []


@pytest.mark.needs("jsonargparse")
def test_rules_from_yaml(tmp_path, monkeypatch):
    config = tmp_path / "run.yaml"
    config.write_text(f"""
trainer:
  logger: false
  callbacks:
    - class_path: ZClip
    - class_path: TrainingGuard
      init_args:
        every_n_steps: 50
        margin: 20
        rules:
          - class_path: lightning_eff.callbacks.ExplodingLoss
            init_args: {{factor: 1.3}}
          - class_path: lightning_eff.callbacks.GradientSpikes
          - class_path: lightning_eff.callbacks.AttentionLogits
            init_args: {{factor: 3, required: false}}
          - class_path: {__name__}.Always
""")
    monkeypatch.setattr("sys.argv", ["test"])
    arguments = ["--config", str(config)]
    cli = LightningCLI(Net, save_config_callback=None, seed_everything_default=False, run=False, args=arguments)
    (guard,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, TrainingGuard))
    exploding, spikes, logits, own = guard._listener.rules
    assert (exploding.factor, exploding.patience, spikes.count) == (1.3, 5, 10)
    assert (logits.factor, logits.required) == (3, False)
    assert isinstance(own, Always)


@pytest.mark.needs("jsonargparse")
def test_the_default_rules_from_the_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["test"])
    arguments = ["--trainer.logger=false", "--trainer.callbacks+=TrainingGuard", "--trainer.callbacks.rules=default"]
    cli = LightningCLI(Net, save_config_callback=None, seed_everything_default=False, run=False, args=arguments)
    (guard,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, TrainingGuard))
    names = [rule.name for rule in guard._listener.rules]
    assert names == ["nonfinite_loss", "exploding_loss", "exploding_loss", "weight_growth", "attention_logits"]
