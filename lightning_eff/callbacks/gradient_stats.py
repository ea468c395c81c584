"""What gradients look like: norm, extremes, zeros and what is not a number, by role and by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_eff.arguments import check_count, check_flag, check_globs
from lightning_eff.functional.gradients import as_real, is_dtensor, local_grad
from lightning_eff.kernels.tensor_stats import tensor_stats
from lightning_eff.structure import clean_named_parameters, find_blocks
from lightning_eff.structure.select import select
from lightning_eff.training.dtensor import reshard
from lightning_eff.training.host_copy import HostCopy
from lightning_eff.training.state_version import check_version
from lightning_eff.training.trainer import (
    applied_scale,
    log_values,
    logs_now,
    optimizer_index,
    refuse_flattened,
    refuse_sparse_gradients,
)

NUMBERS = ("norm", "max_abs", "zeros", "nonfinite")
TOTAL = ""  # the group that every parameter belongs to
OUTSIDE = "outside"  # the layer of what lies in no block


class GradientStats(Callback):
    """Logs the norm of the gradients, the largest element, the share of zeros and of elements that are not finite.

    For all parameters together and for each role (``attention``, ``ffn``, ``other``: found by shape), as
    ``gradients/norm`` and ``gradients/attention/norm``; with ``log_details`` for each of the repeated blocks too. What
    is logged is what the optimizer would get before it is clipped: it comes before all that changes gradients.

    Runs in: ``on_before_optimizer_step``, ``on_train_batch_end``.
    Reads: the gradients.
    Changes: nothing.
    Collectives: with sharded gradients (FSDP2) two all-reduces of a few numbers on a step that is measured; else none.
    Host syncs: one on a step that is logged, for all numbers together.
    Strategies: all but FSDP1 and DeepSpeed.

    Args:
        every_n_steps: steps of an optimizer between two measurements, >= 1. One of them takes one pass over the
            gradients. What was measured last is logged at the Trainer's ``log_every_n_steps``.
        include: patterns of parameter names; None for all.
        exclude: patterns of those that are left out again; None for none.
        log_details: also log each block.

    Raises:
        ValueError: an argument out of its range; in ``on_train_start``, a pattern that matches nothing.
        MisconfigurationException: in ``setup`` or ``on_train_start``, for a strategy that flattens gradients, and for
            sparse gradients.

    Example:
        >>> import lightning as L
        >>> from lightning_eff.callbacks import GradientStats
        >>> trainer = L.Trainer(max_steps=1, callbacks=[GradientStats(every_n_steps=10)], logger=False)

    Source: ours.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        log_details: bool = False,
    ) -> None:
        check_count("every_n_steps", every_n_steps)
        check_globs("include", include)
        check_globs("exclude", exclude)
        check_flag("log_details", log_details)
        self.every_n_steps = every_n_steps
        self.include = include
        self.exclude = exclude
        self.log_details = log_details
        self._counts: list[int] = []  # steps of each optimizer
        self._measured: dict[int, HostCopy] = {}  # by the optimizer's index
        self._groups: list[str] = []
        self._groups_of: dict[nn.Parameter, list[int]] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_flattened(trainer, "GradientStats", "flattens or partitions the gradients")
            self._measured = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reshard(pl_module)  # what FSDP2 shows while it is gathered is another object
        parameters = clean_named_parameters(pl_module)
        everything = list(parameters)
        names = everything if self.include is None else select(everything, self.include, "include", "parameter")
        out = [] if self.exclude is None else select(everything, self.exclude, "exclude", "parameter")
        chosen = {name: parameters[name] for name in names if name not in out}
        refuse_sparse_gradients(pl_module, chosen.values(), "GradientStats")
        self._group(pl_module, chosen)
        if len(self._counts) != len(trainer.optimizers):
            self._counts = [0] * len(trainer.optimizers)
            self._measured = {}
        self._measured = {n: copy for n, copy in self._measured.items() if len(copy.source) == len(self._groups)}

    def _group(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        """Which groups each parameter belongs to: a table, made once."""
        blocks = find_blocks(module)
        roles = {name: matrix.role for block in blocks for matrix in block.matrices for name in matrix.parameters}
        self._groups, self._groups_of = [TOTAL], {}
        for name, parameter in parameters.items():
            layer = next((block.name for block in blocks if name.startswith(f"{block.name}.")), OUTSIDE)
            groups = [TOTAL, roles.get(name, "other"), *([layer] if self.log_details else [])]
            self._groups += [group for group in groups if group not in self._groups]
            self._groups_of[parameter] = [self._groups.index(group) for group in groups]

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        index = optimizer_index(trainer, optimizer)
        self._counts[index] += 1
        if self._counts[index] % self.every_n_steps == 0:
            found = self._measure(optimizer, applied_scale(trainer, optimizer))
            if found is not None:
                self._measured[index] = HostCopy(found)

    @torch.no_grad()
    def _measure(self, optimizer: Optimizer, scale: Tensor | None) -> Tensor | None:
        """The numbers of each group, (groups, 4); what is not there is NaN."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p in self._groups_of]
        found = [(p, local_grad(p)) for p in parameters]
        pairs = [(p, as_real(gradient)) for p, gradient in found if gradient is not None and gradient.numel()]
        if not pairs:
            return None
        gradients = [gradient for _, gradient in pairs]
        device = gradients[0].device
        _, squares, _, largest, zeros, nonfinite = tensor_stats(gradients, extremes=True)
        assert largest is not None
        assert zeros is not None
        assert nonfinite is not None
        counts = torch.tensor([gradient.numel() for gradient in gradients], dtype=squares.dtype)
        sums = torch.stack([squares, zeros, nonfinite, counts.to(device, non_blocking=True)], dim=1)
        sharded = any(is_dtensor(p) for p, _ in pairs)
        if sharded:
            sums = sums / sums.new_tensor([_copies(p) for p, _ in pairs])[:, None]
        belongs = torch.zeros(len(self._groups), len(pairs), dtype=torch.bool)
        for column, (parameter, _) in enumerate(pairs):
            belongs[self._groups_of[parameter], column] = True
        belongs = belongs.to(device, non_blocking=True)
        # Not a product of matrices: what is not a number would spread to the other groups.
        totals = torch.where(belongs[:, :, None], sums, 0.0).sum(1)
        extremes = torch.where(belongs, largest, 0.0).amax(1)
        if sharded:
            dist.all_reduce(totals)
            dist.all_reduce(extremes, dist.ReduceOp.MAX)
        norms = totals[:, 0].sqrt()
        if scale is not None:
            norms, extremes = norms / scale.to(norms), extremes / scale.to(norms)
        return torch.stack([norms, extremes, totals[:, 1] / totals[:, 3], totals[:, 2] / totals[:, 3]], dim=1)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not logs_now(trainer):
            return
        for index, copy in self._measured.items():
            prefix = "gradients" if len(trainer.optimizers) == 1 else f"gradients/{index}"
            for group, numbers in zip(self._groups, copy.read().numpy(), strict=True):
                if numbers[2] == numbers[2]:  # a group of which the optimizer has no parameter has no share of zeros
                    name = f"{prefix}/{group}" if group else prefix
                    log_values(pl_module, name, dict(zip(NUMBERS, numbers, strict=True)))

    @override
    def state_dict(self) -> dict[str, Any]:
        # Measured, and perhaps logged only behind the checkpoint.
        measured = {index: copy.source for index, copy in self._measured.items()}
        return {"version": 1, "steps": list(self._counts), "measured": measured}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_version("GradientStats", state_dict, known=1)
        self._counts = list(state_dict["steps"])
        self._measured = {index: HostCopy(found) for index, found in state_dict.get("measured", {}).items()}

    def tensorboard_charts(self, trainer: Trainer) -> dict[str, list[Any]]:
        """Charts for :class:`~lightning_eff.callbacks.TensorBoardLayout`."""
        count = len(trainer.optimizers)
        prefixes = ["gradients"] if count == 1 else [f"gradients/{index}" for index in range(count)]
        words = {"norm": "norm of the gradients"}
        words |= {f"{role}/norm": f"norm: {role}" for role in ("attention", "ffn", "other")}
        words |= {"zeros": "zeros (share)", "nonfinite": "not finite (share)"}
        return {
            title if count == 1 else f"{title} ({index})": ["Multiline", [f"{prefix}/{name}"]]
            for index, prefix in enumerate(prefixes)
            for name, title in words.items()
        }


def _copies(parameter: Tensor) -> int:
    """How many of the ranks, over which is added up, hold the same part of a parameter."""
    ranks = dist.get_world_size()
    if not is_dtensor(parameter):
        return ranks
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    parts = 1
    for size, placement in zip(mesh.shape, placements, strict=True):
        parts *= 1 if placement.is_replicate() else size
    return max(1, ranks // parts)
