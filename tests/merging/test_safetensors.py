import json

import pytest
import torch

from lightning_eff.merging import safetensors


def test_a_safetensors_file_byte_by_byte(tmp_path):
    safetensors.save(tmp_path / "a.safetensors", {"b": torch.tensor([1, -1], dtype=torch.int8), "a": torch.ones(1)})
    data = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert json.loads(data[8 : 8 + length]) == {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "I8", "shape": [2], "data_offsets": [4, 6]},
    }
    assert data[8 + length :] == b"\x00\x00\x80\x3f\x01\xff"


def tensors_of_every_dtype():
    found = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in safetensors.DTYPES.values()}
    return {**found, "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "turned": torch.randn(3, 2).t()}


def bytes_of(tensor):
    return tensor.reshape(-1).view(torch.uint8).tolist()


def test_safetensors_of_every_dtype_and_shape(tmp_path):
    tensors = tensors_of_every_dtype()
    safetensors.save(tmp_path / "a.safetensors", tensors, {"step": "7"})
    loaded = safetensors.load(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert bytes_of(loaded[name]) == bytes_of(tensor)
    assert safetensors.read_header(tmp_path / "a.safetensors")[1] == {"step": "7"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_package_safetensors_reads_ours_and_we_read_its(tmp_path):
    theirs = pytest.importorskip("safetensors.torch")
    tensors = {name: tensor.contiguous() for name, tensor in tensors_of_every_dtype().items()}
    safetensors.save(tmp_path / "ours.safetensors", tensors, {"step": "7"})
    theirs.save_file(tensors, tmp_path / "theirs.safetensors", {"step": "7"})
    for loaded in (theirs.load_file(tmp_path / "ours.safetensors"), safetensors.load(tmp_path / "theirs.safetensors")):
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert loaded[name].shape == tensor.shape
            assert bytes_of(loaded[name]) == bytes_of(tensor)
