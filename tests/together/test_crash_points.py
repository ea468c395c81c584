"""The whole suite in one Trainer: from each checkpoint of a run the resumed run is the one that was not broken off."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import examples.digits.data  # noqa: F401  (now: scikit-learn sets variables of the environment)
from benchmarks.together_runs import RANKS, Settings, differences, train
from harness.pool import Pool
from lightning_eff.callbacks import TrainingDivergedError
from tests.together.saving import SaveBehind

# Of which batches the losses are multiplied: a NaN, which ZClip keeps away from the weights, and a gradient that is far
# too large; and NaNs from which the guard goes back.
BAD = {4: math.nan, 13: 300.0}
WORSE = dict.fromkeys(range(22, 27), math.nan)
STEPS = 20
# Batches behind which it is saved. An epoch has 36 of them, and half as many on two ranks; a step takes two, and a
# validation comes behind every seventh.
FAST = (6, 9, 20)
ALL = (*range(1, 40, 2), 6, 13, 20, 34)
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


def on_all_ranks(pool: Pool, strategy: str, *arguments: Any, **settings: Any) -> list[Any]:
    if RANKS[strategy] == 1:
        return [crash_and_resume(*arguments, strategy=strategy, **settings)]
    return pool.using(time_limit=1500).run(crash_and_resume, *arguments, strategy=strategy, **settings)


@pytest.mark.parametrize(
    ("strategy", "model", "batches"),
    [
        ("single", "gpt", FAST),
        pytest.param("single", "vit", FAST, marks=pytest.mark.slow),
        *(
            pytest.param("single", model, ALL, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
            for model in ("gpt", "vit")
        ),
    ],
    ids=str,
)
def test_each_crash_point(strategy, model, batches, tmp_path, pool):
    points = (batches, VALIDATIONS if batches is ALL else VALIDATIONS[2:3])
    for rank, (whole, wrong) in enumerate(on_all_ranks(pool, strategy, tmp_path, *points, model=model, bad=BAD)):
        assert whole["step"] == STEPS
        assert len(wrong) > len(batches)
        found = {name: texts for name, texts in wrong.items() if texts}
        assert not found, f"rank {rank}: {found}"


def test_behind_a_rollback_and_before_it(tmp_path, pool):
    """One thing is lost with a process, the guard's snapshots: between the one that it goes back to and the alarm."""
    points = (5, 18, 27, 33)
    ((whole, wrong),) = on_all_ranks(pool, "single", tmp_path, points, (), model="vit", bad=WORSE)
    guard = whole["callbacks"]["TrainingGuard"]
    assert (guard["rollbacks"], guard["_last_restored"], guard["_last_alarm"]) == (1, 8, 13)
    assert wrong["05"] == wrong["33"] == []
    assert wrong["18"] != []  # it has a snapshot of step 9, where the unbroken run went back to step 8
    assert "has no snapshot from before it" in wrong["27"][0]
