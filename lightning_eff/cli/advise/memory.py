"""Bytes that training a module takes, counted on the meta device: nothing is computed and no memory is taken."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_eff.callbacks.misa.units import ModuleUnits
from lightning_eff.functional.misa import SamplerConfig
from lightning_eff.layers import MoC, MoCFeedForward, replace_layers
from lightning_eff.layers.moc import SHORT
from lightning_eff.strategies.fsdp2.sharding import blocks_to_shard
from lightning_eff.structure import clean_named_modules, clean_named_parameters, select_matrices
from lightning_eff.training.namespaces import MisconfigurationException
from lightning_eff.training.optimizer_state import state_bytes

STEPS = 1000
"""``max_steps`` of the Trainer that `configure_optimizers` may ask, for a schedule."""

_MOST_SUMS = 50_000


@dataclass(frozen=True)
class Dense:
    """What plain training holds: on one device, and on each rank under DDP."""

    weights: int
    buffers: int
    gradients: int
    states: int
    optimizers: str
    """In words: whose states they are."""

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return self.weights + self.buffers + self.gradients + self.states


@dataclass(frozen=True)
class Sharded:
    """What a rank holds under `fsdp2`: its shards, and what is whole besides while it computes."""

    ranks: int
    weights: int
    gradients: int
    states: int
    gathered: int

    @property
    def total(self) -> int:
        """Bytes of the shards."""
        return self.weights + self.gradients + self.states


@dataclass(frozen=True)
class Sampled:
    """Gradients and states under `MISA()`, at most."""

    gradients: int
    states: int
    budget: float
    matrices: int


@dataclass(frozen=True)
class Channels:
    """Bytes that all feed-forward networks together keep of a token for the backward pass, beside their inputs."""

    networks: int
    dense: int
    moc: int
    moc_recomputed: int


@dataclass
class Counts:
    """A module's numbers; what cannot be had is None, and ``why`` says so by its name."""

    parameters: int
    trained: int
    tensors: int
    blocks: int
    dense: Dense
    sharded: list[Sharded]
    misa: Sampled | None = None
    moc: Channels | None = None
    ema: int = 0
    window: int = 0
    grades: int | None = None
    why: dict[str, str] = field(default_factory=dict)


def count(module: LightningModule, precision: str, ranks: Sequence[int], cuda: bool, window: int = 6) -> Counts:
    """Count everything.

    Args:
        module: on any device; it ends on the meta device.
        precision: the Trainer's.
        ranks: numbers of ranks for `fsdp2`.
        cuda: on a GPU the next block is gathered while one computes.
        window: snapshots of `CheckpointAveraging`.
    """
    module.to("meta")
    if (half := {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision)) is not None:
        module.to(half)
    parameters = clean_named_parameters(module)
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    if not trained:
        raise ValueError("the model has no trainable parameters")
    optimizers, whose = _optimizers(module, list(trained.values()))
    dense = Dense(
        weights=sum(p.nbytes for p in parameters.values()),
        buffers=sum(buffer.nbytes for buffer in module.buffers()),
        gradients=sum(p.nbytes for p in trained.values()),
        states=state_bytes(optimizers),
        optimizers=whose,
    )
    blocks = blocks_to_shard(module)
    floating = [p for p in trained.values() if p.is_floating_point()]
    counts = Counts(
        parameters=sum(p.numel() for p in parameters.values()),
        trained=sum(p.numel() for p in trained.values()),
        tensors=len(parameters),
        blocks=len(blocks),
        dense=dense,
        sharded=[_sharded(module, optimizers, blocks, n, cuda) for n in ranks],
        ema=sum(4 * p.numel() for p in floating),
        window=window * sum(p.nbytes for p in floating),
    )
    try:
        counts.misa = _misa(module, optimizers)
    except (ValueError, MisconfigurationException) as error:
        counts.why["misa"] = str(error)
    try:
        watched = {name for matrix in select_matrices(module) for name in matrix.parameters}
        counts.grades = sum(trained[name].nbytes for name in watched if name in trained)
    except ValueError as error:
        counts.why["grades"] = str(error)
    try:
        counts.moc = _moc(module, 2 if "16" in precision else 4)
    except (ValueError, TypeError) as error:  # a module that cannot be copied is a TypeError
        counts.why["moc"] = str(error)
    return counts


