"""The 1,797 digits of 8 x 8 pixels that come with scikit-learn: nothing to download."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

try:
    from sklearn.datasets import load_digits
except ImportError as error:
    raise ImportError("scikit-learn cannot be found. It comes with: pip install 'lightning-eff[examples]'") from error


class DigitsDataModule(L.LightningDataModule):
    """Batches of images `(batch, 1, 8, 8)` in [0, 1] and labels `(batch,)`.

    Args:
        batch_size: Images per step, per device.
        val_fraction: Share of the images kept for validation.
        seed: Decides which images those are, and the order of training, whatever the global seed is.
    """

    def __init__(self, batch_size: int = 64, val_fraction: float = 0.2, seed: int = 0) -> None:
        super().__init__()
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.train_data: Dataset[tuple[Tensor, Tensor]] | None = None
        self.val_data: Dataset[tuple[Tensor, Tensor]] | None = None

    def setup(self, stage: str | None = None) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # pixels are 0 to 16
        labels = torch.tensor(digits.target, dtype=torch.int64)
        self.train_data, self.val_data = random_split(
            TensorDataset(images, labels),
            [1 - self.val_fraction, self.val_fraction],
            generator=torch.Generator().manual_seed(self.seed),
        )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train_data, batch_size=self.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self.val_data, batch_size=self.batch_size)
