"""A folder of shards: whole, flipped, cut, without a part, and with a pickle that is none of torch's."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_eff.cli import main
from lightning_eff.plugins.sharded_folder import folder_damage


@pytest.fixture
def folder(tmp_path):
    """Of one rank; each tensor is found again by its bytes."""
    path = tmp_path / "some.ckpt"
    weights = {"weight": torch.full((40, 30), 3.0), "half": torch.full((500,), 5.0, dtype=torch.bfloat16)}
    optimizer = {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["weight"]}]}
    save({"state_dict": weights, "optimizer_0": optimizer}, checkpoint_id=path, no_dist=True)
    torch.save({"global_step": 3, "notes": torch.full((100,), 7.0)}, path / "meta.pt")
    return path


def _flip(path, content):
    whole = bytearray(path.read_bytes())
    place = whole.find(
        content.numpy().tobytes() if content.dtype != torch.bfloat16 else bytes(content.view(torch.uint8))
    )
    assert place > 0
    whole[place + 41] ^= 1
    path.write_bytes(whole)


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_a_whole_one(folder, capsys):
    assert folder_damage(str(folder)) is None
    assert main(["verify", str(folder)]) == 0
    assert capsys.readouterr().out.startswith(f"{folder}: whole (")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("__0_0.distcp", torch.full((1200,), 3.0)),
        ("__0_0.distcp", torch.full((500,), 5.0, dtype=torch.bfloat16)),
        ("meta.pt", torch.full((100,), 7.0)),
    ],
)
def test_a_flipped_bit(folder, file, content, capsys):
    _flip(folder / file, content)
    found = folder_damage(str(folder))
    assert found.startswith(f"its {file}: the checksum of")
    assert main(["verify", str(folder)]) == 1
    assert capsys.readouterr().err == f"{folder}: damaged: {found}\n"
    if file != "meta.pt":
        assert folder_damage(str(folder), part=1, parts=2) is None  # another rank's part of the work


@pytest.mark.parametrize("file", ["__0_0.distcp", "meta.pt", ".metadata"])
def test_what_is_cut_or_missing(folder, file):
    content = (folder / file).read_bytes()
    for size in (0, 50, len(content) // 2, len(content) - 1):
        (folder / file).write_bytes(content[:size])
        assert file in folder_damage(str(folder))
    (folder / file).unlink()
    assert "missing" in folder_damage(str(folder))
    assert main(["verify", str(folder)]) == 1


class _Runs:
    def __reduce__(self):
        return os.system, ("touch it_has_run",)


@pytest.mark.parametrize("evil", [_Runs(), torch.load, torch.distributed.checkpoint.FileSystemWriter])
def test_nothing_else_is_unpickled(folder, evil, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(evil))
    assert "its .metadata is damaged: it names" in folder_damage(str(folder))
    assert not (folder / "it_has_run").exists()
