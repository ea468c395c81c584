"""Triton kernels: one pass over the selected channels of all tokens, forward and backward."""

# The arguments of a jitted function are Triton's own values, and torch.cuda.device_of carries no annotation.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_eff.kernels.device import OPTIONS, CompileCase

BLOCK = 2048
WARPS = 4


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _activate(up, values, channels, u, s, z, hidden, total, k, d_ff, BLOCK: tl.constexpr):
    """For each of tokens * K selected channels: u gathered, silu, product, and the product in place."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    v = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    place = at // k * d_ff + tl.load(channels + at, mask=inside, other=0).to(tl.int64)
    gathered = tl.load(up + place, mask=inside, other=0.0)
    # Rounded to the dtype at each step, as the reference does.
    activated = (v * _sigmoid(v)).to(gathered.dtype)
    product = (activated.to(tl.float32) * gathered.to(tl.float32)).to(gathered.dtype)
    tl.store(u + at, gathered, mask=inside)
    tl.store(s + at, activated, mask=inside)
    tl.store(z + at, product, mask=inside)
    tl.store(hidden + place, product, mask=inside)


@triton.jit
def _activate_backward(grad, values, channels, u, s, d_gate, d_up, total, k, d_ff, BLOCK: tl.constexpr):
    """For each of them: the gradient of z gathered, those of v and u, in place."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    v = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    place = at // k * d_ff + tl.load(channels + at, mask=inside, other=0).to(tl.int64)
    gathered = tl.load(u + at, mask=inside, other=0.0)
    activated = tl.load(s + at, mask=inside, other=0.0).to(tl.float32)
    dz = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    outer = (dz * gathered.to(tl.float32)).to(gathered.dtype).to(tl.float32)
    sigmoid = _sigmoid(v)
    tl.store(d_gate + place, (outer * sigmoid * (1.0 + v * (1.0 - sigmoid))).to(gathered.dtype), mask=inside)
    tl.store(d_up + place, (dz * activated).to(gathered.dtype), mask=inside)


def activate(up: Tensor, values: Tensor, channels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch `_activate` over what has been checked."""
    total, k = values.numel(), values.shape[1]
    u, s, z = (torch.empty_like(values) for _ in range(3))
    hidden = torch.zeros_like(up)
    with torch.cuda.device_of(up):
        _activate[(triton.cdiv(total, BLOCK),)](
            up, values, channels, u, s, z, hidden, total, k, up.shape[1], BLOCK=BLOCK, num_warps=WARPS, **OPTIONS
        )
    return u, s, z, hidden


def activate_backward(
    grad: Tensor, values: Tensor, channels: Tensor, u: Tensor, s: Tensor, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launch `_activate_backward` over what has been checked."""
    total, k = values.numel(), values.shape[1]
    d_gate, d_up = torch.zeros_like(grad) if into is None else into, torch.zeros_like(grad)
    with torch.cuda.device_of(grad):
        _activate_backward[(triton.cdiv(total, BLOCK),)](
            grad, values, channels, u, s, d_gate, d_up, total, k, grad.shape[1], BLOCK=BLOCK, num_warps=WARPS, **OPTIONS
        )
    return d_gate, d_up


def compile_cases() -> list[CompileCase]:
    """Both kernels in float32 and bfloat16, for compilation ahead of time."""
    numbers = {"total": "i32", "k": "i32", "d_ff": "i32"}
    cases = []
    for name, wide in (("fp32", 4), ("bf16", 2)):
        # 128 threads, 2048 channels: a thread's 16 values are 4 loads of 4 floats or 2 of 8 halves; indices of 8 bytes
        # from the selection take 8 loads, kept ones of 2 bytes take 2.
        forward = dict.fromkeys(("up", "values", "u", "s", "z", "hidden"), f"*{name}") | {"channels": "*i64"}
        backward = dict.fromkeys(("grad", "values", "u", "s", "d_gate", "d_up"), f"*{name}") | {"channels": "*i16"}
        for kernel, what, arguments, loads in (
            (_activate, f"activate {name}", forward, wide + 8),
            (_activate_backward, f"backward {name}", backward, 3 * wide + 2),
        ):
            cases.append(CompileCase(kernel, what, arguments | numbers, {"BLOCK": BLOCK}, WARPS, loads, ("total",)))
    return cases
