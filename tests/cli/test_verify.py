"""`lightning-eff verify`: whole, cut, flipped, missing."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.serialization import config

from harness.runs import fit
from lightning_eff.callbacks import CheckpointAveraging
from lightning_eff.cli import main
from tests.callbacks.async_checkpoint.runs import Model


@pytest.fixture
def checkpoint(tmp_path):
    """An ordinary one of Lightning's, with rank files beside it."""
    saver = ModelCheckpoint(tmp_path, filename="some")
    fit(Model(), CheckpointAveraging(window=2, every_n_steps=2, save="none"), saver, max_epochs=1)
    return tmp_path / "some.ckpt"


def _flip(path, offset=0.5):
    content = bytearray(path.read_bytes())
    content[int(offset * len(content))] ^= 1
    path.write_bytes(content)


def test_a_whole_checkpoint_and_the_files_of_its_ranks(checkpoint, capsys):
    assert main(["verify", str(checkpoint)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{checkpoint}: whole (")
    assert ".ranks/" in lines[1]
    assert ": whole (" in lines[1]


def test_a_flipped_byte(checkpoint, capsys):
    weight = torch.load(checkpoint, weights_only=True)["state_dict"]["net.0.weight"].numpy().tobytes()
    _flip(checkpoint, checkpoint.read_bytes().find(weight) / len(checkpoint.read_bytes()) + 1e-4)
    torch.load(checkpoint, weights_only=True)  # says nothing
    assert main(["verify", str(checkpoint)]) == 1
    assert "damaged: the checksum of its record archive/data/" in capsys.readouterr().err


def test_a_cut_file_among_others(checkpoint, capsys):
    cut = checkpoint.with_name("cut.ckpt")
    cut.write_bytes(checkpoint.read_bytes()[:3000])
    assert main(["verify", str(checkpoint), str(cut)]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"{cut}: damaged: it is cut off, or no checkpoint: File is not a zip file\n"
    assert "whole" in captured.out


def test_rank_files_that_are_damaged_or_missing(checkpoint, capsys):
    (folder,) = checkpoint.parent.glob("*.ranks")
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-40])
    assert main(["verify", str(checkpoint)]) == 1
    assert f"{file}: damaged: it is cut off" in capsys.readouterr().err
    file.unlink()
    assert main(["verify", str(checkpoint)]) == 1
    assert f"{file}: missing: a run that resumes is without this state" in capsys.readouterr().err
    folder.rmdir()
    assert main(["verify", str(checkpoint)]) == 1
    assert "missing, with the whole folder" in capsys.readouterr().err


def test_a_copy_has_the_files_of_its_original(checkpoint, capsys):
    copy = checkpoint.with_name("copy.ckpt")
    copy.write_bytes(checkpoint.read_bytes())
    assert main(["verify", str(copy)]) == 0
    assert f"{checkpoint}.ranks/" in capsys.readouterr().out


def test_what_is_no_file_or_not_there(tmp_path, capsys):
    assert main(["verify", str(tmp_path), str(tmp_path / "none.ckpt")]) == 1
    captured = capsys.readouterr().err.splitlines()
    assert captured[0].endswith("is a folder, and no checkpoint")
    assert captured[1].endswith("cannot be read: No such file or directory")


def test_without_checksums(tmp_path, capsys):
    with config.patch("save.compute_crc32", False):
        torch.save({"weight": torch.ones(3)}, tmp_path / "some.pt")
    assert main(["verify", str(tmp_path / "some.pt")]) == 0
    assert "written without checksums: a flipped byte would not be seen" in capsys.readouterr().out


def test_objects_of_a_user_are_not_unpickled(tmp_path, capsys):
    torch.save({"weight": torch.ones(3), "user": _Explodes()}, tmp_path / "some.pt")
    assert main(["verify", str(tmp_path / "some.pt")]) == 0
    assert "whole" in capsys.readouterr().out


class _Explodes:
    def __reduce__(self):
        return (_explode, ())


def _explode():
    raise AssertionError("unpickled")
