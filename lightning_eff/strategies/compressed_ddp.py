"""DDP whose gradients are compressed on the way between the ranks."""

from __future__ import annotations

import atexit
import inspect
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Self, override

from lightning_eff import compression
from lightning_eff.arguments import check, check_flag, check_number
from lightning_eff.compression import ArcTopK, Compressor, predict
from lightning_eff.compression.comm_hook import CompressedReduction, Traffic, hook
from lightning_eff.compression.exchange import Memory
from lightning_eff.compression.plan import bucket_cap_mb, in_memory_order
from lightning_eff.structure import clean_named_parameters
from lightning_eff.training.namespaces import MisconfigurationException
from lightning_eff.training.rank_state import RankState
from lightning_eff.training.state_version import check_version
from lightning_eff.training.trainable import TrainableChange
from lightning_eff.training.trainer import gradient_scaler

_REFUSED = ("ddp_comm_hook", "ddp_comm_state", "ddp_comm_wrapper", "model_averaging_period")

_ALLOWED = {
    name
    for constructor in (DDPStrategy.__init__, DistributedDataParallel.__init__)
    for name, parameter in inspect.signature(constructor).parameters.items()
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD
} - {"self", "module", *_REFUSED}


if TYPE_CHECKING:
    _Base = DDPStrategy
else:
    _Base = object


class CompressedDDP(_Base):
    """What :class:`CompressedDDPStrategy` does, to be put before the ``DDPStrategy`` of either name of Lightning."""

    def __init__(self, compressor: Compressor | None = None, bucket_cap_mb: float | None = None, **kwargs: Any) -> None:
        for name in _REFUSED:
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}={kwargs[name]!r} is not allowed: the compressor is the communication hook")
            kwargs.pop(name, None)
        for name, value in kwargs.items():
            check(name, value, name in _ALLOWED, "left out: neither DDPStrategy nor DistributedDataParallel knows it")
        compressor = ArcTopK() if compressor is None else compressor
        if not isinstance(compressor, Compressor):
            raise ValueError(f"compressor={compressor!r} is not allowed: it must be a Compressor, such as ArcTopK()")
        check_flag("find_unused_parameters", kwargs.get("find_unused_parameters", False))
        check_number("bucket_cap_mb", bucket_cap_mb, above=0, optional=True, unit="MiB")
        if kwargs.get("find_unused_parameters") and compressor.error_feedback != "none":
            raise ValueError(
                f"find_unused_parameters=True is not allowed with error_feedback={compressor.error_feedback!r}: DDP "
                "drops what is fed back to a parameter that no rank has used. Use every parameter in every step, or "
                f"{type(compressor).__name__}(error_feedback='none')"
            )
        super().__init__(**kwargs)
        self.compressor = compressor
        self.bucket_cap_mb = bucket_cap_mb
        self._reduction: CompressedReduction | None = None
        self._trained: nn.Module | None = None
        self._restored: Memory | None = None
        self._rank_state = RankState("compression", save=self._save, load=self._load)

    @property
    def traffic(self) -> Traffic:
        """What was sent since the first `fit` of this strategy."""
        return Traffic() if self._reduction is None else self._reduction.traffic

    @property
    def memory(self) -> Memory:
        """What the compressor and its error feedback keep from step to step on this rank, by parameter name."""
        return {} if self._reduction is None else self._reduction.memory

    def measure(self) -> None:
        """Let the next step also measure what it leaves out; see :meth:`relative_error`."""
        if self._reduction is not None:
            self._reduction.measure_next = True

    def relative_error(self) -> Tensor | None:
        """Of the last step that was measured, the norm of what was not sent divided by that of what was to be sent.

        Over all ranks: collective. None if no step was measured.
        """
        if self._reduction is None or self._reduction.left_out is None:
            return None
        had, unsent = self.reduce(self._reduction.left_out.clone(), reduce_op="sum")
        error: Tensor = (unsent / had.clamp(min=torch.finfo(had.dtype).tiny)).sqrt()
        return error

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        atexit.unregister(_leave_group)  # once, however often the strategy is set up
        atexit.register(_leave_group)
        if self.compressor.keeps_memory:
            self._rank_state.attach(self)

    @override
    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        sparse = [name for name, module in model.named_modules() if getattr(module, "sparse", False) is True]
        if sparse:
            raise MisconfigurationException(
                f"{sparse[0]} has sparse gradients, which {type(self).__name__} does not support: build it with "
                "sparse=False"
            )
        kwargs = self._ddp_kwargs
        self._ddp_kwargs = {**kwargs, "bucket_cap_mb": self.bucket_cap_mb or bucket_cap_mb(_gradient_bytes(model))}
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
        before = self._reduction if self._trained is module else None
        self._reduction = CompressedReduction(self.compressor, parameters, self._steps_done, self._loss_scale)
        if before is not None:  # another `fit` of the same model, or its buckets are made anew
            self._reduction.memory, self._reduction.traffic = before.memory, before.traffic
        elif self.world_size > 1:
            self._warn_if_useless({name: p for name, p in parameters.items() if p.requires_grad})
        if self._restored is not None:
            self._reduction.memory, self._restored = self._restored, None
        _move(self._reduction.memory, self.root_device)
        self._trained = module
        self.model.register_comm_hook(self._reduction, hook)

    def on_trainable_change(self, trainer: Trainer, pl_module: LightningModule, change: TrainableChange) -> None:
        """Forget the parameters that are no longer trained; the buckets have been made anew without them."""
        for name in change.frozen:
            self.memory.pop(name, None)

    @override
    def teardown(self) -> None:
        _move(self.memory, torch.device("cpu"))
        super().teardown()

    def _warn_if_useless(self, parameters: dict[str, nn.Parameter]) -> None:
        shapes = {name: in_memory_order(parameter) for name, parameter in parameters.items()}
        dtype = next(iter(parameters.values())).dtype
        if not predict(self.compressor, shapes, self.world_size, dtype).compressed:
            rank_zero_warn(
                f"{self.compressor} compresses no parameter of this model at {self.world_size} ranks: each is too "
                "small, or would take as many bytes. Everything is reduced dense; `lightning-eff advise link` compares"
            )

    def _steps_done(self) -> int:
        assert self.lightning_module is not None
        return int(self.lightning_module.trainer.global_step)

    def _loss_scale(self) -> Tensor | None:
        scaler = gradient_scaler(self)
        if scaler is None or not scaler.is_enabled():
            return None
        scale: Tensor = scaler.scale(torch.ones((), device=self.root_device))  # its scale, without waiting for it
        return scale

    def _save(self) -> dict[str, Any]:
        return {"version": 1, "compressor": self._identity(), "memory": self.memory}

    def _load(self, state: dict[str, Any] | None) -> None:
        self._restored = {}
        if state is None:  # RankState has warned
            return
        check_version(type(self).__name__, state, known=1)
        if state["compressor"] != self._identity():
            rank_zero_warn(
                f"the checkpoint's error memory is of {state['compressor']}, the strategy has {self._identity()}: the "
                "memory starts anew"
            )
            return
        self._restored = state["memory"]

    def run_state(self) -> dict[str, Any]:
        """What goes back with a run: this rank's error memory."""
        return {"memory": self.memory}

    def load_run_state(
        self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any], *, within_step: bool
    ) -> None:
        """Go back to it."""
        if self._reduction is not None:
            self._reduction.memory = state["memory"]

    def _identity(self) -> str:
        """What a memory can be used with."""
        return f"{type(self.compressor).__name__}(error_feedback={self.compressor.error_feedback!r})"

    @classmethod
    def by_string(
        cls,
        compressor: str,
        start_method: Literal["popen", "spawn", "fork", "forkserver"],
        find_unused_parameters: bool = False,
    ) -> Self:
        """What a string stands for: a compressor with its defaults, but for error feedback with unused parameters."""
        chosen: Compressor = getattr(compression, compressor)()
        if find_unused_parameters and chosen.error_feedback != "none":
            chosen = getattr(compression, compressor)(error_feedback="none")
        return cls(chosen, start_method=start_method, find_unused_parameters=find_unused_parameters)


