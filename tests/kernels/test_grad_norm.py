from __future__ import annotations

import math

import pytest
import torch

from lightning_eff.kernels import grad_norm, tables
from tests.kernels.memory import Poisoned, random_like

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 63, 1023, 4096, 4099, 16384, 16385, 40009]  # around a block of 4096 and a chunk of 16384

pytestmark = pytest.mark.usefixtures("triton_kernels")


def exact(tensors: list[torch.Tensor]) -> float:
    return math.fsum(tensor.double().square().sum().item() for tensor in tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sum_of_squares_is_right_for_hard_sizes(size: int, dtype: torch.dtype, device: torch.device) -> None:
    values = Poisoned(random_like((size,), dtype, device))
    total = grad_norm.sum_of_squares([values.tensor])
    assert total.dtype == torch.float64
    assert total.item() == pytest.approx(exact([values.tensor]), rel=1e-6)
    values.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [1, 2, 3, 7])
def test_an_unaligned_view_gives_the_bits_of_an_aligned_one(
    shift: int, dtype: torch.dtype, device: torch.device
) -> None:
    values = random_like((20011,), dtype, device)
    aligned, unaligned = Poisoned(values), Poisoned(values, shift)
    total = grad_norm.sum_of_squares([unaligned.tensor])
    assert total.item() == grad_norm.sum_of_squares([aligned.tensor]).item()
    assert total.item() == pytest.approx(exact([values]), rel=1e-6)


def test_a_mixed_list_is_one_sum_in_a_constant_number_of_launches(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    from lightning_eff.kernels.grad_norm import kernel

    launches = []

    class Counted:
        def __init__(self, function: object) -> None:
            self.function = function

        def __getitem__(self, grid: object) -> object:
            launches.append(grid)
            return self.function[grid]  # type: ignore[index]

    for name in ("_partials", "_finish", "_scale"):
        monkeypatch.setattr(kernel, name, Counted(getattr(kernel, name)))
    shapes = [(7, 11), (0,), (1,), (16384,), (3, 0), (), (16385,)]
    tensors = [random_like(shape, DTYPES[index % 3], device, index) for index, shape in enumerate(shapes * 3)]
    total = grad_norm.sum_of_squares(tensors)
    assert total.item() == pytest.approx(exact(tensors), rel=1e-6)
    assert len(launches) == 2
    grad_norm.scale_(tensors, torch.tensor(0.5, device=device))
    assert len(launches) == 3
    assert grad_norm.sum_of_squares(tensors).item() == pytest.approx(total.item() / 4, rel=1e-6)


def test_a_gradient_that_moved_is_read_where_it_is(device: torch.device) -> None:
    first, second = random_like((5000,), torch.float32, device), random_like((5000,), torch.float32, device, 1)
    assert grad_norm.sum_of_squares([first]).item() == pytest.approx(exact([first]), rel=1e-6)
    assert grad_norm.sum_of_squares([second]).item() == pytest.approx(exact([second]), rel=1e-6)
    assert grad_norm.sum_of_squares([first]).item() == pytest.approx(exact([first]), rel=1e-6)


def test_the_table_is_kept_while_nothing_moves(device: torch.device) -> None:
    values = random_like((5000,), torch.float32, device)
    first, again, moved = (tables.inspect("test", [tensor]) for tensor in (values, values, values.clone()))
    assert tables.address_table(first) is tables.address_table(again)
    assert tables.address_table(first).tolist() == [values.data_ptr()]
    assert tables.chunk_table(first) is tables.chunk_table(moved)
    assert tables.address_table(moved).tolist() == list(moved.addresses) != list(first.addresses)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_element_is_flagged(bad: float, device: torch.device) -> None:
    values = random_like((20011,), torch.float32, device)
    values[20010] = bad
    assert not math.isfinite(grad_norm.sum_of_squares([values]).item())


def test_an_overflow_of_the_dtype_is_none_of_the_sum(device: torch.device) -> None:
    values = torch.full((64, 64), 2000.0, dtype=torch.float16, device=device)
    assert grad_norm.sum_of_squares([values]).sqrt().item() == pytest.approx(128000)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 1023, 16385, 40009])
@pytest.mark.parametrize("shift", [0, 3])
def test_scale_is_the_reference_bit_for_bit(size: int, shift: int, dtype: torch.dtype, device: torch.device) -> None:
    values = Poisoned(random_like((size,), dtype, device), shift)
    expected = [values.tensor.clone()]
    coefficient = torch.tensor(0.3141592653589793, dtype=torch.float64, device=device)
    grad_norm.reference.scale_(expected, coefficient, zero_nonfinite=False)
    grad_norm.scale_([values.tensor], coefficient)
    assert torch.equal(values.tensor, expected[0])
    values.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [63, 16385])
