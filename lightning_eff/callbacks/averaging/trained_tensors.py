"""Which tensors of a model an average can differ from: those that the run has trained."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_eff.functional.gradients import is_dtensor
from lightning_eff.structure import clean_named_parameters
from lightning_eff.training.dtensor import local, reshard
from lightning_eff.training.run_parts import is_expanded


@dataclass
class _Table:
    """What a step needs to know of a model as long as its parameters are the objects that they are."""

    untrained: dict[str, nn.Parameter]  # that could be trained and have not been
    sharded: list[FSDPModule]
    dtensors: dict[str, nn.Parameter]  # of the trained ones
    parts: dict[str, Tensor]  # of the trained ones: a plain parameter itself, this rank's part of a DTensor
    pointers: list[int]  # to the memory of those parts

    def look(self) -> dict[str, Tensor]:
        """The parts, another dict only if a DTensor's memory is another."""
        pointers = [parameter._local_tensor.data_ptr() for parameter in self.dtensors.values()]  # type: ignore[attr-defined]
        if pointers != self.pointers:
            self.pointers = pointers
            self.parts = self.parts | {name: local(parameter) for name, parameter in self.dtensors.items()}
        return self.parts


class TrainedTensors:
    """Floating-point parameters that have been trained since the run began, and buffers on request, by clean names.

    A frozen parameter is its own average; one that is frozen during the run is kept, as it has moved before.

    Args:
        buffers: whether floating-point buffers belong to them.
    """

    def __init__(self, buffers: bool) -> None:
        self.buffers = buffers
        self.names: set[str] = set()
        self._module: weakref.ref[LightningModule] | None = None  # of the run
        self._known: dict[str, nn.Parameter] = {}  # its parameters when `follow` looked
        self._table: _Table | None = None

    def begin(self, module: LightningModule, names: Iterable[str]) -> None:
        """A run begins: ``names`` are those that it has trained before."""
        self.names = set(names)
        self.names |= {name for name, p in clean_named_parameters(module).items() if p.requires_grad}
        self._module = weakref.ref(module)
        self._known = _usable(module)
        self._table = None

    def are_of(self, module: LightningModule) -> bool:
        """Whether it is the model of the run."""
        return self._module is not None and self._module() is module

    def follow(self, module: LightningModule) -> tuple[dict[str, str], set[str]]:
        """Notice what others have renamed (pruning does) or replaced (a new head) since the last look.

        Returns:
            New names of parameters by their old ones, and the names of those that are there no longer. Another
            parameter in the place of such a one is trained for the first time, see `unfrozen_by_others`.
        """
        before, self._known = self._known, _usable(module)
        names = {id(parameter): name for name, parameter in self._known.items()}
        gone = {name for name, parameter in before.items() if id(parameter) not in names}
        renamed = {name: names[id(parameter)] for name, parameter in before.items() if name not in gone}
        renamed = {old: new for old, new in renamed.items() if old != new}
        if renamed or gone or len(before) < len(names):
            self.names = {renamed.get(name, name) for name in self.names - gone}
            self._table = None
        return renamed, gone

    def unfreeze(self, name: str, parameter: Tensor) -> bool:
        """A parameter is trained from now on; True if for the first time, and it can be averaged."""
        if name in self.names or not _can_be_averaged(parameter):
            return False
        self.names.add(name)
        self._table = None
        return True

    def unfrozen_by_others(self, module: LightningModule) -> dict[str, nn.Parameter]:
        """What requires a gradient and has not been trained, as far as this knows; to be looked at before an update.

        A parameter's ``requires_grad`` is anybody's to set, a fine-tuning callback's for instance, and nobody is told.
        """
        return {name: p for name, p in self._of_run(module).untrained.items() if p.requires_grad}

    def every(self, module: LightningModule) -> dict[str, Tensor]:
        """This rank's part of each tensor that could be trained."""
        return {name: local(tensor) for name, tensor in self.originals(module).items() if _can_be_averaged(tensor)}

    def of(self, module: LightningModule) -> dict[str, Tensor]:
        """And of those that are."""
        parameters = clean_named_parameters(module)
        every = self.every(module)
        return {name: tensor for name, tensor in every.items() if name in self.names or name not in parameters}

    def now(self, module: LightningModule) -> dict[str, Tensor]:
        """The same in a step, without a search: the same dict as the last time while its tensors are the same."""
        if self.buffers:  # which may be other objects every time
            return self.of(module)
        table = self._of_run(module)
        for part in table.sharded:
            part.reshard()
        return table.look()

    def _of_run(self, module: LightningModule) -> _Table:
        if self._table is None:
            usable = _usable(module)
            trained = {name: parameter for name, parameter in usable.items() if name in self.names}
            untrained = {name: parameter for name, parameter in usable.items() if name not in self.names}
            sharded: list[FSDPModule] = [part for part in module.modules() if isinstance(part, FSDPModule)]
            dtensors = {name: parameter for name, parameter in trained.items() if is_dtensor(parameter)}
            self._table = _Table(untrained, sharded, dtensors, {**trained}, [])
        return self._table

    def originals(self, module: LightningModule) -> dict[str, Tensor]:
        """The parameters and, on request, buffers themselves."""
        reshard(module)
        named: dict[str, Tensor] = {**clean_named_parameters(module)}
        if self.buffers:
            named |= {name.replace("_orig_mod.", ""): buffer for name, buffer in module.named_buffers()}
        return named

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_module": None, "_known": {}, "_table": None}


def _usable(module: LightningModule) -> dict[str, nn.Parameter]:
    reshard(module)
    return {name: p for name, p in clean_named_parameters(module).items() if _can_be_averaged(p)}


def _can_be_averaged(tensor: Tensor) -> bool:
    numbers = tensor.is_floating_point() or tensor.is_complex()
    return numbers and tensor.layout == torch.strided and not is_expanded(tensor)
