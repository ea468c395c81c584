"""The launcher with real processes and real signals: who is restarted, who ends, and that nothing is left."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import REPOSITORY
from harness.processes import eventually, listeners
from lightning_eff.arguments import check_address
from lightning_eff.cli import main
from lightning_eff.cli.launch.agent import Budget
from lightning_eff.cli.launch.run import _threads, _visible_devices
from lightning_eff.cli.lighthouse import is_loopback

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchft has wheels for Linux only")

ACTOR = """
import json, os, signal, subprocess, sys, time
folder = sys.argv[1]
me = os.environ["REPLICA_GROUP_ID"] + "." + os.environ["TORCHELASTIC_RESTART_COUNT"]
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if "raises" in sys.argv:
    raise ValueError("a bug")
if "progress" in sys.argv:
    with open(os.environ["LIGHTNING_EFF_PROGRESS"], "w") as file:
        json.dump({"step": 57, "furthest": 57, "left": "leaves" in sys.argv and me == "0.0"}, file)
if "spawns" in sys.argv:  # in a session of its own
    subprocess.Popen(["sleep", "300"], start_new_session=True)
print(f"hello from {me}")
print("1 %\\r2 %\\r3 %", file=sys.stderr)
note = folder + "/" + me + ".json"
with open(note + ".part", "w") as file:
    json.dump({"pid": os.getpid(), "agent": os.getppid(), "environ": dict(os.environ), "argv": sys.argv}, file)
os.rename(note + ".part", note)
try:
    while not os.path.exists(folder + "/" + me + ".exit"):
        time.sleep(0.02)
except KeyboardInterrupt:
    print("interrupted")
    sys.exit(1)
