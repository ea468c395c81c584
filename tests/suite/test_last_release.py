"""A run of the last release goes on with today's code as it would have gone on with that release.

The checkpoints, the runs and where they ended are those of tests/fixtures/make_checkpoints.py. Names of arguments and
formats of states may change between releases; what a run computes from a state may not.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_eff.merging.sources import open_source
from tests.fixtures.make_checkpoints import END, HALF, RUNS, Tiny, train
from tests.suite.runs import differences, expect

# These read norms of gradients, which are summed up in another order since.
REORDERED = ("zclip", "grades", "misa", "training-guard-spikes")

RELEASE = Path(__file__).parents[1] / "fixtures" / "0.1"

pytestmark = [
    # By an older Lightning than the one that the checkpoints were made with.
    pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning"),
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on(name: str, tmp_path: Path, pool: Any) -> None:
    ends = _on_ranks(pool, name, train, name, tmp_path, _copy(name, tmp_path))
    assert len(ends) == RUNS[name].ranks
    for rank, end in enumerate(ends):
        wrong = differences(_recorded(name, rank), _without_versions(end), f"rank {rank}", *_tolerances(name))
        assert not wrong, wrong


@pytest.mark.parametrize(("name", "average"), [("ema", "ema"), ("checkpoint-averaging", "average")])
def test_averaged_weights_are_read(name: str, average: str) -> None:
    module = Tiny.load_from_checkpoint(RELEASE / name / f"{average}-half.ckpt")
    for suffix in ("ckpt", "safetensors"):
        source = open_source(RELEASE / name / f"{average}-half.{suffix}")
        assert source.step == HALF
        wrong = differences(dict(module.state_dict()), {key: source.read(key) for key in source.specs})
        assert not wrong, wrong


@pytest.mark.parametrize(
    ("name", "files", "state", "owner"),
    [
        ("zclip", "half.ckpt", ("callbacks", "ZClip"), "ZClip"),
        ("ema", "half.ckpt", ("lightning_eff_rank_state",), "RankState"),
        ("ema", "half.ckpt.ranks/*", ("states", "average-ema"), "the average 'ema'"),
        ("compressed-arc-topk", "half.ckpt.ranks/*", ("states", "compression"), "CompressedDDPStrategy"),
    ],
)
def test_a_state_of_a_newer_version_is_refused(
    name: str, files: str, state: tuple[str, ...], owner: str, tmp_path: Path, pool: Any
) -> None:
    checkpoint = _copy(name, tmp_path)
    for path in checkpoint.parent.glob(files):
        content = torch.load(path, weights_only=True)
        functools.reduce(dict.__getitem__, state, content)["version"] = 3
        torch.save(content, path)
    words = f"the state of {owner} was saved by a newer lightning_eff: state version 3, this one knows up to 1"
    assert _on_ranks(pool, name, _refusal, name, tmp_path, checkpoint) == [words] * RUNS[name].ranks


@pytest.mark.parametrize(("name", "owner"), [("ema", "average-ema"), ("compressed-powersgd", "compression")])
def test_what_lies_beside_a_checkpoint_has_a_version(name: str, owner: str, tmp_path: Path, pool: Any) -> None:
    ends = _on_ranks(pool, name, train, name, tmp_path)
    assert [end["ranks"][owner]["version"] for end in ends] == [1] * RUNS[name].ranks
    assert torch.load(tmp_path / "end.ckpt", weights_only=True)["lightning_eff_rank_state"]["version"] == 1
    if name == "ema":
        averaged = torch.load(tmp_path / "ema-end.ckpt", weights_only=True)
        about = averaged["lightning_eff_average"]
        assert about.items() >= {"version": 1, "step": END, "scheme": "exponential", "decay": 0.9}.items()


def _copy(name: str, folder: Path) -> Path:
    """The run's checkpoint and what lies beside it, in a folder where they may be changed."""
    return Path(shutil.copytree(RELEASE / name, folder / name)) / "half.ckpt"


def _on_ranks(pool: Any, name: str, fn: Callable[..., Any], *args: Any) -> list[Any]:
    return [fn(*args)] if RUNS[name].ranks == 1 else pool.run(fn, *args)


def _refusal(*args: Any) -> str:
    with expect(ValueError, "the state was loaded") as caught:
        train(*args)
    return str(caught.error)


def _recorded(name: str, rank: int) -> dict[str, Any]:
    return torch.load(RELEASE / name / f"end.rank{rank}.pt", weights_only=True)


def _without_versions(end: dict[str, Any]) -> dict[str, Any]:
    """As 0.1 has it, without what has been added since."""
    for states in (end["callbacks"], end["ranks"]):
        for owner, state in states.items():
            states[owner] = {key: value for key, value in state.items() if key != "version"}
    if (grades := end["callbacks"].get("GradES")) is not None:
        del grades["noted"], grades["foretold"], grades["watch"]["rule"]  # for the forecast; by which rule it was
        grades["watch"]["values"] = grades["watch"]["values"][:9]
    if sampler := end["callbacks"].get("MISA", {}).get("sampler"):
        del sampler["drawn"]  # counted since, for what is said at the end
    if layout := end["callbacks"].get("TensorBoardLayout"):
        del layout["seen"]  # which numbers have moved: flat charts are folded since
    if guard := end["callbacks"].get("TrainingGuard"):
        del guard["rates"]  # looked at since, in columns of their own
        for rule in guard["rules"]:
            rule.pop("last", None)
        for name in ("block", "landing"):
            numbers = guard["values"][name]
            if numbers.ndim == 2:
                guard["values"][name] = torch.cat(
                    [half[:, [*range(half.shape[1] - 3), -1]] for half in numbers.chunk(2, 1)], 1
                )
    return end


def _tolerances(name: str) -> tuple[float, float]:
    if name.startswith(REORDERED):
        return 1e-4, 1e-6
    return (0.0, 0.0) if _same_bits_here() else (1e-3, 1e-5)


@functools.cache
def _same_bits_here() -> bool:
    """Whether this machine computes bit by bit what that of the fixtures did: a plain training tells."""
    end = train("plain", Path(), RELEASE / "plain" / "half.ckpt")
    return not differences(_recorded("plain", 0), end)
