"""ZClip as a Lightning callback."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_eff.arguments import check_choice, check_flag
from lightning_eff.functional.gradients import Gradients, is_dtensor
from lightning_eff.functional.zclip import FIELDS, Auto, ClipOption, ZClipConfig, ZClipState, zclip_update
from lightning_eff.training.hooks import Order
from lightning_eff.training.namespaces import MisconfigurationException
from lightning_eff.training.state_version import check_version
from lightning_eff.training.trainable import TrainableChange
from lightning_eff.training.trainer import (
    applied_scale,
    callbacks_of,
    gradient_scaler,
    log_values,
    logs_now,
    optimizer_index,
    refuse_flattened,
    refuse_sparse_gradients,
    sort_callbacks,
    unscales_itself,
)

NonFinite = Literal["zero", "skip", "raise", "ignore"]


class ZClip(Callback):
    """Clips the gradients of a step whose norm is an outlier among the recent ones, in place of a fixed threshold.

    Each optimizer has its own statistics, taken from the gradients of its own ``param_groups`` after accumulation,
    reduction over ranks and unscaling. They are saved in the checkpoint, in the middle of the warm-up too.

    When another callback unfreezes parameters during the run (MISA, or any that calls ``set_trainable``), the next norm
    is one of other parameters and no spike: the statistics of that optimizer are scaled to it and follow the new level
    quickly, while the relative spread, by which an outlier is told, is kept. Freezing alone makes norms smaller, which
    needs no reaction.

    Runs in: ``on_before_optimizer_step``, after every callback that only reads the gradients.
    Reads: the gradients, once.
    Changes: the gradients; with ``nonfinite="skip"`` whether the optimizer steps.
    Collectives: none on one device and under DDP; FSDP2 one scalar all-reduce a step for each sharded mesh dimension.
    Host syncs: none in a step, one where it is logged; ``"raise"`` and, unless fused, ``"skip"`` one a step.
    Strategies: one device, DDP and its kin, FSDP2 and tensor parallelism (``ModelParallelStrategy``).

    Args:
        alpha: weight of the past in the running mean and variance, in [0, 1). 0.97 remembers about 33 steps.
        z_thresh: a norm more than this many standard deviations above the mean is an outlier, > 0.
        max_grad_norm: no step is longer than this, whatever the z-score says, in the warm-up too. ``"auto"``: 5 times
            the running mean, in the warm-up 5 times the mean of the norms so far, or the norm before where that is
            larger, whatever their unit; the first step has no cap. Or a number, > 0, in units of the norm: the paper's
            is 1.0; where healthy norms are above it, ZClip is a plain clip at this value, and says so in a warning.
            None: no cap.
        eps: added to the standard deviation in the z-score, >= 0, in units of the norm.
        warmup_steps: norms collected before the first decision, >= 1.
        clip_option: where an outlier is clipped to: ``"adaptive_scaling"`` to mean + z_thresh^2 / z * std (the further
            out, the harder), ``"mean"`` to the mean, ``"percentile"`` to mean + z_thresh * std.
        clip_factor: multiplies the whole threshold of ``"adaptive_scaling"``, > 0.
        skip_update_on_spike: keep the statistics as they are on an outlier, rather than feeding them the threshold.
        relearn_after: after this many outliers in a row (at least ``warmup_steps``) the level of the norms has changed
            for good, and the statistics are taken anew from the last ``warmup_steps`` raw norms. None never does
            that: the authors' behaviour, which clips every step for ever once the norms have doubled.
        nonfinite: what becomes of a step whose norm is NaN or infinite. ``"zero"``: its gradients are zeros, decided
            on the device; momentum and weight decay go on. ``"skip"``: the optimizer does not step, on all ranks.
            ``"raise"``: FloatingPointError. ``"ignore"``: the gradients are left as they are. Such a norm never
            enters the statistics. Under a GradScaler the scaler skips the step and lowers its scale, whatever is set.
        log_details: also log ``zclip/mean``, ``zclip/std``, ``zclip/spikes`` and ``zclip/relearned``.

    Logs, at the Trainer's ``log_every_n_steps`` (``zclip/<i>/...`` with several optimizers): ``zclip/grad_norm`` and
    ``zclip/grad_norm_clipped``, of that step; ``zclip/threshold``, above which that step was clipped (from the end of
    the warm-up where ``max_grad_norm`` is None, else from the second step at the latest); ``zclip/z_score``, from the
    end of the warm-up; ``zclip/clipped``, the fraction of steps clipped since the last log; ``zclip/skipped``, the
    number of steps with a non-finite norm so far.

    With a fused optimizer, ``nonfinite="skip"`` and no GradScaler, clip and skip are folded into the optimizer's own
    kernel (``optimizer.grad_scale``, ``optimizer.found_inf``): ``parameter.grad`` is scaled in the step, not before.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: in ``setup``, for a second clipper (``gradient_clip_val`` or another ZClip) and for
            FSDP1 and DeepSpeed, which do not show the gradients to a callback; at the start of ``fit``, for LBFGS and
            for embeddings with sparse gradients.
        FloatingPointError: with ``nonfinite="raise"``, on all ranks.

    Example:
        >>> import lightning as L
        >>> from lightning_eff.callbacks import ZClip
        >>> trainer = L.Trainer(max_steps=1, callbacks=[ZClip(z_thresh=3.0, max_grad_norm=None)], logger=False)

    Source: Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", arXiv 2504.02507, and its released
    code where the paper is silent.
    """

    order = Order.CHANGES_GRADIENTS

    def __init__(
        self,
        alpha: float = 0.97,
        z_thresh: float = 2.5,
        max_grad_norm: float | Auto | None = "auto",
        eps: float = 1e-6,
        warmup_steps: int = 25,
        clip_option: ClipOption = "adaptive_scaling",
        clip_factor: float = 1.0,
        skip_update_on_spike: bool = False,
        relearn_after: int | None = 25,
        nonfinite: NonFinite = "zero",
        log_details: bool = False,
    ) -> None:
        self.config = ZClipConfig(
            alpha=alpha,
            z_thresh=z_thresh,
            max_grad_norm=max_grad_norm,
            eps=eps,
            warmup_steps=warmup_steps,
            clip_option=clip_option,
            clip_factor=clip_factor,
            skip_update_on_spike=skip_update_on_spike,
            relearn_after=relearn_after,
        )
        check_choice("nonfinite", nonfinite, NonFinite)
        check_flag("log_details", log_details)
        self.nonfinite: NonFinite = nonfinite
        self.log_details = log_details
        self._states: list[ZClipState] = []
        self._norms: list[int] = []  # that each of them has seen, at most: known without asking the device
        self._folded: dict[int, RemovableHandle] = {}  # optimizer's index -> the hook that ends the folding
        self._warned_of_cap = False
        self._stepped = False  # in this fit

    @property
    def spikes(self) -> list[int]:
        """Outliers clipped so far, for each optimizer. Waits for the device."""
        return [int(state["spikes"]) for state in self._states]

    def spike_count(self) -> Tensor:
        """Outliers and non-finite norms so far, of all optimizers together; 0-d, on the device."""
        return torch.stack([state["spikes"] + state["nonfinite"] for state in self._states]).sum()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.gradient_clip_val:
            raise MisconfigurationException(
                f"ZClip and Trainer(gradient_clip_val={trainer.gradient_clip_val}) would both clip the gradients: "
                "remove gradient_clip_val, or keep it as the cap with ZClip(max_grad_norm=...)"
            )
        if sum(isinstance(callback, ZClip) for callback in callbacks_of(trainer)) > 1:
            raise MisconfigurationException(
                "Two ZClip callbacks would both clip the gradients: keep one; it has statistics for each optimizer"
            )
        refuse_flattened(trainer, "ZClip", "flattens or partitions the gradients and so gives each rank another norm")
        if self.nonfinite != "zero" and gradient_scaler(trainer.strategy) is not None:
            warnings.warn(
                f"ZClip(nonfinite={self.nonfinite!r}) has no effect with a GradScaler, which skips a step with "
                "non-finite gradients itself",
                stacklevel=2,
            )
        sort_callbacks(trainer)
        self._stepped = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizers = trainer.optimizers
        if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
            raise MisconfigurationException(
                "ZClip does not support LBFGS, which evaluates several gradients in one step: use an optimizer that "
                "takes one, such as AdamW or SGD"
            )
        stepped = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        refuse_sparse_gradients(pl_module, stepped, "ZClip")
        if len(self._states) != len(optimizers):
            if self._states:
                warnings.warn(
                    f"ZClip has statistics of {len(self._states)} optimizers and there are {len(optimizers)} now: "
                    "they are learned anew",
                    stacklevel=2,
                )
            self._states = [ZClipState(self.config) for _ in optimizers]
            self._norms = [0] * len(optimizers)
        self._unhook(trainer)  # a replica that takes a peer's state begins once more
        if self.nonfinite == "skip" and gradient_scaler(trainer.strategy) is None:
            for index, optimizer in enumerate(optimizers):
                if _can_fold(optimizer):
                    self._folded[index] = optimizer.register_step_post_hook(_end_folding)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        index = optimizer_index(trainer, optimizer)
        gradients = Gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
        norm = gradients.norm()
        if norm is None:  # training_step returned None
            return
        self._stepped = True
        scaler, scale = gradient_scaler(trainer.strategy), applied_scale(trainer, optimizer)
        if scale is not None:
            norm = norm / scale.to(norm)
        state = self._states[index]
        # Under a GradScaler non-finite gradients must stay: the scaler looks for them, skips and lowers its scale.
        zero = self.nonfinite == "zero" and scaler is None
        coefficient = zclip_update(norm, state, on_nonfinite=0.0 if zero else 1.0)
        self._norms[index] += 1
        if index in self._folded:
            # 32-bit copies, because the kernel reads them as such.
            optimizer.grad_scale = coefficient.reciprocal().float()  # type: ignore[attr-defined]
            optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        elif self.nonfinite in ("skip", "raise") and scaler is None and not torch.isfinite(norm):
            if self.nonfinite == "raise":
                raise FloatingPointError(
                    f"the gradient norm of optimizer {index} is {float(norm)} at global step {trainer.global_step}; "
                    "ZClip(nonfinite='raise') stops here"
                )
            for group in optimizer.param_groups:
                for parameter in group["params"]:  # an optimizer leaves a parameter without gradient as it is
                    parameter.grad = None
        else:
            gradients.scale_(coefficient, zero_nonfinite=zero)
        if logs_now(trainer):
            self._log(pl_module, index)

    def on_trainable_change(self, trainer: Trainer, pl_module: LightningModule, change: TrainableChange) -> None:
        """The norms that follow are of other parameters, unless a resumed run only restores what was trained."""
        if not (change.unfrozen and self._stepped):
            return
        unfrozen = {id(parameter) for parameter in change.unfrozen.values()}
        for optimizer, state in zip(trainer.optimizers, self._states, strict=True):
            if any(id(parameter) in unfrozen for group in optimizer.param_groups for parameter in group["params"]):
                state.change_level()

    def _log(self, pl_module: LightningModule, index: int) -> None:
        state = self._states[index]
        prefix = "zclip" if len(self._states) == 1 else f"zclip/{index}"
        values = {
            "grad_norm": state["norm"],
            "grad_norm_clipped": state["norm_clipped"],
            "clipped": state["recent_clipped"] / state["recent_steps"],
            "skipped": state["nonfinite"],
        }
        # No curve of what there is not yet: a z-score needs the statistics, and a threshold that too, or a cap.
        warm, cap = self._norms[index] > self.config.warmup_steps, self.config.max_grad_norm
        if warm:
            values["z_score"] = state["z_score"]
        if warm or (cap is not None and (cap != "auto" or self._norms[index] > 1)):
            values["threshold"] = state["threshold"]
        if self.log_details:
            values |= {"mean": state["mean"], "std": state["var"].sqrt()}
            values |= {"spikes": state["spikes"], "relearned": state["relearned"]}
        log_values(pl_module, prefix, values)
        for name in ("recent_steps", "recent_clipped", "recent_nonfinite"):
            state[name].zero_()
        self._warn_of_cap(state)

    def _warn_of_cap(self, state: ZClipState) -> None:
        """Say once, where a value is read anyway, that the cap hides the statistics."""
        cap = self.config.max_grad_norm
        if self._warned_of_cap or cap is None or isinstance(cap, str):
            return
        # Norms are high in the first steps of many a healthy run: not before the running mean has forgotten them.
        settled = self.config.warmup_steps + 5 / (1 - self.config.alpha)
        if (state["count"] >= settled) & (state["mean"] > cap):
            self._warned_of_cap = True
            warnings.warn(
                f"the mean gradient norm is {float(state['mean']):.3g}, above ZClip(max_grad_norm={cap}): nearly every "
                "step is clipped at max_grad_norm, as by a fixed clip. Set it to 'auto', or raise it",
                stacklevel=2,
            )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say why no step of the run was clipped, else a user takes ZClip for the cause of what it has not touched."""
        if not self._stepped:
            return
        last = [dict(zip(FIELDS, state.values.tolist(), strict=True)) for state in self._states]
        if not any(values["clipped"] + values["nonfinite"] for values in last):
            steps = max(int(values["count"]) for values in last)
            why = f"no norm of {steps} was an outlier. Lower z_thresh={self.config.z_thresh:g} to clip more"
            if steps <= self.config.warmup_steps:
                why = f"the run ended within warmup_steps={self.config.warmup_steps}. Make it longer, or these fewer"
            rank_zero_info(f"ZClip clipped nothing: {why}")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unhook(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unhook(trainer)

    def _unhook(self, trainer: Trainer) -> None:
        for index, handle in self._folded.items():
            handle.remove()
            if index < len(trainer.optimizers):
                _end_folding(trainer.optimizers[index])
        self._folded = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"version": 1, "optimizers": [state.state_dict() for state in self._states]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_version("ZClip", state_dict, known=1)
        self._states = [ZClipState(self.config) for _ in state_dict["optimizers"]]
        for state, saved in zip(self._states, state_dict["optimizers"], strict=True):
            state.load_state_dict(saved)
        self._norms = [int(state["count"]) for state in self._states]  # on the host until the next norm

    def run_state(self) -> dict[str, Any]:
        """The statistics by reference, and what is known of them on the host."""
        tensors = [{"values": s.values, "norms": s.norms, "since": s.since} for s in self._states]
        return {"optimizers": tensors, "norms": list(self._norms), "stepped": self._stepped}

    def load_run_state(
        self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any], *, within_step: bool
    ) -> None:
        """Go on from it; the tensors move to the gradients' device at the next norm."""
        self._states = [ZClipState(self.config, **tensors) for tensors in state["optimizers"]]
        self._norms, self._stepped = list(state["norms"]), state["stepped"]

    def tensorboard_charts(self, trainer: Trainer) -> dict[str, list[Any]]:
        """Charts for :class:`~lightning_eff.callbacks.TensorBoardLayout`."""
        count = len(trainer.optimizers)
        charts: dict[str, list[Any]] = {}
        for index in range(count):
            prefix, suffix = ("zclip", "") if count == 1 else (f"zclip/{index}", f" ({index})")
            margin = [f"{prefix}/{name}" for name in ("grad_norm", "grad_norm_clipped", "threshold")]
            charts[f"gradient norm, clipped to threshold{suffix}"] = ["Margin", margin]
            charts[f"z-score{suffix}"] = ["Multiline", [f"{prefix}/z_score"]]
            charts[f"steps clipped (share){suffix}"] = ["Multiline", [f"{prefix}/clipped"]]
            charts[f"steps skipped (count){suffix}"] = ["Multiline", [f"{prefix}/skipped"]]
        return charts


def _can_fold(optimizer: Optimizer) -> bool:
    """Whether clip and skip can be left to the optimizer's kernel; with DTensors it takes no plain tensors."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return unscales_itself(optimizer) and not any(is_dtensor(parameter) for parameter in parameters)


def _end_folding(optimizer: Optimizer, *_: Any) -> None:
    for name in ("grad_scale", "found_inf"):
        if hasattr(optimizer, name):
            delattr(optimizer, name)
