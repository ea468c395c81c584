import os
import random
import signal
import time
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from harness import REPOSITORY
from harness.faults import InjectedError, fail_at
from harness.pool import Pool, PoolTimeoutError, WorkerError
from tests.harness.regression import trained


def _world_sum(value, *, times=1.0):
    tensor = torch.tensor(value * times * (dist.get_rank() + 1))
    dist.all_reduce(tensor)
    return dist.get_rank(), tensor, torch.get_num_threads()


def test_results_come_in_the_order_of_the_ranks(pool):
    results = pool.run(_world_sum, 2.0, times=10.0)

    assert [(rank, tensor.item(), threads) for rank, tensor, threads in results] == [(0, 60.0, 1), (1, 60.0, 1)]


def _dirty():
    dist.new_group([0, 1])
    os.environ["POOL_TEST"] = "dirty"
    os.chdir("/")
    torch.manual_seed(17)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)


def _state():
    groups = len(dist.distributed_c10d._world.pg_map)
    draws = (torch.rand(1).item(), np.random.rand(), random.random())
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    return groups, os.environ.get("POOL_TEST"), os.getcwd(), draws, dtype, deterministic


def test_no_state_is_left_between_tasks(pool):
    before = pool.run(_state)
    pool.run(_dirty)

    assert pool.run(_state) == before


def _say():
    os.write(2, f"rank {dist.get_rank()} speaks\n".encode())


def test_what_the_workers_write_to_stderr_is_the_tests(pool, capsys):
    pool.run(_state)  # what new workers say at their start
    capsys.readouterr()
    for _ in range(2):
        pool.run(_say)
        assert capsys.readouterr().err == "rank 0 speaks\nrank 1 speaks\n"


def _fail(rank):
    if dist.get_rank() == rank:
        raise LookupError("a key of rank one")
    dist.barrier()  # never completes


@pytest.mark.slow
def test_a_failure_names_its_rank_and_the_pool_starts_anew():
    with Pool(2) as pool:
        pool.run(_state)
        first = pool.pids
        with pytest.raises(WorkerError, match=r"_fail failed on rank 1(?s:.*)LookupError: a key of rank one") as caught:
            pool.using(grace=0.2).run(_fail, rank=1)

        assert isinstance(caught.value.__cause__, LookupError)
        assert not pool.pids
        for pid in first:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        assert [rank for rank, *_ in pool.run(_world_sum, 1.0)] == [0, 1]
        assert not pool.pids & first

        _check_hang_and_death(pool)  # on the same workers: starting a pool takes seconds
    assert not pool.pids


def _hang_on_rank_one():
    while dist.get_rank() == 1:
        time.sleep(0.01)


def _die_on_rank_one():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def _abort_on_rank_one():
    if dist.get_rank() == 1:
        os.write(2, b"what C++ says\n")
        os.abort()


def _check_hang_and_death(pool):
    with pytest.raises(WorkerError, match=r"exit code -6\nwhat C\+\+ says(?s:.*)in _abort_on_rank_one"):
        pool.run(_abort_on_rank_one)

    with pytest.raises(WorkerError, match=r"rank 1(?s:.*)exit code -9") as caught:
        pool.run(_die_on_rank_one)
    assert caught.value.results == {0: "alive"}

    pool.run(_state)  # new workers import this module first
    with pytest.raises(PoolTimeoutError, match=r"hung for 2 s on rank 1(?s:.*)in _hang_on_rank_one"):
        pool.using(time_limit=2).run(_hang_on_rank_one)


def test_a_local_function_is_refused_with_the_reason(pool):
    with pytest.raises(TypeError, match="top of a module"):
        pool.run(lambda: None)


def _write():
    path = REPOSITORY / "pool_test.txt"
    if dist.get_rank() == 0:
        path.write_text("")
    return path.exists()


def test_a_file_left_in_the_repository_is_an_error():
    try:
        with Pool(1) as pool, pytest.raises(WorkerError, match=r"left behind: file pool_test.txt"):
            pool.run(_write)
    finally:
        (REPOSITORY / "pool_test.txt").unlink()


def _warn():
    try:
        warnings.warn("look out", UserWarning, stacklevel=2)
    except UserWarning as warning:
        return str(warning)
    return None


def test_warnings_are_errors_in_the_workers_as_in_the_test(pool):
    assert pool.run(_warn) == ["look out", "look out"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pool.run(_warn) == [None, None]


def _fit(root, *faults):
    torch.manual_seed(3)
    try:
        return trained(*faults, devices=2, strategy="ddp", default_root_dir=root)
    except InjectedError as error:
        return str(error)


def test_lightning_recognises_torchrun_and_trains_in_the_workers(pool, tmp_path):
    (rank0, *facts0, weight0), (rank1, *facts1, weight1) = pool.run(_fit, tmp_path)

    assert (rank0, rank1) == (0, 1)
    assert facts0 == facts1 == [2, 3, TorchElasticEnvironment]
    assert torch.equal(weight0, weight1)


def test_a_fault_in_an_unknown_hook_is_refused():
    with pytest.raises(ValueError, match="hook = 'on_lunch'; it must be one of on_train_batch_start"):
        fail_at(step=1).in_hook("on_lunch")


def test_fail_at_raises_at_the_rank_and_the_step(pool, tmp_path):
    message = "rank {}, step 2, on_train_batch_start"

    assert pool.run(_fit, tmp_path, fail_at(step=2)) == [message.format(0), message.format(1)]
