"""Processes of our own, their memory and what they leave in files."""

import os
import socket
import subprocess
import sys

import pytest

from harness import REPOSITORY, json_lines
from harness.memory import peak_resident, resident
from harness.processes import apart, environment, eventually, free_port, listeners, spawned

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")


_SAID = []


def _who(word):
    _SAID.append(word)
    return os.getpid(), os.environ["HARNESS_TEST"], _SAID


def test_a_function_runs_in_a_process_that_begins_with_nothing(monkeypatch):
    monkeypatch.setenv("HARNESS_TEST", "told")
    _SAID.append("here")
    try:
        pid, told, said = apart(_who, "there")
        assert _SAID == ["here"]
    finally:
        _SAID.clear()
    assert pid != os.getpid()
    assert (told, said) == ("told", ["there"])


def test_processes_share_the_work_and_keep_the_order():
    with spawned(2) as pool:
        assert list(pool.map(abs, [-3, 2, -1])) == [3, 2, 1]


def test_a_process_finds_the_harness_from_anywhere(tmp_path):
    program = "import os, harness; print(harness.REPOSITORY, os.environ['OMP_NUM_THREADS'], os.environ['MORE'])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(MORE="more"), capture_output=True, text=True
    )
    assert done.stdout.split() == [str(REPOSITORY), "1", "more"], done.stderr


def test_something_comes_or_does_not():
    answers = iter([None, 0, "here"])
    assert eventually(lambda: next(answers)) == "here"
    with pytest.raises(AssertionError, match=r"it did not come in 0\.1 s"):
        eventually(lambda: False, 0.1)
    with pytest.raises(AssertionError, match="no bus"):
        eventually(lambda: False, 0.1, "no bus")


@LINUX
def test_listeners_are_found_by_their_address():
    with socket.socket() as one:
        one.bind(("127.0.0.2", free_port()))
        assert "0200007F" not in listeners([os.getpid()])
        one.listen()
        assert "0200007F" in listeners([os.getpid()])
        assert listeners([]) == set()


@LINUX
def test_memory_is_that_of_this_process_and_the_peak_stays():
    # In one of its own: here what earlier tests have left may be freed meanwhile.
    before, during, peak, after, peak_after = apart(_memory_while_holding, 64 << 20)
    counted = 1e6  # the kernel counts for each core and adds up by batches of 32 pages: a peak may be that much behind
    assert 60e6 < during - before < 80e6
    assert peak >= during - counted
    assert peak_after + counted >= during > after + 60e6


def _memory_while_holding(size: int) -> tuple[float, ...]:
    before = resident()
    held = bytearray(os.urandom(size))
    during, peak = resident(), peak_resident()
    held.clear()
    return before, during, peak, resident(), peak_resident()


def test_lines_are_read_as_far_as_they_are_whole(tmp_path):
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    for step in range(3):
        json_lines.append(one, {"step": step})
    json_lines.append(other, [3, "b"])
    with other.open("a") as file:
        file.write('{"cut": ')

    assert json_lines.read(one, tmp_path / "never", other) == [{"step": 0}, {"step": 1}, {"step": 2}, [3, "b"]]
