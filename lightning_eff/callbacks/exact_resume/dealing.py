"""The order of an epoch over all ranks, and what is left of it dealt to other ranks, or in other batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler


def order_of(loader: DataLoader[Any]) -> dict[str, Any] | None:
    """What the order of the pass that begins is made from, the same on all ranks; None where only its sampler knows."""
    sampler: Any = loader.sampler
    batches = loader.batch_sampler
    if type(getattr(batches, "sampler_in_front_of", batches)) is not BatchSampler:  # while an iterator is made
        return None
    if type(sampler) is DistributedSampler:
        return {"shuffle": sampler.shuffle, "seed": sampler.seed, "epoch": sampler.epoch}
    if type(sampler) is SequentialSampler:
        return {"shuffle": False}
    if type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None:
        return {"shuffle": True, "generator": None, "own": sampler.generator is not None}
    return None


def note_generator(order: dict[str, Any] | None, sampler: Any) -> None:
    """A ``RandomSampler`` is asked for its first index now."""
    if order is not None and "generator" in order:
        order["generator"] = (sampler.generator or torch.default_generator).get_state()


def samples_of(order: dict[str, Any], number: int) -> Sequence[int]:
    """All samples of the epoch in their order, each once; no generator is touched."""
    if not order["shuffle"]:
        return range(number)
    every: Any = range(number)
    if "seed" in order:
        distributed: DistributedSampler[int] = DistributedSampler(every, 1, 0, seed=order["seed"])
        distributed.set_epoch(order["epoch"])
        return list(distributed)
    generator = torch.Generator()
    generator.set_state(order["generator"])
    if not order["own"]:  # then it draws a seed from torch's generator for one of its own
        generator = generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_(generator=generator)))
    return list(RandomSampler(every, generator=generator))


def seen(about: dict[str, Any], before: int, batches: int) -> int:
    """Of the samples of the epoch, how many all ranks together have seen.

    Args:
        about: the loader, as ``PlacedLoader.about`` has it.
        before: samples that were seen before they were dealt to these ranks.
        batches: of each rank since then.
    """
    left, replicas = int(about["samples"]) - before, int(about["replicas"])
    each = min(batches * int(about["batch_size"]), math.ceil(left / replicas))
    return before + min(each * replicas, left)


class Hand:
    """What one rank gets of the samples that are left: every ``replicas``-th of them, as ``DistributedSampler`` deals.

    All ranks get as many: a few samples are given once more, or left out where the sampler has ``drop_last``.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        sampler, batches = loader.sampler, loader.batch_sampler
        self.replicas: int = getattr(sampler, "num_replicas", 1)
        self.rank: int = getattr(sampler, "rank", 0)
        self.drop_last: bool = getattr(sampler, "drop_last", False)
        self._cut = (getattr(batches, "batch_size", 1), getattr(batches, "drop_last", False))

    def batches(self, left: int) -> int:
        """How many batches so many samples make on each rank."""
        each = left // self.replicas if self.drop_last else math.ceil(left / self.replicas)
        return len(BatchSampler(range(each), *self._cut))

    def deal(self, left: Sequence[int]) -> list[list[int]]:
        """This rank's batches."""
        left = list(left)
        if self.drop_last:
            left = left[: len(left) // self.replicas * self.replicas]
        elif left:
            missing = -len(left) % self.replicas
            left += (left * math.ceil(missing / len(left)))[:missing]
        return list(BatchSampler(left[self.rank :: self.replicas], *self._cut))
