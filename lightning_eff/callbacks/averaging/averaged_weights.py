"""What every callback that keeps an average of the weights shares: when it collects, evaluates, saves and restores.

A subclass says what is collected and what the average of it is. See ``callbacks/checkpoint_averaging.py``.
"""

from __future__ import annotations

import math
import re
import weakref
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_eff.arguments import check, is_count
from lightning_eff.callbacks.averaging import batch_norm
from lightning_eff.callbacks.averaging.files import averaged_paths, averaged_state, remove_averaged, write_averaged
from lightning_eff.callbacks.averaging.side_evaluation import AroundEvaluations, evaluate_beside
from lightning_eff.callbacks.averaging.trained_tensors import TrainedTensors
from lightning_eff.callbacks.averaging.weight_swap import WeightSwap
from lightning_eff.training.dtensor import local, reshard
from lightning_eff.training.rank_state import RankState
from lightning_eff.training.trainable import TrainableChange
from lightning_eff.training.update_count import UpdateCount

ValidateWith = Literal["average", "current", "both"]
Buffers = Literal["copy", "average"]
Save = Literal["all", "safetensors", "ckpt", "none"]

_LEFT_OUT = ("_files", "_evaluations", "_trainer", "_module")  # of a pickle: they belong to this process


class AveragedWeights(Callback):
    """Base of the callbacks; the arguments are theirs, see :class:`~lightning_eff.callbacks.CheckpointAveraging`.

    What is averaged: every floating-point parameter that has been trained since the run began (a frozen one is its own
    average), under its clean name, and with ``buffers="average"`` the floating-point buffers.
    """

    def __init__(
        self,
        *,
        name: str,
        every_n_steps: int,
        start_step: int,
        validate_with: ValidateWith,
        buffers: Buffers,
        update_bn: int | None,
        save: Save,
        replace_at_end: bool,
    ) -> None:
        usable = isinstance(name, str) and name != "" and not set(name) & set("/\\ ")
        check("name", name, usable, "a word without slashes and blanks")
        check("every_n_steps", every_n_steps, is_count(every_n_steps), "an integer, at least 1")
        check("start_step", start_step, start_step == 0 or is_count(start_step), "an integer, at least 0")
        for argument, value, kind in (
            ("validate_with", validate_with, ValidateWith),
            ("buffers", buffers, Buffers),
            ("save", save, Save),
        ):
            check(argument, value, value in get_args(kind), f"one of {get_args(kind)}")
        check("update_bn", update_bn, update_bn is None or is_count(update_bn), "None or an integer, at least 1")
        self.name = name
        self.every_n_steps = every_n_steps
        self.start_step = start_step
        self.validate_with: ValidateWith = validate_with
        self.buffers: Buffers = buffers
        self.update_bn = update_bn
        self.save: Save = save
        self.replace_at_end = replace_at_end

        self._updates = UpdateCount()
        self._due = 0
        self._tensors = TrainedTensors(buffers == "average")
        self._swap = WeightSwap()
        self._inside: str | None = None  # the average that is in the place of the weights
        self._paused: str | None = None  # and the one that was before a checkpoint is saved
        self._replacing = False  # an evaluation is on its way that is one of the average
        self._files = self._rank_files()
        self._restored: dict[str, Any] | None = None
        # BatchNorm's under each average: after how many collections they were taken, and where they lie.
        self._statistics: dict[str, tuple[int, dict[str, Tensor]]] = {}
        self._beside: dict[str, Tensor] = {}
        self._evaluations = AroundEvaluations(self._evaluate_around, self._before_end)
        self._told_empty = False
        self._of_replicas = False  # each of which is a world of its own
        self._trainer: Trainer | None = None
        self._module: weakref.ref[LightningModule] | None = None  # whose average it is

    # What a subclass says.

    @property
    @abstractmethod
    def collected(self) -> int:
        """How many times something has been collected; 0: there is no average yet."""

    @abstractmethod
    def _labels(self) -> list[str]:
        """The averages that can be evaluated: ``""`` is the main one, others have a label."""

    @abstractmethod
    def _collect(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Take what the average needs from this rank's tensors, after ``step`` updates."""

    @abstractmethod
    def _averages(self, label: str, tensors: Mapping[str, Tensor], rounded: bool) -> Iterator[tuple[str, Tensor]]:
        """Each tensor's average, on any device; ``rounded``: in the tensor's dtype, where one is made anew anyway."""

    @abstractmethod
    def _add(self, name: str, tensor: Tensor) -> None:
        """A parameter is trained from now on and was the same until now."""

    @abstractmethod
    def _reset(self) -> None:
        """Forget everything: a new run begins."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What this rank saves beside a checkpoint."""

    @abstractmethod
    def _restore(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> bool:
        """Take it back; False if it does not fit the tensors."""

    @abstractmethod
    def _about(self, label: str) -> dict[str, Any]:
        """What an average is, for its files."""

    def _saved_labels(self) -> list[str]:
        return [""]

    def _on_start(self, trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
        """Training begins: look at the memory, say what is kept."""

    # The run.

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise MisconfigurationException(
                f"{type(self).__name__} does not support {type(trainer.strategy).__name__}, whose parameters are "
                "flattened or partitioned out of sight: use ModelParallelStrategy (FSDP2) in its place"
            )
        self._of_replicas = bool(getattr(trainer.strategy, "replicas_are_equal", False))
        if self._of_replicas and self.update_bn and stage == "fit":
            raise MisconfigurationException(
                f"update_bn={self.update_bn} does not go with {type(trainer.strategy).__name__}, in which taking a "
                "training batch begins a step of all replicas: leave it out"
            )
        others = [c for c in trainer.callbacks if isinstance(c, AveragedWeights) and c is not self]  # type: ignore[attr-defined]
        if any(other.name == self.name for other in others):
            raise MisconfigurationException(
                f"two callbacks would keep an average of the name {self.name!r}: give one another name=..."
            )
        if self.validate_with == "average" and any(other.validate_with == "average" for other in others):
            raise MisconfigurationException(
                "two callbacks have validate_with='average', and only one average can take the weights' place: "
                "set validate_with='both' or 'current' for the others"
            )
        if stage == "fit":
            self._files.attach(trainer.strategy)
        self._evaluations.attach(trainer, stage)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._updates.attach(trainer.optimizers)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restored, self._restored = self._restored, None
        if restored is None and (
            trainer.global_step == 0 or (self._module is not None and self._module() is not pl_module)
        ):
            # A new run. The callback may have been in another one before.
            self._reset()
            self._tensors.names = set()
            self._updates.load_state_dict({"updates": [0] * len(trainer.optimizers)})
        self._begin(pl_module, restored)
        self._told_empty = False
        self._on_start(trainer, self._tensors.of(pl_module))

    def _begin(self, pl_module: LightningModule, restored: dict[str, Any] | None) -> None:
        """Go on from what was restored, or else from what is there."""
        trained = self._tensors.names
        if restored is not None:
            trained = restored["trained"]
            if not self._restore(restored["state"], self._tensors.every(pl_module)):
                rank_zero_info(f"{type(self).__name__}: the saved average is of another model; it starts anew")
        self._tensors.begin(pl_module, trained)
        self._module = weakref.ref(pl_module)
        self._statistics = {}
        self._due = self._next_due(self._count())

    def run_state(self) -> dict[str, Any]:
        """The average by reference, so that a heal needs no other copy of it, and when the next collection is due."""
        counts = self._updates.state_dict()
        return {**counts, "trained": sorted(self._tensors.names), "state": self._held_state(), "due": self._due}

    def _held_state(self) -> dict[str, Any]:
        return self._state()

    def load_run_state(
        self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any], *, within_step: bool
    ) -> None:
        """Go on from it; within a step, what is due after this step is yet to be collected."""
        self._restored = None
        self._updates.load_state_dict(state)
        self._begin(pl_module, state)
        if within_step:
            self._due = state["due"]

    def on_trainable_change(self, trainer: Trainer, pl_module: LightningModule, change: TrainableChange) -> None:
        """A parameter that is trained for the first time has been the same in every snapshot until now."""
        for name, parameter in change.unfrozen.items():
            if self._tensors.open(name, parameter):
                self._add(name, local(parameter))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if max((self._updates.at_most(i) for i in range(len(trainer.optimizers))), default=0) < self._due:
            return
        step = self._count()  # only now, because it waits for a fused optimizer that has skipped steps
        if step < self._due:
            return
        self._due = self._next_due(step)
        self._collect(step, self._tensors.again(pl_module))

    def _count(self) -> int:
        """Real updates: with several optimizers those of the one that has made the most."""
        return max(self._updates.state_dict()["updates"], default=0)

    def _next_due(self, step: int) -> int:
        first = max(1, math.ceil(self.start_step / self.every_n_steps)) * self.every_n_steps
        return max(first, (step // self.every_n_steps + 1) * self.every_n_steps)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.replace_at_end:
            self._update_statistics(trainer, pl_module, "")  # as long as there is data

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before: the checkpoints that are saved at the end of training have the live weights.
        if self.replace_at_end and self.collected:
            tensors = self._tensors.of(pl_module)
            with torch.no_grad():
                for name, average in self._averages("", tensors, rounded=True):
                    tensors[name].copy_(average)
                for buffer, other in self._statistics_of(pl_module, ""):
                    buffer.copy_(other)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave(trainer)

    def _leave(self, trainer: Trainer) -> None:
        self._swap.take_out()
        self._updates.detach()
        self._evaluations.detach()

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._updates.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updates.load_state_dict(state_dict)
        if self._restored is None:  # there is none, or RankState has said that it is lost
            self._reset()

    def _rank_files(self) -> RankState:
        return RankState(f"average-{self.name}", self._save_rank, self._load_rank, self._write_beside, self._remove)

    def _save_rank(self) -> dict[str, Any]:
        # A module may save in a hook of its validation. The checkpoint's tensors are the model's own, so that putting
        # the live weights back now puts them into the checkpoint; afterwards the evaluation goes on as it was.
        self._paused = self._inside
        if self._trainer is not None and self._inside is not None:
            self._take_out(self._trainer.lightning_module)
        return {"trained": sorted(self._tensors.names), "state": self._state()}

    def _load_rank(self, state: dict[str, Any] | None) -> None:
        self._restored = state  # the model's tensors are not there yet under every strategy

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _LEFT_OUT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._trainer = self._module = None
        self._files = self._rank_files()
        self._evaluations = AroundEvaluations(self._evaluate_around, self._before_end)

    # Evaluation.

    def _evaluate_around(self, loop: _EvaluationLoop, run: Any) -> Any:
        trainer = loop.trainer
        module = trainer.lightning_module
        if trainer.sanity_checking or not self._is_average_of(trainer, module):  # a check of the code, not of weights
            return run()
        try:
            self._beside = {}
            for label in self._labels():
                if label == "" and self.validate_with != "both":
                    continue
                self._put_in(trainer, module, label)
                metrics = evaluate_beside(trainer, loop)
                self._take_out(module)
                prefix = f"{self.name}/{label}" if label else self.name
                self._beside |= {f"{prefix}/{key}": value for key, value in metrics.items()}
            self._replacing = self.validate_with == "average"
            return run()
        finally:
            self._replacing = False
            self._take_out(module)

    # In a hook of the evaluation itself, behind all that other callbacks evaluate beside it: one average at a time.
    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._replacing:
            self._put_in(trainer, pl_module, "")

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._replacing:
            self._put_in(trainer, pl_module, "")

    def _is_average_of(self, trainer: Trainer, module: LightningModule) -> bool:
        """False, with a message, where other weights than those of the run are evaluated."""
        if trainer.state.fn == TrainerFn.FITTING:
            return True
        if trainer.ckpt_path is None and (self._module is None or self._module() is module):
            return True
        rank_zero_info(
            f"{type(self).__name__}({self.name!r}) is no average of the weights that are evaluated now, and leaves "
            "them as they are; that of a checkpoint lies beside it"
        )
        return False

    def _log_beside(self, trainer: Trainer, module: LightningModule) -> None:
        beside, self._beside = self._beside, {}
        several = trainer.world_size > 1 or self._of_replicas
        if not trainer.sanity_checking:
            for key, value in beside.items():
                module.log(key, value, on_step=False, on_epoch=True, sync_dist=several, batch_size=1)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_beside(trainer, pl_module)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_beside(trainer, pl_module)

    def tensorboard_charts(self, trainer: Trainer) -> dict[str, list[Any]]:
        """A chart for :class:`~lightning_eff.callbacks.TensorBoardLayout`: the averages beside the live weights."""
        if self.validate_with != "both" and len(self._labels()) == 1:
            return {}
        names = "(val_loss|val/loss)"
        return {
            f"validation loss, live and {self.name}": ["Multiline", [names, f"{re.escape(self.name)}/(.*/)?{names}"]]
        }

    def _put_in(self, trainer: Trainer, module: LightningModule, label: str) -> None:
        """Put an average in the place of the weights; without one they stay, with a message."""
        if not self.collected:
            self._tell_empty()
            return
        tensors = self._tensors.of(module)
        fresh = not self.update_bn or self._has_statistics(label)
        if not fresh:
            with torch.inference_mode(False):
                live = {name: buffer.clone() for name, buffer in batch_norm.statistics(module).items()}
            self._statistics[label] = (0, live)
        averages = ((tensors[name], average) for name, average in self._averages(label, tensors, rounded=True))
        self._swap.put_in(chain(averages, self._statistics_of(module, label)))
        self._inside = label
        if not fresh:
            # The live statistics lie in `_statistics` now, and change places with those taken here when it is over.
            batch_norm.recompute_statistics(trainer, module, self.update_bn or 1)
            self._statistics[label] = (self.collected, self._statistics[label][1])

    def _take_out(self, module: LightningModule) -> None:
        if self._swap.active:
            reshard(module)
            self._swap.take_out()
        self._inside = None

    def _before_end(self, loop: _EvaluationLoop) -> None:
        self._take_out(loop.trainer.lightning_module)

    def _tell_empty(self) -> None:
        if not self._told_empty:
            self._told_empty = True
            rank_zero_info(
                f"{type(self).__name__}({self.name!r}) has collected nothing yet (the first time is after update "
                f"{self._next_due(0)}): the current weights stand for the average"
            )

    # BatchNorm.

    def _has_statistics(self, label: str) -> bool:
        return self._statistics.get(label, (0, {}))[0] == self.collected

    def _statistics_of(self, module: LightningModule, label: str) -> Iterator[tuple[Tensor, Tensor]]:
        """BatchNorm's buffers, each with the tensor that has what belongs to an average."""
        if self.update_bn:
            _, found = self._statistics.get(label, (0, {}))
            live = batch_norm.statistics(module)
            yield from ((live[name], other) for name, other in found.items() if name in live)

    def _update_statistics(self, trainer: Trainer, module: LightningModule, label: str) -> None:
        if self.update_bn and self.collected and not self._has_statistics(label):
            try:
                self._put_in(trainer, module, label)
            finally:
                self._take_out(module)

    # Files.

    def _write_beside(self, checkpoint: dict[str, Any], path: str) -> None:
        trainer = self._trainer
        if trainer is None:
            return
        module = trainer.lightning_module
        paused, self._paused = self._paused or self._inside, None
        self._take_out(module)
        if self.save != "none":
            self._write_average(trainer, module, checkpoint, path)
        if paused is not None:
            self._put_in(trainer, module, paused)

    def _write_average(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any], path: str) -> None:
        if not self.collected:
            self._tell_empty()
        for label in self._saved_labels() if self.collected else [""]:
            self._update_statistics(trainer, module, label)
            tensors = self._tensors.of(module)
            averages: dict[int, Tensor] = {}
            if self.collected:
                own = self._tensors.originals(module)
                averages = {id(own[name]): a for name, a in self._averages(label, tensors, rounded=False)}
                averages |= {id(buffer): other for buffer, other in self._statistics_of(module, label)}
            state = averaged_state(module, averages, keep=trainer.is_global_zero)
            if trainer.is_global_zero:
                safe, lightning = averaged_paths(path, f"{self.name}-{label}" if label else self.name)
                paths = (safe if self.save != "ckpt" else None, lightning if self.save != "safetensors" else None)
                write_averaged(checkpoint, state, paths, {"step": self._count(), **self._about(label)})

    def _remove(self, path: str) -> None:
        if self.save != "none" and self._trainer is not None and self._trainer.is_global_zero:
            for label in self._saved_labels():
                remove_averaged(path, f"{self.name}-{label}" if label else self.name)
