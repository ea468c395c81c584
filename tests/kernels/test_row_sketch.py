from __future__ import annotations

import math

import pytest
import torch

from lightning_eff.kernels.philox import philox, philox_words
from lightning_eff.kernels.row_sketch import reference, row_sketch, signs
from tests.kernels.memory import Poisoned, random_like

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (31, 63), (33, 64), (5, 1023), (1, 128), (67, 130), (64, 8)]


@pytest.mark.parametrize(
    ("counter", "seed", "stream", "word"),
    [
        (0, 0, 0, 0x6627E8D5),  # the all-zero line of the known answers that come with the generator's paper
        (1, 0x123456789ABCDEF0, 0, None),
        (0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF, None),
    ],
)
def test_the_generator_is_philox(counter: int, seed: int, stream: int, word: int | None) -> None:
    got = philox(seed, torch.tensor([counter]), stream)[0].item()
    assert got == by_hand(counter, stream, seed)
    assert word is None or got == word


def by_hand(c0: int, c1: int, seed: int) -> int:
    """Philox4x32-10 in Python's own integers."""
    c2 = c3 = 0
    k0, k1 = seed % 2**32, seed // 2**32
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second % 2**32, (first >> 32) ^ c3 ^ k1, first % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0


def test_signs_are_balanced_and_differ_by_step_and_matrix() -> None:
    v = signs(4096, 16, seed=1, stream=0)
    assert v.abs().eq(1).all()
    assert v.mean(0).abs().max().item() < 4 / math.sqrt(4096)
    gram = v.T @ v / 4096 - torch.eye(16)
    assert gram.abs().max().item() < 5 / math.sqrt(4096)
    for other in (signs(4096, 16, seed=2, stream=0), signs(4096, 16, seed=1, stream=1)):
        assert (v * other).mean().abs().item() < 4 / math.sqrt(4096 * 16)
    assert torch.equal(signs(100, 3, seed=1, stream=0), v[:100, :3])


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("seed", [0, 2**31, 2**32 + 5, 2**64 - 1])
def test_the_kernel_draws_the_same_signs_bit_for_bit(seed: int, device: torch.device) -> None:
    # The sketch of the identity is V itself.
    columns = 67
    stream = 2**32 - 1
    got = row_sketch([torch.eye(columns, device=device)], 16, seed, [stream])
    assert torch.equal(got, signs(columns, 16, seed, stream, device))


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_error", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_hard_shapes_in_one_launch(shift: int, with_error: bool, dtype: torch.dtype, device: torch.device) -> None:
    matrices = [Poisoned(random_like(shape, dtype, device, index), shift) for index, shape in enumerate(SHAPES)]
    errors = [Poisoned(random_like(shape, torch.float32, device, index + 50)) for index, shape in enumerate(SHAPES)]
    given = [error.tensor for error in errors] if with_error else None
    got = row_sketch([matrix.tensor for matrix in matrices], 5, 123, errors=given)
    assert got.shape == (sum(rows for rows, _ in SHAPES), 5)
    row = 0
    for index, (rows, columns) in enumerate(SHAPES):
        values = matrices[index].tensor.double()
        if with_error:
            values = values + errors[index].tensor.double()
        right = values @ signs(columns, 5, 123, index, device).double()
        scale = values.abs().sum(1, keepdim=True)
        assert ((got[row : row + rows] - right).abs() <= 2e-7 * math.sqrt(columns) * scale).all()
        row += rows


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("rank", [1, 2, 16])
def test_mixed_dtypes_and_empty_matrices(rank: int, device: torch.device) -> None:
    shapes = [(40, 33), (0, 5), (7, 0), (64, 64)]
    matrices = [random_like(shape, DTYPES[index % 3], device, index) for index, shape in enumerate(shapes)]
    got = row_sketch(matrices, rank, 9)
    right = reference.row_sketch(matrices, None, rank, 9, range(4))
    torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)
    assert row_sketch([], rank, 9).shape == (0, rank)
    assert row_sketch([torch.zeros(0, 3, device=device)], rank, 9).shape == (0, rank)


@pytest.mark.usefixtures("triton_kernels")
def test_a_non_finite_row_stays_alone(device: torch.device) -> None:
    matrix = random_like((40, 70), torch.float32, device)
    matrix[7, 3], matrix[9, 69] = math.nan, math.inf
    finite = row_sketch([matrix], 4, 0).isfinite().all(1)
    assert finite.logical_not().nonzero().flatten().tolist() == [7, 9]


@pytest.mark.usefixtures("triton_kernels")
def test_bad_input_is_named(device: torch.device) -> None:
    one = torch.ones(3, 4, device=device)
    with pytest.raises(ValueError, match="rank=17 is not allowed"):
        row_sketch([one], 17, 0)
    with pytest.raises(ValueError, match="seed=-1 is not allowed"):
        row_sketch([one], 4, -1)
    with pytest.raises(ValueError, match="stream 0 is 4294967296"):
        row_sketch([one], 4, 0, [2**32])
    with pytest.raises(ValueError, match="2 streams for 1 matrices"):
        row_sketch([one], 4, 0, [0, 1])
    with pytest.raises(ValueError, match=r"tensor 1 of shape \(3,\) is no matrix"):
        row_sketch([one, torch.ones(3, device=device)], 4, 0)
    with pytest.raises(ValueError, match=r"error 0 of shape \(3, 4\) and torch.float16 must be float32"):
        row_sketch([one], 4, 0, errors=[one.half()])
    with pytest.raises(ValueError, match="0 errors for 1 matrices"):
        row_sketch([one], 4, 0, errors=[])
    with pytest.raises(ValueError, match="error 0 on meta"):
        row_sketch([one], 4, 0, errors=[torch.ones(3, 4, device="meta")])
    with pytest.raises(RuntimeError, match="is not contiguous"):
        row_sketch([one.T], 4, 0)


def test_the_reference_takes_what_the_kernel_does_not() -> None:
    matrix = random_like((6, 5), torch.float64, torch.device("cpu")).T
    right = matrix @ signs(6, 3, 1, 0).double()
    torch.testing.assert_close(row_sketch([matrix], 3, 1), right.float())


@pytest.mark.usefixtures("triton_kernels")
def test_streams_are_copied_once(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    from lightning_eff.kernels.row_sketch import kernel

    copies: list[int] = []
    copy = kernel.to_device
    monkeypatch.setattr(kernel, "to_device", lambda *args: (copies.append(1), copy(*args))[1])
    matrices = [random_like((8, 16), torch.float32, device, 0)]
    for seed in range(3):
        row_sketch(matrices, 2, seed, [4_000_000_007 - 2])
    assert len(copies) == 1


def test_words_are_the_same_in_pieces_as_at_once() -> None:
    words = philox_words(11, 7, 4 * 2**14 + 3, torch.device("cpu"))
    assert len(words) == 4 * 2**14 + 3
    at_once = torch.stack(philox(11, torch.arange(2**14 + 1), 7), dim=1).flatten()
    assert torch.equal(words, at_once[: len(words)])
    assert (int(words.min()) >> 24, int(words.max()) >> 24) == (0, 255)
