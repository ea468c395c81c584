"""What holds after a run of replicas, whatever has happened to them, and the settings of the usual runs."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from harness import json_lines
from harness.processes import listeners
from tests.strategies.fault_tolerant.replica_runs import Lighthouse, Outcome, Server, orphans, run

STEPS = 40
# AdamW, dropout, two micro-batches a step, a data worker with prefetch. An epoch has 10 steps: kills are in mid-epoch.
REAL = {"accumulate": 2, "workers": 1, "sleep": 0.01}
WEIGHTS = ["net.0.weight", "net.3.weight", "head.weight"]

# At the end of step 9 those two of the three matrices are frozen that were the most settled ones after step 8.
GRADES = {
    "metric": "grad_change",
    "tau": 1e9,
    "tau_mode": "absolute",
    "alpha": 0.0,
    "every_n_steps": 1,
    "patience": 6,
    "include": WEIGHTS,
    "max_frozen_ratio": 0.67,
    "max_events": None,
    "stop_when_frozen": False,
    "release_state": True,
}


def run_on_loopback(server: Server, folder: Path, **settings: Any) -> Outcome:
    """Run without a fault, and look whether anything listens elsewhere than on 127.0.0.1."""
    found: set[str] = set()

    def look(lighthouse: Lighthouse, pids: dict[int, int], folder: Path) -> None:
        found.update(listeners([*pids.values(), lighthouse.process.pid]))

    outcome = run(server, folder, during=look, **settings)
    assert found == {"0100007F"}, "something listens elsewhere than on 127.0.0.1"
    return outcome


def check(outcome: Outcome, steps: int = STEPS, all_end: bool = True, manual: bool = False) -> Outcome:
    """What holds after whatever has happened."""
    replicas = len(outcome.steps)
    finished = {replica for replica, _, status in outcome.exits if status == 0}
    assert finished, outcome.logs()
    if all_end:
        assert finished == set(range(replicas)), outcome.logs()
    weights: dict[int, tuple[str, list[str]]] = {}
    for replica, lines in outcome.steps.items():
        numbers = [line["step"] for line in lines]
        assert numbers == sorted(set(numbers)), f"replica {replica} made a step twice: {numbers}"
        for line in lines:
            assert line["ft_step"] == line["step"] or manual
            same = weights.setdefault(line["step"], (line["weights"], line["open"]))
            assert line["weights"] == same[0], f"weights differ after step {line['step']} of replica {replica}"
            assert line["open"] == same[1], f"other parameters are trained in step {line['step']} of replica {replica}"
    assert sorted(weights) == list(range(1, steps + 1)), "a step is missing"
    for final in outcome.finals.values():
        assert final["step"] == steps
    assert len({(f["weights"], f["optimizer"]) for f in outcome.finals.values()}) == 1
    assert orphans(outcome.sessions) == []
    return outcome


def assert_same_run(outcome: Outcome, undisturbed: Outcome, tolerance: float = 1e-5, of_epoch: int = 10) -> None:
    """The loss curve and the samples are those of a run without the failure."""
    losses, expected = outcome.losses(), undisturbed.losses()
    assert losses.keys() == expected.keys()
    for step, loss in expected.items():
        assert losses[step] == pytest.approx(loss, rel=tolerance, abs=tolerance), f"step {step}"

    seen: dict[int, set[int]] = {}
    for step, samples in json_lines.read(*outcome.folder.glob("samples-*.jsonl")):
        seen.setdefault(step, set()).update(samples)
    for epoch in range(max(expected) // of_epoch):
        steps = range(of_epoch * epoch + 1, of_epoch * (epoch + 1) + 1)
        samples = [sample for step in steps for sample in seen[step]]
        assert sorted(samples) == list(range(240)), f"samples lost or seen twice in epoch {epoch}"


def killed(outcome: Outcome) -> list[int]:
    """Replicas that were killed, in order."""
    return [replica for replica, _, status in outcome.exits if status == -signal.SIGKILL]
