"""Runs that are long enough to settle, small enough for a minute, for rules of GradES to be tried on.

A byte GPT, a ViT and a CNN at decaying and constant rates, and a GPT that is tuned: all parameters or LoRA pairs, on
more text or over twenty epochs of less, or to tell packages of the standard library apart.
`record` trains one of them plainly and keeps, at every tenth step, what a rule could ask of each matrix, and the
weights at every fiftieth of the run: what a rule would have frozen can be put together from these afterwards.
"""

from __future__ import annotations

import email
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.defaults_models import Task, ViT, cnn
from benchmarks.fine_tuning import add_lora
from examples.gpt.data import find_files, is_validation, read_bytes
from examples.gpt.model import GPT, GPTConfig
from harness.runs import begin, quiet_trainer
from lightning_eff.structure import select_matrices

LENGTH, BATCH, EVERY, SNAPSHOTS = 64, 16, 10, 50
CONFIG = GPTConfig(block_size=LENGTH, n_layer=4, n_head=4, n_embd=64)
Schedule = Callable[[float], float]
Pairs = Callable[[nn.Module, list[Tensor]], tuple[Tensor, Tensor]]

SCHEDULES: dict[str, Schedule] = {
    "cosine": lambda done: 0.5 + 0.5 * math.cos(math.pi * done),
    "cosine to a tenth": lambda done: 0.55 + 0.45 * math.cos(math.pi * done),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
WARM_UP = 0.05


class Settling(Task):
    """A task with held-out data and a learning rate by the part of the run that is done.

    ``pairs`` gives logits and what they should be.
    """

    def __init__(self, net: nn.Module, data: list[Tensor], held_out: list[Tensor], pairs: Pairs, schedule: str,
                 steps: int, optimizer: Callable[..., Any]) -> None:  # fmt: skip
        super().__init__(net, data, lambda net, batch: F.cross_entropy(*pairs(net, batch)), optimizer)
        self.held_out, self.pairs, self.schedule, self.steps = held_out, pairs, SCHEDULES[schedule], steps

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*self.data), BATCH, shuffle=True, drop_last=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        rate = lambda step: min(1.0, (step + 1) / (WARM_UP * self.steps)) * self.schedule(step / self.steps)  # noqa: E731
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(self.net, batch))

    def score(self) -> float:
        """The loss on the held-out data."""
        return self.judge()[0]

    @torch.no_grad()
    def judge(self) -> tuple[float, float]:
        """The loss on the held-out data, and the part of it that is told right."""
        self.eval()
        logits, wanted = self.pairs(self.net, self.held_out)
        self.train()
        return F.cross_entropy(logits, wanted).item(), (logits.argmax(1) == wanted).float().mean().item()


def _adamw(lr: float) -> Callable[..., Any]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, fused=True)


def _sgd(lr: float) -> Callable[..., Any]:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)


def _classify(net: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    return net(batch[0]), batch[1]


def _next_byte(net: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    return net(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten()


def _parts(data: list[Tensor], held_out: int) -> tuple[list[Tensor], list[Tensor]]:
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(0))
    return [each[order[held_out:]] for each in data], [each[order[:held_out]] for each in data]


def _digits() -> tuple[list[Tensor], list[Tensor]]:
    digits = load_digits()
    return _parts(
        [torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)], 360
    )


def _text(folder: Path, most: int | None = None, held_out: int = 512) -> tuple[list[Tensor], list[Tensor]]:
    text = read_bytes(find_files(folder, "*.py"))
    lines = text[: len(text) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1).long()
    return _parts([lines[:most]], held_out)


TORCH, EMAIL = Path(torch.__file__).parent / "nn" / "modules", Path(email.__file__).parent
LIBRARY, LOGS = EMAIL.parent, Path("logs") / "benchmarks"
PACKAGES = ("asyncio", "email", "idlelib", "importlib", "multiprocessing", "tkinter", "unittest", "xml")
SNIPPETS = (150, 64)  # of a package, to train on and held out


def _snippets() -> tuple[list[Tensor], list[Tensor]]:
    """Pieces of text and the package that each is from; those that are held out are of other files."""
    parts: tuple[list[list[Tensor]], ...] = ([], [])
    for label, package in enumerate(PACKAGES):
        files = find_files(LIBRARY / package, "*.py")
        away = [is_validation(file.relative_to(LIBRARY).as_posix(), 0.2) for file in files]
        for part, number, held_out in zip(parts, SNIPPETS, (False, True), strict=True):
            text = read_bytes([file for file, each in zip(files, away, strict=True) if each == held_out])
            pieces = text[: len(text) // LENGTH * LENGTH].reshape(-1, LENGTH).long()
            chosen = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))[:number]
            part.append([pieces[chosen], torch.full((number,), label)])
    train, held_out = ([torch.cat(each) for each in zip(*part, strict=True)] for part in parts)
    return train, held_out


def _gpt(schedule: str, steps: int) -> Settling:
    data, held_out = _text(TORCH)
    return Settling(GPT(CONFIG), data, held_out, _next_byte, schedule, steps, _adamw(3e-3))


