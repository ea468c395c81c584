"""From every checkpoint the run goes on as it did: batches, noise, weights, learning rates and logged values."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.data import RandomSampler, WeightedRandomSampler

from tests.callbacks.exact_resume.runs import HOOKS, KeptStream, Noisy, Stream, first_differences, loader, run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*`__len__` could be inaccurate"),
    pytest.mark.filterwarnings("ignore:Consider setting `persistent_workers"),
]

BATCH_END = ("on_train_batch_end",)

FAST = {
    "one process": (loader, dict(every=3)),
    "validation and accumulation": (loader, dict(every=5, val_check_interval=2, accumulate_grad_batches=4)),
    "manual accumulation": (loader, dict(hooks=BATCH_END, manual=True)),
    "workers": (partial(loader, 2), dict(every=13)),
    "workers that stay": (partial(loader, 2, persistent_workers=True), dict(every=17)),
    "a stream": (partial(loader, 0, lambda: Stream(sized=False)), dict(every=5)),
    "a stream in workers": (partial(loader, 2, lambda: Stream(sized=False)), dict(hooks=BATCH_END, every=5)),
    "a stream that keeps its place": (partial(loader, 0, KeptStream), dict(hooks=BATCH_END, every=2)),
    "a generator of its own": (
        lambda: loader(generator=torch.Generator().manual_seed(1)),
        dict(hooks=BATCH_END, every=3),
    ),
    "several loaders": (lambda: [loader(), loader(0, partial(Noisy, 10))], dict(hooks=BATCH_END, every=2)),
}

SLOW = {
    "one process": (loader, {}),
    "workers": (partial(loader, 2), {}),
    "workers and accumulation": (partial(loader, 3), dict(val_check_interval=2, accumulate_grad_batches=4)),
    "workers that stay": (partial(loader, 3, persistent_workers=True), dict(every=2)),
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
    "samples one by one": (partial(loader, 0, batch_size=None), dict(every=5, limit_train_batches=6)),
    "several loaders in workers": (lambda: {"a": loader(2), "b": loader(2, partial(Noisy, 10))}, dict(every=5)),
    "loaders made anew": (loader, dict(every=2, reload_dataloaders_every_n_epochs=2)),
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
        dict(workers=2, hooks=BATCH_END, every=5, accumulate_grad_batches=2),
        pytest.param(dict(workers=0, every=2, val_check_interval=2), marks=pytest.mark.slow),
        pytest.param(dict(workers=2, every=2, accumulate_grad_batches=2), marks=pytest.mark.slow),
    ],
)
def test_goes_on_as_it_did_on_two_ranks(tmp_path, pool, how):
    for tried, wrong in pool.run(_on_a_rank, tmp_path, **how):
        assert tried >= 3
        assert wrong == {}


def _on_a_rank(folder, workers, **how):
    # Each rank draws other noise, as users who do not seed have it.
    seed = torch.distributed.get_rank()
    loaders = partial(loader, workers, partial(Noisy, 40))
    return first_differences(loaders, folder, seed=seed, strategy="ddp", devices=2, max_epochs=2, **how)
