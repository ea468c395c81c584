"""Virtual shards: who loads a batch makes no difference to it, and no sample is lost or doubled by a failure."""

from __future__ import annotations

import random
from collections import Counter

import lightning as L
import numpy
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from harness.runs import fit
from lightning_eff.strategies.fault_tolerant.shard_plan import ShardPlan
from lightning_eff.strategies.fault_tolerant.sharded_loader import ShardedLoader, combined_batch
from lightning_eff.training.random_state import seed_of, seeded

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # two workers on a machine of one core


class Augmented(Dataset):
    """Sample ``n`` with noise from all three generators; remembers what it was asked for."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, n: int) -> torch.Tensor:
        self.asked.append(n)
        return torch.tensor([n, torch.rand(()).item(), random.random(), numpy.random.rand()], dtype=torch.float64)


def noisy_collate(samples: list[torch.Tensor]) -> torch.Tensor:
    batch = torch.stack(samples)
    return torch.cat([batch, torch.rand(len(batch), 1, dtype=torch.float64)], dim=1)


def all_batches(loader: ShardedLoader, epoch: int) -> dict[tuple[int, int], torch.Tensor]:
    loader.own(range(loader.plan.shards))
    loader.set_epoch(epoch)
    return {(shard, index): loader.batch(shard, index) for shard in loader.owned for index in range(len(loader))}


# --- which samples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize(
    ("size", "shards", "batch_size"), [(1, 1, 1), (24, 3, 4), (25, 3, 4), (101, 4, 3), (7, 5, 1), (64, 2, 7)]
)
def test_shards_are_the_ranks_of_a_ddp_run(size, shards, batch_size, group_size, drop_last):
    ranks = shards * group_size
    per_rank = -(-size // ranks)
    data = torch.arange(size)
    for epoch in (0, 3):
        seen: list[int] = []
        for group_rank in range(group_size):
            plan = ShardPlan(
                DataLoader(data, batch_size, shuffle=True, drop_last=drop_last),
                shards,
                seed=5,
                group_rank=group_rank,
                group_size=group_size,
            )
            for shard in range(shards):
                sampler = DistributedSampler(data, ranks, shard * group_size + group_rank, seed=5)
                sampler.set_epoch(epoch)
                expected = [b.tolist() for b in DataLoader(data, batch_size, sampler=sampler, drop_last=drop_last)]
                got = [plan.batch(epoch, shard, index) for index in range(plan.length(epoch))]
                assert got == expected
                seen += [sample for batch in got for sample in batch]
        counts = Counter(seen)
        if not drop_last:
            assert set(counts) == set(range(size))  # none is lost
            assert len(seen) == ranks * per_rank
            if ranks <= size:
                assert sum(count - 1 for count in counts.values()) < ranks  # the padding, as DistributedSampler's
        else:
            assert len(seen) == ranks * (per_rank // batch_size) * batch_size


def test_order_comes_from_seed_and_epoch():
    def order(seed: int, epoch: int, **arguments) -> list[int]:
        plan = ShardPlan(DataLoader(range(40), 4, **{"shuffle": True, **arguments}), 2, seed=seed)
        return [s for shard in range(2) for i in range(plan.length(epoch)) for s in plan.batch(epoch, shard, i)]

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed, epoch in [(1, 0), (1, 1), (7, 0), (7, 1)]}) == 4
    assert order(1, 2, shuffle=False) == [*range(0, 40, 2), *range(1, 40, 2)]


def test_lightnings_own_arguments_for_shuffling():
    plan = ShardPlan(DataLoader(range(8), 8), 1, shuffle=True)
    assert plan.batch(0, 0, 0) != list(range(8))
    plan = ShardPlan(DataLoader(range(8), 8, shuffle=True), 1, shuffle=False)
    assert plan.batch(0, 0, 0) == list(range(8))


# --- who loads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [{}, dict(num_workers=2), dict(num_workers=1, persistent_workers=True)])
def test_any_history_of_owners_gives_the_same_batches(workers):
    """Replicas die, take over, return, repeat steps: every batch is bit-equal to the one without a failure."""
    shards, draw = 3, random.Random(1)

    def fresh(**arguments) -> ShardedLoader:
        loader = DataLoader(Augmented(44), 3, shuffle=True, collate_fn=noisy_collate, **arguments)
        return ShardedLoader(loader, shards, seed=9, keep=2)

    reference = {epoch: all_batches(fresh(), epoch) for epoch in (0, 1)}
    replicas = [fresh(**workers) for _ in range(shards)]
    alive = set(range(shards))
    try:
        for epoch in (0, 1):
            for index in range(len(replicas[0])):
                for replica in range(shards):
                    if replica in alive and len(alive) > 1 and draw.random() < 0.2:
                        alive.remove(replica)
                        replicas[replica].close()
                    elif replica not in alive and draw.random() < 0.3:
                        alive.add(replica)
                for loader in replicas:
                    loader.seek(epoch, index)
                owners = {replica: [replica] for replica in sorted(alive)}
                for shard in set(range(shards)) - alive:
                    owners[draw.choice(sorted(alive))].append(shard)
                assert sorted(shard for owned in owners.values() for shard in owned) == [0, 1, 2]
                for replica, owned in owners.items():
                    replicas[replica].own(owned)
                    for _ in range(1 + (draw.random() < 0.2)):  # sometimes a step is repeated
                        for shard in owned:
                            batch = replicas[replica].batch(shard, index)
                            assert torch.equal(batch, reference[epoch][shard, index])
    finally:
        for loader in replicas:
            loader.close()


def test_skipped_samples_are_not_loaded():
    data = Augmented(60)
    loader = ShardedLoader(DataLoader(data, 2), 3)
    loader.own([0, 2])
    loader.batch(2, 7)
    assert data.asked == [44, 47]
    loader.batch(2, 8)
    loader.batch(2, 8)  # kept
    loader.batch(2, 3)
    assert data.asked == [44, 47, 50, 53, 20, 23]


def test_kept_batches_are_the_last_ones():
    data = Augmented(60)
    loader = ShardedLoader(DataLoader(data, 2), 3, keep=2)
    first = [loader.batch(0, index) for index in (0, 1)]
    assert [loader.batch(0, index) is batch for index, batch in enumerate(first)] == [True, True]
    assert len(data.asked) == 4
    loader.batch(0, 2)
    assert loader.batch(0, 1) is first[1]
    assert not torch.equal(loader.batch(0, 2), first[1])
    loader.set_epoch(1)
    assert loader.batch(0, 1) is not first[1]


@pytest.mark.parametrize("workers", [{}, dict(num_workers=1)])
def test_the_users_generators_are_not_touched(workers):
    loader = ShardedLoader(DataLoader(Augmented(12), 2, shuffle=True, **workers), 2)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    list(loader)
    loader.close()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert all(numpy.array_equal(a, b) for a, b in zip(numpy.random.get_state(), before[2], strict=True))


def test_generators_go_on_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(TypeError), seeded(3):
        torch.rand("three")
    assert torch.equal(torch.get_rng_state(), before)


class TellsWorker(Dataset):
    seen = "nothing"

    def __len__(self) -> int:
        return 4

    def __getitem__(self, n: int) -> str:
        return self.seen


def mark_dataset(worker: int) -> None:
    get_worker_info().dataset.seen = f"worker {worker}"


def test_worker_init_fn_finds_the_users_dataset():
    loader = ShardedLoader(DataLoader(TellsWorker(), 1, num_workers=1, worker_init_fn=mark_dataset), 2)
    assert list(loader) == [["worker 0"], ["worker 0"]]
    loader.close()


def test_fetches_of_a_dataset_with_getitems_and_without_batches():
    class Both(Augmented):
        def __getitems__(self, samples: list[int]) -> list[int]:
            return [-n for n in samples]

    assert ShardedLoader(DataLoader(Both(6), 3), 2).batch(0, 0).tolist() == [0, -2, -4]
    loader = ShardedLoader(DataLoader(Augmented(6), batch_size=None), 2)
    assert len(loader) == 3
    assert loader.batch(0, 2)[0] == 4


# --- a place in the data ---------------------------------------------------------------------------------------------


def test_iteration_follows_ownership_and_seek():
    loader = ShardedLoader(DataLoader(range(24), 2), 3)
    batches = iter(loader)
    assert next(batches).tolist() == [0, 3]
    loader.own([2])
    assert next(batches).tolist() == [8, 11]
    loader.before_fetch = lambda: loader.seek(4, 3)  # heals: the others are there already
    assert next(batches).tolist() == [20, 23]
    loader.before_fetch = None
    assert (loader.epoch, loader.position) == (4, 4)
    assert next(batches, None) is None
    assert loader.position == 0


def test_state_goes_on_in_the_middle():
    loader = ShardedLoader(DataLoader(range(60), 2, shuffle=True), 3)
    loader.set_epoch(2)
    batches = iter(loader)
    done = [next(batches).tolist() for _ in range(4)]
    resumed = ShardedLoader(DataLoader(range(60), 2, shuffle=True), 3)
    resumed.load_state_dict(loader.state_dict())
    resumed.set_epoch(2)  # as Lightning does
    rest = [batch.tolist() for batch in resumed]
    assert len(done) + len(rest) == 10
    assert done + rest == [batch.tolist() for batch in _at_epoch(2)]


def test_a_state_of_another_version():
    loader = ShardedLoader(DataLoader(range(60), 2), 3)
    loader.load_state_dict({"epoch": 2, "position": 4})  # as 0.1 wrote it
    assert loader.state_dict() == {"version": 1, "epoch": 2, "position": 4}
    with pytest.raises(ValueError, match="ShardedLoader was saved by a newer lightning_eff: state version 2"):
        loader.load_state_dict({"version": 2, "epoch": 2, "position": 4})


def _at_epoch(epoch: int) -> ShardedLoader:
    loader = ShardedLoader(DataLoader(range(60), 2, shuffle=True), 3)
    loader.set_epoch(epoch)
    return loader


def test_several_loaders_in_a_trainer():
    loaders = {"a": ShardedLoader(DataLoader(range(12), 2), 2), "b": ShardedLoader(DataLoader(range(8), 2), 2)}
    combined = CombinedLoader(loaders, "max_size_cycle")
    assert combined_batch(combined, 0, 2)["b"].tolist() == loaders["b"].batch(0, 0).tolist()
    for index, (batch, _, _) in enumerate(combined):
        assert {k: v.tolist() for k, v in combined_batch(combined, 0, index).items()} == {
            k: v.tolist() for k, v in batch.items()
        }
    assert combined_batch(CombinedLoader(loaders, "max_size"), 0, 2)["b"] is None


# --- samplers --------------------------------------------------------------------------------------------------------


class Reversed(Sampler):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self):
        return iter(range(self.size - 1, -1, -1))

    def __len__(self) -> int:
        return self.size


def test_a_users_sampler_is_dealt():
    plan = ShardPlan(DataLoader(range(8), 2, sampler=Reversed(8)), 2)
    assert [[plan.batch(0, s, i) for i in range(2)] for s in range(2)] == [[[7, 5], [3, 1]], [[6, 4], [2, 0]]]


@pytest.mark.parametrize("generator", [None, 3])
def test_a_random_sampler_is_the_same_on_all(generator):
    weights = [0.1, 0.2, 0.3, 0.4]

    def plan() -> ShardPlan:
        own = torch.Generator().manual_seed(generator) if generator else None
        sampler = WeightedRandomSampler(weights, 40, generator=own)
        if own:
            torch.rand(random.randrange(9), generator=own)  # it has been used before
        return ShardPlan(DataLoader(range(4), 4, sampler=sampler), 2)

    torch.manual_seed(1)
    one = plan()
    torch.manual_seed(2)
    two = plan()
    for epoch in (5, 0):  # in any order
        batches = [[plan.batch(epoch, shard, i) for shard in range(2) for i in range(5)] for plan in (one, two)]
        assert batches[0] == batches[1]
    assert one.batch(1, 0, 0) + one.batch(1, 1, 0) != one.batch(0, 0, 0) + one.batch(0, 1, 0)


def test_sampling_with_replacement_is_kept():
    plan = ShardPlan(DataLoader(range(4), 10, sampler=RandomSampler(range(4), replacement=True, num_samples=80)), 2)
    assert plan.length(0) == 4
    assert max(Counter(plan.batch(0, 0, 0)).values()) > 1


class Pairs(Sampler):
    """Batches of neighbours, by a class of the user's own."""

    def __init__(self, size: int, drop_last: bool = False) -> None:
        self.size, self.drop_last = size, drop_last

    def __iter__(self):
        return iter([[n, n + 1] for n in range(0, self.size, 2)])

    def __len__(self) -> int:
        return self.size // 2


