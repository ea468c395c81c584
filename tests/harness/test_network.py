import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from harness import network as network_module
from harness.network import Network, NetworkUnavailableError, namespaces, why_not
from harness.pool import WorkerError
from harness.processes import eventually
from tests.harness.regression import trained


def _all_reduce(megabytes, repeats=3):
    """Seconds of each all-reduce of float32 ones, and the sum."""
    seconds = []
    for _ in range(repeats):
        tensor = torch.ones(int(megabytes * 250_000))
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        seconds.append(time.perf_counter() - start)
    return seconds, tensor[-1].item()


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "mbit", "megabytes"), [(2, 50, 2), (2, 200, 8), (4, 200, 8)])
def test_an_all_reduce_takes_as_long_as_the_arithmetic_says(network, ranks, mbit, megabytes):
    net = network(ranks, mbit)
    expected = 2 * (ranks - 1) / ranks * megabytes * 8 / mbit  # a ring sends so much from every rank

    for seconds, total in net.run(_all_reduce, megabytes):
        assert total == ranks
        assert 0.97 * expected < min(seconds) < 1.35 * expected  # above: whatever else the machine does

    for rank in range(ranks):
        sent, received = net.traffic(rank)
        assert 1.0 < sent / (3 * 1e6 * megabytes * 2 * (ranks - 1) / ranks) < 1.12  # headers, and gloo's own talk
        assert received == pytest.approx(sent, rel=0.1)


@pytest.mark.slow
def test_the_speed_can_be_changed_on_the_way(network):
    net = network(2, mbit=50)
    slow = min(net.run(_all_reduce, 2)[0][0])
    net.shape(None)
    free = min(net.run(_all_reduce, 2)[0][0])
    net.shape(25, rank=1)
    slower = min(net.run(_all_reduce, 2)[0][0])

    assert free < 0.1 * slow
    assert 1.8 * slow < slower < 2.3 * slow


def _sum_until(path):
    """All-reduce again and again until the file exists; the number of rounds, or the error."""
    rounds = 0
    while True:
        done = torch.tensor(float(path.exists()))
        try:
            dist.all_reduce(done)
        except RuntimeError as error:
            return rounds, str(error)
        rounds += 1
        path.with_suffix(f".{dist.get_rank()}").write_text(str(rounds))
        if done:
            return rounds, None


def _rounds(path, rank=0, above=0, patience=60):
    """Wait until a rank has done more than so many rounds."""
    file = path.with_suffix(f".{rank}")

    def done():
        return int(file.read_text() or 0) if file.exists() else 0

    eventually(lambda: done() > above, patience, f"rank {rank} has not got past round {above}")
    return done()


@pytest.mark.slow
def test_a_cut_cable_is_silent_and_can_be_mended(network, tmp_path):
    net = network(2, timeout=60)
    task = net.start(_sum_until, tmp_path / "done")
    _rounds(tmp_path / "done")

    net.cut(1)
    time.sleep(0.3)
    stopped = _rounds(tmp_path / "done")
    time.sleep(1.0)
    assert _rounds(tmp_path / "done") == stopped

    net.mend(1)
    _rounds(tmp_path / "done", above=stopped + 1)
    (tmp_path / "done").touch()
    (rounds0, error0), (rounds1, error1) = task.results()
    assert (error0, error1) == (None, None)
    assert rounds0 == rounds1 > stopped


@pytest.mark.slow
def test_a_collective_over_a_cut_cable_gives_up_after_its_timeout(network, tmp_path):
    net = network(2, timeout=3)
    task = net.start(_sum_until, tmp_path / "done")
    _rounds(tmp_path / "done")
    net.cut(0)
    start = time.monotonic()
    errors = [error for _, error in task.results()]

    assert time.monotonic() - start < 15
    assert all(error and "imed out" in error for error in errors)


def _die_on_rank_one():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def _raise_on_rank_zero():
    if dist.get_rank() == 0:
        raise ValueError("no such thing")
    return "well"


