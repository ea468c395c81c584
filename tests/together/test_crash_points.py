"""The whole suite in one Trainer: from each checkpoint of a run the resumed run is the one that was not broken off."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import examples.digits.data  # noqa: F401  (now: scikit-learn sets variables of the environment)
from benchmarks.together_faults import as_replica, lighthouse
from benchmarks.together_runs import RANKS, Settings, differences, train
from harness.forked import ForkedRanks
from harness.pool import Pool
from harness.processes import apart
from lightning_eff.callbacks import TrainingDivergedError
from tests.together.saving import SaveBehind

NEEDS_TORCHFT = pytest.mark.skipif(
    importlib.util.find_spec("torchft") is None, reason="torchft has wheels for Linux x86-64 only"
)

# Of which batches the losses are multiplied: a NaN, which ZClip keeps away from the weights, and a gradient that is far
# too large; and NaNs from which the guard goes back.
BAD = {4: math.nan, 13: 300.0}
WORSE = dict.fromkeys(range(22, 27), math.nan)
STEPS = 20
# Batches behind which it is saved. An epoch has 36 of them, half as many on two ranks and a third on three; a step has
# two. A validation comes behind every seventh of an epoch.
FAST = (6, 9, 20)
ALL = (1, 3, 5, 6, 9, 12, 13, 15, 17, 18, 20, 23, 24, 27, 30, 31, 34, 36)
VALIDATIONS = (7, 14, 21, 28, 35)


def crash_and_resume(
    folder: Path, batches: tuple[int, ...], validations: tuple[int, ...], **settings: Any
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The unbroken run, and by checkpoint where the run that was resumed differs from it, on this rank."""
    base = Settings(folder / "whole", resume=None, **settings)
    saves = SaveBehind(folder, batches, validations)
    base.folder.mkdir(parents=True, exist_ok=True)
    whole = train(base, saves)
    wrong = {}
    for path in saves.saved:
        name = Path(path).stem.removeprefix("behind-")
        resumed = Settings(folder / f"resumed-{name}", resume=path, **settings)
        resumed.folder.mkdir(exist_ok=True)
        try:
            wrong[name] = differences(whole, train(resumed))[:6]
        except TrainingDivergedError as error:
            wrong[name] = [str(error)]
    return whole, wrong


def on_all_ranks(pool: Pool, folder: Path, *points: Any, strategy: str, **settings: Any) -> list[Any]:
    if strategy == "ddp_ft":
        return apart(_of_replicas, folder, points, settings)
    if RANKS[strategy] == 1:
        return [crash_and_resume(folder, *points, strategy=strategy, **settings)]
    return pool.using(time_limit=1500).run(crash_and_resume, folder, *points, strategy=strategy, **settings)


def _of_replicas(folder: Path, points: tuple[Any, ...], settings: dict[str, Any]) -> list[Any]:
    """In a process that has done nothing yet, which forks them."""
    with (
        lighthouse() as house,
        ForkedRanks(RANKS["ddp_ft"], folder, as_replica, house, _noted, folder, points, settings) as run,
    ):
        if any(run.wait(1500).values()):
            raise AssertionError(run.text())
    return [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in run.status]


def _noted(folder: Path, points: tuple[Any, ...], settings: dict[str, Any]) -> None:
    found = crash_and_resume(folder, *points, strategy="ddp_ft", **settings)
    torch.save(found, folder / f"found-{os.environ['REPLICA_GROUP_ID']}.pt")


@pytest.mark.parametrize(
    ("strategy", "model", "batches"),
    [
        ("single", "gpt", FAST),
        *(
            pytest.param(strategy, model, FAST, marks=[pytest.mark.slow, pytest.mark.timeout(600)])
            for strategy, model in (("single", "vit"), ("ddp", "vit"), ("fsdp2", "gpt"), ("ddp_arc_topk", "vit"))
        ),
        *(
            pytest.param("single", model, ALL, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
            for model in ("gpt", "vit")
        ),
    ],
    ids=str,
)
def test_each_crash_point(strategy, model, batches, tmp_path, pool):
    validations = VALIDATIONS if batches is ALL else VALIDATIONS[:1]
    found = on_all_ranks(pool, tmp_path, batches, validations, strategy=strategy, model=model, bad=BAD)
    for rank, (whole, wrong) in enumerate(found):
        assert whole["step"] == STEPS
        assert len(wrong) > len(batches)
        different = {name: texts for name, texts in wrong.items() if texts}
        assert not different, f"rank {rank}: {different}"


@pytest.mark.slow
@pytest.mark.timeout(900)
@NEEDS_TORCHFT
def test_replicas_begin_anew_between_two_steps(tmp_path, pool):
    """Within a window of accumulation the gradients are each replica's own, and a checkpoint has those of one."""
    found = on_all_ranks(pool, tmp_path, (6, 9, 20), (), strategy="ddp_ft", model="vit", bad=BAD)
    for whole, wrong in found:
        assert whole["step"] == STEPS
        assert wrong["06"] == wrong["20"] == []
        assert wrong["09"] != []


def test_behind_a_rollback_and_before_it(tmp_path, pool):
    """One thing is lost with a process, the guard's snapshots: between the one that it goes back to and the alarm."""
    points = (5, 18, 27, 33)
    ((whole, wrong),) = on_all_ranks(pool, tmp_path, points, (), strategy="single", model="vit", bad=WORSE)
    guard = whole["callbacks"]["TrainingGuard"]
    assert (guard["rollbacks"], guard["_last_restored"], guard["_last_alarm"]) == (1, 8, 13)
    assert wrong["05"] == wrong["33"] == []
    assert wrong["18"] != []  # it has a snapshot of step 9, where the unbroken run went back to step 8
    assert "has no snapshot from before it" in wrong["27"][0]
