"""CheckpointAveraging: what it averages, evaluates, saves and restores."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.strategies import FSDPStrategy
from safetensors import safe_open
from safetensors.torch import load_file

from harness.faults import InjectedError, fail_at
from lightning_eff.callbacks import EMA, CheckpointAveraging
from lightning_eff.functional.averaging import scheme_weights, weighted_average
from lightning_eff.training import snapshots
from lightning_eff.training.trainable import set_trainable
from tests.callbacks.averaging.averaging_models import Odd, Weights, averaged, fit, loss_of
from tests.suite.models import Gan, Net
from tests.suite.runs import SaveAt, differences
from tests.suite.table import DDP, FSDP2, SINGLE, Strategy


def _expected(weights: Weights, steps: list[int], scheme: str, dtype: torch.dtype | None = None) -> dict[str, Any]:
    factors = scheme_weights(scheme, steps)
    names = weights.history[steps[0]]
    return {name: weighted_average([weights.history[s][name] for s in steps], factors, dtype) for name in names}


# --- what is averaged ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "storage"), [("uniform", "cpu"), ("wsm", "disk"), ("linear", "model")])
def test_the_file_is_the_average_of_the_window(scheme, storage, tmp_path):
    weights = Weights()
    averaging = CheckpointAveraging(scheme, window=3, every_n_steps=2, start_step=3, storage=storage, save="all")
    fit(tmp_path, weights, averaging, SaveAt(10, tmp_path / "run.ckpt"))
    assert averaging.window.steps == [6, 8, 10]
    state = load_file(tmp_path / "average-run.safetensors")
    assert not differences(_expected(weights, [6, 8, 10], scheme), state)
    with safe_open(tmp_path / "average-run.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["step"] == "10"
    assert metadata["steps"] == "[6, 8, 10]"
    assert sorted(os.listdir(tmp_path)) == [
        "average-run.ckpt", "average-run.safetensors", "run.ckpt", "run.ckpt.ranks"
    ]  # fmt: skip


def test_interval_window_and_start_are_independent(tmp_path):
    averaging = CheckpointAveraging(window=2, every_n_steps=4, start_step=5, validate_with="current")
    fit(tmp_path, averaging, steps=13)
    assert averaging.window.steps == [8, 12]
    assert averaging.collected == 2


def test_skipped_steps_are_no_updates(tmp_path):
    class Drops(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step in (2, 3):
                optimizer.zero_grad()

    averaging = CheckpointAveraging(window=5, every_n_steps=2)
    weights = Weights()
    fit(tmp_path, Drops(), weights, averaging, SaveAt(10, tmp_path / "run.ckpt"))
    assert averaging.window.steps == [2, 4, 6, 8]  # of ten attempts
    assert not differences(weights.history[6], averaging.window.read()[1])  # the 4th update is the 6th attempt


def test_two_optimizers_count_as_one_step(tmp_path):
    averaging = CheckpointAveraging(window=5, every_n_steps=2)
    trainer, _ = fit(tmp_path, averaging, module=Gan(), steps=6)
    assert trainer.global_step == 12
    assert averaging.window.steps == [2, 4, 6]


def test_bfloat16_weights_are_averaged_in_float32(tmp_path):
    averaging, weights = CheckpointAveraging(window=3, every_n_steps=1, validate_with="average"), Weights()

    class Half(Net):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs.to(self.head.weight)).float()

    save = SaveAt(10, tmp_path / "run.ckpt")
    _, module = fit(tmp_path, weights, averaging, save, module=Half(), precision="bf16-true")
    assert next(module.parameters()).dtype == torch.bfloat16
    state = averaged(tmp_path / "average-run.ckpt")
    wanted = _expected(weights, [8, 9, 10], "uniform", torch.float32)
    assert not differences(wanted, state)


def test_tied_frozen_and_buffers(tmp_path):
    averaging = CheckpointAveraging(window=2, every_n_steps=2, buffers="average")
    _, module = fit(tmp_path, averaging, SaveAt(8, tmp_path / "run.ckpt"), module=Odd(), steps=8, val_check_interval=4)
    names = set(averaging.window.read()[0])
    assert "first.weight" in names  # once, and the frozen ones not at all
    assert not any(name.startswith(("second", "frozen")) for name in names)
    state = averaged(tmp_path / "average-run.ckpt")
    assert torch.equal(state["first.weight"], state["second.weight"])
    assert state["scale"].item() == 8  # after 6 and 8 steps from 1: the mean of 7 and 9
    assert state["count"].item() == 8  # the live one, as it is an integer
    assert torch.equal(state["frozen.weight"], module.frozen.weight)


def test_a_parameter_that_is_opened_later_was_the_same_before(tmp_path):
    class Opens(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 4:
                set_trainable(trainer, {"head.weight": True})

    module = Net(optimizer="sgd")
    module.head.weight.requires_grad_(False)
    weights, averaging = Weights(), CheckpointAveraging(window=4, every_n_steps=2)
    fit(tmp_path, weights, Opens(), averaging, SaveAt(8, tmp_path / "run.ckpt"), module=module, steps=8)
    assert not torch.equal(weights.history[2]["head.weight"], weights.history[8]["head.weight"])
    state = averaged(tmp_path / "average-run.ckpt")
    assert not differences(_expected(weights, [2, 4, 6, 8], "uniform"), state)


def test_batchnorm_statistics_are_those_of_the_average(tmp_path):
    averaging = CheckpointAveraging(window=3, every_n_steps=2, update_bn=4)
    plain = Odd()
    fit(tmp_path, module=plain, steps=9, val_check_interval=4)
    _, module = fit(tmp_path, averaging, SaveAt(9, tmp_path / "run.ckpt"), module=Odd(), steps=9, val_check_interval=4)
    assert not differences(dict(plain.state_dict()), dict(module.state_dict()))  # the live ones, batches too
    assert module.training == plain.training
    average = Odd.load_from_checkpoint(tmp_path / "average-run.ckpt")
    batches = torch.stack([item["x"] for item in average.train_dataloader().dataset])
    seen = average.first(batches)
    torch.testing.assert_close(average.norm.running_mean, seen.mean(0))
    assert average.norm.num_batches_tracked.item() == 4
    assert not torch.allclose(average.norm.running_mean, module.norm.running_mean)


def _statistics_of_two_ranks(folder: Path) -> dict[str, torch.Tensor]:
    averaging = CheckpointAveraging(window=2, every_n_steps=1, update_bn=2)
    saver = SaveAt(2, folder / "run.ckpt")
    fit(folder, averaging, saver, module=Odd(), steps=2, strategy=DDP, limit_val_batches=0, val_check_interval=1)
    return {name: tensor for name, tensor in averaging._stand_in._statistics[""][1].items() if "running" in name}


def test_ranks_agree_on_the_statistics_of_the_average(tmp_path, pool):
    one, other = pool.run(_statistics_of_two_ranks, tmp_path)
    assert not differences(one, other)
    average = Odd.load_from_checkpoint(tmp_path / "average-run.ckpt")
    batches = torch.stack([item["x"] for item in average.train_dataloader().dataset])
    torch.testing.assert_close(one["norm.running_mean"], average.first(batches).mean(0))  # 2 ranks x 2 batches: all


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_average_and_current_are_validated_side_by_side(tmp_path):
    path = tmp_path / "run.ckpt"
    averaging = CheckpointAveraging(window=3, every_n_steps=1, preview=[2])
    trainer, module = fit(tmp_path, averaging, SaveAt(12, path), module=Odd(), steps=12, val_check_interval=4)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    average = Odd.load_from_checkpoint(tmp_path / "average-run.ckpt")
    assert metrics["val_loss"] == loss_of(module, tmp_path)
    assert metrics["average/val_loss"] == loss_of(average, tmp_path) != metrics["val_loss"]
    assert metrics["average/2/val_loss"] not in (metrics["val_loss"], metrics["average/val_loss"])
    for prefix in ("", "average/", "average/2/"):  # a metric object of the module is not mixed up
        assert metrics[f"{prefix}val_mean"] == pytest.approx(metrics[f"{prefix}val_loss"], rel=1e-6)
    assert set(module.whole_validations[1:]) == {4}  # nor a list; the first was the sanity check


def test_workers_that_stay_read_for_both(tmp_path):
    class Workers(Odd):
        def _loader(self, seed: int) -> torch.utils.data.DataLoader:
            data = super()._loader(seed).dataset
            return torch.utils.data.DataLoader(data, batch_size=4, num_workers=1, persistent_workers=True)

    averaging = CheckpointAveraging(window=3, every_n_steps=1)
    arguments: dict[str, Any] = {"steps": 8, "val_check_interval": 4, "num_sanity_val_steps": 0}
    trainer, module = fit(tmp_path, averaging, module=Workers(), **arguments)
    assert module.whole_validations == [4, 4] * 2
    plain, _ = fit(tmp_path, module=Workers(), **arguments)
    assert trainer.callback_metrics["val_loss"] == plain.callback_metrics["val_loss"]
    del trainer, plain, module
    gc.collect()  # the workers end with the loaders


def test_tensorboard_shows_live_and_averaged_in_one_chart(tmp_path):
    averaging = CheckpointAveraging(window=3, every_n_steps=1, preview=[2])
    trainer, _ = fit(tmp_path, averaging)
    (chart,) = averaging.tensorboard_charts(trainer).values()
    runs = {"validation": "val_loss", "average": "average/val_loss", "average 2": "average/2/val_loss"}
    assert chart == ["Colours", {run: [mock.ANY] for run in runs}]  # a colour each
    for run, name in runs.items():
        assert name in trainer.callback_metrics
        assert re.fullmatch(chart[1][run][0], name)
    assert CheckpointAveraging(validate_with="average").tensorboard_charts(trainer) == {}


def test_validate_and_test_after_the_fit(tmp_path):
    averaging = CheckpointAveraging(window=3, every_n_steps=1, validate_with="average")
    save = SaveAt(12, tmp_path / "run.ckpt")
    trainer, module = fit(tmp_path, averaging, save, module=Odd(), steps=12, val_check_interval=4)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    average = loss_of(Odd.load_from_checkpoint(tmp_path / "average-run.ckpt"), tmp_path)
    assert trainer.callback_metrics["val_loss"].item() == average
    assert trainer.validate(module, verbose=False)[0]["val_loss"] == average
    assert trainer.test(module, verbose=False)[0]["val_loss"] == average
    assert not differences(before, dict(module.state_dict()))
    averaging._evaluations.validate_with = "both"
    result = trainer.validate(module, verbose=False)[0]
    assert result["average/val_loss"] == average
    assert result["val_loss"] == loss_of(module, tmp_path)


def test_the_weights_of_a_checkpoint_are_tested_as_they_are(tmp_path, caplog):
    averaging = CheckpointAveraging(window=3, every_n_steps=1, validate_with="average")
    saves = [SaveAt(4, tmp_path / "early.ckpt"), SaveAt(12, tmp_path / "run.ckpt")]
    trainer, module = fit(tmp_path, averaging, *saves, module=Odd(), steps=12, val_check_interval=4)
    early = Odd.load_from_checkpoint(tmp_path / "early.ckpt")
    wanted = loss_of(early, tmp_path)
    with caplog.at_level(logging.INFO):
        assert trainer.validate(early, verbose=False)[0]["val_loss"] == wanted
    assert "is no average of the weights that are evaluated now" in caplog.text
    assert trainer.validate(module, ckpt_path=tmp_path / "early.ckpt", verbose=False)[0]["val_loss"] == wanted


def test_a_monitored_average_decides_which_checkpoint_stays(tmp_path):
    def keep_best() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "{step}", monitor="average/val_loss", save_top_k=1, save_last=True)

    best = keep_best()
    averaging = CheckpointAveraging(window=2, every_n_steps=2)
    trainer, _ = fit(tmp_path, averaging, best, steps=12)
    assert best.best_model_score is not None
    stem = Path(best.best_model_path).stem
    assert sorted(path.name for path in tmp_path.glob("*step*")) == sorted(
        [f"{stem}.ckpt", f"{stem}.ckpt.ranks", f"average-{stem}.ckpt"]
    )  # those of checkpoints that were not the best went with them
    assert trainer.global_step == 12
    averaging = CheckpointAveraging(window=2, every_n_steps=2)
    resumed, _ = fit(tmp_path, averaging, keep_best(), steps=14, resume="last")  # which is not "average-last"
    assert resumed.global_step == 14
    assert averaging.window.steps == [12, 14]


def test_a_checkpoint_saved_within_a_validation_hook_has_the_live_weights(tmp_path):
    class Saves(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    weights = Weights()
    averaging = CheckpointAveraging(window=3, every_n_steps=1, validate_with="average", save="none")
    fit(tmp_path, Saves(), weights, averaging, steps=6)
    state = torch.load(tmp_path / "6.ckpt", weights_only=True)["state_dict"]
    assert not differences(weights.history[6], dict(state))


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_validation_goes_on_with_the_average_behind_a_save(tmp_path, weights_only):
    class Saves(Checkpoint):
        def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, *_):
            if batch_idx == 0:
                trainer.save_checkpoint(tmp_path / "run.ckpt", weights_only)

    found = []
    for callbacks in ([], [Saves()]):
        averaging = CheckpointAveraging(window=3, every_n_steps=1, validate_with="average", save="none")
        trainer, _ = fit(tmp_path, averaging, *callbacks, steps=6)
        found.append(trainer.callback_metrics["val_loss"])
    assert (tmp_path / "run.ckpt").exists()
    assert found[0] == found[1]


@pytest.mark.parametrize("hook", ["on_validation_batch_start", "on_validation_epoch_end"])
@pytest.mark.parametrize("validate_with", ["average", "both"])
def test_an_interrupted_validation_leaves_the_live_weights(hook, validate_with, tmp_path, monkeypatch):
    weights = Weights()
    averagings = [CheckpointAveraging(window=3, every_n_steps=1, validate_with=validate_with), EMA(0.9)]
    module = Net(optimizer="sgd")

    def interrupt(*_: Any) -> None:
        if weights.history and max(weights.history) >= 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, hook, interrupt, raising=False)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            fit(tmp_path, weights, *averagings, module=module)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones
    assert max(weights.history) == 6
    assert not differences(weights.history[6], {n: p.detach() for n, p in module.named_parameters()})
    assert "run" not in vars(module.trainer.fit_loop.epoch_loop.val_loop)


# --- beginnings ------------------------------------------------------------------------------------------------------


def test_without_a_snapshot_the_current_weights_stand_for_the_average(tmp_path, caplog):
    averaging = CheckpointAveraging(window=2, every_n_steps=5, start_step=100, replace_at_end=True)
    with caplog.at_level(logging.INFO):
        trainer, module = fit(tmp_path, averaging, SaveAt(10, tmp_path / "run.ckpt"), steps=12)
    assert "has collected nothing yet (the first time is after update 100)" in caplog.text
    assert trainer.callback_metrics["average/val_loss"] == trainer.callback_metrics["val_loss"]
    live = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    average = torch.load(tmp_path / "average-run.ckpt", weights_only=True)["state_dict"]
    assert not differences(dict(live), dict(average))
    assert not differences(loss_of(module, tmp_path), trainer.callback_metrics["val_loss"].item())


def test_a_new_run_does_not_begin_with_the_old_ones_weights(tmp_path):
    averaging = CheckpointAveraging(window=4, every_n_steps=3)
    fit(tmp_path, averaging, steps=9)
    trainer, _ = fit(tmp_path, averaging, steps=4)
    assert averaging.window.steps == [3]
    trainer.fit_loop.epoch_loop.max_steps += 3
    trainer.fit(Net(optimizer="sgd"))  # the same Trainer, another model
    assert averaging.window.steps == [3]
    assert averaging.collected == 1


@pytest.mark.parametrize("replace", [False, True])
def test_the_model_is_replaced_at_the_end_only_if_asked(replace, tmp_path):
    weights, averaging = Weights(), CheckpointAveraging(window=2, every_n_steps=2, replace_at_end=replace)
    last = ModelCheckpoint(tmp_path, "last", every_n_train_steps=8)
    _, module = fit(tmp_path, weights, averaging, last, steps=8)
    wanted = _expected(weights, [6, 8], "uniform") if replace else weights.history[8]
    assert not differences(wanted, {n: p.detach() for n, p in module.named_parameters()})
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert not differences(weights.history[8], dict(saved))


def test_a_window_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "free_host_memory", lambda: 10_000)
    with pytest.raises(MisconfigurationException, match=r"keeps 6 x [\d.]+ kB on each rank in host memory"):
        fit(tmp_path, CheckpointAveraging())


def test_conflicts_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="of the name 'average'"):
        fit(tmp_path, CheckpointAveraging(), EMA(name="average"))
    with pytest.raises(MisconfigurationException, match="only one average can take"):
        fit(tmp_path, CheckpointAveraging(validate_with="average"), EMA(validate_with="average"))
    trainer = mock.Mock(strategy=mock.Mock(spec=FSDPStrategy))  # which a CPU cannot have
    with pytest.raises(MisconfigurationException, match="ModelParallelStrategy"):
        CheckpointAveraging().setup(trainer, Net(), "fit")


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_the_ordinary_checkpoint_has_live_weights_and_no_window(tmp_path):
    weights, averaging = Weights(), CheckpointAveraging(window=4, every_n_steps=1)
    fit(tmp_path, weights, averaging, SaveAt(6, tmp_path / "with.ckpt"), steps=6)
    fit(tmp_path, SaveAt(6, tmp_path / "without.ckpt"), steps=6)
    checkpoint = torch.load(tmp_path / "with.ckpt", weights_only=True)
    assert not differences(weights.history[6], dict(checkpoint["state_dict"]))
    assert checkpoint["callbacks"] == {"CheckpointAveraging{'name': 'average'}": {"version": 1, "updates": [6]}}
    assert os.path.getsize(tmp_path / "with.ckpt") < os.path.getsize(tmp_path / "without.ckpt") + 2000
    average = torch.load(tmp_path / "average-with.ckpt", weights_only=True)
    assert average["lightning_eff_average"]["steps"] == [3, 4, 5, 6]
    assert "optimizer_states" not in average


def _window_after_resume(folder: Path, strategy: Strategy, crash: int) -> list[str]:
    """Differences between the averages of an unbroken run and those of one that was broken off after `crash` steps."""

    def averagings() -> list[Any]:
        arguments = {"scheme": "wsm", "window": 3, "every_n_steps": 2, "validate_with": "both"}
        return [CheckpointAveraging(**arguments), EMA(widths=[0.05, 0.1])]

    unbroken = averagings()
    fit(folder, *unbroken, strategy=strategy)
    path = folder / f"{crash}.ckpt"
    with pytest.raises(InjectedError):
        fit(folder, *averagings(), SaveAt(crash, path), fail_at(step=crash), strategy=strategy)
    resumed = averagings()
    fit(folder, *resumed, strategy=strategy, resume=path)
    assert resumed[0].window.steps == [6, 8, 10]
    return differences([a._save_rank() for a in unbroken], [a._save_rank() for a in resumed])


@pytest.mark.parametrize("crash", [1, 5])
def test_the_average_after_a_resume_has_the_same_bits(crash, tmp_path):
    assert not _window_after_resume(tmp_path, SINGLE, crash)


@pytest.mark.parametrize("strategy", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_the_average_after_a_resume_has_the_same_bits_on_two_ranks(strategy, tmp_path, pool):
    assert pool.run(_window_after_resume, tmp_path, strategy, 5) == [[], []]


def _save(folder: Path, strategy: Strategy) -> dict[str, float]:
    averaging = CheckpointAveraging("wsm", window=3, every_n_steps=2)
    ema = EMA(half_life=4)
    trainer, _ = fit(folder, averaging, ema, SaveAt(9, folder / "run.ckpt"), strategy=strategy, steps=9)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("strategy", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_two_ranks_save_the_average_that_one_device_saves(strategy, tmp_path, pool):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    metrics = _save(tmp_path / "one", SINGLE)
    ranks = pool.run(_save, tmp_path / "two", strategy)
    assert ranks[0] == ranks[1]
    assert not differences(metrics, ranks[0], rtol=1e-3, atol=1e-5)
    assert {"val_loss", "average/val_loss", "ema/val_loss"} <= set(metrics)
    for name in ("average", "ema"):
        one, two = (averaged(tmp_path / folder / f"{name}-run.ckpt") for folder in ("one", "two"))
        assert not differences(one, two, rtol=1e-3, atol=1e-5)


class _Bar(ProgressBar):
    """Counts what it hears; a drawing thread would look for it among the Trainer's callbacks at any moment."""

    heard = 0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.heard += 1


class _Looks(Net):
    def validation_step(self, *args: Any) -> None:
        self.bars = [*getattr(self, "bars", []), self.trainer.progress_bar_callback]
        super().validation_step(*args)


def test_a_progress_bar_is_there_in_both_evaluations_and_hears_of_one(tmp_path: Path) -> None:
    bar, module = _Bar(), _Looks(optimizer="sgd")
    alone, with_average = _Bar(), _Looks(optimizer="sgd")
    fit(tmp_path, alone, module=with_average, enable_progress_bar=True)
    fit(tmp_path, bar, CheckpointAveraging(every_n_steps=1), module=module, enable_progress_bar=True)
    assert set(module.bars) == {bar}
    assert len(module.bars) > len(with_average.bars)
    assert bar.heard == alone.heard > 0
    assert not [name for name in vars(bar) if name.startswith("on_")]
