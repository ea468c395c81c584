"""Whatever happens while a checkpoint is written: what is on disk under its name is whole, and nothing is left."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch

from harness import REPOSITORY
from harness.processes import environment, eventually
from lightning_eff.plugins.async_checkpoint.checkpoint_file import damage
from tests.callbacks.async_checkpoint.faults import is_right

WIDTH = 20_000  # 1.3 MB a checkpoint


def _start(folder, steps=100_000, **settings):
    settings = {"folder": str(folder), "width": WIDTH, "steps": steps, **settings}
    command = [sys.executable, "-m", "tests.callbacks.async_checkpoint.faults", json.dumps(settings)]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def _run(folder, **settings):
    process = _start(folder, **settings)
    _, said = process.communicate(timeout=150)
    return process.returncode, said


def _checkpoints(folder):
    return [folder / name for name in os.listdir(folder) if name.endswith(".ckpt")]


def _check(folder):
    """Each checkpoint is whole and right, and `last` is one of them."""
    found = _checkpoints(folder)
    for path in found:
        assert path.exists(), f"{path} points to nothing"
        assert damage(path) is None
        assert is_right(torch.load(path, weights_only=True)), path
    return found


def _kill_while_saving(folder, rng):
    process = _start(folder)
    try:
        eventually(lambda: (folder / "last.ckpt").exists(), 100, "it has not begun to save")
        time.sleep(rng.uniform(0, 0.3))
    finally:
        process.kill()
        process.communicate()
    assert folder / "last.ckpt" in _check(folder)


@pytest.mark.timeout(200)
def test_killed_while_saving(tmp_path):
    _kill_while_saving(tmp_path, random.Random(0))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_a_hundred_times_while_saving(tmp_path):
    for seed in range(100):
        _kill_while_saving(tmp_path / str(seed), random.Random(seed))
        shutil.rmtree(tmp_path / str(seed))


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
        assert [path.name for path in _check(folder) if not path.is_symlink()] == ["step=1.ckpt"]
        assert not list(folder.glob("*.part"))


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_disk_that_may_not_be_written_to(tmp_path):
    folder = tmp_path / "disk"
    with _disk(folder, "ro"):
        status, said = _run(folder, steps=6)
        assert status != 0
        assert "step=1.ckpt could not be written in 3 attempts: OSError: [Errno 30] Read-only file system" in said
