"""Triton kernels: partial sums of every chunk of a list, and their sum for each tensor in a fixed order."""

# The arguments of a jitted function are Triton's own values, and torch.cuda.device_of carries no annotation.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_eff.kernels.device import BFLOAT16, FLOAT32, OPTIONS, TABLE_ARGUMENTS, CompileCase, typed_pointer
from lightning_eff.kernels.tables import CHUNK, TensorList, address_table, chunk_table

BLOCK = 2048
FINISH_BLOCK = 512
LARGEST = tl.constexpr(3)  # of the statistics: the one that is no sum


@triton.jit
def _add_values(
    x, old, sums, squares, changes, largest, zeros, nonfinite, WITH_COPY: tl.constexpr, WITH_EXTREMES: tl.constexpr
):
    value = x.to(tl.float32)
    size = tl.abs(value)
    sums += size
    squares = tl.fma(value, value, squares)
    if WITH_COPY:
        changes += tl.abs(value - old.to(tl.float32))
    if WITH_EXTREMES:
        largest = tl.maximum(largest, tl.where(value == value, size, 0.0))
        zeros += tl.where(value == 0.0, 1.0, 0.0)
        nonfinite += tl.where(size < float("inf"), 0.0, 1.0)
    return sums, squares, changes, largest, zeros, nonfinite


@triton.jit
def _add_chunk(pointer, copy, count, write, WITH_COPY: tl.constexpr, WITH_EXTREMES: tl.constexpr, BLOCK: tl.constexpr):
    """Element i goes to running sum i % BLOCK, so that the order of the sums does not depend on the alignment."""
    sums = tl.full([BLOCK], 0.0, tl.float32)
    squares = tl.full([BLOCK], 0.0, tl.float32)
    changes = tl.full([BLOCK], 0.0, tl.float32)
    largest = tl.full([BLOCK], 0.0, tl.float32)
    zeros = tl.full([BLOCK], 0.0, tl.float32)
    nonfinite = tl.full([BLOCK], 0.0, tl.float32)
    offsets = tl.arange(0, BLOCK)
    whole = count // BLOCK
    for block in range(whole):  # without a mask, so that the loads are as wide as the alignment allows
        at = block * BLOCK + offsets
        x = tl.load(pointer + at)
        old = x
        if WITH_COPY:
            old = tl.load(copy + at)
            if write != 0:
                tl.store(copy + at, x)
        sums, squares, changes, largest, zeros, nonfinite = _add_values(
            x, old, sums, squares, changes, largest, zeros, nonfinite, WITH_COPY, WITH_EXTREMES
        )
    at = whole * BLOCK + offsets
    x = tl.load(pointer + at, mask=at < count, other=0.0)
    old = x
    if WITH_COPY:
        old = tl.load(copy + at, mask=at < count, other=0.0)
        if write != 0:
            tl.store(copy + at, x, mask=at < count)
    return _add_values(x, old, sums, squares, changes, largest, zeros, nonfinite, WITH_COPY, WITH_EXTREMES)


