"""Which units of a model can be frozen, and which parameters are frozen with them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_eff.structure import clean_named_parameters, find_blocks, select_matrices
from lightning_eff.structure.select import listed, select
from lightning_eff.training.dtensor import reshard
from lightning_eff.training.namespaces import MisconfigurationException
from lightning_eff.training.trainer import refuse_sparse_gradients


class FreezableUnits:
    """The matrices (or LoRA pairs) that patterns select, of those that are trained; and the prefix of the network.

    Args:
        module: with its parameters in place, all of them unfrozen that the run trains.
        optimizers: units that none of them steps are left out.
        include: as in ``select_matrices``.
        exclude: as in ``select_matrices``.
        prefix: globs on clean names of the parameters before the blocks; None freezes no prefix.

    Raises:
        MisconfigurationException: patterns that select nothing or nothing that is trained; sparse gradients; a prefix
            without blocks, or tied to another part of the network.
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
        numbered = [pair for o in optimizers for pair in enumerate(o.param_groups)]
        groups = {id(p): number for number, group in numbered for p in group["params"]}
        self.trained = {name for name, p in self.parameters.items() if p.requires_grad and id(p) in stepped}
        try:
            selected = select_matrices(module, include, exclude)
        except ValueError as error:
            raise MisconfigurationException(f"GradES: {error}") from error
        self.matrices = [matrix for matrix in selected if self.trained.issuperset(matrix.parameters)]
        if not self.matrices:
            names = listed([matrix.name for matrix in selected], limit=10)
            raise MisconfigurationException(
                f"GradES: no selected matrix is trained by an optimizer: {names}. Select others with include"
            )
        self.names = [matrix.name for matrix in self.matrices]
        watched = [self.parameters[name] for matrix in self.matrices for name in matrix.parameters]
        refuse_sparse_gradients(module, watched, "GradES")
        self.optimizer = [stepped[id(self.parameters[matrix.parameters[0]])] for matrix in self.matrices]
        """The optimizer's number of each unit."""
        self._group = {name: groups[id(self.parameters[name])] for each in self.matrices for name in each.parameters}
        self._prefix: list[str] = []
        self._blocks: list[str] = []
        if prefix is not None:
            self._prefix = _prefix_names(module, self.parameters, prefix)
            self._blocks = [block.name for block in find_blocks(module)]
            if not self._blocks:
                raise MisconfigurationException(
                    f"GradES(prefix={list(prefix)!r}): the model has no repeated blocks behind it"
                )

    def tensors(self) -> list[dict[str, nn.Parameter]]:
        """The parameters of each unit, by name."""
        return [{name: self.parameters[name] for name in matrix.parameters} for matrix in self.matrices]

    def rates(self, optimizer: Optimizer) -> dict[str, float | Tensor]:
        """The present learning rate of each parameter in the units, by name; 1 where a group has none of its own.

        Args:
            optimizer: one of the Trainer's; for parameters of another the rates mean nothing.
        """
        found = [group.get("lr") for group in optimizer.param_groups]
        rates = [1.0 if rate is None else rate for rate in found]  # an Adafactor that finds its own has None
        return {name: rates[number] for name, number in self._group.items() if number < len(rates)}

    def frozen_parameters(self, units: Collection[str]) -> set[str]:
        """The names of the parameters that are not trained when these units are frozen.

        Where every trained matrix of the first blocks is frozen, the prefix and the rest of these blocks (norms,
        biases) are frozen as well, so that the backward pass ends behind them.
        """
        frozen = {name for matrix in self.matrices if matrix.name in units for name in matrix.parameters}
        whole = []
        for block in self._blocks:
            inside = {name for name in self.trained if name.startswith(f"{block}.")}
            if any(self.parameters[name].ndim >= 2 for name in inside - frozen):
                break
            whole.append(inside)
        if whole:
            frozen.update(self.trained.intersection(self._prefix), *whole)
        return frozen

    def leaves_nothing(self, frozen: Collection[str]) -> bool:
        """Whether no parameter would be trained any more."""
        return self.trained.issubset(frozen)

    def elements(self, names: Collection[str]) -> int:
        """How many numbers these parameters have."""
        return sum(self.parameters[name].numel() for name in names)


def _prefix_names(module: nn.Module, parameters: Collection[str], patterns: Sequence[str]) -> list[str]:
    try:
        found = select(list(parameters), patterns, "prefix", "parameter")
    except ValueError as error:
        raise MisconfigurationException(f"GradES: {error}") from error
    by_name = {name.replace("_orig_mod.", ""): p for name, p in module.named_parameters(remove_duplicate=False)}
    chosen = {id(by_name[name]) for name in found}
    others = [name for name, p in by_name.items() if id(p) in chosen and name not in found]
    tied = [name for name in others if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    if tied:
        raise MisconfigurationException(
            f"GradES(prefix={list(patterns)!r}): a matching parameter is tied to {tied[0]!r}, which would be frozen "
            "with it: leave it out"
        )
    return found
