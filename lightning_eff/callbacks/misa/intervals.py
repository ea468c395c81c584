"""MISA within one fit: what is sampled, measured and trained, interval by interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_eff.callbacks.misa.units import ModuleUnits, StepMeans
from lightning_eff.functional.gradients import squared_grad_norms
from lightning_eff.functional.misa import Sampler, perplexity
from lightning_eff.functional.momentum_tail import has_momentum_tail, momentum_tail_
from lightning_eff.structure.select import listed
from lightning_eff.training.dtensor import reshard
from lightning_eff.training.heat_map import HeatMap, Scale
from lightning_eff.training.hooks import ReadsWeights, tell
from lightning_eff.training.namespaces import MisconfigurationException
from lightning_eff.training.optimizer_state import check_release_support, release_state, state_bytes
from lightning_eff.training.trainable import set_trainable, trainable_by_name
from lightning_eff.training.trainer import applied_scale, is_alone

if TYPE_CHECKING:
    from lightning_eff.callbacks.misa.callback import MISA
    from lightning_eff.training.update_count import UpdateCount

MAPS: dict[str, Scale] = {"importance": "log", "probability": "linear"}


class Intervals:
    """What MISA knows and does from ``on_train_start`` to ``teardown``.

    Args:
        settings: the callback, for its arguments.
        trainer: whose fit it is.
        pl_module: with all parameters unfrozen that may be trained at any time.
        updates: the steps that each optimizer has really made.

    Raises:
        MisconfigurationException: patterns, a budget or an optimizer that cannot work.
    """

    def __init__(self, settings: MISA, trainer: Trainer, pl_module: LightningModule, updates: UpdateCount) -> None:
        self.settings, self.trainer, self.updates = settings, trainer, updates
        self.units = units = ModuleUnits(
            pl_module, trainer.optimizers, settings.granularity, settings.include, settings.exclude, settings.always
        )
        self._take_optimizer(trainer.optimizers[units.optimizer])
        self._new()

    def _take_optimizer(self, optimizer: Optimizer) -> None:
        check_release_support([optimizer])
        if self.settings.momentum_step and not has_momentum_tail(optimizer):
            raise MisconfigurationException(
                f"MISA's momentum step is known for Adam, AdamW and SGD, and not for {type(optimizer).__name__}: "
                "set momentum_step=False"
            )
        self.optimizer = optimizer

    def _new(self) -> None:
        """As before the first sample."""
        config, largest = self.settings.config, max(self.units.sizes) / self.units.total
        if not self.settings.fixed_budget and config.budget < largest:
            config = replace(config, budget=min(1.0, largest * (1 + 1e-9)))  # whatever the division has rounded
        try:
            self.sampler = Sampler(self.units.sizes, config, self.units.total)
        except ValueError as error:
            raise MisconfigurationException(f"MISA: {error}") from error
        self.active: list[int] = []
        """The numbers of the units in training; empty before the first sample."""
        self.due = 0
        """The update that ends the interval."""
        self.measured = StepMeans(0)  # of each active unit, over the interval
        self.maps = {name: HeatMap(self.units.names) for name in MAPS if self.settings.heat_map}
        self._advised = self._told_unused = False

    def begin(self) -> None:
        """A new run begins."""
        self._new()
        self.updates.load_state_dict({"updates": [0] * len(self.trainer.optimizers)})
        self._next()
        units, sampler = self.units, self.sampler
        if never := [name for name, size in zip(units.names, units.sizes, strict=True) if not sampler.fits(size)]:
            rank_zero_warn(
                f"MISA(budget={sampler.config.budget}) has no room for {len(never)} of {len(units.names)}, which "
                f"are never trained: {listed(never, limit=10)}. Raise it, or exclude them"
            )
        of = "" if units.names == units.matrices else f"{len(units.names)} units of "
        budget = "" if sampler.config.units else f" within {sampler.config.budget:.3g} of all parameters"
        rank_zero_info(
            f"MISA samples from {of}{units.selection}. {len(self.active)} at first{budget}; {len(units.always)} "
            f"tensors are always trained and {len(units.never)} never"
        )

    # --- a step -----------------------------------------------------------------------------------------------------

    def observe(self, optimizer: Optimizer) -> None:
        """Take the gradients of the active units, if it is their optimizer that steps."""
        if optimizer is not self.optimizer and not self._follows(optimizer):
            return
        squares = squared_grad_norms(self.units.tensors(self.active))
        if squares is None:  # training_step returned None
            return
        scale = applied_scale(self.trainer, optimizer)
        if scale is not None:
            squares = squares / scale.to(squares).square()
        self.measured.add(squares.sqrt() if self.settings.config.variant == "official" else squares)

    def _follows(self, optimizer: Optimizer) -> bool:
        """Whether it is the units' optimizer, made anew in the midst of the fit: from now on it is the one."""
        optimizers = self.trainer.optimizers
        if any(each is self.optimizer for each in optimizers):
            return False
        if self.units.optimizer >= len(optimizers) or optimizers[self.units.optimizer] is not optimizer:
            return False
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        every = [parameter for members in self.units.tensors(range(len(self.units.names))) for parameter in members]
        if not stepped.issuperset(map(id, every)):
            raise MisconfigurationException(
                "MISA: the optimizers were made anew within the fit, and do not have all matrices that are sampled: "
                "give them all parameters, also those that are not trained at the moment"
            )
        self._take_optimizer(optimizer)
        self.updates.attach(optimizers)
        return True

    def pass_over(self, loss: Tensor) -> None:
        """The loss comes from none of what is trained now: matrices that the model has and does not use.

        The step changes nothing, and on one device others have their turn at its end.
        """
        loss.requires_grad_()  # else its backward pass is an error
        if is_alone(self.trainer.strategy):
            self.due = 0
        if not self._told_unused:
            self._told_unused = True
            names = listed([self.units.names[index] for index in self.active], limit=5)
            rank_zero_warn(
                f"MISA: the loss does not depend on what was sampled: {names}. Such steps change nothing; leave what "
                "the model does not use out with exclude=[...], or train something at all times with always=[...]"
            )

    def end_step(self) -> None:
        """End the interval, if it is due."""
        # The exact count waits for a fused optimizer that has skipped steps, so it is asked for only where it matters.
        if self.updates.at_most(self.units.optimizer) >= self.due and self._count() >= self.due:
            self.end_interval()

    def _count(self) -> int:
        return self.updates.exact(self.units.optimizer)

    def scalars(self) -> dict[str, float | Tensor]:
        """What is logged."""
        units, sampler, p = self.units, self.sampler, self.sampler.probabilities
        trained = sum(each.numel() for each in units.parameters.values() if each.requires_grad)
        values: dict[str, float | Tensor] = {
            "active": len(self.active),
            "trainable": trained / units.total,
            "used": sum(last >= 0 for last in sampler.last) / len(units.names),
            "effective": perplexity(p),
            "optimizer_bytes": state_bytes(self.trainer.optimizers),
        }
        device = self.trainer.strategy.root_device
        if device.type == "cuda":
            values["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        if self.settings.log_details:
            turned = (sampler.turns > 0).tolist()  # on the host
            for name, value, probability, known in zip(units.names, sampler.importance, p, turned, strict=True):
                values |= {f"probability/{name}": probability}
                if known:  # no curve of what there is not yet
                    values[f"importance/{name}"] = value
        return values

    # --- the end of an interval -------------------------------------------------------------------------------------

    def end_interval(self) -> None:
        """Take what was measured into the importance, and train other units."""
        reshard(self.trainer.lightning_module)
        if self.settings.momentum_step and (self.settings.first_momentum_step or not self.sampler.waiting):
            tell(self.trainer, ReadsWeights)
            momentum_tail_(self.optimizer, [p for members in self.units.tensors(self.active) for p in members])
        # Equal on all ranks as far as the reduction of gradients is; what follows from it has to be equal.
        means: list[float] = self.trainer.strategy.broadcast(self.measured.means())
        measured = torch.tensor(means, dtype=torch.float64)
        sampler = self.sampler
        if self.settings.config.variant == "paper":
            measured /= torch.tensor([sampler.sizes[index] for index in self.active])
        sampler.measure(self.active, measured)
        self._next()
        if not self._advised and -1 not in sampler.last:
            self._advised = True  # once, when all have had their turn
            if (advice := sampler.eta_advice()) is not None:
                rank_zero_warn(f"MISA({advice}")
        if self.maps:
            turned = sampler.turns > 0
            self.maps["importance"].add(self._count(), torch.where(turned, sampler.importance, torch.nan))
            self.maps["probability"].add(self._count(), sampler.probabilities)

    def _next(self) -> None:
        """Sample the units of the next interval."""
        settings, sampler, before = self.settings, self.sampler, self.active
        self.active = sampler.select()
        self.due = self._count() + (settings.first_every_n_steps if sampler.waiting else settings.every_n_steps)
        self.measured = StepMeans(len(self.active))
        if settings.config.variant == "paper":  # else the state of what is sampled again is kept
            for members in self.units.tensors(before):
                release_state(self.trainer.optimizers, members)
        self.apply()

    def apply(self) -> None:
        """Train what is active, and nothing else of that optimizer."""
        wanted = {self.units.parameters[name]: trained for name, trained in self.units.trainable(self.active).items()}
        set_trainable(self.trainer, trainable_by_name(self.trainer.lightning_module, wanted))
        release_state(self.trainer.optimizers, [parameter for parameter, trained in wanted.items() if not trained])

    def end(self) -> None:
        """Say why importance has decided nothing, else a user takes it for a gain; publish the pictures of the run."""
        if (why := self.sampler.why_none()) is not None:
            rank_zero_info(f"MISA: importance has decided nothing in this run: {why}")
        for name, heat_map in self.maps.items():
            title = f"MISA: {name} of each {self.settings.granularity}"
            heat_map.publish(self.trainer, f"misa/{name}_map", title, scale=MAPS[name], missing="no turn yet")

    def leave(self) -> None:
        """Unfreeze what was unfrozen before the fit."""
        for name in self.units.trainable([]):
            self.units.parameters[name].requires_grad_(True)

    # --- its state --------------------------------------------------------------------------------------------------

    def state_dict(self, *, by_reference: bool = False) -> dict[str, Any]:
        """All but the number of updates; equal on all ranks. ``by_reference``: tensors where they are."""
        return {
            "names": self.units.names,
            "sampler": self.sampler.state_dict(),
            "active": list(self.active),
            "due": self.due,
            "measured": self.measured.state_dict(by_reference=by_reference),
            "maps": {name: heat_map.state_dict(by_reference=by_reference) for name, heat_map in self.maps.items()},
        }

    def take(self, state: Mapping[str, Any]) -> bool:
        """Go on from a saved state; ``apply`` then trains what it says. False, and nothing is done, for other units."""
        if state["names"] != self.units.names:
            return False
        self._new()
        self.sampler.load_state_dict(state["sampler"])
        self.active, self.due = list(state["active"]), state["due"]
        self.measured = StepMeans(len(self.active))
        self.measured.load_state_dict(state["measured"])
        for name in self.maps.keys() & state["maps"].keys():
            self.maps[name].load_state_dict(state["maps"][name])
        return True

    def go_on(self) -> None:
        """Train on from a state that was taken."""
        self.apply()
        if self._count() >= self.due:  # it was saved between the interval's last step and its end
            self.end_interval()
