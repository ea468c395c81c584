"""How fast a group of ranks reduces: bandwidth and latency of the link between them, measured by all-reduces."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lightning_eff.arguments import check, check_count, check_number

SIZES = tuple(4 * 8**power for power in range(9))
"""Payloads of an all-reduce, in bytes: 4 B to 67 MB."""
_SHORT = 256


@dataclass(frozen=True)
class Sample:
    """One measured size.

    Attributes:
        payload: bytes of the tensor that was reduced.
        seconds: of the fastest of its all-reduces, on the slowest rank: what else the machine did is left out.
    """

    payload: int
    seconds: float


@dataclass(frozen=True)
class Link:
    """What the network between the ranks does: seconds = latency * collectives + bytes sent / bandwidth.

    Args:
        world_size: number of ranks.
        bandwidth: bytes a second that one rank sends in a long all-reduce.
        latency: seconds of an all-reduce of next to nothing.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> link = Link(world_size=2, bandwidth=25e6, latency=0.0002)  # 200 Mbit/s
        >>> round(link.seconds(bytes_sent=19.6e6), 3)
        0.784
    """

    world_size: int
    bandwidth: float
    latency: float

    def __post_init__(self) -> None:
        check_count("world_size", self.world_size)
        check_number("bandwidth", self.bandwidth, above=0, unit="bytes a second")
        check_number("latency", self.latency, least=0, unit="seconds")

    def seconds(self, bytes_sent: float, collectives: int = 1) -> float:
        """Time of collectives, one after the other, in which one rank sends so many bytes in all."""
        return self.latency * collectives + bytes_sent / self.bandwidth


def fit_link(samples: Sequence[Sample], world_size: int) -> Link:
    """Latency and bandwidth that fit measured all-reduces best.

    The latency is the median of the payloads up to 256 bytes, or the shortest one's time. The bandwidth is the
    least-squares fit of the relative errors of the payloads that take more than twice as long: shorter ones say nothing
    about it. Where none does, the link is as fast as the longest payload shows.

    Args:
        samples: of different payloads.
        world_size: number of ranks, at least 2.

    Raises:
        ValueError: no samples, or ``world_size`` below 2.

    Example:
        >>> samples = [Sample(4, 0.001), Sample(10**6, 0.101), Sample(10**7, 1.001)]
        >>> link = fit_link(samples, world_size=2)
        >>> round(link.bandwidth), link.latency
        (10000000, 0.001)
    """
    check("samples", samples, len(samples) > 0, "at least one measured all-reduce")
    check_count("world_size", world_size, least=2)
    samples = sorted(samples, key=lambda sample: sample.payload)
    latency = statistics.median([s.seconds for s in samples if s.payload <= _SHORT] or [samples[0].seconds])
    sent = [2 * (world_size - 1) / world_size * sample.payload for sample in samples]
    long = [pair for pair in zip(sent, samples, strict=True) if pair[1].seconds > 2 * latency]
    if not long:
        return Link(world_size, sent[-1] / samples[-1].seconds, latency)
    # Minimise the sum of ((latency + x * bytes - seconds) / seconds)^2 over x, the seconds of a byte.
    shares = [(number / sample.seconds, 1 - latency / sample.seconds) for number, sample in long]
    inverse = sum(a * b for a, b in shares) / sum(a * a for a, _ in shares)
    return Link(world_size, 1 / inverse, latency)


def measure_link(
    group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
    sizes: Sequence[int] = SIZES,
    budget: float = 20.0,
) -> list[Sample]:
    """Time all-reduces of float32 tensors of growing size; called by every rank of the group.

    All ranks get the same samples: the slowest rank's times count, as they do in training. A size that would take
    more than its share of the budget, judged by the one before it, ends the series.

    Args:
        group: of the ranks; None for the default one.
        device: where the tensors are: ``"cpu"`` for gloo, this rank's GPU for NCCL.
        sizes: payloads in bytes, ascending.
        budget: seconds that the series may take, roughly.

    Raises:
        ValueError: ``sizes`` is empty or not ascending, or ``budget`` is not above 0.
    """
    check("sizes", sizes, len(sizes) > 0 and list(sizes) == sorted(set(sizes)), "ascending numbers of bytes")
    check_number("budget", budget, above=0, unit="seconds")
    device = torch.device(device)
    samples: list[Sample] = []
    for size in sizes:
        if samples:
            # From the slowest rank's times, so that all ranks stop at the same size.
            expected = samples[-1].seconds * size / samples[-1].payload
            if 4 * expected > budget / 2 and len(samples) > 2:
                break
        tensor = torch.ones(max(1, size // 4), device=device)
        first = _slowest(_time(tensor, group), group, device)
        repeats = max(3, min(30, int(budget / (4 * len(sizes) * max(first, 1e-6)))))
        # The first one also opens connections and touches memory.
        times = [_slowest(_time(tensor, group), group, device) for _ in range(repeats)]
        samples.append(Sample(4 * tensor.numel(), min(times)))
    return samples


def _time(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> float:
    dist.barrier(group)
    wait = waiter(tensor.device)
    wait()
    start = time.perf_counter()
    dist.all_reduce(tensor, group=group)
    wait()
    return time.perf_counter() - start


def _slowest(seconds: float, group: dist.ProcessGroup | None, device: torch.device) -> float:
    number = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX, group=group)
    return float(number.item())


def waiter(device: torch.device) -> Callable[[], None]:
    """A function that waits for the device; measuring is the one place where that is wanted."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None
