from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_eff.kernels.tensor_stats import reference, tensor_stats
from tests.kernels.memory import Poisoned, random_like

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("triton_kernels")


def expected(tensor: Tensor, copy: Tensor) -> list[float]:
    values, old = tensor.double(), copy.double()
    return [values.abs().sum().item(), values.square().sum().item(), (values - old).abs().sum().item()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 1023, 2048, 2051, 16385, 40009])
@pytest.mark.parametrize("shift", [0, 3])
def test_hard_sizes_and_alignments(size: int, shift: int, dtype: torch.dtype, device: torch.device) -> None:
    tensor = Poisoned(random_like((size,), dtype, device), shift)
    copy = Poisoned(random_like((size,), dtype, device, 1))
    right = expected(tensor.tensor, copy.tensor)
    stats = tensor_stats([tensor.tensor], [copy.tensor])
    assert [row.item() for row in stats if row is not None] == pytest.approx(right, rel=1e-5)
    assert torch.equal(copy.tensor, tensor.tensor)
    tensor.check()
    copy.check()


def test_each_tensor_of_a_mixed_list_has_its_own_numbers(device: torch.device) -> None:
    shapes = [(7, 11), (0,), (1,), (20011,), (3, 0), (), (16384,), (300, 70)]
    tensors = [random_like(shape, DTYPES[index % 3], device, index) for index, shape in enumerate(shapes)]
    copies = [random_like(shape, DTYPES[index % 3], device, index + 50) for index, shape in enumerate(shapes)]
    right = [expected(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True)]
    stats = tensor_stats(tensors, copies)
    assert stats.change_l1 is not None
    for index, (l1, squared_l2, change) in enumerate(right):
        assert stats.l1[index].item() == pytest.approx(l1, rel=1e-5)
        assert stats.squared_l2[index].item() == pytest.approx(squared_l2, rel=1e-5)
        assert stats.change_l1[index].item() == pytest.approx(change, rel=1e-5)
    assert tensor_stats(tensors, copies).change_l1.tolist() == [0.0] * len(shapes)  # type: ignore[union-attr]
    again = tensor_stats(tensors)
    assert again.change_l1 is None
    assert torch.equal(again.l1, stats.l1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 2048, 16385, 40009])
