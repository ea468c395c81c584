"""ddp_ft under `kill -9`: three real processes, real gloo, faults at chosen places."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")

from harness import REPOSITORY
from lightning_eff.strategies.fault_tolerant.log import ReplicaLog
from lightning_eff.strategies.fault_tolerant.sharded_loader import ShardedLoader
from tests.strategies.fault_tolerant.replica_checks import REAL, STEPS, assert_same_run, check, killed, run_on_loopback
from tests.strategies.fault_tolerant.replica_main import Model, Noisy, flat
from tests.strategies.fault_tolerant.replica_runs import Fault, Lighthouse, Outcome, Server, run


@pytest.fixture(scope="session")
def undisturbed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The same run without a fault."""
    return check(run_on_loopback(server, tmp_path_factory.mktemp("undisturbed"), steps=STEPS, **REAL))


_PHASES = ["backward", "settle", "forward", "allreduce", "commit", "update", "end", "quorum"]


@pytest.mark.parametrize(
    "phase", [pytest.param(phase, marks=[] if i < 2 else pytest.mark.slow) for i, phase in enumerate(_PHASES)]
)
def test_a_replica_killed_in(phase: str, server: Server, undisturbed: Outcome, tmp_path: Path) -> None:
    outcome = check(run(server, tmp_path, steps=STEPS, faults=(Fault(1, 13, phase),), **REAL))
    assert killed(outcome) == [1]
    assert outcome.lives == {0: 0, 1: 1, 2: 0}, outcome.logs()
    assert_same_run(outcome, undisturbed)
    assert outcome.steps[0][-1]["members"] == [0, 1, 2]


_SEVERAL = {
    "two at once": ((Fault(1, 13, "backward"), Fault(2, 13, "backward")), [1, 2]),
    "two in different phases": ((Fault(0, 13, "forward"), Fault(2, 13, "settle")), [0, 2]),
    "all but one, one after the other": ((Fault(0, 8, "allreduce"), Fault(1, 12, "backward")), [0, 1]),
    "while it heals": ((Fault(1, 8, "backward"), Fault(1, None, "healing", life=1)), [1, 1]),
    "the one that heals it": ((Fault(1, 8, "backward"), Fault(0, 9, "sending")), [0, 1]),
    "twice": ((Fault(1, 8, "backward"), Fault(1, 25, "commit", life=1)), [1, 1]),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "two at once" else pytest.mark.slow) for case in _SEVERAL]
)
def test_several_killed(case: str, server: Server, undisturbed: Outcome, tmp_path: Path) -> None:
    faults, expected = _SEVERAL[case]
    outcome = check(run(server, tmp_path, steps=STEPS, faults=faults, **REAL))
    assert sorted(killed(outcome)) == expected, outcome.logs()
    assert_same_run(outcome, undisturbed)


_GLITCHES = {
    "the last bucket": (Fault(2, 13, "glitch in allreduce"),),
    "settling": (Fault(2, 13, "glitch in settle"),),
    "an operation between steps": (Fault(2, 20, "glitch in agree"),),
    "the meeting of a repeated step": (Fault(1, 13, "backward"), Fault(2, None, "glitch in retry")),
    "the meeting before a step": (Fault(1, 13, "backward"), Fault(2, None, "glitch in start")),
    "both meetings": (Fault(1, 13, "backward"), Fault(2, None, "glitch in start"), Fault(0, None, "glitch in retry")),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "the last bucket" else pytest.mark.slow) for case in _GLITCHES]
)
def test_one_replica_misses_what_the_others_got(
    case: str, server: Server, tmp_path: Path, undisturbed: Outcome
) -> None:
    """The two generals: an operation that ends well for some and not for others."""
    faults = _GLITCHES[case]
    validate = {"validate_every": 1} if case == "an operation between steps" else {}
    outcome = check(run(server, tmp_path, steps=STEPS, faults=faults, **validate, **REAL))
    assert "glitch" in outcome.logs()
    assert all(status in (0, -signal.SIGKILL) for _, _, status in outcome.exits), outcome.logs()
    assert_same_run(outcome, undisturbed)


