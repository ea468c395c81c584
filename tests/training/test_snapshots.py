"""The sliding window of snapshots."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from benchmarks.kernel_cases import SIZES
from lightning_eff.training.snapshots import SnapshotWindow


def _filled(window: SnapshotWindow, steps: int = 4) -> torch.Tensor:
    weight = torch.zeros(3)
    for step in range(1, steps + 1):
        weight += 1
        window.take(step, {"weight": weight, "empty": torch.empty(0)})
    return weight


@pytest.mark.parametrize("place", ["cpu", "disk", "model"])
def test_the_last_snapshots_are_real_copies(place, tmp_path):
    window = SnapshotWindow(3, place)
    window.folder = str(tmp_path / "new")
    weight = _filled(window)
    weight.fill_(7)
    assert window.steps == [2, 3, 4]
    assert [snapshot["weight"].tolist() for snapshot in window.read()] == [[2.0] * 3, [3.0] * 3, [4.0] * 3]


def test_a_file_has_no_name_that_could_be_left_behind(tmp_path):
    window = SnapshotWindow(2, "disk")
    window.folder = str(tmp_path)
    _filled(window)
    assert os.listdir(tmp_path) == []
    if Path("/proc/self/maps").exists():
        assert str(tmp_path) in Path("/proc/self/maps").read_text()
    assert pickle.loads(pickle.dumps(window)).read()[1]["weight"].tolist() == [4.0] * 3


def test_state_goes_into_another_window():
    window = SnapshotWindow(3)
    like = {"weight": _filled(window), "empty": torch.empty(0)}
    shorter = SnapshotWindow(2)
    assert shorter.load_state_dict(window.state_dict(), like)
    assert shorter.steps == [3, 4]
    assert shorter.read()[0]["weight"].tolist() == [3.0] * 3
    assert not shorter.load_state_dict(window.state_dict(), {"weight": torch.zeros(4), "empty": torch.empty(0)})
    assert shorter.steps == []


def test_what_has_not_changed_is_held_once():
    window = SnapshotWindow(3)
    weight = _filled(window)
    window.add("later", torch.ones(5))
    first, second, third = (snapshot["later"] for snapshot in window.read())
    assert first is second is third
    window.take(5, {"weight": weight, "empty": torch.empty(0), "later": torch.zeros(5)})
    assert [snapshot["later"].sum().item() for snapshot in window.read()] == [5, 5, 0]


@pytest.mark.parametrize("place", ["cpu", "disk", "model"])
def test_free_memory_is_a_sensible_number(place, tmp_path):
    window = SnapshotWindow(1, place)
    window.folder = str(tmp_path / "not" / "there")
    free = window.free_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**60


def test_a_held_window_is_not_written_again():
    window = SnapshotWindow(2)
    weight = _filled(window, 3)
    held = window.hold()
    for step in (4, 5, 6):
        window.take(step, {"weight": weight.fill_(step), "empty": torch.empty(0)})
    window.go_back(held)
    assert window.steps == [2, 3]
    assert [snapshot["weight"].tolist() for snapshot in window.read()] == [[2.0] * 3, [3.0] * 3]
    del held
    memory = window.read()[0]["weight"].data_ptr()
    window.take(7, {"weight": weight, "empty": torch.empty(0)})
    assert window.read()[1]["weight"].data_ptr() == memory  # nobody holds it any more
    assert pickle.loads(pickle.dumps(window)).steps == [3, 7]


def test_the_memory_of_dropped_snapshots_is_used_again():
    window = SnapshotWindow(3)
    weight = _filled(window, 3)
    memory = window.read()[2]["weight"].data_ptr()
    window.drop_after(1)
    assert window.steps == [1]
    window.take(2, {"weight": weight, "empty": torch.empty(0)})
    window.take(3, {"weight": weight, "empty": torch.empty(0)})
    assert memory in [snapshot["weight"].data_ptr() for snapshot in window.read()[1:]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the copies from a GPU; on the CPU see the tests above")
@pytest.mark.parametrize("place", ["cpu", "disk", "model"])
def test_copies_from_a_gpu_are_of_the_weights_when_they_were_taken(place, tmp_path):
    """They are queued behind the step that has made the weights and before the next one, and nobody waits."""
    window = SnapshotWindow(2, place)
    window.folder = str(tmp_path)
    weight = torch.zeros(1 << 22, device="cuda")
    window.take(0, {"weight": weight})
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)  # the device is far behind the host
    for step in (1, 2, 3):
        weight += 1
        if place != "disk":  # mapped files are not pinned, so their copies are waited for
            torch.cuda.set_sync_debug_mode("error" if len(window.steps) == 2 else "default")
        window.take(step, {"weight": weight})
        torch.cuda.set_sync_debug_mode("default")
    weight.fill_(7)
    first, second = (snapshot["weight"] for snapshot in window.read())
    assert (first.unique().tolist(), second.unique().tolist()) == ([2.0], [3.0])
    assert first.is_pinned() == (place == "cpu")


def test_tensors_of_a_snapshot_share_a_few_pieces_of_memory(tmp_path):
    """The host allocator rounds a piece of pinned memory up to a power of two; on disk each is a mapping."""
    tensors = {f"{i}": torch.full((3, i), float(i)) for i in range(40)} | {"count": torch.tensor(7)}
    for place in ("cpu", "disk"):
        window = SnapshotWindow(2, place)
        window.folder = str(tmp_path)
        window.take(1, tensors)
        (snapshot,) = window.read()
        assert list(snapshot) == list(tensors)
        assert all(torch.equal(snapshot[name], tensor) for name, tensor in tensors.items())
        assert len({tensor.untyped_storage().data_ptr() for tensor in snapshot.values() if tensor.numel()}) == 2
        # A saved one is not larger for it, and loads: two dtypes in one piece would be refused.
        torch.save(window.state_dict(), tmp_path / "state.pt")
        assert (tmp_path / "state.pt").stat().st_size < 2 * sum(t.nbytes for t in tensors.values()) + 20_000
        other = SnapshotWindow(2)
        assert other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), tensors)
        assert all(torch.equal(other.read()[0][name], tensor) for name, tensor in tensors.items())
        assert len(pickle.dumps(window)) < 2 * sum(t.nbytes for t in tensors.values()) + 40_000  # and not 40 pieces


def test_a_tensor_of_another_size_leaves_the_others_where_they_are():
    window = SnapshotWindow(1)
    window.take(1, {"a": torch.zeros(3), "b": torch.zeros(4)})
    memory = window.read()[0]["a"].data_ptr()
    window.take(2, {"a": torch.ones(3), "b": torch.ones(5)})
    (snapshot,) = window.read()
    assert (snapshot["a"].data_ptr(), snapshot["b"].tolist()) == (memory, [1.0] * 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["124m", "1300m"])
def test_the_memory_that_is_counted_is_what_pinned_pieces_take(size, dtype):
    with FakeTensorMode():
        tensors = {
            str(i): torch.empty(shape, dtype=dtype, device="cuda") for i, shape in enumerate(SIZES[size].shapes())
        }
    total = sum(tensor.nbytes for tensor in tensors.values())
    rounded = sum(1 << (tensor.nbytes - 1).bit_length() for tensor in tensors.values())
    taken = SnapshotWindow(1).bytes_of(tensors)
    assert total <= taken < 1.09 * total
    # One piece for each tensor takes 1.66 times as much for the smaller model, one for all 1.63 times for the larger.
    assert taken <= min(rounded, 1 << (total - 1).bit_length())
    assert SnapshotWindow(1, "disk").bytes_of(tensors) == SnapshotWindow(1, "model").bytes_of(tensors) == total