@pytest.mark.parametrize(("drop_last", "expected"), [(False, [[0, 4, 8], [2, 6, 0]]), (True, [[0, 4], [2, 6]])])
def test_a_users_batch_sampler_is_dealt(drop_last, expected):
    plan = ShardPlan(DataLoader(range(10), batch_sampler=Pairs(10, drop_last)), 2)
    got = [[plan.batch(0, s, i)[0] for i in range(plan.length(0))] for s in range(2)]
    assert got == expected


class ByParity(BatchSampler):
    """Batches of even or of odd numbers: how many there are depends on the samples."""

    def __iter__(self):
        for parity in (0, 1):
            yield from BatchSampler([n for n in self.sampler if n % 2 == parity], self.batch_size, self.drop_last)


def test_a_batch_sampler_with_lightnings_sampler_works_on_each_shard():
    sampler = DistributedSampler(range(15), 1, 0, shuffle=False)
    plan = ShardPlan(DataLoader(range(15), batch_sampler=ByParity(sampler, 2, False)), 2)
    batches = [[plan.batch(0, shard, i) for i in range(plan.length(0))] for shard in range(2)]
    assert batches[0] == [[0, 2], [4, 6], [8, 10], [12, 14]]
    assert batches[1] == [[0], [1, 3], [5, 7], [9, 11]]  # the padding is even; a fifth batch has none beside it


