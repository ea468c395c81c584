"""Two ranks that save their shards: by Lightning's strategy as users have it, and by ours."""

from __future__ import annotations

import pytest
import torch

from tests.callbacks.async_checkpoint import sharded


@pytest.mark.parametrize("strategy", ["by hand", "fsdp2", pytest.param("fsdp2, at once", marks=pytest.mark.slow)])
def test_shards_are_saved_later_and_lightning_resumes_from_them(pool, tmp_path, strategy):
    found = pool.run(sharded.run, tmp_path, strategy, hold=True, last="link")
    resumed = pool.run(sharded.resumed, tmp_path, strategy)
    whole = pool.run(sharded.run, tmp_path / "whole", strategy, steps=6)
    for each, again, unbroken in zip(found, resumed, whole, strict=True):
        assert (each["error"], each["threads"], each["incomplete"]) == (None, [], [])
        assert each["seen"] == []  # training did not wait
        assert each["names"] == ["last.ckpt", "step=3.ckpt"]
        assert each["links"] == {"last.ckpt": "step=3.ckpt"}
        assert each["own"] == ([] if strategy == "by hand" else ["sharded_saves"])
        torch.testing.assert_close(again["losses"], unbroken["losses"][3:], rtol=1e-6, atol=0)
    assert [each["loaded"] for each in resumed] == [3.0, 103.0]  # of each rank its own


@pytest.mark.parametrize("ours", [False, True], ids=["strategy", "callback"])
@pytest.mark.parametrize(
    ("hook", "manual"),
    [
        ("on_train_batch_end", False),
        ("on_train_batch_end", "raw"),
        pytest.param("on_train_batch_end", True, marks=pytest.mark.slow),
        ("on_validation_end", False),
        pytest.param("on_train_epoch_end", False, marks=pytest.mark.slow),
    ],
)
def test_what_is_copied_while_training_goes_on_is_of_the_moment_of_the_save(pool, tmp_path, ours, hook, manual):
    for found in pool.run(sharded.of_the_moment, tmp_path, ours, hook, manual):
        assert (found["error"], found["wrong"]) == (None, [])
        assert found["saves"][0] == found["saves"][1] >= 2
        # All but the first save of a kind, which is looked at, and those behind which anybody may write.
        assert found["late"] == {"on_train_batch_end": 3, "on_validation_end": int(ours)}.get(hook, 0)


@pytest.mark.parametrize("ours", [False, True], ids=["strategy", "callback"])
def test_weights_that_others_write_are_copied_at_once_and_a_copy_that_met_one_is_no_checkpoint(pool, tmp_path, ours):
    for folder, writes in ((tmp_path / "first", 0), (tmp_path / "later", 3)):
        for found in pool.run(sharded.of_the_moment, folder, ours, "on_train_batch_end", writes=writes):
            assert found["wrong"] == []
            assert found["late"] > 0
            if writes == 0:
                assert found["error"] is None
            else:
                assert "3.ckpt could not be written" in found["error"]
                assert "before_weights_change" in found["error"]


@pytest.mark.parametrize("on_error", ["raise", pytest.param("warn", marks=pytest.mark.slow)])
def test_all_ranks_hear_of_an_error_of_one(pool, tmp_path, on_error):
    found = pool.run(sharded.run, tmp_path, "by hand", failures=3, on_error=on_error, last=None, steps=4)
    assert found[0]["error"] == found[1]["error"]
    if on_error == "raise":
        assert "step=1.ckpt could not be written in 3 attempts: OSError: rank 1: [Errno 28]" in found[0]["error"]
        assert len(found[0]["losses"]) == len(found[1]["losses"]) == 2  # inside the next save
        assert found[0]["names"] == []
    else:
        assert found[0]["error"] is None
        assert found[0]["names"] == ["step=4.ckpt"]


@pytest.mark.slow
def test_a_disk_that_recovers_is_tried_again(pool, tmp_path):
    found = pool.run(sharded.run, tmp_path, "by hand", failures=2, last=None)
    assert [each["error"] for each in found] == [None, None]
    assert found[0]["names"] == ["step=3.ckpt"]


def test_all_ranks_leave_a_save_out(pool, tmp_path):
    found = pool.run(sharded.run, tmp_path, "fsdp2", hold=True, when_busy="skip", last=None)
    assert found[0]["skipped"] == found[1]["skipped"]
    assert found[0]["error"] is None
    assert found[0]["names"] in (["step=2.ckpt"], ["step=3.ckpt"])  # the third may find a buffer that is just free


def test_averages_lie_beside_the_folders(pool, tmp_path):
    plain = pool.run(sharded.averaged, tmp_path / "plain", False)[0]
    ours = pool.run(sharded.averaged, tmp_path / "ours", True)[0]
    assert sorted(ours) == sorted(plain) == [f"ema-step={step}.ckpt" for step in (1, 2, 3)]
    for name, weights in plain.items():
        assert all(torch.equal(ours[name][key], weight) for key, weight in weights.items())


def test_under_the_other_name_of_lightning(pool, tmp_path):
    for first, second, names, wrapped in pool.run(sharded.under_the_other_name, tmp_path):
        assert names == ["last.ckpt", "step=3.ckpt"]
        assert wrapped == ["sharded_saves", "save_checkpoint"]
        torch.testing.assert_close(second[:2], first[3:], rtol=1e-6, atol=0)


def test_a_changed_byte_of_one_rank_is_found_by_all_before_they_load(pool, tmp_path):
    first, second = pool.run(sharded.damaged, tmp_path)
    assert "step=3.ckpt is damaged: its __0_0.distcp: " in first
    assert "step=3.ckpt is damaged: another rank has found it" in second
