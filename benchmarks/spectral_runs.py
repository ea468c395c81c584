"""Training runs for benchmarks/spectral_alignment.py, healthy ones and such that diverge, with the signals of every
detector recorded, so that detectors can be tuned and compared without training anew.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpt import GPT_1M, text, train
from examples.digits.data import DigitsDataModule
from examples.gpt.data import TextDataModule
from examples.gpt.model import Attention, GPTConfig, rotate
from examples.gpt.module import GPTModule
from harness.runs import begin
from harness.timing import now
from lightning_eff.callbacks.spectral_alignment.probe import AlignmentProbe, watched_layers
from lightning_eff.functional.spectral_alignment import majority_fraction

EVERY = 10  # steps between two observations that are recorded
INTERVALS = (10, 20)  # each has singular vectors of its own, since they follow the weights from one to the next
RECORDS = Path("logs/spectral_alignment")


# --- what makes a run diverge ----------------------------------------------------------------------------------------


class RateRamp(L.Callback):
    """From step ``start`` on, the rate of the parameters named by ``words`` grows by a factor at every step."""

    def __init__(self, start: int, growth: float, words: tuple[str, ...] = ("",)) -> None:
        self.start, self.growth, self.words = start, growth, words

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A group of its own for each parameter that is ramped."""
        named = {id(p): name for name, p in pl_module.named_parameters()}
        for optimizer in trainer.optimizers:
            for group in list(optimizer.param_groups):
                chosen = [p for p in group["params"] if any(word in named[id(p)] for word in self.words)]
                group["params"] = [p for p in group["params"] if all(p is not other for other in chosen)]
                optimizer.add_param_group({**group, "params": chosen, "ramped": True})
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        for config in trainer.lr_scheduler_configs:
            groups = trainer.optimizers[0].param_groups
            config.scheduler.base_lrs = [group["initial_lr"] for group in groups]
            config.scheduler.lr_lambdas = [config.scheduler.lr_lambdas[0]] * len(groups)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            if group.get("ramped"):  # the scheduler sets the rate anew in every step
                group["lr"] *= self.growth ** max(0, trainer.global_step - self.start)


class RoundedAttention(torch.autograd.Function):
    """softmax(s) @ v whose output keeps few bits, rounded down, and whose backward pass takes it as if it were exact.

    Flash attention's backward pass does so: with a rounded output the gradient of a row of scores no longer sums to
    zero, and what is rounded the same way in every step adds up in the query and key weights.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, v: Tensor, bits: int) -> Tensor:
        p = scores.softmax(-1)
        mantissa, exponent = torch.frexp(p @ v)
        output = torch.ldexp((mantissa * 2**bits).floor() / 2**bits, exponent)
        ctx.save_for_backward(p, v, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        p, v, output = ctx.saved_tensors
        of_p = grad @ v.transpose(-1, -2)
        of_scores = p * (of_p - (grad * output).sum(-1, keepdim=True))
        return of_scores, p.transpose(-1, -2) @ grad, None


def attend(self: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The example's attention with its scores in sight: their maximum is a detector's signal."""
    batch, time_, width = x.shape
    q, k, v = (
        layer(x).view(batch, time_, self.n_head, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
    )
    scores = rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones(time_, time_, dtype=torch.bool).triu(1), -math.inf)
    self.max_logit = scores.detach().max()
    bits = self.__dict__.get("bits")
    y = scores.softmax(-1) @ v if bits is None else RoundedAttention.apply(scores, v, bits)
    return self.out(y.transpose(1, 2).reshape(batch, time_, width))


def gpt(seed: int, lr: float = 1e-3, bits: int | None = None, norm: bool = True) -> tuple[L.LightningModule, Any]:
    """Four blocks of width 128 on 8 x 64 bytes a step, at a constant rate."""
    module = GPTModule(GPTConfig(64, 4, 4, 128), lr=lr, schedule="constant", warmup_steps=50, fused=True)
    for block in module.model.blocks:
        block.attn.forward = MethodType(attend, block.attn)
        block.attn.bits = bits
        if not norm:
            block.norm_attn, block.norm_mlp = nn.Identity(), nn.Identity()
    return module, TextDataModule(
        root=Path(sysconfig.get_path("stdlib")) / "encodings",
        pattern="cp*.py",
        val_fraction=0.2,
        block_size=64,
        batch_size=8,
        val_windows=8,
        seed=seed,
    )


def varied(seed: int) -> tuple[L.LightningModule, Any]:
    """The demo's training: five blocks on 8 x 128 bytes a step of all of the library's sources, a cosine schedule."""
    module = GPTModule(GPT_1M, lr=3e-3, warmup_steps=50, fused=True)
    for block in module.model.blocks:
        block.attn.forward = MethodType(attend, block.attn)
    return module, text(GPT_1M, 8, val_windows=8, seed=seed)


