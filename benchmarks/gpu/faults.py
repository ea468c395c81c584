"""One planted fault for each part of benchmarks/gpu.sh: a part that does not see its fault sees nothing.

`GPU_FAULT=smoke bash benchmarks/gpu.sh --small smoke` must fail. As a plugin of pytest it is planted in its parts.
"""

from __future__ import annotations

import os
from typing import Any

import torch


def _wrong_by_a_thousandth(module: Any, name: str) -> None:
    right = getattr(module, name)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        return (
            result * 1.001
            if isinstance(result, torch.Tensor)
            else type(result)(*(r if r is None else r * 1.001 for r in result))
        )

    setattr(module, name, wrong)


def _environment() -> None:
    os.environ["LIGHTNING_EFF_KERNELS"] = "reference" if torch.cuda.is_available() else "triton"


def _norm() -> None:
    from lightning_eff.kernels import grad_norm

    _wrong_by_a_thousandth(grad_norm, "sum_of_squares")


def _stats() -> None:
    from lightning_eff.kernels import tensor_stats

    _wrong_by_a_thousandth(tensor_stats, "tensor_stats")


def _moc() -> None:
    from lightning_eff.kernels import moc

    right = moc.activate
    # Of the four results that one which the down projection reads.
    moc.activate = lambda *args: tuple(r * 1.001 if place == 3 else r for place, r in enumerate(right(*args)))  # type: ignore[return-value]


def _reference() -> None:
    from lightning_eff.kernels.grad_norm import reference

    _wrong_by_a_thousandth(reference, "sum_of_squares")


def _zclip_norm() -> None:
    from lightning_eff.functional import gradients

    _wrong_by_a_thousandth(gradients.grad_norm, "sum_of_squares")


def _forgets_its_state() -> None:
    from lightning_eff.callbacks import ZClip

    ZClip.state_dict = lambda self: {}  # type: ignore[method-assign]


def _is_another_alone() -> None:
    """In this process, and not in the ranks that it starts."""
    from lightning_eff.callbacks import ZClip

    right = ZClip.on_before_optimizer_step

    def wrong(self: Any, trainer: Any, module: Any, optimizer: Any) -> None:
        right(self, trainer, module, optimizer)
        for parameter in module.parameters():
            parameter.grad.mul_(0.5)

    ZClip.on_before_optimizer_step = wrong  # type: ignore[method-assign]


def _explodes() -> None:
    from lightning_eff.callbacks import ZClip

    def wrong(self: Any, trainer: Any, module: Any, optimizer: Any) -> None:
        for parameter in module.parameters():
            parameter.data.fill_(float("nan"))

    ZClip.on_before_optimizer_step = wrong  # type: ignore[method-assign]


def _waits() -> None:
    from lightning_eff.callbacks import ZClip

    right = ZClip.on_before_optimizer_step

    def wrong(self: Any, trainer: Any, module: Any, optimizer: Any) -> None:
        right(self, trainer, module, optimizer)
        next(iter(module.parameters())).grad.sum().item()

    ZClip.on_before_optimizer_step = wrong  # type: ignore[method-assign]


def _wrong_rank() -> None:
    from lightning_eff.compression import comm_hook

    right = comm_hook.hook

    def wrong(reduction, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return right(reduction, bucket).then(lambda done: done.value() * (2.0 if rank == world - 1 else 1.0))

    comm_hook.hook = wrong


def _aliases() -> None:
    from lightning_eff.training.snapshots import SnapshotWindow

    def take(self: Any, step: int, tensors: Any) -> None:
        self.steps, self._snapshots = [*self.steps, step], [*self._snapshots, dict(tensors)]

    SnapshotWindow.take = take  # type: ignore[method-assign]


def _cut_short() -> None:
    from lightning_eff.kernels import grad_norm

    right = grad_norm.sum_of_squares
    grad_norm.sum_of_squares = lambda tensors: right(
        [tensor.flatten()[: 2**31 if len(tensor) > 2**31 else 2**16] for tensor in tensors]
    )


FAULTS = {
    "environment": _environment, "smoke": _norm, "tests_kernels": _reference, "bench": _stats,
    "suite": _forgets_its_state,
    "zclip": _zclip_norm, "steps": _explodes, "syncs": _waits, "gloo": _wrong_rank, "nccl": _wrong_rank,
    "suite_ranks": _is_another_alone, "fsdp2": _zclip_norm, "snapshots": _aliases, "big": _cut_short,
    "sanitizer": _norm, "compile": _reference, "layers": _moc,
}  # fmt: skip


def plant(part: str) -> None:
    """Break what the part is to find broken."""
    FAULTS[part]()


def pytest_configure(config: Any) -> None:
    """As a plugin: `-p benchmarks.gpu.faults`."""
    if fault := os.environ.get("GPU_FAULT"):
        plant(fault)
