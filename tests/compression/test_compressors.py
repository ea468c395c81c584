"""Each of the other compressors against its definition, and all of them against what they promise in bytes."""

from __future__ import annotations

import pytest
import torch

from harness.operators import OperatorCounter
from lightning_eff.compression import (
    BF16,
    FP16,
    AllReduce,
    ArcTopK,
    Compressor,
    Int8,
    PowerSGD,
    RandK,
    TopK,
    all_compressors,
    predict,
)
from lightning_eff.compression.compressors.randk import _draw
from lightning_eff.compression.in_process import InProcessRanks
from lightning_eff.kernels.philox import philox_words
from tests.compression.ranks import gradients, mean

SHAPES = {"w": (40, 30), "b": (40,)}


def average(compressor: Compressor, own, **arguments):
    return InProcessRanks(compressor, len(own)).average(own, **arguments)


@pytest.mark.parametrize("world_size", [2, 3])
def test_topk_sums_what_each_rank_has_chosen(world_size):
    own = gradients(0, world_size, SHAPES)
    found = average(TopK(ratio=0.1, error_feedback="none", min_numel=1), own)
    expected = torch.zeros(1200, dtype=torch.float64)
    for part in own:
        flat = part["w"].flatten()
        places = flat.abs().topk(120).indices
        expected[places] += flat[places].double() / world_size
    torch.testing.assert_close(found[0]["w"].flatten().double(), expected)
    for other in found[1:]:
        assert torch.equal(other["w"], found[0]["w"])
    torch.testing.assert_close(found[0]["b"].double(), mean(own)["b"])


def test_randk_draws_every_element_alike_and_none_twice():
    compressor = RandK(ratio=0.07, error_feedback="none", min_numel=1)
    ranks, counts, steps = InProcessRanks(compressor, 2), torch.zeros(1200), 3000
    ones = [{"w": torch.ones(40, 30)}] * 2
    for _ in range(steps):
        found = ranks.average(ones)[0]["w"].flatten()
        assert found.count_nonzero() == 84
        counts += found
    # Unbiased: each is drawn with probability 0.07 and scaled by 1 / 0.07; the deviation of a mean is 0.067.
    torch.testing.assert_close(counts / steps, torch.ones(1200), atol=5 * 0.067, rtol=0)
    assert (counts / steps).std() < 0.08


def test_randk_draws_evenly_within_its_runs_and_between_them():
    """The places of one draw, shifted back: a uniform one in each run, independent of the next run's."""
    runs, length = 4096, 16
    counts = torch.zeros(length, length)
    for step in range(40):
        places = _draw(runs * length, runs, seed=step, stream=9, device=torch.device("cpu"))
        assert len(places.unique()) == runs
        shift = philox_words(step, 9, runs + 1, places.device)[-1] * (runs * length) >> 32
        offsets = (places - shift) % length
        assert torch.equal((places - shift) % (runs * length) // length, torch.arange(runs))
        counts.index_put_((offsets[:-1], offsets[1:]), torch.ones(runs - 1), accumulate=True)
    expected = 40 * (runs - 1) / length**2
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - 255) < 4 * (2 * 255) ** 0.5  # 255 degrees of freedom


def test_randk_draws_on_the_device_without_a_blocking_copy():
    """The meta device stands for a GPU."""
    with OperatorCounter() as counter:
        places = _draw(1000, 100, seed=1, stream=2, device=torch.device("meta"))
    assert places.device.type == "meta"
    assert counter.host_syncs == 0, counter.waits


def test_randk_without_scale_under_error_feedback():
    found = average(RandK(ratio=0.25, error_feedback="ef14", min_numel=1), [{"w": torch.full((40, 30), 3.0)}] * 2)
    assert set(found[0]["w"].unique().tolist()) == {0.0, 3.0}


