"""Whatever happens while a checkpoint is written: what is on disk under its name is whole, and nothing is left."""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager

import pytest

from benchmarks.async_checkpoint import killed, start, wrong


def _run(folder, **settings):
    process = start(folder, **settings)
    _, said = process.communicate(timeout=150)
    return process.returncode, said


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_killed_while_saving(tmp_path, kills):
    found = killed(tmp_path, kills)
    assert [run["wrong"] for run in found] == [[]] * kills
    assert kills < 100 or sum(run["in_flight"] for run in found) > 10  # it does kill in the midst of a file


@pytest.mark.parametrize("on_error", ["raise", pytest.param("warn", marks=pytest.mark.slow)])
@pytest.mark.timeout(200)
def test_a_disk_that_is_full(tmp_path, on_error):
    status, said = _run(tmp_path, steps=6, file_size=500_000, arguments={"on_error": on_error})
    assert ("could not be written in 3 attempts" in said) == (on_error == "raise" or status == 0)
    assert (status != 0) == (on_error == "raise")
    assert "File too large" in said
    assert os.listdir(tmp_path) == []


@contextmanager
def _disk(folder, options):
    """A file system of its own, where this process may mount one."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no mounting here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_disk_with_room_for_one_checkpoint_keeps_it(tmp_path):
    folder = tmp_path / "disk"
    with _disk(folder, "size=2000000"):
        status, said = _run(folder, steps=6)
        assert status != 0
        assert "No space left on device" in said
        assert sorted(os.listdir(folder)) == ["last.ckpt", "step=1.ckpt"]
        assert wrong(folder) == []


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_disk_that_may_not_be_written_to(tmp_path):
    folder = tmp_path / "disk"
    with _disk(folder, "ro"):
        status, said = _run(folder, steps=6)
        assert status != 0
        assert "step=1.ckpt could not be written in 3 attempts: OSError: [Errno 30] Read-only file system" in said
