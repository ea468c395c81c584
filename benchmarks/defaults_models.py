"""Ten ordinary models, small enough for seconds of 300 steps on one core, whose healthy gradient norms differ widely.

They are what people train at first: losses that are means and losses that are sums, targets that are scaled and targets
that are not, AdamW and SGD, one optimizer and two.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.gpt.data import find_files, read_bytes
from examples.gpt.model import GPT, VOCAB_SIZE, GPTConfig

Loss = Callable[[nn.Module, list[Tensor]], Tensor]
BATCH = 16


class Task(L.LightningModule):
    """A network, what it is trained on, by which loss, and how.

    Args:
        net: what is trained.
        data: tensors of equal length, of which a batch is taken.
        loss: of the network and a batch.
        optimizer: of the parameters.
    """

    def __init__(self, net: nn.Module, data: list[Tensor], loss: Loss, optimizer: Callable[..., Any]) -> None:
        super().__init__()
        self.net, self.data, self.loss, self.optimizer = net, data, loss, optimizer

    def train_dataloader(self) -> Any:
        order = torch.Generator().manual_seed(0)
        return DataLoader(TensorDataset(*self.data), BATCH, shuffle=True, drop_last=True, generator=order)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self.net, batch)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class Gan(Task):
    """Two networks against each other, each with its optimizer."""

    def __init__(self, data: list[Tensor]) -> None:
        generator = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        judge = nn.Sequential(
            nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1)
        )
        super().__init__(nn.ModuleDict({"generator": generator, "judge": judge}), data, _none, torch.optim.Adam)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        real = batch[0]
        fake = self.net["generator"](torch.randn(len(real), 16)).sigmoid()  # type: ignore[index]
        judge = self.net["judge"]  # type: ignore[index]
        for_generator, for_judge = self.optimizers()  # type: ignore[misc, attr-defined]
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        with_logits = F.binary_cross_entropy_with_logits
        loss = with_logits(judge(real), ones) + with_logits(judge(fake.detach()), zeros)
        self._step(for_judge, loss)
        self._step(for_generator, with_logits(judge(fake), ones))
        return loss.detach()

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=2e-4, betas=(0.5, 0.999)) for part in self.net.values()]  # type: ignore[operator]


class Recurrent(nn.Module):
    """Bytes in, the next ones out, by two layers of LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, 32)
        self.lstm = nn.LSTM(32, 48, num_layers=2, batch_first=True)
        self.head = nn.Linear(48, VOCAB_SIZE)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])  # type: ignore[no-any-return]


class ViT(nn.Module):
    """A Transformer over 16 patches of 2 x 2 pixels."""

    def __init__(self, width: int = 32, hidden: int = 128, blocks: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(width, 2, hidden, dropout=dropout, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(2, 2, 2).unfold(3, 2, 2).reshape(len(images), 16, 4)
        return self.head(self.blocks(self.embed(patches) + self.position).mean(1))  # type: ignore[no-any-return]


def _none(net: nn.Module, batch: list[Tensor]) -> Tensor:
    raise NotImplementedError("a GAN has two losses")


def _classify(reduction: str = "mean") -> Loss:
    return lambda net, batch: F.cross_entropy(net(batch[0]), batch[1], reduction=reduction)


def _next_byte(reduction: str = "mean") -> Loss:
    def loss(net: nn.Module, batch: list[Tensor]) -> Tensor:
        logits = net(batch[0][:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten(), reduction=reduction)

    return loss


def _square(net: nn.Module, batch: list[Tensor]) -> Tensor:
    return F.mse_loss(net(batch[0]), batch[-1])


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inside, outside in itertools.pairwise(widths):
        layers += [nn.Linear(inside, outside), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def cnn() -> nn.Module:
    def block(inside: int, outside: int) -> list[nn.Module]:
        return [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]

    pool = nn.MaxPool2d(2)
    return nn.Sequential(
        *block(1, 16), *block(16, 16), pool, *block(16, 32), *block(32, 32), pool, nn.Flatten(), nn.Linear(128, 10)
    )


def _digits() -> list[Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return [images, torch.tensor(digits.target)]


def _pixels() -> list[Tensor]:
    return [_digits()[0].flatten(1)]


def _diabetes() -> list[Tensor]:
    data = load_diabetes()  # the targets are from 25 to 346, and nobody has scaled them
    return [torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target, dtype=torch.float32).unsqueeze(1)]


def _text() -> list[Tensor]:
    text = read_bytes(find_files(Path(torch.__file__).parent / "nn" / "modules", "*.py"))
    return [text[: len(text) // 33 * 33].reshape(-1, 33).long()]


def _adamw(lr: float) -> Callable[..., Any]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)


def _sgd(lr: float) -> Callable[..., Any]:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9)


GPT_SMALL = GPTConfig(block_size=32, n_layer=3, n_head=2, n_embd=32)

MODELS: dict[str, Callable[[], Task]] = {
    "byte GPT": lambda: Task(GPT(GPT_SMALL), _text(), _next_byte(), _adamw(1e-3)),
    "byte GPT, sum": lambda: Task(GPT(GPT_SMALL), _text(), _next_byte("sum"), _adamw(1e-3)),
    "LSTM": lambda: Task(Recurrent(), _text(), _next_byte(), _adamw(3e-3)),
    "ViT": lambda: Task(ViT(), _digits(), _classify(), _adamw(1e-3)),
    "ViT, sum": lambda: Task(ViT(), _digits(), _classify("sum"), _adamw(1e-3)),
    "CNN": lambda: Task(cnn(), _digits(), _classify(), _sgd(0.05)),
    "MLP": lambda: Task(_mlp(64, 64, 64, 64, 10), _digits(), _classify(), _sgd(0.1)),
    "autoencoder": lambda: Task(_mlp(64, 64, 16, 64, 64), _pixels(), _square, _adamw(1e-3)),
    "regression, targets unscaled": lambda: Task(_mlp(10, 64, 64, 64, 1), _diabetes(), _square, _adamw(3e-3)),
    "GAN": lambda: Gan(_pixels()),
}
"""Name -> the model, made anew from torch's random state."""
