"""The averages beside the checkpoints of a run: written, linked and removed with them, and read where they are lost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import Tensor

from lightning_eff.callbacks.averaging.files import (
    KEY as AVERAGE,
)
from lightning_eff.callbacks.averaging.files import (
    as_saved,
    averaged_paths,
    averaged_state,
    link_averaged,
    read_averaged,
    remove_averaged,
    without_training,
    write_averaged,
)
from lightning_eff.callbacks.averaging.stand_in import StandIn
from lightning_eff.training.later_files import Save as SaveObject
from lightning_eff.training.later_files import saver_of
from lightning_eff.training.namespaces import MisconfigurationException, is_a
from lightning_eff.training.rank_state import KEY
from lightning_eff.training.trainer import callbacks_of
from lightning_eff.training.whole_files import Attempts
from lightning_eff.training.wrapping import Wrapper

Save = Literal["all", "safetensors", "ckpt", "none"]


class BesideCheckpoints:
    """Keeps the averages' files beside the checkpoints.

    Args:
        name: of the average, which begins the files' names.
        save: which files.
        stand_in: the average and the tensors that it is of.
        empty: called where there is no average yet, and the live weights stand for it.
    """

    def __init__(self, name: str, save: Save, stand_in: StandIn, empty: Callable[[], None]) -> None:
        self.name = name
        self.save: Save = save
        self.stand_in = stand_in
        self.empty = empty
        self._attempts = Attempts(
            f"{name!r}, the averaged weights beside a checkpoint,", "what was written before stays"
        )
        self._wrappers: list[Wrapper] = []

    def attach(self, trainer: Trainer) -> None:
        """Follow the links to checkpoints that ``ModelCheckpoint(save_last="link")`` makes, and what a fit loads.

        Raises:
            MisconfigurationException: something else is saved as the module's weights.
        """
        self.detach()
        self._wrappers.append(Wrapper(trainer.strategy, "load_checkpoint", _refuse_average))

        def link(make: Callable[..., None], trainer: Trainer, filepath: str, linkpath: str) -> None:
            if self.save != "none" and trainer.is_global_zero and filepath != linkpath:
                saver = saver_of(trainer.strategy)
                for name in self._names():
                    attempt = partial(self._attempts, partial(link_averaged, filepath, linkpath, name))
                    saver.after_saves(attempt, here=True) if hasattr(saver, "after_saves") else attempt()
            make(trainer, filepath, linkpath)  # and then waits for rank zero

        for callback in callbacks_of(trainer):
            if self.save != "none" and is_a(callback, ModelPruning) and callback._make_pruning_permanent:
                raise MisconfigurationException(
                    "ModelPruning(make_pruning_permanent=True) saves each weight times its mask in place of the two, "
                    f"and {self.name!r}, the averaged weights beside a checkpoint, does not: give ModelPruning "
                    "make_pruning_permanent=False, or the average save='none'"
                )
            if is_a(callback, ModelCheckpoint) and callback.save_last == "link":
                self._wrappers.append(Wrapper(callback, "_link_checkpoint", link))

    def detach(self) -> None:
        """Leave them."""
        for wrapper in self._wrappers:
            wrapper.remove()
        self._wrappers = []

    def write(self, trainer: Trainer, checkpoint: dict[str, Any], path: str, step: int) -> None:
        """Write the averages beside a checkpoint after ``step`` updates. Collective."""
        if self.save == "none":
            return
        average, module = self.stand_in.average, trainer.lightning_module
        if not average.collected:
            self.empty()
        self.stand_in.follow(module)
        for label, name in zip(average.saved_labels, self._names(), strict=True):
            if not average.collected and label:
                continue
            self.stand_in.update_statistics(trainer, label)
            averages: dict[int, Tensor] = {}
            if average.collected:
                tensors, own = self.stand_in.tensors.of(module), self.stand_in.tensors.originals(module)
                averages = {id(own[name]): a for name, a in average.read(label, tensors, rounded=False)}
                averages |= {id(buffer): other for buffer, other in self.stand_in.statistics_of(module, label)}
            in_place = partial(self.stand_in.in_place, trainer, label)
            state = averaged_state(module, averages, in_place, keep=trainer.is_global_zero)
            if trainer.is_global_zero:
                safe, lightning = averaged_paths(path, name)
                paths = (safe if self.save != "ckpt" else None, lightning if self.save != "safetensors" else None)
                of = checkpoint.get(KEY, {}).get("id", "")
                state = as_saved(checkpoint.get("state_dict") or {}, module, state)
                about = {"version": 1, "step": step, **average.about(label), "of": of}
                self._write(saver_of(trainer.strategy), name, without_training(checkpoint), state, paths, about)

    def _write(self, saver: Any, name: str, run: Any, state: Any, paths: Any, about: dict[str, Any]) -> None:
        """Now, or behind the checkpoint where that is written later."""
        if not hasattr(saver, "write_later"):
            self._attempts(partial(write_averaged, run, state, paths, about))
            return

        def write(copied: tuple[Any, Any], save: SaveObject) -> None:
            self._attempts(partial(write_averaged, *copied, paths, about, save))

        saver.write_later(f"averaged weights, {name}", (run, state), write)

    def recover(self, checkpoint: dict[str, Any], path: str) -> dict[str, Any] | None:
        """The averages beside a checkpoint whose window is lost, if they are of the same step."""
        found = [read_averaged(path, name) for name in self._names()]
        averaged = [average for average in found if average is not None]
        identity = checkpoint[KEY]["id"]
        usable = all(about.get("of") == identity and "scheme" in about for _, about in averaged)
        if len(averaged) < len(found) or not usable:
            return None
        return {"averaged": averaged}

    def remove(self, trainer: Trainer, path: str) -> None:
        """Remove them with their checkpoint."""
        if self.save != "none" and trainer.is_global_zero:
            for name in self._names():
                remove_averaged(path, name)

    def _names(self) -> list[str]:
        return [f"{self.name}-{label}" if label else self.name for label in self.stand_in.average.saved_labels]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_wrappers": []}


def _refuse_average(load: Callable[..., dict[str, Any]], path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Lightning would say that the checkpoint was saved with ``save_weights_only``."""
    checkpoint = load(path, *args, **kwargs)
    if AVERAGE in checkpoint:
        about = checkpoint[AVERAGE]
        raise MisconfigurationException(
            f"{path} holds the weights averaged until update {about['step']}, from which no training can go on: resume "
            "from the checkpoint that it lies beside, whose name has no average's in front. To begin another training "
            "with these weights, load them by load_from_checkpoint"
        )
    return checkpoint
