"""ddp_ft in manual optimization under `kill -9`: a training_step that makes several optimizer steps of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_eff.training.shards import ShardedLoader
from tests.distributed.replica_main import Adversaries, Noisy
from tests.distributed.replica_runs import Fault, Outcome, Server, run
from tests.distributed.test_fault_tolerance import assert_same_run, check, killed

pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")

STEPS = 24  # runs of training_step
# Two of them make five optimizer steps: of the judge and the maker in each, of the guess in every second.
# So steps 30 and 31 are the first and the second of an even one, and 32 is what it accumulates, without a step.
PAIR: dict[str, Any] = {"kind": "adversaries", "optimizer_steps": 60, "sleep": 0.01, "workers": 1}
OF_EPOCH = 20


@pytest.fixture(scope="session")
def undisturbed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return checked(run(server, tmp_path_factory.mktemp("manual"), steps=STEPS, **PAIR))


def checked(outcome: Outcome) -> Outcome:
    check(outcome, steps=STEPS, manual=True)
    counts: dict[int, tuple[int, int]] = {}
    for lines in outcome.steps.values():
        for line in lines:
            count = (line["ft_step"], line["optimizer_steps"])
            assert counts.setdefault(line["step"], count) == count
    assert [counts[step][1] for step in sorted(counts)] == [5 * (step // 2) + 2 * (step % 2) for step in sorted(counts)]
    return outcome


def assert_same_end(outcome: Outcome, undisturbed: Outcome) -> None:
    """The same curve, samples, weights and optimizer states as without a failure."""
    assert_same_run(checked(outcome), undisturbed, of_epoch=OF_EPOCH)
    rates = [{line["step"]: line["rate"] for line in each.steps[0]} for each in (outcome, undisturbed)]
    assert rates[0] == {step: rate for step, rate in rates[1].items() if step in rates[0]}
    ours, theirs = outcome.finals[0], undisturbed.finals[0]
    assert ours["values"] == pytest.approx(theirs["values"], rel=1e-4, abs=1e-5)
    assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-4, abs=1e-5)
    for mine, other in zip(ours["optimizers"], theirs["optimizers"], strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)


_KILLS = {
    "first part, backward": Fault(1, 30, "backward"),
    "second part, allreduce": Fault(1, 31, "allreduce"),
    "first part, forward": Fault(1, 30, "forward"),
    "first part, allreduce": Fault(1, 30, "allreduce"),
    "first part, commit": Fault(1, 30, "commit"),
    "first part, update": Fault(1, 30, "update"),
    "first part, settle": Fault(1, 30, "settle"),
    "second part, forward": Fault(1, 31, "forward"),
    "second part, backward": Fault(1, 31, "backward"),
    "second part, commit": Fault(1, 31, "commit"),
    "second part, update": Fault(1, 31, "update"),
    "second part, settle": Fault(1, 31, "settle"),
    "accumulation, backward": Fault(1, 32, "backward"),
    "accumulation, commit": Fault(1, 32, "commit"),
    "third part, allreduce": Fault(1, 34, "allreduce"),
    "third part, settle": Fault(1, 34, "settle"),
    "between steps": Fault(1, 32, "end"),
    "the writer, second part, commit": Fault(0, 31, "commit"),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if i < 2 else pytest.mark.slow) for i, case in enumerate(_KILLS)]
)
def test_killed_in(case: str, server: Server, undisturbed: Outcome, tmp_path: Path) -> None:
    outcome = run(server, tmp_path, steps=STEPS, faults=(_KILLS[case],), **PAIR)
    assert_same_end(outcome, undisturbed)
    assert killed(outcome) == [_KILLS[case].replica], outcome.logs()
    assert sum(outcome.lives.values()) == 1, outcome.logs()


_SEVERAL = {
    "two at once": ((Fault(1, 31, "backward"), Fault(2, 31, "backward")), [1, 2]),
    "two in different parts": ((Fault(0, 30, "settle"), Fault(2, 31, "allreduce")), [0, 2]),
    "all but one, one after the other": ((Fault(0, 21, "allreduce"), Fault(1, 31, "backward")), [0, 1]),
    "while it heals": ((Fault(1, 21, "backward"), Fault(1, None, "healing", life=1)), [1, 1]),
    "the one that heals it": ((Fault(1, 21, "backward"), Fault(0, 26, "sending")), [0, 1]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", _SEVERAL)
def test_several_killed(case: str, server: Server, undisturbed: Outcome, tmp_path: Path) -> None:
    faults, expected = _SEVERAL[case]
    outcome = run(server, tmp_path, steps=STEPS, faults=faults, **PAIR)
    assert_same_end(outcome, undisturbed)
    assert sorted(killed(outcome)) == expected, outcome.logs()


_GLITCHES = {
    "the sum of the first part": (Fault(2, 30, "glitch in allreduce"),),
    "the sum of the second part": (Fault(2, 31, "glitch in allreduce"),),
    "what is accumulated": (Fault(2, 32, "glitch in allreduce"),),
    "the sum of the writer": (Fault(0, 31, "glitch in allreduce"),),
    "settling the first part": (Fault(2, 30, "glitch in settle"),),
    "settling the second part": (Fault(2, 31, "glitch in settle"),),
    "the meeting of a repeated part": (Fault(1, 31, "backward"), Fault(2, None, "glitch in retry")),
    "the meeting before a step": (Fault(1, 31, "backward"), Fault(2, None, "glitch in start")),
    "the sum, while another dies": (Fault(1, 31, "allreduce"), Fault(2, 31, "glitch in allreduce")),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", _GLITCHES)
def test_one_replica_misses_what_the_others_got(
    case: str, server: Server, undisturbed: Outcome, tmp_path: Path
) -> None:
    outcome = run(server, tmp_path, steps=STEPS, faults=_GLITCHES[case], **PAIR)
    assert "glitch" in outcome.logs()
    assert_same_end(outcome, undisturbed)
