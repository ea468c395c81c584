"""FSDP2 for any module."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_eff.arguments import check, check_flag, check_globs, check_text
from lightning_eff.plugins.async_checkpoint.overlap import BATCH, before_updates, overlap_of
from lightning_eff.plugins.sharded_saves import ShardedSaveError, ShardedSaves
from lightning_eff.plugins.sharded_strategy import sharded_optimizer_state, sharded_weights
from lightning_eff.strategies.fsdp2.sharding import broadcast_from_rank_zero, is_sharded, shard
from lightning_eff.strategies.fsdp2.whole_weights import WholeWeights
from lightning_eff.training.namespaces import MisconfigurationException, overrides
from lightning_eff.training.optimizer_state import allow_absent_states

# Lightning asks an instance of ModelParallelStrategy, but no string.
_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")

if TYPE_CHECKING:
    _Base = ModelParallelStrategy
else:
    _Base = object


class FSDP2(_Base):
    """What :class:`FSDP2Strategy` does, to be put before the ``ModelParallelStrategy`` of either name of Lightning."""

    def __init__(
        self,
        forward_methods: list[str] | None = None,
        exclude: list[str] | None = None,
        reshard_after_forward: bool = True,
        save_distributed_checkpoint: bool = True,
        async_save: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        names = forward_methods is None or (
            isinstance(forward_methods, list | tuple)
            and all(isinstance(name, str) and name.isidentifier() for name in forward_methods)
        )
        check("forward_methods", forward_methods, names, "a list of names of the module's methods, or None")
        check_globs("exclude", exclude)
        check_flag("reshard_after_forward", reshard_after_forward)
        check_flag("save_distributed_checkpoint", save_distributed_checkpoint)
        check_flag("async_save", async_save)
        check_text("process_group_backend", process_group_backend, optional=True)
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.forward_methods = list(forward_methods or ())
        self.exclude = list(exclude or ())
        self.reshard_after_forward = reshard_after_forward
        self._own_saves = self.sharded_saves = ShardedSaves(timeout)
        """By what it saves, if it ``saves_later``."""
        self.saves_later = save_distributed_checkpoint and async_save
        self._whole: WholeWeights | None = None
        self._has_buffers = False
        self._handle: RemovableHandle | None = None
        allow_absent_states(self)

    # --- the module -------------------------------------------------------------------------------------------------

    @override
    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        self._data_parallel_size = self.world_size

    @override
    def setup(self, trainer: Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        self._check(module)
        if not is_sharded(module):
            self.precision_plugin.convert_module(module)
            mesh = self.device_mesh["data_parallel"]
            blocks = shard(module, mesh, self.root_device, self.exclude, self.reshard_after_forward)
            WholeWeights(module, self.forward_methods)
            rank_zero_info(
                f"FSDP2 shards {len(blocks)} blocks{f', {blocks[0]} to {blocks[-1]},' if blocks else ''} and the rest "
                f"as one, over {self.world_size} ranks"
            )
        elif WholeWeights.of(module) is None and (self.forward_methods or self.exclude):
            rank_zero_warn(
                f"{type(module).__name__} has sharded itself: forward_methods and exclude of {type(self).__name__} "
                "have no effect"
            )
        self._whole = WholeWeights.of(module)
        if self._whole is not None:
            self._whole.before_step = self._share_buffers
        self._has_buffers = any(True for _ in module.buffers())
        self._own_saves.overlap = overlap_of(trainer, BATCH)  # a strategy does not see an epoch's end
        self._handle = self._handle or before_updates(lambda: self._settle(BATCH))
        lacks = not overrides(module, "configure_model")
        if lacks:  # Lightning asks for one
            module.configure_model = _nothing  # type: ignore[method-assign]
        try:
            super().setup(trainer)
        finally:
            if lacks:
                del module.configure_model

    def _check(self, module: LightningModule) -> None:
        if self.precision_plugin.precision not in _PRECISIONS:
            raise MisconfigurationException(
                f"{type(self).__name__} does not support precision={self.precision_plugin.precision!r}: it must be one "
                f"of {', '.join(map(repr, _PRECISIONS))}, as for ModelParallelStrategy"
            )
        for name in self.forward_methods:
            what = f"names of methods of {type(module).__name__}, which has no {name}"
            check("forward_methods", self.forward_methods, callable(getattr(module, name, None)), what)

    def _share_buffers(self) -> None:
        """As DDP does before each forward pass."""
        if self._has_buffers:
            assert self.lightning_module is not None
            broadcast_from_rank_zero(self.lightning_module.buffers())

    # --- backward passes and updates within a step: manual optimization ---------------------------------------------

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        if self._whole is not None:
            self._whole.backward_reduces(closure_loss)
        loss: Tensor = super().backward(closure_loss, optimizer, *args, **kwargs)
        if self._whole is not None:
            self._whole.refresh()
        return loss

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self._whole is not None:
            self._whole.refresh()
        return result

    # --- checkpoints ------------------------------------------------------------------------------------------------

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._whole is not None:
            self._share_buffers()  # any rank may write them
        if not self.saves_later:
            return super().lightning_module_state_dict()  # type: ignore[no-any-return]
        return sharded_weights(self.model)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if not self.saves_later:
            return super().optimizer_state(optimizer)  # type: ignore[no-any-return]
        return sharded_optimizer_state(self.model, optimizer)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None) -> None:
        if not self.saves_later or storage_options is not None:  # which Lightning refuses
            super().save_checkpoint(checkpoint, filepath, storage_options)
        else:
            self.sharded_saves.save(checkpoint, filepath)

    @override
    def on_validation_start(self) -> None:
        self._settle()

    def before_weights_change(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See ``hooks.ReadsWeights``."""
        self._settle()

    def _settle(self, *kinds: str) -> None:
        self._own_saves.settle()
        if self._own_saves.overlap is not None:
            self._own_saves.overlap.time_is_over(*kinds)

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        if self.saves_later:
            self.sharded_saves.remove(filepath)
        else:
            super().remove_checkpoint(filepath)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        self.sharded_saves.flush()
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
        return checkpoint

    @override
    def on_train_end(self) -> None:
        """Behind the callbacks, which may have saved."""
        self.sharded_saves.flush()

    @override
    def teardown(self) -> None:
        failing = sys.exc_info()[1]
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._own_saves.overlap = None
        try:
            self.sharded_saves.close()
        except ShardedSaveError as error:
            if failing is None:
                raise
            rank_zero_warn(str(error))  # beside the exception that ends the run
        finally:
            super().teardown()


