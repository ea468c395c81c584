"""The leak police finds every kind of leak it promises to find, and puts back what it can."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from harness import REPOSITORY
from harness.leaks import Photograph, leaks_since


def test_a_clean_test_is_not_blamed():
    before = Photograph.take()
    torch.randn(3)
    os.environ.setdefault("PL_GLOBAL_SEED", "3")  # what L.seed_everything sets

    assert leaks_since(before) == []
    assert "PL_GLOBAL_SEED" not in os.environ


def test_switches_and_variables_are_found_and_put_back(monkeypatch):
    directory, precision = os.getcwd(), torch.get_float32_matmul_precision()
    monkeypatch.setenv("LEAK_TEST_CHANGED", "old")
    before = Photograph.take()
    os.environ["LEAK_TEST"] = "1"
    os.environ["LEAK_TEST_CHANGED"] = "new"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")

    assert leaks_since(before) == [
        "environment variable LEAK_TEST: None became '1'",
        "environment variable LEAK_TEST_CHANGED: 'old' became 'new'",
        "default dtype: torch.float32 became torch.float64",
        "deterministic algorithms: False became True",
        f"float32 matmul precision: {precision} became medium",
        f"working directory: {directory} became /",
    ]
    assert leaks_since(before) == []


def test_a_strategy_a_handler_and_a_process_group_are_found_and_removed(tmp_path):
    before = Photograph.take()
    StrategyRegistry.register("leak_test", DDPStrategy)
    handler = signal.signal(signal.SIGUSR2, lambda *_: None)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)

    found = leaks_since(before)

    assert found == ["registered strategy leak_test", "signal handler of SIGUSR2", "initialised process group"]
    assert "leak_test" not in StrategyRegistry.available_strategies()
    assert signal.getsignal(signal.SIGUSR2) == handler
    assert not dist.is_initialized()


def test_a_thread_is_found_unless_it_ends_in_time():
    before = Photograph.take()
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="leak-test")
    thread.start()
    try:
        assert leaks_since(before, patience=0.1) == ["thread leak-test"]
    finally:
        release.set()
    assert leaks_since(before, patience=10) == []


@pytest.mark.skipif(sys.platform != "linux", reason="children of other libraries are read from /proc")
def test_a_process_is_found_and_the_pool_is_not(pool):
    before = Photograph.take()
    pool.run(os.getpid)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (found,) = leaks_since(before, patience=0.1)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
    assert found.startswith(f"process {process.pid}: ")
    assert leaks_since(before) == []


def test_a_file_in_the_repository_is_found(written_files, tmp_path):
    file, folder = REPOSITORY / "leak_test.txt", REPOSITORY / "leak_test_folder"
    (REPOSITORY / "leak_test_gone.txt").write_text("")
    (REPOSITORY / "leak_test_gone.txt").unlink()
    (tmp_path / "elsewhere.txt").write_text("")
    (REPOSITORY / "README.md").read_text()
    try:
        file.write_text("")
        folder.mkdir()
        assert written_files.stop() == ["file leak_test.txt", "folder leak_test_folder"]
    finally:
        file.unlink(missing_ok=True)
        folder.rmdir()


def test_every_test_starts_from_the_same_seed():
    first = torch.rand(1)
    torch.manual_seed(0)

    assert first == torch.rand(1)