def test_extremes_of_hard_sizes_and_alignments(size: int, dtype: torch.dtype, device: torch.device) -> None:
    """What lies around a tensor, and what a masked load has in place of it, is neither zero nor not finite here."""
    plain = random_like((size,), dtype, device)
    plain[::3] = 0.0
    plain[::100] = -0.0
    tensor = Poisoned(plain, 3)
    stats = tensor_stats([tensor.tensor], extremes=True)
    assert stats.largest.item() == plain.double().abs().max().item()  # type: ignore[union-attr]
    assert stats.zeros.item() == (plain == 0).sum().item()  # type: ignore[union-attr]
    assert stats.nonfinite.item() == 0  # type: ignore[union-attr]
    assert stats.l1.item() == pytest.approx(plain.double().abs().sum().item(), rel=1e-5)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_extremes_of_a_mixed_list(implementation: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_EFF_KERNELS", implementation)
    tensors = [random_like((n,), DTYPES[n % 3], device, n) for n in (4, 5, 20011, 0, 6, 40, 40)]
    tensors[2][17], tensors[2][20010] = math.nan, -math.inf
    tensors[4][:] = math.nan
    tensors[5][:] = 0.0
    right = [tensor.double() for tensor in tensors]
    stats = tensor_stats(tensors, extremes=True)
    numbers = [float(one[~one.isnan()].abs().max()) if (~one.isnan()).any() else 0.0 for one in right]
    assert stats.largest.tolist() == numbers  # type: ignore[union-attr]
    assert stats.zeros.tolist() == [0, 0, 0, 0, 0, 40, 0]  # type: ignore[union-attr]
    assert stats.nonfinite.tolist() == [0, 0, 2, 0, 6, 0, 0]  # type: ignore[union-attr]
    assert stats.change_l1 is None
    assert [row is None for row in tensor_stats(tensors)] == [False, False, True, True, True, True]


@pytest.mark.parametrize("update", [True, False])
def test_copies_change_only_where_the_flag_says_so(update: bool, device: torch.device) -> None:
    tensor, copy = random_like((5000,), torch.bfloat16, device), random_like((5000,), torch.bfloat16, device, 1)
    old = copy.clone()
    stats = tensor_stats([tensor], [copy], update=torch.tensor(update, device=device))
    assert torch.equal(copy, tensor if update else old)
    assert stats.change_l1 is not None
    assert stats.change_l1.item() == pytest.approx(expected(tensor, old)[2], rel=1e-5)


def test_a_non_finite_tensor_shows_in_its_own_numbers_only(device: torch.device) -> None:
    good, bad = random_like((5000,), torch.float32, device), random_like((5000,), torch.float32, device)
    bad[4999] = math.nan
    stats = tensor_stats([good, bad, good])
    assert stats.l1.isfinite().tolist() == [True, False, True]
    assert stats.squared_l2.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_reference_gives_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_EFF_KERNELS", "reference")
    tensor = random_like((6, 50), dtype, torch.device("cpu"))
    copy = random_like((6, 50), dtype, torch.device("cpu"), 1)
    right = expected(tensor, copy)
    stats = tensor_stats([tensor.T], [copy.T], update=torch.tensor(0))
    assert [row.item() for row in stats if row is not None] == pytest.approx(right, rel=1e-5)
    tensor_stats([tensor.T], [copy.T])
    assert torch.equal(copy, tensor)


def test_bad_input_is_named(device: torch.device) -> None:
    one = torch.ones(3, device=device)
    with pytest.raises(ValueError, match="1 copies for 2 tensors"):
        tensor_stats([one, one], [one])
    with pytest.raises(ValueError, match=r"copy 0 of shape \(4,\) and torch.float32 does not fit"):
        tensor_stats([one], [torch.ones(4, device=device)])
    with pytest.raises(ValueError, match=r"copy 0 of shape \(3,\) and torch.float16 does not fit"):
        tensor_stats([one], [one.half()])
    with pytest.raises(ValueError, match="copy 0 on meta"):
        tensor_stats([one], [torch.ones(3, device="meta")])
    with pytest.raises(ValueError, match=r"update of shape \(2,\)"):
        tensor_stats([one], [one.clone()], update=torch.ones(2, device=device))
    with pytest.raises(RuntimeError, match=r"copy 0 has strides \(1, 2\), its tensor \(3, 1\)"):
        tensor_stats([torch.ones(2, 3, device=device)], [torch.ones(3, 2, device=device).T])
    with pytest.raises(TypeError, match="tensor 0 of shape"):
        tensor_stats([one.int()])


def test_an_empty_list_has_no_numbers() -> None:
    assert [len(row) for row in tensor_stats([], []) if row is not None] == [0, 0, 0]


@pytest.mark.parametrize("odd", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_takes_a_large_tensor_in_blocks(monkeypatch, dtype, odd):
    monkeypatch.setenv("LIGHTNING_EFF_KERNELS", "reference")
    size = 2 * reference.BLOCK + 4099
    values = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[::7] = 0
    values[-1] = -9.0
    if odd:
        values[5], values[reference.BLOCK + 1] = float("nan"), float("-inf")
    exact = values.double()
    stats = tensor_stats([values, values[:10]], extremes=True)
    assert stats.zeros[0] == (exact == 0).sum()
    assert stats.nonfinite[0] == 2 * odd
    assert stats.largest[0] == (float("inf") if odd else 9.0)
    if odd:
        assert stats.l1[0].isnan()
        assert stats.squared_l2[0].isnan()
    else:
        assert stats.l1[0].item() == pytest.approx(exact.abs().sum().item(), rel=3e-6)
        assert stats.squared_l2[0].item() == pytest.approx(exact.square().sum().item(), rel=3e-6)
