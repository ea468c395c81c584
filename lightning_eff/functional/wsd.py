"""Warm-up, stable, decay: a learning rate that need not know when the run ends, until it ends.

The rate rises, stays, and falls to (nearly) nothing over the last part of a run. As long as it stays, the run can go on
for as long as anybody likes, and a decay can branch off any of its checkpoints (`lightning-eff branch-decay`).

WSD is that of Hu et al., MiniCPM (arXiv 2404.06395). With several ends it is WSD-S of Wen et al. (arXiv 2410.05192):
one run decays at each of them, which gives a finished model there, and goes on from that model at the full rate.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightning_eff.arguments import check, check_choice, check_count, check_instance, check_number, is_count
from lightning_eff.functional.averaging import CURVES, Curve


class WSD(LRScheduler):
    """A learning rate that rises, stays and decays, once or several times; a function of the step alone.

    It is stepped after each optimizer step, in Lightning with ``"interval": "step"``. A run that is resumed takes the
    step from the checkpoint and **everything else from the arguments that it is given now**: that is how an end is
    moved, or added, while the rate is still stable.

    Args:
        optimizer: whose rates, as they are at its start, are the full ones.
        ends: the optimizer step at which the decay has ended; or several, each later than the one before, for WSD-S:
            behind each but the last the rate is at once the full one again.
        warmup_steps: the first so many steps rise linearly to the full rate.
        decay_steps: how long each decay takes: a number of steps, or a fraction of all steps up to its end.
        curve: of the decay, as WSM's in `lightning-eff merge`: ``"linear"``, ``"cosine"`` or ``"1-sqrt"``, which falls
            fast at first.
        least: what is left of the rate at an end, as a fraction in [0, 1].

    Raises:
        ValueError: an argument out of its range, or a decay that would begin before the warm-up or the decay before it
            is over.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> schedule = WSD(optimizer, ends=10, warmup_steps=2, decay_steps=4, curve="linear")
        >>> [round(schedule.factor(step), 2) for step in range(11)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        ends: int | Sequence[int],
        warmup_steps: int = 0,
        decay_steps: int | float = 0.2,
        curve: Curve = "1-sqrt",
        least: float = 0.0,
    ) -> None:
        check_instance("optimizer", optimizer, Optimizer, "an optimizer")
        several = list(ends) if isinstance(ends, Sequence) and not isinstance(ends, str) else [ends]
        rise = all(map(is_count, several)) and all(a < b for a, b in pairwise(several))
        allowed = "a step of at least 1, or several, each later than the one before"
        check("ends", ends, rise and len(several) > 0, allowed)
        check_count("warmup_steps", warmup_steps, least=0)
        fraction = isinstance(decay_steps, float) and 0 < decay_steps <= 1
        allowed = "an integer of at least 1, or a fraction above 0 and at most 1"
        check("decay_steps", decay_steps, fraction or is_count(decay_steps), allowed)
        check_choice("curve", curve, Curve)
        check_number("least", least, least=0, most=1)
        self.ends, self.warmup_steps, self.curve, self.least = several, warmup_steps, curve, least
        self.begins = [end - (round(end * decay_steps) if fraction else int(decay_steps)) for end in several]
        for free, begin, end in zip([warmup_steps, *several], self.begins, several, strict=False):
            if begin < free:
                raise ValueError(
                    f"decay_steps={decay_steps} with warmup_steps={warmup_steps} is not allowed: the decay that ends "
                    f"at step {end} would begin at step {begin}, and what is before it ends at step {free}"
                )
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """What the full rate is multiplied by for the update after ``step`` of them."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if step >= self.ends[-1]:
            return self.least
        place = bisect_right(self.ends, step)
        begin, end = self.begins[place], self.ends[place]
        done = max(0.0, (step - begin) / max(1, end - begin))
        return self.least + (1 - self.least) * CURVES[self.curve](done)

    @override
    def get_lr(self) -> list[float | Tensor]:
        """The rates of the step that it is at."""
        return [rate * self.factor(self.last_epoch) for rate in self.base_lrs]

    @override
    def state_dict(self) -> dict[str, Any]:
        """The step and the full rates."""
        return {name: value for name, value in super().state_dict().items() if name not in _ARGUMENTS}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from that step by the arguments of this one, from the next update on."""
        super().load_state_dict(state_dict)
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], Tensor):  # compiled and captured optimizers hold on to the tensor itself
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


_ARGUMENTS = ("ends", "begins", "warmup_steps", "curve", "least")
