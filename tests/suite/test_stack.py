"""All callbacks of the table in one Trainer: each keeps its promises beside the others."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.strategies import ModelParallelStrategy

from harness.faults import InjectedError, fail_at
from harness.pool import Pool
from lightning_eff.callbacks import MISA, GradES, ModelSurgery
from tests.suite.models import MODELS, STEPS
from tests.suite.probe import Probe
from tests.suite.runs import Place, Run, SaveAt, assert_equal, differences, expect, fit, full
from tests.suite.table import ARC_TOPK, DDP, FSDP2, ROWS, SINGLE, Row, Strategy

# The guard goes back from step 8 to the snapshot of step 5; it keeps its snapshots in memory, so that a run which is
# broken off between the two finds none at its alarm, and says so.
CRASH_STEPS = (1, 3, 4, 5, 9)


def _hsdp(optimizers: int) -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=4, tensor_parallel_size=1, process_group_backend="gloo")


# Four ranks, on which a model shards itself.
HSDP = Strategy("hsdp", 4, _hsdp)


def rows(model: str, strategy: Strategy, without: type) -> list[Row]:
    """The first row of each callback that neither the model nor the strategy refuses.

    GradES and MISA refuse each other, since both decide what is trained: one is left out. ModelSurgery is, since the
    others' arguments name the layers that it replaces.
    """
    first: dict[type, Row] = {}
    for row in ROWS:
        refused = model in row.refused_models or strategy.name in row.refused_strategies
        if not refused and row.callback not in (without, ModelSurgery):
            first.setdefault(row.callback, row)
    return list(first.values())


def train(
    folder: Path, strategy: Strategy, model: str, without: type, around: tuple[Any, ...] = (), **arguments: Any
) -> Run:
    callbacks = [row.build() for row in rows(model, strategy, without)]
    return fit(None, folder, strategy=strategy, model=model, around=[*callbacks, *around], **arguments)


def outcome(run: Run) -> dict[str, Any]:
    states = {type(each).__name__: full(each.state_dict()) for each in run.trainer.callbacks if each.state_dict()}
    states.pop("ModelCheckpoint", None)
    return {**run.outcome(), "callback": states}


def crash_and_resume(folder: Path, strategy: Strategy, model: str, without: type) -> list[str]:
    """Where the resumed runs differ from the unbroken one, on this rank."""
    unbroken = outcome(train(folder, strategy, model, without))
    assert {"ZClip", "TrainingGuard", "EMA", "CheckpointAveraging", "SpectralAlignmentMonitor"} <= set(
        unbroken["callback"]
    )
    wrong = []
    for step in CRASH_STEPS:
        path = folder / f"{model}-{step}.ckpt"
        counted = step * MODELS[model].optimizer_count
        with expect(InjectedError, f"the run did not get to step {step}"):
            train(folder, strategy, model, without, (SaveAt(counted, path), fail_at(step=counted)))
        resumed = train(folder, strategy, model, without, resume=path)
        assert resumed.trainer.global_step == STEPS * MODELS[model].optimizer_count
        wrong += [f"crash after step {step}: {text}" for text in differences(unbroken, outcome(resumed))]
    return wrong


@pytest.mark.parametrize(
    ("strategy", "model", "without"),
    [
        pytest.param(SINGLE, "net", MISA, marks=pytest.mark.slow),
        pytest.param(SINGLE, "net", GradES, marks=pytest.mark.slow),
        pytest.param(SINGLE, "gan", MISA, marks=pytest.mark.slow),
        pytest.param(DDP, "net", MISA, marks=pytest.mark.slow),
        pytest.param(DDP, "net", GradES, marks=pytest.mark.slow),
        pytest.param(DDP, "gan", MISA, marks=pytest.mark.slow),
        pytest.param(FSDP2, "net", MISA, marks=pytest.mark.slow),
        pytest.param(FSDP2, "net", GradES, marks=pytest.mark.slow),
        pytest.param(ARC_TOPK, "net", MISA, marks=pytest.mark.slow),
        pytest.param(HSDP, "replicated", MISA, marks=pytest.mark.slow),
        pytest.param(HSDP, "replicated", GradES, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", None) or getattr(value, "__name__", value),
)
def test_resume_at_five_crash_points(strategy, model, without, tmp_path, pool):
    with Pool(strategy.ranks) if strategy is HSDP else contextlib.nullcontext(pool) as workers:
        ranks = Place(strategy, tmp_path, workers).run(crash_and_resume, tmp_path, strategy, model, without)
    for rank, wrong in enumerate(ranks):
        assert not wrong, f"rank {rank}: {wrong}"


def beside_finetuning(row: Row | None, folder: Path, *around: Any, **arguments: Any) -> Run:
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3, verbose=False)
    return fit(row, folder, model="backbone", around=[finetuning, *around], **arguments)


@pytest.mark.parametrize("row", [row for row in ROWS if row.callback is not Probe], ids=lambda row: row.id)
def test_beside_another_s_unfreezing(row, tmp_path):
    """BackboneFinetuning unfreezes the blocks after six steps: who does not follow refuses it in `setup`."""
    if getattr(row.callback, "changes_trainable", False):
        with expect(MisconfigurationException, "both decided which parameters are trained") as caught:
            beside_finetuning(row, tmp_path)
        assert "BackboneFinetuning" in str(caught.error)
        return
    path = tmp_path / "unfrozen.ckpt"
    unbroken = beside_finetuning(row, tmp_path, SaveAt(9, path))
    resumed = beside_finetuning(row, tmp_path, resume=path)
    for run in (unbroken, resumed):
        assert len(run.trainer.optimizers[0].param_groups) == 2
        assert all(bool(weight.isfinite().all()) for weight in run.parameters().values())
    if not row.changes_training:  # a resume is compared with one by Lightning alone, which is not exact here
        plain = tmp_path / "plain.ckpt"
        assert_equal(unbroken.parameters(), beside_finetuning(None, tmp_path, SaveAt(9, plain)).parameters())
        assert_equal(resumed.parameters(), beside_finetuning(None, tmp_path, resume=plain).parameters())
