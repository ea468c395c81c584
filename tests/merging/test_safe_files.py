import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lightning_eff.merging import Merger, open_source, write_merged
from lightning_eff.merging.safe_files import safetensors_bytes, save_safetensors


def tensors_of_every_kind():
    whole = torch.randn(4, 3)
    return {
        "whole": whole,
        "tied": whole,
        "rows": whole[1:3],
        "turned": whole.t(),
        "expanded": torch.ones(1).expand(5),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "other empty": torch.zeros(0),
        "parameter": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        "flags": torch.tensor([True, False]),
    }


def test_what_is_written_is_read(tmp_path):
    tensors, path = tensors_of_every_kind(), tmp_path / "a.safetensors"
    save_safetensors(path, tensors, {"step": "7"})
    source = open_source(path)
    read = {name: source.read(name) for name in source.specs}
    (tmp_path / "b.safetensors").write_bytes(safetensors_bytes(tensors, {}))
    for loaded in (load_file(path), load_file(tmp_path / "b.safetensors"), read):
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor), name
    assert {name: tuple(spec) for name, spec in source.specs.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    assert source.step == 7
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"step": "7"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_file_has_the_permissions_of_any_new_one(tmp_path):
    before = os.umask(0o027)
    try:
        save_safetensors(tmp_path / "a.safetensors", {"w": torch.ones(1)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_dtype_that_the_format_lacks_is_told_before_the_merge(tmp_path):
    torch.save({"w": torch.ones(2, dtype=torch.complex128)}, tmp_path / "a.pt")
    seen = []
    with pytest.raises(ValueError, match=r"w: safetensors has no torch\.complex128"):
        write_merged(Merger([open_source(tmp_path / "a.pt")]), [1.0], tmp_path / "m.safetensors", progress=seen.append)
    assert seen == []
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_what_cannot_be_written_is_an_os_error(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*_):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("lightning_eff.merging.safe_files.save_file", full)
    with pytest.raises(OSError, match=r"a\.safetensors cannot be written: .*No space left"):
        save_safetensors(tmp_path / "a.safetensors", {"w": torch.ones(1)}, {})


@pytest.mark.parametrize("cut", [0, 5, 40, -1])
def test_a_file_cut_short_is_refused(tmp_path, cut):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes({"w": torch.ones(9)}, {})[:cut])
    with pytest.raises(ValueError, match=r"a\.safetensors: it is truncated, or no safetensors file"):
        open_source(path)
