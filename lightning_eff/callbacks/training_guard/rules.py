"""Rules that look at one number a step and say when a run goes wrong.

A rule of one's own is a few lines, and goes into ``TrainingGuard(rules=[...])`` or, by its class path, into YAML:

    class HeadTooLong(AlarmRule):
        name = "head_too_long"

        def value(self, trainer, pl_module, loss):
            return pl_module.head.weight.norm()

        def judge(self, step, value):
            return f"the head's weights have norm {value:.3g}" if value > 100 else None
"""

from __future__ import annotations

import statistics
from collections import deque
from math import inf, isfinite
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_eff.arguments import check_count, check_number
from lightning_eff.training.hooks import CountsSpikes, all_with
from lightning_eff.training.namespaces import MisconfigurationException


class AlarmRule:
    """Base of the rules. A rule overrides ``judge``, and ``value`` if it looks at something else than the loss.

    A rule that remembers something between steps also overrides ``state_dict``, ``load_state_dict`` and ``begin_anew``.
    """

    name: str = "rule"
    """The alarm's source."""

    def setup(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before training; a MisconfigurationException says what is missing."""

    def before_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A batch of training begins: time to look at its forward pass."""

    def after_forward(self) -> None:
        """The forward pass of a batch has ended, or never came to its end; called more than once."""

    def value(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor | None) -> Tensor | float | None:
        """The number to look at, after each optimizer step; None for none in this step.

        Must not wait for the device: a 0-d tensor is read later, after a mean over the ranks.

        Args:
            trainer: whose step has just ended.
            pl_module: the trained module.
            loss: of this rank's batches of the step, 0-d, on the device; None if ``training_step`` returns none.
        """
        return loss

    def judge(self, step: int, value: float) -> str | None:
        """What is wrong, in words, or None.

        It is called for each step in order, some steps late, with the mean over the ranks: decide by the arguments
        and by what earlier calls have remembered, so that all ranks decide alike.

        Args:
            step: the ``global_step`` that the step led to.
            value: the mean over the ranks of what ``value`` returned then.
        """
        raise NotImplementedError

    def begin_anew(self) -> None:
        """What was normal is so no longer, since the data has changed or the rate is warmed again: forget it."""

    def state_dict(self) -> dict[str, Any]:
        """What ``judge`` remembers, in plain Python; it goes into the checkpoint."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""


class NonFiniteLoss(AlarmRule):
    """The loss is NaN or infinite in several steps in a row.

    One such step can be a bad batch, which ZClip or a GradScaler keeps away from the weights; once the weights are not
    finite, every loss is so.

    Args:
        patience: steps in a row, >= 1.
    """

    name = "nonfinite_loss"

    def __init__(self, patience: int = 2) -> None:
        check_count("patience", patience)
        self.patience = patience
        self._since = 0

    @override
    def judge(self, step: int, value: float) -> str | None:
        self._since = 0 if isfinite(value) else self._since + 1
        if self._since < self.patience:
            return None
        return f"the loss is {value} in {self._since} steps in a row"

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"since": self._since}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._since = state_dict["since"]


class ExplodingLoss(AlarmRule):
    """The loss is far above its best level so far, for several steps in a row.

    The level is the lowest median of ``over_n_steps`` losses in a row since the run began, so that a slow rise does
    not move it, and the spread is their median absolute deviation there. Both bounds must be passed: the first is blind
    to the noise of a loss near zero, the second to a rise that does not matter.

    Args:
        factor: alarm above ``level + (factor - 1) * |level|``, > 1: 1.5 is half again of a positive loss.
        deviations: and above ``level + deviations * spread``, >= 0; the spread is in standard deviations of a normal
            distribution (1.4826 times the median absolute deviation).
        over_n_steps: losses in a row that make a level, >= 2; there is no alarm before the first level.
        patience: steps in a row, >= 1.
        smooth_n_steps: the median of so many losses is judged, >= 1: with lower bounds, a slow rise is seen early.
    """

    name = "exploding_loss"

    def __init__(
        self,
        factor: float = 1.5,
        deviations: float = 6.0,
        over_n_steps: int = 50,
        patience: int = 5,
        smooth_n_steps: int = 1,
    ) -> None:
        check_number("factor", factor, above=1)
        check_number("deviations", deviations, least=0)
        check_count("over_n_steps", over_n_steps, least=2)
        check_count("patience", patience)
        check_count("smooth_n_steps", smooth_n_steps)
        self.factor = factor
        self.deviations = deviations
        self.over_n_steps = over_n_steps
        self.patience = patience
        self.smooth_n_steps = smooth_n_steps
        self.begin_anew()

    @override
    def begin_anew(self) -> None:
        self._recent: deque[float] = deque(maxlen=self.over_n_steps)
        self._last: deque[float] = deque(maxlen=self.smooth_n_steps)
        self._level = inf
        self._spread = 0.0
        self._since = 0

    @override
    def judge(self, step: int, value: float) -> str | None:
        limit = max(self._level + (self.factor - 1) * abs(self._level), self._level + self.deviations * self._spread)
        self._last.append(value if isfinite(value) else inf)  # a NaN is above everything
        now = statistics.median(self._last)
        if isfinite(self._level) and now > limit:
            self._since += 1
            if self._since >= self.patience:
                return f"the loss is {now:.4g}, above {limit:.4g} in {self._since} steps in a row"
            return None
        self._since = 0
        if isfinite(value):
            self._recent.append(value)
            if len(self._recent) == self.over_n_steps:
                self._learn()
        return None

    def _learn(self) -> None:
        level = statistics.median(self._recent)
        if level < self._level:
            self._level = level
            self._spread = 1.4826 * statistics.median(abs(value - level) for value in self._recent)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "recent": list(self._recent),
            "last": list(self._last),
            "level": self._level,
            "spread": self._spread,
            "since": self._since,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._recent = deque(state_dict["recent"], maxlen=self.over_n_steps)
        self._last = deque(state_dict.get("last", ()), maxlen=self.smooth_n_steps)
        self._level, self._spread, self._since = (state_dict[name] for name in ("level", "spread", "since"))


class GradientSpikes(AlarmRule):
    """ZClip has met too many outliers or non-finite gradient norms within some steps.

    Args:
        count: outliers that are too many, >= 1.
        within: in so many steps, >= 1.

    Raises:
        MisconfigurationException: in ``setup``, if the Trainer has no ZClip.
    """

    name = "gradient_spikes"

    def __init__(self, count: int = 10, within: int = 50) -> None:
        check_count("count", count)
        check_count("within", within)
        self.count = count
        self.within = within
        self.begin_anew()

    @override
    def begin_anew(self) -> None:
        self._totals: deque[float] = deque(maxlen=self.within + 1)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not any(all_with(trainer, CountsSpikes)):  # type: ignore[type-abstract]
            raise MisconfigurationException(
                "the rule GradientSpikes looks at what ZClip counts, and the Trainer has no ZClip: add ZClip() to the "
                "callbacks, or remove the rule"
            )

    @override
    def value(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor | None) -> Tensor | float | None:
        counts = [counter.spike_count() for counter in all_with(trainer, CountsSpikes)]  # type: ignore[type-abstract]
        return torch.stack(counts).sum() if counts else None

    @override
    def judge(self, step: int, value: float) -> str | None:
        self._totals.append(value)
        spikes = value - self._totals[0]
        if spikes < self.count:
            return None
        return f"{spikes:g} gradient norms of the last {len(self._totals) - 1} steps were outliers or not finite"

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"totals": list(self._totals)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._totals = deque(state_dict["totals"], maxlen=self.within + 1)
