"""The Fabric examples: each does what its page says."""

import re
from math import isfinite

import lightning as L
import pytest
import torch

from examples.fabric import averages, compression, grades, guard, zclip
from harness import REPOSITORY
from lightning_eff.compression import ArcTopK, CompressedReduction


@pytest.fixture(autouse=True)
def _no_seeds_left(monkeypatch):
    """`fabric.seed_everything` leaves these in the environment."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")


def one(**arguments) -> L.Fabric:
    return L.Fabric(accelerator="cpu", devices=1, **arguments)


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_zclip_clips_the_bad_batch_and_resumes_exactly(tmp_path):
    unbroken = zclip.train(one())
    assert unbroken["clipped"] == [40]
    assert unbroken["steps"] == 60
    # In the midst of the warm-up, and behind it.
    for step in (5, 30):
        zclip.train(one(), steps=step, checkpoint=tmp_path / f"{step}.ckpt")
        resumed = zclip.train(one(), resume=tmp_path / f"{step}.ckpt")
        assert resumed["clipped"] == [40]
        assert equal(resumed["module"], unbroken["module"])


def test_zclip_sees_unscaled_gradients():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    from lightning.fabric.plugins import MixedPrecision

    plain = zclip.train(one(), steps=12)
    scaled = zclip.train(one(plugins=MixedPrecision("16-mixed", "cpu", scaler)), steps=12)
    assert scaled["norm"] == pytest.approx(plain["norm"], rel=0.05)


def test_grades_freezes_what_has_settled():
    found = grades.train(one())
    assert set(found["frozen"]) == {"0.weight", "2.weight", "4.weight"}
    assert min(found["frozen"].values()) > 100  # the grace period of a quarter
    assert not any(p.requires_grad for name, p in found["module"].named_parameters() if name in found["frozen"])


def test_averages_are_better_at_a_constant_rate_and_the_live_weights_come_back():
    found = averages.train(one())
    losses = found["losses"]
    assert losses["ema"] < losses["live"]
    assert losses["wsm"] < losses["live"]
    assert averages.validation_loss(found["module"]) == losses["live"]


def _compressed():
    import os

    strategy = compression.CompressedDDP(ArcTopK(error_feedback="ef14"), process_group_backend="gloo")
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    found = compression.train(fabric)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
    weights = torch.cat([p.detach().flatten() for p in found["module"].parameters()])
    return weights, found["losses"], found["traffic"], sorted(found["memory"])


def test_compression_sends_less_learns_and_leaves_the_ranks_equal(pool):
    first, second = pool.run(_compressed)
    assert torch.equal(first[0], second[0])
    assert first[2].steps == 40
    assert first[2].bytes_sent < 0.3 * first[2].dense_bytes
    assert first[1][-5:].mean() < 0.5 * first[1][:5].mean()
    assert first[3]  # what was left out is kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compressor": "ArcTopK"}, "compressor='ArcTopK' is not allowed: it must be a Compressor"),
        ({"parameters": torch.nn.Linear(1, 1)}, "parameters=Linear.* is not allowed: it must be a dictionary"),
        ({"step": 3}, "step=3 is not allowed: it must be a function"),
        ({"scale": None}, "scale=None is not allowed: it must be a function"),
    ],
)
def test_a_reduction_meets_bad_input_at_the_door(change, message):
    right = {"compressor": ArcTopK(), "parameters": dict(torch.nn.Linear(1, 1).named_parameters()), "step": lambda: 0}
    CompressedReduction(**right)
    with pytest.raises(ValueError, match=message):
        CompressedReduction(**{**right, **change})


def test_the_guard_goes_back_to_before_the_flip():
    assert not isfinite(guard.train(one(), guarded=False)["loss"])
    found = guard.train(one())
    ((step, why),) = found["alarms"]
    assert 90 < step < 95
    assert why.startswith("nonfinite_loss: the loss is ")
    assert found["loss"] < 0.5


def test_the_page_shows_what_runs():
    page = (REPOSITORY / "docs" / "fabric.md").read_text()
    files = "".join(path.read_text() for path in sorted((REPOSITORY / "examples" / "fabric").glob("*.py")))
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 5
    assert [block for block in blocks if block not in files] == []