def test_the_writer_killed_while_it_saves(server: Server, undisturbed: Outcome, tmp_path: Path) -> None:
    """Another writes that checkpoint and all that follow, and the loggers' files are one run."""
    outcome = check(
        run(
            server,
            tmp_path,
            steps=STEPS,
            faults=(Fault(0, 15, "saving"),),
            checkpoint_every=5,
            loggers=["csv", "tensorboard"],
            **REAL,
        )
    )
    assert killed(outcome) == [0]
    assert_same_run(outcome, undisturbed)
    folder = tmp_path / "checkpoints"
    names = {path.name for path in folder.glob("*.ckpt")}
    assert {name.rpartition("step=")[2] for name in names} >= {f"{step}.ckpt" for step in range(5, STEPS + 1, 5)}
    for name in names:
        assert "state_dict" in torch.load(folder / name, weights_only=True)
    with next(tmp_path.glob("csv/**/metrics.csv")).open() as file:
        rows = csv.DictReader(file)
        logged = [int(row["ft/committed"].split(".")[0]) for row in rows if row.get("ft/committed")]
        tags = {name for name in rows.fieldnames or () if name.startswith("ft/")}
    drawn = {tag for _, chart in ReplicaLog(None, shrinks=False).tensorboard_charts(None).values() for tag in chart}
    assert drawn == tags - {"ft/committed"}
    assert logged == list(range(1, STEPS + 1))
    assert len(list(tmp_path.glob("csv/**/metrics.csv"))) == 1
    assert len({path.parent for path in tmp_path.glob("tensorboard/**/events*")}) == 1


@pytest.mark.slow
def test_the_loss_of_all_and_a_resume(server: Server, undisturbed: Outcome, tmp_path: Path) -> None:
    faults = tuple(Fault(replica, 18, "backward") for replica in range(3))
    with pytest.raises(AssertionError):
        check(run(server, tmp_path, steps=STEPS, faults=faults, restart=False, checkpoint_every=5, **REAL))
    last = tmp_path / "checkpoints" / "last.ckpt"
    again = tmp_path / "again"
    again.mkdir()
    outcome = run(server, again, steps=STEPS, resume=str(last), **REAL)
    losses, expected = outcome.losses(), undisturbed.losses()
    assert sorted(losses) == list(range(16, STEPS + 1)), outcome.logs()
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step], rel=1e-5, abs=1e-5)
    state = torch.load(last, weights_only=True)
    assert not [name for name in state["callbacks"] if "ReplicaLog" in name]  # a resume would warn that it is missing


@pytest.mark.slow
def test_shrink_leaves_the_shard_out(server: Server, tmp_path: Path) -> None:
    outcome = check(
        run(
            server, tmp_path, steps=STEPS, faults=(Fault(1, 13, "backward"),), strategy={"on_failure": "shrink"}, **REAL
        )
    )
    assert killed(outcome) == [1]


