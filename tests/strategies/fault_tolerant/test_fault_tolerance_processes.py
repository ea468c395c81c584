"""ddp_ft with two processes in each replica: real processes, real gloo, either of them killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.strategies.fault_tolerant.replica_checks import assert_same_run, check, run_on_loopback
from tests.strategies.fault_tolerant.replica_runs import Fault, Outcome, Server, run

pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")

STEPS = 24
OF_EPOCH = 8  # 240 samples in batches of 4 on four processes are 15 micro-batches: the last step has one
REAL = {"replicas": 2, "processes": 2, "steps": STEPS, "accumulate": 2, "workers": 1, "sleep": 0.01, "limit": 180.0}


def check_all(outcome: Outcome) -> Outcome:
    """What holds for one process in each replica, and that the others have the same weights."""
    check(outcome, STEPS)
    weights = {line["step"]: line["weights"] for lines in outcome.steps.values() for line in lines}
    assert {line["step"] for line in outcome.others} == set(weights)
    assert all(line["weights"] == weights[line["step"]] for line in outcome.others)
    return outcome


@pytest.fixture(scope="module")
def undisturbed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return check_all(run_on_loopback(server, tmp_path_factory.mktemp("processes"), **REAL))


_CASES = {
    "the first process in backward": (Fault(1, 10, "backward"),),
    "the second process in backward": (Fault(1, 10, "backward", process=1),),
    "the first process in the commit": (Fault(1, 10, "commit"),),
    "the second process in the update": (Fault(0, 10, "update", process=1),),
    "while it heals": (Fault(1, 6, "forward", process=1), Fault(1, None, "healing", life=1)),
    "one misses what the other got": (Fault(1, 10, "glitch in allreduce"),),
    "one misses the settling": (Fault(0, 10, "glitch in settle"),),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if i < 2 else pytest.mark.slow) for i, case in enumerate(_CASES)]
)
def test_a_fault_in(case: str, server: Server, undisturbed: Outcome, tmp_path: Path) -> None:
    outcome = check_all(run(server, tmp_path, faults=_CASES[case], **REAL))
    # Not by how they ended: a process that has lost its mate may be seen to end before the mate is.
    assert outcome.logs().count("fault: ") == len(_CASES[case]), outcome.logs()
    assert_same_run(outcome, undisturbed, of_epoch=OF_EPOCH)


def test_two_replicas_of_two_are_four_of_one(server: Server, undisturbed: Outcome, tmp_path: Path) -> None:
    """The same batches, dropout and means."""
    four = run(server, tmp_path, **{**REAL, "replicas": 4, "processes": 1})
    assert_same_run(four, undisturbed, of_epoch=OF_EPOCH)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "replica"),
    [
        ({"validate_every": 1, "sanity": 1, "checkpoint_every": 5, "loggers": ["csv"]}, 0),
        ({"batch_norm": True, "precision": "bf16-mixed"}, 1),
        ({"language": True, "strategy": {"on_failure": "mecefo", "mecefo_rank": 4, "mecefo_every_n_steps": 5}}, 1),
        ({"strategy": {"on_failure": "shrink"}}, 1),
        ({"callbacks": {"ZClip": {"warmup_steps": 5}, "EMA": {"half_life": 10.0}}}, 1),
        ({"resume": True}, 1),
    ],
    ids=["validation and files", "batch norm in bf16", "mecefo", "shrink", "callbacks", "resume"],
)
def test_also_with(settings: dict[str, Any], replica: int, server: Server, tmp_path: Path) -> None:
    if settings.pop("resume", False):
        first = tmp_path / "first"
        first.mkdir()
        check_all(run(server, first, checkpoint_every=5, **{**REAL, "steps": STEPS}))
        settings = {"resume": str(next((first / "checkpoints").glob("*step=10.ckpt")))}
    outcome = run(server, tmp_path, faults=(Fault(replica, 13, "backward", process=1),), **settings, **REAL)
    if "resume" in settings:
        assert {line["step"] for line in outcome.others} == set(range(11, STEPS + 1))
        assert len({f["weights"] for f in outcome.finals.values()}) == 1
    else:
        check_all(outcome)
    assert outcome.lives == {replica: 1, 1 - replica: 0}, outcome.logs()
    if "checkpoint_every" in settings:
        names = {path.name.rpartition("step=")[2] for path in (tmp_path / "checkpoints").glob("*.ckpt")}
        assert names >= {f"{step}.ckpt" for step in range(5, STEPS, 5)}
        assert len(list(tmp_path.glob("csv/**/metrics.csv"))) == 1
