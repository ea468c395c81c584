"""When an average of the weights is collected, evaluated, saved and restored, whatever average it is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_eff.arguments import check, check_choice, check_count, check_flag
from lightning_eff.callbacks.averaging.average import Average
from lightning_eff.callbacks.averaging.beside_checkpoints import BesideCheckpoints, Save
from lightning_eff.callbacks.averaging.evaluations import Evaluations, ValidateWith
from lightning_eff.callbacks.averaging.restored import in_parts, of_files
from lightning_eff.callbacks.averaging.stand_in import StandIn
from lightning_eff.callbacks.averaging.trained_tensors import TrainedTensors
from lightning_eff.training.namespaces import MisconfigurationException, is_a
from lightning_eff.training.rank_state import RankState
from lightning_eff.training.state_version import check_version
from lightning_eff.training.trainable import TrainableChange
from lightning_eff.training.trainer import callbacks_of, refuse_flattened, replicas_are_equal
from lightning_eff.training.update_count import UpdateCount

Buffers = Literal["copy", "average"]


class AveragedWeights(Callback):
    """Keeps an average of the weights along a run; the arguments are those of
    :class:`~lightning_eff.callbacks.CheckpointAveraging`, and ``average`` makes what is kept.

    What is averaged: every floating-point parameter that has been trained since the run began (a frozen one is its own
    average), under its clean name, and with ``buffers="average"`` the floating-point buffers.
    """

    def __init__(
        self,
        average: Callable[[], Average],
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
        check_count("every_n_steps", every_n_steps)
        check_count("start_step", start_step, least=0)
        check_choice("validate_with", validate_with, ValidateWith)
        check_choice("buffers", buffers, Buffers)
        check_count("update_bn", update_bn, optional=True)
        check_choice("save", save, Save)
        check_flag("replace_at_end", replace_at_end)
        self.name = name
        self.every_n_steps = every_n_steps
        self.start_step = start_step
        self.validate_with: ValidateWith = validate_with
        self.update_bn = update_bn
        self.replace_at_end = replace_at_end
        self.average = average()

        who = type(self).__name__
        self._trainer: Trainer  # from `setup` on
        self._updates = UpdateCount()
        self._trained: list[int] = []  # the ids of what they train
        self._due = 0
        self._counted = False  # the updates are those of the checkpoint that the run resumes from
        self._restored: dict[str, Any] | None = None
        self._told_empty = False
        self._evaluates = False  # this is no fit
        self._tensors = TrainedTensors(buffers == "average")
        self._stand_in = StandIn(self.average, self._tensors, update_bn)
        self._evaluations = Evaluations(who, name, validate_with, self._stand_in, self._tell_empty)
        self._beside = BesideCheckpoints(name, save, self._stand_in, self._tell_empty)
        self._files = self._rank_state()

    @property
    def collected(self) -> int:
        """How many times something has been collected; 0: there is no average yet."""
        return self.average.collected

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    # The run.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer
        self._evaluates = stage != "fit"
        refuse_flattened(trainer, type(self).__name__, "flattens or partitions parameters out of sight")
        if replicas_are_equal(trainer.strategy) and self.update_bn and stage == "fit":
            raise MisconfigurationException(
                f"update_bn={self.update_bn} does not go with {type(trainer.strategy).__name__}, in which taking a "
                "training batch begins a step of all replicas: leave it out"
            )
        others = [c for c in callbacks_of(trainer) if isinstance(c, AveragedWeights) and c is not self]
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
            self._files.replicated = not is_a(trainer.strategy, ModelParallelStrategy)
            self._files.attach(trainer.strategy)
            self._beside.attach(trainer)
        self._evaluations.attach(trainer, stage)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._count_updates(trainer.optimizers)

    def _count_updates(self, optimizers: list[Optimizer]) -> None:
        made = self._count()
        self._updates.attach(optimizers)
        if self._count() < made:  # they are fewer or more than before
            self._updates.load_state_dict({"updates": [made] * len(optimizers)})

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restored, self._restored = self._restored, None
        counted, self._counted = self._counted, False
        before = self._evaluations.module
        if restored is None and not counted and (trainer.global_step == 0 or before is not pl_module):
            # A new run, whatever this callback was in before, or one that it has been added to at a resume: the
            # updates that were made without it count as well, as far as Lightning knows.
            self.average.reset()
            self._tensors.names = set()
            optimizers = max(1, len(trainer.optimizers))
            goes_on = before is None or trainer.ckpt_path is not None
            made = math.ceil(trainer.global_step / optimizers) if goes_on else 0
            self._updates.load_state_dict({"updates": [made] * len(trainer.optimizers)})
        self._told_empty = False
        self._begin(pl_module, restored)

    def _begin(self, pl_module: LightningModule, restored: dict[str, Any] | None) -> None:
        """Go on from what was restored, or else from what is there."""
        every = self._tensors.every(pl_module)
        trained = self._tensors.names
        if restored is not None:
            if "averaged" in restored:
                averages, about = of_files(restored["averaged"], pl_module, self._tensors, every)
                trained, fits = set(averages[0]), self.average.recover(averages, about)
            else:
                trained = set(restored["trained"])
                fits = self.average.load(in_parts(restored["state"], self._tensors.originals(pl_module)), every)
            if not fits:
                rank_zero_info(f"{type(self).__name__}: the saved average is of another model; it starts anew")
        self._trained = []
        self._tensors.begin(pl_module, trained)
        for name, tensor in self._tensors.of(pl_module).items():
            self.average.add(name, tensor)  # one that is trained only now has been the same until now
        self._stand_in.begin()
        self._evaluations.begin(pl_module)
        self._due = self._next_due(self._count())

    def run_state(self) -> dict[str, Any]:
        """The average by reference, so that a heal needs no other copy of it, and when the next collection is due."""
        counts, state = self._updates.state_dict(), self.average.held_state()
        return {**counts, "trained": sorted(self._tensors.names), "state": state, "due": self._due}

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
        """Average what is unfrozen."""
        self._stand_in.unfreeze(change.unfrozen)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self._updates.counts(optimizer):  # made anew in the midst of the fit
            self._count_updates(trainer.optimizers)
        # The last moment at which one that somebody else has unfrozen is what it was.
        self._stand_in.unfreeze(self._tensors.unfrozen_by_others(pl_module))

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
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        trained = [id(parameter) for group in groups for parameter in group["params"]]
        if trained != self._trained:
            self._trained = trained
            self._stand_in.follow(pl_module)
        self.average.collect(step, self._tensors.now(pl_module))

    def _count(self) -> int:
        """Real updates: with several optimizers those of the one that has made the most."""
        return max(self._updates.state_dict()["updates"], default=0)

    def _next_due(self, step: int) -> int:
        first = max(1, math.ceil(self.start_step / self.every_n_steps)) * self.every_n_steps
        return max(first, (step // self.every_n_steps + 1) * self.every_n_steps)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.replace_at_end:
            self._stand_in.update_statistics(trainer, "")  # as long as there is data

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before: the checkpoints that are saved at the end of training have the live weights.
        if self.replace_at_end and self.collected:
            self._stand_in.stay(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave(trainer)  # there will be no `teardown`

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave(trainer)

    def _leave(self, trainer: Trainer) -> None:
        try:
            self._stand_in.take_out(trainer)
        finally:
            self._evaluates = False
            self._updates.detach()
            self._evaluations.detach()
            self._beside.detach()

    # Evaluation.

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluations.replace(trainer)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluations.replace(trainer)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluations.log_beside(trainer, pl_module)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluations.log_beside(trainer, pl_module)

    def tensorboard_charts(self, trainer: Trainer) -> dict[str, list[Any]]:
        """A chart for :class:`~lightning_eff.callbacks.TensorBoardLayout`: the averages beside the live weights."""
        if self.validate_with != "both" and len(self.average.labels) == 1:
            return {}
        names, own = "(val_loss|val/loss)", re.escape(self.name)
        runs = {"validation": [names]} | {
            f"{self.name} {label}".strip(): [f"{own}/{re.escape(label)}/{names}" if label else f"{own}/{names}"]
            for label in self.average.labels
        }
        return {f"validation loss, live and {self.name}": ["Colours", runs]}

    def _tell_empty(self) -> None:
        if not self._told_empty:
            self._told_empty = True
            rank_zero_info(
                f"{type(self).__name__}({self.name!r}) has collected nothing yet (the first time is after update "
                f"{self._next_due(0)}): the current weights stand for the average"
            )

    # Checkpoints.

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"version": 1, **self._updates.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._evaluates:
            return  # `Trainer.test(ckpt_path=...)` gives callbacks their states too, and no run goes on
        check_version(type(self).__name__, state_dict, known=1)
        self._updates.load_state_dict(state_dict)
        self._counted = bool(state_dict["updates"])
        if self._restored is None:  # there is none, or RankState has said that it is lost
            self.average.reset()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._files.follows(trainer.strategy):
            rank_zero_warn(
                f"{type(self).__name__}({self.name!r}) writes no average beside this checkpoint: its training was in "
                "another process (a spawned one), or has not been. Save within the run, by ModelCheckpoint for instance"
            )

    def _rank_state(self) -> RankState:
        return RankState(
            f"average-{self.name}",
            self._save_rank,
            self._load_rank,
            saved=self._write_beside,
            removed=lambda path: self._beside.remove(self._trainer, path),
            recover=self._beside.recover,
        )

    def _save_rank(self) -> dict[str, Any]:
        self._stand_in.follow(self._trainer.lightning_module)
        return {"version": 1, "trained": sorted(self._tensors.names), "state": self.average.state()}

    def _load_rank(self, state: dict[str, Any] | None) -> None:
        check_version(f"the average {self.name!r}", state or {}, known=1)
        self._restored = state  # the model's tensors are not there yet under every strategy

    def _write_beside(self, checkpoint: dict[str, Any], path: str) -> None:
        self._beside.write(self._trainer, checkpoint, path, self._count())

    def __getstate__(self) -> dict[str, Any]:
        of_this_process = ("_files", "_trainer")
        return {name: value for name, value in vars(self).items() if name not in of_this_process}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._files = self._rank_state()
