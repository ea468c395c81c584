"""Manual optimization under ddp_ft: a ``training_step`` that makes its own optimizer steps, in parts that can fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from lightning.pytorch.trainer import call
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.optim import Optimizer
from typing_extensions import override

from lightning_eff.strategies.fault_tolerant.manual.events import BACKWARD, END, STEP, Event, Leave, Standing
from lightning_eff.strategies.fault_tolerant.manual.gradients import NewGradients, summed_over_shards
from lightning_eff.strategies.fault_tolerant.manual.orphan_runs import OrphanRuns
from lightning_eff.strategies.fault_tolerant.manual.replay import Replay
from lightning_eff.strategies.fault_tolerant.operations import summed
from lightning_eff.strategies.fault_tolerant.steps import Once, Steps
from lightning_eff.training.run_parts import group_values
from lightning_eff.training.trainer import optimizer_index

Gradients = list[tuple[nn.Parameter, Tensor | None]]


class ManualSteps(Steps):
    """One ``training_step`` in terms of shards, where it calls ``backward`` and ``step`` itself.

    Each backward pass sums the gradients over all shards, as DDP does, and each optimizer step is a part that all
    replicas commit; what is left at the end is a last part. Python cannot be rewound, but it can be run again: when a
    part fails, everything is set back to how ``training_step`` has found it, and it is run once more, see `Replay`.
    What has been committed is not done again. A dead replica's shard is run in the same way, up to the place where this
    replica's own run stands, see `OrphanRuns`.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._fresh = NewGradients()
        self._running: OrphanRuns | None = None  # what there is while training_step runs; has its replay
        self._parts = 0  # that are committed
        self._kind = END  # of the last one
        self._handed: dict[str, Any] | None = None  # of a peer that is ahead
        self._guards: list[Any] = []
        self._applying = False

    @property
    def orphans(self) -> OrphanRuns:
        """Of the training_step that runs."""
        if self._running is None:
            raise RuntimeError("with ddp_ft, backward passes and optimizer steps have to be made in training_step")
        return self._running

    @property
    def replay(self) -> Replay:
        """Of the training_step that runs."""
        return self.orphans.replay

    @override
    def begin(self) -> None:
        """Hooks come between this and training_step: all is done in `run`."""

    @override
    def run(self, training_step: Callable[[], Any]) -> Any:
        """Run this replica's ``training_step`` until all of it is committed."""
        self.replicas.last_part()  # who repeats this step repeats all of it
        if not self._guards:
            self._guards = [each.register_step_pre_hook(self._guard) for each in self.trainer.optimizers]
        self._parts = 0
        self.gradients.forget_orphans()
        self.buffers.begin()
        self._fresh.listen(self.module.parameters())
        replay = Replay(self.trainer, self._fresh)
        self._running = orphans = OrphanRuns(self.passes, self.values, replay, self._fresh)
        device = self.trainer.strategy.root_device
        while True:
            orphans.start_over()
            try:
                with replay.run(), self.values.counted(), self.passes.random(self.step.shard, self.step.index):
                    output = training_step()
                    self._close()
                break
            except Leave:
                pass
            with torch.random.fork_rng([device] if device.type == "cuda" else []):  # a peer's is that of its batch
                self._try_again()
            replay.start.restore()
        self._running = None
        self.replicas.goes_on(False)
        if self.buffers:
            self.share_buffers(self.replicas.agree)
        self.end()
        return output

    def _close(self) -> None:
        """The end of training_step: whatever is left is a part of its own, so that no accumulation is lost."""
        replay = self.replay
        replay.check_not_caught()
        if replay.comes_again:
            replay.repeat(END)
            return
        left = self._has_new()
        if left:
            self._reduce(END)
        # One part there must be: else one replica might be in the next batch while another meets it before this one.
        if left or replay.reduces_more or self._parts == 0:
            self._commit(END, lambda: None)

    def _try_again(self) -> None:
        """After a part that failed: a rendezvous, at which a peer may hand the part over."""
        self.replay.start.set_trained()  # a peer's state is of all that are trained
        self._handed = None
        if self.replicas.again():
            assert self._handed is not None, "a peer that is ahead hands its part over"
            self._adopt(self._handed)
        self.share_out()

    @override
    def close(self) -> None:
        """Leave the module and the optimizers alone."""
        super().close()
        self._fresh.close()
        for guard in self._guards:
            guard.remove()
        self._guards = []

    # What training_step calls.

    @override
    def backward(self, loss: Tensor, usual: Callable[[], Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """A backward pass of the user's, after which the gradients are those of all shards."""
        trainer, module, replay = self.trainer, self.module, self.replay
        new = not replay.comes_again and not self.aside  # callbacks see each of the steps once, and no neighbour's
        if new:
            with self.values.of_no_shard():
                call._call_callback_hooks(trainer, "on_before_backward", loss)
        if self.aside:
            self.orphans.stop_again(BACKWARD)
        call._call_lightning_module_hook(trainer, "on_before_backward", loss)
        trainer.precision_plugin.backward(loss, module, None, *args, **kwargs)
        replay.check_not_caught()
        if replay.unsynced or replay.in_a_peers_part:
            pass
        elif replay.comes_again:
            replay.repeat(BACKWARD)
        elif self.aside:
            self.orphans.stop(BACKWARD)
        else:
            replay.add(Event(BACKWARD, [], self._reduce(BACKWARD), None))
            self.orphans.fall_behind()
        if new:
            with self.values.of_no_shard():
                call._call_callback_hooks(trainer, "on_after_backward")
        call._call_lightning_module_hook(trainer, "on_after_backward")
        return loss.detach()

    @override
    @contextmanager
    def without_sum(self) -> Iterator[None]:
        """Around backward passes that reduce nothing: what they leave is reduced with the next one, or at the end."""
        with self.replay.unsynchronised():
            yield

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], update: Callable[[Once], Any]) -> Any:
        """An optimizer step of the user's: a part that all replicas commit."""
        replay, kind = self.replay, STEP + optimizer_index(self.trainer, optimizer)
        try:
            loss = closure()
            replay.check_not_caught()
            if replay.comes_again:
                replay.repeat(kind)
            elif self.aside:
                self.orphans.stop(kind)
            else:
                reduced = self._reduce(kind) if self._has_new() else []
                self.orphans.see_at(kind)
                self._commit(kind, partial(update, Once(loss)), optimizer, reduced)
        except Leave:
            profiler: Any = self.trainer.profiler  # type: ignore[attr-defined]
            profiler.stop("optimizer_step")  # as Lightning would have
            raise
        return loss

    @override
    def recorded(self, operate: Callable[[], Any], alone: Any) -> Any:
        if self.aside or self._running is None or self.values.count is None:
            return super().recorded(operate, alone)
        return self.replay.recorded(operate, alone)

    @override
    def reduced(self, value: Tensor, combine: Callable[[Tensor], Tensor]) -> tuple[Tensor, bool]:
        """As in automatic optimization; the neighbours' runs have to come as far as this one."""
        if self.values.count is not None and not self.aside and self.replay.reduces_anew:
            self.orphans.catch_up()
        return super().reduced(value, combine)

    def _guard(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._applying:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() was called past Lightning, so that the other replicas do not know "
                "of it: call step() of what `self.optimizers()` gives"
            )

    # A part.

    def _has_new(self) -> bool:
        return any(self._fresh.has(parameter) for parameter in self.module.parameters())

    def _standing(self, kind: int, place: int = 0) -> Standing:
        return Standing(kind, self.trainer.fit_loop.epoch_loop.total_batch_idx, self._parts, place)

    def _reduce(self, kind: int) -> Gradients:
        """Sum the new gradients over all shards; they replace this replica's own."""
        orphans = self.orphans
        orphans.catch_up()
        orphans.see_at(kind)
        sums, parameters = self.gradients.sums, list(self.module.parameters())
        standing = self._standing(kind, self.replay.uncommitted)
        new = [self._fresh.has(parameter) or id(parameter) in orphans.new for parameter in parameters]
        words = standing.words(orphans.complaint, new)
        sums.begin()
        sums.finish([sums.all_reduce(words)])
        if sums.failed:
            self._fail()
        counts = standing.check(words, orphans.complaint)
        chosen = [parameter for parameter, count in zip(parameters, counts, strict=True) if count]
        divisor: Any = self.gradients.divisor
        totals = summed_over_shards(sums, chosen, orphans.gradients, divisor)
        if totals is None:
            self._fail()
        with torch.no_grad():
            for parameter, gradient in zip(chosen, totals, strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient.clone()
                else:
                    parameter.grad.copy_(gradient)
        self._fresh.forget(chosen)
        return list(zip(chosen, totals, strict=True))

    def _fail(self) -> NoReturn:
        committed = self.replicas.commit()
        assert not committed, "nobody commits what has failed"
        self.replay.leave()

    def _commit(
        self,
        kind: int,
        update: Callable[[], Any],
        optimizer: Optimizer | None = None,
        reduced: Gradients | None = None,
    ) -> None:
        if not self.replicas.commit():
            self.replay.leave()
        stepped = [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]
        before = [None if p.grad is None else (p.grad, p.grad._version) for p in stepped]
        self._applying = True
        try:
            with self.values.of_no_shard():
                update()
        finally:
            self._applying = False
        gradients: dict[int, tuple[nn.Parameter, Tensor | None]] = {id(p): (p, g) for p, g in reduced or []}
        for parameter, was in zip(stepped, before, strict=True):
            now = parameter.grad
            # A callback may have clipped it, and the next backward pass adds to that if nobody sets it to zero.
            if now is None or was is None or now is not was[0] or now._version != was[1]:
                gradients[id(parameter)] = (parameter, None if now is None else now.detach().clone())
        self._fresh.forget(parameter for parameter, _ in gradients.values())
        values = [(parameter, parameter.detach().clone()) for parameter in stepped]
        event = Event(kind, values, list(gradients.values()), group_values(self.trainer))
        self._settle(kind)
        self.replay.add_committed(event)

    def _settle(self, kind: int) -> None:
        """All have this part; the next may begin."""
        self._kind = kind
        members, standing = self.replicas.members, self._standing(kind)
        # As many words as in `_reduce`: who is there by mistake is told so, where gloo would end its process.
        words = standing.words(self.orphans.complaint, [False for _ in self.module.parameters()])
        self.gradients.sums.group.sum_(words)
        total = self.replicas.settle(lambda group: summed(group, words.clone(), ReduceOp.SUM), words)
        standing.check(total, self.orphans.complaint)
        self._parts += 1
        self.orphans.start_over()
        self.replicas.goes_on(True)
        if self.replicas.members != members:
            self.share_out()

    # A part that a peer has, and this replica has not.

    @override
    def handover(self) -> dict[str, Any]:
        """For a replica that takes this one's state: before a step, or after a part that it has missed."""
        named = dict(self.module.named_parameters())
        replay = None if self._running is None else self.replay
        own = [] if replay is None else [name for name, p in named.items() if self._fresh.has(p)]  # not yet reduced
        gradients = {name: p.grad.detach() for name, p in named.items() if p.grad is not None and name not in own}
        results = [] if replay is None else replay.results
        state = {"kind": self._kind, "gradients": gradients, "own": own, "results": results}
        # One optimizer may be toggled just now.
        trained = {} if replay is None else {"trainable": replay.start.trained()}
        return {"manual": state, **trained}

    @override
    def take_over(self, state: dict[str, Any]) -> None:
        """Take what a peer's `handover` gave, after all else."""
        self._handed = state["manual"]
        for name, parameter in self.module.named_parameters():
            gradient = self._handed["gradients"].get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)

    def _adopt(self, handed: dict[str, Any]) -> None:
        """A peer's part, in place of the one that failed here."""
        named = dict(self.module.named_parameters())
        values = [(p, p.detach().clone()) for p in named.values()]
        gradients = [(p, p.grad) for name, p in named.items() if name not in handed["own"]]
        self.replay.adopt(
            Event(handed["kind"], values, gradients, group_values(self.trainer), whole=True), handed["results"]
        )
        self._settle(handed["kind"])