def _optimizers(module: LightningModule, trained: list[nn.Parameter]) -> tuple[list[Optimizer], str]:
    """The module's own optimizers after a step on the meta device, or AdamW where they cannot make one there."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)  # the Trainer says which devices there are, and is never run
    try:
        module.trainer = Trainer(max_steps=STEPS, logger=False, enable_checkpointing=False, accelerator="cpu")
        optimizers = list(_found(module.configure_optimizers()))
        _step(optimizers, trained)
        names = list(dict.fromkeys(type(optimizer).__name__ for optimizer in optimizers))
        return optimizers, f"its own {' and '.join(names)}" if names else "no optimizer"
    except Exception as error:  # whatever a user's method asks for that is not here
        assumed = torch.optim.AdamW(trained)
        _step([assumed], trained)
        reason = " ".join(str(error).split())[:200]
        return [assumed], f"AdamW, assumed, since configure_optimizers cannot be asked here ({reason})"
    finally:
        log.setLevel(level)
        module.trainer = None  # type: ignore[assignment]


def _found(configured: Any) -> Iterator[Optimizer]:
    """The optimizers in whatever `configure_optimizers` may return."""
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, dict):
        yield from _found(configured.get("optimizer"))
    elif isinstance(configured, list | tuple):
        for each in configured:
            yield from _found(each)


def _step(optimizers: Sequence[Optimizer], trained: Sequence[Tensor]) -> None:
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if group.get("fused"):
                group["fused"] = False  # no such kernel on the meta device; the states are the same
        optimizer.step()


def _sharded(
    module: LightningModule, optimizers: Sequence[Optimizer], blocks: Sequence[str], ranks: int, cuda: bool
) -> Sharded:
    """Of the first rank, whose shards are the largest: rows are dealt as `torch.chunk` does."""

    def part(tensor: Tensor) -> int:
        return -(-tensor.shape[0] // ranks) * (tensor.nbytes // tensor.shape[0]) if tensor.ndim and len(tensor) else 0

    parameters = clean_named_parameters(module)
    modules = clean_named_modules(module)
    states = 0
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for value in state.values():
                if isinstance(value, Tensor):
                    states += part(value) if value.shape == parameter.shape else value.nbytes
    sizes = sorted((sum(p.nbytes for p in modules[name].parameters()) for name in blocks), reverse=True)
    rest = sum(p.nbytes for p in parameters.values()) - sum(sizes)
    return Sharded(
        ranks=ranks,
        weights=sum(map(part, parameters.values())),
        gradients=sum(part(p) for p in parameters.values() if p.requires_grad),
        states=states,
        gathered=rest + sum(sizes[: 2 if cuda else 1]),
    )


def _misa(module: LightningModule, optimizers: Sequence[Optimizer]) -> Sampled:
    """The most that a sample within the default budget can hold, and what the other optimizers hold besides."""
    units = ModuleUnits(module, optimizers, "module", None, None, None)
    sizes = units.sizes
    budget = max(SamplerConfig.budget, max(sizes) / units.total)
    mine = [optimizers[units.optimizer]]
    held = [(sum(p.nbytes for p in unit), state_bytes(mine, unit)) for unit in units.tensors(range(len(sizes)))]
    gradients, states = _most(sizes, held, round(budget * units.total, 6))
    for number, optimizer in enumerate(optimizers):
        if number != units.optimizer:
            gradients += sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
            states += state_bytes([optimizer])
    return Sampled(gradients, states, budget, len(sizes))


def _most(sizes: Sequence[int], held: Sequence[tuple[int, int]], limit: float) -> tuple[int, int]:
    """The sample of at most so many elements that holds most; an upper bound where there are too many samples."""
    best: dict[int, tuple[int, int]] = {0: (0, 0)}
    for size, (gradients, states) in zip(sizes, held, strict=True):
        for have, (g, s) in list(best.items()):
            if (total := have + size) <= limit:
                best[total] = max(best.get(total, (0, 0)), (g + gradients, s + states), key=sum)
        if len(best) > _MOST_SUMS:
            most = [max(each[i] / n for n, each in zip(sizes, held, strict=True)) for i in (0, 1)]
            return int(limit * most[0]), int(limit * most[1])
    return max(best.values(), key=sum)


def _moc(module: LightningModule, itemsize: int) -> Channels:
    """Gated networks as they are, and with `MoC()` in their place."""
    copied = copy.deepcopy(module)
    replace_layers(copied, feed_forward=MoC())
    layers = [layer for layer in copied.modules() if isinstance(layer, MoCFeedForward)]
    dense = moc = recomputed = 0
    for layer in layers:
        channels = layer.gate.out_features
        index = 2 if channels <= SHORT else 4
        dense += 4 * itemsize * channels
        moc += (4 * itemsize + index) * layer.k
        recomputed += (2 * itemsize + index) * layer.k
    return Channels(len(layers), dense, moc, recomputed)
