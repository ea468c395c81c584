"""What MISA samples: single matrices or whole layers, and what is trained beside them; what it measures of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_eff.structure import Matrix, clean_named_parameters, describe_selection, select_matrices
from lightning_eff.structure.select import listed, select
from lightning_eff.training.dtensor import reshard
from lightning_eff.training.namespaces import MisconfigurationException
from lightning_eff.training.trainer import refuse_sparse_gradients

Granularity = Literal["module", "layer"]


class ModuleUnits:
    """The units of a model, of those parameters that can be trained and that an optimizer steps.

    Args:
        module: with its parameters in place, all of them unfrozen that may be trained at any time.
        optimizers: one of them steps all units.
        granularity: ``"module"``: each matrix (or LoRA pair) by itself. ``"layer"``: the matrices of a block together,
            with its vectors (norms, biases); a matrix outside the blocks by itself.
        include: as in ``select_matrices``.
        exclude: as in ``select_matrices``.
        always: globs on clean names of parameters that are no units and always trained.

    Raises:
        MisconfigurationException: patterns that select nothing or nothing that is trained; sparse gradients; units of
            several optimizers.
    """

    def __init__(
        self,
        module: LightningModule,
        optimizers: Sequence[Optimizer],
        granularity: Granularity,
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        always: Sequence[str] | None,
    ) -> None:
        reshard(module)
        self.parameters = clean_named_parameters(module)
        self.total = sum(parameter.numel() for parameter in self.parameters.values())
        owners = {id(p): i for i, o in enumerate(optimizers) for group in o.param_groups for p in group["params"]}
        trained = {name for name, p in self.parameters.items() if p.requires_grad and id(p) in owners}
        try:
            selected = select_matrices(module, include, exclude)
        except ValueError as error:
            raise MisconfigurationException(f"MISA: {error}") from error
        matrices = [matrix for matrix in selected if trained.issuperset(matrix.parameters)]
        numbers = {owners[id(self.parameters[name])] for matrix in matrices for name in matrix.parameters}
        if len(numbers) > 1:
            raise MisconfigurationException(
                f"MISA: the sampled matrices belong to {len(numbers)} optimizers, and it would be ambiguous whose "
                "steps an interval counts: select those of one with include=[...]; the others are left as they are"
            )
        try:
            self.always = set(select(sorted(trained), always or (), "always", "trained parameter"))
        except ValueError as error:
            raise MisconfigurationException(f"MISA: {error}") from error
        matrices = [matrix for matrix in matrices if not self.always & set(matrix.parameters)]
        if not matrices:
            names = listed([matrix.name for matrix in selected], limit=10)
            raise MisconfigurationException(
                "MISA: no selected matrix is left to sample: each is frozen, in no optimizer, or always trained: "
                f"{names}"
            )
        sampled = [self.parameters[name] for matrix in matrices for name in matrix.parameters]
        refuse_sparse_gradients(module, sampled, "MISA")
        self.units = _grouped(matrices, granularity, trained - self.always, self.parameters)
        """Name of each unit -> the names of its parameters."""
        self.matrices = [matrix.name for matrix in matrices]
        self.selection = describe_selection(module, matrices)
        """What is sampled and what is not, in words."""
        (self.optimizer,) = numbers
        """The number of the optimizer that steps the units."""
        mine = {name for name in trained if owners[id(self.parameters[name])] == self.optimizer}
        self.never = mine - self.always - {name for names in self.units.values() for name in names}
        """Parameters of that optimizer that are frozen for the whole fit."""

    @property
    def names(self) -> list[str]:
        """Of the units, in the model's order."""
        return list(self.units)

    @property
    def sizes(self) -> list[int]:
        """Elements of each unit, on all ranks together."""
        return [sum(self.parameters[name].numel() for name in names) for names in self.units.values()]

    def tensors(self, active: Collection[int]) -> list[list[nn.Parameter]]:
        """The parameters of some units."""
        names = list(self.units.values())
        return [[self.parameters[name] for name in names[index]] for index in active]

    def trainable(self, active: Collection[int]) -> dict[str, bool]:
        """Which parameters are trained, and which are not, while these units are active."""
        units = enumerate(self.units.values())
        wanted = {name: index in active for index, names in units for name in names}
        return wanted | dict.fromkeys(self.never, False)


class StepMeans:
    """Means over steps of a number for each of a list of units; a step with a number that is not finite is left out.

    Adding never waits for the device.
    """

    def __init__(self, units: int) -> None:
        self._sums = torch.zeros(units, dtype=torch.float64)
        self._steps = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Take one step's values, of shape (units,)."""
        finite = values.isfinite().all()
        if self._sums.device != values.device:
            self._sums, self._steps = (t.to(values.device, values.dtype) for t in (self._sums, self._steps))
        self._sums = self._sums + torch.where(finite, values, 0.0)
        self._steps = self._steps + finite

    def means(self) -> list[float]:
        """NaN without a step. Waits for the device."""
        return (self._sums / self._steps).tolist()  # type: ignore[no-any-return]

    def state_dict(self, *, by_reference: bool = False) -> dict[str, Tensor]:
        """All that is needed to go on exactly: copies on the host, or the tensors themselves."""
        state = {"sums": self._sums, "steps": self._steps}
        return state if by_reference else {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state of as many units."""
        self._sums, self._steps = state["sums"].clone(), state["steps"].clone()


def _grouped(
    matrices: Sequence[Matrix], granularity: Granularity, free: Collection[str], order: dict[str, nn.Parameter]
) -> dict[str, tuple[str, ...]]:
    if granularity == "module":
        return {matrix.name: matrix.parameters for matrix in matrices}
    units: dict[str, list[str]] = {}
    for matrix in matrices:
        units.setdefault(matrix.block or matrix.name, []).extend(matrix.parameters)
    for block in {matrix.block for matrix in matrices} - {""}:
        units[block] += [name for name in free if name.startswith(f"{block}.") and order[name].ndim < 2]
    places = {name: place for place, name in enumerate(order)}
    return {name: tuple(sorted(members, key=places.__getitem__)) for name, members in units.items()}
