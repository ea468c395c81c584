"""Triton kernel: alignment of every token with a vector, in one pass, counted where it is computed."""

# The arguments of a jitted function are Triton's own values, and torch.cuda.device_of carries no annotation.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_eff.kernels.device import OPTIONS, CompileCase

ROWS = 16
COLUMNS = 128


@triton.jit(do_not_specialize=["tokens", "eps"])
def _count(
    x, v, partials, tokens, m, stride, eps,
    BINS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partials[block] = histogram of the block's alignments, then the four counts."""
    block = tl.program_id(0)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    first = block.to(tl.int64) * ROWS
    inside = first + row < tokens
    x += first * stride
    dots = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    squares = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for start in range(0, m, COLUMNS):
        here = start + column < m
        values = tl.load(
            x + row[:, None] * stride + (start + column)[None, :], mask=inside[:, None] & here[None, :], other=0.0
        ).to(tl.float32)
        direction = tl.load(v + start + column, mask=here, other=0.0)
        # A product and a sum, not one fused step: equal and opposite terms have to give exactly zero.
        dots += values * direction[None, :]
        squares += values * values
    dot = tl.sum(dots, axis=1)
    norm = tl.sqrt(tl.sum(squares, axis=1))
    alignment = dot / (norm + eps)
    finite = (alignment - alignment) + (norm - norm) == 0.0  # infinity minus itself is NaN
    place = tl.floor((tl.where(finite, alignment, 0.0) + 1.0) * (BINS / 2))
    place = tl.minimum(tl.maximum(place, 0.0), BINS - 1.0).to(tl.int32)
    event = tl.where(dot > 0.0, BINS, tl.where(dot < 0.0, BINS + 1, BINS + 2))
    event = tl.where(finite, event, BINS + 3)
    place = tl.where(finite & inside, place, -1)
    event = tl.where(inside, event, -1)
    number = tl.arange(0, WIDTH)
    hits = (place[:, None] == number[None, :]) | (event[:, None] == number[None, :])
    tl.store(partials + block * WIDTH + number, tl.sum(hits.to(tl.int32), axis=0))


def alignment_counts(x: Tensor, v: Tensor, bins: int, eps: float) -> Tensor:
    """Launch the kernel; the blocks' counts are integers, so the order of their sum does not matter."""
    tokens, m = x.shape
    width = triton.next_power_of_2(bins + 4)
    blocks = triton.cdiv(tokens, ROWS)
    partials = torch.empty((blocks, width), dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        _count[(blocks,)](
            x, v, partials, tokens, m, x.stride(0), eps,
            BINS=bins, WIDTH=width, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return partials.sum(dim=0)[: bins + 4]


def compile_cases() -> list[CompileCase]:
    """The kernel for each dtype, for compilation ahead of time."""
    constants = {"BINS": 32, "WIDTH": 64, "ROWS": ROWS, "COLUMNS": COLUMNS}
    arguments = {"v": "*fp32", "partials": "*i32", "tokens": "i32", "m": "i32", "stride": "i32", "eps": "fp32"}
    # 128 threads, 16 x 128 elements: four loads of 4 floats for each thread, or two of 8 halves.
    return [
        CompileCase(
            _count, f"count, {dtype}", {"x": f"*{dtype}", **arguments}, constants, 4, wide, multiples=("m", "stride")
        )
        for dtype, wide in (("fp32", 4), ("bf16", 2), ("fp16", 2))
    ]
