"""A GAN in manual optimization: two optimizers, each with its own ZClip statistics, and an average of both networks.

python -m examples.scripts.gan
"""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.digits import DigitsDataModule
from lightning_eff.callbacks import EMA, GradientStats, TrainingGuard, ZClip


class GAN(L.LightningModule):
    """Draws digits of 8 x 8 pixels; logs `d_loss` and `g_loss`."""

    automatic_optimization = False

    def __init__(self, latent: int = 16, width: int = 128, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.latent = latent
        self.lr = lr
        self.generator = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, 64), nn.Sigmoid())
        self.discriminator = nn.Sequential(nn.Linear(64, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        real = batch[0].flatten(1)
        fake = self(torch.randn(len(real), self.latent, device=self.device))
        d_optimizer, g_optimizer = self.optimizers()

        self.toggle_optimizer(d_optimizer)
        d_loss = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake.detach())).mean()
        d_optimizer.zero_grad()
        self.manual_backward(d_loss)
        d_optimizer.step()
        self.untoggle_optimizer(d_optimizer)

        self.toggle_optimizer(g_optimizer)
        g_loss = F.softplus(-self.discriminator(fake)).mean()
        g_optimizer.zero_grad()
        self.manual_backward(g_loss)
        g_optimizer.step()
        self.untoggle_optimizer(g_optimizer)

        self.log_dict({"d_loss": d_loss, "g_loss": g_loss}, prog_bar=True)
        return (d_loss + g_loss).detach()  # what the guard's rules look at

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        real = batch[0].flatten(1)
        fake = self(torch.randn(len(real), self.latent, device=self.device))
        # How far the mean picture is off: a number that the average of the weights is to make smaller.
        self.log("val_mean_gap", (real.mean(0) - fake.mean(0)).abs().mean(), batch_size=len(real))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        parts = (self.discriminator, self.generator)
        return [torch.optim.Adam(part.parameters(), lr=self.lr, betas=(0.5, 0.999)) for part in parts]


def main(steps: int = 1000, folder: str = "logs/gan") -> L.Trainer:
    """Train; Lightning counts a step for each optimizer, so two for a batch."""
    L.seed_everything(0, verbose=False)
    callbacks = [ZClip(), EMA(half_life=100), GradientStats(), TrainingGuard(action="stop")]
    trainer = L.Trainer(
        max_steps=steps, accelerator="auto", devices=1, callbacks=callbacks, default_root_dir=folder, logger=False,
        log_every_n_steps=10, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(GAN(), datamodule=DigitsDataModule())
    return trainer


if __name__ == "__main__":
    print({name: round(float(value), 4) for name, value in main().callback_metrics.items() if "gap" in name})
