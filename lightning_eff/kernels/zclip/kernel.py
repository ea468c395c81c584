"""ZClip's decision on one step's norm as one Triton launch; `functional/zclip.py` holds the truth, in plain torch.

Everything is a float64 scalar except the ring of raw norms. The operations and their order are those of the truth, so
the two differ by no more than the order of the sums over the ring.
"""

# The arguments of a jitted function are Triton's own values, and torch.cuda.device_of carries no annotation.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_eff.kernels.device import OPTIONS, CompileCase


@triton.jit
def _decide(
    norm_pointer,
    values,
    ring,
    constants,
    WARMUP: tl.constexpr,
    PERCENTILE: tl.constexpr,
    TO_MEAN: tl.constexpr,
    SKIP_SPIKES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program of one warp. `values` and `constants` are laid out as VALUES and Constants."""
    # Numbers come in float64 from memory: a float argument of a kernel would be rounded to float32.
    alpha = tl.load(constants + 0)
    beta = tl.load(constants + 1)
    z_thresh = tl.load(constants + 2)
    cap = tl.load(constants + 3)
    eps = tl.load(constants + 4)
    std_floor = tl.load(constants + 5)
    clip_factor = tl.load(constants + 6)
    on_nonfinite = tl.load(constants + 7)
    relearn_after = tl.load(constants + 8)
    norm_eps = tl.load(constants + 9)
    auto_cap = tl.load(constants + 10)
    one = tl.load(constants + 11)
    infinity = tl.load(constants + 12)
    zero = one - one

    norm = tl.load(norm_pointer).to(tl.float64)
    mean = tl.load(values + 0)
    var = tl.load(values + 1)
    count = tl.load(values + 2)
    streak = tl.load(values + 3)
    finite = (norm - norm) == zero
    valid = finite & (norm > zero)
    warm = count >= WARMUP

    # The ring before this step: in the warm-up its mean so far, or the norm before, is the level of the cap "auto".
    places = tl.arange(0, BLOCK)
    inside = places < WARMUP
    norms = tl.load(ring + places, mask=inside, other=0.0)
    before = tl.sum(tl.where(places == (count.to(tl.int32) - 1) % WARMUP, norms, 0.0), axis=0)
    so_far = tl.maximum(tl.sum(norms, axis=0) / tl.maximum(count, one), before)
    so_far = tl.where(count > zero, so_far, infinity)
    own_cap = auto_cap * tl.where(warm, mean, so_far)
    cap = tl.minimum(cap, own_cap)
    kept = tl.where(warm, norm, tl.minimum(norm, own_cap))

    std = tl.maximum(tl.sqrt(var), std_floor * mean)
    z_score = (norm - mean) / (std + eps)
    if PERCENTILE:
        target = mean + z_thresh * std
        trigger = target
        outlier = norm > trigger
    else:
        trigger = mean + z_thresh * (std + eps)
        outlier = z_score > z_thresh
        if TO_MEAN:
            target = mean
        else:
            target = (mean + z_thresh / (z_score / z_thresh) * std) * clip_factor
    spike = outlier & valid & warm
    seen = tl.where(spike, target, norm)
    limit = tl.minimum(seen, cap)
    clipped = valid & (norm > limit)
    coefficient = tl.where(clipped, limit / (norm + norm_eps), one)
    coefficient = tl.where(finite, coefficient, on_nonfinite)

    updated = warm & valid
    if SKIP_SPIKES:
        updated = updated & (spike == 0)
    new_mean = alpha * mean + beta * seen
    change = seen - new_mean
    new_var = alpha * var + beta * (change * change)

    # The ring was read before its new entry is written, and is given that entry in registers.
    place = tl.where(valid, count.to(tl.int32) % WARMUP, -1)
    norms = tl.where(places == place, kept, norms)
    count += tl.where(valid, one, zero)
    streak = tl.where(valid, tl.where(spike, streak + one, zero), streak)
    relearn = streak >= relearn_after
    anew = (count >= WARMUP) & ((warm == 0) | relearn)
    ring_mean = tl.sum(norms, axis=0) / WARMUP
    deviations = tl.where(inside, norms - ring_mean, zero)
    ring_var = tl.sum(deviations * deviations, axis=0) / WARMUP

    totals = values + tl.arange(0, 8)  # steps to recent_nonfinite: entries 4 to 11
    counted = tl.arange(0, 8)
    old = tl.load(totals + 4)
    more = tl.where((counted == 0) | (counted == 5), one, zero)
    more = tl.where(counted == 1, tl.where(spike, one, zero), more)
    more = tl.where((counted == 2) | (counted == 6), tl.where(clipped, one, zero), more)
    more = tl.where((counted == 3) | (counted == 7), tl.where(finite, zero, one), more)
    more = tl.where(counted == 4, tl.where(relearn, one, zero), more)

    shown = tl.where(on_nonfinite == zero, zero, norm)
    tl.debug_barrier()
    tl.store(ring + places, norms, mask=inside)
    tl.store(values + 0, tl.where(anew, ring_mean, tl.where(updated, new_mean, mean)))
    tl.store(values + 1, tl.where(anew, ring_var, tl.where(updated, new_var, var)))
    tl.store(values + 2, count)
    tl.store(values + 3, tl.where(relearn, zero, streak))
    tl.store(totals + 4, old + more)
    tl.store(values + 12, norm)
    tl.store(values + 13, tl.where(finite, norm * coefficient, shown))
    tl.store(values + 14, tl.where(warm, tl.minimum(trigger, cap), cap))
    tl.store(values + 15, tl.where(warm & valid, z_score, zero))
    tl.store(values + 16, coefficient)


@functools.lru_cache(maxsize=64)
def _on_device(constants: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(constants, dtype=torch.float64, device=device)


def decide(
    norm: Tensor,
    values: Tensor,
    ring: Tensor,
    constants: tuple[float, ...],
    *,
    percentile: bool,
    to_mean: bool,
    skip_spikes: bool,
) -> None:
    """Launch `_decide`."""
    with torch.cuda.device_of(norm):
        _decide[(1,)](
            norm, values, ring, _on_device((*constants, 1.0, math.inf), norm.device),
            WARMUP=len(ring), PERCENTILE=percentile, TO_MEAN=to_mean, SKIP_SPIKES=skip_spikes,
            BLOCK=triton.next_power_of_2(len(ring)), num_warps=1, **OPTIONS,
        )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """The kernel as the default configuration launches it, for compilation ahead of time."""
    arguments = {"norm_pointer": "*fp64", "values": "*fp64", "ring": "*fp64", "constants": "*fp64"}
    constants = {"WARMUP": 25, "PERCENTILE": False, "TO_MEAN": False, "SKIP_SPIKES": False, "BLOCK": 32}
    return [CompileCase(_decide, "decide", arguments, constants, 1)]
