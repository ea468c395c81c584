"""Eight small models whose healthy gradient norms differ by more than a thousand times, and what goes wrong with data.

Each has the optimizer that people would use for it. The rate that is given here is the middle of three, a factor of 3
apart, of which the best without any clipping on healthy data is taken (`python -m benchmarks.worth zclip-rates`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn

from benchmarks.defaults_models import ViT
from examples.gpt.data import find_files, read_bytes
from examples.gpt.model import GPT, VOCAB_SIZE, GPTConfig

BATCH, LENGTH, LATENT, HELD_OUT = 8, 16, 16, 128
FAULTS = ("noise", "wrong labels", "repeated")


class Objective(nn.Module):
    """A network and its loss; called with the name of who is trained, which matters to a GAN alone, and a batch."""

    def __init__(self, net: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, player: str, inputs: Tensor, *targets: Tensor) -> Tensor:
        return self.loss(self.net(inputs), *(targets or (inputs,)))


class Gan(nn.Module):
    """A generator of digits and its judge, each with its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = _mlp(64, 64, 64, 1)
        self.generator = _mlp(LATENT, 64, 64, 64)

    def forward(self, player: str, real: Tensor, latent: Tensor) -> Tensor:
        fake = self.generator(latent).sigmoid()
        of_fake = self.judge(fake)
        if player == "generator":
            return F.softplus(-of_fake).mean()
        return F.softplus(-self.judge(real)).mean() + F.softplus(of_fake).mean()

    @torch.no_grad()
    def distance(self, real: Tensor, latent: Tensor) -> Tensor:
        """Fréchet's distance of the normal distributions that fit generated and real pixels."""
        fake = self.generator(latent).sigmoid()
        of_real, of_fake = real.T.cov(), fake.T.cov()
        root = _root(of_real)
        apart = (real.mean(0) - fake.mean(0)).square().sum()
        return apart + of_real.trace() + of_fake.trace() - 2 * _root(root @ of_fake @ root).trace()


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


