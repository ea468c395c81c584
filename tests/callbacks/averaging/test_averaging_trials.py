"""CheckpointAveraging and EMA where others unfreeze, disks fail, ranks change and files are lost."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint, ModelPruning
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader
from torchmetrics import MinMetric

from lightning_eff.callbacks import EMA, CheckpointAveraging
from lightning_eff.callbacks.averaging import files
from lightning_eff.functional.averaging import weighted_average
from lightning_eff.training.namespaces import MisconfigurationException
from tests.callbacks.averaging.averaging_models import Odd, Weights, averaged, fit
from tests.suite.models import Net
from tests.suite.runs import SaveAt, differences
from tests.suite.table import DDP, FSDP2, SINGLE, Strategy


def _uniform(weights: Weights, steps: list[int]) -> dict[str, Tensor]:
    return {
        name: weighted_average([weights.history[step][name] for step in steps], [1 / len(steps)] * len(steps))
        for name in weights.history[steps[0]]
    }


# --- what others train ----------------------------------------------------------------------------------------------


class _FineTuned(Net):
    def __init__(self) -> None:
        super().__init__("sgd")
        self.backbone = self.blocks

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def test_what_backbone_finetuning_unfreezes_is_averaged(tmp_path: Path) -> None:
    weights, averaging, ema = Weights(), CheckpointAveraging(window=5, every_n_steps=2), EMA(0.5, warmup=False)
    unfreezes = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3, verbose=False)
    save = SaveAt(10, tmp_path / "run.ckpt")
    fit(tmp_path, unfreezes, weights, averaging, ema, save, module=_FineTuned())
    first, last = weights.history[1], weights.history[10]
    moved = [name for name in first if name.startswith("blocks") and not torch.equal(first[name], last[name])]
    assert len(moved) >= 12  # it does train them, from step 7 on
    found = averaged(tmp_path / "average-run.ckpt")
    wanted = _uniform(weights, [2, 4, 6, 8, 10])
    assert not differences(wanted, {name: found[name] for name in wanted})
    mean = {name: tensor.double() for name, tensor in weights.history[1].items()}
    for step in range(2, 11):
        mean = {name: 0.5 * mean[name] + 0.5 * weights.history[step][name].double() for name in mean}
    found = averaged(tmp_path / "ema-run.ckpt")
    wanted = {name: tensor.float() for name, tensor in mean.items()}
    assert not differences(wanted, {name: found[name] for name in wanted}, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("every", [1, 2])
def test_a_resume_in_which_more_is_trained(every: int, tmp_path: Path) -> None:
    module = Net("sgd")
    module.head.requires_grad_(False)
    before, after = Weights(), Weights()
    averagings = [CheckpointAveraging(window=9, every_n_steps=every), EMA(0.5, warmup=False, every_n_steps=every)]
    fit(tmp_path, before, *averagings, SaveAt(4, tmp_path / "4.ckpt"), module=module, steps=4)
    averagings = [CheckpointAveraging(window=9, every_n_steps=every), EMA(0.5, warmup=False, every_n_steps=every)]
    fit(tmp_path, after, *averagings, SaveAt(8, tmp_path / "8.ckpt"), steps=8, resume=tmp_path / "4.ckpt")
    history = before.history | after.history
    steps = range(every, 9, every)
    assert not torch.equal(history[4]["head.weight"], history[8]["head.weight"])
    wanted = weighted_average([history[step]["head.weight"] for step in steps], [1 / len(steps)] * len(steps))
    assert torch.equal(averaged(tmp_path / "average-8.ckpt")["head.weight"], wanted)
    mean = history[every]["head.weight"]
    for step in steps[1:]:
        mean = mean.lerp(history[step]["head.weight"], 0.5)
    torch.testing.assert_close(averaged(tmp_path / "ema-8.ckpt")["head.weight"], mean)


def test_an_average_added_at_a_resume_counts_the_updates_before(tmp_path: Path) -> None:
    fit(tmp_path, SaveAt(6, tmp_path / "6.ckpt"), steps=6)
    averaging = CheckpointAveraging(window=5, every_n_steps=2, start_step=8)
    fit(tmp_path, averaging, SaveAt(12, tmp_path / "12.ckpt"), steps=12, resume=tmp_path / "6.ckpt")
    assert averaging.window.steps == [8, 10, 12]
    saved = torch.load(tmp_path / "average-12.ckpt", weights_only=True)["lightning_eff_average"]
    assert saved["step"] == 12


def test_parameters_that_are_renamed_are_followed(tmp_path: Path) -> None:
    class Prunes(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if trainer.global_step == 4:
                prune.l1_unstructured(pl_module.head, "weight", amount=0.5)

    weights, save = Weights(), SaveAt(8, tmp_path / "run.ckpt")
    averagings = [CheckpointAveraging(window=4, every_n_steps=2), EMA(0.5, warmup=False)]
    fit(tmp_path, Prunes(), weights, *averagings, save, steps=8)
    history = {step: state.get("head.weight_orig", state.get("head.weight")) for step, state in weights.history.items()}
    state = averaged(tmp_path / "average-run.ckpt")
    assert torch.equal(state["head.weight_orig"], weighted_average([history[s] for s in (2, 4, 6, 8)], [1 / 4] * 4))
    mean = history[1]
    for step in range(2, 9):
        mean = mean.lerp(history[step], 0.5)
    state = averaged(tmp_path / "ema-run.ckpt")
    assert not differences(mean, state["head.weight_orig"], rtol=1e-6)
    assert "head.weight_mask" in state


def test_lightning_s_pruning_is_followed_where_it_saves_what_the_average_can_save(tmp_path: Path) -> None:
    def fit_pruned(permanent: bool, ema: EMA) -> None:
        pruning = ModelPruning("l1_unstructured", parameter_names=["weight"], make_pruning_permanent=permanent)
        fit(tmp_path, pruning, ema, SaveAt(8, tmp_path / "run.ckpt"), steps=8)

    fit_pruned(False, EMA(0.5))
    states = averaged(tmp_path / "run.ckpt"), averaged(tmp_path / "ema-run.ckpt")
    assert states[0].keys() == states[1].keys()
    assert not torch.equal(*(state["head.weight_orig"] for state in states))
    with pytest.raises(MisconfigurationException, match=r"ModelPruning\(make_pruning_permanent=True\) saves"):
        fit_pruned(True, EMA(0.5))
    fit_pruned(True, EMA(0.5, save="none"))


def test_a_parameter_in_the_place_of_another_begins_anew(tmp_path: Path) -> None:
    class NewHead(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if trainer.global_step == 4:
                old = {id(parameter) for parameter in pl_module.head.parameters()}
                for parameter in pl_module.head.parameters():
                    del trainer.optimizers[0].state[parameter]
                pl_module.head = nn.Linear(8, 1)
                pl_module.scale = nn.Parameter(torch.zeros(8))
                (group,) = trainer.optimizers[0].param_groups
                kept = [parameter for parameter in group["params"] if id(parameter) not in old]
                group["params"] = [*kept, *pl_module.head.parameters(), pl_module.scale]

    class Scaled(Net):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs + getattr(self, "scale", 0))

    weights, averaging, ema = Weights(), CheckpointAveraging(window=4, every_n_steps=2), EMA(0.5, warmup=False)
    save = SaveAt(8, tmp_path / "run.ckpt")
    fit(tmp_path, weights, averaging, ema, NewHead(), save, module=Scaled("sgd"), steps=8, limit_val_batches=0)
    window, mean = averaged(tmp_path / "average-run.ckpt"), averaged(tmp_path / "ema-run.ckpt")
    for name in ("head.weight", "head.bias", "scale"):
        history = {step: weights.history[step][name] for step in range(5, 9)}
        # What it was when it was first seen stands in the snapshots of before.
        assert torch.equal(window[name], weighted_average([history[s] for s in (6, 6, 6, 8)], [1 / 4] * 4)), name
        wanted = history[5]
        for step in range(6, 9):
            wanted = wanted.lerp(history[step], 0.5)
        assert not differences(wanted, mean[name], rtol=1e-6, atol=1e-7), name
    kept = "blocks.0.proj.weight"
    wanted = weighted_average([weights.history[step][kept] for step in (2, 4, 6, 8)], [1 / 4] * 4)
    assert torch.equal(window[kept], wanted)


@pytest.mark.parametrize("count", [1, 2])
def test_optimizers_that_are_made_anew_are_counted(count: int, tmp_path: Path) -> None:
    class Anew(Net):
        made = 1

        def configure_optimizers(self) -> Any:
            optimizers = [torch.optim.SGD(part.parameters(), lr=1e-3) for part in (self.blocks, self.head)]
            return optimizers[: self.made]

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            if batch_idx == 3:
                self.made = count
                self.trainer.strategy.setup_optimizers(self.trainer)
            optimizers = self.optimizers()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                optimizer.step()
                optimizer.zero_grad()

    module, averaging, ema = Anew(), CheckpointAveraging(window=9, every_n_steps=2), EMA(0.9)
    module.automatic_optimization = False
    fit(tmp_path, averaging, ema, module=module, max_steps=-1, max_epochs=1, limit_val_batches=0, val_check_interval=1)
    assert averaging.window.steps == [2, 4, 6]
    assert ema.collected == 6
    assert len(module.trainer.optimizers) == count
    assert not any(averaging._updates.counts(optimizer) for optimizer in module.trainer.optimizers)


@pytest.mark.parametrize("build", [CheckpointAveraging, EMA])
def test_an_expanded_buffer_is_left_alone(build: Any, tmp_path: Path) -> None:
    class Masked(Net):
        def __init__(self) -> None:
            super().__init__("sgd")
            self.register_buffer("mask", torch.ones(1, 8).expand(4, 8), persistent=False)
            self.register_buffer("sparse", torch.eye(4).to_sparse(), persistent=False)

    weights, averaging = Weights(), build(buffers="average", every_n_steps=2, validate_with="average")
    _, module = fit(tmp_path, weights, averaging, module=Masked(), steps=6)
    assert averaging.collected == 3
    assert not differences(weights.history[6], {n: p.detach() for n, p in module.named_parameters()})


# --- files -----------------------------------------------------------------------------------------------------------


def _averagings() -> list[Any]:
    return [CheckpointAveraging("wsm", window=3, every_n_steps=2), EMA(widths=[0.05, 0.1])]


def _save(folder: Path, strategy: Strategy) -> None:
    fit(folder, *_averagings(), SaveAt(5, folder / "5.ckpt"), strategy=strategy, steps=5)


def _resume(folder: Path, strategy: Strategy, steps: int = 10) -> list[Any]:
    averagings = _averagings()
    fit(folder, *averagings, strategy=strategy, steps=steps, resume=folder / "5.ckpt")
    return [averaging._save_rank() for averaging in averagings]


def test_equal_ranks_write_one_window_that_any_number_of_ranks_loads(tmp_path: Path, pool: Any) -> None:
    pool.run(_save, tmp_path, DDP)
    names = sorted(path.name.partition(".")[2] for path in (tmp_path / "5.ckpt.ranks").iterdir())
    assert names == ["average-average.pt", "average-ema.pt"]
    window, ema = _resume(tmp_path, SINGLE, steps=6)
    assert window["state"]["steps"] == [2, 4, 6]
    assert ema["state"]["updated"] == 6
    with_ranks = pool.run(_resume, tmp_path, DDP, 6)
    assert not differences(with_ranks[0], with_ranks[1])
    assert not differences([window, ema], with_ranks[0], rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the state .* is taken from the files beside")
def test_a_lost_window_goes_on_from_the_averaged_file(tmp_path: Path) -> None:
    _save(tmp_path, SINGLE)
    kept = _resume(tmp_path, SINGLE)
    shutil.rmtree(tmp_path / "5.ckpt.ranks")
    found = _resume(tmp_path, SINGLE)
    assert not differences(kept[1], found[1])  # nothing of an exponential average is lost
    assert found[0]["state"]["steps"] == kept[0]["state"]["steps"] == [6, 8, 10]
    assert not differences(kept[0]["state"]["snapshots"], found[0]["state"]["snapshots"])  # they are new ones by now
    earlier = [_resume(tmp_path, SINGLE, steps=6)[0]["state"]]
    average = averaged(tmp_path / "average-5.ckpt")
    assert earlier[0]["steps"] == [2, 4, 6]
    for snapshot in earlier[0]["snapshots"][:2]:  # the average stands for each that was lost
        assert not differences(snapshot, {name: average[name] for name in snapshot})


def _other_ranks(folder: Path, strategy: Strategy) -> list[str]:
    """Differences of the averages of a resume under FSDP2 that has lost its files to one that has not."""
    kept = _resume(folder, strategy)
    torch.distributed.barrier()
    shutil.rmtree(folder / "5.ckpt.ranks", ignore_errors=True)
    torch.distributed.barrier()
    return differences(kept[1], _resume(folder, strategy)[1])


@pytest.mark.filterwarnings("ignore:the state .* is taken from the files beside")
@pytest.mark.parametrize("saved_by", [SINGLE, FSDP2], ids=["single", "fsdp2"])
def test_fsdp2_loads_what_others_saved(saved_by: Strategy, tmp_path: Path, pool: Any) -> None:
    if saved_by is SINGLE:
        _save(tmp_path, SINGLE)  # one file of whole tensors, of which each rank takes its part
    else:
        pool.run(_save, tmp_path, FSDP2)
    assert pool.run(_other_ranks, tmp_path, FSDP2) == [[], []]


class _Casts(Net):
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {name: tensor.to(torch.bfloat16) for name, tensor in super().state_dict(*args, **kwargs).items()}


class _Renames(Net):
    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.register_state_dict_post_hook(self.rename)

    @staticmethod
    def rename(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        for name in [name for name in state if name.startswith("head")]:
            state[f"new_{name}"] = state.pop(name).clone()


class _TakesNothing(Net):
    def state_dict(self) -> dict[str, Tensor]:  # type: ignore[override]
        return super().state_dict()


@pytest.mark.parametrize("kind", [_Casts, _Renames, _TakesNothing])
def test_a_module_that_saves_copies_saves_such_of_the_average(kind: type[Net], tmp_path: Path) -> None:
    weights, save = Weights(), SaveAt(4, tmp_path / "run.ckpt")
    averagings = [CheckpointAveraging(window=2, every_n_steps=2), EMA(0.5, warmup=False)]
    _, module = fit(tmp_path, weights, *averagings, save, module=kind("sgd"), steps=4)
    assert not differences(weights.history[4], {n: p.detach() for n, p in module.named_parameters()})
    live, window, ema = (averaged(tmp_path / f"{name}run.ckpt") for name in ("", "average-", "ema-"))
    mean = _uniform(weights, [2, 4])
    for name, tensor in live.items():
        wanted = mean[name.removeprefix("new_")]
        assert torch.equal(window[name], wanted.to(tensor.dtype)), name
        assert ema[name].dtype == tensor.dtype
    assert live.keys() == window.keys() == ema.keys()
    assert any(not torch.equal(ema[name], live[name]) for name in live)


@pytest.mark.filterwarnings("ignore:the state .* is taken from the files beside")
def test_a_lost_window_goes_on_from_a_file_of_copies(tmp_path: Path) -> None:
    fit(tmp_path, EMA(0.5), SaveAt(4, tmp_path / "4.ckpt"), module=_TakesNothing("sgd"), steps=4)
    shutil.rmtree(tmp_path / "4.ckpt.ranks")
    ema = EMA(0.5)
    fit(tmp_path, ema, SaveAt(4, tmp_path / "4.ckpt"), module=_TakesNothing("sgd"), steps=5, resume=tmp_path / "4.ckpt")
    assert ema.collected == 5
    assert len(ema.average.state()["averages"][0]) == len([*Net().parameters()])


def test_a_checkpoint_that_is_evaluated_is_not_gone_back_to(tmp_path: Path) -> None:
    averagings = [CheckpointAveraging(window=3, every_n_steps=2), EMA(0.9)]
    saves = [SaveAt(4, tmp_path / "4.ckpt"), SaveAt(8, tmp_path / "8.ckpt")]
    trainer, module = fit(tmp_path, *averagings, *saves, steps=8)
    before = [averaging.state_dict() for averaging in averagings]
    trainer.test(module, ckpt_path=tmp_path / "4.ckpt", verbose=False)
    trainer.validate(module, ckpt_path=tmp_path / "8.ckpt", verbose=False)
    assert [averaging.state_dict() for averaging in averagings] == before
    assert [averaging.collected for averaging in averagings] == [4, 8]
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    for name in ("average", "ema"):
        assert not differences(averaged(tmp_path / f"{name}-8.ckpt"), averaged(tmp_path / f"{name}-after.ckpt"))
    averagings[1].load_state_dict({"version": 1, "updates": [3]})
    assert averagings[1].state_dict()["updates"] == [3]


def test_a_full_disk_keeps_the_file_of_before_and_the_run_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    path, write, full = tmp_path / "run.ckpt", files.whole_file, False

    @contextmanager
    def to_a_disk(path: str) -> Iterator[str]:
        with write(path) as part:
            yield part
            if full:
                with open("/dev/full", "wb") as file:
                    torch.save(torch.zeros(1_000_000), file)

    monkeypatch.setattr(files, "whole_file", to_a_disk)
    trainer, _ = fit(tmp_path, EMA(0.9), SaveAt(4, path), steps=4)
    full = True
    before = (tmp_path / "ema-run.ckpt").read_bytes()
    with pytest.warns(UserWarning, match="'ema', the averaged weights .* No space left .* training goes on"):
        trainer.save_checkpoint(path)
    trainer.save_checkpoint(path)  # said once
    assert (tmp_path / "ema-run.ckpt").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["ema-run.ckpt", "run.ckpt", "run.ckpt.ranks"]
    full = False
    trainer.save_checkpoint(path)
    assert (tmp_path / "ema-run.ckpt").read_bytes() != before  # it knows another checkpoint


def test_a_checkpoint_without_an_average_says_so(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, EMA(0.9), steps=2)
    # After a spawned fit the parent has the callback as it was sent, which has seen no training.
    trainer.callbacks[:] = [pickle.loads(pickle.dumps(EMA(0.9)))]
    with pytest.warns(UserWarning, match=r"EMA\('ema'\) writes no average beside this checkpoint: .* another process"):
        trainer.save_checkpoint(tmp_path / "parent.ckpt")


class _Adapted(Net):
    """A frozen base, and a head in training that alone is saved, under a name of its own if asked for."""

    def __init__(self, prefix: str | None) -> None:
        super().__init__("sgd")
        self.blocks.requires_grad_(False)
        self.prefix = prefix

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.prefix is not None:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {self.prefix + n: t for n, t in state.items() if not n.startswith("blocks")}


@pytest.mark.parametrize("prefix", [None, "", "adapter."])
def test_a_frozen_base_that_the_module_does_not_save_is_not_in_the_averages_either(tmp_path, prefix) -> None:
    weights, averaging = Weights(), CheckpointAveraging(window=2, every_n_steps=1, save="all")
    fit(tmp_path, weights, averaging, SaveAt(4, tmp_path / "run.ckpt"), module=_Adapted(prefix), steps=4)
    live = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    for state in (averaged(tmp_path / "average-run.ckpt"), load_file(tmp_path / "average-run.safetensors")):
        assert state.keys() == live.keys()
        assert len(state) == (2 if prefix is not None else len(Net().state_dict()))
        wanted = _uniform(weights, [3, 4])["head.weight"]
        assert not differences(wanted, state[f"{prefix or ''}head.weight"])
    # Whatever a base would be: the average has its own tensors alone beside the checkpoint.
    (kept,) = (tmp_path / "run.ckpt.ranks").iterdir()
    assert torch.load(kept, weights_only=True)["state"]["trained"] == ["head.bias", "head.weight"]


def test_by_default_a_frozen_base_is_written_once_beside_the_checkpoint(tmp_path: Path) -> None:
    module = Net("sgd")
    module.base = nn.Linear(300, 300).requires_grad_(False)  # 361 kB
    fit(tmp_path, EMA(0.5), SaveAt(4, tmp_path / "run.ckpt"), module=module, steps=4)
    large = [path.name for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 361_000]
    assert sorted(large) == ["ema-run.ckpt", "run.ckpt"]


def test_to_resume_from_an_average_is_refused_in_its_own_words(tmp_path: Path) -> None:
    fit(tmp_path, EMA(0.5), SaveAt(4, tmp_path / "last.ckpt"), module=Net(), steps=4)
    words = r"ema-last.ckpt holds the weights averaged until update 4.*resume from the checkpoint that it lies beside"
    with pytest.raises(MisconfigurationException, match=words):
        fit(tmp_path, EMA(0.5), module=Net(), steps=8, resume=tmp_path / "ema-last.ckpt")
    trainer, module = fit(tmp_path, EMA(0.5), module=Net(), steps=8, resume=tmp_path / "last.ckpt")
    assert trainer.global_step == 8
    trainer.validate(module, ckpt_path=tmp_path / "ema-last.ckpt", verbose=False)  # which is what it is for


def test_a_link_to_the_last_checkpoint_has_an_average_beside_it(tmp_path: Path) -> None:
    keeps = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=1, save_last="link")
    fit(tmp_path, EMA(0.9), keeps, steps=6)
    assert (tmp_path / "ema-last.ckpt").resolve().name == "ema-step=6.ckpt"
    assert not differences(averaged(tmp_path / "ema-last.ckpt"), averaged(tmp_path / "ema-step=6.ckpt"))
    assert "_link_checkpoint" not in vars(keeps)


# --- evaluation ------------------------------------------------------------------------------------------------------


class _Shuffles(Odd):
    """Two of four batches, in an order of the random generators."""

    made = 0

    def __init__(self, own_generator: bool) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(4) if own_generator else None

    def val_dataloader(self) -> DataLoader:
        self.made += 1
        torch.rand(3)
        data = super().val_dataloader().dataset
        return DataLoader(data, batch_size=4, shuffle=True, generator=self.generator)


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
@pytest.mark.parametrize("own_generator", [False, True])
def test_live_and_averaged_weights_see_the_same_data_once_made(own_generator: bool, tmp_path: Path) -> None:
    states, losses = [], []
    for averagings in ([CheckpointAveraging(window=1, every_n_steps=1)], []):
        torch.manual_seed(5)
        module = _Shuffles(own_generator)
        arguments: dict[str, Any] = {"limit_val_batches": 2, "val_check_interval": 4, "num_sanity_val_steps": 0}
        trainer, _ = fit(tmp_path, *averagings, module=module, steps=8, **arguments)
        before = module.made
        result = trainer.validate(module, verbose=False)[0]
        assert module.made == before + 1
        if averagings:
            assert result["average/val_loss"] == result["val_loss"]  # the average is the live weights
        losses.append(result["val_loss"])
        states.append([torch.get_rng_state(), module.generator and module.generator.get_state()])
    assert losses[0] == losses[1]
    assert not differences(states[1], states[0])


class _Saves(Net):
    """Saves copies of its weights in its own validation."""

    path: Path
    weights_only = False

    def on_validation_epoch_end(self) -> None:
        if self.trainer.global_step == 6:
            self.trainer.save_checkpoint(self.path, self.weights_only)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name: tensor.clone() for name, tensor in checkpoint["state_dict"].items()}


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("validate_with", ["average", "both"])
def test_a_checkpoint_of_copies_that_is_saved_within_a_validation_has_the_live_weights(
    validate_with: Any, weights_only: bool, tmp_path: Path
) -> None:
    module, weights = _Saves("sgd"), Weights()
    module.path, module.weights_only = tmp_path / "run.ckpt", weights_only
    trainer, _ = fit(tmp_path, weights, EMA(0.5, validate_with=validate_with), module=module, steps=6)
    assert not differences(weights.history[6], averaged(tmp_path / "run.ckpt"))
    assert not differences(weights.history[6], {n: p.detach() for n, p in module.named_parameters()})
    assert "save_checkpoint" not in vars(trainer)
    state = averaged(tmp_path / "ema-run.ckpt")
    assert not torch.equal(state["head.weight"], weights.history[6]["head.weight"])


class _Steered(Net):
    """Its validation decides: about the rate, about the end, and what was best so far."""

    def __init__(self) -> None:
        super().__init__("sgd")
        self.automatic_optimization = False
        self.best = MinMetric()
        self.rates: list[float] = []
        self.checkpoints: list[Any] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()

    def on_validation_epoch_end(self) -> None:
        loss = self.trainer.callback_metrics["val_loss"]
        self.lr_schedulers().step(loss)
        self.best(loss)
        self.log("best", self.best.compute())
        self.checkpoints.append(self.trainer.checkpoint_callback)
        self.trainer.should_stop = len(self.checkpoints) == 5  # the average's third

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, threshold=0.9)]


def test_the_second_evaluation_decides_nothing(tmp_path: Path) -> None:
    class Seen(L.Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []
            self.on_validation_end = self.note  # type: ignore[method-assign]  # as LambdaCallback has its hooks

        def note(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.seen.append(trainer.callback_metrics["best"].item())

    found = []
    for averagings in ([], [EMA(0.5)]):
        module, seen, keeps = _Steered(), Seen(), ModelCheckpoint(tmp_path, monitor="val_loss")
        trainer, _ = fit(
            tmp_path,
            *averagings,
            seen,
            keeps,
            module=module,
            steps=12,
            num_sanity_val_steps=0,
            enable_checkpointing=True,
        )
        assert set(module.checkpoints) == {keeps}
        assert len(module.checkpoints) == 4 * (1 + len(averagings))
        found.append(
            [trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"], seen.seen, keeps.best_model_score]
        )
        assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 4
        assert vars(seen)["on_validation_end"] == seen.note
    assert not differences(*found)


def test_a_loop_s_own_run_is_put_back(tmp_path: Path) -> None:
    runs: list[int] = []

    class Times(L.Callback):
        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            loop = trainer.fit_loop.epoch_loop.val_loop
            inner = loop.run
            self.mine = lambda: (runs.append(trainer.global_step), inner())[1]
            loop.run = self.mine  # type: ignore[method-assign]

    times = Times()
    trainer, _ = fit(tmp_path, times, EMA(0.9), steps=6, num_sanity_val_steps=0)
    assert runs == [3, 6]
    assert vars(trainer.fit_loop.epoch_loop.val_loop)["run"] is times.mine


def test_who_reads_weights_later_is_told_before_they_are_written(tmp_path: Path) -> None:
    class Reads(L.Callback):
        def __init__(self) -> None:
            self.live: list[bool] = []

        def before_weights_change(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trained = weights.history[trainer.global_step]
            self.live.append(not differences(trained, {n: p.detach() for n, p in pl_module.named_parameters()}))

    weights, reads = Weights(), Reads()
    averaging = EMA(0.9, validate_with="average", replace_at_end=True)
    fit(tmp_path, weights, reads, averaging, steps=6, num_sanity_val_steps=0)
    # Into and out of the validations after 3 and 6 steps, and for good at the end.
    assert reads.live == [True, False, True, False, True]
