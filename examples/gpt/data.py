"""Text as bytes: by default the standard library of the running interpreter, which every machine already has."""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

SEPARATOR = b"\0"  # between files; a byte that text does not contain


def find_files(root: Path, pattern: str, exclude: Sequence[str] = ()) -> list[Path]:
    """Files under `root` that match `pattern`, in no folder named in `exclude`; sorted, so that the order is stable."""
    excluded = set(exclude)
    files = (path for path in root.rglob(pattern) if path.is_file())
    return sorted(path for path in files if excluded.isdisjoint(path.relative_to(root).parts[:-1]))


def is_validation(name: str, fraction: float) -> bool:
    """Whether a file goes to validation: by a hash of its name, so the same on every machine, in any company."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def read_bytes(files: Sequence[Path]) -> Tensor:
    """The files one after the other as one uint8 tensor."""
    return torch.frombuffer(bytearray(SEPARATOR.join(path.read_bytes() for path in files)), dtype=torch.uint8)


class RandomCrops(Dataset[Tensor]):
    """Crops of `block_size + 1` bytes at random places. Crop `n` depends on `seed` and `n` only, for any `n`."""

    def __init__(self, data: Tensor, block_size: int, crops_per_epoch: int, seed: int) -> None:
        self.data = data
        self.size = block_size + 1
        self.crops_per_epoch = crops_per_epoch
        self.seed = seed

    def __len__(self) -> int:
        return self.crops_per_epoch

    def __getitem__(self, n: int) -> Tensor:
        start = random.Random(f"{self.seed}/{n}").randrange(len(self.data) - self.size + 1)
        return self.data[start : start + self.size]


class Windows(Dataset[Tensor]):
    """`count` windows spread evenly over the text, all that fit if None; no byte is predicted twice.

    Neighbours share one byte: the last target of the one is the first input of the next.
    """

    def __init__(self, data: Tensor, block_size: int, count: int | None) -> None:
        self.data = data
        self.block_size = block_size
        self.available = (len(data) - 1) // block_size
        self.count = self.available if count is None else min(count, self.available)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, n: int) -> Tensor:
        start = n * self.available // self.count * self.block_size
        return self.data[start : start + self.block_size + 1]


class CropSampler(DistributedSampler[Tensor]):
    """This rank's crop numbers of the current epoch, without those already served before a resume."""

    skip = 0

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * len(self.dataset)  # Lightning sets the epoch: every epoch draws crops of its own
        skip, self.skip = self.skip, 0
        return islice((first + n for n in super().__iter__()), skip, None)


class ResumableLoader(DataLoader[Tensor]):
    """A DataLoader that knows its place in the epoch. Lightning saves and restores the place with the checkpoint."""

    served = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.served = self.sampler.skip // self.batch_size
        for batch in super().__iter__():
            self.served += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"served": self.served % len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.skip = state["served"] * self.batch_size


class TextDataModule(L.LightningDataModule):
    """Any folder of text as batches of uint8 tensors of shape `(batch_size, block_size + 1)`.

    Args:
        root: Folder to read, with all folders below. Default: the standard library of the running interpreter.
        pattern: File names to read.
        exclude: Names of folders to leave out. By default installed packages, which differ between environments, and
            tests: many Linux distributions ship the standard library without them, and tests are repetitive text.
        block_size: Bytes of context.
        batch_size: Sequences per step, per device.
        crops_per_epoch: Training sequences per epoch, over all devices; crops are random, so an epoch is a choice.
        val_fraction: Share of files that are kept for validation.
        val_windows: Validate on this many windows, spread evenly over the validation text. None: on all of it.
        seed: Decides which crops are drawn, whatever the global seed is.
        num_workers: Processes that load data. The text is in memory and cutting it is cheap: 0 is the fastest on CPU.
    """

    def __init__(
        self,
        root: Path | None = None,
        pattern: str = "*.py",
        exclude: Sequence[str] = ("site-packages", "dist-packages", "test", "tests", "idle_test"),
        block_size: int = 256,
        batch_size: int = 32,
        crops_per_epoch: int = 65536,
        val_fraction: float = 0.05,
        val_windows: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        self.root = Path(root) if root is not None else Path(sysconfig.get_path("stdlib"))
        self.pattern = pattern
        self.exclude = exclude
        self.block_size = block_size
        self.batch_size = batch_size
        self.crops_per_epoch = crops_per_epoch
        self.val_fraction = val_fraction
        self.val_windows = val_windows
        self.seed = seed
        self.num_workers = num_workers
        self.train_data: RandomCrops | None = None
        self.val_data: Windows | None = None

    def split_files(self) -> tuple[list[Path], list[Path]]:
        """Training and validation files; no file is in both."""
        train, val = [], []
        for path in find_files(self.root, self.pattern, self.exclude):
            name = path.relative_to(self.root).as_posix()
            (val if is_validation(name, self.val_fraction) else train).append(path)
        return train, val

    def setup(self, stage: str | None = None) -> None:
        if self.train_data is not None:
            return
        texts = []
        for part, files in zip(("training", "validation"), self.split_files(), strict=True):
            text = read_bytes(files) if files else torch.empty(0, dtype=torch.uint8)
            if len(text) <= self.block_size:
                raise ValueError(
                    f"{len(files)} {part} files match {self.pattern!r} under {self.root}, {len(text)} bytes in all:"
                    f" more than block_size ({self.block_size}) is needed"
                )
            texts.append(text)
        self.train_data = RandomCrops(texts[0], self.block_size, self.crops_per_epoch, self.seed)
        self.val_data = Windows(texts[1], self.block_size, self.val_windows)

    def train_dataloader(self) -> ResumableLoader:
        replicas = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        sampler = CropSampler(self.train_data, shuffle=False, **replicas)
        return ResumableLoader(
            self.train_data,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            drop_last=True,
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.val_data, batch_size=self.batch_size, num_workers=self.num_workers)
