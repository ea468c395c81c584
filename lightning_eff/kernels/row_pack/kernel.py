"""Triton kernels: gather the selected rows of many matrices into one buffer, and scatter the reduced buffer back.

One program takes one row, so that whether it was selected is one branch and no masked-out work.
"""

# The arguments of a jitted function are Triton's own values, and torch.cuda.device_of carries no annotation.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_eff.kernels.device import BFLOAT16, FLOAT32, OPTIONS, CompileCase, typed_pointer
from lightning_eff.kernels.matrices import MatrixList, matrix_table
from lightning_eff.kernels.row_pack.layout import pack_layout
from lightning_eff.kernels.tables import address_table

BLOCK = 1024
WARPS = 2


@triton.jit
def _pack_row(pointer, error, target, m, factor, WITH_ERROR: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    for start in range(0, m, BLOCK):
        inside = start + offsets < m
        x = tl.load(pointer + start + offsets, mask=inside, other=0.0).to(tl.float32)
        if WITH_ERROR:
            x += tl.load(error + start + offsets, mask=inside, other=0.0)
        x *= factor
        tl.store(target + start + offsets, x.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _pack_typed(
    address, error, buffer, offset, m, factor, DTYPE: tl.constexpr, WITH_ERROR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # Elements have at least two bytes: eight of them, and a multiple of eight, are a multiple of 16 bytes.
    if ((address | error) % 16 == 0) & (m % 8 == 0) & (offset % 8 == 0):
        _pack_row(
            typed_pointer(address, DTYPE, True), typed_pointer(error, tl.float32, True), buffer + offset // 8 * 8,
            m // 8 * 8, factor, WITH_ERROR, BLOCK,
        )  # fmt: skip
    else:
        _pack_row(
            typed_pointer(address, DTYPE, False), typed_pointer(error, tl.float32, False), buffer + offset,
            m, factor, WITH_ERROR, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["factor"])
def _pack(
    addresses, errors, rows, columns, codes, first_rows, slot_owners, local_slots, buffer_offsets, selected, buffer,
    factor, WITH_ERROR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One selected row of G + E, times the factor, to its place in the buffer."""
    slot = tl.program_id(0)
    owner = tl.load(slot_owners + slot)
    m = tl.load(columns + owner)
    row = tl.load(selected + slot) - tl.load(first_rows + owner)
    offset = tl.load(buffer_offsets + owner) + tl.load(local_slots + slot).to(tl.int64) * m
    if (row >= 0) & (row < tl.load(rows + owner)):
        address = tl.load(addresses + owner)
        error = address
        if WITH_ERROR:
            error = tl.load(errors + owner) + row * m * 4
        code = tl.load(codes + owner)
        if code == FLOAT32:
            address += row * m * 4
            error = error if WITH_ERROR else address
            _pack_typed(address, error, buffer, offset, m, factor, tl.float32, WITH_ERROR, BLOCK)
        elif code == BFLOAT16:
            address += row * m * 2
            error = error if WITH_ERROR else address
            _pack_typed(address, error, buffer, offset, m, factor, tl.bfloat16, WITH_ERROR, BLOCK)
        else:
            address += row * m * 2
            error = error if WITH_ERROR else address
            _pack_typed(address, error, buffer, offset, m, factor, tl.float16, WITH_ERROR, BLOCK)
    else:
        # A row that its matrix does not have: no memory is read for it, and the result cannot pass for one.
        offsets = tl.arange(0, BLOCK)
        nothing = tl.full([BLOCK], float("nan"), tl.float32).to(buffer.dtype.element_ty)
        for start in range(0, m, BLOCK):
            tl.store(buffer + offset + start + offsets, nothing, mask=start + offsets < m)


@triton.jit
def _scatter_row(
    pointer, error, source, m, chosen, write, DTYPE: tl.constexpr, WITH_ERROR: tl.constexpr, BLOCK: tl.constexpr
):
    # Nested conditions: `and` would make a number of the compile-time one.
    offsets = tl.arange(0, BLOCK)
    zeros = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, m, BLOCK):
        at = start + offsets
        inside = at < m
        if chosen:
            x = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(pointer + at, x.to(DTYPE), mask=inside)
            if WITH_ERROR:  # noqa: SIM102
                if write != 0:
                    tl.store(error + at, zeros, mask=inside)
        else:
            if WITH_ERROR:  # noqa: SIM102
                if write != 0:
                    x = tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)
                    x += tl.load(error + at, mask=inside, other=0.0)
                    tl.store(error + at, x, mask=inside)
            tl.store(pointer + at, zeros.to(DTYPE), mask=inside)


@triton.jit
def _scatter_typed(
    address, error, buffer, offset, m, chosen, write, DTYPE: tl.constexpr,
    WITH_ERROR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if ((address | error) % 16 == 0) & (m % 8 == 0) & (offset % 8 == 0):
        _scatter_row(
            typed_pointer(address, DTYPE, True), typed_pointer(error, tl.float32, True), buffer + offset // 8 * 8,
            m // 8 * 8, chosen, write, DTYPE, WITH_ERROR, BLOCK,
        )  # fmt: skip
    else:
        _scatter_row(
            typed_pointer(address, DTYPE, False), typed_pointer(error, tl.float32, False), buffer + offset,
            m, chosen, write, DTYPE, WITH_ERROR, BLOCK,
        )  # fmt: skip


@triton.jit
def _scatter(
    addresses, errors, columns, codes, first_rows, row_owners, buffer_offsets, slots, update, buffer,
    WITH_ERROR: tl.constexpr, WITH_UPDATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of G: from the buffer if it was selected, else zeros, and then what it held goes to the error memory."""
    number = tl.program_id(0)
    owner = tl.load(row_owners + number)
    m = tl.load(columns + owner)
    row = number - tl.load(first_rows + owner)
    slot = tl.load(slots + number)
    chosen = slot >= 0
    offset = tl.load(buffer_offsets + owner) + tl.maximum(slot, 0).to(tl.int64) * m
    write = 1
    if WITH_UPDATE:
        write = tl.load(update)
    address = tl.load(addresses + owner)
    error = address
    if WITH_ERROR:
        error = tl.load(errors + owner) + row * m * 4
    code = tl.load(codes + owner)
    if code == FLOAT32:
        address += row * m * 4
        error = error if WITH_ERROR else address
        _scatter_typed(address, error, buffer, offset, m, chosen, write, tl.float32, WITH_ERROR, BLOCK)
    elif code == BFLOAT16:
        address += row * m * 2
        error = error if WITH_ERROR else address
        _scatter_typed(address, error, buffer, offset, m, chosen, write, tl.bfloat16, WITH_ERROR, BLOCK)
    else:
        address += row * m * 2
        error = error if WITH_ERROR else address
        _scatter_typed(address, error, buffer, offset, m, chosen, write, tl.float16, WITH_ERROR, BLOCK)


def pack_rows(
    matrices: MatrixList,
    selected: Tensor,
    counts: Sequence[int],
    divisor: float,
    errors: MatrixList | None,
    dtype: torch.dtype,
) -> Tensor:
    """Launch `_pack` over lists that have been inspected."""
    device = selected.device
    table, addresses = matrix_table(matrices), address_table(matrices.listed)
    layout = pack_layout(matrices.shapes, counts, device)
    buffer = torch.empty(layout.buffer_numel, dtype=dtype, device=device)
    if layout.buffer_numel == 0:
        return buffer
    with torch.cuda.device_of(buffer):
        _pack[(len(selected),)](
            addresses, addresses if errors is None else address_table(errors.listed), table.rows, table.columns,
            table.codes, layout.first_rows, layout.slot_owners, layout.local_slots, layout.buffer_offsets, selected,
            buffer, 1 / divisor, WITH_ERROR=errors is not None, BLOCK=BLOCK, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    return buffer


def scatter_rows_(
    matrices: MatrixList,
    buffer: Tensor,
    selected: Tensor,
    counts: Sequence[int],
    errors: MatrixList | None,
    update: Tensor | None,
) -> None:
    """Launch `_scatter` over lists that have been inspected."""
    device = selected.device
    table, addresses = matrix_table(matrices), address_table(matrices.listed)
    layout = pack_layout(matrices.shapes, counts, device)
    if table.total_rows == 0:
        return
    slots = torch.full((table.total_rows,), -1, dtype=torch.int32, device=device)
    slots[selected] = layout.local_slots
    flag = slots if update is None else update.to(torch.int32)
    with torch.cuda.device_of(buffer):
        _scatter[(table.total_rows,)](
            addresses, addresses if errors is None else address_table(errors.listed), table.columns, table.codes,
            layout.first_rows, layout.row_owners, layout.buffer_offsets, slots, flag, buffer,
            WITH_ERROR=errors is not None, WITH_UPDATE=update is not None, BLOCK=BLOCK, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """Both kernels with error memory, for compilation ahead of time."""
    shared = {
        **{"addresses": "*i64", "errors": "*i64", "columns": "*i32", "codes": "*i32", "first_rows": "*i64"},
        "buffer_offsets": "*i64",
    }
    pack = {**shared, "rows": "*i32", "slot_owners": "*i32", "local_slots": "*i32", "selected": "*i64"}
    scatter = {**shared, "row_owners": "*i32", "slots": "*i32", "update": "*i32"}
    # 64 threads, 1024 elements: four loads of 4 floats for each thread, or two of 8 halves. A row of G (three dtypes)
    # goes with its float32 error, and in the scatter with the buffer as well.
    cases = []
    for name, wide in (("fp32", 4), ("bf16", 2)):
        buffer = f"*{name}"
        cases += [
            CompileCase(
                _pack, f"pack to {name}", {**pack, "buffer": buffer, "factor": "fp32"},
                {"WITH_ERROR": True, "BLOCK": BLOCK}, WARPS, (4 + 2 + 2) + 3 * 4,
            ),
            CompileCase(
                _scatter, f"scatter from {name}", {**scatter, "buffer": buffer},
                {"WITH_ERROR": True, "WITH_UPDATE": False, "BLOCK": BLOCK}, WARPS, (4 + 2 + 2) + 3 * 4 + 3 * wide,
            ),
        ]  # fmt: skip
    return cases
