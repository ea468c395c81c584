"""A run of the whole suite goes on with other callbacks, and on another number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.together_runs import Settings, callbacks, differences, train
from harness.pool import Pool
from tests.together.saving import SaveBehind

pytestmark = [
    pytest.mark.filterwarnings("ignore:ExactResume. "),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:the state .* is taken from the files beside"),
    pytest.mark.filterwarnings("ignore:the state .* is not restored"),
    pytest.mark.filterwarnings("ignore:It is recommended to use .*sync_dist"),  # also of a group of one
]

NAMES = [type(each).__name__ for each in callbacks("single")]
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


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[dict[str, Any], str]:
    return run(tmp_path_factory.mktemp("unbroken"), "whole", saves=True, resume=None)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_comes_or_goes(name, unbroken, tmp_path):
    whole, with_all = unbroken
    less, with_less = run(tmp_path / "others", "without", saves=True, resume=None, without=(name,))
    removed, _ = run(tmp_path, "removed", resume=with_all, without=(name,))
    added, _ = run(tmp_path, "added", resume=with_less)
    for outcome in (removed, added):
        assert outcome["step"] == STEPS
        assert all(bool(weight.isfinite().all()) for weight in outcome["parameters"].values())
    if name in MONITORS:
        assert differences(without(whole, {name}), without(removed, {name})) == []
        assert differences(without(less, {name}), without(added, {name})) == []


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Pool]:
    with Pool(1) as pool:
        yield pool


def _on_ranks(folder: Path, strategy: str, ranks: int, resume: str | None) -> tuple[dict[str, Any], str]:
    here = Settings(folder / f"{strategy}-{ranks}", strategy, "vit", ranks, STEPS, resume=resume)
    here.folder.mkdir(parents=True, exist_ok=True)
    saver = SaveBehind(folder, (BEHIND,))
    return train(here, *([saver] if resume is None else [])), next(iter(saver.saved), "")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "ddp_arc_topk"])
@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)], ids=["2 to 1", "1 to 2"])
def test_another_number_of_ranks(strategy, ranks, tmp_path, pool, one_rank):
    """What is lost is said, the ranks agree, and the run comes to its end."""
    pools = {1: one_rank, 2: pool}
    before, after = ranks
    path = pools[before].run(_on_ranks, tmp_path, strategy, before, None)[0][1]
    ends = [end for end, _ in pools[after].run(_on_ranks, tmp_path, strategy, after, path)]
    assert [end["step"] for end in ends] == after * [STEPS]
    for end in ends:
        assert all(bool(weight.isfinite().all()) for weight in end["parameters"].values())
        if strategy != "fsdp2":  # there each has a shard
            assert differences(ends[0]["parameters"], end["parameters"]) == []
