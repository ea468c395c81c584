"""The suite's callbacks under ddp_ft: who comes back has their state, and does with the others what they do."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_eff.plugins.async_checkpoint.checkpoint_file import damage
from tests.strategies.fault_tolerant.replica_checks import GRADES, REAL, WEIGHTS, assert_same_run, check, killed
from tests.strategies.fault_tolerant.replica_runs import Fault, Outcome, Server, run

pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")

STEPS = 30
# One of three at a time, another after every third step.
MISA = {"units": 1, "include": WEIGHTS, "always": ["*bias"], "heat_map": True}
MISA |= {"every_n_steps": 3, "first_every_n_steps": 3}
# Clips often, and collects after every second step.
AVERAGES = {
    "ZClip": {"warmup_steps": 5, "z_thresh": 1.0, "max_grad_norm": None},
    "CheckpointAveraging": {"every_n_steps": 2, "window": 4},
    "EMA": {"decay": 0.9, "name": "ema"},
}
CALLBACKS: dict[str, dict[str, Any]] = {"GradES": {"GradES": GRADES}, "MISA": {"MISA": MISA}, "averages": AVERAGES}

_UNDISTURBED: dict[str, Outcome] = {}


@pytest.fixture
def undisturbed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same run without a fault, once for each set of callbacks."""

    def of(callbacks: str) -> Outcome:
        if callbacks not in _UNDISTURBED:
            folder = tmp_path_factory.mktemp("undisturbed")
            outcome = run(server, folder, steps=STEPS, callbacks=CALLBACKS[callbacks], **REAL)
            _UNDISTURBED[callbacks] = check(outcome, steps=STEPS)
        return _UNDISTURBED[callbacks]

    return of


def assert_same_state(outcome: Outcome, undisturbed: Outcome) -> None:
    """Callbacks and weights: equal on all replicas to the bit, and to rounding those of the run without a failure."""
    states = {json.dumps(final["callbacks"]) for final in outcome.finals.values()}
    assert len(states) == 1, outcome.logs()
    ours, theirs = outcome.finals[0], undisturbed.finals[0]
    assert ours["values"] == pytest.approx(theirs["values"], rel=1e-4, abs=1e-5)
    for name, state in theirs["callbacks"].items():
        for mine, other in zip(ours["callbacks"][name], state, strict=True):
            if isinstance(other, float):
                assert mine == pytest.approx(other, rel=1e-3, abs=1e-4, nan_ok=True), name
            else:
                assert mine == other, name


def opened(outcome: Outcome) -> dict[int, list[str]]:
    """Which parameters each step has trained."""
    return {line["step"]: line["open"] for lines in outcome.steps.values() for line in lines}


def compare(outcome: Outcome, undisturbed: Outcome) -> None:
    check(outcome, steps=STEPS)
    assert_same_run(outcome, undisturbed)
    assert opened(outcome) == opened(undisturbed)
    assert_same_state(outcome, undisturbed)


@pytest.mark.slow
def test_grades_and_replicas_that_die_before_and_after_it_freezes(
    server: Server, undisturbed: Any, tmp_path: Path
) -> None:
    """The writer has not frozen anything when it dies, and comes back to a run that has; then it heals another."""
    usual = undisturbed("GradES")
    trained = opened(usual)
    assert len(trained[9]) - len(trained[10]) == 2
    faults = (Fault(0, 8, "backward"), Fault(2, 18, "commit"))
    outcome = run(server, tmp_path, steps=STEPS, faults=faults, callbacks=CALLBACKS["GradES"], **REAL)
    compare(outcome, usual)
    assert killed(outcome) == [0, 2]
    assert outcome.steps[0][-1]["members"] == [0, 1, 2]


def test_grades_and_a_replica_that_misses_the_step_at_whose_end_it_freezes(
    server: Server, undisturbed: Any, tmp_path: Path
) -> None:
    """It heals within that step, and freezes with the others, by what they had measured."""
    faults = (Fault(2, 8, "glitch in allreduce"),)
    outcome = run(server, tmp_path, steps=STEPS, faults=faults, callbacks=CALLBACKS["GradES"], **REAL)
    compare(outcome, undisturbed("GradES"))
    assert [status for _, _, status in outcome.exits] == [0, 0, 0]
    assert "glitch" in outcome.logs()


