"""Two ranks: they agree on an error and on what is left out, and files of a rank go with their checkpoint."""

from __future__ import annotations

import pytest
import torch

from tests.callbacks.async_checkpoint.ranks import collectives, run


def test_the_files_of_a_rank_stay_as_long_as_their_checkpoint(pool, tmp_path):
    found = pool.run(run, tmp_path)
    assert [each["error"] for each in found] == [None, None]
    assert [each["io"] for each in found] == ["TorchCheckpointIO"] * 2
    assert found[0]["incomplete"] == []
    assert found[1]["wrote"] == []
    for each in found:  # of each rank, and by its thread: no step waits for a file
        assert len(each["beside"]) == 12
        assert {thread.split("_")[0] for _, thread, _ in each["beside"]} == {"checkpoint-writer"}
    names, _, there = zip(*found[1]["beside"], strict=True)
    assert [name.split(".")[0].split("-")[1] for name in names] == [str(number) for number in range(1, 13)]
    assert [name for name in there[0] if name.endswith(".ckpt")] == []  # it waits for the files of rank one
    assert len(found[0]["wrote"]) == 12  # six steps, each with `last`
    assert sorted(found[0]["files"]) == ["last.ckpt", "step=6.ckpt"]
    for name, beside in found[0]["files"].items():
        identity = torch.load(tmp_path / name, weights_only=True)["lightning_eff_rank_state"]["id"]
        assert beside == [f"{identity}.memory.rank{rank}.pt" for rank in (0, 1)]
    resumed = pool.run(run, tmp_path, resume=str(tmp_path / "last.ckpt"))
    assert [each["loaded"] for each in resumed] == [6.0, 106.0]


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_all_ranks_hear_of_an_error(pool, tmp_path, on_error):
    found = pool.run(run, tmp_path, failures=12 if on_error == "raise" else 3, on_error=on_error)
    if on_error == "raise":
        assert found[0]["error"] == found[1]["error"]
        assert "step=1.ckpt could not be written: OSError: [Errno 28] No space left on device" in found[0]["error"]
        assert found[0]["steps"] == found[1]["steps"] < 6  # in one step, and not at the end
    else:
        assert [each["error"] for each in found] == [None, None]
        assert sorted(found[0]["files"]) == ["last.ckpt", "step=6.ckpt"]
        assert found[0]["incomplete"] == []


def test_all_ranks_leave_a_save_out(pool, tmp_path):
    found = pool.run(run, tmp_path, hold=True, when_busy="skip")
    assert found[0]["skipped"] == found[1]["skipped"] >= 6  # of three steps, each with `last`
    assert len(found[0]["wrote"]) + found[0]["skipped"] == 12
    assert found[0]["incomplete"] == []


def test_no_step_gains_a_collective(pool, tmp_path):
    found = {(ours, epochs): pool.run(collectives, tmp_path, ours, epochs)[0] for ours in (0, 1) for epochs in (1, 2)}
    assert found[1, 2] - found[1, 1] == found[0, 2] - found[0, 1] > 0
    assert 0 < found[1, 1] - found[0, 1] <= 4  # two agreements at the end
