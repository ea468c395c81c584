"""Which gradients a list of parameters has on this rank, their global norm, and scaling them in place.

Plain tensors and DTensors (FSDP2, tensor parallelism) may be mixed. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_eff.arguments import check, check_instance
from lightning_eff.kernels import grad_norm
from lightning_eff.kernels.tables import to_device
from lightning_eff.kernels.tensor_stats import tensor_stats

Sharding = tuple[Any, tuple[int, ...]]
"""A device mesh, and those of its dimensions that a DTensor is cut along."""

_Part = tuple[Sharding | None, torch.device]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, without importing ``torch.distributed.tensor`` for those who have none.

    Args:
        tensor: any.

    Example:
        >>> is_dtensor(torch.ones(2))
        False
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def statistics_dtype(device: torch.device) -> torch.dtype:
    """Dtype of statistics kept on ``device``: float64, or float32 where there is no float64 (MPS).

    Args:
        device: where the statistics are.

    Example:
        >>> statistics_dtype(torch.device("cpu"))
        torch.float64
    """
    check_instance("device", device, torch.device, "a torch.device")
    return torch.float32 if device.type == "mps" else torch.float64


def local_grad(parameter: Tensor) -> Tensor | None:
    """The gradient that this rank holds: a DTensor's local shard, everything else as it is.

    It shares memory with ``parameter.grad``, so that an in-place change is a change of the gradient.

    Args:
        parameter: plain or DTensor, with a gradient or without.

    Raises:
        TypeError: for a sparse gradient or a DTensor gradient that still awaits its reduction (``Partial``).

    Example:
        >>> parameter = nn.Parameter(torch.ones(2))
        >>> local_grad(parameter) is None
        True
        >>> parameter.sum().backward()
        >>> local_grad(parameter)
        tensor([1., 1.])
    """
    grad = parameter.grad
    if grad is None:
        return None
    if grad.layout != torch.strided:
        raise TypeError(
            f"the gradient of a parameter of shape {tuple(parameter.shape)} is sparse ({grad.layout}); "
            "only dense gradients are supported: build the embedding with sparse=False"
        )
    if type(grad) is Tensor or not is_dtensor(grad):
        return grad
    if any(placement.is_partial() for placement in grad.placements):  # type: ignore[attr-defined]
        raise TypeError(
            f"the gradient of a parameter of shape {tuple(parameter.shape)} is a DTensor with placements "
            f"{grad.placements}, which is not reduced yet: redistribute it first"  # type: ignore[attr-defined]
        )
    with torch.no_grad():
        return grad.to_local()  # type: ignore[attr-defined, no-any-return]


class Gradients:
    """The gradients of a list of parameters in one step, read in one walk for a norm and a scaling.

    Args:
        parameters: leaf tensors of any shapes, devices and floating or complex dtypes.

    Raises:
        TypeError: as ``local_grad`` does.

    Example:
        >>> parameter = nn.Parameter(torch.zeros(2))
        >>> parameter.grad = torch.tensor([3.0, 4.0])
        >>> gradients = Gradients([parameter])
        >>> gradients.norm()
        tensor(5., dtype=torch.float64)
        >>> gradients.scale_(torch.tensor(0.5))
        >>> parameter.grad
        tensor([1.5000, 2.0000])
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        parts = _read([parameters])
        self._parts = [(*part, grad_norm.read(grads)) for part, (_, grads) in parts.items()]

    def norm(self) -> Tensor | None:
        """L2 norm over all ranks that share them, a 0-d float64 tensor (float32 on MPS), equal on all ranks.

        Accumulated in float32 (float64 for float64 tensors) whatever the tensors' own dtype, since a norm taken in
        float16 overflows and one taken in bfloat16 has three digits; over tensors in float64. On a GPU one kernel reads
        them all once, see :mod:`lightning_eff.kernels.grad_norm`. For collectives see ``squared_grad_norms``.

        Returns:
            None where there is nothing to measure: no parameter has a gradient and none is a DTensor.
        """
        sums = []
        for sharding, device, listed in self._parts:
            square = grad_norm.sum_of_squares(listed) if listed.numels else _nothing(device)
            sums.append(sum_over_ranks_(square, sharding))
        total = _added(sums)
        return None if total is None else total.sqrt()

    def scale_(self, coefficient: Tensor, *, zero_nonfinite: bool = False) -> None:
        """Multiply every gradient in place by a 0-d tensor, without reading it on the host.

        Args:
            coefficient: 0-d tensor.
            zero_nonfinite: the coefficient is 0 where an element is NaN or infinite, and the result is to be 0 and not
                the NaN of ``inf * 0``. One more pass over the tensors; the kernel, which never reads them for a
                coefficient of 0 nor at all for one of 1, needs none, nor does a CPU.
        """
        for _, device, listed in self._parts:
            grad_norm.scale_(listed, coefficient.to(device), zero_nonfinite=zero_nonfinite)