class DigitsMLP(L.LightningModule):
    """Residual blocks on the digits, with and without LayerNorm: its layers are fed by ReLU."""

    def __init__(self, norm: bool, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(64, width), nn.Linear(width, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width) if norm else nn.Identity(), nn.Linear(width, width), nn.ReLU(),
                          nn.Linear(width, width)) for _ in range(depth)
        )  # fmt: skip

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x = self.embed(batch[0].flatten(1)).relu()
        for block in self.blocks:
            x = x + block(x)
        return F.cross_entropy(self.head(x), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def digits(seed: int, norm: bool) -> tuple[L.LightningModule, Any]:
    return DigitsMLP(norm), DigitsDataModule(seed=seed)


# --- what is recorded ------------------------------------------------------------------------------------------------


class Signals(L.Callback):
    """Every detector's signal: scalars at every step, and what the monitor's own probe sees every ``EVERY`` steps."""

    def __init__(self, stop_when_exploded: bool) -> None:
        self.stop_when_exploded = stop_when_exploded
        self.scalars: dict[str, list[float]] = {name: [] for name in ("loss", "grad_norm", "weight_norm", "max_logit")}
        self.majority: dict[str, list[list[float]]] = {str(interval): [] for interval in INTERVALS}
        self.residual: dict[str, list[list[float]]] = {str(interval): [] for interval in INTERVALS}
        self.layers: dict[str, nn.Module] = {}
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.layers = watched_layers(pl_module)
        settings = dict(bins=1, max_tokens=None, iterations=1)
        self.probes = {interval: AlignmentProbe(self.layers, **settings) for interval in INTERVALS}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._step = trainer.global_step
        for interval, probe in self.probes.items():
            if self._step % interval == 0:
                probe.attach()

    def _read(self) -> None:
        missing = [math.nan] * len(self.layers)
        for interval, probe in self.probes.items():
            probe.detach()
            observed = self._step % interval == 0
            positive, negative, _, _, _, residual = probe.read(torch.device("cpu"))[:, 1:].unbind(1)
            majority = majority_fraction(positive, negative).tolist() if observed else missing
            self.majority[str(interval)].append(majority)
            self.residual[str(interval)].append(residual.tolist() if observed else missing)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        self.scalars["grad_norm"].append(norm.item())
        norm = torch.nn.utils.get_total_norm([layer.weight for layer in self.layers.values()])  # type: ignore[misc]
        self.scalars["weight_norm"].append(norm.item())
        logits = [block.attn.max_logit.item() for block in getattr(getattr(pl_module, "model", None), "blocks", ())]
        self.scalars["max_logit"].append(max(logits, default=math.nan))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._step % EVERY == 0:
            self._read()
        self.scalars["loss"].append(outputs["loss"].item())
        if self.stop_when_exploded and exploded(self.scalars["loss"]) is not None:
            trainer.should_stop = True


def exploded(losses: list[float], window: int = 10) -> int | None:
    """The step at which the loss, as a mean over ``window`` steps, passes twice its minimum; None: it did not.

    A loss that is not finite has passed it. A mean, so that one lucky batch is not the minimum.
    """
    lowest = math.inf
    for step in range(window - 1, len(losses)):
        mean = sum(losses[step - window + 1 : step + 1]) / window
        if not mean <= 2 * lowest:
            return step
        lowest = min(lowest, mean)
    return None


# --- the runs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A kind of run: what is trained, for how long, and what goes wrong with it from which step on."""

    name: str
    build: Callable[[int], tuple[L.LightningModule, Any]]
    steps: int = 500
    diverges: bool = False
    fault_at: int = 0
    faults: Callable[[], list[L.Callback]] = field(default=list)


def record(workload: Workload, seed: int, folder: Path = RECORDS) -> Path:
    """Train once on one thread; the signals go to ``folder``."""
    begin(seed)
    module, data = workload.build(seed)
    signals = Signals(workload.diverges)
    started = now()
    train(module, data, *workload.faults(), signals, accelerator="cpu", max_steps=workload.steps)
    saved = {
        "workload": workload.name,
        "seed": seed,
        "layers": list(signals.layers),
        "scalars": {name: torch.tensor(values) for name, values in signals.scalars.items()},
        "majority": {name: torch.tensor(values) for name, values in signals.majority.items()},
        "residual": {name: torch.tensor(values) for name, values in signals.residual.items()},
        "seconds": now() - started,
    }
    path = folder / f"{workload.name}-{seed}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(saved, path)
    return path


def _workloads() -> Iterator[Workload]:
    def ramped(name: str, build: Callable[[int], Any], growth: float, *words: str) -> Workload:
        ramp = lambda: [RateRamp(200, growth, words or ("",))]  # noqa: E731
        return Workload(name, build, diverges=True, fault_at=200, faults=ramp)

    yield ramped("rate ramp", gpt, 1.02)
    yield ramped("rate ramp, no LayerNorm", partial(gpt, norm=False), 1.015)
    yield Workload("low-precision attention", partial(gpt, lr=6e-3, bits=2), diverges=True)
    yield ramped("query-key growth", gpt, 1.02, "query", "key")
    yield Workload("healthy: GPT", gpt)
    yield Workload("healthy: GPT, rate 3e-3", partial(gpt, lr=3e-3))
    yield Workload("healthy: GPT without LayerNorm", partial(gpt, norm=False))
    yield Workload("healthy: GPT, varied text", varied, steps=1000)
    yield Workload("healthy: digits", partial(digits, norm=True))
    yield Workload("healthy: digits without LayerNorm", partial(digits, norm=False))


WORKLOADS = {workload.name: workload for workload in _workloads()}
