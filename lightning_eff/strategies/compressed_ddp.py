"""DDP whose gradients are compressed on the way between the ranks."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_eff.functional import compression
from lightning_eff.functional.compression import ArcTopK, Compressor
from lightning_eff.functional.compression.reduction import CompressedReduction, Traffic, hook
from lightning_eff.functional.structure import clean_named_parameters
from lightning_eff.training.rank_state import RankState

_REFUSED = ("ddp_comm_hook", "ddp_comm_state", "ddp_comm_wrapper", "model_averaging_period")


class CompressedDDPStrategy(DDPStrategy):
    """DDP that averages gradients with a compressor, on gloo and on NCCL.

    Everything else is as in Lightning's ``DDPStrategy``: clipping, ZClip and GradScalers see the reduced gradients,
    and an accumulated gradient is compressed once, when it is complete.

    Args:
        compressor: what is sent; None for ``ArcTopK()``.
        bucket_cap_mb: size of DDP's buckets in MiB; None chooses it from the model, such that communication begins
            early and overlaps with the backward pass.
        kwargs: of ``DDPStrategy`` and ``DistributedDataParallel``.

    Raises:
        ValueError: a communication hook or model averaging beside the compressor, or ``find_unused_parameters`` with
            error feedback: what is fed back to a parameter that no rank has used would be lost.

    Example:
        >>> CompressedDDPStrategy(compressor=ArcTopK(ratio=0.1)).compressor.ratio
        0.1
    """

    def __init__(self, compressor: Compressor | None = None, bucket_cap_mb: float | None = None, **kwargs: Any) -> None:
        for name in _REFUSED:
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}={kwargs[name]!r} is not allowed: the compressor is the communication hook")
            kwargs.pop(name, None)
        compressor = ArcTopK() if compressor is None else compressor
        if not isinstance(compressor, Compressor):
            raise ValueError(f"compressor={compressor!r} is not allowed: it must be a Compressor, such as ArcTopK()")
        if kwargs.get("find_unused_parameters") and compressor.keeps_memory:
            raise ValueError(
                f"find_unused_parameters=True is not allowed with {compressor}: DDP drops what is fed back to a "
                "parameter that no rank has used. Use every parameter in every step, or error_feedback='none'"
            )
        if bucket_cap_mb is not None and not bucket_cap_mb > 0:
            raise ValueError(f"bucket_cap_mb={bucket_cap_mb!r} is not allowed: it must be above 0, or None")
        super().__init__(**kwargs)
        self.compressor = compressor
        self.bucket_cap_mb = bucket_cap_mb
        self._reduction: CompressedReduction | None = None
        self._restored: dict[str, Any] | None = None
        self._rank_state = RankState("error_feedback", save=self._save, load=self._load)

    @property
    def traffic(self) -> Traffic:
        """What was sent in this run."""
        return Traffic() if self._reduction is None else self._reduction.traffic

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self.compressor.keeps_memory:
            self._rank_state.attach(self)

    @override
    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        kwargs = self._ddp_kwargs
        self._ddp_kwargs = {**kwargs, "bucket_cap_mb": self.bucket_cap_mb or _bucket_cap(model)}
        try:
            return super()._setup_model(model)
        finally:
            self._ddp_kwargs = kwargs

    @override
    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        module = self.lightning_module
        assert module is not None
        parameters = clean_named_parameters(module)
        reduction = CompressedReduction(self.compressor, parameters, self._steps_done, self._loss_scale)
        self._reduction = reduction
        self.model.register_comm_hook(reduction, hook)

    def _steps_done(self) -> int:
        module = self.lightning_module
        assert module is not None
        return module.trainer.global_step

    def _loss_scale(self) -> Tensor | None:
        scaler = getattr(self.precision_plugin, "scaler", None)
        if scaler is None or not scaler.is_enabled():
            return None
        scale: Tensor = scaler.scale(torch.ones((), device=self.root_device))
        return scale

    def _save(self) -> dict[str, Any]:
        return {}

    def _load(self, state: dict[str, Any] | None) -> None:
        self._restored = state


def compressed_ddp(compressor: str, start_method: Literal["popen", "spawn", "fork", "forkserver"]) -> DDPStrategy:
    """What a strategy string builds: the compressor with its defaults."""
    return CompressedDDPStrategy(getattr(compression, compressor)(), start_method=start_method)


def _bucket_cap(model: nn.Module) -> float:
    """MiB of a bucket: small enough for a dozen of them, large enough to keep the collectives few."""
    numbers = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return min(25.0, max(0.5, numbers / 2**20 / 12))