_FAULTS = {
    "before they agree": (Fault(1, 9, "agree"),),
    "in the event": (Fault(1, 9, "event"),),
    "one misses the agreement": (Fault(2, 9, "glitch in agree"),),
    "in the event, and as it comes back": (Fault(1, 9, "event"), Fault(1, None, "healing", life=1)),
    "the one that heals it": (Fault(1, 9, "event"), Fault(0, 9, "sending")),
    "in the step, and one misses it": (Fault(1, 8, "allreduce"), Fault(2, 8, "glitch in allreduce")),
}


@pytest.mark.slow
@pytest.mark.parametrize("callbacks", ["GradES", "MISA"])
@pytest.mark.parametrize("case", _FAULTS)
def test_an_event_with_a_fault(case: str, callbacks: str, server: Server, undisturbed: Any, tmp_path: Path) -> None:
    """GradES and MISA both change the parameters at the end of step 9."""
    outcome = run(server, tmp_path, steps=STEPS, faults=_FAULTS[case], callbacks=CALLBACKS[callbacks], **REAL)
    assert outcome.logs().count("fault: ") == len(_FAULTS[case])
    assert all(status in (0, -signal.SIGKILL) for _, _, status in outcome.exits), outcome.logs()
    compare(outcome, undisturbed(callbacks))


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["backward", "settle", "update", "end", "glitch in allreduce", "glitch in settle"])
@pytest.mark.parametrize("callbacks", ["MISA", "averages"])
def test_a_fault_in(phase: str, callbacks: str, server: Server, undisturbed: Any, tmp_path: Path) -> None:
    faults = (Fault(1, 11, phase), Fault(0, 18, phase))
    outcome = run(server, tmp_path, steps=STEPS, faults=faults, callbacks=CALLBACKS[callbacks], **REAL)
    assert outcome.logs().count("fault: ") == 2
    compare(outcome, undisturbed(callbacks))


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["saving", "averaging"])
def test_the_writer_killed_while_it_saves_an_average(
    phase: str, server: Server, undisturbed: Any, tmp_path: Path
) -> None:
    """The one that writes in its place writes the window and the averages, too; the run can be resumed from there."""
    faults = (Fault(0, 15, phase),)
    settings: dict[str, Any] = {"callbacks": CALLBACKS["averages"], "checkpoint_every": 5, **REAL}
    first = run(server, tmp_path, steps=STEPS, faults=faults, **settings)
    assert killed(first) == [0]
    compare(first, undisturbed("averages"))
    (found,) = (tmp_path / "checkpoints").glob("epoch=*step=15.ckpt")
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("*step=15*"))
    others = sorted(path.name.replace("=20", "=15") for path in (tmp_path / "checkpoints").glob("*step=20*"))
    assert len(names) > 3
    assert [re.sub("epoch=.", "", name) for name in names] == [re.sub("epoch=.", "", name) for name in others]
    again = tmp_path / "again"
    again.mkdir()
    resumed = run(server, again, steps=STEPS, resume=str(found), **settings)
    assert_same_state(resumed, undisturbed("averages"))


@pytest.mark.slow
def test_averages_are_evaluated_over_the_living(server: Server, tmp_path: Path) -> None:
    faults = (Fault(1, 20, "validation"),)
    settings: dict[str, Any] = {"callbacks": AVERAGES, "validate_every": 1, **REAL}
    outcome = check(run(server, tmp_path, steps=STEPS, faults=faults, **settings), steps=STEPS)
    assert killed(outcome) == [1]
    names = ("val_loss", "average/val_loss", "ema/val_loss")
    metrics = {tuple(final["metrics"][name] for name in names) for final in outcome.finals.values()}
    assert len(metrics) == 1
    assert len(set(metrics.pop())) == 3


@pytest.mark.slow
def test_checkpoints_that_are_written_later_outlive_their_writer(server: Server, tmp_path: Path) -> None:
    """The save in flight may be lost with the replica that dies; none that is there is damaged, and another goes on."""
    settings: dict[str, Any] = {"callbacks": {"AsyncCheckpoint": {}}, "checkpoint_every": 1, **REAL}
    outcome = check(run(server, tmp_path, replicas=2, steps=20, faults=(Fault(0, 8, "backward"),), **settings), 20)
    assert killed(outcome) == [0]
    found = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    assert [path for path in found if damage(path) is not None] == []
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 20
    steps = {torch.load(path, weights_only=True)["global_step"] for path in found}
    assert steps >= {*range(1, 21)} - {7}
