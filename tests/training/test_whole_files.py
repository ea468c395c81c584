import errno
import os

import pytest
import torch

from lightning_eff.training.whole_files import Attempts, whole_file


def test_a_failure_leaves_the_file_of_before_and_nothing_beside(tmp_path):
    path = tmp_path / "deep" / "state"
    with whole_file(path) as part, open(part, "w") as file:
        file.write("first")
    with pytest.raises(ZeroDivisionError), whole_file(path) as part, open(part, "w") as file:
        file.write("half" * (1 // 0))
    assert path.read_text() == "first"
    assert [found.name for found in path.parent.iterdir()] == ["state"]


def test_who_slept_while_it_wrote_does_not_write_into_what_another_has_written(tmp_path):
    path = tmp_path / "state"
    sleeper = open(f"{path}.part", "w")  # noqa: SIM115
    sleeper.write("half of it")
    with whole_file(path) as part, open(part, "w") as file:
        file.write("whole")
    with sleeper:
        sleeper.write(", and the rest, which is longer")
    assert path.read_text() == "whole"


@pytest.mark.parametrize("written", ["~/deep/state", "file://{}/deep/state"])
def test_a_path_as_lightning_takes_it(tmp_path, monkeypatch, written):
    monkeypatch.setenv("HOME", str(tmp_path))
    with whole_file(written.format(tmp_path)) as part, open(part, "w") as file:
        file.write("whole")
    assert (tmp_path / "deep" / "state").read_text() == "whole"


def test_remote_file_systems_too(tmp_path):
    with whole_file("memory://whole/state") as part:
        import fsspec

        with fsspec.open(part, "wb") as file:
            file.write(b"complete")
    fs = fsspec.filesystem("memory")
    assert [path.rpartition("/")[2] for path in fs.ls("/whole", detail=False)] == ["state"]
    fs.rm("/whole", recursive=True)


def test_a_failing_disk_is_said_once_for_each_spell():
    attempts, full = Attempts("the average", "the previous one stays"), True

    def write():
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.warns(UserWarning, match=r"the average could not be written .*No space left.*the previous one stays"):
        assert attempts(write) is False
    assert attempts(write) is False  # silent: warnings are errors here
    full = False
    assert attempts(write) is True
    full = True
    with pytest.warns(UserWarning, match="the average could not be written"):
        assert attempts(write) is False


def test_what_is_no_matter_of_a_disk_is_raised():
    with pytest.raises(ZeroDivisionError):
        Attempts("x", "y")(lambda: 1 / 0)


def test_the_disk_s_error_behind_another_one_is_found():
    attempts = Attempts("the average", "the previous one stays")

    def save_to_a_full_disk():
        with open("/dev/full", "wb") as file:  # torch.save ends in a RuntimeError about the file's end
            torch.save({"a": torch.zeros(1_000_000)}, file)

    with pytest.warns(UserWarning, match="No space left on device"):
        assert not attempts(save_to_a_full_disk)
    try:
        raise OSError("what the run has broken on")
    except OSError:
        with pytest.raises(ZeroDivisionError):
            attempts(lambda: 1 / 0)  # which has nothing to do with it


def test_the_name_reaches_the_disk_behind_the_content(tmp_path, monkeypatch):
    synced = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    with whole_file(tmp_path / "state") as part, open(part, "w") as file:
        file.write("complete")
    assert synced == [str(tmp_path / "state.part"), str(tmp_path)]
