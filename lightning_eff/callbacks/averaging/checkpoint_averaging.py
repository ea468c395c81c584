"""Averages of snapshots along a run, as a Lightning callback."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_eff.arguments import check, check_choice, check_count, check_number, check_text, readable_size
from lightning_eff.callbacks.averaging.averaged_weights import AveragedWeights, Buffers
from lightning_eff.callbacks.averaging.beside_checkpoints import Save
from lightning_eff.callbacks.averaging.evaluations import ValidateWith
from lightning_eff.callbacks.averaging.window_average import WindowAverage, WindowScheme
from lightning_eff.functional.averaging import Curve
from lightning_eff.training.namespaces import MisconfigurationException
from lightning_eff.training.snapshots import Place, SnapshotWindow


class CheckpointAveraging(AveragedWeights):
    """Averages the last snapshots of a run, and evaluates and saves that average beside the live weights.

    Training goes on from the live weights, which the callback never changes. An average of a run at a constant, high
    learning rate is about as good as a decayed one, at any time and without deciding beforehand when to stop; against
    a run that has decayed its rate the gain is small.

    Runs in: ``on_train_batch_end``; around the evaluation loops; behind each checkpoint that is saved.
    Reads: the weights, every ``every_n_steps`` updates.
    Changes: nothing in training; in an evaluation the weights, in place, until it ends, however it ends.
    Collectives: none in a step; one reduction at the start; FSDP2 puts each averaged tensor together to save it.
    Host syncs: none in a step, except with a fused optimizer under a GradScaler: one where a snapshot is due.
    Strategies: one device, DDP and its kin, FSDP2 and tensor parallelism (``ModelParallelStrategy``).

    Args:
        scheme: weights of the snapshots: ``"uniform"`` (LAWA), ``"linear"`` (1, 2, ...), ``"exponential"``, ``"wsm"``
            (a decay of the learning rate in hindsight), ``"step"`` (proportional to step^penalty).
        window: snapshots that are kept, >= 1.
        every_n_steps: optimizer updates between two snapshots, >= 1; a step that was skipped is no update. With
            several optimizers those of the one that has made the most.
        start_step: no snapshot before this update, >= 0: where the warm-up of the learning rate ends, for instance.
        decay: the curve of ``"wsm"``: ``"linear"``, ``"cosine"`` or ``"1-sqrt"``.
        alpha: weight of a new snapshot in ``"exponential"``, in (0, 1].
        penalty: of ``"step"``, >= 0.
        preview: averages of fewer snapshots, the last m for each m, that every validation evaluates as well: the
            annealing preview, which shows what a longer or shorter merge would give. Each costs an evaluation.
        storage: where the snapshots are: ``"cpu"`` (host memory), ``"disk"`` (mapped files under ``folder``), or
            ``"model"`` (beside the weights). ``window`` copies of the trained weights on each rank, and one more
            during an evaluation; a window that does not fit is refused at the start.
        folder: for ``storage="disk"``; by default the Trainer's ``default_root_dir``. Nothing stays there.
        validate_with: ``"average"``: ``val_loss`` is that of the average. ``"current"``: of the live weights.
            ``"both"``: ``val_loss`` of the live weights and ``average/val_loss``, for two evaluations. The same for
            ``test``.
        buffers: floating-point buffers of the average: those of the live model (``"copy"``) or averaged as well.
            Integer buffers are always those of the live model.
        update_bn: BatchNorm statistics of the average are taken from this many training batches before it is
            evaluated or saved; None for the live ones.
        save: beside every checkpoint ``folder/file.ckpt``: ``"ckpt"``: ``folder/average-file.ckpt``, which
            ``load_from_checkpoint`` opens; ``"safetensors"``: ``folder/average-file.safetensors``; ``"all"``: both;
            ``"none"``.
        replace_at_end: the model has the averaged weights after ``fit``.
        name: of the average, in metrics, file names and checkpoints; one for each of several callbacks.

    Until something is collected the current weights stand for the average, with a message. The ordinary checkpoint
    has the live weights alone, and the window lies beside it: in one file, and under FSDP2 in one for each rank. Where
    it is lost, or FSDP2 has another number of ranks, the average goes on from its own file in place of each snapshot.
    A disk that fails at these files is a warning.

    LoRA: the factors A and B are averaged each for itself, and B A of the averages is not the average of the products.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: in ``setup``, for FSDP1, DeepSpeed, two averages of one name or two with
            ``validate_with="average"``, ModelPruning unless it has ``make_pruning_permanent=False``; at the
            start of ``fit``, for a window that does not fit into memory.

    Example:
        >>> import lightning as L
        >>> from lightning_eff.callbacks import CheckpointAveraging
        >>> averaging = CheckpointAveraging("wsm", window=8, every_n_steps=250, start_step=2000)
        >>> trainer = L.Trainer(max_steps=1, callbacks=[averaging], logger=False)

    Source: LAWA (arXiv 2209.14981), early averaging (arXiv 2306.03241), PMA (arXiv 2505.12082), WSM (arXiv 2507.17634).
    """

    def __init__(
        self,
        scheme: WindowScheme = "uniform",
        window: int = 6,
        every_n_steps: int = 100,
        start_step: int = 0,
        decay: Curve = "1-sqrt",
        alpha: float = 0.2,
        penalty: float = 1.0,
        preview: list[int] | None = None,
        storage: Place = "cpu",
        folder: str | None = None,
        validate_with: ValidateWith = "both",
        buffers: Buffers = "copy",
        update_bn: int | None = None,
        save: Save = "ckpt",
        replace_at_end: bool = False,
        name: str = "average",
    ) -> None:
        check_choice("scheme", scheme, WindowScheme)
        check_count("window", window, unit="snapshots")
        check_choice("decay", decay, Curve)
        check_number("alpha", alpha, above=0, most=1)
        check_number("penalty", penalty, least=0)
        lengths = list(preview) if isinstance(preview, list | tuple) else []
        right = all(type(length) is int and 1 <= length < window for length in lengths)
        right = right and len(lengths) == len(set(lengths)) and isinstance(preview, list | tuple | None)
        check("preview", preview, right, f"different integers from 1 to {window - 1}, or None")
        check_choice("storage", storage, Place)
        check_text("folder", folder, optional=True)
        super().__init__(
            lambda: WindowAverage(scheme, window, storage, decay, alpha, penalty, preview or ()),
            name=name,
            every_n_steps=every_n_steps,
            start_step=start_step,
            validate_with=validate_with,
            buffers=buffers,
            update_bn=update_bn,
            save=save,
            replace_at_end=replace_at_end,
        )
        self.folder = folder

    average: WindowAverage

    @property
    def window(self) -> SnapshotWindow:
        """The snapshots."""
        return self.average.window

    def weights(self, last: int | None = None) -> list[float]:
        """The weights of the ``last`` snapshots now (of all, without it), oldest first; empty without any."""
        return self.average.weights(last)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the window takes, and refuse what does not fit, on all ranks together."""
        self.window.folder = self.folder or trainer.default_root_dir
        super().on_train_start(trainer, pl_module)
        tensors = self._tensors.of(pl_module)
        size = self.window.bytes_of(tensors)
        missing = self.window.length - len(self.window.steps) + 1  # the one more is that of an evaluation
        # The ranks of this machine share its memory, and not a device's.
        sharing = 1 if self.window.place == "model" else max(1, trainer.num_devices)
        free = self.window.free_bytes(trainer.strategy.root_device)
        where = {"cpu": "host memory", "disk": f"files under {self.window.folder}", "model": "the model's device"}
        needed = f"{self.window.length} x {readable_size(size)} on each rank in {where[self.window.place]}"
        fits = free is None or missing * size * sharing <= free
        if not trainer.strategy.reduce_boolean_decision(fits, all=True):
            raise MisconfigurationException(
                f"CheckpointAveraging(window={self.window.length}) keeps {needed}, and one more in an evaluation, and "
                f"{readable_size(free or 0)} are free here: take a smaller window or another storage= ('cpu', 'disk', "
                "'model')"
            )
        rank_zero_info(f"CheckpointAveraging({self.name!r}) keeps {needed}")
