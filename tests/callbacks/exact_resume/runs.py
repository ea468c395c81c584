"""A run in which everything is random, what happens in it, and checkpoints from all over it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from harness.runs import quiet_trainer, seed_everything
from lightning_eff.callbacks import ExactResume
from lightning_eff.training.dtensor import local

SAMPLES = 22
BATCH = 4


class Noisy(Dataset[Tensor]):
    """Samples with noise of all three generators."""

    loaded: list[int]

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples
        self.loaded = []

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        self.loaded.append(index)
        return noisy(index)


class Pairs(Noisy):
    """Each is a batch already."""

    def __getitem__(self, index: int) -> Tensor:
        return torch.stack([noisy(index), noisy(index)])


class Labelled(Noisy):
    """With a label, so that a batch is a list."""

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index), index


class Stream(IterableDataset[Tensor]):
    """The same, dealt to the workers in turn."""

    def __init__(self, samples: int = SAMPLES, sized: bool = True) -> None:
        self.samples = samples
        if sized:
            self.__class__ = SizedStream

    def __iter__(self) -> Iterator[Tensor]:
        worker = torch.utils.data.get_worker_info()
        for index in range(*((0, self.samples) if worker is None else (worker.id, self.samples, worker.num_workers))):
            yield noisy(index)


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.samples


class KeptStream(Stream):
    """One that keeps its place."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples
        self.next = 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.next < self.samples:
            self.next += 1
            yield noisy(self.next - 1)
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class KeptSampler(Sampler[int]):
    """One that keeps its place in an order of its own."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples
        self.order: list[int] = []
        self.next = 0

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[int]:
        if self.next == 0:
            self.order = torch.randperm(self.samples).tolist()
        while self.next < self.samples:
            self.next += 1
            yield self.order[self.next - 1]
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next, "order": list(self.order)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next, self.order = state["next"], state["order"]


class KeptLoader:
    """No DataLoader, and keeps its place."""

    def __init__(self) -> None:
        self.next = 0

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[Tensor]:
        for number in range(self.next % len(self), len(self)):
            self.next = number + 1
            yield torch.stack([noisy(number), noisy(number)])

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Skipping(Sampler[int]):
    """In order, without the first ones."""

    skip = 0

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        skip, self.skip = self.skip, 0
        return iter(range(skip, SAMPLES))


class KeptDataLoader(DataLoader[Any]):
    """A DataLoader that keeps its place, as users write it, and nothing of generators. Its iterator is made late."""

    served = 0

    def __init__(self, workers: int = 0) -> None:
        super().__init__(Labelled(), batch_size=BATCH, sampler=Skipping(), num_workers=workers)

    def __iter__(self) -> Iterator[Any]:
        self.served = self.sampler.skip // BATCH  # type: ignore[attr-defined]
        for batch in super().__iter__():
            self.served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.skip = state["served"] * BATCH  # type: ignore[attr-defined]


def noisy(index: int) -> Tensor:
    return torch.tensor([index, random.random(), float(np.random.rand()), float(torch.rand(()))])


class Net(L.LightningModule):
    """Dropout, BatchNorm, means of the epoch, and a learning rate that follows the validation."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 1))
        self.automatic_optimization = not manual
        self.draws = torch.Generator().manual_seed(5)

    def forward(self, batch: Tensor) -> Tensor:
        return self.layers(batch.to(self.layers[0].weight.dtype) / SAMPLES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        first = batch if isinstance(batch, Tensor) else tensors(batch)[0]
        loss = F.mse_loss(self(first), first.mean(1, keepdim=True))
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(first), sync_dist=True)
        self.log(
            "most", loss.detach(), on_step=False, on_epoch=True, reduce_fx=max, batch_size=len(first), sync_dist=True
        )
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss / 2)
        if (batch_idx + 1) % 2 == 0:
            optimizer: Any = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()
        return None

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        noise = torch.rand(()) + torch.rand((), generator=self.draws)
        self.log("val_loss", self(batch).square().mean() + noise, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        if not self.automatic_optimization:
            return optimizer
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


class Asking(Net):
    """Takes its batch from the loader by itself."""

    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor | None:
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


class Gan(Net):
    """Two optimizers in turn, each with its own noise."""

    def __init__(self) -> None:
        super().__init__(manual=True)
        self.judge = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.2), nn.Linear(4, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer, sign in zip(self.optimizers(), (1, -1), strict=True):
            self.toggle_optimizer(optimizer)
            made = self(batch + torch.randn_like(batch))
            loss = sign * self.judge(made).mean() + made.square().mean()
            self.log(f"loss {sign}", loss, on_epoch=True, batch_size=len(batch))
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in (self.layers, self.judge)]