# Each in a step that the others have to repeat: one that comes back before the next step leaves no trace.
_MECEFO = {
    "one": (Fault(1, 13, "backward"),),
    "one after the other": (Fault(1, 13, "forward"), Fault(0, 25, "allreduce")),
    "as it comes back": (Fault(1, 13, "backward"), Fault(1, None, "healing", life=1)),
    "one misses what the others got": (Fault(1, 13, "forward"), Fault(2, 13, "glitch in allreduce")),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", _MECEFO)
def test_mecefo_approximates_while_somebody_is_dead(case: str, server: Server, tmp_path: Path) -> None:
    """Equal weights throughout, the exact run until the death, nearly that run after it."""
    runs = {}
    for name, faults in (("exact", ()), ("approximate", _MECEFO[case])):
        folder = tmp_path / name
        folder.mkdir()
        strategy = {"on_failure": "mecefo", "mecefo_rank": 4, "mecefo_every_n_steps": 5}
        runs[name] = check(run(server, folder, steps=STEPS, faults=faults, language=True, strategy=strategy, **REAL))
    exact, approximate = runs["exact"].losses(), runs["approximate"].losses()
    assert [approximate[step] for step in range(1, 14)] == pytest.approx([exact[step] for step in range(1, 14)])
    differences = [abs(approximate[step] - exact[step]) for step in range(15, STEPS + 1)]
    assert 1e-6 < max(differences) < 0.1


@pytest.mark.slow
def test_killed_in_validation(server: Server, tmp_path: Path) -> None:
    outcome = check(run(server, tmp_path, steps=STEPS, faults=(Fault(1, 20, "validation"),), validate_every=1, **REAL))
    assert killed(outcome) == [1]
    assert len({(f["metrics"]["val_loss"], f["metrics"]["val_metric"]) for f in outcome.finals.values()}) == 1
    for final in outcome.finals.values():
        assert final["metrics"]["val_metric"] == pytest.approx(final["metrics"]["val_loss"])


@pytest.mark.slow
def test_a_replica_that_is_stopped_and_goes_on(server: Server, undisturbed: Outcome, tmp_path: Path) -> None:
    """It is left behind, starts anew and heals."""
    stopped: dict[int, float] = {}

    def go_on_later(lighthouse: Lighthouse, pids: dict[int, int], folder: Path) -> None:
        log = folder / "replica-1-0.log"
        if 1 in pids and pids[1] not in stopped and log.exists() and "fault:" in log.read_text():
            stopped[pids[1]] = time.monotonic()
        for pid, since in stopped.items():
            if pid in pids.values() and time.monotonic() - since > 8.0:
                with contextlib.suppress(ProcessLookupError):  # it may have ended meanwhile
                    os.kill(pid, signal.SIGCONT)

    outcome = check(
        run(
            server,
            tmp_path,
            steps=300,
            faults=(Fault(1, 13, "backward", signal=signal.SIGSTOP),),
            strategy={"collective_timeout": 5.0},
            during=go_on_later,
            **{**REAL, "sleep": 0.02},
        ),
        steps=300,
    )
    assert outcome.exits[0][:2] == (1, 0), outcome.logs()
    assert outcome.lives[1] == 1


def test_one_that_comes_when_the_run_is_over_ends(server: Server, tmp_path: Path) -> None:
    """It would wait for the others, and then begin the run anew."""
    finished = tmp_path / "finished"
    finished.touch()
    outcome = run(
        server,
        tmp_path,
        replicas=1,
        strategy={"max_replicas": 3},
        variables={"LIGHTNING_EFF_FINISHED": str(finished)},
        limit=30.0,
    )
    assert outcome.exits == [(0, 0, 0)]
    assert outcome.steps == {0: []}


@pytest.mark.slow
def test_the_lighthouse_killed(server: Server, undisturbed: Outcome, tmp_path: Path) -> None:
    """It is started again on its port, as the launcher does; nobody dies of it."""
    done: list[float] = []

    def restart(lighthouse: Lighthouse, pids: dict[int, int], folder: Path) -> None:
        steps = folder / "steps-0-0.jsonl"
        if not done and steps.exists() and len(steps.read_text().splitlines()) >= 10:
            lighthouse.kill()
            time.sleep(2.0)
            lighthouse.start()
            done.append(time.monotonic())

    outcome = check(run(server, tmp_path, steps=STEPS, during=restart, **REAL))
    assert done
    assert outcome.exits == [(replica, 0, 0) for replica, _, _ in outcome.exits]
    assert_same_run(outcome, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"precision": "bf16-mixed"}, {"batch_norm": True}, {"gather": True}])
def test_also_with(settings: dict[str, Any], server: Server, tmp_path: Path) -> None:
    outcome = check(run(server, tmp_path, steps=STEPS, faults=(Fault(1, 13, "allreduce"),), **settings, **REAL))
    assert killed(outcome) == [1]


