"""Exponential and power-function averages of the weights, as a Lightning callback."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_eff.arguments import check, readable_size
from lightning_eff.callbacks.averaging.averaged_weights import AveragedWeights, Buffers, Save, ValidateWith
from lightning_eff.functional.ema import (
    MAX_WIDTH,
    ema_update_,
    float32_copies,
    half_life_decay,
    power_decay,
    power_from_width,
    warmup_decay,
)


class EMA(AveragedWeights):
    """Keeps exponential or power-function averages of the weights in float32, and evaluates and saves them.

    Everything but the update is as in :class:`CheckpointAveraging`: training goes on from the live weights, which the
    callback never changes. One of ``decay``, ``half_life`` and ``widths`` says how the past is weighed.

    Runs in: ``on_train_batch_end``; around the evaluation loops; behind each checkpoint that is saved.
    Reads: the weights, every ``every_n_steps`` updates.
    Changes: nothing in training; in an evaluation the weights, in place, until it ends, however it ends.
    Collectives: none in a step; FSDP2 puts each averaged tensor together to save it.
    Host syncs: none in a step, except with a fused optimizer under a GradScaler, or ``device="cpu"`` with the weights
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
        device: where the float32 averages are: ``"model"`` (beside the weights) or ``"cpu"``.
        validate_with: ``"average"``: ``val_loss`` is that of the average. ``"current"``: of the live weights.
            ``"both"``: ``val_loss`` of the live weights and ``ema/val_loss``, for two evaluations. Further widths are
            evaluated in any case, as ``ema/<width>/val_loss``. The same for ``test``.
        buffers: floating-point buffers of the average: those of the live model (``"copy"``) or averaged as well.
            Integer buffers are always those of the live model.
        update_bn: BatchNorm statistics of the average are taken from this many training batches before it is
            evaluated or saved; None for the live ones.
        save: beside every checkpoint ``folder/file.ckpt``: ``folder/ema-file.safetensors``, ``folder/ema-file.ckpt``
            (which ``load_from_checkpoint`` opens), ``"all"`` or ``"none"`` of them; further widths as
            ``folder/ema-<width>-file...``.
        replace_at_end: the model has the averaged weights after ``fit``.
        name: of the average, in metrics, file names and checkpoints; one for each of several callbacks.

    Until something is collected the current weights stand for the average, with a message. The ordinary checkpoint
    has the live weights alone, and the averages lie beside it, a file for each rank.

    LoRA: the factors A and B are averaged each for itself, and B A of the averages is not the average of the products.

    Raises:
        ValueError: an argument out of its range, or more than one of ``decay``, ``half_life`` and ``widths``.
        MisconfigurationException: in ``setup``, for FSDP1, DeepSpeed, two averages of one name or two with
            ``validate_with="average"``.

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
        device: Literal["model", "cpu"] = "model",
        validate_with: ValidateWith = "both",
        buffers: Buffers = "copy",
        update_bn: int | None = None,
        save: Save = "all",
        replace_at_end: bool = False,
        name: str = "ema",
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
        check("decay", decay, decay is None or 0 <= decay < 1, "None or in [0, 1)")
        check("half_life", half_life, half_life is None or 0 < half_life < float("inf"), "None or positive and finite")
        right = widths is None or (len(widths) == len(set(widths)) > 0 and all(0 < w < MAX_WIDTH for w in widths))
        check("widths", widths, right, f"None or different numbers in (0, {MAX_WIDTH:.6f})")
        check("device", device, device in ("model", "cpu"), "'model' or 'cpu'")
        given = {"decay": decay, "half_life": half_life, "widths": widths}
        given = {key: value for key, value in given.items() if value is not None}
        if len(given) > 1:
            arguments = ", ".join(f"{key}={value!r}" for key, value in given.items())
            raise ValueError(f"{arguments} exclude each other: give one of them")
        if half_life is not None:
            decay = half_life_decay(half_life, every_n_steps)
        self.decay = 0.999 if decay is None else decay
        self.widths = list(widths or ())
        self.warmup = warmup
        self.device = device
        self._names: list[str] = []
        self._shadows: list[list[Tensor]] = []  # for each width, for each name
        self._updated = 0
        self._last_step = 0

    @property
    @override
    def collected(self) -> int:
        return self._updated

    @override
    def _labels(self) -> list[str]:
        return ["", *map(str, self.widths[1:])]

    @override
    def _saved_labels(self) -> list[str]:
        return self._labels()

    @override
    def _collect(self, step: int, tensors: dict[str, Tensor]) -> None:
        self._updated += 1
        since, self._last_step = step - self._last_step, step
        if not self._names:
            self._names = list(tensors)
            self._shadows = [self._copies(tensors.values()) for _ in self.widths or (None,)]
            return
        if self.widths:
            decays = [power_decay(step, power_from_width(width), since) for width in self.widths]
        elif self.warmup:
            decays = [warmup_decay(self._updated, self.decay)]
        else:
            decays = [self.decay]
        current = [tensors[name] for name in self._names]
        if self.device == "cpu":
            current = [tensor if tensor.device.type == "cpu" else tensor.cpu() for tensor in current]
        for shadows, decay in zip(self._shadows, decays, strict=True):
            ema_update_(shadows, current, decay)

    def _copies(self, tensors: Any) -> list[Tensor]:
        return float32_copies(tensors, "cpu" if self.device == "cpu" else None)

    @override
    def _averages(self, label: str, tensors: Mapping[str, Tensor], rounded: bool) -> Iterator[tuple[str, Tensor]]:
        index = self._labels().index(label)
        for name, shadow in zip(self._names, self._shadows[index], strict=True):
            if name in tensors:
                yield name, shadow

    @override
    def _add(self, name: str, tensor: Tensor) -> None:
        if self._names:
            self._names.append(name)
            for shadows in self._shadows:
                shadows.extend(self._copies([tensor]))

    @override
    def _reset(self) -> None:
        self._names, self._shadows, self._updated, self._last_step = [], [], 0, 0

    @override
    def _state(self) -> dict[str, Any]:
        averages = [dict(zip(self._names, shadows, strict=True)) for shadows in self._shadows]
        return {"averages": averages, "widths": self.widths, "updated": self._updated, "last_step": self._last_step}

    @override
    def _restore(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> bool:
        self._reset()
        averages: list[dict[str, Tensor]] = state["averages"]
        named = averages[0] if averages else {}
        fits = all(name in tensors and tensors[name].shape == tensor.shape for name, tensor in named.items())
        if not fits or state["widths"] != self.widths:
            return False
        self._names = list(named)
        like = [tensors[name] for name in self._names]
        for average in averages:
            shadows = self._copies(like)
            for shadow, saved in zip(shadows, average.values(), strict=True):
                shadow.copy_(saved)
            self._shadows.append(shadows)
        self._updated, self._last_step = state["updated"], state["last_step"]
        return True

    @override
    def _about(self, label: str) -> dict[str, Any]:
        if self.widths:
            return {"scheme": "power", "sigma_rel": self.widths[self._labels().index(label)]}
        return {"scheme": "exponential", "decay": self.decay}

    @override
    def _on_start(self, trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
        size = sum(tensor.numel() * max(4, tensor.element_size()) for tensor in tensors.values())
        where = "host memory" if self.device == "cpu" else "the model's device"
        count = len(self.widths) or 1
        rank_zero_info(f"EMA({self.name!r}) keeps {count} x {readable_size(size)} on each rank in {where}")
