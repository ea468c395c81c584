"""Averages of snapshots along a run, as a Lightning callback."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_eff.arguments import check, is_count, readable_size
from lightning_eff.callbacks.averaging.averaged_weights import AveragedWeights, Buffers, Save, ValidateWith
from lightning_eff.functional.averaging import Curve, scheme_weights, weighted_average
from lightning_eff.training.snapshots import HeldWindow, Place, SnapshotWindow

WindowScheme = Literal["uniform", "linear", "exponential", "wsm", "step"]


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
        device: where the snapshots are: ``"cpu"`` (host memory), ``"disk"`` (mapped files under ``folder``), or
            ``"model"`` (beside the weights). ``window`` copies of the trained weights on each rank, and one more
            during an evaluation; a window that does not fit is refused at the start.
        folder: for ``device="disk"``; by default the Trainer's ``default_root_dir``. Nothing stays there.
        validate_with: ``"average"``: ``val_loss`` is that of the average. ``"current"``: of the live weights.
            ``"both"``: ``val_loss`` of the live weights and ``average/val_loss``, for two evaluations. The same for
            ``test``.
        buffers: floating-point buffers of the average: those of the live model (``"copy"``) or averaged as well.
            Integer buffers are always those of the live model.
        update_bn: BatchNorm statistics of the average are taken from this many training batches before it is
            evaluated or saved; None for the live ones.
        save: beside every checkpoint ``folder/file.ckpt``: ``folder/average-file.safetensors``,
            ``folder/average-file.ckpt`` (which ``load_from_checkpoint`` opens), ``"all"`` or ``"none"`` of them.
        replace_at_end: the model has the averaged weights after ``fit``.
        name: of the average, in metrics, file names and checkpoints; one for each of several callbacks.

    Until something is collected the current weights stand for the average, with a message. The ordinary checkpoint
    has the live weights alone, and the window lies beside it, a file for each rank.

    LoRA: the factors A and B are averaged each for itself, and B A of the averages is not the average of the products.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: in ``setup``, for FSDP1, DeepSpeed, two averages of one name or two with
            ``validate_with="average"``; at the start of ``fit``, for a window that does not fit into memory.

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
        device: Place = "cpu",
        folder: str | None = None,
        validate_with: ValidateWith = "both",
        buffers: Buffers = "copy",
        update_bn: int | None = None,
        save: Save = "all",
        replace_at_end: bool = False,
        name: str = "average",
    ) -> None:
        super().__init__(
            name=name,
            every_n_steps=every_n_steps,
            start_step=start_step,
            validate_with=validate_with,
            buffers=buffers,
            update_bn=update_bn,
            save=save,
            replace_at_end=replace_at_end,
        )
        check("scheme", scheme, scheme in get_args(WindowScheme), f"one of {get_args(WindowScheme)}")
        check("window", window, is_count(window), "an integer, at least 1")
        check("decay", decay, decay in get_args(Curve), f"one of {get_args(Curve)}")
        check("alpha", alpha, 0 < alpha <= 1, "in (0, 1]")
        check("penalty", penalty, 0 <= penalty < float("inf"), "at least 0 and finite")
        check("device", device, device in get_args(Place), f"one of {get_args(Place)}")
        fits = all(is_count(m) and m < window for m in preview or ())
        check("preview", preview, fits, f"integers from 1, less than window={window}")
        self.scheme: WindowScheme = scheme
        self.decay: Curve = decay
        self.alpha = alpha
        self.penalty = penalty
        self.preview = list(preview or ())
        self.folder = folder
        self.window = SnapshotWindow(window, device)
        self._collected = 0

    @property
    @override
    def collected(self) -> int:
        return self._collected

    def weights(self, last: int | None = None) -> list[float]:
        """The weights of the ``last`` snapshots now (of all, without it), oldest first; empty without any."""
        steps = self.window.steps[-last:] if last else self.window.steps
        if not steps:
            return []
        return scheme_weights(self.scheme, steps, alpha=self.alpha, decay=self.decay, penalty=self.penalty)

    @override
    def _labels(self) -> list[str]:
        return ["", *map(str, self.preview)]

    @override
    def _collect(self, step: int, tensors: dict[str, Tensor]) -> None:
        self.window.take(step, tensors)
        self._collected += 1

    @override
    def _averages(self, label: str, tensors: Mapping[str, Tensor], rounded: bool) -> Iterator[tuple[str, Tensor]]:
        last = int(label) if label else None
        weights = self.weights(last)
        snapshots = self.window.read()[-len(weights) :]
        for name, tensor in tensors.items():
            if all(name in snapshot for snapshot in snapshots):
                dtype = tensor.dtype if rounded else torch.promote_types(tensor.dtype, torch.float32)
                yield name, weighted_average((snapshot[name] for snapshot in snapshots), weights, dtype)

    @override
    def _add(self, name: str, tensor: Tensor) -> None:
        self.window.add(name, tensor)

    @override
    def _reset(self) -> None:
        self.window.clear()
        self._collected = 0

    @override
    def _state(self) -> dict[str, Any]:
        return {**self.window.state_dict(), "collected": self._collected}

    @override
    def _held_state(self) -> dict[str, Any]:
        return {"held": self.window.hold(), "collected": self._collected}  # copies of copies are not needed

    @override
    def _restore(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> bool:
        held = state.get("held")
        if isinstance(held, HeldWindow):
            self.window.go_back(held)
            self._collected = state["collected"]
            return True
        fits = self.window.load_state_dict(held or state, tensors)  # a peer's comes as tensors
        self._collected = state["collected"] if fits else 0
        return fits

    @override
    def _about(self, label: str) -> dict[str, Any]:
        about: dict[str, Any] = {"scheme": self.scheme, "steps": list(self.window.steps), "weights": self.weights()}
        return about | ({"decay": self.decay} if self.scheme == "wsm" else {})

    @override
    def _on_start(self, trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
        """Say what the window takes, and refuse what does not fit, on all ranks together."""
        self.window.folder = self.folder or trainer.default_root_dir
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
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
                f"{readable_size(free or 0)} are free here: take a smaller window or another device= ('cpu', 'disk', "
                "'model')"
            )
        rank_zero_info(f"CheckpointAveraging({self.name!r}) keeps {needed}")