def test_torchs_batch_sampler_given_by_hand():
    plan = ShardPlan(DataLoader(range(9), batch_sampler=BatchSampler(SequentialSampler(range(9)), 2, True)), 2)
    assert [plan.batch(0, 0, i) for i in range(plan.length(0))] == [[0, 2], [4, 6]]


class Drifting(Reversed):
    def __iter__(self):
        self.size += 1
        return super().__iter__()


class CutsItself(Reversed):
    num_replicas, rank = 2, 0


class NoLength:
    def __iter__(self):
        return iter(range(4))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(4))


class OwnIteration(DataLoader):
    def __iter__(self):
        return (batch * 2 for batch in super().__iter__())


class Unequal(DistributedSampler):
    def __iter__(self):
        return iter(range(self.rank + 1))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: DataLoader(Stream()), "IterableDataset"),
        (lambda: [1, 2], "come from a list"),
        (lambda: OwnIteration(range(8)), "has its own __iter__"),
        (lambda: DataLoader(range(8), sampler=Drifting(8)), "another order when it is asked again"),
        (lambda: DataLoader(range(8), sampler=CutsItself(8)), "cuts the data for ranks by itself"),
        (lambda: DataLoader(range(8), sampler=NoLength()), "has no __len__"),
        (lambda: DataLoader(range(8), sampler=Unequal(range(8), 1, 0)), "unequal numbers of samples"),
        (lambda: DataLoader(range(8), 4, drop_last=True), "do not fill a batch: 3 shards"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(loader, message):
    with pytest.raises(MisconfigurationException, match=message):
        ShardedLoader(loader(), 3)


def test_a_loader_that_saves_its_place_is_taken():
    class Stateful(OwnIteration):
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    assert ShardedLoader(Stateful(range(8), 2), 2).batch(0, 0).tolist() == [0, 2]


@pytest.mark.parametrize(
    "arguments", [dict(shards=0), dict(shards=2, group_size=0), dict(shards=2, group_rank=1), dict(shards=2, keep=0)]
)
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match="is not allowed"):
        ShardedLoader(DataLoader(range(8)), **arguments)