@triton.jit
def _add_typed(
    address,
    copy,
    count,
    write,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WITH_COPY: tl.constexpr,
    WITH_EXTREMES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pointer, copied = typed_pointer(address, DTYPE, ALIGNED), typed_pointer(copy, DTYPE, ALIGNED)
    return _add_chunk(pointer, copied, count, write, WITH_COPY, WITH_EXTREMES, BLOCK)


@triton.jit
def _store_chunk(
    partials,
    chunks,
    address,
    copy,
    count,
    write,
    DTYPE: tl.constexpr,
    WITH_COPY: tl.constexpr,
    WITH_EXTREMES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The statistics of a chunk, each to its row of ``partials``."""
    if (address | copy) % 16 == 0:
        sums, squares, changes, largest, zeros, nonfinite = _add_typed(
            address, copy, count, write, DTYPE, True, WITH_COPY, WITH_EXTREMES, BLOCK
        )
    else:
        sums, squares, changes, largest, zeros, nonfinite = _add_typed(
            address, copy, count, write, DTYPE, False, WITH_COPY, WITH_EXTREMES, BLOCK
        )
    tl.store(partials, tl.sum(sums, axis=0))
    tl.store(partials + chunks, tl.sum(squares, axis=0))
    tl.store(partials + 2 * chunks, tl.sum(changes, axis=0))
    if WITH_EXTREMES:
        padding = (count // BLOCK + 1) * BLOCK - count  # what the last, masked block has in place of elements: zeros
        tl.store(partials + 3 * chunks, tl.max(largest, axis=0))
        tl.store(partials + 4 * chunks, tl.sum(zeros, axis=0) - padding.to(tl.float32))
        tl.store(partials + 5 * chunks, tl.sum(nonfinite, axis=0))


@triton.jit
def _partials(
    addresses,
    numels,
    codes,
    owners,
    positions,
    copies,
    update,
    partials,
    chunks,
    WITH_COPY: tl.constexpr,
    WITH_UPDATE: tl.constexpr,
    WITH_EXTREMES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials[statistic, chunk], in float32; `copies` are the kept copies' addresses."""
    chunk = tl.program_id(0)
    owner = tl.load(owners + chunk)
    start = tl.load(positions + chunk).to(tl.int64) * CHUNK
    count = tl.minimum(tl.load(numels + owner) - start, CHUNK).to(tl.int32)
    address = tl.load(addresses + owner)
    copy = address
    if WITH_COPY:
        copy = tl.load(copies + owner)
    write = 1
    if WITH_UPDATE:
        write = tl.load(update)
    code = tl.load(codes + owner)
    partials += chunk
    if code == FLOAT32:
        start *= 4
        _store_chunk(
            partials, chunks, address + start, copy + start, count, write, tl.float32, WITH_COPY, WITH_EXTREMES, BLOCK
        )
    elif code == BFLOAT16:
        start *= 2
        _store_chunk(
            partials, chunks, address + start, copy + start, count, write, tl.bfloat16, WITH_COPY, WITH_EXTREMES, BLOCK
        )
    else:
        start *= 2
        _store_chunk(
            partials, chunks, address + start, copy + start, count, write, tl.float16, WITH_COPY, WITH_EXTREMES, BLOCK
        )


@triton.jit
def _finish(partials, firsts, out, chunks, tensors, BLOCK: tl.constexpr):
    """out[statistic, tensor] = sum or maximum over the tensor's chunks, float64, in a fixed order: no atomics."""
    tensor = tl.program_id(0)
    statistic = tl.program_id(1)
    partials += statistic * chunks
    stop = tl.load(firsts + tensor + 1)
    offsets = tl.arange(0, BLOCK)
    sums = tl.full([BLOCK], 0.0, tl.float64)
    largest = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(tl.load(firsts + tensor), stop, BLOCK):
        part = tl.load(partials + start + offsets, mask=start + offsets < stop, other=0.0).to(tl.float64)
        sums += part
        largest = tl.maximum(largest, part)
    total = tl.sum(sums, axis=0)
    if statistic == LARGEST:
        total = tl.max(largest, axis=0)
    tl.store(out + statistic * tensors + tensor, total)


def tensor_stats(listed: TensorList, copies: TensorList | None, update: Tensor | None, extremes: bool) -> Tensor:
    """Launch both kernels over lists that :func:`inspect` has read."""
    assert listed.device is not None
    table = chunk_table(listed)
    rows = 6 if extremes else 3
    out = torch.empty((rows, len(listed.numels)), dtype=torch.float64, device=listed.device)
    partials = torch.empty((rows, table.chunks), dtype=torch.float32, device=listed.device)
    copied = address_table(copies or listed)
    flag = table.codes if update is None else update.to(torch.int32)
    with torch.cuda.device_of(out):
        if table.chunks:
            _partials[(table.chunks,)](
                address_table(listed), table.numels, table.codes, table.owners, table.positions, copied, flag, partials,
                table.chunks, WITH_COPY=copies is not None, WITH_UPDATE=update is not None,
                WITH_EXTREMES=extremes, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=4, **OPTIONS,
            )  # fmt: skip
        _finish[(len(listed.numels), rows)](
            partials, table.firsts, out, table.chunks, len(listed.numels), BLOCK=FINISH_BLOCK, num_warps=4, **OPTIONS
        )
    return out


def compile_cases() -> list[CompileCase]:
    """Every kernel of this file, for compilation ahead of time."""
    arguments = {**TABLE_ARGUMENTS, "copies": "*i64", "update": "*i32", "partials": "*fp32", "chunks": "i32"}
    finish = {"partials": "*fp32", "firsts": "*i32", "out": "*fp64", "chunks": "i32", "tensors": "i32"}
    sizes = {"CHUNK": CHUNK, "BLOCK": BLOCK}
    # 16 elements for each thread: four loads of 4 floats, or two of 8 halves for each 16-bit dtype; the copy's as well.
    plain = {"WITH_COPY": False, "WITH_UPDATE": False, "WITH_EXTREMES": False, **sizes}
    change = {**plain, "WITH_COPY": True, "WITH_UPDATE": True}
    extremes = {**plain, "WITH_EXTREMES": True}
    return [
        CompileCase(_partials, "partials", arguments, plain, 4, 4 + 2 + 2),
        CompileCase(_partials, "partials, with change", arguments, change, 4, 2 * (4 + 2 + 2)),
        CompileCase(_partials, "partials, with extremes", arguments, extremes, 4, 4 + 2 + 2),
        CompileCase(_finish, "finish", finish, {"BLOCK": FINISH_BLOCK}, 4),
    ]
