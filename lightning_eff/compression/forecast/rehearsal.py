"""A step's communication without the network: what every bucket would send, and the time that compressing takes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lightning_eff.arguments import check_count, check_number
from lightning_eff.compression.exchange import BucketExchange, Memory, Slot, Step, exchange_bucket, finish
from lightning_eff.compression.forecast.link import Link, waiter
from lightning_eff.compression.interface import AllGather, AllReduce, Collective, Compressor, all_reduce_bytes
from lightning_eff.compression.plan import as_matrix, bucket_names, pays


@dataclass(frozen=True)
class BucketPlan:
    """One bucket of a step.

    Attributes:
        numel: elements.
        stages: bytes that one rank sends in each of its collectives, in order; what is launched together is one.
        before: seconds of this rank's own work until the last collective is launched.
        after: seconds of its work once the last one is done.
    """

    numel: int
    stages: tuple[float, ...]
    before: float = 0.0
    after: float = 0.0


def dense_plan(
    shapes: Mapping[str, Sequence[int]], world_size: int, bucket_mb: float | None = None, itemsize: int = 4
) -> list[BucketPlan]:
    """The buckets of plain DDP: one all-reduce each.

    Args:
        shapes: of the trainable parameters, by name, in the order of the model.
        world_size: number of ranks.
        bucket_mb: DDP's ``bucket_cap_mb``, in MiB; None for its default: 1 for the first bucket, then 25.
        itemsize: bytes of an element.
    """
    numbers = [sum(prod(shapes[name]) for name in names) for names in bucket_names(shapes, bucket_mb, itemsize)]
    return [BucketPlan(numel, (all_reduce_bytes(itemsize * numel, world_size),)) for numel in numbers]


def rehearse(
    compressor: Compressor,
    shapes: Mapping[str, Sequence[int]],
    world_size: int,
    bucket_mb: float,
    device: torch.device | str = "cpu",
    repeats: int = 3,
) -> list[BucketPlan]:
    """Compress random gradients bucket by bucket, as a rank does, with nobody at the other end.

    The memory needed is that of one bucket, a few times over, whatever the size of the model.

    Args:
        compressor: with its settings; its dense steps at the beginning are left out.
        shapes: of the trainable parameters, by name, in the order of the model.
        world_size: number of ranks to be counted with.
        bucket_mb: DDP's ``bucket_cap_mb``, in MiB.
        device: where the gradients are.
        repeats: times that a bucket is compressed, >= 1; the fastest counts, after one that does not.

    Raises:
        ValueError: an argument out of its range.
    """
    check_count("world_size", world_size)
    check_number("bucket_mb", bucket_mb, above=0, unit="MiB")
    check_count("repeats", repeats)
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(0)
    plans = []
    for names in bucket_names(shapes, bucket_mb, itemsize=4):
        slots, offset = [], 0
        for name in names:
            rows, columns = as_matrix(shapes[name])
            slots.append(Slot(name, offset, rows, columns))
            offset += rows * columns
        compressed, dense = _split(compressor, slots, shapes, world_size)
        memory: Memory = {}
        tries = []
        for number in range(repeats + 1):
            buffer = torch.randn(offset, generator=generator, device=device)
            step = Step(number + compressor.start_step, rank=0, world_size=world_size)
            exchange = exchange_bucket(compressor, buffer, compressed, dense, memory, step)
            tries.append(_drive(exchange, step, world_size, device, offset))
        plans.append(min(tries[1:], key=lambda plan: plan.before + plan.after))
    return plans


def _split(
    compressor: Compressor, slots: list[Slot], shapes: Mapping[str, Sequence[int]], world_size: int
) -> tuple[list[Slot], list[Slot]]:
    """What is compressed of a bucket and what is not, as the communication hook decides it."""
    if compressor.whole_buckets:
        numel = sum(slot.numel for slot in slots)
        return ([Slot(slots[0].name, 0, 1, numel)], []) if pays(compressor, (1, numel), 4, world_size) else ([], slots)
    chosen = [slot for slot in slots if pays(compressor, shapes[slot.name], 4, world_size)]
    return chosen, [slot for slot in slots if slot not in chosen]


def _drive(exchange: BucketExchange, step: Step, world_size: int, device: torch.device, numel: int) -> BucketPlan:
    """Answer every collective with this rank's own tensors; the time of all but that."""
    wait = waiter(device)
    stages, before = [], 0.0
    wait()
    start = time.perf_counter()
    stage = next(exchange)
    while True:
        wait()
        before += time.perf_counter() - start
        stages.append(sum(request.bytes_sent(world_size) for request in stage.requests))
        results = [_echo(request, world_size) for request in stage.requests]
        wait()
        start = time.perf_counter()
        if stage.last:
            break
        stage = exchange.send(results)
    step.accepted = torch.ones((), dtype=torch.bool, device=device)
    finish(exchange, results, "an exchange goes on behind its last stage")
    wait()
    return BucketPlan(numel, tuple(stages), before, time.perf_counter() - start)


def _echo(request: Collective, world_size: int) -> Tensor:
    """What comes back where every rank sends what this one does."""
    if isinstance(request, AllReduce):
        return request.tensor.mul_(world_size)
    return request.tensor.expand(world_size, -1) if isinstance(request, AllGather) else request.tensor


@dataclass(frozen=True)
class Compute:
    """Seconds that a rank computes in a step when nothing is sent."""

    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0

    @classmethod
    def of_step(cls, seconds: float) -> Compute:
        """Split a step as a chain of matrix products does: a backward pass costs twice its forward pass."""
        return cls(forward=seconds / 3, backward=2 * seconds / 3)

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.forward + self.backward + self.optimizer


def step_seconds(plan: Sequence[BucketPlan], link: Link, compute: Compute) -> float:
    """Predicted time of a step.

    A bucket's gradients are ready when its share of the backward pass (by elements) is done. Its first collective is
    launched then, and the next ones of the bucket before it once their input is there, which the backward pass waits
    for. The link does one collective after the other. At the end every rank writes what has arrived.

    Args:
        plan: of the buckets, in the order in which they are reduced.
        link: between the ranks.
        compute: of a step.
    """
    numel = sum(bucket.numel for bucket in plan)
    now = compute.forward
    free = 0.0  # when the link is
    unfinished: list[tuple[Iterator[float], float]] = []
    done = now
    for bucket in plan:
        now += compute.backward * bucket.numel / numel + bucket.before
        stages = iter(bucket.stages)
        free = max(free, now) + link.seconds(next(stages))
        for index, (left, arrived) in enumerate(unfinished):
            if (size := next(left, None)) is not None:
                now = max(now, arrived)
                free = max(free, now) + link.seconds(size)
                unfinished[index] = left, free
        unfinished.append((stages, free))
    for left, arrived in unfinished:
        for size in left:
            now = max(now, arrived)
            free = max(free, now) + link.seconds(size)
            arrived = free
        done = max(done, arrived)
    return max(now, done) + sum(bucket.after for bucket in plan) + compute.optimizer