@pytest.mark.parametrize("shards", [[], [0, 0], [3], [-1]])
def test_wrong_owners(shards):
    with pytest.raises(ValueError, match="is not allowed"):
        ShardedLoader(DataLoader(range(8)), 3).own(shards)


def test_batches_that_are_not_there():
    loader = ShardedLoader(DataLoader(range(9)), 3)
    with pytest.raises(ValueError, match=r"shard=1 .* owned: \[0\]"):
        loader.batch(1, 0)
    with pytest.raises(ValueError, match="index=3"):
        loader.batch(0, 3)
    with pytest.raises(ValueError, match="index=4"):
        loader.seek(0, 4)


def test_seeds_differ():
    assert len({seed_of(a, b, c) for a in range(10) for b in range(10) for c in range(10)}) == 1000


# --- in a Trainer ----------------------------------------------------------------------------------------------------


class Sharded(SingleDeviceStrategy):
    """Cuts the training data into three shards and owns one of them."""

    def __init__(self, shard: int) -> None:
        super().__init__("cpu")
        self.own_shard = shard

    def process_dataloader(self, dataloader):
        loader = ShardedLoader(dataloader, 3, seed=4)
        loader.own([self.own_shard])
        return loader


class Recorder(L.LightningModule):
    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.batches: list[tuple[int, int, list[int]]] = []
        self.stop_at = stop_at

    def training_step(self, batch, batch_idx):
        if len(self.batches) == self.stop_at:
            raise KeyboardInterrupt
        self.batches.append((self.current_epoch, batch_idx, batch.tolist()))
        return self.layer(batch[:, None].float()).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def train(module: Recorder, folder, **arguments) -> None:
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=1, filename="last")
    data = DataLoader(range(36), 3, shuffle=True)
    with pytest.raises((SystemExit, KeyboardInterrupt)) if module.stop_at else torch.enable_grad():
        fit(module, checkpoint, data=data, strategy=Sharded(1), max_epochs=3, **arguments)


@pytest.mark.parametrize("stop_at", [2, 4, 7, 8])
def test_a_run_in_a_trainer_resumes_in_mid_epoch(tmp_path, stop_at):
    whole = Recorder()
    train(whole, tmp_path / "whole")
    assert [(epoch, index) for epoch, index, _ in whole.batches] == [(e, i) for e in range(3) for i in range(4)]
    plan = ShardPlan(DataLoader(range(36), 3, shuffle=True), 3, seed=4)
    assert [samples for *_, samples in whole.batches] == [plan.batch(e, 1, i) for e in range(3) for i in range(4)]

    first, second = Recorder(stop_at), Recorder()
    train(first, tmp_path / "cut")
    train(second, tmp_path / "cut", ckpt_path=str(tmp_path / "cut" / "last.ckpt"))
    assert first.batches + second.batches == whole.batches
