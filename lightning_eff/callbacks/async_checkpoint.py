"""AsyncCheckpoint as a Lightning callback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_eff.arguments import check_choice, check_count, check_flag, check_number, readable_size
from lightning_eff.plugins.async_checkpoint import AsyncCheckpointIO
from lightning_eff.plugins.async_checkpoint.overlap import (
    BATCH,
    LAST_VALIDATION,
    VALIDATION,
    Overlap,
    before_updates,
    overlap_of,
    owned_by,
)
from lightning_eff.plugins.sharded_saves import ShardedSaves
from lightning_eff.plugins.sharded_strategy import SavesLater, saves_in_shards
from lightning_eff.training.dtensor import local
from lightning_eff.training.hooks import Order
from lightning_eff.training.namespaces import MisconfigurationException, both, is_a
from lightning_eff.training.snapshots import free_host_memory
from lightning_eff.training.trainer import callbacks_of, sort_callbacks
from lightning_eff.training.wrapping import Wrapper

WhenBusy = Literal["wait", "skip"]
OnError = Literal["raise", "warn"]

BUFFERS = 2


class _Report(NamedTuple):
    """What the rank that writes tells the others."""

    behind: int
    lost: list[int]
    busy: bool
    error: str | None


class AsyncCheckpoint(Callback):
    """Saves whenever the Trainer saves, while training goes on: no checkpoint is half written, missing or out of turn.

    A save copies the state into one of two buffers in host memory, and a thread of rank zero writes it: under another
    name, with a checksum for each tensor, to the disk, and then under its own name. The file is an ordinary ``.ckpt``
    that loads without this package; ``lightning-eff verify FILE`` and every load under this callback look at the
    checksums.

    Where each rank saves its shards (FSDP2), each has two buffers and a thread, and the folder takes its name when all
    ranks have written (``plugins.sharded_saves``). It is Lightning's own.

    What ``ModelCheckpoint`` saves, links and removes keeps its order: a link is made, and an older checkpoint removed,
    when the newer one is on disk, and neither behind a save that failed or was left out. Everything is on disk when
    ``fit`` ends, fails, or is ended by ``Preemption``.

    Weights and optimizer state are copied while the next forward and backward run, and are complete before the next
    optimizer step; all else is copied at once. A fit's first save behind a batch, and the first behind a validation,
    are copied at once too, and compared with the weights before the next step: what others than optimizers have written
    by then is never copied late. Whoever writes weights in between calls the hook ``before_weights_change``, as the
    suite's callbacks do; a save that meets such a write in place all the same fails and says so, except for one through
    ``.data``, which nobody sees.

    Runs in: in front of ``Trainer.save_checkpoint`` and of every ``Optimizer.step``; ``on_train_batch_end`` once, to
    get its memory; ``on_validation_start``, ``on_train_epoch_start`` and ``on_train_epoch_end`` end a copy;
    ``on_train_end``, ``on_fit_end``, ``on_exception`` flush.
    Reads: what a checkpoint holds.
    Changes: nothing; how the strategy saves while ``fit`` runs.
    Collectives: one broadcast of a few bytes in each save and at the end of the fit; none in a step. Where ranks write
    shards one more in each save, and those of ``torch.distributed.checkpoint`` in threads, with groups of their own.
    Host syncs: none in a step, but for those of the one comparison.
    Strategies: one device, DDP and its kin, compressed ones, ``ddp_ft``, and FSDP2 (``ModelParallelStrategy``), whose
    ranks write their shards so too; FSDP's sharded checkpoints and DeepSpeed are refused.

    Args:
        when_busy: when both buffers are still being written, a save waits for one (``"wait"``) or is left out
            (``"skip"``): the state of that step is then in no file.
        on_error: when a save has failed, all ranks raise inside the next save and at the end of the fit
            (``"raise"``), or rank zero warns there (``"warn"``).
        retries: how often a save that a disk refused is tried again, >= 0.
        retry_seconds: between two attempts, >= 0.
        check_loads: look at all checksums of a checkpoint before ``fit`` resumes from it, which reads it once more.
        overlap: copy weights and optimizer state while training goes on. False: all of it within the save, for a run in
            which somebody writes weights now and then by other means than an optimizer.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: in ``setup``, for two of these callbacks, for another ``CheckpointIO`` and for a
            strategy whose shards it does not write.
        RuntimeError: a checkpoint could not be written, or is damaged where it is loaded.

    Example:
        >>> import lightning as L
        >>> from lightning_eff.callbacks import AsyncCheckpoint
        >>> trainer = L.Trainer(callbacks=[AsyncCheckpoint(when_busy="skip")], accelerator="cpu", logger=False)

    Source: ours; copying while forward and backward run is DataStates-LLM's (Maurya et al., HPDC 2024).
    """

    order = Order.FIRST  # what others do to the weights in a hook comes behind the end of a copy

    def __init__(
        self,
        when_busy: WhenBusy = "wait",
        on_error: OnError = "raise",
        retries: int = 2,
        retry_seconds: float = 1.0,
        check_loads: bool = True,
        overlap: bool = True,
    ) -> None:
        check_choice("when_busy", when_busy, WhenBusy)
        check_choice("on_error", on_error, OnError)
        check_count("retries", retries, least=0)
        check_number("retry_seconds", retry_seconds, least=0)
        check_flag("check_loads", check_loads)
        check_flag("overlap", overlap)
        self.when_busy: WhenBusy = when_busy
        self.on_error: OnError = on_error
        self.skipped = 0
        """Saves of this fit that were left out."""
        self._files = AsyncCheckpointIO(retries, retry_seconds, check_loads)
        self._shards = ShardedSaves(None, retries, retry_seconds)
        self._files.agreed = self._shards.agreed = True
        self._io: AsyncCheckpointIO | ShardedSaves = self._files  # which of them, from `setup` on
        self.overlap = overlap
        self._overlap: Overlap | None = None
        self._before: Any = None  # the strategy's own
        self._strategy: Strategy | None = None
        self._later: SavesLater | None = None
        self._wrappers: list[Wrapper] = []
        self._handle: RemovableHandle | None = None
        self._warm = False
        self._there: dict[str, bool] = {}  # what will be on disk when all is done that was asked for

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._detach()
        _refuse(trainer)
        sort_callbacks(trainer)
        self.skipped, self._warm, self._there = 0, False, {}
        self._strategy = trainer.strategy
        if self.overlap:
            self._overlap = overlap_of(trainer, BATCH, VALIDATION, LAST_VALIDATION)
        self._files.overlap = self._shards.overlap = self._overlap
        if saves_in_shards(trainer.strategy):
            self._io = self._shards
            self._shards.timeout = getattr(trainer.strategy, "_timeout", None)
            self._later = SavesLater(trainer.strategy, self._shards, self._files.check_loads)
        else:
            self._io = self._files
            self._before, trainer.strategy.checkpoint_io = trainer.strategy.checkpoint_io, self._files
        self._wrappers = [
            Wrapper(trainer, "save_checkpoint", lambda *args, **kwargs: self._save(trainer, *args, **kwargs))
        ]
        self._wrappers.append(Wrapper(trainer.strategy, "remove_checkpoint", self._remove))
        for callback in callbacks_of(trainer):
            if is_a(callback, ModelCheckpoint):
                self._wrappers.append(Wrapper(callback, "_link_checkpoint", self._link))
                self._wrappers.append(Wrapper(callback, "file_exists", self._file_exists))
        self._handle = before_updates(lambda: self._settle(BATCH, VALIDATION))

    # --- in front of what saves -------------------------------------------------------------------------------------

    def _save(self, trainer: Trainer, inner: Callable[..., Any], filepath: Any, *args: Any, **kwargs: Any) -> None:
        report = self._agree(trainer)
        self._io.count()
        if report.busy and self.when_busy == "skip":
            self.skipped += 1
            self._io.skip(str(filepath))
            return
        self._there[str(filepath)] = True
        inner(filepath, *args, **kwargs)

    def _agree(self, trainer: Trainer) -> _Report:
        """All ranks hear what the one that writes knows; they act on it together."""
        error = self._io.take_error()
        mine: Any = [self._io.behind, self._io.lost, self._io.busy, None if error is None else str(error)]
        report = _Report(*trainer.strategy.broadcast(mine))  # plain values: the transport of `ddp_ft` takes no others
        self._io.advance(report.behind, report.lost)
        if report.error is not None and self.on_error == "raise":
            raise RuntimeError(report.error) from error
        if report.error is not None:
            rank_zero_warn(report.error)
        return report

    def _remove(self, inner: Callable[..., Any], filepath: Any) -> None:
        self._there[str(filepath)] = False
        inner(filepath)

    def _link(self, inner: Callable[..., Any], trainer: Trainer, filepath: str, linkpath: str) -> None:
        if filepath != linkpath:
            self._there[linkpath] = True
            if trainer.is_global_zero:
                self._io.link_checkpoint(filepath, linkpath)

    def _file_exists(self, inner: Callable[..., bool], filepath: Any, trainer: Trainer) -> bool:
        """As the rank that writes knows it: what is still to be written is there already, and what is to go is not."""
        there = self._there.get(str(filepath))
        if there is None:
            there = trainer.is_global_zero and get_filesystem(filepath).exists(str(filepath))
        decision = trainer.strategy.reduce_boolean_decision(bool(there and trainer.is_global_zero), all=False)
        return bool(decision)  # a replica that has just come knows less than the others: it is asked all the same

    # --- before anybody writes weights ------------------------------------------------------------------------------

    def before_weights_change(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See ``hooks.ReadsWeights``."""
        self._settle()

    def _settle(self, *kinds: str) -> None:
        """End the late copy. For a save of one of these kinds this is the latest moment: see who has written by now."""
        self._io.settle()
        if self._overlap is not None:
            self._overlap.time_is_over(*kinds)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(LAST_VALIDATION)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._warm or trainer.global_step == 0:
            return
        self._warm = True  # the optimizers have their state now: the size is known
        if trainer.is_global_zero:
            self._get_memory(trainer)

    def _get_memory(self, trainer: Trainer) -> None:
        storages = list(_storages(trainer))
        size = sum(-(-storage.nbytes() // 64) * 64 for storage in storages)
        size += size // 64  # and for what callbacks keep; a checkpoint that is bigger gets more when it comes
        sharded = self._io is self._shards
        needed, free, buffers = BUFFERS * size * (trainer.num_devices if sharded else 1), free_host_memory(), BUFFERS
        if free is None or free >= needed:
            each = " for each rank" if sharded else ""
            rank_zero_info(f"AsyncCheckpoint: two buffers of {readable_size(size)} in host memory{each}")
        elif sharded:
            rank_zero_warn(
                f"AsyncCheckpoint: {readable_size(free)} of host memory are free, too little for two buffers of "
                f"{readable_size(size)} for each of {trainer.num_devices} ranks: leave it out, or set save_distributed_"
                "checkpoint=False, for which one buffer does"
            )
        else:
            buffers = 1
            rank_zero_warn(
                f"AsyncCheckpoint: {readable_size(free)} of host memory are free, too little for two buffers of "
                f"{readable_size(size)}: there is one, and a save waits until the one before it is written"
            )
        if not sharded:
            self._files.warm(size, any(storage.device.type == "cuda" for storage in storages), buffers)

    # --- the end ----------------------------------------------------------------------------------------------------

    def before_exit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See ``hooks.WritesLater``."""
        if self._strategy is not None:
            self._io.flush()
            self._agree(trainer)
            self._there = {}

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before_exit(trainer, pl_module)  # the others' hooks may read the best checkpoint

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before_exit(trainer, pl_module)  # ModelCheckpoint may have saved in `on_train_end`

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """No rank waits for another. What is saved from now on is saved by Lightning, at once."""
        if self._strategy is not None:
            try:
                self._io.flush()
            finally:
                self._detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def _detach(self) -> None:
        for wrapper in self._wrappers:
            wrapper.remove()
        self._wrappers = []
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self._overlap = None
        self._files.overlap = self._shards.overlap = None
        if self._strategy is None:
            return
        strategy, self._strategy = self._strategy, None
        if self._later is not None:
            self._later.remove()
            self._later = None
            self._shards.close()
        else:
            strategy.checkpoint_io = self._before
            self._files.teardown()

    def __getstate__(self) -> dict[str, Any]:
        nothing = dict.fromkeys(("_handle", "_strategy", "_before", "_later", "_overlap"))
        return {**vars(self), **nothing, "_wrappers": [], "_io": self._files}


def _storages(trainer: Trainer) -> Iterator[torch.UntypedStorage]:
    """Of the parameters, the buffers and the optimizers' state, each once."""
    module = trainer.lightning_module
    tensors = map(local, (*module.parameters(), *module.buffers(), *owned_by(trainer.optimizers)))
    seen: set[int] = set()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            yield storage


def _refuse(trainer: Trainer) -> None:
    strategy = trainer.strategy
    if sum(isinstance(callback, AsyncCheckpoint) for callback in callbacks_of(trainer)) > 1:
        raise MisconfigurationException("two AsyncCheckpoint callbacks would both write the checkpoints: keep one")
    sharded = is_a(strategy, FSDPStrategy) and strategy._state_dict_type == "sharded"
    if sharded or is_a(strategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            f"AsyncCheckpoint does not support {type(strategy).__name__} where each rank writes its shard: let it save "
            "whole checkpoints (state_dict_type='full'), train by strategy='fsdp2', or leave this callback out"
        )
    if type(strategy.checkpoint_io) not in both(TorchCheckpointIO):
        raise MisconfigurationException(
            f"AsyncCheckpoint brings its own CheckpointIO: take {type(strategy.checkpoint_io).__name__} out of the "
            "Trainer's plugins, or leave this callback out"
        )
