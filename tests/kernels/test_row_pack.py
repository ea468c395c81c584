from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_eff.kernels.row_pack import pack_rows, reference, row_scores, scatter_rows_, select_rows
from tests.kernels.memory import Poisoned, random_like

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (31, 63), (13, 64), (5, 1023), (3, 1024), (7, 1032), (0, 8), (9, 2056)]
COUNTS = [1, 6, 13, 0, 2, 3, 0, 1]
ROWS = [rows for rows, _ in SHAPES]


def selection(device: torch.device) -> Tensor:
    return select_rows(random_like((sum(ROWS),), torch.float32, device, 99), ROWS, COUNTS)


def test_scores_are_squared_norms_in_float32() -> None:
    sketch = torch.tensor([[300.0, 400.0], [1.0, 2.0]], dtype=torch.float16)
    assert row_scores(sketch).tolist() == [250000.0, 5.0]  # float16 ends at 65504
    with pytest.raises(ValueError, match=r"sketch of shape \(2,\)"):
        row_scores(torch.ones(2))


def test_each_matrix_selects_its_own_largest_rows() -> None:
    scores = random_like((sum(ROWS),), torch.float32, torch.device("cpu"))
    selected = select_rows(scores, ROWS, COUNTS)
    first = 0
    right = []
    for rows, count in zip(ROWS, COUNTS, strict=True):
        right += sorted((first + scores[first : first + rows].topk(count).indices).tolist())
        first += rows
    assert selected.tolist() == right


def test_ties_go_to_the_lowest_row_and_nan_does_not_upset_the_others() -> None:
    scores = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0] * 40)
    assert select_rows(scores, [200], [3]).tolist() == [1, 2, 3]
    scores[4] = math.nan
    assert select_rows(scores, [5, 195], [2, 2]).tolist() == [1, 4, 6, 7]


def test_selection_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"counts\[1\]=3 is not allowed: matrix 1 has 2 rows"):
        select_rows(torch.ones(5), [3, 2], [1, 3])
    with pytest.raises(ValueError, match="1 counts for 2 matrices"):
        select_rows(torch.ones(5), [3, 2], [1])
    with pytest.raises(ValueError, match=r"scores of shape \(4,\)"):
        select_rows(torch.ones(4), [3, 2], [1, 1])


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_error", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_pack_is_the_reference_bit_for_bit(
    shift: int, with_error: bool, dtype: torch.dtype, device: torch.device
) -> None:
    matrices = [Poisoned(random_like(shape, dtype, device, index), shift).tensor for index, shape in enumerate(SHAPES)]
    errors = [
        Poisoned(random_like(shape, torch.float32, device, index + 50)).tensor for index, shape in enumerate(SHAPES)
    ]
    given = errors if with_error else None
    selected = selection(device)
    for buffer_dtype in (None, torch.float32):
        got = pack_rows(matrices, selected, COUNTS, 3, given, buffer_dtype)
        right = reference.pack_rows(matrices, selected, COUNTS, 3, given, buffer_dtype or dtype)
        assert got.dtype == right.dtype
        assert torch.equal(got, right)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["no error", "error", "kept", "updated"])
@pytest.mark.parametrize("shift", [0, 1])
def test_scatter_is_the_reference_bit_for_bit(shift: int, mode: str, dtype: torch.dtype, device: torch.device) -> None:
    matrices = [Poisoned(random_like(shape, dtype, device, index), shift) for index, shape in enumerate(SHAPES)]
    errors = [Poisoned(random_like(shape, torch.float32, device, index + 50)) for index, shape in enumerate(SHAPES)]
    selected = selection(device)
    sizes = sum(count * columns for count, (_, columns) in zip(COUNTS, SHAPES, strict=True))
    buffer = Poisoned(random_like((sizes,), dtype, device, 7))
    update = {"kept": torch.tensor(False, device=device), "updated": torch.tensor(1.0, device=device)}.get(mode)
    right = [matrix.tensor.clone() for matrix in matrices]
    right_errors = [error.tensor.clone() for error in errors]
    none = mode == "no error"
    reference.scatter_rows_(right, buffer.tensor, selected, COUNTS, None if none else right_errors, update)
    given = None if none else [error.tensor for error in errors]
    scatter_rows_([matrix.tensor for matrix in matrices], buffer.tensor, selected, COUNTS, given, update)
    for got, expected in zip([*matrices, *errors], [*right, *right_errors], strict=True):
        assert torch.equal(got.tensor, expected)
        got.check()


