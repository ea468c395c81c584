"""Whether compression pays: a forecast of the step for every compressor, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from lightning_eff.compression.forecast.link import Link
from lightning_eff.compression.forecast.rehearsal import BucketPlan, Compute, dense_plan, rehearse, step_seconds
from lightning_eff.compression.interface import Compressor

DENSE = "ddp"

_GENTLEST = {"ddp_bf16": 0.05, "ddp_fp16": 0.10, "ddp_int8": 0.15}
"""From what changes the gradients least: how much of the step must be saved, against what is gentler, to be advised."""
_LOSSY = 0.25
"""The same for what leaves most of a gradient out of a step, and so may need more steps."""
_NEVER = "ddp_randk"
"""A baseline: it sends what it sends without a look at the gradient."""


@dataclass(frozen=True)
class Forecast:
    """A step with one strategy.

    Attributes:
        strategy: as a Trainer takes it.
        bytes_sent: by one rank in a step.
        wire: seconds that the link is busy.
        own: seconds that a rank spends on compressing and unpacking.
        step: seconds of a step, with what overlaps; without a time of the computation the communication's alone.
    """

    strategy: str
    bytes_sent: float
    wire: float
    own: float
    step: float


def forecast(strategy: str, plan: Sequence[BucketPlan], link: Link, compute: Compute) -> Forecast:
    """What a step's plan means on a link."""
    stages = [size for bucket in plan for size in bucket.stages]
    return Forecast(
        strategy,
        bytes_sent=sum(stages),
        wire=link.seconds(sum(stages), len(stages)),
        own=sum(bucket.before + bucket.after for bucket in plan),
        step=step_seconds(plan, link, compute),
    )


def forecasts(
    compressors: Mapping[str, Compressor],
    shapes: Mapping[str, Sequence[int]],
    link: Link,
    compute: Compute,
    bucket_cap_mb: Callable[[float], float],
    device: torch.device | str = "cpu",
) -> Iterator[Forecast]:
    """Plain DDP's forecast, then each compressor's, as it has been rehearsed on this device.

    Args:
        compressors: by the name that the strategy's string ends with.
        shapes: of the trainable parameters, by name, in the order of the model.
        link: between the ranks.
        compute: of a step on one rank.
        bucket_cap_mb: the size of the buckets, in MiB, that compressed strategies choose for so many bytes.
        device: where the gradients are.
    """
    yield forecast(DENSE, dense_plan(shapes, link.world_size), link, compute)
    cap = bucket_cap_mb(4.0 * sum(prod(shape) for shape in shapes.values()))
    for name, compressor in compressors.items():
        yield forecast(f"ddp_{name}", rehearse(compressor, shapes, link.world_size, cap, device), link, compute)


def advise(found: Sequence[Forecast]) -> Forecast:
    """The forecast to follow.

    From what changes the gradients least to what changes them most, each must be faster than what was chosen before it:
    bfloat16 by 5 % of plain DDP's step, which is also what a forecast can tell; float16 by 10 %, int8 by 15 %, and what
    leaves out most of a gradient by 25 %. Rand-K is a baseline and never advised.

    Args:
        found: with plain DDP's among them.

    Example:
        >>> slow = [Forecast("ddp", 2e7, 3.2, 0.0, 3.8), Forecast("ddp_bf16", 1e7, 1.6, 0.1, 2.2)]
        >>> advise(slow).strategy
        'ddp_bf16'
        >>> fast = [Forecast("ddp", 2e7, 0.0, 0.0, 0.52), Forecast("ddp_bf16", 1e7, 0.0, 0.1, 0.51)]
        >>> advise(fast).strategy
        'ddp'
    """
    by_name = {each.strategy: each for each in found if each.strategy != _NEVER}
    chosen = by_name.pop(DENSE)
    for strategy, margin in _GENTLEST.items():
        other = by_name.pop(strategy, None)
        if other is not None and other.step < (1 - margin) * chosen.step:
            chosen = other
    fastest = min(by_name.values(), key=lambda each: each.step, default=chosen)
    return fastest if fastest.step < (1 - _LOSSY) * chosen.step else chosen
