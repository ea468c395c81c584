"""Other workers, other batches, other ranks: each sample of the epoch is still seen once."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, WeightedRandomSampler

from harness.pool import Pool
from lightning_eff.callbacks.exact_resume.dealing import Hand, note_generator, order_of, samples_of, seen
from tests.callbacks.exact_resume.runs import BATCH, SAMPLES, Noisy, loader, run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Consider setting `persistent_workers"),
]

BATCH_END = ("on_train_batch_end",)
DEALT = pytest.mark.filterwarnings("ignore:.*are dealt anew", "ignore:.*taken from the files beside")


class Seen(L.Callback):
    """The samples of each batch, by epoch."""

    def __init__(self) -> None:
        self.epochs: dict[int, list[list[int]]] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.epochs.setdefault(trainer.current_epoch, []).append(batch[:, 0].int().tolist())


def flat(batches: list[list[int]]) -> list[int]:
    return [sample for batch in batches for sample in batch]


def test_seeded_runs_are_the_same_with_any_number_of_workers(tmp_path):
    how: dict[str, Any] = dict(max_epochs=2, randomness="seeded")
    samples = Seen()
    without = run(loader, tmp_path, **how, callbacks=(samples,))[0].events
    orders = [flat(batches) for batches in samples.epochs.values()]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(SAMPLES))
    assert without == run(partial(loader, 2), tmp_path, **how)[0].events
    assert without == run(partial(loader, 1, persistent_workers=True), tmp_path, **how)[0].events
    assert without != run(loader, tmp_path, **how, seed=1)[0].events


def test_a_seeded_run_goes_on_exactly_with_other_workers(tmp_path):
    events, saver, _ = run(loader, tmp_path, hooks=BATCH_END, randomness="seeded")
    _, happened, path = saver.saved[8]
    resumed = run(partial(loader, 2), tmp_path, resume=path, seed=9, randomness="seeded")[0].events
    assert resumed == events.events[happened:]


def test_noise_that_is_made_while_a_batch_is_collated_is_seeded_too(tmp_path):
    how: dict[str, Any] = dict(max_epochs=1, randomness="seeded")
    runs = [run(partial(loader, workers, collate_fn=_noisy), tmp_path, **how)[0].events for workers in (0, 2)]
    assert runs[0] == runs[1]


def _noisy(samples: Any) -> torch.Tensor:
    return torch.stack(samples) + torch.rand(())


def test_the_other_randomness_is_said(tmp_path):
    path = run(loader, tmp_path, hooks=BATCH_END, max_epochs=1)[1].saved[1][2]
    with pytest.warns(UserWarning, match="saved with the other one"):
        run(loader, tmp_path, resume=path, max_epochs=1, randomness="seeded")


@DEALT
@pytest.mark.parametrize("size", [5, 8])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_in_other_batches_each_sample_is_seen_once(tmp_path, size, workers):
    before, after = Seen(), Seen()
    _, saver, _ = run(loader, tmp_path, hooks=BATCH_END, callbacks=(before,))
    path = saver.saved[7][2]  # the second batch of the second epoch
    _, other, trainer = run(
        partial(loader, workers, batch_size=size),
        tmp_path / "other",
        hooks=BATCH_END,
        resume=path,
        callbacks=(after,),
        seed=9,
    )
    order = flat(before.epochs[1])
    assert flat(after.epochs[1]) == order[2 * BATCH :]
    assert [len(batch) for batch in after.epochs[1]][:-1] == [size] * (-(-(SAMPLES - 2 * BATCH) // size) - 1)
    assert sorted(flat(after.epochs[2])) == list(range(SAMPLES))
    assert trainer.current_epoch == 3
    # And what was dealt goes on exactly in its turn.
    again = Seen()
    resumed = partial(run, partial(loader, workers, batch_size=size), tmp_path, callbacks=(again,), seed=11)
    events = resumed(resume=other.saved[0][2])[0].events
    assert flat(again.epochs[1]) == order[2 * BATCH + size :]
    assert (
        events
        == run(partial(loader, workers, batch_size=size), tmp_path, resume=path, callbacks=(Seen(),), seed=9)[0].events[
            -len(events) :
        ]
    )


@DEALT
def test_an_epoch_that_was_over_is_over(tmp_path):
    events, saver, _ = run(loader, tmp_path, hooks=BATCH_END, max_epochs=2)
    _, happened, path = saver.saved[5]  # behind the first epoch's last batch, and its validation is still to come
    after = Seen()
    resumed = run(
        partial(loader, batch_size=5),
        tmp_path,
        resume=path,
        callbacks=(after,),
        max_epochs=2,
        accumulate_grad_batches=2,
    )[0].events
    assert [event[0] for event in resumed[:4]] == ["validation", "validation", "validated", "epoch end"]
    assert resumed[0] == events.events[happened]
    assert list(after.epochs) == [1]
    assert sorted(flat(after.epochs[1])) == list(range(SAMPLES))


@DEALT
def test_a_window_that_was_not_full_begins_again(tmp_path):
    before, after = Seen(), Seen()
    _, saver, _ = run(loader, tmp_path, hooks=BATCH_END, callbacks=(before,), accumulate_grad_batches=2)
    run(
        partial(loader, batch_size=2), tmp_path, resume=saver.saved[2][2], callbacks=(after,), accumulate_grad_batches=4
    )
    assert flat(after.epochs[0]) == flat(before.epochs[0])[2 * BATCH :]  # the third batch had not been used


def test_it_is_said(tmp_path):
    path = run(loader, tmp_path, hooks=BATCH_END, max_epochs=1)[1].saved[1][2]
    with pytest.warns(UserWarning, match=r"1 rank\(s\) with batches of 4 have seen 8 samples of this epoch"):
        run(partial(loader, batch_size=2), tmp_path, resume=path, max_epochs=1)


def test_an_order_that_only_its_sampler_knows_is_not_dealt(tmp_path):
    def weighted(size: int) -> DataLoader[Any]:
        return loader(0, sampler=WeightedRandomSampler([1.0] * SAMPLES, SAMPLES), batch_size=size)

    path = run(partial(weighted, 4), tmp_path, hooks=BATCH_END, max_epochs=1)[1].saved[1][2]
    with pytest.raises(MisconfigurationException, match="batch size 4, now 3"):
        run(partial(weighted, 3), tmp_path, resume=path)


@DEALT
def test_several_loaders_are_not_dealt(tmp_path):
    path = run(lambda: [loader(), loader()], tmp_path, hooks=BATCH_END, max_epochs=1)[1].saved[1][2]
    with pytest.raises(MisconfigurationException, match="for one training loader, and here are 2"):
        run(lambda: [loader(0, batch_size=2), loader()], tmp_path, resume=path)


# --- ranks ------------------------------------------------------------------------------------------------------------


@DEALT
@pytest.mark.filterwarnings("ignore:.*lightning_eff_rank_state", "ignore:.*are not used by this rank")
@pytest.mark.parametrize("randomness", ["stock", pytest.param("seeded", marks=pytest.mark.slow)])
def test_from_two_ranks_to_one_and_back(tmp_path, pool, randomness):
    """40 samples in batches of 4: two ranks see 24 of the second epoch, one the others."""
    whole = in_turn(pool.run(_on_ranks, tmp_path / "two", randomness))
    assert sorted(whole) == list(range(40))
    path = next((tmp_path / "two").glob("7-*.ckpt"))
    alone = Seen()
    one = partial(loader, 0, partial(Noisy, 40))
    _, saver, _ = run(
        one, tmp_path / "one", hooks=BATCH_END, resume=path, callbacks=(alone,), max_epochs=3, randomness=randomness
    )
    assert flat(alone.epochs[1]) == whole[24:]
    assert [len(batch) for batch in alone.epochs[1]] == [4, 4, 4, 4]
    again = pool.run(_on_ranks, tmp_path / "again", randomness, saver.saved[0][2])
    assert in_turn(again) == whole[28:]
    assert sorted(in_turn(again, epoch=2)) == list(range(40))


@DEALT
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*lightning_eff_rank_state", "ignore:.*are not used by this rank")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_from_two_ranks_to_three_and_back(tmp_path, pool, strategy):
    """Two ranks see 24 of the second epoch; three see 12 of the others in their first batch, two the last four."""
    whole = in_turn(pool.run(_on_ranks, tmp_path / "two", strategy=strategy))
    path = next((tmp_path / "two").glob("7-*.ckpt"))
    with Pool(3) as pool_of_three:
        three = pool_of_three.run(_on_ranks, tmp_path / "three", strategy=strategy, resume=path)
    rest = in_turn(three)
    assert rest[:16] == whole[24:]
    assert len(rest) == 18  # two more, such that each rank has as many
    assert set(rest[16:]) <= set(whole[24:])
    assert set(in_turn(three, epoch=2)) == set(range(40))
    path = next((tmp_path / "three").glob("0-*.ckpt"))
    again = pool.run(_on_ranks, tmp_path / "again", strategy=strategy, resume=path)
    assert in_turn(again) == whole[36:]


def in_turn(ranks: list[dict[int, list[list[int]]]], epoch: int = 1) -> list[int]:
    """The samples of an epoch in the order in which they were dealt."""
    return [sample for dealt in zip(*(flat(rank[epoch]) for rank in ranks), strict=True) for sample in dealt]


def _on_ranks(folder: Any, randomness: Any = "stock", resume: Any = None, strategy: str = "ddp") -> dict[int, Any]:
    found = Seen()
    run(
        partial(loader, 0, partial(Noisy, 40)),
        folder,
        hooks=BATCH_END,
        callbacks=(found,),
        seed=torch.distributed.get_rank(),
        resume=resume,
        strategy=strategy,
        devices=torch.distributed.get_world_size(),
        max_epochs=3 if resume else 2,
        randomness=randomness,
    )
    return found.epochs


# --- the arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", [None, 5])
def test_the_order_of_a_random_sampler_is_found_again(generator):
    own = None if generator is None else torch.Generator().manual_seed(generator)
    data = DataLoader(range(37), batch_size=4, sampler=RandomSampler(range(37), generator=own))
    order = order_of(data)
    note_generator(order, data.sampler)
    wanted = list(data.sampler)
    state = torch.get_rng_state()
    assert samples_of(order, 37) == wanted
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batches", [0, 3, 5])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("then", "now"), [(1, 2), (2, 1), (2, 3), (3, 5)])
def test_what_is_left_is_what_was_not_seen(shuffle, batches, drop_last, then, now):
    number, size = 43, 4

    def on_rank(rank: int, ranks: int, batch_size: int) -> DataLoader[Any]:
        sampler = DistributedSampler(range(number), ranks, rank, shuffle, seed=3, drop_last=drop_last)
        sampler.set_epoch(2)
        return DataLoader(range(number), batch_size=batch_size, sampler=sampler)

    was = [[batch.tolist() for batch in on_rank(rank, then, size)][:batches] for rank in range(then)]
    had = {sample for batches_of_rank in was for batch in batches_of_rank for sample in batch}
    about = {"samples": number, "batch_size": size, "replicas": then}
    behind = seen(about, 0, min(batches, len(was[0])))
    order = order_of(on_rank(0, then, size))
    rest = samples_of(order, number)[behind:]
    assert len(had | set(rest)) > number - (then if drop_last else 1)
    assert had & set(rest) == set()
    hands = [Hand(on_rank(rank, now, 3)) for rank in range(now)]
    dealt = [hand.deal(rest) for hand in hands]
    assert {len(batches_of_rank) for batches_of_rank in dealt} == {hands[0].batches(len(rest))}
    got = [sample for batches_of_rank in dealt for batch in batches_of_rank for sample in batch]
    if drop_last:
        assert len(got) == len(set(got)) > len(rest) - now
    else:
        assert set(got) == set(rest)
        assert len(got) < len(rest) + now
