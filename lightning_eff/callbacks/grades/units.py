"""Which units of a model can be frozen, and which parameters are closed when some of them are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer

from lightning_eff.structure import clean_named_parameters, find_blocks, select_matrices
from lightning_eff.training.dtensor import reshard


class FreezableUnits:
    """The matrices (or LoRA pairs) that patterns select, of those that are trained; and the prefix of the network.

    Args:
        module: with its parameters in place, all of them open that the run trains.
        optimizers: units that none of them steps are left out.
        include: as in ``select_matrices``.
        exclude: as in ``select_matrices``.
        prefix: globs on clean names of the parameters before the blocks; None closes no prefix.

    Raises:
        MisconfigurationException: patterns that select nothing or nothing that is trained; a prefix without blocks, or
            tied to another part of the network.
    """

    def __init__(
        self,
        module: LightningModule,
        optimizers: Sequence[Optimizer],
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        prefix: Sequence[str] | None,
    ) -> None:
        reshard(module)
        self.parameters = clean_named_parameters(module)
        stepped = {id(p): i for i, o in enumerate(optimizers) for group in o.param_groups for p in group["params"]}
        self.trained = {name for name, p in self.parameters.items() if p.requires_grad and id(p) in stepped}
        try:
            selected = select_matrices(module, include, exclude)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self.matrices = [matrix for matrix in selected if self.trained.issuperset(matrix.parameters)]
        if not self.matrices:
            names = ", ".join(matrix.name for matrix in selected[:10])
            raise MisconfigurationException(f"no selected matrix is trained by an optimizer: {names}")
        self.names = [matrix.name for matrix in self.matrices]
        self.optimizer = [stepped[id(self.parameters[matrix.parameters[0]])] for matrix in self.matrices]
        """The optimizer's number of each unit."""
        self._prefix: list[str] = []
        self._blocks: list[str] = []
        if prefix is not None:
            self._prefix = _prefix_names(module, self.parameters, prefix)
            self._blocks = [block.name for block in find_blocks(module)]
            if not self._blocks:
                raise MisconfigurationException(f"prefix={list(prefix)!r}: the model has no repeated blocks behind it")

    def tensors(self) -> list[dict[str, nn.Parameter]]:
        """The parameters of each unit, by name."""
        return [{name: self.parameters[name] for name in matrix.parameters} for matrix in self.matrices]

    def closed(self, frozen: Collection[str]) -> set[str]:
        """The names of the parameters that are not trained when these units are frozen.

        Where every trained matrix of the first blocks is frozen, the prefix and the rest of these blocks (norms,
        biases) are closed as well, so that the backward pass ends behind them.
        """
        closed = {name for matrix in self.matrices if matrix.name in frozen for name in matrix.parameters}
        whole = []
        for block in self._blocks:
            inside = {name for name in self.trained if name.startswith(f"{block}.")}
            if any(self.parameters[name].ndim >= 2 for name in inside - closed):
                break
            whole.append(inside)
        if whole:
            closed.update(self.trained.intersection(self._prefix), *whole)
        return closed

    def leaves_nothing(self, closed: Collection[str]) -> bool:
        """Whether no parameter would be trained any more."""
        return self.trained.issubset(closed)

    def elements(self, names: Collection[str]) -> int:
        """How many numbers these parameters have."""
        return sum(self.parameters[name].numel() for name in names)


def _prefix_names(module: nn.Module, parameters: Collection[str], patterns: Sequence[str]) -> list[str]:
    found: list[str] = []
    for pattern in patterns:
        matching = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matching:
            some = ", ".join(list(parameters)[:20])
            raise MisconfigurationException(f"prefix={pattern!r} matches no parameter. The first are: {some}")
        found += matching
    by_name = dict(module.named_parameters(remove_duplicate=False))
    chosen = {id(by_name[name]) for name in by_name if _clean(name) in found}
    tied = [name for name, p in by_name.items() if id(p) in chosen and not _matches(_clean(name), patterns)]
    if tied:
        raise MisconfigurationException(
            f"prefix={list(patterns)!r}: a matching parameter is tied to {tied[0]!r}, which would be closed with it: "
            "leave it out"
        )
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _clean(name: str) -> str:
    return name.replace("_orig_mod.", "")
