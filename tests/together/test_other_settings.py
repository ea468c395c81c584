"""A run of the whole suite goes on with other callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.together_runs import Settings, differences, train
from tests.together.saving import SaveBehind

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"
)

# Whoever of them is there, the run is the same.
MONITORS = {
    "SpectralAlignmentMonitor",
    "RunHealth",
    "GradientStats",
    "Preemption",
    "AsyncCheckpoint",
    "TensorBoardLayout",
}
STEPS, BEHIND = 12, 11


def run(folder: Path, name: str, saves: bool = False, **settings: Any) -> tuple[dict[str, Any], str]:
    here = Settings(folder / name, steps=STEPS, **settings)
    here.folder.mkdir(parents=True)
    saver = SaveBehind(folder, (BEHIND,))
    return train(here, *([saver] if saves else [])), next(iter(saver.saved), "")


def without(outcome: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """What does not depend on these."""
    states = {name: state for name, state in outcome["callbacks"].items() if name not in names}
    return {**outcome, "callbacks": states, "metrics": {}}


def test_monitors_come_and_go(tmp_path):
    """All of them at once, in the midst of a step."""
    gone = tuple(MONITORS)
    whole, with_all = run(tmp_path, "whole", saves=True, resume=None)
    without_any, with_none = run(tmp_path / "others", "without", saves=True, resume=None, without=gone)
    removed, _ = run(tmp_path, "removed", resume=with_all, without=gone)
    added, _ = run(tmp_path, "added", resume=with_none)
    for other in (without_any, removed, added):
        assert differences(without(whole, MONITORS), without(other, MONITORS)) == []
