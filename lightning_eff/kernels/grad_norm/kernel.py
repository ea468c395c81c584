"""Triton kernels: a list's sum of squares, ZClip's decision, and the scaling that usually has nothing to do.

An ordinary step launches `_partials`, `_finish`, `_decide` and `_scale`, whatever the number of tensors: each
gradient is read once, and `_scale` returns after reading one number.
"""

# The arguments of a jitted function are Triton's own values, and torch.cuda.device_of carries no annotation.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_eff.kernels.device import BFLOAT16, FLOAT32, OPTIONS, TABLE_ARGUMENTS, CompileCase, typed_pointer
from lightning_eff.kernels.tables import CHUNK, TensorList, address_table, chunk_table

BLOCK = 4096
SCALE_BLOCK = 2048  # it holds what it reads until it has written: smaller, for fewer registers
SCALE_PROGRAMS = 2048  # enough to fill a large GPU; each walks over its chunks, so that "nothing to do" is one wave
FINISH_BLOCK = 4096


@triton.jit
def _add_squares(pointer, count, sums, BLOCK: tl.constexpr):
    """Add the squares of `count` elements to BLOCK running sums, element i to sum i % BLOCK."""
    offsets = tl.arange(0, BLOCK)
    whole = count // BLOCK
    for block in range(whole):  # without a mask, so that the loads are as wide as the alignment allows
        x = tl.load(pointer + block * BLOCK + offsets).to(tl.float32)
        sums = tl.fma(x, x, sums)
    offsets += whole * BLOCK
    x = tl.load(pointer + offsets, mask=offsets < count, other=0.0).to(tl.float32)
    return tl.fma(x, x, sums)


