"""ZClip: clip a gradient when its norm is an outlier among the recent ones (arXiv 2504.02507).

In a plain torch loop::

    state = ZClipState(ZClipConfig(z_thresh=2.5))           # once
    ...
    loss.backward()
    norm = zclip_grad_norm_(model.parameters(), state)      # each step, before optimizer.step()

The whole decision is taken on the device: nothing here waits for it, and reading a value is left to the caller.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_eff.arguments import check, check_choice, check_count, check_flag, check_number, is_number
from lightning_eff.functional.gradients import Gradients, statistics_dtype
from lightning_eff.kernels import choose
from lightning_eff.kernels import zclip as kernel

Auto = Literal["auto"]
ClipOption = Literal["adaptive_scaling", "mean", "percentile"]

STD_FLOOR = 1e-3
"""Smallest standard deviation that a z-score is measured against, as a fraction of the mean.

Norms that were equal in the whole warm-up have no variance, and any rise would be an infinite outlier for ever.
Gradient norms of real training vary by per cents, far above it.
"""

AUTO_CAP = 5.0
"""What ``max_grad_norm="auto"`` caps a step at: so many times the mean, in the warm-up of the norms so far.

It is for what the z-score does not see: the warm-up, and norms whose deviation is of the size of their mean. No healthy
norm of ten models was above it, and a spike in the warm-up was (benchmarks/defaults.py).
"""

NORM_EPS = 1e-6
"""Added to the norm that a limit is divided by, as in the released code; not the ``eps`` of the z-score."""

FIELDS = (
    "mean",
    "var",
    "count",  # finite norms seen: the place in the ring, and the end of the warm-up
    "streak",  # outliers in a row, up to now
    "steps",
    "spikes",  # outliers in total
    "clipped",  # steps scaled down in total, by the z-score or by max_grad_norm
    "nonfinite",  # steps with a NaN or infinite norm in total
    "relearned",  # times the statistics were learned anew
    "recent_steps",  # since the caller last set the three to 0
    "recent_clipped",
    "recent_nonfinite",
    "norm",  # of the last step, before clipping
    "norm_clipped",
    "threshold",  # the last step was clipped if and only if its norm was above
    "z_score",
    "coefficient",  # what the last step's gradients are to be multiplied by
)
INDEX = {name: index for index, name in enumerate(FIELDS)}


@dataclass(frozen=True)
class ZClipConfig:
    """What ZClip is told; the defaults are the paper's, but for ``max_grad_norm`` and ``relearn_after``.

    Args:
        alpha: weight of the past in the running mean and variance, in [0, 1). 0.97 remembers about 33 steps.
        z_thresh: a norm more than this many standard deviations above the mean is an outlier, > 0.
        max_grad_norm: no step is longer than this, whatever the z-score says, in the warm-up too. ``"auto"``: 5 times
            the running mean, in the warm-up 5 times the mean of the norms so far, or the norm before where that is
            larger, whatever their unit; the first step has no cap. Or a number, > 0, in units of the norm: the paper's
            is 1.0. None: no cap.
        eps: added to the standard deviation in the z-score, >= 0, in units of the norm.
        warmup_steps: norms collected before the first decision, >= 1.
        clip_option: where an outlier is clipped to: ``"adaptive_scaling"`` to mean + z_thresh^2 / z * std (the further
            out, the harder), ``"mean"`` to the mean, ``"percentile"`` to mean + z_thresh * std.
        clip_factor: multiplies the whole threshold of ``"adaptive_scaling"``, > 0.
        skip_update_on_spike: keep the statistics as they are on an outlier, rather than feeding them the threshold.
        relearn_after: after this many outliers in a row (at least ``warmup_steps``) the level has changed for good,
            and mean and variance are taken anew from the last ``warmup_steps`` raw norms. None never does that: the
            authors' behaviour, which clips every step for ever once the norms have doubled.

    Raises:
        ValueError: an argument out of its range.
    """

    alpha: float = 0.97
    z_thresh: float = 2.5
    max_grad_norm: float | Auto | None = "auto"
    eps: float = 1e-6
    warmup_steps: int = 25
    clip_option: ClipOption = "adaptive_scaling"
    clip_factor: float = 1.0
    skip_update_on_spike: bool = False
    relearn_after: int | None = 25

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, least=0, below=1)
        check_number("z_thresh", self.z_thresh, above=0)
        cap = self.max_grad_norm
        good = cap is None or (cap == "auto" if isinstance(cap, str) else is_number(cap) and cap > 0)
        check("max_grad_norm", cap, good, "a number above 0, 'auto', or None")
        check_number("eps", self.eps, least=0)
        check_count("warmup_steps", self.warmup_steps)
        check_choice("clip_option", self.clip_option, ClipOption)
        check_number("clip_factor", self.clip_factor, above=0)
        check_flag("skip_update_on_spike", self.skip_update_on_spike)
        check_count("relearn_after", self.relearn_after, optional=True)
        if self.clip_factor != 1.0 and self.clip_option != "adaptive_scaling":
            warnings.warn(
                f"clip_factor={self.clip_factor} has an effect only with clip_option='adaptive_scaling'", stacklevel=3
            )


@dataclass
class ZClipState:
    """Statistics of one stream of norms, on the device of the gradients.

    Attributes:
        config: what ZClip is told.
        values: float64 (float32 on MPS) tensor of shape (len(FIELDS),): mean, variance, counters and the last step's
            figures, in the order of ``FIELDS``.
        norms: tensor of shape (warmup_steps,): the last raw finite norms, as a ring.
        since: 0-d tensor, the norms seen since the last :meth:`change_level`; None if there never was one.
    """

    config: ZClipConfig = field(default_factory=ZClipConfig)
    values: Tensor = field(default_factory=lambda: torch.zeros(len(FIELDS), dtype=torch.float64))
    norms: Tensor = field(default_factory=lambda: torch.empty(0))
    since: Tensor | None = None

    def __post_init__(self) -> None:
        if not len(self.norms):
            self.norms = torch.zeros(self.config.warmup_steps, dtype=torch.float64)

    def __getitem__(self, name: str) -> Tensor:
        """The value of that name in ``FIELDS``: a 0-d tensor that shares memory with ``values``."""
        return self.values[INDEX[name]]

    def to(self, device: torch.device) -> ZClipState:
        """Move to ``device`` in place, for those who resume on another one."""
        if self.values.device != device:
            dtype = statistics_dtype(device)
            self.values = self.values.to(dtype).to(device)
            self.norms = self.norms.to(dtype).to(device)
            self.since = None if self.since is None else self.since.to(dtype).to(device)
        return self

    def change_level(self) -> None:
        """The norms that follow are of other parameters: of another level, and that is no spike.

        The next norm is taken for the new level: mean, deviation and the norms of the warm-up are scaled to it, so that
        the relative spread, which is what an outlier is told by, is not learned anew. From there the mean follows as
        the plain mean of the norms since the change, until these are as many as ``alpha`` remembers: one odd norm at
        the change is soon forgotten. That first norm alone cannot be an outlier; a number for ``max_grad_norm`` holds
        for it.
        """
        self.since = torch.zeros_like(self.values[0])

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to carry on exactly, as Python numbers."""
        values = dict(zip(FIELDS, self.values.tolist(), strict=True))
        return {**values, "norms": self.norms.tolist(), "since": None if self.since is None else self.since.item()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a ``state_dict``; with another ``warmup_steps`` the statistics are learned anew, with a warning."""
        if len(state_dict["norms"]) != self.config.warmup_steps:
            warnings.warn(
                f"warmup_steps={self.config.warmup_steps} differs from the {len(state_dict['norms'])} of the saved "
                "ZClip state: the statistics are learned anew",
                stacklevel=2,
            )
            return
        self.values = torch.tensor([state_dict[name] for name in FIELDS], dtype=torch.float64)
        self.norms = torch.tensor(state_dict["norms"], dtype=torch.float64)
        since = state_dict.get("since")
        self.since = None if since is None else torch.tensor(since, dtype=torch.float64)


def zclip_update(norm: Tensor, state: ZClipState, *, on_nonfinite: float = 0.0) -> Tensor:
    """Take one norm into the statistics and say what the gradients are to be multiplied by.

    A norm of NaN, infinity or exactly 0 (nothing contributed to this step) never enters the statistics.

    Args:
        norm: 0-d tensor, the global L2 norm of a step's gradients.
        state: changed in place.
        on_nonfinite: the coefficient for a non-finite norm, >= 0.

    Returns:
        The coefficient, a 0-d tensor: 1 for a step that is not clipped. Shares memory with ``state.values``.

    Example:
        >>> state = ZClipState(ZClipConfig(warmup_steps=4, max_grad_norm=None))
        >>> for norm in (1.0, 1.2, 0.8, 1.0, 1.1, 5.0):
        ...     coefficient = zclip_update(torch.tensor(norm), state)
        >>> print(f"{coefficient:.4f}")
        0.2068
    """
    check_number("on_nonfinite", on_nonfinite, least=0)
    state.to(norm.device)
    norm = norm.to(state.values.dtype)
    if state.since is None:
        return _decide(norm, state, on_nonfinite)
    before = _scale_to_level(norm, state, state.since)
    coefficient = _decide(norm, state, on_nonfinite)
    _follow_level(state, state.since, before)
    return coefficient


def _scale_to_level(norm: Tensor, state: ZClipState, since: Tensor) -> Tensor:
    """Scale the statistics to the first norm after a change of level; returns the values before this step's update."""
    mean, var, count, streak = (state[name] for name in ("mean", "var", "count", "streak"))
    first = (since == 0) & torch.isfinite(norm) & (norm > 0)
    warmup = state.config.warmup_steps
    level = torch.where(count >= warmup, mean, state.norms.sum() / count.clamp(1, warmup))
    factor = torch.where(first & (level > 0), norm / level, 1.0)
    mean.mul_(factor)
    var.mul_(factor.square())
    state.norms.mul_(factor)
    streak.copy_(torch.where(first, 0.0, streak))
    return state.values.clone()


def _follow_level(state: ZClipState, since: Tensor, before: Tensor) -> None:
    """Give a norm soon after a change of level the weight that it has in a plain mean, rather than 1 - alpha."""
    mean, old = state["mean"], before[INDEX["mean"]]
    warm = before[INDEX["count"]] >= state.config.warmup_steps
    same = warm & (state["relearned"] == before[INDEX["relearned"]])  # else the mean is that of the ring
    weight = (1 / ((since + 1) * (1 - state.config.alpha))).clamp(min=1.0)
    mean.copy_(torch.where(same, old + (mean - old) * weight, mean))
    since.add_(state["count"] - before[INDEX["count"]])


def _decide(norm: Tensor, state: ZClipState, on_nonfinite: float) -> Tensor:
    """The update for norms of one level."""
    config = state.config
    if choose("zclip.decide", norm.device).implementation == "triton":
        _decide_in_one_launch(norm, state, on_nonfinite)
        return state["coefficient"]
    mean, var, count, streak = (state[name] for name in ("mean", "var", "count", "streak"))
    finite = torch.isfinite(norm)
    valid = finite & (norm > 0)
    warm = count >= config.warmup_steps
    places = torch.arange(config.warmup_steps, device=norm.device)
    if isinstance(config.max_grad_norm, str):
        # The norm before: behind a first one of nearly nothing the mean would hold the run down for the whole warm-up.
        before = torch.where(places == torch.remainder(count - 1, config.warmup_steps), state.norms, 0.0).sum()
        so_far = torch.where(count > 0, torch.maximum(state.norms.sum() / count.clamp(min=1), before), math.inf)
        cap = AUTO_CAP * torch.where(warm, mean, so_far)
        kept = torch.where(warm, norm, torch.minimum(norm, cap))  # in the ring: the warm-up learns no spike
    else:
        cap = torch.full_like(norm, math.inf if config.max_grad_norm is None else config.max_grad_norm)
        kept = norm

    # Is it an outlier, and what is it clipped to?
    std = torch.maximum(var.sqrt(), STD_FLOOR * mean)
    z_score = (norm - mean) / (std + config.eps)
    if config.clip_option == "percentile":
        trigger = target = mean + config.z_thresh * std
        outlier = norm > trigger
    else:
        trigger = mean + config.z_thresh * (std + config.eps)
        outlier = z_score > config.z_thresh
        if config.clip_option == "mean":
            target = mean
        else:
            target = (mean + config.z_thresh / (z_score / config.z_thresh) * std) * config.clip_factor
    spike = outlier & valid & warm
    limit = torch.minimum(torch.where(spike, target, norm), cap)
    clipped = valid & (norm > limit)
    coefficient = torch.where(clipped, limit / (norm + NORM_EPS), 1.0)
    coefficient = torch.where(finite, coefficient, on_nonfinite)

    # The statistics see the threshold in place of an outlier, but not the cap (variance: about the new mean).
    seen = torch.where(spike, target, norm)
    updated = warm & valid
    if config.skip_update_on_spike:
        updated = updated & ~spike
    new_mean = config.alpha * mean + (1 - config.alpha) * seen
    new_var = config.alpha * var + (1 - config.alpha) * (seen - new_mean) ** 2

    # The ring of raw norms: its mean and variance are the statistics at the end of the warm-up, and again when
    # outliers have lasted so long that they are the new level.
    place = places == torch.remainder(count, config.warmup_steps)
    state.norms.copy_(torch.where(place & valid, kept, state.norms))
    count = count + valid
    streak = torch.where(valid, torch.where(spike, streak + 1, 0.0), streak)
    learn = ~warm & (count >= config.warmup_steps)
    relearn = torch.zeros_like(learn)
    if config.relearn_after is not None:
        relearn = streak >= max(config.relearn_after, config.warmup_steps)
    anew = learn | relearn
    ring_mean = state.norms.mean()
    ring_var = (state.norms - ring_mean).square().mean()
    values = {
        "mean": torch.where(anew, ring_mean, torch.where(updated, new_mean, mean)),
        "var": torch.where(anew, ring_var, torch.where(updated, new_var, var)),
        "count": count,
        "streak": torch.where(relearn, 0.0, streak),
        "steps": state["steps"] + 1,
        "spikes": state["spikes"] + spike,
        "clipped": state["clipped"] + clipped,
        "nonfinite": state["nonfinite"] + ~finite,
        "relearned": state["relearned"] + relearn,
        "recent_steps": state["recent_steps"] + 1,
        "recent_clipped": state["recent_clipped"] + clipped,
        "recent_nonfinite": state["recent_nonfinite"] + ~finite,
        "norm": norm,
        "norm_clipped": torch.where(finite, norm * coefficient, 0.0 if on_nonfinite == 0 else norm),
        "threshold": torch.where(warm, torch.minimum(trigger, cap), cap),
        "z_score": torch.where(warm & valid, z_score, 0.0),
        "coefficient": coefficient,
    }
    state.values.copy_(torch.stack([values[name] for name in FIELDS]))
    return state["coefficient"]


def _decide_in_one_launch(norm: Tensor, state: ZClipState, on_nonfinite: float) -> None:
    """What :func:`zclip_update` says, by the kernel that the tests hold to it."""
    config = state.config
    relearn_after = math.inf if config.relearn_after is None else max(config.relearn_after, config.warmup_steps)
    fixed = math.inf if config.max_grad_norm is None or isinstance(config.max_grad_norm, str) else config.max_grad_norm
    constants = kernel.Constants(
        alpha=config.alpha,
        one_minus_alpha=1 - config.alpha,
        z_thresh=config.z_thresh,
        max_grad_norm=fixed,
        eps=config.eps,
        std_floor=STD_FLOOR,
        clip_factor=config.clip_factor,
        on_nonfinite=on_nonfinite,
        relearn_after=relearn_after,
        norm_eps=NORM_EPS,
        auto_cap=AUTO_CAP if config.max_grad_norm == "auto" else math.inf,
    )
    kernel.decide(
        norm,
        state.values,
        state.norms,
        constants,
        percentile=config.clip_option == "percentile",
        to_mean=config.clip_option == "mean",
        skip_spikes=config.skip_update_on_spike,
    )


def zclip_grad_norm_(parameters: Iterable[Tensor], state: ZClipState) -> Tensor | None:
    """Clip the gradients of ``parameters`` in place where their norm is an outlier; a non-finite step becomes zeros.

    Args:
        parameters: leaf tensors with gradients, plain or DTensor.
        state: the statistics, changed in place; one for each optimizer.

    Returns:
        The norm before clipping, a 0-d tensor, or None when there is no gradient (the statistics are left alone).

    Example:
        >>> parameter = torch.nn.Parameter(torch.zeros(3))
        >>> state = ZClipState(ZClipConfig(warmup_steps=4, max_grad_norm=None))
        >>> for norm in (1.0, 1.2, 0.8, 1.0, 1.1, 5.0):
        ...     parameter.grad = torch.tensor([norm, 0.0, 0.0])
        ...     _ = zclip_grad_norm_([parameter], state)
        >>> print(f"{parameter.grad.norm():.6f}")
        1.033777
    """
    gradients = Gradients(parameters)
    norm = gradients.norm()
    if norm is not None:
        gradients.scale_(zclip_update(norm, state), zero_nonfinite=True)
    return norm