def test_zero_writes_zeros_over_whatever_was_there(size: int, dtype: torch.dtype, device: torch.device) -> None:
    values = Poisoned(torch.full((size,), math.inf, dtype=dtype, device=device), 1)
    values.tensor[::2] = math.nan
    grad_norm.scale_([values.tensor], torch.zeros((), device=device))
    assert (values.tensor == 0).all()
    values.check()


def test_one_leaves_every_bit(device: torch.device) -> None:
    values = random_like((5000,), torch.float32, device)
    values[7] = math.nan
    before = values.clone()
    grad_norm.scale_([values], torch.ones((), dtype=torch.float64, device=device))
    assert torch.equal(values.view(torch.int32), before.view(torch.int32))


def test_the_cpu_writes_only_where_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_EFF_KERNELS", "reference")
    large, small = torch.full((5000,), 2.0), [torch.full((3,), 2.0) for _ in range(4)]
    before = [tensor._version for tensor in (large, *small)]
    grad_norm.scale_([large, *small], torch.ones((), dtype=torch.float64), zero_nonfinite=True)
    assert [tensor._version for tensor in (large, *small)] == before
    grad_norm.scale_([large, *small], torch.tensor(0.5), zero_nonfinite=True)
    assert all((tensor == 1).all() for tensor in (large, *small))
    large[5], small[1][0] = math.nan, math.inf
    grad_norm.scale_([large, *small], torch.tensor(0.0), zero_nonfinite=True)
    assert not any(tensor.any() for tensor in (large, *small))


def test_permuted_memory_is_taken_and_gaps_are_refused(device: torch.device) -> None:
    image = random_like((2, 3, 5, 7), torch.float32, device).to(memory_format=torch.channels_last)
    assert grad_norm.sum_of_squares([image, image.mT]).item() == pytest.approx(2 * exact([image]), rel=1e-6)
    with pytest.raises(RuntimeError, match=r"tensor 1 of shape \(4, 3\) and strides \(6, 1\) is not contiguous"):
        grad_norm.sum_of_squares([image, torch.ones(4, 6, device=device)[:, :3]])


def test_gaps_and_float64_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_EFF_KERNELS")
    gaps = torch.ones(4, 6, dtype=torch.float64)[:, :3]
    assert grad_norm.sum_of_squares([gaps]).item() == pytest.approx(12)
    grad_norm.scale_([gaps], torch.tensor(0.5))
    assert grad_norm.sum_of_squares([gaps]).item() == pytest.approx(3)


def test_bad_input_is_named(device: torch.device) -> None:
    one = torch.ones(3, device=device)
    with pytest.raises(ValueError, match=r"different devices: 0 on .*, 1 on meta"):
        grad_norm.sum_of_squares([one, torch.ones(3, device="meta")])
    with pytest.raises(TypeError, match=r"tensor 1 of shape \(3,\) is torch.int64, not floating"):
        grad_norm.sum_of_squares([one, torch.ones(3, dtype=torch.int64, device=device)])
    with pytest.raises(TypeError, match="item 1 is a float"):
        grad_norm.sum_of_squares([one, 1.0])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"tensor 0 of shape .* is sparse"):
        grad_norm.sum_of_squares([torch.eye(2).to_sparse()])
    with pytest.raises(RuntimeError, match=r"LIGHTNING_EFF_KERNELS=triton.* dtype torch.float64"):
        grad_norm.sum_of_squares([one.double()])
    with pytest.raises(ValueError, match="the coefficient on meta"):
        grad_norm.scale_([one], torch.ones((), device="meta"))
    with pytest.raises(ValueError, match=r"coefficient of shape \(2,\)"):
        grad_norm.scale_([one], torch.ones(2, device=device))
    with pytest.raises(TypeError, match=r"coefficient=0\.5"):
        grad_norm.scale_([one], 0.5)  # type: ignore[arg-type]


def test_an_empty_list_is_nothing(device: torch.device) -> None:
    assert grad_norm.sum_of_squares([]).item() == 0
    grad_norm.scale_([], torch.tensor(0.5, device=device))
    assert grad_norm.sum_of_squares([torch.ones(0, device=device)]).item() == 0
    grad_norm.scale_([torch.ones(0, device=device)], torch.tensor(0.5, device=device))
