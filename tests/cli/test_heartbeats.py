"""A supervisor's heartbeats: who lives is kept, who has died or was stopped is forgotten in less than a second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")

from lightning_eff._launched import Progress, furthest_step, note_progress
from lightning_eff.cli.launch.heartbeats import Heartbeats, lives
from lightning_eff.cli.lighthouse import load_torchft

TIMEOUT = 0.5  # of the lighthouse, as `launch` has it


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUST_LOG", "error")  # else it is set when torchft is loaded


@pytest.fixture
def lighthouse(_quiet: None) -> Iterator[str]:
    server = load_torchft().LighthouseServer("127.0.0.1:0", 1, 600_000, 20, round(TIMEOUT * 1000))
    yield f"http://127.0.0.1:{server.address().rpartition(':')[2]}"
    server.shutdown()


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_death_is_known_at_once(
    number: int, lighthouse: str, process: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """The process has no heartbeats of its own: those of its supervisor alone keep it in, for three timeouts."""
    file = tmp_path / "0"
    Progress(name="a:1", pid=process.pid, step=3).write(file)
    heartbeats = Heartbeats(lighthouse, [file])
    heartbeats.start()
    module: Any = load_torchft()
    client = module.LighthouseClient(lighthouse, timedelta(seconds=5))
    client.heartbeat("a:1", timedelta(seconds=5))
    found: list[float] = []

    def ask() -> None:
        quorum = client.quorum("b:1", timedelta(seconds=30), "there", "there", 3, 1, False)
        assert [member.replica_id for member in quorum.participants] == ["b:1"]
        found.append(time.monotonic())

    own = module.LighthouseClient(lighthouse, timedelta(seconds=5))

    def beat(seconds: float) -> None:
        """Of b, as its manager does."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not found:
            own.heartbeat("b:1", timedelta(seconds=5))
            time.sleep(0.05)

    asking = threading.Thread(target=ask)
    asking.start()
    beat(3 * TIMEOUT)
    assert found == [], "b had a quorum without a, which lives"
    os.kill(process.pid, number)
    killed = time.monotonic()
    beat(20.0)
    asking.join(10.0)
    heartbeats.end()
    assert 0.0 < found[0] - killed < TIMEOUT + 2.0  # the machine may be busy
    process.send_signal(signal.SIGCONT)


def test_who_makes_no_step_has_to_beat_itself(process: subprocess.Popen[bytes], tmp_path: Path) -> None:
    calls: list[str] = []

    class Client:
        def heartbeat(self, name: str, timeout: timedelta) -> None:
            calls.append(name)

    for name, pid, age in (("a:1", process.pid, 0.0), ("b:1", process.pid, 6.0), ("", process.pid, 0.0), ("d", 0, 0.0)):
        Progress(name=name, pid=pid).write(tmp_path / f"of {name}")
        at = time.time() - age
        os.utime(tmp_path / f"of {name}", (at, at))
    heartbeats = Heartbeats("http://127.0.0.1:9", [*sorted(tmp_path.iterdir()), tmp_path / "not there"])
    assert heartbeats._beat(Client()) is not None
    assert calls == ["a:1"]


def test_a_lighthouse_that_is_gone_is_asked_again(process: subprocess.Popen[bytes], tmp_path: Path) -> None:
    Progress(name="a:1", pid=process.pid).write(tmp_path / "0")
    assert Heartbeats("http://127.0.0.1:9", [tmp_path / "0"])._beat(None) is None


def test_who_lives(process: subprocess.Popen[bytes], eventually: Callable[[Callable[[], bool]], None]) -> None:
    assert lives(process.pid)
    process.send_signal(signal.SIGSTOP)
    eventually(lambda: not lives(process.pid))
    process.send_signal(signal.SIGCONT)
    eventually(lambda: lives(process.pid))
    process.kill()
    eventually(lambda: not lives(process.pid))  # a zombie: nobody has waited for it


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10.0
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    return wait


def test_progress_is_kept_over_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_EFF_PROGRESS", raising=False)
    note_progress(step=5)
    assert furthest_step() == -1
    monkeypatch.setenv("LIGHTNING_EFF_PROGRESS", str(tmp_path / "0"))
    note_progress(name="a", pid=1, step=40)
    note_progress(name="b", pid=2, step=2)
    assert Progress.read(tmp_path / "0") == Progress("b", 2, 2, 40)
    assert furthest_step() == 40