class Events(L.Callback):
    """Everything that happens, in order, as numbers to the bit."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.events.append(("epoch", trainer.current_epoch))

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        total = trainer.fit_loop.epoch_loop.total_batch_idx
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.events.append(("batch", batch_idx, total, digest(batch), digest(list(module.parameters())), rate))

    def on_validation_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if not trainer.sanity_checking:
            self.events.append(("validation", index, digest(batch)))

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.events.append(("validated", shown(trainer)))

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        steps = trainer.fit_loop.epoch_loop._batches_that_stepped
        self.events.append(("epoch end", shown(trainer), trainer.global_step, steps, digest(list(module.buffers()))))


def shown(trainer: L.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def tensors(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]


def digest(value: Any) -> str:
    found = hashlib.sha256()
    for tensor in tensors(value):
        found.update(b"none" if tensor is None else local(tensor.detach()).contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


class SaveEverywhere(Checkpoint):
    """A checkpoint in each of some hooks; Lightning calls it behind the other callbacks."""

    def __init__(self, events: Events, folder: Path, hooks: tuple[str, ...]) -> None:
        self.events = events
        self.folder = folder
        self.saved: list[tuple[str, int, Path]] = []
        """The hook, how many events had happened, and the file."""
        for hook in hooks:
            setattr(self, hook, self._save(hook))

    def _save(self, hook: str) -> Callable[..., None]:
        def save(trainer: L.Trainer, *_: Any) -> None:
            if not trainer.sanity_checking:
                path = self.folder / f"{len(self.saved)}-{hook}.ckpt"
                trainer.save_checkpoint(path)
                self.saved.append((hook, len(self.events.events), path))

        return save


HOOKS = (
    *("on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end"),
    *("on_validation_batch_end", "on_validation_end", "on_train_epoch_end"),
)


def run(
    loaders: Callable[[], Any],
    folder: Path,
    *,
    hooks: tuple[str, ...] = (),
    resume: Path | None = None,
    seed: int = 0,
    manual: bool = False,
    gan: bool = False,
    asking: bool = False,
    callbacks: tuple[L.Callback, ...] = (),
    exact: bool = True,
    randomness: Any = "stock",
    **arguments: Any,
) -> tuple[Events, SaveEverywhere, L.Trainer]:
    """Two and a half epochs, or so."""
    seed_everything(seed)
    module, events = Gan() if gan else Asking() if asking else Net(manual), Events()
    saver = SaveEverywhere(events, folder, hooks)
    own_order = torch.Generator().manual_seed(6)
    validation = DataLoader(Noisy(8), batch_size=4, shuffle=True, generator=own_order)
    defaults = {"max_epochs": 3, "accelerator": "cpu", "log_every_n_steps": 1, "num_sanity_val_steps": 1}
    own = [ExactResume(randomness=randomness)] if exact else []
    trainer = quiet_trainer(*own, *callbacks, events, saver, default_root_dir=folder, **{**defaults, **arguments})
    trainer.fit(module, loaders(), validation, ckpt_path=resume)
    return events, saver, trainer


def loader(workers: int = 0, data: Callable[[], Any] = Noisy, **arguments: Any) -> DataLoader[Any]:
    """Shuffled, where the data can be."""
    dataset = data()
    shuffle = {} if isinstance(dataset, IterableDataset) or "sampler" in arguments else {"shuffle": True}
    return DataLoader(dataset, **{"batch_size": BATCH, "num_workers": workers, **shuffle, **arguments})


def first_differences(
    loaders: Callable[[], Any], folder: Path, hooks: tuple[str, ...] = HOOKS, every: int = 1, **arguments: Any
) -> tuple[int, dict[str, Any]]:
    """Resume from checkpoints of an unbroken run, and compare what happens then with what happened.

    Returns:
        How many checkpoints were tried, and for those that went on in another way, the first event that differs.
    """
    events, saver, _ = run(loaders, folder, hooks=hooks, **arguments)
    wrong: dict[str, Any] = {}
    tried = saver.saved[::every]
    for hook, happened, path in tried:
        if hook == "on_train_epoch_start":  # these hooks are called again
            happened -= 1
        while hook == "on_validation_batch_end" and events.events[happened - 1][0] == "validation":
            happened -= 1  # a validation that was broken off runs again
        wanted = events.events[happened:]
        found = run(loaders, folder, resume=path, **{**arguments, "seed": 99})[0].events
        if found != wanted:
            pairs = [*zip(found, wanted, strict=False), (len(found), len(wanted))]
            wrong[path.name] = next(pair for pair in pairs if pair[0] != pair[1])
    return len(tried), wrong
