"""BatchNorm statistics for weights that have never seen a batch: those of an average."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from lightning_eff.training.namespaces import MisconfigurationException


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """The running statistics of all BatchNorm layers, by their name in the module."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, part in module.named_modules()
        if isinstance(part, _BatchNorm)
        for name, buffer in part.named_buffers(recurse=False)
    }


@torch.no_grad()
def recompute_statistics(trainer: Trainer, module: LightningModule, batches: int) -> None:
    """Replace the running statistics by those of the first training batches, under the weights as they are.

    A batch that is a tensor goes into ``forward``, of a list or tuple the first entry, of a dict the entries that
    ``forward`` has arguments for (the whole dict if it has none of them). Each rank takes its own batches; the
    statistics are averaged over the ranks. The training's own iteration over its data, its sampler, the random
    generators and the modes of all modules are left as they were.
    """
    modes = {part: part.training for part in module.modules()}
    momenta = {part: part.momentum for part in module.modules() if isinstance(part, _BatchNorm)}
    if not statistics(module):
        return
    try:
        with torch.inference_mode(False), isolate_rng():
            update_bn(islice(_batches(trainer), batches), _Forward(module, trainer))  # type: ignore[arg-type]
    finally:  # update_bn restores none of this on an exception
        for part, mode in modes.items():
            part.training = mode
        for part, momentum in momenta.items():
            part.momentum = momentum
    if trainer.world_size > 1:
        for buffer in statistics(module).values():
            if buffer.is_floating_point():
                buffer.copy_(trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))


class _Forward(nn.Module):
    """Calls the module on a batch of any kind; ``update_bn`` itself knows tensors only."""

    def __init__(self, module: LightningModule, trainer: Trainer) -> None:
        super().__init__()
        self.module = module
        self.trainer = trainer
        parameters = inspect.signature(module.forward).parameters.values()
        self.names = {parameter.name for parameter in parameters}
        self.takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    def forward(self, batch: Any) -> Any:
        batch = self.trainer.strategy.batch_to_device(batch)
        with self.trainer.precision_plugin.forward_context():
            if not isinstance(batch, Mapping):
                return self.module(batch)
            known = {name: value for name, value in batch.items() if self.takes_any or name in self.names}
            return self.module(**known) if known else self.module(batch)


def _batches(trainer: Trainer) -> Iterator[Any]:
    """The training batches from the start, without touching the loaders that the training is in the middle of."""
    loaders = trainer.fit_loop._combined_loader
    if loaders is None:
        raise MisconfigurationException(
            "update_bn takes BatchNorm statistics from the training data, and this Trainer has none: it has not "
            "fitted. Evaluate the averaged checkpoint without the callback"
        )
    copies = [_independent(loader) for loader in loaders.flattened]
    if len(copies) == 1:
        yield from copies[0]
        return
    combined = CombinedLoader(loaders.iterables, loaders._mode)
    combined.flattened = copies
    for batch, _, _ in combined:
        yield batch


def _independent(loader: Any) -> Any:
    """A DataLoader on the same dataset whose iteration moves neither the other's workers nor its sampler."""
    if not isinstance(loader, DataLoader):
        return loader
    other = copy.copy(loader)
    memo = {id(loader.dataset): loader.dataset}
    names = ("sampler", "batch_sampler", "generator")
    own = copy.deepcopy({name: loader.__dict__.get(name) for name in names}, memo)
    other.__dict__.update(own)  # a DataLoader does not let them be set
    other.__dict__["_iterator"] = None
    return other
