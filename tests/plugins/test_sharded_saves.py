"""Folders that are whole or absent, whatever happens while they are written; on two ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from harness.pool import WorkerError
from lightning_eff.plugins import sharded_saves
from lightning_eff.plugins.sharded_saves import ShardedSaveError, ShardedSaves


def _checkpoint(value):
    mesh = init_device_mesh("cpu", (2,))
    weight = distribute_tensor(torch.full((5, 3), value), mesh, [Shard(0)])  # in unequal parts
    moments = {"exp_avg": distribute_tensor(torch.full((5, 3), -value), mesh, [Shard(0)]), "step": torch.tensor(value)}
    optimizer = {"state": {"weight": moments}, "param_groups": [{"lr": value, "params": ["weight"]}]}
    return {
        "state_dict": {"weight": weight, "buffer": torch.full((4,), value)},
        "optimizer_states": [optimizer],
        "global_step": value,
        "callbacks": {"Memory": {"tensor": torch.tensor([value])}},
    }


def _values(path):
    """All numbers in a folder."""
    checkpoint = _checkpoint(0.0)
    state = {"state_dict": checkpoint["state_dict"], "optimizer_0": checkpoint["optimizer_states"][0]}
    dcp.load(state, checkpoint_id=path)
    rest = torch.load(Path(path, "meta.pt"), weights_only=True)
    weight, moments = state["state_dict"]["weight"], state["optimizer_0"]["state"]["weight"]
    tensors = [weight.full_tensor(), state["state_dict"]["buffer"], -moments["exp_avg"].full_tensor(), moments["step"]]
    tensors += [torch.tensor(state["optimizer_0"]["param_groups"][0]["lr"]), rest["callbacks"]["Memory"]["tensor"]]
    return set(torch.cat([tensor.flatten() for tensor in tensors]).tolist()) | {rest["global_step"]}


@contextlib.contextmanager
def _instead(target, name, call):
    before = getattr(target, name)
    setattr(target, name, lambda *args: call(before, *args))
    try:
        yield
    finally:
        setattr(target, name, before)


@contextlib.contextmanager
def _held():
    """Nothing is written before the event is set."""
    event = threading.Event()

    def write(before, *args):
        assert event.wait(30)
        return before(*args)

    with _instead(FileSystemWriter, "write_data", write):
        yield event


def _ends(saves):
    saves.close()
    deadline = time.monotonic() + 5
    while any(thread.name.startswith("checkpoint-writer") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a thread is left"
        time.sleep(0.01)


def _two_in_flight(folder):
    saves, one, two = ShardedSaves(), _checkpoint(1.0), _checkpoint(2.0)
    with _held() as event:
        for checkpoint, name in ((one, "a"), (two, "b")):
            saves.save(checkpoint, folder / name)
            checkpoint["state_dict"]["weight"].zero_()  # training goes on
            checkpoint["state_dict"]["buffer"].zero_()
            checkpoint["callbacks"]["Memory"]["tensor"].zero_()
            checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] = 0.0
        seen = sorted(os.listdir(folder))
        event.set()
    saves.save(_checkpoint(3.0), folder / "c")  # waits for the first buffer
    saves.save(_checkpoint(4.0), folder / "d")
    saves.flush()
    values = [_values(folder / name) for name in "abcd"]
    _ends(saves)
    return seen, values, sorted(os.listdir(folder))


def test_two_saves_in_flight_do_not_touch_each_other(pool, tmp_path):
    for seen, values, left in pool.run(_two_in_flight, tmp_path):
        assert not {"a", "b"} & set(seen)
        assert values == [{1.0}, {2.0}, {3.0}, {4.0}]
        assert left == ["a", "b", "c", "d"]


def _removes(folder):
    saves = ShardedSaves()
    saves.save(_checkpoint(1.0), folder / "old")
    saves.flush()
    if dist.get_rank() == 0:
        (folder / "file").touch()
        os.symlink("old", folder / "link")
    dist.barrier()
    with _held() as event:
        saves.save(_checkpoint(2.0), folder / "new")
        for name in ("old", "file", "link", "absent"):
            saves.remove(folder / name)
        before = sorted(name for name in os.listdir(folder) if not name.endswith(".part"))
        dist.barrier()
        event.set()
        saves.flush()
    dist.barrier()
    after = sorted(os.listdir(folder))
    dist.barrier()
    saves.remove(folder / "new")  # nothing is written
    saves.flush()
    dist.barrier()
    left = os.listdir(folder)
    _ends(saves)
    return before, after, left


def test_what_is_removed_goes_behind_the_saves_before(pool, tmp_path):
    for before, after, left in pool.run(_removes, tmp_path):
        assert before == ["file", "link", "old"]
        assert after == ["new"]
        assert left == []


def _full_disk(folder, rank):
    saves, errors = ShardedSaves(retry_seconds=0.01), []
    saves.save(_checkpoint(1.0), folder / "old")

    def write(before, *args):
        if dist.get_rank() == rank:
            raise OSError(28, "No space left on device")
        return before(*args)

    saves.flush()
    with _instead(FileSystemWriter, "write_data", write):
        saves.save(_checkpoint(2.0), folder / "new")
        saves.remove(folder / "old")
        saves._writer.flush()
    dist.barrier()  # rank zero knows it by now, and tells the others
    try:
        saves.save(_checkpoint(3.0), folder / "third")
    except ShardedSaveError as error:
        errors.append(str(error))
    dist.barrier()
    left, values = sorted(os.listdir(folder)), _values(folder / "old")
    dist.barrier()
    saves.save(_checkpoint(3.0), folder / "third")
    saves.flush()
    held = sorted(os.listdir(folder))
    dist.barrier()
    saves.remove(folder / "new")  # as who has saved it does behind its successor
    saves.flush()
    _ends(saves)
    return errors, left, values, _values(folder / "third"), held


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_is_an_error_on_all_ranks_and_what_was_there_stays(pool, tmp_path, rank):
    for errors, left, values, third, held in pool.run(_full_disk, tmp_path, rank):
        assert errors == [
            f"{tmp_path}/new could not be written in 3 attempts: OSError: rank {rank}: [Errno 28] No space left on "
            "device; checkpoints of before stay"
        ]
        assert left == ["old"]
        assert values == {1.0}
        assert third == {3.0}
        assert held == ["old", "third"]  # which may be another's, and no successor of the old one
    assert os.listdir(tmp_path) == ["third"]  # and what was to be removed has gone behind it


def _fails_at_the_end(folder):
    saves = ShardedSaves(retry_seconds=0.01)

    def finish(before, *args):
        raise OSError(30, "Read-only file system")

    with _instead(sharded_saves, "_take_name", finish):
        saves.save(_checkpoint(1.0), folder / "a")
        with pytest.raises(ShardedSaveError, match=r"in 3 attempts: OSError: rank 0: .*Read-only") as caught:
            saves.close()
    return str(caught.value), os.listdir(folder)


def test_an_error_of_rank_zero_is_raised_on_all_at_the_end(pool, tmp_path):
    (first, left), (second, _) = pool.run(_fails_at_the_end, tmp_path)
    assert first == second
    assert left == []


def _rank_zero_removes_slowly(folder):
    saves = ShardedSaves(retry_seconds=0.01)
    removed = sharded_saves.shutil.rmtree

    def fails_once(before, part, path):
        if not failed:
            failed.append(path)
            raise OSError(30, "Read-only file system")
        before(part, path)

    def slowly(*args, **kwargs):
        time.sleep(0.5)
        removed(*args, **kwargs)

    failed = []
    with _instead(sharded_saves, "_take_name", fails_once), mock.patch.object(sharded_saves.shutil, "rmtree", slowly):
        saves.save(_checkpoint(1.0), folder / "a")
        _ends(saves)
    return _values(folder / "a")


def test_another_attempt_begins_when_nothing_of_the_one_before_is_left(pool, tmp_path):
    assert pool.run(_rank_zero_removes_slowly, tmp_path) == [{1.0}, {1.0}]


def _cannot_be_pickled(folder):
    saves = ShardedSaves()
    with pytest.raises(ShardedSaveError, match=r"cannot be pickled.*lambda"):
        saves.save(_checkpoint(1.0) | {"hook": lambda: None}, folder / "a")
    saves.save(_checkpoint(1.0), folder / "a")
    _ends(saves)
    return _values(folder / "a")


def test_what_cannot_be_pickled_is_said_on_all_ranks(pool, tmp_path):
    assert pool.run(_cannot_be_pickled, tmp_path) == [{1.0}, {1.0}]


def _again(folder, exchanges):
    saves = ShardedSaves()
    (folder / "a").write_text("a file of before")
    path, found = folder / "a", []
    with _instead(sharded_saves, "_exchange", lambda before, *args: before(*args) if exchanges else False):
        for value in (1.0, 2.0):
            dist.barrier()
            saves.save(_checkpoint(value), path)
            saves.flush()
            found.append(_values(path))
    _ends(saves)
    return found, os.listdir(folder)


@pytest.mark.parametrize("exchanges", [True, False])
def test_one_of_the_same_name_is_replaced(pool, tmp_path, exchanges):
    for found, left in pool.run(_again, tmp_path, exchanges):
        assert found == [{1.0}, {2.0}]
        assert left == ["a"]


def _dies(folder, place):
    saves = ShardedSaves()
    saves.save(_checkpoint(1.0), folder / "a")
    saves.flush()

    def die(before, *args):
        if place == "_take_name" or dist.get_rank() == 1:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        return before(*args)

    with _instead(sharded_saves if place == "_take_name" else FileSystemWriter, place, die):
        saves.save(_checkpoint(2.0), folder / "a")
        saves.flush()


@pytest.mark.parametrize("place", [pytest.param("write_data", marks=pytest.mark.slow), "_take_name"])
def test_a_kill_while_writing_leaves_the_checkpoint_of_before(pool, tmp_path, place):
    with pytest.raises(WorkerError, match="exit code -9"):
        pool.using(grace=20).run(_dies, tmp_path, place)
    left = os.listdir(tmp_path)
    if place == "_take_name":  # else rank zero has outlived it, and removed what it had begun
        assert len(left) == 2
    assert all(name == "a" or name.endswith(".part") for name in left)
    for values, then, names in pool.run(_later, tmp_path):
        assert values == {1.0}
        assert then == {3.0}
        assert names == ["a"]


def _later(folder):
    values = _values(folder / "a")
    dist.barrier()
    saves = ShardedSaves()
    saves.save(_checkpoint(3.0), folder / "a")
    _ends(saves)
    return values, _values(folder / "a"), os.listdir(folder)


@pytest.mark.parametrize("timeout", [0, 5, timedelta(0), "1"])
def test_arguments_are_checked(timeout):
    with pytest.raises(ValueError, match=r"timeout=.*a timedelta above zero, or None"):
        ShardedSaves(timeout)
    for call in (lambda: ShardedSaves().save({}, 5), lambda: ShardedSaves().remove(None)):
        with pytest.raises(ValueError, match=r"path=.* it must be a path"):
            call()
