"""From every checkpoint the run goes on as it did: batches, noise, weights, learning rates and logged values."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import RandomSampler, WeightedRandomSampler

from harness.faults import InjectedError
from harness.runs import quiet_trainer
from lightning_eff.callbacks import ExactResume
from tests.callbacks.exact_resume.runs import (
    BATCH,
    HOOKS,
    KeptDataLoader,
    KeptLoader,
    KeptSampler,
    KeptStream,
    Labelled,
    Net,
    Noisy,
    Pairs,
    Stream,
    first_differences,
    loader,
    run,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*`__len__` could be inaccurate"),
    pytest.mark.filterwarnings("ignore:Consider setting `persistent_workers"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes"),
    pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor"),
    pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument"),
]


def combined(mode: str) -> Callable[[], CombinedLoader]:
    return lambda: CombinedLoader([loader(), loader(0, partial(Noisy, 10))], mode)


def beside_a_stream(mode: str, workers: int = 0) -> Callable[[], CombinedLoader]:
    """A loader of a known length; the two together have none."""
    return lambda: CombinedLoader([loader(), loader(workers, lambda: Stream(10, sized=False))], mode)


BATCH_END = ("on_train_batch_end",)
EPOCHS = ("on_train_epoch_start", "on_train_epoch_end")

FAST = {
    "one process": (loader, dict(every=3)),
    "validation and accumulation": (loader, dict(every=5, val_check_interval=2, accumulate_grad_batches=4)),
    "manual accumulation": (loader, dict(hooks=BATCH_END, manual=True)),
    "only steps are counted": (loader, dict(hooks=BATCH_END, every=5, max_epochs=-1, max_steps=15)),
    "a GAN": (loader, dict(hooks=BATCH_END, every=5, gan=True)),
    "a step that asks for its batch": (loader, dict(hooks=BATCH_END, every=3, asking=True)),
    "in float64": (loader, dict(hooks=BATCH_END, every=4, precision="64-true")),
    "workers": (partial(loader, 2), dict(every=13)),
    "workers that stay": (partial(loader, 2, persistent_workers=True), dict(every=17)),
    "a stream": (partial(loader, 0, lambda: Stream(sized=False)), dict(every=5)),
    "a stream in workers": (partial(loader, 2, lambda: Stream(sized=False)), dict(hooks=BATCH_END, every=5)),
    "a stream that keeps its place": (partial(loader, 0, KeptStream), dict(hooks=BATCH_END, every=2)),
    "a sampler that keeps its place": (lambda: loader(sampler=KeptSampler()), dict(hooks=BATCH_END, every=3)),
    "a loader that keeps its place": (KeptLoader, dict(hooks=BATCH_END, every=3)),
    "a DataLoader that keeps its place": (KeptDataLoader, dict(hooks=BATCH_END, every=3)),
    "a DataLoader that keeps its place, in workers": (partial(KeptDataLoader, 2), dict(hooks=BATCH_END, every=5)),
    "batches of several tensors, from workers": (partial(loader, 2, Labelled), dict(hooks=BATCH_END, every=7)),
    "a generator of its own": (
        lambda: loader(generator=torch.Generator().manual_seed(1)),
        dict(hooks=BATCH_END, every=3),
    ),
    "seeded": (loader, dict(every=7, val_check_interval=2, randomness="seeded")),
    "several loaders": (lambda: [loader(), loader(0, partial(Noisy, 10))], dict(hooks=BATCH_END, every=2)),
    "a loader beside a stream": (beside_a_stream("max_size_cycle"), dict(hooks=BATCH_END, every=4)),
}

SLOW = {
    "one process": (loader, {}),
    "only steps are counted": (loader, dict(every=2, max_epochs=-1, max_steps=15)),
    "workers": (partial(loader, 2), dict(every=3)),
    "seeded, every": (loader, dict(randomness="seeded")),
    "seeded, workers that stay": (partial(loader, 2, persistent_workers=True), dict(every=17, randomness="seeded")),
    "seeded, several loaders": (
        lambda: [loader(), loader(0, partial(Noisy, 10))],
        dict(hooks=BATCH_END, every=2, randomness="seeded"),
    ),
    "seeded workers and accumulation": (
        partial(loader, 2),
        dict(every=4, accumulate_grad_batches=4, randomness="seeded"),
    ),
    "workers and accumulation": (partial(loader, 3), dict(every=4, val_check_interval=2, accumulate_grad_batches=4)),
    "workers that stay": (partial(loader, 3, persistent_workers=True), dict(every=5)),
    "workers that stay, and not all batches": (
        partial(loader, 2, persistent_workers=True),
        dict(every=3, limit_train_batches=4),
    ),
    "a stream in workers": (partial(loader, 2, Stream), dict(every=2)),
    "a stream without a length in workers": (partial(loader, 3, lambda: Stream(sized=False)), dict(every=3)),
    "a stream that keeps its place in workers": (partial(loader, 2, KeptStream), dict(every=3)),
    "drawn with replacement": (
        lambda: loader(0, sampler=RandomSampler(Noisy(), replacement=True, generator=torch.Generator())),
        dict(every=2),
    ),
    "weighted": (lambda: loader(2, sampler=WeightedRandomSampler([1.0, 2.0] * 11, 20)), dict(every=5)),
    "a sampler that keeps its place, in workers": (lambda: loader(2, sampler=KeptSampler()), dict(every=5)),
    "a loader that keeps its place": (KeptLoader, dict(every=2)),
    "a DataLoader that keeps its place": (KeptDataLoader, dict(every=2)),
    "a DataLoader that keeps its place, in workers": (partial(KeptDataLoader, 2), dict(every=3)),
    "a DataLoader that keeps its place, in three workers": (partial(KeptDataLoader, 3), dict(every=3)),
    "loaders that end with the shorter": (combined("min_size"), dict(every=2)),
    "loaders that end with the longer": (combined("max_size"), dict(every=2)),
    "a loader beside a stream": (beside_a_stream("max_size_cycle"), dict(every=2)),
    "a loader beside a stream, to the longer": (beside_a_stream("max_size"), dict(every=2)),
    "a loader beside a stream in workers": (beside_a_stream("max_size_cycle", 2), dict(hooks=BATCH_END, every=3)),
    "batches that the data make": (partial(loader, 0, Pairs, batch_size=None), dict(every=5, limit_train_batches=6)),
    "batches that the data make, in workers": (
        partial(loader, 2, Pairs, batch_size=None),
        dict(hooks=BATCH_END, every=5, limit_train_batches=6),
    ),
    "several loaders in workers": (lambda: {"a": loader(2), "b": loader(2, partial(Noisy, 10))}, dict(every=5)),
    "loaders made anew": (loader, dict(hooks=EPOCHS, reload_dataloaders_every_n_epochs=1)),
    "loaders made anew every other time": (loader, dict(every=2, reload_dataloaders_every_n_epochs=2)),
    "loaders made anew, workers that stay": (
        partial(loader, 2, persistent_workers=True),
        dict(hooks=EPOCHS, reload_dataloaders_every_n_epochs=1),
    ),
    "a stream made anew": (
        partial(loader, 0, lambda: Stream(sized=False)),
        dict(hooks=EPOCHS, reload_dataloaders_every_n_epochs=1),
    ),
}


@pytest.mark.parametrize(
    ("loaders", "how"),
    [
        *(pytest.param(*case, id=name) for name, case in FAST.items()),
        *(pytest.param(*case, id=f"every, {name}", marks=pytest.mark.slow) for name, case in SLOW.items()),
    ],
)
def test_goes_on_as_it_did(tmp_path, loaders, how):
    tried, wrong = first_differences(loaders, tmp_path, **how)
    assert tried >= 3
    assert wrong == {}


def test_a_schedule_of_accumulation_goes_on_within_its_epoch(tmp_path):
    events, saver, _ = run(loader, tmp_path, hooks=BATCH_END, max_epochs=2, callbacks=(_scheduled(),))
    for _, happened, path in (saver.saved[2], saver.saved[8]):
        resumed = run(loader, tmp_path, resume=path, seed=5, max_epochs=2, callbacks=(_scheduled(),))
        assert resumed[0].events == events.events[happened:]
        assert resumed[2].accumulate_grad_batches == 4
    # One that begins with another number has been told it by its user.
    trainer = run(loader, tmp_path, resume=path, max_epochs=2, accumulate_grad_batches=3)[2]
    assert trainer.accumulate_grad_batches == 3


def _scheduled() -> GradientAccumulationScheduler:
    return GradientAccumulationScheduler({0: 2, 1: 4})


def test_the_run_is_plain_lightnings(tmp_path):
    for loaders in (loader, partial(loader, 2), partial(loader, 0, Stream)):
        with_it = run(loaders, tmp_path, max_epochs=2)[0].events
        assert with_it == run(loaders, tmp_path, max_epochs=2, exact=False)[0].events


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_without_it_nothing_of_this_holds(tmp_path):
    tried, wrong = first_differences(loader, tmp_path, hooks=HOOKS, every=4, exact=False)
    assert len(wrong) > tried / 2


@pytest.mark.parametrize(
    "how",
    [
        dict(workers=2, hooks=BATCH_END, every=4, accumulate_grad_batches=2),
        pytest.param(dict(workers=0, every=2, val_check_interval=2), marks=pytest.mark.slow),
        pytest.param(dict(workers=2, every=2, accumulate_grad_batches=2), marks=pytest.mark.slow),
        pytest.param(dict(workers=2, every=2, randomness="seeded"), marks=pytest.mark.slow),
    ],
)
def test_goes_on_as_it_did_on_two_ranks(tmp_path, pool, how):
    for tried, wrong in pool.run(_on_a_rank, tmp_path, **how):
        assert tried >= 3
        assert wrong == {}


def _on_a_rank(folder, workers, **how):
    # Each rank draws other noise, as users who do not seed have it.
    seed = torch.distributed.get_rank()
    # The pool's ranks are spawned, and their workers would be too: each would import everything anew, for seconds.
    context = "fork" if workers else None
    loaders = partial(loader, workers, partial(Noisy, 40), multiprocessing_context=context)
    return first_differences(loaders, folder, seed=seed, strategy="ddp", devices=2, max_epochs=2, **how)


def test_batches_that_were_seen_are_not_loaded(tmp_path):
    _, saver, _ = run(loader, tmp_path, hooks=BATCH_END, max_epochs=1)
    data = Noisy()
    run(partial(loader, 0, lambda: data), tmp_path, resume=saver.saved[3][2], max_epochs=1)
    assert len(data.loaded) == len(Noisy()) - 4 * BATCH


def test_a_resumed_run_is_resumed_again_in_the_same_epoch(tmp_path):
    whole = run(partial(loader, 2), tmp_path, hooks=BATCH_END)[0].events
    first = run(partial(loader, 2), tmp_path, hooks=BATCH_END)[1].saved[7][2]
    again = tmp_path / "again"
    _, saver, _ = run(partial(loader, 2), again, hooks=BATCH_END, resume=first, seed=5)
    last = run(partial(loader, 2), again, resume=saver.saved[1][2], seed=6)[0].events
    assert last == whole[-len(last) :]
    assert [event[1] for event in last if event[0] == "batch"][:2] == [4, 5]


@pytest.mark.parametrize(
    "loaders",
    [loader, pytest.param(partial(loader, 2, persistent_workers=True), marks=pytest.mark.slow)],
    ids=["one process", "workers that stay"],
)
def test_a_resumed_run_is_saved_before_it_has_gone_on(tmp_path, loaders):
    how = dict(hooks=(*BATCH_END, "on_train_epoch_end"), max_epochs=2)
    events, saver, _ = run(loaders, tmp_path, **how)
    for number, places in ((1, 1), (6, 2)):  # in the midst of the first epoch, and behind its end
        _, happened, path = saver.saved[number]
        how = dict(hooks=("on_train_start", "on_train_epoch_start"), max_epochs=2, seed=5)
        again = run(loaders, tmp_path / f"{number}", resume=path, **how)[1].saved[:places]
        assert len(again) == places
        for hook, _, path in again:
            resumed = run(loaders, tmp_path, resume=path, seed=6, max_epochs=2)[0].events
            assert resumed == events.events[happened:], (number, hook)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (partial(loader, 0, partial(Noisy, 30)), r"samples 22, now 30"),
        (lambda: loader(sampler=range(22)), r"sampler 'RandomSampler', now 'range'"),
    ],
)
def test_other_data_are_refused(tmp_path, other, words):
    path = run(loader, tmp_path, hooks=BATCH_END, max_epochs=1)[1].saved[1][2]
    with pytest.raises(MisconfigurationException, match=words):
        run(other, tmp_path, resume=path)


def test_another_number_of_workers_keeps_the_order_and_says_what_it_does_not(tmp_path):
    events, saver, _ = run(loader, tmp_path, hooks=BATCH_END, max_epochs=1)
    seen: list[int] = []
    _, number, path = saver.saved[2]
    with pytest.warns(UserWarning, match="has 1 workers and had 0"):
        other = run(partial(loader, 1), tmp_path, resume=path, callbacks=(_Indices(seen),))[0]
    first: list[int] = []
    run(loader, tmp_path, callbacks=(_Indices(first),), max_epochs=1)
    assert seen[: len(first) - 3 * BATCH] == first[3 * BATCH :]
    assert other.events[0][:3] == events.events[number][:3]


class _Indices(L.Callback):
    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen += batch[:, 0].int().tolist()


def test_a_checkpoint_without_its_state_is_gone_on_from_as_lightning_does(tmp_path):
    path = run(loader, tmp_path, hooks=("on_train_epoch_end",), exact=False)[1].saved[0][2]
    with pytest.warns(UserWarning, match="saved without it"):
        events = run(loader, tmp_path, resume=path)[0].events
    assert [event[1] for event in events if event[0] == "epoch"] == [1, 2]


def test_gradients_of_one_replica_for_all_are_said(tmp_path, monkeypatch):
    saved = run(loader, tmp_path, hooks=BATCH_END, accumulate_grad_batches=2, max_epochs=1)[1].saved
    monkeypatch.setattr("lightning_eff.callbacks.exact_resume.callback.replicas_are_equal", lambda strategy: True)
    for (_, _, path), times in ((saved[0], 1), (saved[1], 0)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run(loader, tmp_path, resume=path, accumulate_grad_batches=2, max_epochs=1)
        assert sum("gradients of the one replica" in str(each.message) for each in said) == times


def test_what_keeps_no_place_can_be_refused(tmp_path):
    trainer = quiet_trainer(ExactResume(iterable="refuse"), max_steps=1, default_root_dir=tmp_path, accelerator="cpu")
    with pytest.raises(MisconfigurationException, match="Stream does not keep its place"):
        trainer.fit(Net(), loader(0, lambda: Stream(sized=False)))
    trainer.fit(Net(), loader(0, KeptStream))


def test_ready_batches_in_any_order_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="in_order=True"):
        run(partial(loader, 2, in_order=False), tmp_path)


def test_two_of_them_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="keep one"):
        run(loader, tmp_path, callbacks=(ExactResume(),))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_batch_that_failed_is_made_again(tmp_path):
    class Fails(L.Callback):
        def on_before_backward(self, trainer, module, loss):
            if trainer.global_step == 3 and self.due:
                raise InjectedError

    fails = Fails()
    fails.due = False
    whole = run(loader, tmp_path)[0].events
    fails.due = True
    saves = ModelCheckpoint(tmp_path, filename="failed", save_on_exception=True, save_top_k=1, monitor=None)
    with pytest.raises(InjectedError):
        run(loader, tmp_path, callbacks=(fails, saves))
    (path,) = tmp_path.glob("*failed*.ckpt")
    resumed = run(loader, tmp_path, resume=path, seed=3)[0].events
    assert resumed[0][1] == 3
    # BatchNorm has seen the batch twice: its buffers are not the weights' and are compared at the epoch's end.
    assert [event[:4] for event in resumed if event[0] == "batch"] == [e[:4] for e in whole if e[0] == "batch"][3:]