def squared_grad_norms(groups: Sequence[Iterable[Tensor]]) -> Tensor | None:
    """Squared L2 norm of the gradients of each group of parameters over all ranks that share them.

    Plain gradients are taken as they are: under DDP they are equal on all ranks after the reduction. For DTensors the
    squares of the local shards are summed with one all-reduce of a number for each group, for each sharded dimension of
    each device mesh; dimensions that replicate are left out, so that HSDP is not counted once for each replica. Which
    collectives are issued depends on the parameters alone, so a rank without a gradient takes part as well.

    Args:
        groups: leaf tensors of any shapes and floating dtypes.

    Returns:
        A float64 tensor (float32 on MPS) of shape (len(groups),), equal on all ranks, 0 for a group without gradients,
        or None where there is nothing to measure: no parameter has a gradient and none is a DTensor.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> model(torch.tensor([3.0, 4.0])).backward()
        >>> squared_grad_norms([[model.weight], [model.bias]])
        tensor([25.,  1.], dtype=torch.float64)
    """
    sums = []
    for (sharding, device), (owners, grads) in _read(groups).items():
        squares = tensor_stats(grads).squared_l2 if grads else _nothing(device).expand(0)
        if owners != list(range(len(groups))):
            squares = torch.cat([squares, _nothing(device).view(1)])
            squares = squares[_members(tuple(owners), len(groups), device)].sum(1)
        sums.append(sum_over_ranks_(squares, sharding))
    return _added(sums)


def _read(groups: Sequence[Iterable[Tensor]]) -> dict[_Part, tuple[list[int], list[Tensor]]]:
    """For parameters cut alike on one device the numbers of the groups, and the gradients, of those that have one.

    Complex gradients are taken as pairs of reals. A DTensor without a gradient counts too: its rank takes part.
    """
    parts: dict[_Part, tuple[list[int], list[Tensor]]] = {}
    part: _Part | tuple[None, None] = None, None
    owners: list[int] = []
    grads: list[Tensor] = []
    for number, group in enumerate(groups):
        for parameter in group:
            grad = parameter.grad
            if type(grad) is not Tensor or grad.layout != torch.strided:  # else it is what local_grad would say
                grad = local_grad(parameter)
            sharding = None if type(parameter) is nn.Parameter else sharding_of(parameter)
            if grad is None and sharding is None:
                continue
            device = parameter.device
            if sharding != part[0] or device != part[1]:
                part = sharding, device
                owners, grads = parts.setdefault(part, ([], []))
            if grad is not None:
                owners.append(number)
                grads.append(as_real(grad) if grad.is_complex() else grad)
    return parts


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as a view of pairs of reals, everything else as it is.

    Args:
        tensor: any.

    Example:
        >>> as_real(torch.tensor([1 + 2j]))
        tensor([[1., 2.]])
    """
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def sharding_of(parameter: Tensor) -> Sharding | None:
    """How a DTensor is cut; None for a plain tensor.

    Args:
        parameter: plain or DTensor.

    Example:
        >>> sharding_of(nn.Parameter(torch.ones(2))) is None
        True
    """
    if not is_dtensor(parameter):
        return None
    placements = parameter.placements  # type: ignore[attr-defined]
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    return mesh, tuple(dim for dim, placement in enumerate(placements) if placement.is_shard())


def sum_over_ranks_(numbers: Tensor, sharding: Sharding | None) -> Tensor:
    """Add up in place what each rank has for its shards; collective for each dimension that is sharded.

    Args:
        numbers: of any shape, equal on all ranks; changed in place.
        sharding: of :func:`sharding_of`; None: nothing is to be added.

    Returns:
        The same tensor.

    Example:
        >>> sum_over_ranks_(torch.ones(2), sharding=None)
        tensor([1., 1.])
    """
    if sharding is not None:
        check("sharding", sharding, type(sharding) is tuple and len(sharding) == 2, "of `sharding_of`, or None")
        mesh, dims = sharding
        for dim in dims:
            torch.distributed.all_reduce(numbers, group=mesh.get_group(dim))
    return numbers


def _added(parts: Sequence[Tensor]) -> Tensor | None:
    """On the first one's device; None without any."""
    if not parts:
        return None
    first, *others = parts
    return sum((part.to(first.device) for part in others), first)


def _nothing(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=statistics_dtype(device), device=device)


@functools.lru_cache(16)
def _members(owners: tuple[int, ...], groups: int, device: torch.device) -> Tensor:
    """The places in a list of each group's members, of shape (groups, most members); its length stands for none.

    A sum over these is in a fixed order, which adding each to its group on a GPU is not.
    """
    members: list[list[int]] = [[] for _ in range(groups)]
    for place, owner in enumerate(owners):
        members[owner].append(place)
    most = max(map(len, members))
    table = [[*places, *[len(owners)] * (most - len(places))] for places in members]
    return to_device(torch.tensor(table), torch.int64, device)


def sparse_gradients(module: nn.Module) -> dict[str, Tensor]:
    """The parameters whose gradients are sparse by the layers' own setting, ``nn.Embedding(sparse=True)``, by name.

    Args:
        module: whose layers are asked; no gradient has to be there.

    Example:
        >>> list(sparse_gradients(nn.Sequential(nn.Embedding(3, 2, sparse=True), nn.Linear(2, 3))))
        ['0.weight']
    """
    check_instance("module", module, nn.Module, "an nn.Module")
    return {
        f"{name}.weight" if name else "weight": part.weight
        for name, part in module.named_modules()
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse
    }
