"""The models of the contract suite: tiny, and fed so that every way to train sees the same samples.

A step takes `BATCH` samples of one fixed stream, however they are divided over ranks and micro-batches, and a resumed
run goes on where the broken one stopped: which samples come next follows from Lightning's own count of batches.
Some samples are outliers, so that gradients spike.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset

BATCH = 8
STEPS = 10  # of a full run
SPIKES = (5, 6, 8)  # steps whose samples have far too large targets
WIDTH = 8
LENGTH = 4


class Indices:
    """As many batch numbers as an epoch has batches. Stateful in Lightning's sense: it has nothing to restore."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(self.batches))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class EndlessIndices:
    """Iterable data without a length."""

    def __iter__(self) -> Iterator[Tensor]:
        index = 0
        while True:
            yield torch.tensor(index)
            index += 1


class _Block(nn.Module):
    """A pre-norm transformer block, so that methods which look for attention and FFN find them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        scores = (q @ k.transpose(-1, -2) / WIDTH**0.5).softmax(-1)
        x = x + self.proj(scores @ v)
        return x + self.mlp(self.norm2(x))


def _stream() -> tuple[Tensor, Tensor]:
    """All samples: inputs (n, LENGTH, WIDTH) and targets (n, 1)."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS * BATCH, LENGTH, WIDTH, generator=generator)
    targets = inputs.mean((1, 2)).unsqueeze(-1) + 0.1 * torch.randn(STEPS * BATCH, 1, generator=generator)
    for step in SPIKES:
        targets[step * BATCH : (step + 1) * BATCH] *= 40
    return inputs, targets


class _Fed:
    """Takes its samples from the stream. A base for a LightningModule of either name of Lightning."""

    validation_loaders = 1

    def __init__(self, micro_batches: int, skip_steps: int) -> None:
        super().__init__()
        self.micro_batches = micro_batches
        self.skip_steps = skip_steps
        self.inputs, self.targets = _stream()

    def samples(self) -> tuple[Tensor, Tensor]:
        """This rank's part of the current micro-batch."""
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        size = BATCH // self.micro_batches
        start = self.skip_steps * BATCH + self.trainer.fit_loop.epoch_loop.total_batch_idx * size
        mine = slice(start + rank * size // ranks, start + (rank + 1) * size // ranks)
        indices = torch.arange(mine.start, mine.stop) % len(self.inputs)
        return self.placed(indices)

    def placed(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Samples, where the weights are."""
        return self.inputs[indices].to(self.device), self.targets[indices].to(self.device)

    def train_dataloader(self) -> Any:
        return Indices(6 * self.micro_batches)  # a run does not end with an epoch

    def val_dataloader(self) -> Any:
        return Indices(2) if self.validation_loaders == 1 else [Indices(2) for _ in range(self.validation_loaders)]

    def test_dataloader(self) -> Any:
        return self.val_dataloader()

    def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self._error(*self.placed(torch.arange(4))), sync_dist=True)

    def _error(self, inputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError


class _Net(_Fed):
    """Two transformer blocks, automatic optimization."""

    optimizer_count = 1

    def __init__(
        self,
        optimizer: str = "adamw",
        micro_batches: int = 1,
        skip_steps: int = 0,
        dropout: float = 0.0,
        compiled: bool = False,
    ) -> None:
        super().__init__(micro_batches, skip_steps)
        torch.manual_seed(2)
        self.blocks = nn.Sequential(_Block(), nn.Dropout(dropout), _Block())
        self.head = nn.Linear(WIDTH, 1)
        self.optimizer = optimizer
        if compiled:
            self.blocks.compile(backend="aot_eager")  # no C++ compiler, no worker processes

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.blocks(inputs).mean(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> STEP_OUTPUT:
        return self._error(*self.samples())

    def _error(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(self(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":  # small differences stay small, which Adam's division does not promise
            return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class _Gan(_Fed):
    """A generator and a discriminator: manual optimization with two optimizers."""

    optimizer_count = 2

    def __init__(self, skip_steps: int = 0, **_: Any) -> None:
        super().__init__(1, skip_steps)
        torch.manual_seed(2)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))
        self.discriminator = nn.Sequential(nn.Linear(1, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()  # type: ignore[misc]
        inputs, targets = self.samples()
        # Each optimizer's own loss touches its own parameters only, which DDP's reducer also asks for.
        self.toggle_optimizer(discriminator)
        loss = (self.discriminator(targets) - 1).square().mean()
        loss = loss + self.discriminator(self.generator(inputs.mean(1)).detach()).square().mean()
        discriminator.zero_grad()
        self.manual_backward(loss)
        discriminator.step()
        self.untoggle_optimizer(discriminator)
        self.toggle_optimizer(generator)
        loss = (self.discriminator(self.generator(inputs.mean(1))) - 1).square().mean() + self._error(inputs, targets)
        generator.zero_grad()
        self.manual_backward(loss)
        generator.step()
        self.untoggle_optimizer(generator)

    def _error(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(self.generator(inputs.mean(1)), targets)

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in (self.generator, self.discriminator)], []


class Net(_Net, L.LightningModule):
    pass


class Gan(_Gan, L.LightningModule):
    pass


class Backbone(Net):
    """The blocks are a backbone, which Lightning's BackboneFinetuning freezes and unfreezes."""

    @property
    def backbone(self) -> nn.Module:
        return self.blocks

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Replicated(Net):
    """Shards itself into two replicas of two shards: HSDP."""

    def configure_model(self) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        for module in (self.blocks[0], self.blocks[2], self.head):
            fully_shard(module, mesh=mesh)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no mean: torch 2.8 took the sum for it


class Drawn(Net):
    """Takes its samples from a shuffled DataLoader, noise and dropout added."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{"dropout": 0.3, **arguments})
        self.seen: list[list[float]] = []

    def train_dataloader(self) -> Any:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        return DataLoader(Draws(6 * BATCH), batch_size=BATCH // ranks, shuffle=True)

    def training_step(self, batch: Tensor, batch_idx: int) -> STEP_OUTPUT:
        self.seen.append(batch.flatten().tolist())
        indices, noise = batch[:, 0].long().to(self.inputs.device), batch[:, 1, None, None]
        inputs, targets = self.inputs[indices].to(batch.device), self.targets[indices].to(batch.device)
        return self._error(inputs + 0.1 * noise, targets)


class Draws(Dataset[Tensor]):
    """Numbers of samples, each with a random number."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        return torch.stack([torch.tensor(float(index)), torch.rand(())])


MODELS = {"net": Net, "backbone": Backbone, "replicated": Replicated, "drawn": Drawn, "gan": Gan}


def under(package: str, name: str) -> Any:
    """The model's class, a LightningModule of that name of Lightning."""
    if package == "lightning.pytorch":
        return MODELS[name]
    return type(name, ({"net": _Net, "gan": _Gan}[name], import_module(package).LightningModule), {})
