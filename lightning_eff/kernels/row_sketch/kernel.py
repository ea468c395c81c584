"""Triton kernel: the sketches (G + E) V of many matrices in one launch, with V's signs made where they are used."""

# The arguments of a jitted function are Triton's own values, and torch.cuda.device_of carries no annotation.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_eff.kernels.device import BFLOAT16, FLOAT32, OPTIONS, CompileCase, typed_pointer
from lightning_eff.kernels.matrices import MatrixList, matrix_table
from lightning_eff.kernels.tables import CACHE_SIZE, address_table, stream_of, to_device

# Rows and columns of a tile, without and with an error memory. The random words of a column serve all rows of a tile,
# and in 16 bits drawing them takes longer than reading the rows. Settled by the registers of a thread, compiled for
# cuda:90 by Triton 3.6 and 3.9: 64 x 32 takes 96 and 72 (32 x 64: 139 and 130; 64 x 64: 168 by 3.6). With an error
# memory 32 x 32 takes 157 and 86 (32 x 64: 242 and 141; 64 x 32: 219 and 93).
TILES = {False: (64, 32), True: (32, 32)}
RANK = 16  # what a matrix unit takes at least; columns of V beyond the rank are computed and not stored


@triton.jit
def _signs(seed_low, seed_high, stream, columns, RANK: tl.constexpr):
    """V's rows for a range of columns of G: bit k of a counter-based random word gives the sign of column k."""
    seed = (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | seed_low.to(tl.uint32, bitcast=True).to(
        tl.uint64
    )
    zero = columns * 0
    word, _, _, _ = tl.philox(seed, columns, zero + stream, zero, zero)
    bits = (word[:, None] >> tl.arange(0, RANK)[None, :].to(tl.uint32)) & 1
    return tl.where(bits == 1, -1.0, 1.0).to(tl.bfloat16)


@triton.jit
def _add_product(x, v, sums, EXACT_IN_BFLOAT16: tl.constexpr):
    """sums + x v, where x is float32 and v is +-1, on the 16-bit matrix unit without losing a bit of x.

    Three bfloat16 hold the 24 bits of a float32, and their products with +-1 are exact.
    """
    high = x.to(tl.bfloat16)
    sums = tl.dot(high, v, sums)
    if not EXACT_IN_BFLOAT16:
        x -= high.to(tl.float32)
        middle = x.to(tl.bfloat16)
        sums = tl.dot(middle, v, sums)
        low = (x - middle.to(tl.float32)).to(tl.bfloat16)
        sums = tl.dot(low, v, sums)
    return sums


@triton.jit
def _block(
    pointer, error, rows, m, seed_low, seed_high, stream,
    EXACT: tl.constexpr, WITH_ERROR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    offsets = row[:, None] * m + tl.arange(0, COLUMNS)[None, :]
    sums = tl.full([ROWS, RANK], 0.0, tl.float32)
    whole = m // COLUMNS
    for block in range(whole):
        x = tl.load(pointer + offsets + block * COLUMNS, mask=inside, other=0.0).to(tl.float32)
        if WITH_ERROR:
            x += tl.load(error + offsets + block * COLUMNS, mask=inside, other=0.0)
        v = _signs(seed_low, seed_high, stream, block * COLUMNS + tl.arange(0, COLUMNS), RANK)
        sums = _add_product(x, v, sums, EXACT)
    if whole * COLUMNS < m:
        columns = whole * COLUMNS + tl.arange(0, COLUMNS)
        here = inside & (columns < m)[None, :]
        x = tl.load(pointer + offsets + whole * COLUMNS, mask=here, other=0.0).to(tl.float32)
        if WITH_ERROR:
            x += tl.load(error + offsets + whole * COLUMNS, mask=here, other=0.0)
        sums = _add_product(x, _signs(seed_low, seed_high, stream, columns, RANK), sums, EXACT)
    return sums


@triton.jit
def _rows(
    address, error, rows, m, seed_low, seed_high, stream, DTYPE: tl.constexpr, SIZE: tl.constexpr,
    WITH_ERROR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = (not WITH_ERROR) and DTYPE == tl.bfloat16  # noqa: SIM300
    if ((address | error) % 16 == 0) & ((m * SIZE) % 16 == 0):
        # Every row begins at a multiple of 16 bytes, and the compiler is told so.
        sums = _block(
            typed_pointer(address, DTYPE, True), typed_pointer(error, tl.float32, True), rows,
            m // (16 // SIZE) * (16 // SIZE), seed_low, seed_high, stream, EXACT, WITH_ERROR, ROWS, COLUMNS, RANK,
        )  # fmt: skip
    else:
        sums = _block(
            typed_pointer(address, DTYPE, False), typed_pointer(error, tl.float32, False), rows,
            m, seed_low, seed_high, stream, EXACT, WITH_ERROR, ROWS, COLUMNS, RANK,
        )  # fmt: skip
    return sums


@triton.jit(do_not_specialize=["seed_low", "seed_high", "rank"])
def _sketch(
    addresses, errors, rows, columns, codes, first_rows, streams, owners, positions, out, seed_low, seed_high, rank,
    WITH_ERROR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """out[row, k] = sum over the row's elements of (G + E) times the sign of (element's column, k)."""
    block = tl.program_id(0)
    owner = tl.load(owners + block)
    first = tl.load(positions + block).to(tl.int64) * ROWS
    m = tl.load(columns + owner)
    count = tl.minimum(tl.load(rows + owner) - first, ROWS).to(tl.int32)
    stream = tl.load(streams + owner)
    address = tl.load(addresses + owner)
    error = address
    if WITH_ERROR:
        error = tl.load(errors + owner) + first * m * 4
    code = tl.load(codes + owner)
    if code == FLOAT32:
        address += first * m * 4
        error = error if WITH_ERROR else address
        sums = _rows(
            address, error, count, m, seed_low, seed_high, stream, tl.float32, 4, WITH_ERROR, ROWS, COLUMNS, RANK
        )
    elif code == BFLOAT16:
        address += first * m * 2
        error = error if WITH_ERROR else address
        sums = _rows(
            address, error, count, m, seed_low, seed_high, stream, tl.bfloat16, 2, WITH_ERROR, ROWS, COLUMNS, RANK
        )
    else:
        address += first * m * 2
        error = error if WITH_ERROR else address
        sums = _rows(
            address, error, count, m, seed_low, seed_high, stream, tl.float16, 2, WITH_ERROR, ROWS, COLUMNS, RANK
        )
    row = tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, RANK)[None, :]
    target = out + (tl.load(first_rows + owner) + first) * rank
    tl.store(target + row * rank + k, sums, mask=(row < count) & (k < rank))


def _signed(word: int) -> int:
    """A 32-bit number as the signed number of the same bits: arguments above 2^31 would change a kernel's type."""
    return word - 2**32 if word >= 2**31 else word


@functools.lru_cache(CACHE_SIZE)
def _streams(device: torch.device, stream: int, streams: tuple[int, ...]) -> Tensor:
    """int32 (matrices,) on the device; ``stream`` is the CUDA stream that copies it."""
    return to_device([_signed(number) for number in streams], torch.int32, device)


def row_sketch(matrices: MatrixList, errors: MatrixList | None, rank: int, seed: int, streams: Sequence[int]) -> Tensor:
    """Launch the kernel over lists that have been inspected."""
    device = matrices.listed.device
    assert device is not None
    block_rows, block_columns = TILES[errors is not None]
    table = matrix_table(matrices, block_rows)
    addresses = address_table(matrices.listed)
    out = torch.empty((table.total_rows, rank), dtype=torch.float32, device=device)
    if table.blocks == 0:
        return out
    numbers = _streams(device, stream_of(device), tuple(streams))
    with torch.cuda.device_of(out):
        _sketch[(table.blocks,)](
            addresses, addresses if errors is None else address_table(errors.listed), table.rows, table.columns,
            table.codes, table.first_rows, numbers, table.owners, table.positions, out,
            _signed(seed & 0xFFFFFFFF), _signed(seed >> 32), rank,
            WITH_ERROR=errors is not None, ROWS=block_rows, COLUMNS=block_columns, RANK=RANK, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return out


def compile_cases() -> list[CompileCase]:
    """The kernel with and without error memory, for compilation ahead of time."""
    arguments = {
        **{"addresses": "*i64", "errors": "*i64", "rows": "*i32", "columns": "*i32", "codes": "*i32"},
        **{"first_rows": "*i64", "streams": "*i32", "owners": "*i32", "positions": "*i32", "out": "*fp32"},
        **{"seed_low": "i32", "seed_high": "i32", "rank": "i32"},
    }
    # 128 threads. 64 x 32 elements are four loads of 4 floats for each thread, two of 8 halves for each 16-bit dtype.
    # Of 32 x 32 only the float32 ones are counted, rows and errors: waves of 64 threads load 16-bit rows by 8 bytes.
    cases = []
    for with_error, wide in ((False, 4 + 2 + 2), (True, 2 + 3 * 2)):
        block_rows, block_columns = TILES[with_error]
        constants = {"WITH_ERROR": with_error, "ROWS": block_rows, "COLUMNS": block_columns, "RANK": RANK}
        name = "sketch, with error" if with_error else "sketch"
        cases.append(CompileCase(_sketch, name, arguments, constants, 4, wide))
    return cases
