from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_eff.kernels.alignment import alignment_stats
from tests.kernels.memory import Poisoned, random_like

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(x: Tensor, v: Tensor) -> Tensor:
    """Alignments in float64, of shape (tokens,)."""
    values = x.double().flatten(0, -2)
    return values @ v.double() / (values.norm(dim=1) + 1e-6)


def assert_histogram(histogram: Tensor, alignment: Tensor, bins: int) -> None:
    """Right up to tokens so close to an edge that float32 may put them on either side."""
    places = (alignment + 1) * bins / 2
    close = int(((places - places.round()).abs() < 1e-3).sum())
    right = torch.histc(alignment.cpu(), bins, -1, 1)
    assert histogram.sum().item() == len(alignment)
    assert (histogram.cpu() - right).abs().sum().item() <= 2 * close


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (15, 63), (16, 128), (17, 1023), (33, 256), (2, 3, 5, 64)])
@pytest.mark.parametrize("shift", [0, 1])
def test_hard_shapes(shape: tuple[int, ...], shift: int, dtype: torch.dtype, device: torch.device) -> None:
    x = Poisoned(random_like(shape, dtype, device), shift)
    v = torch.nn.functional.normalize(random_like(shape[-1:], torch.float32, device, 1), dim=0)
    alignment = exact(x.tensor, v)
    stats = alignment_stats(x.tensor, v, bins=20)
    assert stats.positive.item() == (alignment > 0).sum()
    assert stats.negative.item() == (alignment < 0).sum()
    assert (stats.zero.item(), stats.nonfinite.item()) == (0, 0)
    assert_histogram(stats.histogram, alignment, 20)
    x.check()


@pytest.mark.usefixtures("triton_kernels")
def test_padding_and_broken_tokens_are_counted_apart(device: torch.device) -> None:
    x = random_like((50, 33), torch.float32, device)
    x[3], x[7, 5], x[8, 32] = 0.0, math.nan, math.inf
    x[9] = 0.0
    x[9, 0], x[9, 1] = 1.0, -1.0
    x[10, 0] = 1e20  # its square overflows
    v = torch.full((33,), 33**-0.5, device=device)
    stats = alignment_stats(x, v, bins=1)
    assert (stats.zero.item(), stats.nonfinite.item()) == (2, 3)
    assert stats.positive.item() + stats.negative.item() == 45
    assert stats.histogram.tolist() == [47]


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("bins", [1, 2, 32, 252])
def test_the_ends_of_the_histogram_hold_what_lies_beyond(bins: int, device: torch.device) -> None:
    x = torch.tensor([[5.0], [-5.0], [5.0]], device=device)
    stats = alignment_stats(x, torch.tensor([2.0], device=device), bins=bins)
    assert stats.histogram[-1].item() + (stats.histogram[0].item() if bins > 1 else 0) == 3
    assert (stats.positive.item(), stats.negative.item()) == (2, 1)


@pytest.mark.usefixtures("triton_kernels")
def test_rows_with_a_stride_are_read_where_they_are(device: torch.device) -> None:
    wide = torch.full((40, 100), math.nan, device=device)
    wide[:, 10:74] = random_like((40, 64), torch.float32, device)
    v = torch.nn.functional.normalize(random_like((64,), torch.float32, device, 1), dim=0)
    stats = alignment_stats(wide[:, 10:74], v)
    assert stats.positive.item() == (exact(wide[:, 10:74], v) > 0).sum()
    assert stats.nonfinite.item() == 0
    with pytest.raises(RuntimeError, match=r"x of shape \(64, 64\) has strides \(1, 64\)"):
        alignment_stats(random_like((64, 64), torch.float32, device).T, v)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_reference_gives_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_EFF_KERNELS", "reference")
    x = random_like((48, 100), dtype, torch.device("cpu")).T
    v = torch.nn.functional.normalize(random_like((48,), dtype, torch.device("cpu"), 1), dim=0)
    stats = alignment_stats(x, v)
    assert stats.positive.item() == (exact(x, v) > 0).sum()
    assert_histogram(stats.histogram, exact(x, v), 32)


@pytest.mark.usefixtures("triton_kernels")
def test_no_tokens_are_no_counts(device: torch.device) -> None:
    stats = alignment_stats(torch.zeros(0, 5, device=device), torch.ones(5, device=device), bins=3)
    assert stats.histogram.tolist() == [0, 0, 0]
    assert stats.positive.item() == 0


@pytest.mark.usefixtures("triton_kernels")
def test_bad_input_is_named(device: torch.device) -> None:
    x, v = torch.ones(3, 4, device=device), torch.ones(4, device=device)
    with pytest.raises(ValueError, match=r"x of shape \(3, 4\) and v of shape \(3,\)"):
        alignment_stats(x, v[:3])
    with pytest.raises(ValueError, match="bins=0 is not allowed"):
        alignment_stats(x, v, bins=0)
    with pytest.raises(ValueError, match="eps=0 is not allowed"):
        alignment_stats(x, v, eps=0)
    with pytest.raises(ValueError, match="1 on meta"):
        alignment_stats(x, v.to("meta"))
    with pytest.raises(TypeError, match="tensor 0 of shape"):
        alignment_stats(x.int(), v)
    with pytest.raises(RuntimeError, match=r"x has dtype torch.float64"):
        alignment_stats(x.double(), v)
