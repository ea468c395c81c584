"""A DataLoader cut into virtual shards, of which any replica can carry on any from any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils._pytree import tree_unflatten
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from lightning_eff.arguments import check, check_count
from lightning_eff.strategies.fault_tolerant.shard_plan import ShardPlan
from lightning_eff.training.random_state import seeded
from lightning_eff.training.state_version import check_version


class ShardedLoader:
    """Batches by (shard, index) instead of by rank; takes a DataLoader's place in a Trainer.

    Iteration yields the batches of one shard, the first that this replica owns. `batch` gives a batch of any shard
    that it owns: of a dead neighbour's, say, from where that one stopped, without loading what came before. Each owned
    shard has workers and prefetched batches of its own, and every batch is asked for by its index, so that what was
    fetched for an ownership of the past is never used.

    A batch is loaded and collated under a seed of (seed, epoch, shard, index): random augmentation is the same whoever
    loads it, with any number of workers, and leaves the global generators as they are.

    Args:
        loader: the user's DataLoader, or Lightning's copy of it with a distributed sampler. See `ShardPlan` for how
            it is cut, and what is refused.
        shards: number of virtual shards, the largest number of replicas.
        seed: of the order, where the sampler has none of its own, and of random augmentation.
        group_rank: rank of this process in its replica.
        group_size: processes of a replica; they divide a shard's batches as DDP does.
        shuffle: see `ShardPlan`.
        keep: batches of each shard that are kept after use, so that a step which failed can be repeated without
            loading again: the micro-batches of an optimizer step. A batch must not be changed in place.
        before_fetch: called before iteration takes a batch; it may `own` and `seek`, and the batch is the one after
            that.

    Raises:
        ValueError, MisconfigurationException: see `ShardPlan`.

    Example:
        >>> loader = ShardedLoader(DataLoader(range(12), batch_size=2), shards=3)
        >>> loader.own([0])
        >>> [batch.tolist() for batch in loader]
        [[0, 3], [6, 9]]
        >>> loader.own([0, 2])  # shard 2's replica died
        >>> loader.batch(2, 1).tolist()
        [8, 11]
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
        keep: int = 1,
        before_fetch: Callable[[], None] | None = None,
    ) -> None:
        check_count("keep", keep)
        fetch = before_fetch is None or callable(before_fetch)
        check("before_fetch", before_fetch, fetch, "a function without arguments, or None")
        self.plan = ShardPlan(loader, shards, seed=seed, group_rank=group_rank, group_size=group_size, shuffle=shuffle)
        self.loader = loader
        self.keep = keep
        self.epoch = 0
        self.position = 0
        """Index of the batch that iteration yields next."""
        self.owned: tuple[int, ...] = (0,)
        self.before_fetch = before_fetch
        self._streams: dict[int, _Stream] = {}

    @property
    def shard(self) -> int:
        """The shard that iteration goes through."""
        return self.owned[0]

    def own(self, shards: Sequence[int]) -> None:
        """Take these shards, the first for iteration, and give up all others with their workers."""
        allowed = range(self.plan.shards)
        good = len(shards) > 0 and len(set(shards)) == len(shards) and all(shard in allowed for shard in shards)
        check("shards", list(shards), good, f"different numbers in [0, {self.plan.shards}), at least one")
        self.owned = tuple(shards)
        for shard in self._streams.keys() - set(shards):
            self._streams.pop(shard).close()

    def batch(self, shard: int, index: int) -> Any:
        """A batch of the current epoch, on the CPU, as the DataLoader's ``collate_fn`` makes it.

        Going on with the next index is prefetched; another index starts the shard's workers anew from there.

        Raises:
            ValueError: the shard is not owned, or an epoch has no such batch.
        """
        check("shard", shard, shard in self.owned, f"one of those that are owned: {list(self.owned)}")
        check("index", index, 0 <= index < len(self), f"in [0, {len(self)}), the batches of epoch {self.epoch}")
        if shard not in self._streams:
            self._streams[shard] = _Stream(self.loader, self.plan, shard, self.keep)
        return self._streams[shard].get(self.epoch, index)

    def seek(self, epoch: int, index: int) -> None:
        """Let iteration go on with a batch of an epoch; nothing is loaded until then."""
        self.set_epoch(epoch)
        check("index", index, 0 <= index <= len(self), f"in [0, {len(self)}], the batches of epoch {epoch}")
        self.position = index

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; without effect in that epoch itself. Lightning calls it through `sampler`."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.position = 0

    def __iter__(self) -> Iterator[Any]:
        """The owned shard's batches from `position` to the end of the epoch."""
        while True:
            if self.before_fetch is not None:
                self.before_fetch()
            if self.position >= len(self):
                break
            batch = self.batch(self.shard, self.position)
            self.position += 1
            yield batch
        self.position = 0

    def __len__(self) -> int:
        """Batches of an epoch, the same for every shard."""
        return self.plan.length(self.epoch)

    @property
    def sampler(self) -> ShardedLoader:
        """Where Lightning looks for ``set_epoch``."""
        return self

    @property
    def dataset(self) -> Dataset[Any]:
        """The user's dataset."""
        return self.loader.dataset

    @property
    def batch_size(self) -> int | None:
        """Samples of a batch, as the DataLoader has it."""
        return self.loader.batch_size

    def state_dict(self) -> dict[str, int]:
        """The place in the data; Lightning saves it with the loop."""
        return {"version": 1, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a saved place."""
        check_version("ShardedLoader", state, known=1)
        self.seek(state["epoch"], state["position"])

    def close(self) -> None:
        """End all workers; whoever goes on starts them again."""
        while self._streams:
            self._streams.popitem()[1].close()


def combined_batch(combined: CombinedLoader, shard: int, index: int) -> Any:
    """A shard's batch from all of a Trainer's training loaders, in their nesting.

    Args:
        combined: ``trainer.fit_loop._combined_loader``, made of `ShardedLoader`.
        shard: a shard that is owned.
        index: of the batch in the epoch; a loader that is shorter begins again where the mode says so.
    """
    batches: list[Any] = []
    for loader in combined.flattened:
        if index < len(loader):
            batches.append(loader.batch(shard, index))
        elif combined._mode == "max_size_cycle":
            batches.append(loader.batch(shard, index % len(loader)))
        else:
            batches.append(None)
    return tree_unflatten(batches, combined._spec)


class _Stream:
    """One shard's batches in order, prefetched by workers, with the last few kept."""

    def __init__(self, loader: DataLoader[Any], plan: ShardPlan, shard: int, keep: int) -> None:
        self._keys = _Keys(plan, shard)
        self._keep = keep
        self._kept: dict[int, Any] = {}
        self._next: int | None = None
        self._batches: Iterator[Any] | None = None
        more: dict[str, Any] = {}
        if loader.num_workers > 0:
            more = dict(prefetch_factor=loader.prefetch_factor, persistent_workers=loader.persistent_workers)
        self._loader: DataLoader[Any] = DataLoader(
            _Batches(loader),
            batch_size=None,  # one item is one batch already
            sampler=self._keys,
            collate_fn=_as_it_is,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=_WorkerInit(loader.worker_init_fn),
            multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator(),  # else each start of the workers draws from the user's
            **more,
        )

    def get(self, epoch: int, index: int) -> Any:
        if epoch != self._keys.epoch:
            self._forget()
            self._keys.epoch = epoch
        if index not in self._kept:
            if index != self._next or self._batches is None:
                self._batches = None  # its workers end before others start
                self._keys.start = index
                self._batches = iter(self._loader)
            self._kept[index] = next(self._batches)
            self._next = index + 1
            for old in list(self._kept)[: -self._keep]:
                del self._kept[old]
        return self._kept[index]

    def _forget(self) -> None:
        self._kept = {}
        self._next = self._batches = None

    def close(self) -> None:
        self._forget()
        self._loader._iterator = None  # persistent workers end with it


class _Keys(Sampler[Any]):
    """What to load for a shard, from batch ``start`` of ``epoch`` on."""

    def __init__(self, plan: ShardPlan, shard: int) -> None:
        self.plan, self.shard = plan, shard
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for index in range(self.start, self.plan.length(self.epoch)):
            yield (
                self.plan.seed_of(self.epoch, self.shard, index),
                self.plan.batch(self.epoch, self.shard, index),
            )


class _Batches(Dataset[Any]):
    """A dataset whose items are the batches of another."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.dataset: Any = loader.dataset
        self.collate_fn = loader.collate_fn
        self.batched = loader.batch_sampler is not None

    def __getitem__(self, key: tuple[int, Any]) -> Any:
        seed, samples = key
        with seeded(seed):
            if not self.batched:
                return self.collate_fn(self.dataset[samples])
            if getattr(self.dataset, "__getitems__", None):
                return self.collate_fn(self.dataset.__getitems__(samples))
            return self.collate_fn([self.dataset[sample] for sample in samples])


class _WorkerInit:
    """The user's ``worker_init_fn``, which finds the dataset in the worker's information."""

    def __init__(self, function: Callable[[int], None] | None) -> None:
        self.function = function

    def __call__(self, worker: int) -> None:
        information: Any = get_worker_info()  # type: ignore[no-untyped-call]
        object.__setattr__(information, "dataset", information.dataset.dataset)  # it refuses a plain assignment
        if self.function is not None:
            self.function(worker)


def _as_it_is(batch: Any) -> Any:
    return batch
