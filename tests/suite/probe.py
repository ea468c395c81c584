"""A callback without any use that keeps the whole contract: the suite's own test, and a pattern to start from."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_eff.training.state_version import check_version


class Probe(L.Callback):
    """Shrinks the gradients a little more at every step, and averages their norm.

    Runs in: ``on_before_optimizer_step``.
    Reads: the gradients.
    Changes: the gradients.
    Collectives: none on one device and under DDP; one all-reduce a step under FSDP2.
    Host syncs: none.
    Strategies: one device, DDP, FSDP2.

    Args:
        slope: how much more a gradient shrinks with every step, >= 0.
        form: of the decay.
    """

    def __init__(self, slope: float = 0.01, form: Literal["linear", "square"] = "linear") -> None:
        if not slope >= 0:
            raise ValueError(f"slope={slope!r} is not allowed: it must be at least 0")
        if form not in ("linear", "square"):
            raise ValueError(f"form={form!r} is not allowed: it must be linear or square")
        self.slope = slope
        self.form = form
        self.steps: list[Tensor] = []
        self.norms: list[Tensor] = []

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.gradient_clip_val:
            raise MisconfigurationException("gradient_clip_val clips what the probe shrinks: remove one of them")

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if len(self.steps) != len(trainer.optimizers):
            self.steps = [torch.zeros(()) for _ in trainer.optimizers]
            self.norms = [torch.zeros(()) for _ in trainer.optimizers]
        device = trainer.strategy.root_device
        self.steps, self.norms = ([value.to(device) for value in values] for values in (self.steps, self.norms))

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        index = next(i for i, other in enumerate(trainer.optimizers) if other is optimizer)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        finite = norm.isfinite()
        norm = torch.where(finite, norm, 0.0)
        # A step that a GradScaler drops leaves no trace.
        self.steps[index] += finite
        self.norms[index] += torch.where(finite, (norm - self.norms[index]) / self.steps[index].clamp(min=1), 0.0)
        factor = 1 / (1 + self.slope * self.steps[index] * (self.norms[index] if self.form == "square" else 1))
        for gradient in gradients:
            (gradient.to_local() if hasattr(gradient, "to_local") else gradient).mul_(factor)
        prefix = "probe" if len(self.steps) == 1 else f"probe/{index}"
        pl_module.log(f"{prefix}/norm", norm.clone(), on_step=True, on_epoch=False, batch_size=1)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "version": 1,
            "steps": [step.clone() for step in self.steps],
            "norms": [norm.clone() for norm in self.norms],
        }

    def run_state(self) -> dict[str, Any]:
        return {"steps": list(self.steps), "norms": list(self.norms)}

    def load_run_state(
        self, trainer: L.Trainer, pl_module: L.LightningModule, state: dict[str, Any], *, within_step: bool
    ) -> None:
        self.load_state_dict(state)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_version("Probe", state_dict, known=1)
        self.steps = [step.clone() for step in state_dict["steps"]]
        self.norms = [norm.clone() for norm in state_dict["norms"]]
