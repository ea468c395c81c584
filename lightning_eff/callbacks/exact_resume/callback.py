"""ExactResume: a run that was killed is the run that was not."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_eff.arguments import check_choice
from lightning_eff.callbacks.exact_resume.buffers import NO_BUFFERS, own_buffers, set_own_buffers
from lightning_eff.callbacks.exact_resume.generators import GeneratorsOfRun
from lightning_eff.callbacks.exact_resume.gradients import UnusedGradients
from lightning_eff.callbacks.exact_resume.loaders import Iterable, Loaders
from lightning_eff.callbacks.exact_resume.logged import logged, set_logged
from lightning_eff.callbacks.exact_resume.run_place import RunPlace
from lightning_eff.callbacks.exact_resume.seeds import Seeds
from lightning_eff.training.hooks import Order
from lightning_eff.training.namespaces import MisconfigurationException, is_a
from lightning_eff.training.random_state import seed_host, set_random_state
from lightning_eff.training.rank_state import KEY as RANK_STATE
from lightning_eff.training.rank_state import RankState
from lightning_eff.training.state_version import check_version
from lightning_eff.training.trainer import callbacks_of, replicas_are_equal, sort_callbacks

Randomness = Literal["stock", "seeded"]


class ExactResume(Callback):
    """Makes every checkpoint that Lightning writes one from which the run goes on as if it had not been broken off.

    To the bit: weights, optimizers, values logged, the order of samples and the augmentations inside workers. With the
    checkpoint are saved, for each rank, the random generators, the place in each training loader with what its order
    was drawn from, the random states of its workers, the gradients of a window of accumulation that is not full, a
    rank's own buffers, and the epoch's means; and where in Lightning's loops it was saved, so that a validation or an
    epoch's end that was still to come still comes. Batches that were seen are skipped at the sampler and not loaded.

    A checkpoint that is saved within a batch (because of an exception, say) belongs to the end of the batch before.

    Runs in: behind ``on_train_batch_end``, around Lightning's loops, and when a checkpoint is saved or loaded.
    Reads: random generators, samplers, gradients, what was logged.
    Changes: nothing, until a run resumes.
    Collectives: none of its own; saving and loading as ``RankState`` does.
    Host syncs: none, but when a checkpoint is saved.
    Strategies: one device, DDP, FSDP2, those of the suite.

    Args:
        iterable: what is done with an ``IterableDataset``, or data that are no DataLoader, without a ``state_dict`` of
            their own. ``"replay"``: what was seen of the epoch is loaded once more and dropped. ``"refuse"``: an error
            when the fit begins.
        randomness: where random numbers come from. ``"stock"``: from where they come without this callback, so the run
            is plain Lightning's to the bit; the states of a loader's workers travel with each batch. ``"seeded"``:
            each order, each batch that is loaded and each training step draws from the seed that torch had when the fit
            began, the epoch and the number of the batch, and what a batch draws while it is loaded is the same with
            any number of workers.

    With another number of ranks or another batch size the rest of an epoch is dealt anew in the same order, so that
    each of its samples is still seen once, and a warning says that the run is not equal to the bit from there on.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: in ``setup``, for two of these callbacks; when the fit begins, for data that cannot
            be resumed exactly; on resume, for other data than those of the run that was broken off.

    Example:
        >>> import lightning as L
        >>> from lightning_eff.callbacks import ExactResume
        >>> trainer = L.Trainer(max_steps=1, callbacks=[ExactResume()], logger=False)

    Source: ours.
    """

    order = Order.FIRST

    def __init__(self, iterable: Iterable = "replay", randomness: Randomness = "stock") -> None:
        check_choice("iterable", iterable, Iterable)
        check_choice("randomness", randomness, Randomness)
        self.iterable: Iterable = iterable
        self.randomness: Randomness = randomness
        self._place = RunPlace()
        self._gradients = UnusedGradients()
        self._state = RankState("exact_resume", save=self._save, load=self._load, recover=self._recover)
        self._trainer: Any = None
        self._loaders: Any = None
        self._generators: Any = None
        self._saved: dict[str, Any] | None = None
        self._seeds: Seeds | None = None

    # --- attaching ---------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if sum(isinstance(callback, ExactResume) for callback in callbacks_of(trainer)) > 1:
            raise MisconfigurationException("two ExactResume callbacks would both place the loaders: keep one")
        sort_callbacks(trainer)
        self._detach()
        self._trainer = trainer
        self._seeds = None
        if self.randomness == "seeded":
            self._seeds = Seeds(torch.initial_seed(), trainer.global_rank, lambda: int(trainer.current_epoch))
        self._loaders = Loaders(trainer, self._place, self.iterable, self._seeds)
        self._load(None)
        self._state.attach(trainer.strategy)
        self._generators = GeneratorsOfRun(trainer)
        self._place.attach(
            trainer,
            self._generators,
            set_loaders=lambda: self._loaders.set(self._saved),
            begin=lambda: self._begin(trainer),
            begin_batch=lambda: self._begin_batch(trainer),
            begin_epoch=self._begin_epoch,
        )

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if "exact_resume" not in checkpoint.get(RANK_STATE, {}).get("names", ()):
            rank_zero_warn(
                "ExactResume: this checkpoint was saved without it, so the run goes on as Lightning does: with other "
                "random numbers, and in another order"
            )

    # --- during the run ----------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._gradients.attach(trainer)

    def _begin_batch(self, trainer: Trainer) -> None:
        """A batch is about to be asked for."""
        self._gradients.begin_batch()
        if self._seeds is not None:
            seed = self._seeds.of_batch(trainer.fit_loop.epoch_loop.batch_progress.current.ready)
            seed_host(seed)
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.manual_seed(seed)  # of the current device, which is this one
        self._loaders.begin_batch()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._place.end_batch()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._place.end_validation()

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self) -> dict[str, Any]:
        trainer = self._trainer
        batches = self._place.batches(trainer)
        going_on = self._saved
        if going_on is not None and self._place.stage == "outside":  # nothing has happened yet
            return {name: value for name, value in going_on.items() if name != "ranks"}
        gradients = self._gradients.state(trainer, batches)
        automatic = trainer.lightning_module.automatic_optimization
        return {
            "version": 2,
            "seed": None if self._seeds is None else self._seeds.base,
            "window": batches % trainer.accumulate_grad_batches if gradients and batches and automatic else 0,
            "place": self._place.state(trainer),
            **self._loaders.state(batches, going_on),
            "gradients": gradients,
            "buffers": own_buffers(trainer),
            "logged": logged(trainer),
        }

    def _load(self, saved: dict[str, Any] | None) -> None:
        if saved is not None:
            check_version("ExactResume", saved, known=2)
            precision = self._trainer.precision_plugin
            if is_a(precision, DoublePrecision):
                # Lightning loads weights before it makes the module float64: the half of their digits would be lost.
                precision.convert_module(self._trainer.lightning_module)
            seed = saved.get("seed")
            if (seed is None) == (self.randomness == "seeded"):
                rank_zero_warn(
                    f"ExactResume(randomness={self.randomness!r}): this checkpoint was saved with the other one, so "
                    "from here on the run is not equal to the bit"
                )
            elif self._seeds is not None and seed is not None:
                self._seeds.base = seed
        self._saved = saved
        self._place.load(None if saved is None else saved["place"])

    def _recover(self, checkpoint: dict[str, Any], path: str) -> dict[str, Any] | None:
        """With another number of ranks: what one of those that there were has saved."""
        ranks = checkpoint[RANK_STATE]["world_size"]
        if ranks == self._trainer.world_size:
            return None
        state = self._state.of_rank(path, checkpoint, self._trainer.global_rank % ranks)
        if state is None:
            return None
        logged = {"results": {}, "metrics": {}, "made": {}, "shown": state["logged"]["shown"]}  # sums over other ranks
        return {**state, "ranks": ranks, "gradients": {}, "buffers": NO_BUFFERS, "logged": logged}

    def _begin(self, trainer: Trainer) -> None:
        """Everything is set up, ``on_train_start`` is behind: from here on the run is the one that was broken off."""
        saved = self._saved
        if saved is None:
            return
        # Version 1 had them beside the place.
        self._generators.set(saved["place"].get("generators", saved.get("generators", {})))
        self._gradients.set(trainer, saved["gradients"])
        if saved["gradients"] and replicas_are_equal(trainer.strategy):
            rank_zero_warn(
                "ExactResume: this checkpoint was saved within a window of accumulation, with the gradients of the "
                "one replica that wrote it. If there were others, the step of this window is not equal to the bit"
            )
        set_own_buffers(trainer, saved["buffers"])
        set_logged(trainer, saved["logged"])
        set_random_state(saved["place"]["random"], trainer.strategy.root_device)

    def _begin_epoch(self, fetcher: _DataFetcher) -> None:
        saved, self._saved = self._saved, None
        if saved is not None:
            self._loaders.begin_epoch(saved, fetcher)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._gradients.stop()  # and what is known of them stays, for a checkpoint that is saved now

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def _detach(self) -> None:
        self._place.detach()
        self._gradients.detach()
        if self._loaders is not None:
            self._loaders.detach()