@pytest.mark.usefixtures("triton_kernels")
def test_nothing_is_lost_between_what_is_sent_and_what_is_kept(device: torch.device) -> None:
    shape = (20, 40)
    G, E = random_like(shape, torch.float32, device), torch.zeros(shape, device=device)
    sent, given = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    for step in range(4):
        G = random_like(shape, torch.float32, device, step)
        given += G
        selected = select_rows((G + E).square().sum(1), [20], [5])
        buffer = pack_rows([G], selected, [5], 1, [E])
        scatter_rows_([G], buffer, selected, [5], [E])
        sent += G
    torch.testing.assert_close(sent + E, given)


@pytest.mark.usefixtures("triton_kernels")
def test_mixed_dtypes_make_a_float32_buffer(device: torch.device) -> None:
    matrices = [random_like((4, 16), dtype, device, index) for index, dtype in enumerate(DTYPES)]
    selected = torch.tensor([1, 4, 11], device=device)
    got = pack_rows(matrices, selected, [1, 1, 1], 2)
    assert torch.equal(got, reference.pack_rows(matrices, selected, [1, 1, 1], 2, None, torch.float32))
    scatter_rows_(matrices, got, selected, [1, 1, 1])
    assert [matrix.abs().sum(1).nonzero().flatten().tolist() for matrix in matrices] == [[1], [0], [3]]


@pytest.mark.usefixtures("triton_kernels")
def test_bad_input_is_named(device: torch.device) -> None:
    one, row = torch.ones(3, 4, device=device), torch.tensor([1], device=device)
    with pytest.raises(ValueError, match="divisor=0 is not allowed"):
        pack_rows([one], row, [1], 0)
    with pytest.raises(ValueError, match=r"selected of shape \(1,\) and torch.int32 must be contiguous int64"):
        pack_rows([one], row.int(), [1], 1)
    with pytest.raises(ValueError, match=r"selected of shape \(1,\) .* of shape \(2,\)"):
        pack_rows([one], row, [2], 1)
    with pytest.raises(ValueError, match="selected on meta"):
        pack_rows([one], row.to("meta"), [1], 1)
    with pytest.raises(ValueError, match=r"buffer of shape \(3,\) and torch.float32 must be floating of shape \(4,\)"):
        scatter_rows_([one], torch.ones(3, device=device), row, [1])
    with pytest.raises(ValueError, match="buffer on meta"):
        scatter_rows_([one], torch.ones(4, device="meta"), row, [1])
    with pytest.raises(ValueError, match=r"update of shape \(2,\)"):
        scatter_rows_([one], torch.ones(4, device=device), row, [1], [one.clone()], torch.ones(2, device=device))
    with pytest.raises(RuntimeError, match="is not contiguous"):
        pack_rows([one.T], row, [1], 1)
    assert pack_rows([one], torch.tensor([3], device=device), [1], 1).isnan().all()
    assert pack_rows([one], torch.tensor([-1], device=device), [1], 1).isnan().all()


def test_empty_lists_are_nothing() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert pack_rows([], none, [], 1).shape == (0,)
    scatter_rows_([], torch.zeros(0), none, [])
    assert select_rows(torch.zeros(0), [], []).shape == (0,)


def test_the_divisor_is_taken_as_a_reciprocal() -> None:
    """On a GPU torch divides by a Python number so, and kernel and reference are to agree there."""
    matrices = [random_like((40, 30), torch.float32, torch.device("cpu"), 0)]
    rows = torch.arange(40)
    expected = matrices[0].flatten() * torch.tensor(1 / 3)
    assert not torch.equal(expected, matrices[0].flatten() / 3)
    assert torch.equal(reference.pack_rows(matrices, rows, [40], 3, None, torch.float32), expected)