@pytest.mark.parametrize(
    ("kind", "processes"),
    [("automatic", 1), ("manual", 1), pytest.param("automatic", 2, marks=pytest.mark.slow)],
)
def test_buffers_that_only_some_replicas_change(kind: str, processes: int, server: Server, tmp_path: Path) -> None:
    """They are those of the first one, and a step that is repeated counts once, as does a dead replica's batch."""
    settings = {"kind": kind, "of_the_batch": True, "replicas": 2, "processes": processes, "patience": 0.0}
    outcome = run(server, tmp_path, steps=8, faults=(Fault(1, 4, "allreduce"),), restart=False, **settings)
    check(outcome, steps=8, all_end=False, manual=kind == "manual")
    assert killed(outcome) == [1]
    first: Any = SimpleNamespace(replica=0, life=0, process=0)
    model = Model({"of_the_batch": True}, first)
    loader = ShardedLoader(DataLoader(Noisy(240), batch_size=4, shuffle=True), 2, seed=1, group_size=processes)
    loader.own([0])
    for step in range(8):
        model.follow(loader.batch(0, step)[0])
    assert 0 < model.large < 8
    assert outcome.finals[0]["buffers"] == pytest.approx(flat(list(model.buffers())), rel=1e-6)


def test_a_gather_with_gradients_is_refused(server: Server, tmp_path: Path) -> None:
    outcome = run(server, tmp_path, steps=2, replicas=1, restart=False, patience=0.0, gather="with gradients")
    assert [status for _, _, status in outcome.exits] == [1]
    assert re.search(r"sync_grads=True\) is not supported.*sync_grads=False", outcome.logs()), outcome.logs()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_link_that_is_cut_and_mended(network: Any, tmp_path: Path) -> None:
    """Three machines, each with an address of its own. The one behind the cut is left behind, starts anew and heals."""
    net = network(3)
    lighthouse = Lighthouse.command_for(net.address(0), 29510, min_replicas=1, heartbeat_timeout=3.0)
    net.popen(0, lighthouse, {"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.DEVNULL)
    lives = [0, 0, 0]

    def start(replica: int) -> subprocess.Popen[bytes]:
        settings = {
            "replica": replica,
            "process": 0,
            "processes": 1,
            "name": str(replica),
            "life": lives[replica],
            "faults": [],
            "folder": str(tmp_path),
            "steps": STEPS,
            "patience": 1.5,  # a new process takes some seconds to start
            "strategy": {"collective_timeout": 6.0, "connect_timeout": 15.0, "quorum_timeout": 100.0},
            **REAL,
        }
        file = tmp_path / f"settings-{replica}.json"
        file.write_text(json.dumps(settings))
        environment = {
            "WORLD_SIZE": "1",
            "RANK": "0",
            "GROUP_RANK": "0",
            "ROLE_RANK": "0",
            "ROLE_WORLD_SIZE": "1",
            "TORCHFT_LIGHTHOUSE": f"http://{net.address(0)}:29510",
            "FT_HOST": net.address(replica),
            "REPLICA_GROUP_ID": str(replica),
            "NUM_REPLICA_GROUPS": "3",
            "TORCHELASTIC_RESTART_COUNT": str(lives[replica]),
            "PYTHONPATH": str(REPOSITORY),
            "RUST_LOG": "error",
        }
        with (tmp_path / f"replica-{replica}-{lives[replica]}.log").open("wb") as log:
            command = [sys.executable, "-m", "tests.strategies.fault_tolerant.replica_main", file]
            return net.popen(replica, command, environment, stdout=log, stderr=log, cwd=REPOSITORY)

    def made(replica: int) -> int:
        return sum(len(path.read_text().splitlines()) for path in tmp_path.glob(f"steps-{replica}-*.jsonl"))

    running = [start(replica) for replica in range(3)]
    deadline = time.monotonic() + 260
    cut_at = mended_at = None
    while any(process.poll() is None for process in running):
        assert time.monotonic() < deadline, "\n".join(p.read_text()[-2000:] for p in tmp_path.glob("*.log"))
        if cut_at is None and made(0) >= 13:
            net.cut(1)
            cut_at = made(0)
        if cut_at is not None and mended_at is None and made(0) >= cut_at + 4:
            net.mend(1)
            mended_at = made(0)
        if running[1].poll() not in (None, 0) and mended_at is not None:
            lives[1] += 1
            assert lives[1] < 4
            running[1] = start(1)
        time.sleep(0.05)
    assert [process.returncode for process in running] == [0, 0, 0]
    finals = [json.loads((tmp_path / f"final-{replica}.json").read_text()) for replica in range(3)]
    assert {final["step"] for final in finals} == {STEPS}
    assert len({(final["weights"], final["optimizer"]) for final in finals}) == 1
    assert mended_at is not None