def test_powersgd_projects_the_mean():
    """P P' G with an orthonormal P that spans the columns of G Q; a matrix of rank r comes through whole."""
    own = gradients(1, 2, SHAPES)
    found = average(PowerSGD(rank=3, error_feedback="none", min_numel=1), own)[0]["w"].double()
    exact = mean(own)["w"]
    assert torch.linalg.matrix_rank(found, rtol=1e-5) == 3
    U = torch.linalg.svd(found).U[:, :3]
    torch.testing.assert_close(found, U @ U.T @ exact, rtol=1e-4, atol=1e-4)
    low = torch.randn(40, 3) @ torch.randn(3, 30)
    found = average(PowerSGD(rank=3, min_numel=1), [{"w": low}, {"w": low}])[0]["w"]
    torch.testing.assert_close(found, low, rtol=1e-4, atol=1e-4)


def test_powersgd_learns_the_leading_subspace():
    own = gradients(2, 2, {"w": (64, 48)})
    exact = mean(own)["w"]
    best = torch.linalg.svdvals(exact)[4:].norm() / exact.norm()
    ranks = InProcessRanks(PowerSGD(rank=4, error_feedback="none", min_numel=1), 2)
    errors = [float((ranks.average(own)[0]["w"].double() - exact).norm() / exact.norm()) for _ in range(40)]
    assert errors[0] > 1.02 * best
    assert errors[-1] < 1.002 * best


