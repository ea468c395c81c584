"""Rules on what grows before the loss moves: the weights, and the attention's logits."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from math import inf, isfinite, nan, prod
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_eff.arguments import check, check_choice, check_count, check_flag, check_number
from lightning_eff.callbacks.training_guard.attention import AttentionWatch
from lightning_eff.callbacks.training_guard.rules import AlarmRule, ExplodingLoss, NonFiniteLoss
from lightning_eff.functional.gradients import is_dtensor
from lightning_eff.training.dtensor import local

_log = logging.getLogger(__name__)


def default_rules() -> list[AlarmRule]:
    """What ``TrainingGuard(rules="default")`` looks at."""
    rising = ExplodingLoss(factor=1.25, deviations=4.0, smooth_n_steps=20)
    return [NonFiniteLoss(), ExplodingLoss(), rising, WeightGrowth(), AttentionLogits(required=False)]


def chosen_rules(rules: Any) -> list[AlarmRule]:
    """The rules that ``TrainingGuard``'s argument stands for.

    Raises:
        ValueError: it stands for none.
    """
    if isinstance(rules, str):
        check_choice("rules", rules, Literal["default"])
        return default_rules()
    are_rules = isinstance(rules, list) and all(isinstance(rule, AlarmRule) for rule in rules)
    check("rules", rules, rules is None or are_rules, "a list of AlarmRule objects, 'default' or None")
    return [NonFiniteLoss(), ExplodingLoss()] if rules is None else rules


class WeightGrowth(AlarmRule):
    """The weights grow, or shrink, several times faster than ever before in this run.

    Looked at is the squared norm of all that the optimizers train. Healthy training changes it at a speed that itself
    changes slowly, and with the square of the learning rate. Both bounds must be passed. The past is what lies at least
    ``over_n_steps`` back. There is no alarm before ``4 * over_n_steps``: until then a linear warm-up alone may speed it
    up by so much.

    Args:
        factor: alarm when the squared norm changes by more than so many times what it ever did in as many steps, > 1.
        least: and by more than this share of itself, >= 0.
        over_n_steps: growth is over so many steps, >= ``every_n_steps``.
        every_n_steps: steps between two looks, >= 1.
        patience: looks in a row, >= 1.

    Sharded weights (FSDP2) are counted whole, without a gather.
    """

    name = "weight_growth"

    def __init__(
        self,
        factor: float = 3.5,
        least: float = 0.02,
        over_n_steps: int = 50,
        every_n_steps: int = 10,
        patience: int = 2,
    ) -> None:
        check_number("factor", factor, above=1)
        check_number("least", least, least=0)
        _check_looks(over_n_steps, every_n_steps, patience)
        self.factor = factor
        self.least = least
        self.over_n_steps = over_n_steps
        self.every_n_steps = every_n_steps
        self.patience = patience
        self._looked = -1  # the period of the last look
        self._count = -1  # of parameters, then
        self.begin_anew()

    @override
    def begin_anew(self) -> None:
        self._looks: list[list[float]] = []  # step, squared norm and its growth, of the last ``over_n_steps``
        self._fastest = 0.0  # growth before them
        self._first = -1
        self._since = 0

    @override
    def value(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor | None) -> Tensor | float | None:
        period = trainer.global_step // self.every_n_steps
        if period == self._looked:
            return None
        self._looked = period
        before, self._count = self._count, sum(len(g["params"]) for o in trainer.optimizers for g in o.param_groups)
        # A group that is added in the middle of a run (BaseFinetuning) is no growth: `judge` begins anew at a NaN.
        return squared_norm(trainer.optimizers) if before in (-1, self._count) else nan

    @override
    def judge(self, step: int, value: float) -> str | None:
        if not isfinite(value):  # other parameters, or weights whose loss says enough
            self.begin_anew()
            return None
        self._first = step if self._first < 0 else self._first
        while self._looks and self._looks[0][0] <= step - self.over_n_steps:
            _, before, its_growth = self._looks[0]
            self._fastest = max(self._fastest, abs(its_growth))
            if len(self._looks) == 1 or self._looks[1][0] > step - self.over_n_steps:
                break
            del self._looks[0]
        else:
            before = value
        growth = value - before
        self._looks.append([step, value, growth])
        limit = max(self.factor * self._fastest, self.least * before)
        above = abs(growth) > limit and step >= self._first + 4 * self.over_n_steps
        self._since = self._since + 1 if above else 0
        if self._since < self.patience:
            return None
        share = growth / before if before else inf
        times = abs(growth) / self._fastest if self._fastest else inf
        return (
            f"the squared norm of the weights has changed by {share:+.1%} in {self.over_n_steps} steps, "
            f"{times:.3g} times as much as ever before"
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        looks = [list(look) for look in self._looks]
        counts = {"first": self._first, "since": self._since, "looked": self._looked, "count": self._count}
        return {"looks": looks, "fastest": self._fastest, **counts}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._looks = [list(look) for look in state_dict["looks"]]
        self._fastest, self._first = state_dict["fastest"], state_dict["first"]
        self._since, self._looked, self._count = (state_dict[name] for name in ("since", "looked", "count"))


class AttentionLogits(AlarmRule):
    """The largest attention logit has outgrown what it was, in a run in which it had settled.

    A logit is what the softmax of an attention gets, after the mask: large ones make attention look at one place alone,
    where its gradient vanishes. Taken is the median of the last three looks, against the largest such median that lies
    at least ``over_n_steps`` back. In every run logits grow at the start: the rule is armed once they have stayed
    within the square root of ``factor`` for ``over_n_steps``. Which attention is seen, by structure: see
    :class:`~lightning_eff.callbacks.training_guard.attention.AttentionWatch`.

    Args:
        factor: alarm above so many times the past, > 1.
        least: and above this logit, >= 0: where all are small, growth does no harm.
        most: alarm above this logit, armed or not, in a run that began with one ``factor`` times smaller, >= ``least``.
        over_n_steps: how far the past lies back, >= ``every_n_steps``.
        every_n_steps: steps between two looks, >= 1.
        patience: looks in a row, >= 1.
        required: warn if there is no attention in the model; False: say it in a line of the log.
    """

    name = "attention_logits"

    def __init__(
        self,
        factor: float = 2.0,
        least: float = 15.0,
        most: float = 200.0,
        over_n_steps: int = 50,
        every_n_steps: int = 10,
        patience: int = 2,
        required: bool = True,
    ) -> None:
        check_number("factor", factor, above=1)
        check_number("least", least, least=0)
        check_number("most", most, least=least)
        _check_looks(over_n_steps, every_n_steps, patience)
        check_flag("required", required)
        self.factor = factor
        self.least = least
        self.most = most
        self.over_n_steps = over_n_steps
        self.every_n_steps = every_n_steps
        self.patience = patience
        self.required = required
        self._watch = AttentionWatch()
        self._looked = -1  # the period of the last look
        self._looking = -1  # of the step that is looked at
        self._told = False
        self.begin_anew()

    @override
    def begin_anew(self) -> None:
        self._last: list[float] = []  # three logits
        self._looks: list[list[float]] = []  # step and median, of the last ``over_n_steps``
        self._highest = 0.0  # median before them
        self._first = -1.0
        self._calm_since = -1
        self._armed = False
        self._since = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._told = False
        self._watch.take()  # of a batch that never came to its end

    @override
    def before_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        period = trainer.global_step // self.every_n_steps
        if period != self._looked:
            self._looking = period
            self._watch.begin()

    @override
    def after_forward(self) -> None:
        self._watch.end()

    @override
    def value(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor | None) -> Tensor | float | None:
        if self._looking == self._looked:
            return None
        self._looked = self._looking
        largest = self._watch.take()
        if largest is None and not self._told:
            self._told = True
            _tell_none(logging.WARNING if self.required else logging.INFO)
        return largest

    @override
    def judge(self, step: int, value: float) -> str | None:
        if not isfinite(value):
            return None
        self._last = [*self._last[-2:], value]
        now = statistics.median(self._last)
        while self._looks and self._looks[0][0] <= step - self.over_n_steps:
            self._highest = max(self._highest, self._looks.pop(0)[1])
        self._looks.append([step, now])
        self._first = now if self._first < 0 else self._first
        if not self._highest > 0:
            return None
        if now > self.factor**0.5 * self._highest:
            self._calm_since = -1
        elif self._calm_since < 0:
            self._calm_since = step
        self._armed |= 0 <= self._calm_since <= step - self.over_n_steps
        outgrown = self._armed and now > max(self.least, self.factor * self._highest)
        self._since = self._since + 1 if outgrown or now > max(self.most, self.factor * self._first) else 0
        if self._since < self.patience:
            return None
        return (
            f"the largest attention logit is {now:.3g}, {now / self._highest:.3g} times what it was until "
            f"{self.over_n_steps} steps ago"
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        looks = [list(look) for look in self._looks]
        return {"last": list(self._last), "looks": looks, **{name: getattr(self, f"_{name}") for name in _LOGIT_STATE}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last, self._looks = list(state_dict["last"]), [list(look) for look in state_dict["looks"]]
        for name in _LOGIT_STATE:
            setattr(self, f"_{name}", state_dict[name])


def _check_looks(over_n_steps: int, every_n_steps: int, patience: int) -> None:
    check_count("every_n_steps", every_n_steps)
    check_count("over_n_steps", over_n_steps)
    check("over_n_steps", over_n_steps, over_n_steps >= every_n_steps, f"at least every_n_steps={every_n_steps}")
    check_count("patience", patience)


_LOGIT_STATE = ("highest", "first", "calm_since", "armed", "since", "looked", "looking")


@rank_zero_only
def _tell_none(level: int) -> None:
    _log.log(
        level,
        "the rule AttentionLogits has seen no attention in this step, and is silent: it sees "
        "F.scaled_dot_product_attention, nn.MultiheadAttention and a softmax over four dimensions. Remove the rule if "
        "the model has none of them",
    )


def squared_norm(optimizers: Sequence[Optimizer]) -> Tensor | None:
    """Of all parameters of the optimizers, 0-d, such that its mean over the ranks is that of the whole weights.

    A shard counts as often as there are shards. Nothing is gathered, and nothing waits for the device.
    """
    groups: dict[tuple[torch.device, int, torch.dtype], list[Tensor]] = {}
    for parameter in (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]):
        part, shards = parameter, 1
        if is_dtensor(parameter):
            sizes = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
            part, shards = local(parameter), prod(size for size, placement in sizes if placement.is_shard())
        if part.numel() and part.is_floating_point():
            # Summed up in at least float32.
            dtype = torch.promote_types(part.dtype, torch.float32)
            groups.setdefault((part.device, shards, dtype), []).append(part)
    total: Tensor | None = None
    with torch.no_grad():
        for (_, shards, dtype), parts in groups.items():
            squared = torch.stack(torch._foreach_norm(parts, 2, dtype=dtype)).square().sum() * shards
            total = squared if total is None else total + squared.to(total.device)
    return total
