"""ZClip's decision on one step's norm: statistics, threshold, coefficient and counters in one launch.

Byte count: some 40 numbers and the ring of raw norms. What it saves is not memory but launches: the same in plain torch
takes some dozens of them. The truth, and what runs on the CPU, is :func:`lightning_eff.functional.zclip.zclip_update`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["VALUES", "Constants", "decide"]

VALUES = (
    *("mean", "var", "count", "streak"),
    *("steps", "spikes", "clipped", "nonfinite", "relearned", "recent_steps", "recent_clipped", "recent_nonfinite"),
    *("norm", "norm_clipped", "threshold", "z_score", "coefficient"),
)
"""What the entries of :func:`decide`'s ``values`` are."""


class Constants(NamedTuple):
    """The numbers of ZClip's decision; infinity where there is no cap, none that follows the run, no learning anew."""

    alpha: float
    one_minus_alpha: float
    z_thresh: float
    max_grad_norm: float
    eps: float
    std_floor: float
    clip_factor: float
    on_nonfinite: float
    relearn_after: float
    norm_eps: float
    auto_cap: float


def decide(
    norm: Tensor,
    values: Tensor,
    ring: Tensor,
    constants: Constants,
    *,
    percentile: bool,
    to_mean: bool,
    skip_spikes: bool,
) -> None:
    """ZClip's whole decision on one norm in one launch: statistics, threshold, coefficient, counters.

    The kernel alone: its reference is :func:`lightning_eff.functional.zclip.zclip_update`, which calls it where
    :func:`lightning_eff.kernels.choose` says ``triton``.

    Args:
        norm: 0-d floating tensor.
        values: float64 tensor of shape (17,), laid out as ``VALUES``; changed in place.
        ring: float64 tensor of shape (warmup_steps,), the last raw norms; changed in place.
        constants: the configuration's numbers.
        percentile: clip to mean + z_thresh * std, rather than by the z-score.
        to_mean: clip an outlier of the z-score to the mean.
        skip_spikes: an outlier does not change the statistics.

    Raises:
        ValueError: a tensor of another shape, dtype or device, or one that is not contiguous.
    """
    if norm.numel() != 1 or norm.device != values.device:
        raise ValueError(
            f"zclip.decide: norm of shape {tuple(norm.shape)} on {norm.device} is not one number on "
            f"the device of the values, {values.device}"
        )
    for name, tensor, shape in (("values", values, (len(VALUES),)), ("ring", ring, (max(1, len(ring)),))):
        fits = tensor.shape == shape and tensor.dtype == torch.float64 and tensor.device == values.device
        if not fits or not tensor.is_contiguous():
            raise ValueError(
                f"zclip.decide: {name} of shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device} "
                f"must be a contiguous float64 tensor of shape {shape} on {values.device}"
            )
    from lightning_eff.kernels.zclip import kernel

    kernel.decide(norm, values, ring, constants, percentile=percentile, to_mean=to_mean, skip_spikes=skip_spikes)
