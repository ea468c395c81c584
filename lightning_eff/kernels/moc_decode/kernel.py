"""Triton kernels: products with the selected rows of a matrix, for one token or a few."""

# The arguments of a jitted function are Triton's own values, and torch.cuda.device_of carries no annotation.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_eff.kernels.device import OPTIONS, CompileCase
from lightning_eff.kernels.moc_decode.reference import GROUP, OF_GROUP

WARPS = 4
ROWS, COLUMNS = 8, 256  # of a tile of up rows, along which its program walks
GROUPS = 2  # of eight rows
DOWN_ROWS, DOWN_COLUMNS = 32, 64
PROGRAMS = 256
"""As many as a GPU should have at least: few tokens have few columns, so the K rows are split among more programs."""

LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _dots(x, matrix, rows, inside, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The product of each of these rows with a token, in float32."""
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        token = tl.load(x + column, mask=column < d, other=0.0).to(tl.float32)
        places = matrix + rows[:, None] * d + column[None, :]
        tile = tl.load(places, mask=inside[:, None] & (column < d)[None, :], other=0.0)
        sums += tile.to(tl.float32) * token[None, :]
    return tl.sum(sums, axis=1)


@triton.jit
def _activated(v, u, DTYPE: tl.constexpr):
    """silu(v) u, rounded to the dtype at each step as the reference does."""
    s = _silu(v.to(DTYPE).to(tl.float32)).to(DTYPE)
    return (s.to(tl.float32) * u.to(DTYPE).to(tl.float32)).to(DTYPE)


@triton.jit
def _selected_up(x, up, values, channels, z, k, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One token's products with a tile of selected rows."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = at < k
    rows = tl.load(channels + token * k + at, mask=inside, other=0).to(tl.int64)
    u = _dots(x + token * d, up, rows, inside, d, ROWS, COLUMNS)
    v = tl.load(values + token * k + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(z + token * k + at, _activated(v, u, z.dtype.element_ty), mask=inside)


@triton.jit
def _pairs_up(x, gate, up, z, channels, groups, d, GROUPS: tl.constexpr, COLUMNS: tl.constexpr):
    """One token's gates of some groups of eight, and its products with the up rows of the two largest of each."""
    token = tl.program_id(0).to(tl.int64)
    first_group = tl.program_id(1) * GROUPS
    row = first_group.to(tl.int64) * 8 + tl.arange(0, 8 * GROUPS)
    gates = _dots(x + token * d, gate, row, row < groups * 8, d, 8 * GROUPS, COLUMNS)
    # Compared as the dtype has them. What is no number is the largest, as torch's `topk` has it; what is infinitely
    # small is still larger than what has been taken.
    gates = tl.reshape(gates.to(z.dtype.element_ty).to(tl.float32), [GROUPS, 8])
    order = tl.where(gates != gates, float("inf"), tl.maximum(gates, LOWEST))
    place = tl.arange(0, 8)[None, :]
    group = first_group + tl.arange(0, GROUPS)
    inside = group < groups
    out = token * groups * 2 + group * 2
    for nth in tl.static_range(2):
        best = tl.argmax(order, axis=1)
        here = place == best[:, None]
        v = tl.sum(tl.where(here, gates, 0.0), axis=1)
        order = tl.where(here, float("-inf"), order)
        channel = group.to(tl.int64) * 8 + best
        u = _dots(x + token * d, up, channel, inside, d, GROUPS, COLUMNS)
        tl.store(z + out + nth, _activated(v, u, z.dtype.element_ty), mask=inside)
        tl.store(channels + out + nth, channel, mask=inside)


@triton.jit
def _selected_down(z, channels, down, partials, tokens, k, d, share, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Some columns of the weighted sum of some of the selected rows."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(2)
    end = tl.minimum(k, (split + 1) * share)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(split * share, end, ROWS):
        at = start + tl.arange(0, ROWS)
        inside = at < end
        rows = tl.load(channels + token * k + at, mask=inside, other=0).to(tl.int64)
        weight = tl.load(z + token * k + at, mask=inside, other=0.0).to(tl.float32)
        places = down + rows[:, None] * d + column[None, :]
        tile = tl.load(places, mask=inside[:, None] & (column < d)[None, :], other=0.0)
        sums += weight[:, None] * tile.to(tl.float32)
    tl.store(partials + (split * tokens + token) * d + column, tl.sum(sums, axis=0), mask=column < d)


def selected_up(x: Tensor, up: Tensor, values: Tensor, channels: Tensor) -> Tensor:
    """Launch `_selected_up` over what has been checked."""
    (tokens, k), d = channels.shape, x.shape[1]
    z = torch.empty_like(values)
    with torch.cuda.device_of(x):
        _selected_up[(tokens, triton.cdiv(k, ROWS))](
            x, up, values, channels, z, k, d, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS, **OPTIONS
        )
    return z


def selected_down(z: Tensor, channels: Tensor, down: Tensor) -> Tensor:
    """Launch `_selected_down`, and add up what its programs have found."""
    (tokens, k), d = channels.shape, down.shape[1]
    columns = triton.cdiv(d, DOWN_COLUMNS)
    splits = max(1, min(triton.cdiv(k, DOWN_ROWS), PROGRAMS // (tokens * columns)))
    share = triton.cdiv(k, splits)
    partials = torch.empty((splits, tokens, d), dtype=torch.float32, device=z.device)
    with torch.cuda.device_of(z):
        _selected_down[(tokens, columns, splits)](
            *(z, channels, down, partials, tokens, k, d, share),
            ROWS=DOWN_ROWS,
            COLUMNS=DOWN_COLUMNS,
            num_warps=WARPS,
            **OPTIONS,
        )
    return partials.sum(0).to(z.dtype)


def pairs_up(x: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `_pairs_up` over what has been checked."""
    (tokens, d), groups = x.shape, len(gate) // GROUP
    z = torch.empty((tokens, OF_GROUP * groups), dtype=x.dtype, device=x.device)
    channels = torch.empty(z.shape, dtype=torch.int64, device=x.device)
    with torch.cuda.device_of(x):
        _pairs_up[(tokens, triton.cdiv(groups, GROUPS))](
            x, gate, up, z, channels, groups, d, GROUPS=GROUPS, COLUMNS=COLUMNS, num_warps=WARPS, **OPTIONS
        )
    return z, channels


def compile_cases() -> list[CompileCase]:
    """The three kernels in float32 and bfloat16, for compilation ahead of time."""
    tile = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    cases = []
    for name, w in (("fp32", 4), ("bf16", 2)):
        kind = f"*{name}"
        # 128 threads: a tile's elements of a thread, 16 bytes at a time.
        wide = ROWS * COLUMNS // 128 * w // 16
        up = dict.fromkeys(("x", "up", "values", "z"), kind) | {"channels": "*i64", "k": "i32", "d": "i32"}
        pairs = dict.fromkeys(("x", "gate", "up", "z"), kind) | {"channels": "*i64", "groups": "i32", "d": "i32"}
        down = dict.fromkeys(("z", "down"), kind) | {"channels": "*i64", "partials": "*fp32"}
        down |= dict.fromkeys(("tokens", "k", "d", "share"), "i32")
        down_wide = DOWN_ROWS * DOWN_COLUMNS // 128 * w // 16
        cases += [
            CompileCase(_selected_up, f"up {name}", up, tile, WARPS, wide, ("d",)),
            CompileCase(
                *(_pairs_up, f"2:8 up {name}", pairs, {"GROUPS": GROUPS, "COLUMNS": COLUMNS}, WARPS),
                wide_loads=GROUP * GROUPS * COLUMNS // 128 * w // 16,
                multiples=("d",),
            ),
            CompileCase(
                *(_selected_down, f"down {name}", down, {"ROWS": DOWN_ROWS, "COLUMNS": DOWN_COLUMNS}, WARPS),
                wide_loads=down_wide,
                multiples=("d",),
            ),
        ]
    return cases
