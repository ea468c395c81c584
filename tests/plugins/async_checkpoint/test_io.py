"""AsyncCheckpointIO alone: order, errors, memory, and what is on disk when something fails."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import weakref

import fsspec
import lightning as L
import pytest
import torch

from harness.processes import eventually
from lightning_eff.plugins import AsyncCheckpointIO
from lightning_eff.plugins.async_checkpoint import staging
from lightning_eff.plugins.async_checkpoint import writer as writing
from tests.callbacks.preemption.runs import Model, trainer
from tests.plugins.async_checkpoint.gate import Gate


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


@pytest.fixture
def saver():
    saver = AsyncCheckpointIO(retry_seconds=0.0)
    yield saver
    saver.take_error()
    saver.teardown()


def _loaded(path):
    return torch.load(path, weights_only=True)["weight"].tolist()


def test_a_save_is_of_the_moment_and_not_of_the_write(tmp_path, gate, saver):
    gate.open.clear()
    weight, notes = torch.zeros(3), {"seen": [1]}
    saver.save_checkpoint({"weight": weight, "notes": notes}, tmp_path / "a.ckpt")
    weight += 1
    notes["seen"].append(2)
    saver.save_checkpoint({"weight": weight, "notes": notes}, tmp_path / "b.ckpt")
    weight += 1
    assert list(tmp_path.iterdir()) == []
    gate.open.set()
    saver.flush()
    assert _loaded(tmp_path / "a.ckpt") == [0, 0, 0]
    assert _loaded(tmp_path / "b.ckpt") == [1, 1, 1]
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["notes"] == {"seen": [1]}
    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "b.ckpt"]


def test_two_buffers_and_no_more_are_used_again_and_again(tmp_path, gate, saver):
    addresses = set()
    for step in range(6):
        saver.save_checkpoint({"weight": torch.full((50_000,), float(step))}, tmp_path / f"{step}.ckpt")
        arena = saver._stager._latest._arena
        addresses.add(arena.part(0, 1).data_ptr())
    saver.flush()
    assert len(addresses) == 2
    assert [_loaded(tmp_path / f"{step}.ckpt")[0] for step in range(6)] == list(range(6))


def test_a_third_save_waits_for_a_buffer(tmp_path, gate, saver):
    gate.open.clear()
    for name in "ab":
        saver.save_checkpoint({"weight": torch.zeros(2)}, tmp_path / name)
    assert saver.busy
    third = threading.Thread(target=saver.save_checkpoint, args=({"weight": torch.ones(2)}, tmp_path / "c"))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    gate.open.set()
    third.join(20)
    assert not third.is_alive()
    saver.flush()
    assert gate.wrote == ["a", "b", "c"]
    assert not saver.busy


def test_a_removal_and_a_link_wait_for_the_save_before_them(tmp_path, gate, saver):
    saver.save_checkpoint({"weight": torch.zeros(2)}, tmp_path / "old.ckpt")
    saver.flush()
    gate.open.clear()
    saver.save_checkpoint({"weight": torch.ones(2)}, tmp_path / "new.ckpt")
    saver.link_checkpoint(str(tmp_path / "new.ckpt"), str(tmp_path / "last.ckpt"))
    saver.remove_checkpoint(tmp_path / "old.ckpt")
    assert os.listdir(tmp_path) == ["old.ckpt"]
    gate.open.set()
    saver.flush()
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "new.ckpt"]
    assert os.readlink(tmp_path / "last.ckpt") == "new.ckpt"


def test_what_a_link_points_to_is_removed_when_the_link_is_made_anew(tmp_path, gate, saver):
    names = [str(tmp_path / name) for name in ("1.ckpt", "2.ckpt")]
    for name in names:
        saver.save_checkpoint({"weight": torch.zeros(2)}, name)
        saver.remove_checkpoint(names[0]) if name == names[1] else None
        saver.flush()
        assert os.path.exists(names[0])  # also where `last` still points to it, which a kill would leave dangling
        saver.link_checkpoint(name, str(tmp_path / "last.ckpt"))
        saver.flush()
    assert sorted(os.listdir(tmp_path)) == ["2.ckpt", "last.ckpt"]
    assert _loaded(tmp_path / "last.ckpt") == [0, 0]


def test_behind_a_failed_save_nothing_is_removed_until_one_succeeds_in_its_place(tmp_path, gate, saver):
    saver.save_checkpoint({"weight": torch.zeros(2)}, tmp_path / "1.ckpt")
    saver.flush()
    gate.failures = 3 * [OSError(28, "No space left on device")]
    saver.save_checkpoint({"weight": torch.ones(2)}, tmp_path / "2.ckpt")
    saver.remove_checkpoint(tmp_path / "1.ckpt")
    saver.flush()
    assert os.listdir(tmp_path) == ["1.ckpt"]
    assert saver.behind == 1
    with pytest.raises(RuntimeError, match=r"2\.ckpt could not be written in 3 attempts: OSError: .*No space left"):
        saver.save_checkpoint({"weight": torch.ones(2)}, tmp_path / "3.ckpt")
    saver.save_checkpoint({"weight": torch.ones(2)}, tmp_path / "3.ckpt")  # an error is said once
    saver.flush()
    assert sorted(os.listdir(tmp_path)) == ["1.ckpt", "3.ckpt"]  # it may be somebody else's
    assert (saver.behind, saver.lost) == (0, [1])
    saver.remove_checkpoint(tmp_path / "2.ckpt")
    saver.flush()
    assert os.listdir(tmp_path) == ["3.ckpt"]
    assert (saver.behind, saver.lost) == (0, [])


def test_no_link_points_to_what_was_left_out(tmp_path, gate, saver):
    saver.save_checkpoint({"weight": torch.zeros(2)}, tmp_path / "1.ckpt")
    saver.link_checkpoint(str(tmp_path / "1.ckpt"), str(tmp_path / "last.ckpt"))
    saver.skip(str(tmp_path / "2.ckpt"))
    saver.link_checkpoint(str(tmp_path / "2.ckpt"), str(tmp_path / "last.ckpt"))
    for name in ("other.ckpt", "3.ckpt"):
        saver.save_checkpoint({"weight": torch.ones(2)}, tmp_path / name)
    saver.remove_checkpoint(str(tmp_path / "2.ckpt"))
    saver.flush()
    assert os.readlink(tmp_path / "last.ckpt") == "1.ckpt"


def test_at_the_end_its_memory_is_given_back_and_a_later_save_gets_its_own(tmp_path, saver):
    for name in "ab":
        saver.save_checkpoint({"weight": torch.zeros(50_000)}, tmp_path / name)
        arena = weakref.ref(saver._stager._latest._arena)
        saver.teardown()
        assert arena() is None
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_name_that_is_saved_anew_is_not_removed_by_what_waited(tmp_path, gate, saver):
    saver.save_checkpoint({"weight": torch.zeros(2)}, tmp_path / "1.ckpt")
    saver.flush()
    gate.failures = 3 * [OSError(28, "No space left on device")]
    saver.save_checkpoint({"weight": torch.ones(2)}, tmp_path / "2.ckpt")
    saver.remove_checkpoint(tmp_path / "1.ckpt")
    saver.flush()
    saver.take_error()
    saver.save_checkpoint({"weight": torch.full((2,), 2.0)}, tmp_path / "1.ckpt")
    saver.flush()
    assert _loaded(tmp_path / "1.ckpt") == [2, 2]


def test_a_disk_that_recovers_is_retried_and_nothing_is_said(tmp_path, gate, saver):
    gate.failures = 2 * [OSError(5, "Input/output error")]
    saver.save_checkpoint({"weight": torch.zeros(2)}, tmp_path / "a.ckpt")
    saver.teardown()
    assert _loaded(tmp_path / "a.ckpt") == [0, 0]


def test_what_is_no_fault_of_the_disk_is_not_retried(tmp_path, gate, saver):
    gate.failures = [ZeroDivisionError("a bug")]
    saver.save_checkpoint({"weight": torch.zeros(2)}, tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match=r"a\.ckpt could not be written: ZeroDivisionError: a bug"):
        saver.teardown()
    assert not saver.busy  # the buffer is free again


def test_what_cannot_be_pickled_is_an_error_at_once(tmp_path, saver):
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        saver.save_checkpoint({"weight": torch.zeros(2), "bad": lambda: None}, tmp_path / "a.ckpt")
    assert not saver.busy
    saver.save_checkpoint({"weight": torch.zeros(2)}, tmp_path / "a.ckpt")
    saver.flush()
    assert _loaded(tmp_path / "a.ckpt") == [0, 0]


def test_loading_waits_for_the_write_and_finds_a_flipped_byte(tmp_path, gate, saver):
    path = tmp_path / "a.ckpt"
    saver.save_checkpoint({"weight": torch.full((100,), 7.0)}, path)
    assert saver.load_checkpoint(path)["weight"][0] == 7
    content = bytearray(path.read_bytes())
    place = content.find(torch.full((100,), 7.0).numpy().tobytes()) + 42
    content[place] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["weight"].sum() != 700  # torch says nothing
    with pytest.raises(RuntimeError, match="is damaged: the checksum of its record archive/data/0 is wrong"):
        saver.load_checkpoint(path)
    assert AsyncCheckpointIO(check_loads=False).load_checkpoint(path)["weight"].sum() != 700
    with pytest.raises(FileNotFoundError):
        saver.load_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.parametrize("objects", [False, True])
def test_other_file_systems(monkeypatch, saver, objects):
    monkeypatch.setattr(writing, "_is_object_storage", lambda fs: objects)
    memory = fsspec.filesystem("memory")
    try:
        saver.save_checkpoint({"weight": torch.ones(2)}, "memory://run/a.ckpt")
        saver.save_checkpoint({"weight": torch.ones(2)}, "memory://run/b.ckpt")
        saver.remove_checkpoint("memory://run/a.ckpt")
        assert saver.load_checkpoint("memory://run/b.ckpt", weights_only=True)["weight"].tolist() == [1, 1]
        assert [os.path.basename(path) for path in memory.ls("run", detail=False)] == ["b.ckpt"]
    finally:
        memory.rm("run", recursive=True)


def test_memory_is_got_before_the_first_save(tmp_path, saver):
    saver.warm(1_000_000, pinned=False, buffers=2)
    saver.flush()
    arenas = saver._stager.take_idle(2)
    assert [arena.size for arena in arenas] == [1_000_000, 1_000_000]
    for arena in arenas:
        saver._stager._free.put(arena)


def test_a_save_does_not_wait_until_its_memory_is_touched(tmp_path, monkeypatch, saver):
    touched, begun, go = [], threading.Event(), threading.Event()
    touch = staging.Arena.touch

    def slow(arena, wanted):
        def asked():
            if len(touched) == 2:  # and not before: a save that came earlier would end it at an earlier piece
                begun.set()
                assert go.wait(20)
            touched.append(wanted())
            return touched[-1]

        touch(arena, asked)

    monkeypatch.setattr(staging.Arena, "touch", slow)
    monkeypatch.setattr(staging, "_PIECE", 1000)
    saver.warm(100_000, pinned=False, buffers=2)
    assert begun.wait(20)
    save = threading.Thread(target=saver.save_checkpoint, args=({"weight": torch.ones(100)}, tmp_path / "a.ckpt"))
    save.start()
    assert eventually(saver._stager._wanted.is_set)
    go.set()
    save.join(20)
    saver.flush()
    assert touched[:3] == [False, False, True]  # it ends at the first piece behind that
    assert len(touched) == 3 + 100  # and goes on with the other one
    assert _loaded(tmp_path / "a.ckpt") == [1] * 100


def test_it_can_be_copied_and_pickled(tmp_path, saver):
    saver.save_checkpoint({"weight": torch.zeros(2)}, tmp_path / "a.ckpt")
    for other in (copy.deepcopy(saver), pickle.loads(pickle.dumps(saver))):
        assert (other.retries, other.retry_seconds, other.check_loads) == (2, 0.0, True)
        other.save_checkpoint({"weight": torch.ones(2)}, tmp_path / "b.ckpt")
        other.teardown()
    assert _loaded(tmp_path / "b.ckpt") == [1, 1]


def test_alone_in_a_trainer(tmp_path):
    run = trainer(tmp_path, plugins=[AsyncCheckpointIO()])
    run.fit(Model())
    run.save_checkpoint(tmp_path / "end.ckpt")
    run.strategy.checkpoint_io.teardown()
    assert torch.load(tmp_path / "end.ckpt", weights_only=True)["global_step"] == 24


def test_alone_an_error_is_raised_at_the_end(tmp_path, gate):
    gate.failures = 3 * [OSError(28, "No space left on device")]
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=20)
    run = trainer(tmp_path, checkpoint, plugins=[AsyncCheckpointIO(retry_seconds=0.0)])
    with pytest.raises(RuntimeError, match="No space left"):
        run.fit(Model())
    assert eventually(lambda: threading.active_count() >= 1)


@pytest.mark.parametrize(
    "arguments", [{"retries": -1}, {"retries": 1.5}, {"retry_seconds": float("nan")}, {"check_loads": "yes"}]
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        AsyncCheckpointIO(**arguments)
