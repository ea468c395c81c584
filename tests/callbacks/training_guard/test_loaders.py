"""A rollback beside loaders with workers that live on or a state of their own: no sample comes twice or is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from harness.faults import InjectedError
from harness.runs import fit
from lightning_eff.callbacks import TrainingGuard
from tests.callbacks.training_guard.guard_models import GUARD, AtBatch, Sounder, kill
from tests.suite.runs import SaveAt

SAMPLES, BATCH, STEPS = 24, 4, 14  # six batches an epoch; the run ends in its third


class Numbers(torch.utils.data.Dataset):
    """Each sample is its own number."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index)])


class Orders(Sampler):
    """Another order in each epoch, from a generator of its own."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Stateful(DataLoader):
    """Goes on where its state says, as torchdata's StatefulDataLoader does."""

    given = 0
    skip = 0

    def __iter__(self) -> Any:
        self.given, skip, self.skip = self.skip, self.skip, 0
        batches = iter(super().__iter__())
        for _ in range(skip):
            next(batches)
        for batch in batches:
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skip = state_dict["given"]


class Reader(L.LightningModule):
    """Writes down which samples it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(1, 1)
        self.seen: list[list[int]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append([int(value) for value in batch.flatten()])
        return self.head(batch / SAMPLES).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def _loader(kind: str) -> DataLoader:
    workers = dict(num_workers=2, persistent_workers=True, multiprocessing_context="fork") if kind != "stateful" else {}
    return (DataLoader if kind == "workers" else Stateful)(Numbers(), batch_size=BATCH, sampler=Orders(), **workers)


def _train(kind: str, *around: L.Callback, **arguments: Any) -> tuple[Reader, TrainingGuard]:
    module, guard = Reader(), TrainingGuard(**GUARD)
    fit(module, guard, *around, data=_loader(kind), max_steps=STEPS, **arguments)
    return module, guard


@pytest.mark.parametrize("kind", ["stateful", pytest.param("workers", marks=pytest.mark.slow), "both"])
@pytest.mark.parametrize("alarm", [3, 6, 9])  # within the first epoch, across its end, within the second
def test_a_rollback_takes_no_batch_twice_and_loses_none(kind, alarm):
    plain, _ = _train(kind)
    module, guard = _train(kind, Sounder(alarm))
    assert guard.rollbacks == 1
    epochs = [module.seen[i : i + SAMPLES // BATCH] for i in range(0, len(module.seen), SAMPLES // BATCH)]
    # What was undone is made up for by as many more batches, and these are the loader's next ones.
    assert len(module.seen) == STEPS + guard.undone_steps > STEPS
    assert module.seen[:STEPS] == plain.seen
    for epoch in epochs[:-1]:
        assert sorted(number for batch in epoch for number in batch) == list(range(SAMPLES))


@pytest.mark.parametrize("kind", ["stateful", "both"])
@pytest.mark.parametrize("step", [3, 5])  # in the first epoch and in the second, as the batches are counted
def test_a_checkpoint_from_behind_a_rollback_has_the_loader_s_place(kind, step, tmp_path: Path):
    path = tmp_path / "behind.ckpt"
    unbroken, _ = _train(kind, Sounder(3))
    with pytest.raises(InjectedError):
        _train(kind, Sounder(3), SaveAt(step, path), AtBatch(9, kill))
    resumed, _ = _train(kind, ckpt_path=path)
    assert resumed.seen == unbroken.seen[step + 2 :]  # two batches were undone
