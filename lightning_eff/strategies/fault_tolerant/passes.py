"""Forward and backward passes on a shard's batch, in Lightning's loop and beside it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_eff.strategies.fault_tolerant.buffers import Buffers
from lightning_eff.strategies.fault_tolerant.comm_hook import ShardGradients
from lightning_eff.strategies.fault_tolerant.shard_values import ShardValues
from lightning_eff.strategies.fault_tolerant.step_in_hand import StepInHand
from lightning_eff.training.logged import nothing_logged


class Passes:
    """What surrounds a pass, whoever makes it.

    Random numbers of a micro-batch (dropout) belong to (seed, epoch, shard, index), so it does not matter who computes
    it or how often.

    Args:
        trainer: which is fitting.
        step: in hand.
        gradients: of DDP's hook.
    """

    def __init__(self, trainer: Trainer, step: StepInHand, gradients: ShardGradients) -> None:
        self.trainer = trainer
        self.step = step
        self.gradients = gradients
        self.aside = False
        """Whether a micro-batch runs beside Lightning's loop."""
        self._approximates = False

    @property
    def module(self) -> LightningModule:
        """The user's."""
        return self.trainer.lightning_module

    @contextmanager
    def approximately(self) -> Iterator[None]:
        """`Assignment.around`, once, however deep: the orphans' passes may lie within those of Lightning."""
        if self._approximates:
            yield
            return
        self._approximates = True
        try:
            with self.step.assignment.around():
                yield
        finally:
            self._approximates = False

    @contextmanager
    def random(self, shard: int, index: int) -> Iterator[None]:
        """Random numbers that belong to a micro-batch."""
        device, group = self.trainer.strategy.root_device, self.gradients.sums.group
        part = shard * group.size + group.rank  # each process of a replica has a part of the shard's batch
        seed = self.step.assignment.seed
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(hash((seed, self.trainer.current_epoch, part, index)) % 2**62)
            yield

    @contextmanager
    def beside(
        self, shard: int, index: int, loading: AbstractContextManager[Any] | None = None
    ) -> Iterator[Callable[[], Any]]:
        """Around passes on a shard's batch beside Lightning's loop, of which nothing is logged.

        Gives what calls the module's ``training_step`` on it.

        Args:
            shard: whose batch it is.
            index: of the batch in the epoch.
            loading: around loading the batch.
        """
        trainer, module = self.trainer, self.module
        strategy, loop = trainer.strategy, trainer.fit_loop.epoch_loop
        with loading or nullcontext():
            batch = self.step.loader.batch(shard, index)
        batch = trainer.precision_plugin.convert_input(batch)
        batch = strategy.batch_to_device(module._on_before_batch_transfer(batch, dataloader_idx=0))
        arguments = loop._build_kwargs(OrderedDict(), batch, index)

        def training_step() -> Any:
            with self.random(shard, index), strategy.precision_plugin.train_step_context(), torch.enable_grad():
                return module.training_step(*arguments.values())

        name, module._current_fx_name = module._current_fx_name, "training_step"
        try:
            with nothing_logged(trainer):
                yield training_step
        finally:
            module._current_fx_name = name

    @contextmanager
    def run_aside(self) -> Iterator[None]:
        """Around what runs beside Lightning's loop."""
        self.aside = True
        try:
            yield
        finally:
            self.aside = False

    def accumulate(self, shard: int, index: int) -> None:
        """Forward and backward on the module itself, whose gradients are added to: nothing is reduced or logged."""
        plugin = self.trainer.strategy.precision_plugin
        with self.beside(shard, index) as training_step, self.run_aside(), self.approximately():
            output = training_step()
            loss = output["loss"] if isinstance(output, dict) else output
            if loss is not None:
                plugin.backward(loss / self.trainer.accumulate_grad_batches, self.module, None)


class OrphanPasses:
    """The micro-batches of dead replicas' shards, in automatic optimization; they go before this replica's own.

    DDP expects gradients from its own forward pass on.

    Args:
        passes: what they are made of.
        buffers: in which they leave no trace.
        values: what they give to reductions.
    """

    def __init__(self, passes: Passes, buffers: Buffers, values: ShardValues) -> None:
        self.passes = passes
        self.buffers = buffers
        self.values = values

    def run(self, index: int) -> None:
        """Their gradients are kept apart from the own ones, which Lightning may erase."""
        self.values.forget_orphans()
        orphans = self.passes.step.assignment.orphans
        if not orphans:
            return
        parameters = [parameter for parameter in self.passes.module.parameters() if parameter.requires_grad]
        own = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        with self.buffers.kept():
            for shard in orphans:
                self.values.begin_orphan()
                self.passes.accumulate(shard, index)
                self.values.end_orphan()
        self.passes.gradients.adopt(parameters)
        for parameter, gradient in zip(parameters, own, strict=True):
            parameter.grad = gradient