@triton.jit
def _chunk_squares(address, count, sums, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    # Both paths add the same elements to the same sums in the same order: the bits do not depend on the alignment.
    if address % 16 == 0:
        sums = _add_squares(typed_pointer(address, DTYPE, True), count, sums, BLOCK)
    else:
        sums = _add_squares(typed_pointer(address, DTYPE, False), count, sums, BLOCK)
    return sums


@triton.jit
def _partials(addresses, numels, codes, owners, positions, partials, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """partials[chunk] = sum of the chunk's squares, in float32."""
    chunk = tl.program_id(0)
    owner = tl.load(owners + chunk)
    start = tl.load(positions + chunk).to(tl.int64) * CHUNK
    count = tl.minimum(tl.load(numels + owner) - start, CHUNK).to(tl.int32)
    address = tl.load(addresses + owner)
    code = tl.load(codes + owner)
    sums = tl.full([BLOCK], 0.0, tl.float32)
    if code == FLOAT32:
        sums = _chunk_squares(address + start * 4, count, sums, tl.float32, BLOCK)
    elif code == BFLOAT16:
        sums = _chunk_squares(address + start * 2, count, sums, tl.bfloat16, BLOCK)
    else:
        sums = _chunk_squares(address + start * 2, count, sums, tl.float16, BLOCK)
    tl.store(partials + chunk, tl.sum(sums, axis=0))


@triton.jit
def _finish(partials, chunks, total, BLOCK: tl.constexpr):
    """total = sum of the partials, in float64 and in a fixed order: one program, no atomics."""
    offsets = tl.arange(0, BLOCK)
    sums = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(0, chunks, BLOCK):
        sums += tl.load(partials + start + offsets, mask=start + offsets < chunks, other=0.0).to(tl.float64)
    tl.store(total, tl.sum(sums, axis=0))


@triton.jit
def _scale_elements(pointer, count, factor, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    whole = count // BLOCK
    tail = offsets + whole * BLOCK
    if factor == 0.0:
        # Written without a read: inf * 0 would be NaN.
        zeros = tl.full([BLOCK], 0.0, tl.float32).to(DTYPE)
        for block in range(whole):
            tl.store(pointer + block * BLOCK + offsets, zeros)
        tl.store(pointer + tail, zeros, mask=tail < count)
    else:
        for block in range(whole):
            x = tl.load(pointer + block * BLOCK + offsets).to(tl.float32)
            tl.store(pointer + block * BLOCK + offsets, (x * factor).to(DTYPE))
        x = tl.load(pointer + tail, mask=tail < count, other=0.0).to(tl.float32)
        tl.store(pointer + tail, (x * factor).to(DTYPE), mask=tail < count)


@triton.jit
def _scale_chunk(address, count, factor, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    if address % 16 == 0:
        _scale_elements(typed_pointer(address, DTYPE, True), count, factor, DTYPE, BLOCK)
    else:
        _scale_elements(typed_pointer(address, DTYPE, False), count, factor, DTYPE, BLOCK)


@triton.jit
def _scale(addresses, numels, codes, owners, positions, chunks, coefficient, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply every element by the coefficient; nothing is read or written where that is 1."""
    factor = tl.load(coefficient).to(tl.float32)
    if factor != 1.0:
        for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
            owner = tl.load(owners + chunk)
            start = tl.load(positions + chunk).to(tl.int64) * CHUNK
            count = tl.minimum(tl.load(numels + owner) - start, CHUNK).to(tl.int32)
            address = tl.load(addresses + owner)
            code = tl.load(codes + owner)
            if code == FLOAT32:
                _scale_chunk(address + start * 4, count, factor, tl.float32, BLOCK)
            elif code == BFLOAT16:
                _scale_chunk(address + start * 2, count, factor, tl.bfloat16, BLOCK)
            else:
                _scale_chunk(address + start * 2, count, factor, tl.float16, BLOCK)


def sum_of_squares(listed: TensorList) -> Tensor:
    """Launch `_partials` and `_finish` over a list that :func:`inspect` has read."""
    assert listed.device is not None
    table = chunk_table(listed)
    total = torch.empty((), dtype=torch.float64, device=listed.device)
    partials = torch.empty(table.chunks, dtype=torch.float32, device=listed.device)
    with torch.cuda.device_of(total):
        if table.chunks:
            _partials[(table.chunks,)](
                address_table(listed), table.numels, table.codes, table.owners, table.positions, partials,
                CHUNK=CHUNK, BLOCK=BLOCK, num_warps=8, **OPTIONS,
            )  # fmt: skip
        _finish[(1,)](partials, table.chunks, total, BLOCK=FINISH_BLOCK, num_warps=8, **OPTIONS)
    return total


def scale_(listed: TensorList, coefficient: Tensor) -> None:
    """Launch `_scale` over a list that :func:`inspect` has read."""
    table = chunk_table(listed)
    if table.chunks == 0:
        return
    with torch.cuda.device_of(coefficient):
        _scale[(min(table.chunks, SCALE_PROGRAMS),)](
            address_table(listed), table.numels, table.codes, table.owners, table.positions, table.chunks, coefficient,
            CHUNK=CHUNK, BLOCK=SCALE_BLOCK, num_warps=4, **OPTIONS,
        )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """Every kernel of this file, for compilation ahead of time."""
    # 16 elements for each thread: four loads of 4 floats, or two of 8 halves for each 16-bit dtype.
    sizes = {"CHUNK": CHUNK, "BLOCK": BLOCK}
    scale_sizes = {"CHUNK": CHUNK, "BLOCK": SCALE_BLOCK}
    scale_arguments = {**TABLE_ARGUMENTS, "chunks": "i32", "coefficient": "*fp64"}
    finish_arguments = {"partials": "*fp32", "chunks": "i32", "total": "*fp64"}
    return [
        CompileCase(_partials, "partials", {**TABLE_ARGUMENTS, "partials": "*fp32"}, sizes, 8, 4 + 2 + 2),
        CompileCase(_finish, "finish", finish_arguments, {"BLOCK": FINISH_BLOCK}, 8),
        CompileCase(_scale, "scale", scale_arguments, scale_sizes, 4, 4 + 2 + 2),
    ]
