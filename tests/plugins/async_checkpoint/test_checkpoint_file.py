"""The file is torch's: what comes back is what went in, and whatever happens to its bytes is seen."""

from __future__ import annotations

import io
import random
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.serialization import config

from lightning_eff.plugins.async_checkpoint import checkpoint_file
from lightning_eff.plugins.async_checkpoint.checkpoint_file import (
    check_whole,
    damage,
    describe,
    put_together,
    take_apart,
)
from tests.suite.runs import differences


def _contents(storages):
    return [memoryview(torch.tensor(storage, dtype=torch.uint8).numpy()) for storage in storages]


def _write(path, checkpoint):
    pickled, storages = take_apart(checkpoint)
    with open(path, "wb") as stream:
        put_together(stream, pickled, _contents(storages))


def _checkpoint():
    base = torch.arange(12.0).view(3, 4)
    return {
        "state_dict": OrderedDict(weight=base, tied=base, row=base[1], turned=base.t()),
        "half": torch.randn(5).bfloat16(),
        "complex": torch.randn(3, dtype=torch.complex64),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 7),
        "parameter": nn.Parameter(torch.ones(2)),
        "nested": [{"a": (1, 2.5, "three", None, b"four")}, torch.zeros(2, dtype=torch.int64)],
    }


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_it_with_weights_only(tmp_path, mmap):
    saved, path = _checkpoint(), tmp_path / "some.ckpt"
    _write(path, saved)
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert differences(loaded, saved) == []
    weights = loaded["state_dict"]
    assert weights["tied"] is weights["weight"]  # and views still look at one storage
    assert weights["row"].untyped_storage().data_ptr() == weights["weight"].untyped_storage().data_ptr()
    assert isinstance(loaded["parameter"], nn.Parameter)
    assert weights["weight"].data_ptr() % 64 == 0


def test_it_is_what_torch_itself_would_have_written(tmp_path):
    saved = _checkpoint()
    _write(tmp_path / "ours.ckpt", saved)
    torch.save(saved, tmp_path / "archive.ckpt")
    ours, theirs = (zipfile.ZipFile(tmp_path / name) for name in ("ours.ckpt", "archive.ckpt"))
    with ours, theirs:
        tensors = [name for name in theirs.namelist() if "/data" in name or name.endswith("/version")]
        assert [name for name in ours.namelist() if not name.endswith("byteorder")] == tensors
        assert [ours.read(name) for name in tensors] == [theirs.read(name) for name in tensors]
        assert [ours.getinfo(n).CRC for n in tensors] == [theirs.getinfo(n).CRC for n in tensors]


def test_records_beyond_four_gigabytes_stay_aligned(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)  # as if these small ones were
    saved, path = {"a": torch.arange(1000.0), "b": torch.arange(7.0)}, tmp_path / "some.ckpt"
    _write(path, saved)
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert differences(loaded, saved) == []
    assert loaded["a"].data_ptr() % 64 == 0
    assert damage(path) is None


def test_what_two_dtypes_look_at_loads_right(tmp_path):
    floats = torch.arange(4.0)
    _write(tmp_path / "some.ckpt", {"floats": floats, "bits": floats.view(torch.int32)})  # torch.save refuses these
    loaded = torch.load(tmp_path / "some.ckpt", weights_only=True)
    assert torch.equal(loaded["floats"], floats)
    assert torch.equal(loaded["bits"], floats.view(torch.int32))


@pytest.mark.parametrize("writer", ["ours", "torch"])
def test_a_flipped_bit_is_found_wherever_it_would_be_loaded(tmp_path, writer):
    path, saved = tmp_path / "some.ckpt", {"weight": torch.randn(8), "step": 5, "name": "run"}
    (_write if writer == "ours" else lambda path, saved: torch.save(saved, path))(path, saved)
    whole = path.read_bytes()
    begin = whole.find(saved["weight"].numpy().tobytes())
    weight = range(begin, begin + 32)
    found = 0
    for place in {*weight, *range(0, len(whole), 2)}:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << random.randrange(8)
        path.write_bytes(flipped)
        if damage(path) is not None:
            found += 1
            continue
        loaded = torch.load(path, weights_only=True)  # what is not found changes nothing: padding, dates
        assert differences(loaded, saved) == []
        assert place not in weight
    assert found > len(weight)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_cut_file_is_found(tmp_path, kept):
    path = tmp_path / "some.ckpt"
    _write(path, _checkpoint())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    assert "cut off" in damage(path)
    with pytest.raises(RuntimeError, match=r"some\.ckpt is damaged: it is cut off"):
        check_whole(path)


def test_a_file_without_checksums_is_not_called_damaged(tmp_path):
    with config.patch("save.compute_crc32", False):
        torch.save(_checkpoint(), tmp_path / "some.ckpt")
    assert damage(tmp_path / "some.ckpt") is None
    assert not describe(tmp_path / "some.ckpt")["checksums"]


def test_taking_apart_copies_no_tensor_and_freezes_all_else():
    weight, notes = torch.zeros(3), [1]
    pickled, storages = take_apart({"weight": weight, "notes": notes})
    notes.append(2)
    weight += 1
    stream = io.BytesIO()
    put_together(stream, pickled, _contents(storages))
    loaded = torch.load(io.BytesIO(stream.getvalue()), weights_only=True)
    assert loaded["notes"] == [1]
    assert loaded["weight"].tolist() == [1, 1, 1]
    assert checkpoint_file._PROTOCOL == torch.serialization.DEFAULT_PROTOCOL
