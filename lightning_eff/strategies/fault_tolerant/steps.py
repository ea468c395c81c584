"""A replica's micro-batches: its own, which Lightning's loop runs, and beside them those of dead replicas."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from lightning_eff.strategies.fault_tolerant.comm_hook import ShardGradients
from lightning_eff.strategies.fault_tolerant.logged_values import LoggedValues
from lightning_eff.strategies.fault_tolerant.membership import Membership
from lightning_eff.strategies.fault_tolerant.operations import nothing
from lightning_eff.strategies.fault_tolerant.sharded_loader import ShardedLoader


class ShardSteps:
    """One optimizer step in terms of shards.

    Random numbers of a micro-batch (dropout) belong to (seed, epoch, shard, index), so it does not matter who computes
    it or how often. Buffers that a forward pass changes (BatchNorm's) follow this replica's own micro-batches alone.

    Args:
        trainer: which is fitting.
        loader: the training data.
        gradients: of DDP's hook.
        shard: this replica's own.
        replicas: the others.
        share_out: called when the members have changed; sets `orphans`.
    """

    def __init__(
        self,
        trainer: Trainer,
        loader: ShardedLoader,
        gradients: ShardGradients,
        shard: int,
        replicas: Membership,
        share_out: Callable[[], None],
    ) -> None:
        self.trainer = trainer
        self.loader = loader
        self.gradients = gradients
        self.shard = shard
        self.replicas = replicas
        self.share_out = share_out
        self.seed = 0
        self.window: list[int] = []
        """Indices of the micro-batches of the step in hand; empty between steps."""
        self.orphans: list[int] = []
        """Shards of dead replicas that this one computes besides its own."""
        self.around: Callable[[], AbstractContextManager[Any]] = nullcontext
        """Makes the context of each forward and backward pass; the strategy puts it around Lightning's own."""
        self.watching: Callable[[], AbstractContextManager[Any]] = nullcontext
        """Makes the context of this replica's own forward passes."""
        self.aside = False
        """Whether a micro-batch runs beside Lightning's loop."""
        self.changing: set[str] = set()
        """Names of the buffers that a forward pass changes."""
        self._within = False
        self._logged: LoggedValues | None = None
        self._values: list[Tensor] = []
        self._orphan_values: list[list[Tensor]] = []
        self._count: int | None = None
        self._buffers: dict[str, Tensor] = {}
        self._versions: dict[str, int] | None = None

    @property
    def module(self) -> LightningModule:
        """The user's."""
        return self.trainer.lightning_module

    def own(self, orphans: list[int]) -> None:
        """Take these shards besides the own one."""
        self.orphans = orphans
        self.loader.own([self.shard, *orphans])

    def begin(self) -> None:
        """The first micro-batch of a step is next, and the weights are what they are."""
        self._orphan_values = []
        self.gradients.orphans = {}
        buffers = dict(self.module.named_buffers())
        # Batch norm's kernels write its statistics without a new version, so that they would not be noticed.
        for path, part in self.module.named_modules():
            if isinstance(part, _NormBase) and part.training:
                self.changing.update(f"{path}.{name}".lstrip(".") for name, _ in part.named_buffers(recurse=False))
        if self._versions is not None:
            self._buffers = {name: buffers[name].clone() for name in self.changing if name in buffers}
        else:  # nothing is known yet
            self._buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        self._versions = {name: buffer._version for name, buffer in buffers.items()}

    def end(self) -> None:
        """The step is over."""
        self.window = []
        self.gradients.orphans = {}

    def close(self) -> None:
        """The run is over."""
        self.loader.close()

    # What Lightning's loop does.

    def run(self, training_step: Callable[[], Any]) -> Any:
        """This replica's ``training_step``; the orphans' go before it.

        DDP expects gradients from its own forward pass on.
        """
        index = self.window[-1]
        self._logged = LoggedValues(self.trainer.fit_loop.epoch_loop._results, self.module)
        self._adopt(index)
        self._count = 0
        with self.random(self.shard, index), self.watching():
            output = training_step()
        self._count = None
        self._note_changes()
        return output

    def backward(self, loss: Tensor, usual: Callable[[], Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """A backward pass, which is ``usual`` where Lightning makes the steps; more arguments are of the user's."""
        return usual()

    @contextmanager
    def without_sum(self) -> Iterator[None]:
        """Around micro-batches that reduce nothing."""
        with self.approximately():
            yield

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], update: Callable[[Once], Any]) -> Any:
        """Repeat the step until it is committed; then, and only then, update."""
        replicas = self.replicas
        while True:
            self.gradients.begin()
            replicas.last_part()
            with self.approximately():
                loss = closure()
            if not self.gradients.launched:
                raise RuntimeError("training_step returned None: with ddp_ft, as with DDP, every replica needs a loss")
            self.gradients.finish()
            if replicas.commit():
                update(Once(loss))
                break
            if replicas.again():
                break
            self.share_out()
            self.repeat()
        self.take_buffers(replicas.settle(self.share_buffers, None))
        self.end()
        return loss

    def handover(self) -> dict[str, Any]:
        """For a replica that takes this one's state."""
        # In settling all broadcast the same buffers: not only those that a newcomer has seen to change.
        return {"changing": sorted(self.changing)}

    def take_over(self, state: dict[str, Any]) -> None:
        """Take what a peer's `handover` gave, after all else."""
        self.changing.update(state["changing"])

    # A step that is repeated.

    def repeat(self) -> None:
        """Undo an attempt, and compute it again up to the micro-batch that Lightning itself repeats."""
        if self._logged is not None:
            self._logged.restore()
        self.gradients.orphans = {}
        self._restore_buffers()
        for parameter in self._parameters():
            parameter.grad = None
        for index in self.window[:-1]:
            self._adopt(index)
            self._run(self.shard, index)

    @contextmanager
    def approximately(self) -> Iterator[None]:
        """`around`, once, however deep: the orphans' passes may lie within those of Lightning."""
        if self._within:
            yield
            return
        self._within = True
        try:
            with self.around():
                yield
        finally:
            self._within = False

    def share_buffers(self, group: Any) -> Tensor | None:
        """The buffers that a forward pass changes, of one replica for all, as DDP does it."""
        if not self.changing:
            nothing(group)
            return None
        buffers = dict(self.module.named_buffers())
        # float64 holds the values of smaller types, and counts, exactly.
        flat = torch.cat([buffers[name].detach().double().cpu().flatten() for name in sorted(self.changing)])
        group.broadcast_one(flat, 0).wait()
        return flat

    @torch.no_grad()
    def take_buffers(self, flat: Tensor | None) -> None:
        """Take what `share_buffers` gave."""
        if flat is None:
            return
        buffers = dict(self.module.named_buffers())
        parts = torch.split(flat, [buffers[name].numel() for name in sorted(self.changing)])
        for name, part in zip(sorted(self.changing), parts, strict=True):
            buffers[name].copy_(part.view_as(buffers[name]))

    def reduced(self, value: Tensor, combine: Callable[[Tensor], Tensor]) -> tuple[Tensor, bool]:
        """What this replica gives to a reduction that ``training_step`` asks for.

        Args:
            value: of the micro-batch.
            combine: of values stacked along the first axis, to one that stands for all of them.

        Returns:
            The value of all of this replica's shards, and whether it belongs to a ``training_step`` at all.
        """
        if self.aside:
            self._values.append(value)
            return value, False
        if self._count is None:
            return value, False
        others = [values[self._count] for values in self._orphan_values if len(values) > self._count]
        self._count += 1
        return (combine(torch.stack([value, *others])) if others else value), True

    def recorded(self, operate: Callable[[], Any], alone: Any) -> Any:
        """The result of a collective within a step; a dead replica's batch takes part in none."""
        return alone if self.aside else operate()

    @contextmanager
    def random(self, shard: int, index: int) -> Iterator[None]:
        """Random numbers that belong to a micro-batch."""
        device, group = self.trainer.strategy.root_device, self.gradients.sums.group
        part = shard * group.size + group.rank  # each process of a replica has a part of the shard's batch
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(hash((self.seed, self.trainer.current_epoch, part, index)) % 2**62)
            yield

    def _adopt(self, index: int) -> None:
        """Gradients of the dead replicas' micro-batches, kept apart from the own ones, which Lightning may erase."""
        self._orphan_values = []
        if not self.orphans:
            return
        parameters = self._parameters()
        own = [parameter.grad for parameter in parameters]
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers() if name in self.changing}
        for parameter in parameters:
            parameter.grad = None
        for shard in self.orphans:
            self._values = []
            self._run(shard, index)
            self._orphan_values.append(self._values)
        self.gradients.take(parameters)
        for parameter, gradient in zip(parameters, own, strict=True):
            parameter.grad = gradient
        _copy_into(self.module, buffers)

    def _run(self, shard: int, index: int) -> None:
        """Forward and backward on the module itself: nothing is reduced, nothing is logged."""
        plugin = self.trainer.strategy.precision_plugin
        with self._beside(shard, index) as training_step:
            self.aside = True
            try:
                with self.approximately():
                    output = training_step()
                    loss = output["loss"] if isinstance(output, dict) else output
                    if loss is not None:
                        plugin.backward(loss / self.trainer.accumulate_grad_batches, self.module, None)
            finally:
                self.aside = False

    @contextmanager
    def _beside(self, shard: int, index: int) -> Iterator[Callable[[], Any]]:
        """Around passes on a shard's batch beside Lightning's loop, of which nothing is logged.

        Gives what calls the module's ``training_step`` on it.
        """
        trainer, module = self.trainer, self.module
        strategy, loop = trainer.strategy, trainer.fit_loop.epoch_loop
        batch = trainer.precision_plugin.convert_input(self._load(shard, index))
        batch = strategy.batch_to_device(module._on_before_batch_transfer(batch, dataloader_idx=0))
        arguments = loop._build_kwargs(OrderedDict(), batch, index)

        def training_step() -> Any:
            with self.random(shard, index), strategy.precision_plugin.train_step_context(), torch.enable_grad():
                return module.training_step(*arguments.values())

        name, module._current_fx_name = module._current_fx_name, "training_step"
        results, loop._results = loop._results, type(loop._results)(training=True)
        try:
            yield training_step
        finally:
            loop._results = results
            module._current_fx_name = name

    def _load(self, shard: int, index: int) -> Any:
        return self.loader.batch(shard, index)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def _note_changes(self) -> None:
        assert self._versions is not None
        for name, buffer in self.module.named_buffers():
            if buffer._version != self._versions.get(name):
                self.changing.add(name)

    def _restore_buffers(self) -> None:
        _copy_into(self.module, {name: value for name, value in self._buffers.items() if name in self.changing})


@torch.no_grad()
def _copy_into(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in module.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])


def shares(count: int, members: list[int]) -> dict[int, list[int]]:
    """Which shards of dead replicas each living one takes besides its own, evenly.

    >>> shares(4, [0, 2, 3])
    {0: [], 2: [1], 3: []}
    >>> shares(4, [1])
    {1: [0, 2, 3]}
    """
    share: dict[int, list[int]] = {member: [] for member in members}
    for orphan in range(count):
        if orphan not in share:
            neighbour = min(members, key=lambda member: (len(share[member]), (member - orphan) % count))
            share[neighbour].append(orphan)
    return share


class Once:
    """A closure for the optimizer, of a loss that is there already."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss
        self.called = False

    def __call__(self) -> Any:
        """The loss, once."""
        if self.called:
            raise RuntimeError("ddp_ft evaluates the loss once a step, but the optimizer has asked for it again")
        self.called = True
        return self.loss
