"""Real processes that are stopped, hang, or are slow: who is named, where, and how soon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HANG = 2.0  # seconds
AT = 20  # the step


def _runs(folder, *scenarios, timeout=300):
    """Run scenarios in a process of their own: what each has come to, and what its ranks have written at the end."""
    settings = []
    for number, scenario in enumerate(scenarios):
        place = folder / str(number)
        place.mkdir()
        watch = {"hang_seconds": HANG, "action": "abort", "first_seconds": 60.0}
        scenario["health"] = watch | scenario.get("health", {})
        settings.append({"folder": str(place), "rank": 1, "ranks": 2, "at": AT, **scenario})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.callbacks.run_health.runs", json.dumps(settings)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    found = []
    for scenario in settings:
        place = Path(scenario["folder"])
        ranks = [place / f"rank{rank}.json" for rank in range(scenario["ranks"])]
        told = json.loads((place / "told.json").read_text())
        told["ranks"] = [json.loads(file.read_text()) if file.exists() else None for file in ranks]
        told["files"] = sorted(path.name for path in place.iterdir())
        told["recorded"] = {path.name: path.read_text() for path in place.glob("*.flight_recorder.json")}
        found.append(told)
    return found


def _check(told, scenario, phase, words):
    """The right rank and phase, in the one report; every rank that is not stopped has ended and left its stacks."""
    text, rank, ranks = told["text"], scenario["rank"], scenario["ranks"]
    assert text.count("RunHealth: no sign of life for") == 1, (told["status"], text)
    report = text[text.index("RunHealth: no sign of life") :].split("the stacks of all ranks")[0]
    accused = [line for line in report.splitlines() if line.startswith(f"  rank {rank} (host ")]
    assert len(accused) == 1, report
    assert f"phase '{phase}'" in accused[0]
    assert words in accused[0]
    waiting = [other for other in range(ranks) if other != rank]
    assert all(f"  rank {other} waits" in report for other in waiting), report
    stopped = [rank] if scenario["fault"] == "stop" else []
    for other in range(ranks):
        if other in stopped:
            assert told["status"][other] is None
        else:
            assert f"rank{other}.stacks.txt" in told["files"]
            if "environ" in scenario:
                recorded = json.loads(told["recorded"][f"rank{other}.flight_recorder.json"])
                assert recorded["entries"][-1]["profiling_name"].startswith("gloo:")
    # A rank may see the others go before its own thread ends it.
    assert 75 in told["status"]


STOPPED = "its process is stopped"
LACKS = "has not entered collective"

CASES = [
    ({"fault": "stop", "rank": 0, "ranks": 2}, "FaultInjector", STOPPED),
    ({"fault": "left_out", "rank": 1, "ranks": 2}, "waiting", "of process group"),
    ({"fault": "loop", "rank": 1, "ranks": 2, "environ": {"TORCH_FR_BUFFER_SIZE": "100"}}, "forward", LACKS),
]
SLOW_CASES = [
    ({"fault": "worker", "rank": 0, "ranks": 2}, "data", LACKS),
    ({"fault": "loop", "rank": 0, "ranks": 2}, "forward", LACKS),
    ({"fault": "stop", "rank": 1, "ranks": 2}, "FaultInjector", STOPPED),
    *(({"fault": "stop", "rank": rank, "ranks": 3}, "FaultInjector", STOPPED) for rank in range(3)),
    *(
        (
            {"fault": "hang", "rank": rank, "ranks": 3, "injector": {"hook": "on_after_backward"}},
            "FaultInjector",
            LACKS,
        )
        for rank in range(3)
    ),
    ({"fault": "left_out", "rank": 2, "ranks": 3}, "waiting", "of process group"),
    ({"fault": "worker", "rank": 1, "ranks": 3}, "data", LACKS),
    ({"fault": "loop", "rank": 1, "ranks": 2, "strategy": "fsdp2"}, "forward", LACKS),
    ({"fault": "stop", "rank": 0, "ranks": 2, "strategy": "fsdp2"}, "FaultInjector", STOPPED),
    ({"fault": "loop", "rank": 0, "ranks": 2, "strategy": "ddp_arc_topk"}, "forward", LACKS),
]


@pytest.mark.timeout(400)
def test_who_holds_up_a_run_is_named_with_where_it_stands(tmp_path):
    for told, (scenario, phase, words) in zip(_runs(tmp_path, *(case[0] for case in CASES)), CASES, strict=True):
        _check(told, scenario, phase, words)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_so_is_every_rank_in_turn(tmp_path):
    runs = _runs(tmp_path, *(case[0] for case in SLOW_CASES), timeout=550)
    for told, (scenario, phase, words) in zip(runs, SLOW_CASES, strict=True):
        _check(told, scenario, phase, words)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_that_goes_on_is_only_warned_of_once(tmp_path):
    """A hang of some seconds, with ``action="warn"``: said, taken back, and the run comes to its end."""
    wait = {"injector": {"seconds": 5.0}, "health": {"action": "warn"}, "trainer": {"max_steps": 40}}
    (told,) = _runs(tmp_path, {"fault": "hang", **wait})
    assert told["status"] == [0, 0], told["text"]
    assert told["text"].count("RunHealth: no sign of life") == 1
    assert "RunHealth: rank 0 goes on, after" in told["text"]
    assert [rank["step"] for rank in told["ranks"]] == [40, 40]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_slow_ranks_and_weights_that_differ_are_named_on_all_ranks(tmp_path):
    quick = {"trainer": {"max_steps": 90}, "health": {"action": "warn"}}
    compare = {"weights_every_n_steps": 5, "every_n_steps": 5, "slow": None}
    slow, two, three, none = _runs(
        tmp_path,
        {"fault": "slow", "rank": 0, "ranks": 3, "injector": {"slowdown": 0.4}, **quick},
        {"fault": "corrupt", "rank": 1, "ranks": 2, "health": compare, "trainer": {"max_steps": 60}},
        {
            **{"fault": "corrupt", "rank": 0, "ranks": 3, "injector": {"parameter": "net.2.*"}},
            **{"health": compare, "trainer": {"max_steps": 60}},
        },
        {
            "fault": "none",
            "rank": 0,
            "ranks": 2,
            "health": compare | {"slow": 0.1, "gc_every_n_steps": 9},
            "trainer": {"max_steps": 60},
        },
    )
    for rank in slow["ranks"]:
        finding = next(finding for _, finding in rank["findings"] if finding["rank"] == 0)
        assert finding["phase"] == "callbacks"
    assert "is slower than the others by" in slow["text"]
    assert "mostly FaultInjector" in slow["text"]
    for told, rank, name in ((two, 1, "net.0.weight"), (three, 0, "net.2.weight")):
        for each in told["ranks"]:
            ((step, who, parameter),) = each["differences"]
            assert (who, parameter) == (rank, name)
            assert AT < step <= AT + 3 * 5  # compared behind a window, told with the next, read with the one after
        assert f"the weights of rank {rank} differ from those of rank" in told["text"]
    assert [rank["differences"] for rank in none["ranks"]] == [[], []]
    assert [rank["collected"] for rank in none["ranks"]] == [[9, 18, 27, 36, 45, 54]] * 2
    assert [rank["sent"] for rank in none["ranks"]] == [11, 11]  # one all-gather for each window that has ended