def _pretrained() -> GPT:
    """A GPT that has read torch's modules."""
    path = LOGS / "grades_pretrained.pt"
    if not path.exists():
        begin(100)
        module = _gpt("cosine", 1200)
        quiet_trainer(accelerator="cpu", devices=1, max_steps=1200, max_epochs=-1).fit(module)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(module.net.state_dict(), path)
    net = GPT(CONFIG)
    net.load_state_dict(torch.load(path, weights_only=True))
    return net


def _tuned(schedule: str, steps: int, lora: bool, **part: int) -> Settling:
    """On the sources of ``email``, or a part of them."""
    net = _pretrained()
    if lora:
        add_lora(net)
    data, held_out = _text(EMAIL, **part)
    return Settling(net, data, held_out, _next_byte, schedule, steps, _adamw(3e-3 if lora else 1e-3))


class Classifier(nn.Module):
    """A GPT whose last states, over all bytes, say what a text is."""

    def __init__(self, body: GPT, classes: int) -> None:
        super().__init__()
        body.head = nn.Identity()
        self.body = body
        self.head = nn.Linear(body.config.n_embd, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(tokens).mean(1))  # type: ignore[no-any-return]


def _classifier(schedule: str, steps: int) -> Settling:
    net = Classifier(_pretrained(), len(PACKAGES))
    return Settling(net, *_snippets(), _classify, schedule, steps, _adamw(1e-3))


RUNS: dict[str, tuple[Callable[[str, int], Settling], str, int]] = {
    "GPT, cosine": (_gpt, "cosine", 1200),
    "GPT, cosine to a tenth": (_gpt, "cosine to a tenth", 1200),
    "GPT, constant": (_gpt, "constant", 1200),
    "GPT tuned, linear": (lambda *how: _tuned(*how, lora=False), "linear", 1200),
    "GPT tuned by LoRA, linear": (lambda *how: _tuned(*how, lora=True), "linear", 1200),
    "ViT, cosine": (lambda *how: Settling(ViT(), *_digits(), _classify, *how, _adamw(2e-3)), "cosine", 2400),
    "ViT, constant": (lambda *how: Settling(ViT(), *_digits(), _classify, *how, _adamw(1e-3)), "constant", 2400),
    "CNN, cosine": (lambda *how: Settling(cnn(), *_digits(), _classify, *how, _sgd(0.05)), "cosine", 2400),
    "CNN, constant": (lambda *how: Settling(cnn(), *_digits(), _classify, *how, _sgd(0.05)), "constant", 2400),
    "LoRA, 20 epochs, cosine": (lambda *how: _tuned(*how, lora=True, most=768, held_out=256), "cosine", 640),
    "text classifier, cosine": (_classifier, "cosine", 750),
}
"""Name -> how the module is made anew from torch's random state, the schedule and the steps."""


def make(name: str, seed: int) -> tuple[Settling, int]:
    """The module of a run, and its steps."""
    build, schedule, steps = RUNS[name]
    build(schedule, steps)  # what is trained in advance, if it is not there yet
    begin(seed, ".*max_epochs.*", ".*no `val_dataloader`.*")
    return build(schedule, steps), steps


@dataclass
class Record(L.Callback):
    """What a rule could ask of each matrix, at every tenth step, and the weights at every fiftieth of the run."""

    steps: int
    names: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    checks: list[int] = field(default_factory=list)
    figures: dict[str, list[Tensor]] = field(default_factory=dict)
    weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    previous: list[Tensor] = field(default_factory=list)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parameters = dict(pl_module.named_parameters())
        found = [(each.name, tuple(each.parameters)) for each in select_matrices(pl_module, None, None)]
        self.names = [each for each in found if all(parameters[name].requires_grad for name in each[1])]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if (trainer.global_step + 1) % EVERY:
            return
        parameters = dict(pl_module.named_parameters())
        now = [torch.cat([parameters[name].grad.flatten() for name in each]) for _, each in self.names]  # type: ignore[union-attr]
        before, self.previous = self.previous or [g * torch.nan for g in now], [g.clone() for g in now]
        pairs = list(zip(now, before, strict=True))
        figures = {
            "grad": [g.abs().sum() for g in now],
            "grad_change": [(g - old).abs().sum() for g, old in pairs],
            "cosine": [torch.cosine_similarity(g, old, 0) for g, old in pairs],
            "rate": [torch.tensor(optimizer.param_groups[0]["lr"])] * len(now),
        }
        self.checks.append(trainer.global_step + 1)
        for name, values in figures.items():
            self.figures.setdefault(name, []).append(torch.stack(values))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step % (self.steps // SNAPSHOTS) == 0 and step >= 0.3 * self.steps:
            self.weights[step] = {name: value.clone() for name, value in pl_module.state_dict().items()}


def record(name: str, seed: int) -> Path:
    """Train plainly and keep the record."""
    module, steps = make(name, seed)
    recorder = Record(steps)
    trainer = quiet_trainer(recorder, accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1)
    trainer.fit(module)
    figures = {key: torch.stack(values) for key, values in recorder.figures.items()}  # checks x matrices
    path = LOGS / f"grades_record_{list(RUNS).index(name)}_{seed}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"names": recorder.names, "checks": recorder.checks, "figures": figures, "weights": recorder.weights}, path
    )
    print(name, seed, f"{module.score():.4f}", flush=True)
    return path