class Recurrent(nn.Module):
    """Elman's network over bytes, unrolled."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, width)
        self.inside = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, VOCAB_SIZE)

    def forward(self, tokens: Tensor) -> Tensor:
        states = [torch.zeros_like(self.embed(tokens[:, 0]))]
        for step in self.embed(tokens).unbind(1):
            states.append(torch.tanh(step + self.inside(states[-1])))
        return self.head(torch.stack(states[1:], 1))  # type: ignore[no-any-return]


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inside, outside in itertools.pairwise(widths):
        layers += [nn.Linear(inside, outside), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


def _cnn() -> nn.Module:
    def block(inside: int, outside: int) -> list[nn.Module]:
        # Statistics of the batch in evaluations too: running ones are a state that models side by side do not have.
        norm = nn.BatchNorm2d(outside, track_running_stats=False)
        return [nn.Conv2d(inside, outside, 3, padding=1, bias=False), norm, nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(1, 8), *block(8, 16), nn.Flatten(), nn.Linear(64, 10))


def _entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)


Parts = tuple[list[Tensor], list[Tensor]]
Corrupt = Callable[[str, list[Tensor], torch.Generator], list[Tensor]]


def _parts(*data: Tensor) -> Parts:
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(0))
    return [each[order[HELD_OUT:]] for each in data], [each[order[:HELD_OUT]] for each in data]


def _images() -> Parts:
    digits = load_digits()
    return _parts(torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target))


def _pixels() -> Parts:
    return tuple([part[0].flatten(1)] for part in _images())  # type: ignore[return-value]


def _gan_data() -> Parts:
    (train,), (held_out,) = _pixels()
    latent = torch.randn(1024, LATENT, generator=torch.Generator().manual_seed(1))
    return [train], [held_out, latent]


def _diabetes() -> Parts:
    data = load_diabetes()  # the targets are from 25 to 346, and nobody has scaled them
    return _parts(torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target, dtype=torch.float32)[:, None])


def _text() -> Parts:
    text = read_bytes(find_files(Path(torch.__file__).parent / "nn" / "modules", "*.py"))
    lines = text[: len(text) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1).long()
    return _parts(lines[:, :-1], lines[:, 1:])


def _bad_text(fault: str, batch: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    shape = (len(batch[0]), LENGTH + 1)
    random = torch.randint(VOCAB_SIZE, shape, generator=generator)
    if fault == "wrong labels":
        return [batch[0], random[:, 1:]]
    if fault == "repeated":  # one byte all over
        random = random[:1, :1].expand(shape)
    return [random[:, :-1], random[:, 1:]]


def _bad(scale: float, wrong: Callable[[Tensor, torch.Generator], Tensor] | None) -> Corrupt:
    def corrupt(fault: str, batch: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        if fault == "repeated":  # one example in all places
            return [each[:1].expand_as(each) for each in batch]
        if fault == "noise":
            return [scale * torch.rand(batch[0].shape, generator=generator), *batch[1:]]
        assert wrong is not None
        return [batch[0], wrong(batch[1], generator)]

    return corrupt


def _wrong_digit(labels: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(10, labels.shape, generator=generator)


def _wrong_number(targets: Tensor, generator: torch.Generator) -> Tensor:
    return 25 + 321 * torch.rand(targets.shape, generator=generator)


_IMAGE_NOISE = 16.0  # pixels as they are before the division by 16
_OF_IMAGES = _bad(_IMAGE_NOISE, _wrong_digit)
_OF_PIXELS = _bad(_IMAGE_NOISE, None)
_OF_NUMBERS = _bad(1.0, _wrong_number)  # real features are about 0.05


@dataclass(frozen=True)
class Workload:
    """What is trained: the module, its data, the optimizer and its rate, and what a fault makes of a batch."""

    module: Callable[[], nn.Module]
    data: Callable[[], Parts]
    optimizer: Callable[..., torch.optim.Optimizer]
    rate: float
    corrupt: Corrupt
    players: tuple[str, ...] = ("",)

    @property
    def faults(self) -> tuple[str, ...]:
        """Those that its data can have: without labels none is wrong."""
        return tuple(fault for fault in FAULTS if not (fault == "wrong labels" and self.corrupt is _OF_PIXELS))


_ADAMW = partial(torch.optim.AdamW, foreach=True)
_ADAM_OF_GANS = partial(torch.optim.Adam, betas=(0.5, 0.999), foreach=True)
_SGD = partial(torch.optim.SGD, momentum=0.9, foreach=True)
_GPT = GPTConfig(block_size=LENGTH, n_layer=2, n_head=2, n_embd=32)


def _objective(net: Callable[[], nn.Module], loss: Callable[..., Tensor]) -> Callable[[], nn.Module]:
    return lambda: Objective(net(), loss)


def _squared(*widths: int) -> Callable[[], nn.Module]:
    return _objective(partial(_mlp, *widths), F.mse_loss)


WORKLOADS: dict[str, Workload] = {
    "byte GPT": Workload(_objective(lambda: GPT(_GPT), _entropy), _text, _ADAMW, 3e-3, _bad_text),
    "RNN": Workload(_objective(Recurrent, _entropy), _text, _SGD, 0.3, _bad_text),
    "CNN": Workload(_objective(_cnn, _entropy), _images, _SGD, 0.05, _OF_IMAGES),
    "CNN, sum": Workload(_objective(_cnn, partial(_entropy, reduction="sum")), _images, _SGD, 0.003, _OF_IMAGES),
    "ViT": Workload(_objective(partial(ViT, blocks=2), _entropy), _images, _ADAMW, 3e-3, _OF_IMAGES),
    "regression": Workload(_squared(10, 64, 64, 1), _diabetes, _ADAMW, 1e-2, _OF_NUMBERS),
    "autoencoder": Workload(_squared(64, 64, 16, 64, 64), _pixels, _ADAMW, 3e-3, _OF_PIXELS),
    "GAN": Workload(Gan, _gan_data, _ADAM_OF_GANS, 1e-3, _OF_PIXELS, ("judge", "generator")),
}
