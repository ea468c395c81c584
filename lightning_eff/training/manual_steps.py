"""Manual optimization under ddp_ft: a ``training_step`` that makes its own optimizer steps, in parts that can fail."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer import call
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.optim import Optimizer

from lightning_eff.training.logged_values import LoggedValues
from lightning_eff.training.part_gradients import NewGradients, summed_over_shards
from lightning_eff.training.replica_operations import summed
from lightning_eff.training.shard_gradients import ShardGradients
from lightning_eff.training.shard_steps import Once, ShardSteps
from lightning_eff.training.shards import ShardedLoader
from lightning_eff.training.step_snapshot import StepSnapshot, groups, set_groups, with_buffers_of_its_own

if TYPE_CHECKING:
    from lightning_eff.training.replicas import Replicas

BACKWARD, END, STEP = 0, 1, 2  # the step of optimizer i is STEP + i


class Leave(BaseException):
    """Ends a run of ``training_step`` before its end. No `Exception`: the user's code is not to catch it."""


class OtherPathError(RuntimeError):
    """Two runs of ``training_step`` that should have done the same did not."""


@dataclass
class Event:
    """What the replicas have done together in a ``training_step``, for a run of it that comes by again."""

    kind: int
    parameters: list[tuple[nn.Parameter, Tensor]]
    """Their values after it."""
    gradients: list[tuple[nn.Parameter, Tensor | None]]
    groups: list[list[dict[str, Any]]] | None
    whole: bool = False
    """Whether it stands for a part that a peer has handed over, with all backward passes in it."""