def test_powersgd_survives_a_gradient_of_zeros():
    ranks = InProcessRanks(PowerSGD(rank=2, min_numel=1), 2)
    ranks.average([{"w": torch.zeros(40, 30)}] * 2)
    low = torch.randn(40, 2) @ torch.randn(2, 30)
    torch.testing.assert_close(ranks.average([{"w": low}] * 2)[0]["w"], low, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powersgd_sends_a_matrix_with_a_side_below_its_rank_whole(dtype):
    shapes = {"narrow": (2000, 3), "low": (3, 2000), "w": (100, 90)}
    assert predict(PowerSGD(), shapes, 2, dtype).compressed == ("w",)
    own = [{name: tensor.to(dtype) for name, tensor in part.items()} for part in gradients(1, 2, shapes)]
    found = average(PowerSGD(), own)
    for name in ("narrow", "low"):
        torch.testing.assert_close(found[0][name].double(), mean(own)[name])


def test_powersgd_takes_another_rank_than_its_memory_has():
    """As after a resume: Q is new, and the error of before is kept."""
    own, ranks = gradients(1, 2, SHAPES), InProcessRanks(PowerSGD(rank=1, min_numel=1), 2)
    ranks.average(own)
    error = ranks.memories[0]["w"]["error"].clone()
    ranks.compressor = PowerSGD(rank=3, min_numel=1)
    found = ranks.average([{name: torch.zeros_like(tensor) for name, tensor in part.items()} for part in own])[0]["w"]
    assert torch.linalg.matrix_rank(found, rtol=1e-4) == 3
    assert ranks.memories[0]["w"]["q"].shape == (30, 3)
    torch.testing.assert_close(found + ranks.memories[0]["w"]["error"], error)


@pytest.mark.parametrize("world_size", [2, 3])
def test_int8_is_unbiased_and_close(world_size):
    own = gradients(3, world_size, SHAPES)
    exact = mean(own)
    ranks = InProcessRanks(Int8(block_size=64), world_size)
    total, steps = torch.zeros(40, 30, dtype=torch.float64), 400
    for _ in range(steps):
        found = ranks.average(own)
        assert all(torch.equal(found[0][name], other[name]) for other in found for name in SHAPES)
        total += found[0]["w"]
        # Each rounding is off by less than one step of its block's scale, twice.
        step = max(float(part["w"].abs().max()) for part in own) / 127
        assert (found[0]["w"] - exact["w"]).abs().max() < 2 * step
    assert (total / steps - exact["w"]).abs().max() < 0.25 * step


def test_int8_shows_an_infinity():
    own = gradients(3, 2, SHAPES)
    own[1]["w"][3, 3] = torch.inf
    assert not average(Int8(), own)[0]["w"].isfinite().all()


def test_fp16_divides_before_the_cast():
    own = [{"w": torch.full((8, 8), 60000.0)}] * 3
    assert torch.equal(average(FP16(), own)[0]["w"], torch.full((8, 8), 60000.0))


@pytest.mark.parametrize(("compressor", "rtol"), [(FP16(), 2e-3), (BF16(), 2e-2)], ids=["fp16", "bf16"])
def test_16_bits_are_close(compressor, rtol):
    own = gradients(4, 3, SHAPES)
    for name, exact in mean(own).items():
        torch.testing.assert_close(average(compressor, own)[0][name].double(), exact, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("compressor", all_compressors().values(), ids=all_compressors().keys())
def test_gradients_of_other_dtypes(compressor, dtype):
    """Ranks agree, and the dense part is the mean."""
    shapes = {"w": (100, 90), "b": (40,)}
    own = [{name: tensor.to(dtype) for name, tensor in part.items()} for part in gradients(5, 2, shapes)]
    found = average(compressor, own)
    for name in shapes:
        assert found[0][name].dtype == dtype
        assert torch.equal(found[0][name], found[1][name])
        assert found[0][name].isfinite().all()
    torch.testing.assert_close(found[0]["b"].double(), mean(own)["b"], rtol=0.02, atol=0.05)


GPT = {
    **{f"h.{i}.qkv": (960, 320) for i in range(3)},
    **{f"h.{i}.mlp": (1280, 320) for i in range(3)},
    **{f"h.{i}.norm": (320,) for i in range(3)},
    "conv": (64, 32, 3, 3),
    "tiny": (10, 10),
}


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("compressor", all_compressors().values(), ids=all_compressors().keys())
def test_bytes_are_those_that_were_predicted(compressor, world_size):
    ranks = InProcessRanks(compressor, world_size)
    ranks.average(gradients(0, world_size, GPT))
    prediction = predict(compressor, GPT, world_size)
    # Rand-K sends a number that tells whether all is finite, ARC-Top-K three that tell whether all send the same rows;
    # Int8 pads each bucket, and here there is one.
    exact = not isinstance(compressor, ArcTopK | Int8 | RandK)
    assert ranks.bytes_sent == pytest.approx(prediction.bytes_sent, rel=1e-12 if exact else 1e-3)
    assert prediction.bytes_sent < prediction.dense_bytes
    assert set(prediction.compressed) | set(prediction.dense) == GPT.keys()


def test_predictions():
    # A position embedding is a matrix of its positions.
    assert predict(ArcTopK(), {"position": (1, 512, 64)}, 2).compressed == ("position",)
    # Int8 pads each bucket to whole blocks for each rank: 1001 numbers to 4 x 256 on two ranks.
    assert predict(Int8(), {"w": (1001,)}, 2).bytes_sent == 2 * 1 / 2 * 4 * (256 + 4)
    assert predict(ArcTopK(), GPT, 2).dense == ("h.0.norm", "h.1.norm", "h.2.norm", "tiny")
    assert predict(BF16(), GPT, 2).ratio == 2.0
    # An all-gather grows with the ranks: near 1 / ratio of them it does not pay.
    assert predict(TopK(ratio=0.1), GPT, 9).compressed
    assert not predict(TopK(ratio=0.1), GPT, 10).compressed
    assert not predict(ArcTopK(ratio=0.9), {"w": (1000, 1000)}, 2).compressed
    # A sketch as wide as the matrix does not pay either.
    assert not predict(ArcTopK(rank=16), {"w": (1000, 16)}, 2).compressed
    assert predict(ArcTopK(), GPT, 1).bytes_sent == 0


@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        (TopK, {"ratio": 0.0}), (RandK, {"ratio": 1.5}), (PowerSGD, {"rank": 0}),
        (PowerSGD, {"error_feedback": "ef21"}), (Int8, {"block_size": 6}), (FP16, {"start_step": -1}),
    ],
)  # fmt: skip
def test_bad_arguments(build, arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=name) as caught:
        build(**arguments)
    assert repr(value) in str(caught.value)


class Talkative(ArcTopK):
    """Yields once more than it says."""

    def exchange(self, bucket):
        yield from super().exchange(bucket)
        yield AllReduce(torch.zeros(1))


def test_a_compressor_that_yields_too_often_is_told():
    with pytest.raises(RuntimeError, match=r"Talkative\.exchange yields more than collectives=2"):
        average(Talkative(min_numel=1), gradients(0, 2, {"w": (200, 100)}))
