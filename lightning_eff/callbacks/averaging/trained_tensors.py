"""Which tensors of a model an average can differ from: those that the run has trained."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_eff.structure import clean_named_parameters
from lightning_eff.training.dtensor import local, reshard


class TrainedTensors:
    """Floating-point parameters that have been trained since the run began, and buffers on request, by clean names.

    A frozen parameter is its own average; one that is closed during the run is kept, as it has moved before.

    Args:
        buffers: whether floating-point buffers belong to them.
    """

    def __init__(self, buffers: bool) -> None:
        self.buffers = buffers
        self.names: set[str] = set()
        self._found: dict[str, nn.Parameter] | None = None

    def begin(self, module: LightningModule, names: Iterable[str]) -> None:
        """A run begins: ``names`` are those that it has trained before."""
        self.names = set(names)
        self.names |= {name for name, p in clean_named_parameters(module).items() if p.requires_grad}
        self._found = None

    def open(self, name: str, parameter: Tensor) -> bool:
        """A parameter is trained from now on; True if for the first time, and it can be averaged."""
        if name in self.names or not _can_be_averaged(parameter):
            return False
        self.names.add(name)
        self._found = None
        return True

    def every(self, module: LightningModule) -> dict[str, Tensor]:
        """This rank's part of each tensor that could be trained."""
        reshard(module)
        named: dict[str, Tensor] = {**clean_named_parameters(module)}
        if self.buffers:
            named |= {_clean(name): buffer for name, buffer in module.named_buffers()}
        return {name: local(tensor) for name, tensor in named.items() if _can_be_averaged(tensor)}

    def of(self, module: LightningModule) -> dict[str, Tensor]:
        """And of those that are."""
        parameters = clean_named_parameters(module)
        every = self.every(module)
        return {name: tensor for name, tensor in every.items() if name in self.names or name not in parameters}

    def again(self, module: LightningModule) -> dict[str, Tensor]:
        """The same during a run, where parameters stay the objects that they are, without a search at every step."""
        if self._found is None or self.buffers:  # a buffer may be another object every time
            tensors = self.of(module)
            parameters = clean_named_parameters(module)
            self._found = {name: parameters[name] for name in tensors if name in parameters}
            return tensors
        reshard(module)
        return {name: local(parameter) for name, parameter in self._found.items()}

    def originals(self, module: LightningModule) -> dict[str, Tensor]:
        """The parameters and buffers themselves."""
        buffers = {_clean(name): buffer for name, buffer in module.named_buffers()}
        return {**buffers, **clean_named_parameters(module)}

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_found": None}


def _clean(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _can_be_averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