class ManualSteps(ShardSteps):
    """One ``training_step`` in terms of shards, where it calls ``backward`` and ``step`` itself.

    Each backward pass sums the gradients over all shards, as DDP does, and each optimizer step is a part that all
    replicas commit; what is left at the end is a last part. Python cannot be rewound, but it can be run again: when a
    part fails, everything is set back to how ``training_step`` has found it, and it is run once more. What has been
    committed is not done again: at those places parameters, gradients and what was reduced are set to what came of
    them. A dead replica's shard is run in the same way, up to the place where this replica's own run stands.

    Args:
        trainer: which is fitting.
        loader: the training data.
        gradients: who divides by what.
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
        replicas: Replicas,
        share_out: Callable[[], None],
    ) -> None:
        super().__init__(trainer, loader, gradients, shard)
        self.replicas, self.share_out = replicas, share_out
        self.unsynced = False
        """Whether backward passes reduce nothing for now."""
        self._fresh = NewGradients()
        self._start: StepSnapshot | None = None
        self._guards: list[Any] = []
        self._moving: set[int] | None = None  # ids of parameters without an optimizer that training_step changes
        self._events: list[Event] = []
        self._results: list[Any] = []  # of collectives in training_step, by the order of the calls
        self._parts = self._safe_events = self._safe_results = 0  # that are committed
        self._at = self._result_at = 0  # where the present run is
        self._logged_at = 0  # as many events had been when `_logged` was taken
        self._real_results: Any = None
        self._open_part = False  # a collective, since the last commit
        self._caught_up = False
        self._orphan_gradients: dict[int, Tensor] = {}
        self._orphans_new: set[int] = set()
        self._orphan_kinds: list[int] = []
        self._complaint: str | None = None
        self._leaving = False
        self._applying = False
        self._kind = END
        self._handed: dict[str, Any] | None = None

    # ------------------------------------------------------------------------------------------------------------------
    # Lightning's call of training_step.

    def begin(self) -> None:
        """All is done in `run`: hooks come between."""

    def run(self, training_step: Callable[[], Any]) -> Any:
        """Run this replica's ``training_step`` until all of it is committed."""
        self._prepare()
        while True:
            self._begin_run()
            try:
                with self.random(self.shard, self.window[-1]):
                    output = training_step()
                    self._close()
                break
            except Leave:
                pass
            finally:
                self._count = None
                self.trainer.fit_loop.epoch_loop._results = self._real_results
            with torch.random.fork_rng(self._devices):  # a peer's state may be of the midst of a micro-batch
                self._meet_again()
            assert self._start is not None
            self._start.restore()
        self._note_changes()
        self._finish()
        return output

    @property
    def _devices(self) -> list[torch.device]:
        device = self.trainer.strategy.root_device
        return [device] if device.type == "cuda" else []

    def _prepare(self) -> None:
        module, trainer = self.module, self.trainer
        self.replicas.last_part()  # who repeats this step repeats all of it
        self._fresh.listen(module.parameters())
        if not self._guards:
            self._guards = [each.register_step_pre_hook(self._guard) for each in trainer.optimizers]
        super().begin()
        self._start = StepSnapshot(trainer, self._tensors(), again=True)
        self._before = {id(parameter): parameter._version for parameter in module.parameters()}
        self._real_results = trainer.fit_loop.epoch_loop._results
        self._logged = LoggedValues(self._real_results, module)
        self._events, self._results = [], []
        self._parts = self._safe_events = self._safe_results = self._logged_at = 0
        self._open_part = self._caught_up = False
        self._orphan_values, self._complaint, self._handed, self._kind = [], None, None, END

    def _tensors(self) -> list[Tensor]:
        """Whose contents a run may change."""
        stepped = {id(p) for optimizer in self.trainer.optimizers for g in optimizer.param_groups for p in g["params"]}
        buffers = [buffer for name, buffer in self.module.named_buffers() if name in self._buffers]
        return buffers + [
            p for p in self.module.parameters() if self._moving is None or id(p) in stepped or id(p) in self._moving
        ]

    def _begin_run(self) -> None:
        """Go through what has been committed, or begin."""
        del self._events[self._safe_events :], self._results[self._safe_results :]
        self._at = self._result_at = self._count = 0
        self._leaving = self._open_part = self._caught_up = False
        self._fresh.forget(self.module.parameters())
        loop = self.trainer.fit_loop.epoch_loop
        if self._logged_at > 0:  # it is logged already
            loop._results = type(self._real_results)(training=True)
        else:
            self._log_from_here()

    def _log_from_here(self) -> None:
        assert self._logged is not None
        self.trainer.fit_loop.epoch_loop._results = self._real_results
        self._logged.restore()

    def _meet_again(self) -> None:
        """After a part that failed."""
        assert self._start is not None
        self._start.open()
        self._handed = None
        if self.replicas.again():
            assert self._handed is not None, "a peer that is ahead hands its part over"
            self._take()
        self.share_out()

    def _close(self) -> None:
        """The end of training_step: whatever is left is a part of its own, so that no accumulation is lost."""
        self._check_not_caught()
        if self._at < len(self._events):
            self._repeat(END)
            return
        left = self._has_new()
        if left:
            self._reduce(END)
        if left or self._open_part or self._parts == 0:
            self._commit(END, lambda: None)

    def _finish(self) -> None:
        """The step is over, and the same on all replicas."""
        moved = {id(p) for p in self.module.parameters() if p._version != self._before[id(p)]}
        if self._moving is None:  # a change through `.data` has no version, so the first time values are compared
            assert self._start is not None
            moved |= {id(p) for p, was in self._start.contents if not torch.equal(p.detach(), was)}
            self._moving = set()
        self._moving |= moved
        self._start, self._events, self._results, self._orphan_gradients = None, [], [], {}
        self.replicas.in_attempt = False
        if self.changing:
            self.take_buffers(self.replicas.agree(self.share_buffers, None))
        self.end()

    def close(self) -> None:
        """Leave the module and the optimizers alone."""
        self._fresh.close()
        for guard in self._guards:
            guard.remove()
        self._guards = []

    # ------------------------------------------------------------------------------------------------------------------
    # What training_step calls.

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward pass of the user's, after which the gradients are those of all shards."""
        trainer, module = self.trainer, self.module
        seen = self._at < len(self._events) or self.aside  # callbacks see each of the steps once, and no neighbour's
        if not seen:
            with self._of_no_shard():
                call._call_callback_hooks(trainer, "on_before_backward", loss)
        call._call_lightning_module_hook(trainer, "on_before_backward", loss)
        trainer.precision_plugin.backward(loss, module, None, *args, **kwargs)
        self._after_backward()
        if not seen:
            with self._of_no_shard():
                call._call_callback_hooks(trainer, "on_after_backward")
        call._call_lightning_module_hook(trainer, "on_after_backward")

    def _after_backward(self) -> None:
        self._check_not_caught()
        if self._at < len(self._events):
            if not self._events[self._at].whole and not self.unsynced:
                self._repeat(BACKWARD)
        elif not self.unsynced:
            if self.aside:
                self._stop(BACKWARD)
            self._events.append(Event(BACKWARD, [], self._reduce(BACKWARD), None))
            self._advance()
            self._caught_up = False

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], apply: Callable[[Once], Any]) -> Any:
        """An optimizer step of the user's: a part that all replicas commit."""
        kind = STEP + next(i for i, each in enumerate(self.trainer.optimizers) if each is optimizer)
        try:
            loss = closure()
            self._check_not_caught()
            if self._at < len(self._events):
                self._repeat(kind)
            elif self.aside:
                self._stop(kind)
            else:
                reduced = self._reduce(kind) if self._has_new() else []
                self._commit(kind, lambda: apply(Once(loss)), optimizer, reduced)
        except Leave:
            if not self.aside:
                profiler: Any = self.trainer.profiler  # type: ignore[attr-defined]
                profiler.stop("optimizer_step")  # as Lightning would have
            raise
        return loss

    @contextmanager
    def without_sum(self) -> Iterator[None]:
        """Around backward passes that reduce nothing."""
        before, self.unsynced = self.unsynced, True
        try:
            yield
        finally:
            self.unsynced = before

    def recorded(self, operate: Callable[[], Any], alone: Any) -> Any:
        """A collective in training_step; a run that comes by again gets the same result."""
        if self.aside or self._leaving:
            return alone
        if self._count is None:
            return operate()
        index, self._result_at = self._result_at, self._result_at + 1
        if index == len(self._results):
            self._open_part = True
            self._results.append(operate())
        result = self._results[index]
        return result.clone() if isinstance(result, Tensor) else result

    def reduced(self, value: Tensor, combine: Callable[[Tensor], Tensor]) -> tuple[Tensor, bool]:
        """As in automatic optimization, for which the neighbours' runs must have come as far as this one."""
        if self._count is not None and not self.aside and self._result_at == len(self._results):
            self._catch_up()
        return super().reduced(value, combine)

    def _guard(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._applying:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() was called past Lightning, so that the other replicas do not know "
                "of it: call step() of what `self.optimizers()` gives"
            )

    def _check_not_caught(self) -> None:
        if self._leaving:
            raise RuntimeError(
                "training_step has caught BaseException, by which ddp_ft leaves it when a replica has died: catch "
                "Exception instead"
            )

    # ------------------------------------------------------------------------------------------------------------------
    # A part.

    def _has_new(self) -> bool:
        return any(self._fresh.has(parameter) for parameter in self.module.parameters())

    def _reduce(self, kind: int) -> list[tuple[nn.Parameter, Tensor | None]]:
        """Sum the new gradients over all shards; they replace this replica's own."""
        self._catch_up()
        if any(each != kind for each in self._orphan_kinds):
            self._complaint = f"the shards of this replica come to {[_name(each) for each in self._orphan_kinds]}"
        manager, parameters = self.replicas.manager, list(self.module.parameters())
        new = [self._fresh.has(parameter) or id(parameter) in self._orphans_new for parameter in parameters]
        flags = self._words(kind, len(self._events) - self._safe_events, new)
        manager.finish([manager.all_reduce(flags)])
        if manager.errored() is not None:
            self._fail()
        self._check_words(flags, kind, len(self._events) - self._safe_events)
        chosen = [parameter for parameter, used in zip(parameters, flags[4:].tolist(), strict=True) if used]
        divisor: Any = self.gradients.divisor
        sums = summed_over_shards(manager, chosen, self._orphan_gradients, divisor)
        if sums is None:
            self._fail()
        with torch.no_grad():
            for parameter, gradient in zip(chosen, sums, strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient.clone()
                else:
                    parameter.grad.copy_(gradient)
        self._fresh.forget(chosen)
        return list(zip(chosen, sums, strict=True))

    def _commit(
        self,
        kind: int,
        apply: Callable[[], Any],
        optimizer: Optimizer | None = None,
        reduced: list[tuple[nn.Parameter, Tensor | None]] | None = None,
    ) -> None:
        if not self.replicas.commit():
            self._leave()
        stepped = [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]
        versions = [(p, p.grad, None if p.grad is None else p.grad._version) for p in stepped]
        self._applying = True
        try:
            with self._of_no_shard():
                apply()
        finally:
            self._applying = False
        # A hook may have clipped them: that is what the next backward pass adds to, if nobody sets them to zero.
        touched = {
            id(p): (p, _copy(p.grad)) for p, g, v in versions if p.grad is not g or (g is not None and g._version != v)
        }
        gradients = {**{id(p): (p, g) for p, g in reduced or []}, **touched}
        event = Event(kind, [(p, p.detach().clone()) for p in stepped], list(gradients.values()), groups(self.trainer))
        self._fresh.forget(p for p, _ in gradients.values())
        self._events.append(event)
        self._settle(kind)
        self._advance()
        self._logged, self._logged_at = LoggedValues(self._real_results, self.module), self._at

    def _settle(self, kind: int) -> None:
        """All have this part; the next may begin."""
        self._kind = kind
        members = self.replicas.members
        words = self.replicas.settle(
            lambda group: summed(group, self._words(kind, 0, [False] * self._width), ReduceOp.SUM),
            self._words(kind, 0, [False] * self._width),
        )
        self._check_words(words, kind, 0)
        self._parts += 1
        self._safe_events, self._safe_results = len(self._events), len(self._results)
        self._open_part = self._caught_up = False
        self.replicas.in_attempt = True
        if self.replicas.members != members:
            self.share_out()

    @property
    def _width(self) -> int:
        return sum(1 for _ in self.module.parameters())

    def _words(self, kind: int, place: int, new: list[bool]) -> Tensor:
        """What a replica says of where it stands, so that the sum tells whether all stand there."""
        batch = self.trainer.fit_loop.epoch_loop.total_batch_idx
        number = ((batch % 1024 * 64 + self._parts % 64) * 16 + place % 16) * 64 + kind % 64
        return torch.tensor([1, number, number**2, self._complaint is not None, *new])

    def _check_words(self, words: Tensor, kind: int, place: int) -> None:
        number = int(self._words(kind, place, [])[1])
        count, total, squares, complaints = words[:4].tolist()
        if complaints or count * number != total or count * number**2 != squares:  # equal if they have no variance
            raise OtherPathError(
                "the optimizer steps and backward passes of training_step differ between shards, so that their "
                f"gradients do not belong together: this replica's is at {_name(kind)}, in part {self._parts}"
                + (f", and {self._complaint}" if self._complaint else "")
                + ". Which optimizer steps, and when, must not depend on the batch"
            )

    def _fail(self) -> NoReturn:
        committed = self.replicas.commit()
        assert not committed, "nobody commits what has failed"
        self._leave()

    def _leave(self) -> NoReturn:
        self._leaving = True
        raise Leave

    @contextmanager
    def _of_no_shard(self) -> Iterator[None]:
        """What callbacks reduce is of the replicas, and not repeated with training_step."""
        count, self._count = self._count, None
        try:
            yield
        finally:
            self._count = count

    # ------------------------------------------------------------------------------------------------------------------
    # Coming by again.

    def _repeat(self, kind: int) -> None:
        """At a place where all have been: take what came of it."""
        event = self._events[self._at]
        if event.kind != kind:
            raise OtherPathError(
                f"training_step was run again, as ddp_ft does after a failure, and went another way: it came to "
                f"{_name(kind)}, and before that to {_name(event.kind)}. With the same batch and random numbers it has "
                "to do the same: what it remembers outside of the module's attributes may be the reason"
            )
        for parameter, value in event.parameters:
            parameter.data.copy_(value)
        for parameter, gradient in event.gradients:
            parameter.grad = _copy(gradient)
        if event.groups is not None:
            set_groups(self.trainer, event.groups)
        self._fresh.forget(parameter for parameter, _ in event.gradients)
        self._advance()

    def _advance(self) -> None:
        self._at += 1
        if self.aside:
            return
        if self._at == self._logged_at and self.trainer.fit_loop.epoch_loop._results is not self._real_results:
            self._log_from_here()
        elif self._logged_at < self._at <= self._safe_events:  # a peer's part, which is logged as it comes by
            self._logged, self._logged_at = LoggedValues(self._real_results, self.module), self._at

    def handover(self) -> dict[str, Any]:
        """For a replica that takes this one's state: before a step, or after a part that it has missed."""
        named = dict(self.module.named_parameters())
        state = {
            "gradients": {name: p.grad.detach() for name, p in named.items() if p.grad is not None},
            "kind": self._kind,
            "results": self._results,
        }
        # One optimizer may be toggled just now.
        return {"manual": state} if self._start is None else {"manual": state, "trainable": self._start.trained()}

    def take_over(self, state: dict[str, Any]) -> None:
        """Take what a peer's `handover` gave, after its parameters."""
        self._handed = state["manual"]
        for name, parameter in self.module.named_parameters():
            gradient = self._handed["gradients"].get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)

    def _take(self) -> None:
        """A peer's part, in place of the one that failed here."""
        assert self._handed is not None and self._start is not None  # noqa: PT018
        kind: int = self._handed["kind"]
        kept = {id(tensor) for tensor, _ in self._start.contents}
        parameters = list(self.module.parameters())
        values = [(p, p.detach().clone()) for p in parameters if id(p) in kept]
        del self._events[self._safe_events :]
        self._events.append(Event(kind, values, [(p, _copy(p.grad)) for p in parameters], groups(self.trainer), True))
        self._results = list(self._handed["results"])
        self._before = {id(parameter): parameter._version for parameter in parameters}
        self._settle(kind)

    # ------------------------------------------------------------------------------------------------------------------
    # Dead replicas' shards.

    def _catch_up(self) -> None:
        """Run training_step on the orphans' batches, up to the place where this replica's own run stands."""
        if self._caught_up:
            return
        self._orphan_values, self._orphan_kinds, self._orphan_gradients, self._orphans_new = [], [], {}, set()
        self._caught_up = True
        if not self.orphans:
            return
        trainer, loop = self.trainer, self.trainer.fit_loop.epoch_loop
        assert self._start is not None
        own = StepSnapshot(trainer, [tensor for tensor, _ in self._start.contents], again=False)
        logged = LoggedValues(self._real_results, self.module)
        fresh, at, unsynced = self._fresh.held(), self._at, self.unsynced
        wrapped = [(each, each._on_before_step, each._on_after_step) for each in trainer.strategy._lightning_optimizers]
        counter = loop.manual_optimization.optim_step_progress
        self.aside = True
        try:
            for each, _, _ in wrapped:  # without the profiler, which may be in this replica's own step
                each._on_before_step, each._on_after_step = counter.increment_ready, counter.increment_completed
            for shard in self.orphans:
                self._start.restore()
                with_buffers_of_its_own(self.module)
                self._values, self._at, self.unsynced = [], 0, False
                self._fresh.forget(self.module.parameters())
                self._orphan_kinds.append(self._run_aside(shard, self.window[-1]))
                self._orphan_values.append(self._values)
                for parameter in self.module.parameters():
                    if self._fresh.has(parameter):
                        self._orphans_new.add(id(parameter))
                    if parameter.grad is not None:
                        other = self._orphan_gradients.get(id(parameter))
                        mine = parameter.grad.detach()
                        self._orphan_gradients[id(parameter)] = mine if other is None else other.add_(mine)
        except OtherPathError as error:
            self._complaint = str(error)  # the others have to know
        finally:
            self.aside = False
            own.restore()
            logged.restore()
            self._fresh.take(fresh)
            self._at, self.unsynced = at, unsynced
            for each, before, after in wrapped:
                each._on_before_step, each._on_after_step = before, after

    def _run_aside(self, shard: int, index: int) -> int:
        """Run another shard until it has to wait for this one. What it has come to is returned."""
        trainer, module = self.trainer, self.module
        strategy, loop = trainer.strategy, trainer.fit_loop.epoch_loop
        batch = trainer.precision_plugin.convert_input(self.loader.batch(shard, index))
        batch = strategy.batch_to_device(module._on_before_batch_transfer(batch, dataloader_idx=0))
        arguments = loop._build_kwargs(OrderedDict(), batch, index)
        name, module._current_fx_name = module._current_fx_name, "training_step"
        results, loop._results = loop._results, type(self._real_results)(training=True)
        self._stopped_at = END
        try:
            with self.random(shard, index), strategy.precision_plugin.train_step_context(), torch.enable_grad():
                module.training_step(*arguments.values())
        except Leave:
            pass
        finally:
            loop._results = results
            module._current_fx_name = name
        return self._stopped_at

    def _stop(self, kind: int) -> NoReturn:
        self._stopped_at = kind
        raise Leave


def _name(kind: int) -> str:
    if kind in (BACKWARD, END):
        return "a backward pass" if kind == BACKWARD else "its end"
    return f"a step of optimizer {kind - STEP}"


def _copy(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.detach().clone()
