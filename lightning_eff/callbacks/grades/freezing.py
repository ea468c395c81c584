"""GradES within one fit: from a step's gradients to what is frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_eff.callbacks.grades.forecast import at_half_time, frozen_at, saving
from lightning_eff.callbacks.grades.progress import fraction_done, may_stop, passed_slots
from lightning_eff.callbacks.grades.units import FreezableUnits
from lightning_eff.callbacks.grades.watch import UnitWatch, mean_loss
from lightning_eff.structure import backward_flops, coverage, describe_selection
from lightning_eff.structure.matrices import LEAST_SHARE
from lightning_eff.training.host_copy import HostCopy
from lightning_eff.training.optimizer_state import release_state
from lightning_eff.training.trainable import set_trainable, trainable_by_name
from lightning_eff.training.trainer import applied_scale, optimizer_index, tensorboards

if TYPE_CHECKING:
    from lightning_eff.callbacks.grades.callback import GradES

NEW: dict[str, Any] = {
    "step": 0, "attempts": [], "slots": 0, "decided": False, "noted": None, "foretold": False, "watch": None
}  # fmt: skip
"""The state of a run that has not begun."""


class Freezing:
    """What GradES knows and does from ``on_train_start`` to ``teardown``.

    Args:
        settings: the callback, for its arguments.
        trainer: whose fit it is.
        pl_module: with all parameters unfrozen that the run trains.
        state: to go on from, as from ``state_dict``; ``NEW`` for none.
        copies: what the metric compares with, likewise.
    """

    def __init__(
        self,
        settings: GradES,
        trainer: Trainer,
        pl_module: LightningModule,
        state: Mapping[str, Any],
        copies: Mapping[str, Tensor],
    ) -> None:
        self.settings, self.trainer = settings, trainer
        self.units = FreezableUnits(pl_module, trainer.optimizers, settings.include, settings.exclude, settings.prefix)
        device = trainer.strategy.root_device
        self.watch = UnitWatch(
            self.units, settings.config, settings.metric, settings.unfreeze, settings.heat_map, device
        )
        self.limit = max(1, int(settings.max_frozen_ratio * len(self.units.names) + 1e-9))
        """How many units may be frozen."""
        share, _ = coverage(pl_module, self.units.matrices)
        self.may_end = settings.stop_when_frozen and (settings.include is not None or share >= LEAST_SHARE)
        """Whether the run ends when all that may be is frozen: not where what was found is a small part."""
        rank_zero_info(f"GradES watches {describe_selection(pl_module, self.units.matrices)}")
        self.flops = (backward_flops(pl_module),) * 2
        """Of a backward pass, before and now."""
        self.step = self.slots = 0  # steps, and of max_events those that are behind
        self.attempts: list[int] = []  # steps of each optimizer
        self.stepped = self.checked = self.armed = False  # in this batch
        self.decision: HostCopy | None = None  # of a check before this step
        self.half = max(settings.alpha, 0.5)
        self.noted: float | None = None  # the part of the run at which the metric was noted for the forecast
        self.foretold = False
        self._heard_loss = False
        self._outlook: HostCopy | None = None  # what the forecast is made from, of a check before this step
        self._frozen: dict[str, nn.Parameter] = {}  # parameters by name
        self.load_state_dict(state, copies)

    # --- a step -----------------------------------------------------------------------------------------------------

    def observe(self, optimizer: Optimizer) -> None:
        """Count an attempt of one optimizer's step and, where it is due, measure its units."""
        index = optimizer_index(self.trainer, optimizer)
        self.stepped = True
        self.attempts[index] += 1
        if self.attempts[index] % self.settings.every_n_steps:
            return
        step, alpha = self.trainer.global_step, self.settings.alpha
        done = fraction_done(self.trainer, step + 1)
        self.armed = alpha == 0 or (done is not None and done > alpha)
        scale = applied_scale(self.trainer, optimizer)
        self.checked |= self.watch.check(optimizer, index, scale, armed=self.armed, done=done, step=step)
        if done is not None and self.noted is None and done >= self.half / 2:
            self.noted = done
            self.watch.note()

    def end_step(self, outputs: Any) -> bool:
        """Act on the decision of a step before, and queue this step's; False in the middle of an accumulation."""
        if not self.stepped:
            return False
        self.stepped, checked = False, self.checked
        self.checked = False
        self.step = self.trainer.global_step
        if checked and self.settings.unfreeze == "loss":
            loss = mean_loss(self.trainer, outputs, known=self._heard_loss)
            if loss is not None:
                self._heard_loss = True
                self.watch.hear_loss(loss)
        decision, self.decision = self.decision, None
        outlook, self._outlook = self._outlook, None
        if decision is not None:
            self._act(decision)
        if outlook is not None:
            self._foretell(outlook)
        if checked and self.armed:
            # Read when the next step has been made: the device has long come so far by then.
            self.decision = self.watch.decide()
        if checked and not self.foretold and (self.fraction or 0.0) >= self.half:
            self._outlook = self.watch.outlook()
        return True

    def scalars(self) -> dict[str, float | Tensor]:
        """What is logged."""
        before, now = self.flops
        saved = {"backward_flops_saved": 1 - now / before if before else 0.0}
        return self.watch.scalars(self.settings.log_details) | saved

    # --- an event ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Freeze what a loaded state says."""
        if self.watch.frozen:
            self.take_up()

    def take_up(self) -> None:
        """Freeze what a state says that was taken, and unfreeze what it does not."""
        if self.may_end and len(self.watch.frozen) >= self.limit:
            self._stop("are frozen already")
        else:
            self.freeze()

    def note_frozen(self) -> None:
        """What a state says that was taken is frozen already."""
        names = self.units.frozen_parameters(self.watch.frozen)
        self._frozen = {name: self.units.parameters[name] for name in sorted(names)}

    def _act(self, decision: HostCopy) -> None:
        """Freeze and unfreeze units, if an event is due."""
        settings, watch = self.settings, self.watch
        frozen, unfrozen = watch.chosen(decision, self.limit)
        if frozen and not may_stop(self.trainer) and self._leaves_nothing(frozen, unfrozen):
            # The run goes on for min_steps or min_epochs, so something has to be trained: the least settled waits.
            frozen, unfrozen = watch.chosen(decision, len(watch.frozen) + len(frozen) - len(unfrozen) - 1)
        if not frozen and not unfrozen:
            return
        ends = self.may_end and len(watch.frozen) + len(frozen) - len(unfrozen) >= self.limit
        if not ends and settings.max_events is not None:
            done = fraction_done(self.trainer, self.trainer.global_step) or 0.0
            slots = passed_slots(done, settings.alpha, settings.max_events)
            if slots <= self.slots:
                return
            self.slots = slots
        watch.mark(self.trainer.global_step, frozen, unfrozen)
        self._tell(frozen, unfrozen)
        if ends:
            self._stop("are frozen")
        else:
            self.freeze()

    def _leaves_nothing(self, frozen: list[int], unfrozen: list[int]) -> bool:
        names = self.units.names
        after = (set(self.watch.frozen) | {names[unit] for unit in frozen}) - {names[unit] for unit in unfrozen}
        return self.units.leaves_nothing(self.units.frozen_parameters(after))

    def freeze(self) -> None:
        """Let autograd, the strategy and the optimizer know which parameters are trained from now on."""
        names = self.units.frozen_parameters(self.watch.frozen)
        if self.units.leaves_nothing(names):
            self._stop("are frozen and nothing else is trained")
            return
        parameters = self.units.parameters
        before, self._frozen = self._frozen, {name: parameters[name] for name in sorted(names)}
        changes = dict.fromkeys(self._frozen.values(), False)
        changes |= {parameter: True for name, parameter in before.items() if name not in names}
        set_trainable(self.trainer, trainable_by_name(self.trainer.lightning_module, changes))
        if self.settings.release_state:
            release_state(self.trainer.optimizers, self._frozen.values())
        self.flops = (self.flops[0], backward_flops(self.trainer.lightning_module))

    def _stop(self, why: str) -> None:
        at = f"at step {self.trainer.global_step}"
        if not may_stop(self.trainer):
            at = "when it has come to min_steps and min_epochs"
            if not self.units.leaves_nothing(self.units.frozen_parameters(self.watch.frozen)):
                self.freeze()
        rank_zero_info(f"GradES: {self.watch.count()} {why}: training stops {at}")
        self.trainer.should_stop = True

    def _tell(self, frozen: list[int], unfrozen: list[int]) -> None:
        step = self.trainer.global_step
        text, names = self.watch.describe(step, frozen, unfrozen)
        rank_zero_info(text)
        for board in tensorboards(self.trainer):
            board.add_text("grades/events", text + names, step)

    @property
    def fraction(self) -> float | None:
        """Which part of the run is behind it; None in a run without a limit."""
        return fraction_done(self.trainer, self.trainer.global_step)

    def _weights(self) -> list[float]:
        """The part of a backward pass's products that freezing each unit leaves out."""
        whole = self.flops[0]
        return [2 * self.units.elements(each.parameters) / whole if whole else 0.0 for each in self.units.matrices]

    def _foretell(self, outlook: HostCopy) -> None:
        """Say once what freezing will save in this run."""
        done, settings, total = self.fraction, self.settings, len(self.units.names)
        self.foretold = True
        if done is None or self.noted is None or not self.noted < done < 1:
            return
        parts = {name: step / self.step * done for name, step in self.watch.frozen.items()}
        settled = self.watch.forecast(outlook, done, self.noted)
        ends = self.may_end and self.limit == total
        times = frozen_at(settled, settings.alpha, settings.max_events, ends)
        times = [parts.get(name, max(time, done)) for name, time in zip(self.units.names, times, strict=True)]
        text = at_half_time(saving(times, self._weights(), self.limit, self.may_end), total, self.step, done)
        rank_zero_info(text)
        for board in tensorboards(self.trainer):
            board.add_text("grades/forecast", text, self.step)

    def end(self) -> None:
        """Say what was saved, or why nothing was, else a user looks for a mistake of his own; draw the picture."""
        watch, settings, done = self.watch, self.settings, self.fraction
        if self.armed and not watch.frozen:
            rank_zero_info(f"GradES froze nothing of {len(self.units.names)} matrices: {watch.why_none()}")
        elif watch.frozen and done:
            parts = [watch.frozen.get(name, math.inf) / self.step * done for name in self.units.names]
            saved = saving(parts, self._weights(), self.limit, may_end=False, end=done)
            nothing = "" if saved.worth_it else ", next to nothing: in a run like this leave it out"
            rank_zero_info(f"GradES froze {watch.count()}, which saved {saved.words()}{nothing}")
        if watch.map is not None:
            units = {"remaining": "over its mean", "relative": "over its level", "absolute": "per element"}
            unit = units[settings.config.tau_mode]
            title = f"GradES: {settings.metric} of each matrix, {unit}"
            watch.map.publish(self.trainer, "grades/heat_map", title, scale="log", missing="frozen")

    def unfreeze_all(self, *, in_fit: bool) -> None:
        """Unfreeze what was frozen here; ``in_fit``: the strategy and the others are told."""
        if in_fit and self._frozen:
            changes = dict.fromkeys(self._frozen.values(), True)
            set_trainable(self.trainer, trainable_by_name(self.trainer.lightning_module, changes))
        for parameter in self._frozen.values():
            parameter.requires_grad_(True)
        self._frozen = {}

    # --- its state --------------------------------------------------------------------------------------------------

    def state_dict(self, *, by_reference: bool = False) -> dict[str, Any]:
        """All but the copies; equal on all ranks. ``by_reference``: tensors where they are."""
        return {
            "step": self.step,
            "attempts": list(self.attempts),
            "slots": self.slots,
            "decided": self.decision is not None,
            "noted": self.noted,
            "foretold": self.foretold,
            "watch": self.watch.state_dict(by_reference=by_reference),
        }

    def load_state_dict(self, state: Mapping[str, Any], copies: Mapping[str, Tensor]) -> None:
        """Go on from a saved state; ``freeze`` or ``begin`` then acts on it."""
        count = len(self.trainer.optimizers)
        self.step, self.slots = state["step"], state["slots"]
        self.attempts = list(state["attempts"]) if len(state["attempts"]) == count else [0] * count
        self.noted, self.foretold = state.get("noted"), state.get("foretold", False)  # 0.1 had neither
        self._outlook = None
        self.stepped = self.checked = self.armed = False
        if state["watch"] is not None:
            self.watch.load_state_dict(state["watch"], copies)
        self.decision = self.watch.decide() if state["decided"] else None