@pytest.mark.slow
def test_a_failed_or_dead_rank_is_named_and_the_others_are_heard(network):
    net = network(2)
    with pytest.raises(WorkerError, match=r"failed on rank 1(?s:.*)exit code -9") as caught:
        net.run(_die_on_rank_one)
    assert caught.value.results == {0: "alive"}

    with pytest.raises(WorkerError, match=r"failed on rank 0(?s:.*)no such thing") as caught:
        net.run(_raise_on_rank_zero)
    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.results == {1: "well"}


def _sleep():
    time.sleep(600)


@pytest.mark.slow
def test_a_hanging_task_ends_with_its_time(network):
    net = network(1, time_limit=10)
    with pytest.raises(WorkerError, match=r"_sleep was still running on rank 0"):
        net.run(_sleep)


def _fit():
    torch.manual_seed(dist.get_rank())
    return trained(devices=1, num_nodes=2, strategy="ddp")


@pytest.mark.slow
def test_lightning_takes_the_ranks_for_nodes(network):
    (rank0, *facts0, weight0), (rank1, *facts1, weight1) = network(2).run(_fit)

    assert (rank0, rank1) == (0, 1)
    assert facts0 == facts1 == [2, 3, TorchElasticEnvironment]
    assert torch.equal(weight0, weight1)


@pytest.mark.slow
def test_nothing_is_left_on_the_way_out_not_even_grandchildren(network, tmp_path):
    before, devices = namespaces(), os.listdir("/sys/class/net")
    with pytest.raises(KeyError), Network(2) as net:  # noqa: PT012  (the error comes from within)
        shell = net.popen(0, ["sh", "-c", f"sleep 500 & echo $! > {tmp_path / 'child'}; wait"])
        while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
            time.sleep(0.01)
        assert len(namespaces()) == len(before) + 3
        assert os.listdir("/sys/class/net") == devices
        raise KeyError("in the middle")

    assert namespaces() == before
    assert os.listdir("/sys/class/net") == devices
    assert shell.returncode == -signal.SIGKILL
    child = int((tmp_path / "child").read_text())
    eventually(lambda: not os.path.exists(f"/proc/{child}"), 5)


@pytest.mark.slow
def test_what_a_killed_process_left_is_removed_by_the_next_network(network):
    code = """
import os, pathlib, signal
from harness.network import Network
network = Network(1).__enter__()
process = network.popen(0, ["sleep", "500"])
while pathlib.Path(f"/proc/{process.pid}/comm").read_text() != "sleep\\n":
    pass
print(network.namespace(0), process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    name, process = killed.stdout.split()
    eventually(lambda: not os.path.exists(f"/proc/{process}"), 5)

    network(1)
    assert name not in namespaces()


@pytest.mark.parametrize("call", ["namespace", "cut", "mend", "traffic"])
def test_a_rank_that_does_not_exist_is_refused(call):
    with pytest.raises(ValueError, match="rank must lie between 0 and 1, got 2"):
        getattr(Network(2), call)(2)


def test_a_network_without_ranks_is_refused():
    with pytest.raises(ValueError, match="ranks must lie between 1 and 200, got 0"):
        Network(0)


@pytest.mark.parametrize(
    ("name", "fake", "reason"),
    [
        ("platform.system", lambda: "Darwin", "need Linux, this is Darwin"),
        ("shutil.which", lambda name: None if name == "tc" else name, "tc cannot be found"),
        ("os.geteuid", lambda: 1000, "need root"),
    ],
)
def test_a_machine_that_cannot_says_why(monkeypatch, name, fake, reason):
    monkeypatch.setattr(network_module.platform, "system", lambda: "Linux")
    monkeypatch.setattr(network_module.shutil, "which", lambda name: name)
    module, attribute = name.split(".")
    monkeypatch.setattr(getattr(network_module, module), attribute, fake)
    why_not.cache_clear()
    try:
        assert reason in why_not()
        with pytest.raises(NetworkUnavailableError, match=reason), Network(2):
            pass
    finally:
        why_not.cache_clear()