sys.exit(int(open(folder + "/" + me + ".exit").read() or 0))
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def read(path: str) -> bytes:
    """A file of /proc, or of a process that has ended."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


class Launch:
    """`lightning-eff launch` over a script that notes who it is and ends when it is told."""

    def __init__(self, folder: Path, *options: str, script: tuple[str, ...] = ()) -> None:
        self.folder = folder
        (folder / "actor.py").write_text(ACTOR)
        self.log = (folder / "log").open("w+")
        self.began = time.time()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lightning_eff", "launch", *options, str(folder / "actor.py"), str(folder), *script],
            cwd=REPOSITORY,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        )

    def actor(self, name: str) -> dict:
        """What replica ``R`` in its ``N``-th restart has noted, as ``"R.N"``."""
        path = self.folder / f"{name}.json"
        eventually(lambda: path.exists() or self.process.poll() is not None, what=f"no {name}: {self.text}")
        assert path.exists(), self.text
        return json.loads(path.read_text())

    def tell(self, name: str, status: int = 0) -> None:
        (self.folder / f"{name}.exit").write_text(str(status))

    @property
    def text(self) -> str:
        return (self.folder / "log").read_text()

    def wait(self, seconds: float = 30.0) -> int:
        return self.process.wait(seconds)

    def mark(self) -> str:
        notes = list(self.folder.glob("*.json"))
        return json.loads(notes[0].read_text())["environ"]["LIGHTNING_EFF_RUN"]

    def others(self) -> list[int]:
        """Every process of the run but the launcher."""
        mark = self.mark().encode()
        running = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        return [pid for pid in running if mark in read(f"/proc/{pid}/environ") and alive(pid)]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in self.others() if list(self.folder.glob("*.json")) else []:
            os.kill(pid, signal.SIGKILL)
        self.log.close()


@pytest.fixture
def launch(tmp_path) -> Iterator[Callable[..., Launch]]:
    started: list[Launch] = []

    def start(*options: str, **arguments) -> Launch:
        started.append(Launch(tmp_path, *options, **arguments))
        return started[-1]

    yield start
    for one in started:
        one.end()


def connects(address: str) -> bool:
    try:
        socket.create_connection(check_address("lighthouse", address), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.needs("torchft")
def test_whoever_is_killed_comes_back(launch):
    run = launch("--replicas", "2", "--max-restarts", "3", script=("an argument",))
    first, second = run.actor("0.0"), run.actor("1.0")
    environment = first["environ"]
    assert first["argv"][1:] == [str(run.folder), "an argument"]
    assert [actor["environ"]["REPLICA_GROUP_ID"] for actor in (first, second)] == ["0", "1"]
    assert environment["NUM_REPLICA_GROUPS"] == "2"
    assert environment["FT_HOST"] == "127.0.0.1"
    assert (environment["WORLD_SIZE"], environment["RANK"]) == ("1", "0")
    assert int(environment["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    lighthouse = environment["TORCHFT_LIGHTHOUSE"]
    eventually(lambda: connects(lighthouse))

    # Nobody listens where another machine could reach it.
    assert listeners([*run.others(), run.process.pid]) == {"0100007F"}

    # A worker: by its agent.
    os.kill(second["pid"], signal.SIGKILL)
    returned = run.actor("1.1")
    assert returned["agent"] == second["agent"]
    assert returned["environ"]["TORCHFT_LIGHTHOUSE"] == lighthouse
    assert "restart 1 of 3" in run.text

    # The lighthouse: on its port.
    (pid,) = [pid for pid in run.others() if b"lighthouse" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
    os.kill(pid, signal.SIGKILL)
    # Said first: the killed process counts as ended while its last threads still hold the port open.
    eventually(lambda: "the lighthouse has ended, it is started again" in run.text)
    eventually(lambda: connects(lighthouse))

    # An agent: its worker goes with it, both are started again.
    (run.folder / "0.0.json").unlink()
    os.kill(first["agent"], signal.SIGKILL)
    eventually(lambda: not alive(first["pid"]), 5)
    again = run.actor("0.0")
    assert again["pid"] != first["pid"]

    run.tell("0.0")
    run.tell("1.1")
    assert run.wait() == 0
    assert run.others() == []
    assert "[replica 0] hello from 0.0" in run.text
    assert "[replica 1] hello from 1.1" in run.text
    assert "[replica 1] 3 %" in run.text
    assert "1 %\r" not in run.text
    assert re.search(r"^\[lighthouse\] lighthouse on 127", run.text, re.MULTILINE)
    assert all(line.startswith("[") for line in run.text.splitlines())


@pytest.mark.slow
def test_after_the_first_end_nothing_begins_again(launch):
    run = launch("--replicas", "3", "--grace", "8", script=("deaf",))
    actors = [run.actor(f"{replica}.0") for replica in range(3)]
    run.tell("0.0")
    eventually(lambda: Path(actors[1]["environ"]["LIGHTNING_EFF_FINISHED"]).exists())
    os.kill(actors[1]["pid"], signal.SIGKILL)
    assert run.wait(40) == 0
    assert "[replica 1] the run is over: not started again" in run.text
    assert "the run is over, but replica 2 still runs after 8 s" in run.text
    assert not any(alive(actor["pid"]) for actor in actors)
    assert run.others() == []


@pytest.mark.needs("torchft")
def test_ctrl_c_ends_everything(launch):
    run = launch("--replicas", "2", script=("spawns",))
    actors = [run.actor(f"{replica}.0") for replica in range(2)]
    assert sum(b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in run.others()) == 2
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 128 + signal.SIGINT
    assert run.text.count("interrupted") == 2
    assert not any(alive(actor["pid"]) for actor in actors)
    assert run.others() == []
    assert not Path(actors[0]["environ"]["LIGHTNING_EFF_FINISHED"]).parent.exists()


@pytest.mark.slow
def test_a_second_signal_does_not_wait(launch):
    run = launch("--replicas", "1", "--grace", "600", script=("deaf",))
    run.actor("0.0")
    run.process.send_signal(signal.SIGTERM)
    eventually(lambda: "SIGTERM: ending all replicas" in run.text)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(10) == 128 + signal.SIGTERM
    assert run.others() == []


@pytest.mark.needs("torchft")
def test_kill_9_of_the_launcher_leaves_no_orphan(launch):
    run = launch("--replicas", "2")
    for replica in range(2):
        run.actor(f"{replica}.0")
    assert len(run.others()) == 5  # two agents, two workers, the lighthouse
    run.process.kill()
    run.process.wait()
    eventually(lambda: not run.others(), 5, "orphans")


@pytest.mark.needs("torchft")
def test_a_replica_out_of_restarts_fails_and_the_others_go_on(launch):
    run = launch("--replicas", "2", "--max-exceptions", "1")
    for name in ("0.0", "0.1"):
        run.actor(name)
        run.tell(name, 3)
    run.actor("1.0")
    eventually(lambda: "replica 0 ended with exit status 1 and is not started again" in run.text)
    assert "[replica 0] ended with exit status 3; no restart is left of 1 after exceptions" in run.text
    assert run.process.poll() is None
    run.tell("1.0")
    assert run.wait() == 0


@pytest.mark.slow
def test_the_run_fails_when_too_few_are_left(launch):
    run = launch("--replicas", "2", "--max-exceptions", "0", "--min-replicas", "2")
    run.actor("0.0")
    run.tell("0.0", 1)
    assert run.wait() == 1
    assert "1 replicas are left here: the run has failed" in run.text
    assert [line for line in run.text.splitlines() if "[launch]" in line][-1] == "[launch] replica 0: exit status 1"


@pytest.mark.needs("torchft")
def test_a_bug_in_the_script_is_not_tried_for_long(launch):
    run = launch("--replicas", "2", "--max-exceptions", "1", script=("raises",))
    assert run.wait(60) == 1
    # Each replica twice.
    assert run.text.count("Traceback (most recent call last)") == 4
    assert "ended with exit status 1: restart 1 of 1 after exceptions" in run.text
    told = [line for line in run.text.splitlines() if line.startswith("[launch]")]
    assert told[-2] == "[launch] 0 replicas are left here: the run has failed"
    assert re.fullmatch(r"\[launch\] replica [01]: ValueError: a bug", told[-1])


@pytest.mark.needs("torchft")
def test_an_early_end_with_status_0_is_said(launch):
    run = launch("--replicas", "1", script=("progress",))
    run.actor("0.0")
    run.tell("0.0")
    assert run.wait() == 0
    assert "[launch] replica 0 ended with exit status 0 after 57 steps, before the training was over" in run.text


@pytest.mark.needs("torchft")
def test_a_process_that_is_stopped_is_named(launch):
    run = launch("--replicas", "2")
    pid = run.actor("1.0")["pid"]
    os.kill(pid, signal.SIGSTOP)
    named = f"[replica 1] process {pid} is stopped (SIGSTOP or Ctrl-Z): the other replicas go on without it"
    eventually(lambda: named in run.text, what=run.text)
    os.kill(pid, signal.SIGCONT)
    eventually(lambda: f"[replica 1] process {pid} is no longer stopped" in run.text, what=run.text)
    run.actor("0.0")
    run.tell("0.0")
    run.tell("1.0")
    assert run.wait() == 0


@pytest.mark.needs("torchft")
def test_who_leaves_is_not_started_again_and_the_others_go_on(launch):
    """Whatever its exit status: 143 by default with Preemption."""
    run = launch("--replicas", "2", script=("progress", "leaves"))
    run.actor("0.0")
    other = run.actor("1.0")
    run.tell("0.0", 143)
    eventually(lambda: "[launch] replica 0 has left the run after 57 steps, as it was told to" in run.text)
    assert not Path(other["environ"]["LIGHTNING_EFF_FINISHED"]).exists()
    assert not (run.folder / "0.1.json").exists()
    run.tell("1.0")
    assert run.wait() == 0
    assert "restart 1" not in run.text


@pytest.mark.parametrize(
    ("ends", "allowed"),
    [
        # Killed, or lost the others: max_restarts times.
        ([(False, 5)] * 3, [True, True, False]),
        # At the same step, or before there is a step.
        ([(True, 5), (True, 5), (True, 5)], [True, True, False]),
        ([(True, -1), (True, -1), (True, -1)], [True, True, False]),
        # From the beginning to the same step again.
        ([(True, 5), (True, -1), (True, 4)], [True, True, False]),
        # Each a step further.
        ([(True, 5), (True, 6), (True, 6), (True, 9)], [True, True, True, True]),
        # Each of the two has a budget of its own.
        ([(True, 5), (False, 5), (True, 5), (False, 5), (False, 5)], [True, True, True, True, False]),
    ],
)
def test_budgets(ends, allowed):
    budget = Budget(max_restarts=2, max_exceptions=2)
    assert [budget.allows(exception, step) for exception, step in ends] == allowed


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replicas", "0"], "--replicas must be at least 1, got 0"),
        (["--replicas", "2", "--min-replicas", "3"], "--min-replicas 3 is more than there are: 2"),
        (["--replicas", "2", "--max-exceptions", "-1"], "--max-exceptions must be at least 0"),
        (["--replicas", "2", "--max-restarts", "-1"], "--max-restarts must be at least 0"),
        (["--replicas", "2", "--heartbeat-timeout", "0"], "--heartbeat-timeout must be positive"),
        (["--replicas", "2", "--lighthouse", "nowhere"], "it must be HOST:PORT"),
        (["--replicas", "2", "--lighthouse", "10.0.0.1:29510"], "is reached from this machine only"),
        (["--replicas", "2", "--total-replicas", "4"], "need a lighthouse that they reach"),
        (["--replicas", "2", "--first-replica", "3", "--total-replicas", "4"], "is less than"),
        (["--replicas", "2", "--nproc-per-node", "0"], "--nproc-per-node must be at least 1, got 0"),
        (["--replicas", "2", "--grace", "-1"], "--grace must not be negative"),
    ],
)
def test_wrong_options(options, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(["launch", *options, __file__])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_no_such_script(capsys):
    with pytest.raises(SystemExit):
        main(["launch", "--replicas", "1", "nowhere.py"])
    assert "there is no script 'nowhere.py'" in capsys.readouterr().err


def test_without_torchft(monkeypatch, capsys):
    monkeypatch.setattr("lightning_eff.cli.launch.run.find_spec", lambda name: None)
    assert main(["launch", "--replicas", "1", __file__]) == 1
    assert "pip install 'lightning-eff[ft]' (wheels for Linux on x86-64" in capsys.readouterr().err


@pytest.mark.needs("torchft")
def test_a_lighthouse_that_cannot_be_reached(monkeypatch, capsys):
    monkeypatch.setattr("lightning_eff.cli.launch.run._LIGHTHOUSE_WAIT", 0.2)
    with socket.socket() as taken:  # bound, and listening to nobody
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert main(["launch", "--replicas", "1", "--lighthouse", f"127.0.0.1:{port}", __file__]) == 1
    assert re.search(rf"no lighthouse on 127.0.0.1, port {port}, in \d s \(.*refused", capsys.readouterr().err)


# --- lighthouse ------------------------------------------------------------------------------------------------------


@pytest.mark.needs("torchft")
def test_a_lighthouse_by_itself():
    command = [sys.executable, "-m", "lightning_eff", "lighthouse", "--bind"]
    with subprocess.Popen([*command, "127.0.0.1:0"], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = re.search(r"127\.0\.0\.1:\d+", process.stdout.readline()).group()
            assert not address.endswith(":0")
            assert connects(address)
            assert listeners([process.pid]) == {"0100007F"}
            second = subprocess.run([*command, address], cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
            assert second.returncode == 1
            assert f"cannot listen on {address}" in second.stderr
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 128 + signal.SIGTERM
        finally:
            process.kill()


def test_addresses():
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "10.0.0.1", "node7")] == [
        *[True] * 3,
        *[False] * 4,
    ]


def test_threads_and_gpus(monkeypatch):
    from argparse import Namespace

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    assert _threads(Namespace(replicas=2, nproc_per_node=3)) == 2
    assert _threads(Namespace(replicas=20, nproc_per_node=1)) == 1
    assert _visible_devices(2, 1) == []
    monkeypatch.setattr(Path, "is_dir", lambda path: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7,8")
    assert _visible_devices(2, 2) == ["3,5", "7,8"]
    assert _visible_devices(4, 1) == ["3", "5", "7", "8"]
    assert _visible_devices(5, 1) == []