class FSDP2Strategy(FSDP2, ModelParallelStrategy):
    """FSDP2 on any ``LightningModule``, by name: ``Trainer(strategy="fsdp2")``.

    Shards weights, gradients and optimizer state over all ranks. A module needs no ``configure_model``; one that has
    sharded itself there is taken as it is. The repeated blocks are sharded one by one, and gathered when they are
    called; all that lies outside of them is gathered while a step of the module runs, so that tied weights, parameters
    of the module itself and such as are read by functions are whole where they are read. All ranks begin with the
    weights of rank zero, and buffers are those of rank zero, as under DDP.

    Checkpoints are folders with a file for each rank, written while training goes on (``plugins.ShardedSaves``), in
    Lightning's own form.

    ``fully_shard`` puts a class of its own before the module's: ``type(module).__name__`` begins with "FSDP", while
    ``isinstance`` is as before.

    Args:
        forward_methods: names of further methods of the module that read weights, such as ``["generate"]``. A weight is
            only a shard where another method than these and the steps meets it, and an error says so.
        exclude: globs of blocks that are not sharded by themselves, because their weights are read outside of their
            forward pass. They are sharded with the rest.
        reshard_after_forward: gives a block's weights back after its forward pass, and gathers them anew for the
            backward pass. False saves that time and keeps the whole weights in between.
        save_distributed_checkpoint: True: a folder with a file for each rank. False: rank zero gathers everything and
            writes one file, which other strategies and ``load_from_checkpoint`` load.
        async_save: folders are written in the background. False: training waits, as in Lightning.
        process_group_backend: None for that of the device.
        timeout: of a collective; None for torch's.

    Raises:
        ValueError: an argument that is not allowed; in ``setup`` a name or a glob that fits nothing.
        MisconfigurationException: in ``setup``, for a parameter without dimensions, for trainable parameters of several
            types in a block or in the rest, and for ``precision="16-mixed"``.

    Example:
        >>> from lightning_eff.strategies import FSDP2Strategy
        >>> FSDP2Strategy(forward_methods=["generate"]).forward_methods
        ['generate']

    Source: PyTorch's ``fully_shard`` and ``torch.distributed.checkpoint``; Lightning's ``ModelParallelStrategy``.
    """


def _nothing() -> None:
    """Stands for a hook that there is nothing to do in."""
