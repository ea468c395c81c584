"""Twelve small models, each of which can go wrong under FSDP2 in a way of its own."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

WIDTH = 8
WORDS = 13
BATCHES = 4  # of an epoch, on each of two ranks
BATCH = 4


class Base(L.LightningModule):
    """Learns to give the mean of its inputs; keeps the losses."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []
        self.validation: list[Tensor] = []

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(self(inputs).flatten(), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(*batch)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validation.append(self.loss(*batch))

    def data(self) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(2 * BATCHES * BATCH, WIDTH, generator=torch.Generator().manual_seed(3))
        return inputs, inputs.mean(1)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*self.data()), batch_size=BATCH)

    def val_dataloader(self) -> Any:
        return self.train_dataloader()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Words(Base):
    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(inputs[:, :-1]).flatten(0, 1), inputs[:, 1:].flatten())

    def data(self) -> tuple[Tensor, Tensor]:
        words = torch.randint(WORDS, (2 * BATCHES * BATCH, 7), generator=torch.Generator().manual_seed(3))
        return words, words


class MLP(Base):
    """No block repeats: all is one group."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def _encoder(layers: int = 2) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class GPT(Words):
    """The head is the embedding's weight, read by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.place = nn.Parameter(0.1 * torch.randn(6, WIDTH))
        self.blocks = _encoder()
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(6), persistent=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.blocks(self.embedding(words) + self.place[: words.shape[1]], mask=self.mask)
        return F.linear(x, self.embedding.weight)

    def generate(self) -> Tensor:
        return self(torch.zeros(1, 6, dtype=torch.long)).argmax(-1)


class TiedModules(Words):
    """Two modules share one parameter, and one of them lies in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(2))
        self.blocks.append(nn.Sequential(nn.Linear(WIDTH, WORDS, bias=False), nn.Identity()))
        self.blocks[2][0].weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        for block in self.blocks:
            x = block(x)
        return x


class ViT(Base):
    """A class token and places are parameters of the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.place = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.encoder = _encoder()
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        return self.head(self.encoder(x)[:, 0])

    def data(self) -> tuple[Tensor, Tensor]:
        image = torch.randn(2 * BATCHES * BATCH, 1, 4, 4, generator=torch.Generator().manual_seed(3))
        return image, image.mean((1, 2, 3))


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class CNN(ViT):
    """BatchNorm's statistics, and weights in the memory format of channels last."""

    def __init__(self) -> None:
        Base.__init__(self)
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.stages = nn.Sequential(_Residual(), _Residual())
        self.head = nn.Linear(4, 1)
        self.to(memory_format=torch.channels_last)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(image)).mean((2, 3)))

    def configure_optimizers(self) -> Any:  # Adam would divide rounding by rounding, where a norm takes a gradient away
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class RNN(Base):
    """An LSTM keeps a list of its weights beside its parameters, and a GRUCell reads them by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, WIDTH, num_layers=2, batch_first=True)
        self.cell = nn.GRUCell(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x.unsqueeze(-1))
        hidden = states[:, 0]
        for state in states.unbind(1):
            hidden = self.cell(state, hidden)
        return self.head(hidden)


class Bare(Base):
    """Parameters in lists and on the module, read without any module's forward; a step of one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) / 3 for _ in range(2))
        self.readout = nn.Parameter(torch.randn(WIDTH, 1))

    def training_step(self, batch: Any) -> Any:
        loss = self.loss(*batch)
        self.losses.append(loss.detach())
        return {"loss": loss, "more": [loss.detach()]}

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        for weight in self.weights:
            inputs = inputs + (inputs @ weight).tanh()
        return F.mse_loss((inputs @ self.readout).flatten(), targets)


class Functional(Base):
    """`functional_call`, and an input of `forward` that needs a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.second, dict(self.second.named_parameters()), (x,))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = F.linear(inputs, self.first.weight, self.first.bias).tanh()
        return super().loss(hidden, targets)


class Frozen(ViT):
    """The first half is frozen."""

    def __init__(self) -> None:
        super().__init__()
        for part in (self.patch, self.encoder.layers[0]):
            part.requires_grad_(False)


class _LoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, WIDTH))
        self.up = nn.Parameter(torch.zeros(WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.base(x) + x @ self.down.T @ self.up.T).relu()


class LoRA(MLP):
    """Small trained matrices beside frozen ones, in blocks."""

    def __init__(self) -> None:
        Base.__init__(self)
        self.net = nn.Sequential(_LoRA(), _LoRA(), nn.Linear(WIDTH, 1))


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.up = nn.Parameter(torch.randn(3, WIDTH, 2 * WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(3, 2 * WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bd,edh->beh", x, self.up).relu()
        share = self.router(x).softmax(-1)
        return x + torch.einsum("beh,ehd,be->bd", hidden, self.down, share)


class MoE(MLP):
    """Experts are bare parameters of three dimensions, whose number does not divide by that of the ranks."""

    def __init__(self) -> None:
        Base.__init__(self)
        self.net = nn.Sequential(_Experts(), _Experts(), nn.Linear(WIDTH, 1))


class GAN(Base):
    """Manual optimization: two optimizers, two backward passes and two updates in a step, and nothing is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))
        self.critic = nn.Sequential(nn.Linear(1, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        for index, part in enumerate(self.optimizers()):
            self.toggle_optimizer(part)
            judged = self.critic(self.generator(inputs))
            loss = (judged - 1).square().mean()
            if index == 1:
                loss = judged.square().mean() + (self.critic(targets.unsqueeze(1)) - 1).square().mean()
            part.zero_grad()
            self.manual_backward(loss)
            part.step()
            self.untoggle_optimizer(part)
            self.losses.append(loss.detach())

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(self.generator(inputs).flatten(), targets)

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in (self.generator, self.critic)], []


ZOO = {each.__name__: each for each in (
    GPT, TiedModules, ViT, CNN, RNN, MLP, GAN, Bare, Functional, Frozen, LoRA, MoE,
)}  # fmt: skip
