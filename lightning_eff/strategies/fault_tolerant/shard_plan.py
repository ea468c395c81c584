"""Which samples make up batch ``index`` of virtual shard ``shard`` in ``epoch``: a pure function of these three.

As many shards as replicas at most, however many are alive, so that a batch never depends on who computes it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_eff.arguments import check_count, check_flag
from lightning_eff.training.namespaces import MisconfigurationException, is_a
from lightning_eff.training.random_state import seed_of, seeded

_MOST_RANKS = 1_000_000
"""Each shard and process has at least one sample, and what is missing is repeated."""


class ShardPlan:
    """The batches of every shard and epoch, cut from a DataLoader's samplers.

    - A ``DistributedSampler`` (such as Lightning injects), also one of the user's that subclasses it, is asked for each
      shard: the batches are those of a DDP run with as many ranks, in the same order.
    - ``RandomSampler`` and ``SequentialSampler`` become one.
    - Any other sampler gives its order under generators seeded by (seed, epoch), and the order is dealt like
      ``DistributedSampler`` deals: sample ``i`` goes to shard ``i`` modulo the number of shards.
    - A batch sampler of the user's works on the shard's samples where Lightning could inject a sampler; otherwise its
      batches are dealt.

    All shards have the same number of batches. Without ``drop_last`` the order is padded from its start to a multiple
    of the shards, as ``DistributedSampler`` does: at most ``shards - 1`` samples are seen twice. With ``drop_last``
    in a ``DistributedSampler`` they are dropped instead. ``drop_last`` of the DataLoader drops a shard's last, smaller
    batch. Where a batch sampler makes unequal numbers of batches, the epoch ends with the smallest.

    Args:
        loader: the DataLoader, with Lightning's sampler in it or without.
        shards: number of virtual shards.
        seed: decides the order where the sampler has no seed of its own.
        group_rank: rank of this process in its replica.
        group_size: processes of a replica, which divide a shard's batches among them as DDP does.
        shuffle: whether the order is random where the loader has one of PyTorch's own two samplers. None: as the
            loader has it.

    Raises:
        ValueError: a count or rank is out of range.
        MisconfigurationException: the loader's data cannot be cut so that anyone can go on with any shard.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        shards: int,
        *,
        seed: int = 0,
        group_rank: int = 0,
        group_size: int = 1,
        shuffle: bool | None = None,
    ) -> None:
        check_count("shards", shards, most=_MOST_RANKS)
        check_count("seed", seed, least=0)
        check_count("group_size", group_size, most=_MOST_RANKS // shards)
        check_count("group_rank", group_rank, least=0, most=group_size - 1)
        if shuffle is not None:
            check_flag("shuffle", shuffle)
        self.shards = shards
        self.seed = seed
        self.group_rank = group_rank
        self.group_size = group_size
        self._ranks = shards * group_size
        self._epoch: int | None = None
        self._of_epoch: dict[int | str, Any] = {}
        self._read(loader, shuffle)
        self._check()

    def length(self, epoch: int) -> int:
        """Batches of each shard in an epoch."""
        # A batch sampler of the user's that works on a shard's own samples may make unequal numbers; nothing else does.
        ranks = range(self._ranks if self._per_shard else 1)
        return min(len(self._batches(epoch, rank)) for rank in ranks)

    def batch(self, epoch: int, shard: int, index: int) -> Any:
        """The samples of one batch, as the DataLoader's sampler names them: a list, or one where it has no batches."""
        return self._batches(epoch, shard * self.group_size + self.group_rank)[index]

    def seed_of(self, epoch: int, shard: int, index: int) -> int:
        """The seed under which this process loads the batch: two replicas of two processes load as four of one."""
        return seed_of(self.seed, epoch, shard * self.group_size + self.group_rank, index)

    # --- reading the loader ------------------------------------------------------------------------------------------

    def _read(self, loader: DataLoader[Any], shuffle: bool | None) -> None:
        if not isinstance(loader, DataLoader):
            raise MisconfigurationException(
                f"training data (loader) come from a {type(loader).__name__}, which cannot be cut into shards: give a"
                " torch.utils.data.DataLoader over a dataset with __getitem__ and __len__"
            )
        if isinstance(loader.dataset, IterableDataset):
            raise MisconfigurationException(
                f"{type(loader.dataset).__name__} is an IterableDataset: nobody can go on with a dead replica's part"
                " of it without reading all that came before. Give a dataset with __getitem__ and __len__"
            )
        # A loader that saves its place iterates in its own way for that, and the place is kept here.
        keeps_place = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        for method in ("__iter__", "_get_iterator"):
            if getattr(type(loader), method) is not getattr(DataLoader, method) and not keeps_place:
                raise MisconfigurationException(
                    f"{type(loader).__name__} has its own {method}, and what that does to a batch cannot be repeated"
                    " for any batch of any shard: do it in the dataset, in collate_fn or in on_after_batch_transfer"
                )
        batch_sampler = loader.batch_sampler
        if loader.batch_size is not None or batch_sampler is None:
            batch_sampler = None  # PyTorch's own: it only cuts
        elif type(batch_sampler) is BatchSampler:
            batch_sampler = None if isinstance(batch_sampler.batch_size, int) else batch_sampler
        plain = loader.batch_sampler if batch_sampler is None else None
        self._batch_size: int | None = getattr(plain, "batch_size", None)
        self._drop_last = bool(getattr(plain if plain is not None else batch_sampler, "drop_last", False))
        self._batch_sampler: Any = batch_sampler
        source: Any = loader.batch_sampler if loader.batch_sampler is not None else loader
        self._sampler: Any = getattr(source, "sampler", None)
        self._injected = isinstance(self._sampler, DistributedSampler)
        if is_a(self._sampler, DistributedSamplerWrapper):
            self._sampler = self._sampler.dataset._sampler  # type: ignore[attr-defined]  # the user's own
        own = isinstance(self._sampler, RandomSampler) and (self._sampler.replacement or self._sampler._num_samples)
        if batch_sampler is None and isinstance(self._sampler, RandomSampler | SequentialSampler) and not own:
            random_order = isinstance(self._sampler, RandomSampler) if shuffle is None else shuffle
            dataset: Any = loader.dataset
            self._sampler = DistributedSampler(dataset, 1, 0, shuffle=random_order, seed=self.seed)
        # Batches are made for each shard by itself, or for all and dealt.
        self._per_shard = batch_sampler is not None and self._injected

    def _check(self) -> None:
        drawn = self._batch_sampler if self._batch_sampler is not None else self._sampler
        name = type(drawn).__name__
        if not hasattr(drawn, "__len__"):
            raise MisconfigurationException(f"{name} has no __len__: an epoch must end at the same step on every shard")
        if not isinstance(drawn, DistributedSampler) and not self._injected and hasattr(drawn, "num_replicas"):
            raise MisconfigurationException(
                f"{name} cuts the data for ranks by itself: give the sampler of the whole dataset, or a subclass of"
                " DistributedSampler"
            )
        if type(drawn) is not DistributedSampler:
            first = list(self._batches(0, 0))
            self._forget()
            if first != list(self._batches(0, 0)):
                raise MisconfigurationException(
                    f"{name} gives another order when it is asked again for the same epoch, so a replica that returns"
                    " would see other data than the rest. Draw from torch's, NumPy's or Python's global generators or"
                    " from an attribute `generator`, which are seeded here for each epoch, or use `set_epoch`"
                )
        if isinstance(self._sampler, DistributedSampler) and type(self._sampler) is not DistributedSampler:
            lengths = [len(self._samples(0, rank)) for rank in (0, self._ranks - 1)]  # all would take long on a cluster
            if lengths[0] != lengths[1]:
                raise MisconfigurationException(
                    f"{type(self._sampler).__name__} gives {self._ranks} ranks unequal numbers of samples"
                    f" ({min(lengths)} to {max(lengths)}): it must pad or drop as DistributedSampler does"
                )
        if self.length(0) == 0:
            raise MisconfigurationException(
                f"the data of one shard do not fill a batch: {self.shards} shards with {self.group_size} processes"
                f" each, batch_size={self._batch_size}, drop_last={self._drop_last}. Give smaller batches or more data"
            )
        self._forget()

    # --- cutting -----------------------------------------------------------------------------------------------------

    def _batches(self, epoch: int, rank: int) -> Sequence[Any]:
        if epoch != self._epoch:
            self._forget()
            self._epoch = epoch
        if rank not in self._of_epoch:
            self._of_epoch[rank] = self._cut(epoch, rank)
        return self._of_epoch[rank]  # type: ignore[no-any-return]

    def _forget(self) -> None:
        self._epoch = None
        self._of_epoch = {}

    def _cut(self, epoch: int, rank: int) -> Sequence[Any]:
        if self._batch_sampler is None:
            samples = self._samples(epoch, rank)
            return samples if self._batch_size is None else _Slices(samples, self._batch_size, self._drop_last)
        if self._per_shard:
            batch_sampler = copy.copy(self._batch_sampler)
            batch_sampler.sampler = self._samples(epoch, rank)
            return _draw(batch_sampler, self.seed, epoch)
        if "batches" not in self._of_epoch:
            self._of_epoch["batches"] = _draw(self._batch_sampler, self.seed, epoch)
        return _deal(self._of_epoch["batches"], self._ranks, rank, self._drop_last)

    def _samples(self, epoch: int, rank: int) -> list[Any]:
        sampler = self._sampler
        if isinstance(sampler, DistributedSampler):
            sampler = copy.copy(sampler)
            # Sets the number of samples as well; a subclass keeps what it has beside.
            DistributedSampler.__init__(
                sampler,
                sampler.dataset,
                self._ranks,
                rank,
                shuffle=sampler.shuffle,
                seed=sampler.seed,
                drop_last=sampler.drop_last,
            )
            return _draw(sampler, self.seed, epoch)
        if "samples" not in self._of_epoch:
            self._of_epoch["samples"] = _draw(sampler, self.seed, epoch)
        return _deal(self._of_epoch["samples"], self._ranks, rank, drop_last=False)


class _Slices(Sequence[Any]):
    """A list in batches."""

    def __init__(self, samples: Sequence[Any], size: int, drop_last: bool) -> None:
        self.samples, self.size = samples, size
        self.length = len(samples) // size if drop_last else math.ceil(len(samples) / size)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(f"batch {index} of {self.length}")
        return self.samples[index * self.size : (index + 1) * self.size]


def _draw(sampler: Iterable[Any], seed: int, epoch: int) -> list[Any]:
    """Everything that a sampler gives in an epoch, whatever was drawn from it before."""
    samplers: list[Any] = [sampler, getattr(sampler, "sampler", None)]
    generators = {
        id(s): (s, s.generator) for s in samplers if isinstance(getattr(s, "generator", None), torch.Generator)
    }
    with seeded(seed_of(seed, "order", epoch)):
        try:
            for number, (owner, _) in enumerate(generators.values()):
                owner.generator = torch.Generator().manual_seed(seed_of(seed, "generator", epoch, number))
            for one in samplers:
                if callable(set_epoch := getattr(one, "set_epoch", None)):
                    set_epoch(epoch)
            return list(sampler)
        finally:
            for owner, generator in generators.values():
                owner.generator = generator


def _deal(items: list[Any], hands: int, hand: int, drop_last: bool) -> list[Any]:
    """Every ``hands``-th of the items, as many for each hand: padded from the start, or without the last few."""
    if drop_last:
        return items[hand : len(items) // hands * hands : hands]
    if not items:
        return []
    missing = -len(items) % hands
    padded = items + (items * math.ceil(missing / len(items)))[:missing]
    return padded[hand::hands]