class CompressedDDPStrategy(CompressedDDP, DDPStrategy):
    """DDP that averages gradients with a compressor, on gloo and on NCCL.

    Everything else is as in Lightning's ``DDPStrategy``: clipping, ZClip and GradScalers see the reduced gradients,
    and an accumulated gradient is compressed once, when it is complete.

    Args:
        compressor: what is sent; None for ``ArcTopK()``.
        bucket_cap_mb: size of DDP's buckets in MiB; None chooses it from the model, such that communication begins
            early and overlaps with the backward pass.
        kwargs: of ``DDPStrategy`` and ``DistributedDataParallel``.

    Raises:
        ValueError: an argument out of its range or of neither of the two; a communication hook or model averaging
            beside the compressor; ``find_unused_parameters`` with error feedback, since what is fed back to a parameter
            that no rank has used would be lost.

    Example:
        >>> CompressedDDPStrategy(compressor=ArcTopK(ratio=0.1)).compressor.ratio
        0.1
    """


def _leave_group() -> None:
    """At the end of the process: gloo's threads must be joined before the libraries go, or it aborts now and then.

    Lightning does the same for NCCL.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def _move(memory: Memory, device: torch.device) -> None:
    for entry in memory.values():
        for key, tensor in entry.items():
            entry[key] = tensor.to(device)


def _gradient_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
