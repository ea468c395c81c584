"""Exponential and power-function averages of the weights, as a Lightning callback."""

from __future__ import annotations

from numbers import Real
from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_eff.arguments import check, check_choice, check_count, check_flag, check_number, readable_size
from lightning_eff.callbacks.averaging.averaged_weights import AveragedWeights, Buffers
from lightning_eff.callbacks.averaging.beside_checkpoints import Save
from lightning_eff.callbacks.averaging.evaluations import ValidateWith
from lightning_eff.callbacks.averaging.exponential_average import ExponentialAverage
from lightning_eff.functional.ema import MAX_WIDTH, half_life_decay

Storage = Literal["model", "cpu"]


class EMA(AveragedWeights):
    """Keeps exponential or power-function averages of the weights in float32, and evaluates and saves them.

    Everything but the update is as in :class:`CheckpointAveraging`: training goes on from the live weights, which the
    callback never changes. One of ``decay``, ``half_life`` and ``widths`` says how the past is weighed.

    Runs in: ``on_train_batch_end``; around the evaluation loops; behind each checkpoint that is saved.
    Reads: the weights, every ``every_n_steps`` updates.
    Changes: nothing in training; in an evaluation the weights, in place, until it ends, however it ends.
    Collectives: none in a step; FSDP2 puts each averaged tensor together to save it.
    Host syncs: none in a step, except with a fused optimizer under a GradScaler, or ``storage="cpu"`` with the weights
        elsewhere: one where an update is due.
    Strategies: one device, DDP and its kin, FSDP2 and tensor parallelism (``ModelParallelStrategy``).

    Args:
        decay: weight of the past at each update of the average, in [0, 1); 0.999 where nothing is given. It remembers
            about ``every_n_steps / (1 - decay)`` steps.
        half_life: in its place: optimizer updates after which a weight's share has halved, > 0.
        widths: in their place: power-function averages, which weigh update t by t^gamma and so remember the same
            fraction of the run however long it is: their standard deviations as fractions of the run, each in
            (0, 0.288). The first is the main one. From the files of two widths (0.05 and 0.10) at several
            checkpoints ``functional.ema.posthoc_weights`` makes any other after the run.
        warmup: an exponential average begins with a short memory, min(decay, 1 - n^(-2/3)) at its n-th update, so that
            it forgets the first weights. A power-function average does so by itself.
        every_n_steps: optimizer updates between two updates of the average, >= 1; a step that was skipped is none.
            With several optimizers those of the one that has made the most.
        start_step: the average begins with the weights after this update at the earliest, >= 0.
        storage: where the float32 averages are: ``"model"`` (beside the weights) or ``"cpu"``.
        validate_with: ``"average"``: ``val_loss`` is that of the average. ``"current"``: of the live weights.
            ``"both"``: ``val_loss`` of the live weights and ``ema/val_loss``, for two evaluations. Further widths are
            evaluated in any case, as ``ema/<width>/val_loss``. The same for ``test``.
        buffers: floating-point buffers of the average: those of the live model (``"copy"``) or averaged as well.
            Integer buffers are always those of the live model.
        update_bn: BatchNorm statistics of the average are taken from this many training batches before it is
            evaluated or saved; None for the live ones.
        save: beside every checkpoint ``folder/file.ckpt``: ``"ckpt"``: ``folder/ema-file.ckpt``, which
            ``load_from_checkpoint`` opens; ``"safetensors"``: ``folder/ema-file.safetensors``; ``"all"``: both;
            ``"none"``. Further widths as ``folder/ema-<width>-file...``.
        replace_at_end: the model has the averaged weights after ``fit``.
        name: of the average, in metrics, file names and checkpoints; one for each of several callbacks.

    Until something is collected the current weights stand for the average, with a message. The ordinary checkpoint
    has the live weights alone, and the averages lie beside it: in one file, and under FSDP2 in one for each rank. Where
    it is lost, or FSDP2 has another number of ranks, they go on from the files that ``save`` writes. A disk that fails
    at these files is a warning.

    LoRA: the factors A and B are averaged each for itself, and B A of the averages is not the average of the products.

    Raises:
        ValueError: an argument out of its range, or more than one of ``decay``, ``half_life`` and ``widths``.
        MisconfigurationException: in ``setup``, for FSDP1, DeepSpeed, two averages of one name or two with
            ``validate_with="average"``, ModelPruning unless it has ``make_pruning_permanent=False``.

    Example:
        >>> import lightning as L
        >>> from lightning_eff.callbacks import EMA
        >>> trainer = L.Trainer(max_steps=1, callbacks=[EMA(half_life=500)], logger=False)

    Source: power-function averages: Karras et al., arXiv 2312.02696. The warm-up of the decay is common practice.
    """

    def __init__(
        self,
        decay: float | None = None,
        half_life: float | None = None,
        widths: list[float] | None = None,
        warmup: bool = True,
        every_n_steps: int = 1,
        start_step: int = 0,
        storage: Storage = "model",
        validate_with: ValidateWith = "both",
        buffers: Buffers = "copy",
        update_bn: int | None = None,
        save: Save = "ckpt",
        replace_at_end: bool = False,
        name: str = "ema",
    ) -> None:
        check_number("decay", decay, least=0, below=1, optional=True)
        check_number("half_life", half_life, above=0, optional=True, unit="optimizer updates")
        numbers = list(widths) if isinstance(widths, list | tuple) else []
        right = all(isinstance(width, Real) and 0 < width < MAX_WIDTH for width in numbers)
        right = widths is None or (right and len(numbers) == len(set(numbers)) > 0)
        check("widths", widths, right, f"None or different numbers in (0, {MAX_WIDTH:.6f})")
        check_flag("warmup", warmup)
        check_choice("storage", storage, Storage)
        check_count("every_n_steps", every_n_steps)
        given = {"decay": decay, "half_life": half_life, "widths": widths}
        given = {key: value for key, value in given.items() if value is not None}
        if len(given) > 1:
            arguments = ", ".join(f"{key}={value!r}" for key, value in given.items())
            raise ValueError(f"{arguments} exclude each other: give one of them")
        if half_life is not None:
            decay = half_life_decay(half_life, every_n_steps)
        decay = 0.999 if decay is None else decay
        super().__init__(
            lambda: ExponentialAverage(decay, widths or (), warmup, storage),
            name=name,
            every_n_steps=every_n_steps,
            start_step=start_step,
            validate_with=validate_with,
            buffers=buffers,
            update_bn=update_bn,
            save=save,
            replace_at_end=replace_at_end,
        )

    average: ExponentialAverage

    @property
    def decay(self) -> float:
        """Weight of the past at each update, once the warm-up is over."""
        return self.average.decay

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the averages take."""
        super().on_train_start(trainer, pl_module)
        tensors = self._tensors.of(pl_module)
        size = sum(tensor.numel() * max(4, tensor.element_size()) for tensor in tensors.values())
        where = "host memory" if self.average.storage == "cpu" else "the model's device"
        count = len(self.average.widths) or 1
        rank_zero_info(f"EMA({self.name!r}) keeps {count} x {readable_size(size)} on each rank in {where}")
