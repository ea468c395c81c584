"""ddp_ft where replicas sleep through the end of a run, leave on purpose, or are not of the run: real processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness import REPOSITORY, json_lines
from tests.strategies.fault_tolerant.replica_checks import REAL, check
from tests.strategies.fault_tolerant.replica_runs import Fault, Lighthouse, Outcome, Server, run

pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")

STEPS = 30


def sleeps_through_the_end(server: Server, folder: Path, phase: str, **settings: Any) -> Outcome:
    """Replica 0, which writes, is stopped at step 15 and goes on when the others have ended."""

    def wake(lighthouse: Lighthouse, pids: dict[int, int], folder: Path) -> None:
        if 0 in pids and 1 not in pids and 2 not in pids and (folder / "final-1.json").exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[0], signal.SIGCONT)

    return run(
        server,
        folder,
        steps=STEPS,
        faults=(Fault(0, 15, phase, signal=signal.SIGSTOP),),
        strategy={"collective_timeout": 5.0},
        checkpoint_every=5,
        during=wake,
        **{**REAL, **settings},
    )


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["backward", "saving"])
def test_who_sleeps_through_the_end_does_not_overwrite_the_run(phase: str, server: Server, tmp_path: Path) -> None:
    """Without the launcher's file that says that the run is over."""
    outcome = check(sleeps_through_the_end(server, tmp_path, phase), STEPS, all_end=False)
    assert sorted(outcome.exits) == [(0, 0, 1), (1, 0, 0), (2, 0, 0)], outcome.logs()
    assert "LeftBehindError" in outcome.logs()
    folder = tmp_path / "checkpoints"
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == STEPS
    steps = {path: torch.load(path, weights_only=True)["global_step"] for path in folder.glob("*step=*.ckpt")}
    assert {int(path.stem.rpartition("=")[2]) for path in steps} == set(range(5, STEPS + 1, 5))
    assert all(int(path.stem.rpartition("=")[2]) == step for path, step in steps.items())
    assert list(folder.glob("*.part")) == []


@pytest.mark.slow
def test_who_leaves_costs_no_timeout(server: Server, tmp_path: Path) -> None:
    """A death costs the others 6 s here."""
    outcome = run(
        server, tmp_path, steps=120, heartbeat_timeout=6.0, leaves=1, leaves_after=10, **{**REAL, "sleep": 0.05}
    )
    assert outcome.exits[0] == (1, 0, 0), outcome.logs()
    assert sorted(outcome.exits) == [(0, 0, 0), (1, 0, 0), (2, 0, 0)], outcome.logs()
    lines = outcome.steps[0]
    assert [line["step"] for line in lines] == list(range(1, 121))
    gone = next(i for i, line in enumerate(lines) if line["members"] == [0, 2])
    assert lines[gone - 1]["members"] == [0, 1, 2]
    # The Diary waits for half a second after each step that somebody is missing in.
    gaps = [after["time"] - before["time"] for before, after in pairwise(lines[5 : gone + 1])]
    assert max(gaps) < 4.0
    assert outcome.steps[1][-1]["step"] == lines[gone - 1]["step"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("stranger", "words"),
    [
        ({"replica": 1}, "a replica with its index 1 is in the run already"),
        ({"replica": 2, "run_id": "another"}, "is of run 'another', and has met replicas of run ''"),
    ],
)
def test_a_stranger_ends_alone(stranger: dict[str, Any], words: str, server: Server, tmp_path: Path) -> None:
    started: list[subprocess.Popen[bytes]] = []
    log, over = tmp_path / "stranger.log", tmp_path / "over"

    def intrude(lighthouse: Lighthouse, pids: dict[int, int], folder: Path) -> None:
        if started and started[0].poll() is not None:
            over.touch()
        steps = folder / "steps-0-0.jsonl"
        if started or not steps.exists() or len(steps.read_text().splitlines()) < 5:
            return
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        settings = {
            **{"process": 0, "processes": 1, "name": "stranger", "life": 0, "faults": [], "steps": STEPS},
            **{"replica": stranger["replica"], "folder": str(elsewhere), "strategy": {"connect_timeout": 20.0}, **REAL},
        }
        file = elsewhere / "settings.json"
        file.write_text(json.dumps(settings))
        environment = {
            **os.environ,
            **{"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "RUST_LOG": "error"},
            "TORCHFT_LIGHTHOUSE": lighthouse.address,
            "REPLICA_GROUP_ID": str(stranger["replica"]),
            "NUM_REPLICA_GROUPS": "3",
            **({"LIGHTNING_EFF_RUN_ID": stranger["run_id"]} if "run_id" in stranger else {}),
        }
        command = [sys.executable, "-m", "tests.strategies.fault_tolerant.replica_main", str(file)]
        with log.open("wb") as output:
            started.append(subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=output, stderr=output))

    outcome = run(
        server,
        tmp_path,
        replicas=2,
        steps=200,
        strategy={"max_replicas": 3, "start_grace": 1.0},
        during=intrude,
        limit=400.0,
        patience=0.0,
        until=str(over),  # slow as long as the stranger has not ended, which takes seconds to come up
        **{**REAL, "sleep": 0.5},
    )
    assert over.exists(), log.read_text()
    assert started[0].wait() == 1
    assert words in log.read_text()
    assert sorted(outcome.exits) == [(0, 0, 0), (1, 0, 0)], outcome.logs()
    assert [line["step"] for line in outcome.steps[0]] == list(range(1, 201))
    assert outcome.steps[0][-1]["members"] == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["end", "backward"])
def test_a_loss_is_told_of_who_was_lost(phase: str, server: Server, tmp_path: Path) -> None:
    """Replica 0, which writes, is stopped between two steps or within one; awake again, it tells of no loss itself."""
    stopped: list[int] = []

    def wake(lighthouse: Lighthouse, pids: dict[int, int], folder: Path) -> None:
        made = json_lines.read(folder / "steps-1-0.jsonl")
        if 0 in pids and not stopped and made and made[-1]["members"] == [1, 2]:
            stopped.append(pids[0])
        if stopped and made[-1]["step"] >= 25:
            with contextlib.suppress(ProcessLookupError):
                os.kill(stopped[0], signal.SIGCONT)

    outcome = check(
        run(
            server,
            tmp_path,
            steps=60,
            faults=(Fault(0, 15, phase, signal=signal.SIGSTOP),),
            strategy={"collective_timeout": 5.0},
            loggers=["tensorboard"],
            during=wake,
            **{**REAL, "sleep": 0.05},
        ),
        60,
    )
    assert stopped, outcome.logs()
    events = EventAccumulator(str(next(tmp_path.glob("tensorboard/**/events*")).parent), {"tensors": 0})
    events.Reload()
    told = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("ft/events/text_summary")]
    lost = [index for text in told for index in re.findall(r"replica (\d) is lost", text)]
    back = [index for text in told for index in re.findall(r"replica (\d) has come in", text)]
    assert lost == ["0"], told
    assert back == ["0"], told
