"""GradES as a Lightning callback."""

from __future__ import annotations

from typing import Any, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_eff.arguments import check, is_count
from lightning_eff.callbacks.grades.progress import fraction_done, passed_slots
from lightning_eff.callbacks.grades.units import FreezableUnits
from lightning_eff.callbacks.grades.watch import Unfreeze, UnitWatch, charts, mean_loss
from lightning_eff.functional.grades import GradESConfig, Metric, TauMode
from lightning_eff.structure.flops import backward_flops
from lightning_eff.training.host_copy import HostCopy
from lightning_eff.training.optimizer_state import allow_absent_states, check_release_support, release_state
from lightning_eff.training.rank_state import RankState
from lightning_eff.training.trainable import check_trainable_support, set_trainable
from lightning_eff.training.trainer import applied_scale

_COPIES = "lightning_eff_grades"  # in the checkpoint, where the ranks are equal


class GradES(Callback):
    """Freezes each weight matrix once its gradient has settled, and ends the training when all have.

    A frozen matrix gets no gradient: its part of the backward pass, of the reduction between ranks and of the
    optimizer's step is really left out. Gradients still flow through it to the layers before.

    Runs in: ``on_before_optimizer_step`` every ``check_every_n_steps``; events in ``on_train_batch_end``, a step later.
    Reads: the gradients of the matrices that are not frozen (``metric="weight_change"``: their weights), once a check.
    Changes: ``requires_grad``; with ``release_state`` the optimizer's state; ``trainer.should_stop``.
    Collectives: those of ``set_trainable`` at an event; a check one small one on FSDP2, and with ``unfreeze="loss"``.
    Host syncs: after the grace period one read a check, of values that were queued a step before.
    Strategies: one device, DDP and its kin without ``static_graph``, ``ddp_ft``, FSDP2 and tensor parallelism.

    Args:
        tau: a matrix whose metric stays below is frozen, > 0; a fraction of its level, or with
            ``tau_mode="absolute"`` in units of the metric: never carry such a number over to another metric, model,
            batch size or learning rate.
        alpha: grace period, as a fraction of the run, in [0, 1): nothing is frozen in it.
        metric: ``"grad_change"``: sum of absolute differences to the gradient at the check before (the paper's formula
            where every step is a check); ``"grad"``: sum of absolute values; ``"weight_change"``: sum of the absolute
            changes of the weights since the check before (the authors' code; it falls with the learning rate alone).
            All but ``"grad"`` keep one copy of what they watch, in memory and in the checkpoint.
        tau_mode: ``"relative"`` to the matrix's own level, the mean of its last five checks in the grace period, or
            ``"absolute"``, as in the paper.
        check_every_n_steps: optimizer steps from check to check, >= 1.
        patience: checks below the threshold in a row, >= 1.
        include: globs on the names of parameters to watch; None: the matrices inside repeated blocks. Embeddings, heads
            and norms are left out unless they are named here. A LoRA pair is one unit.
        exclude: globs of what to leave out again.
        prefix: globs on the names of what lies before the blocks, ``["*embed*"]`` for instance. When all matrices of
            the first blocks are frozen, it and the rest of these blocks (norms, biases) are frozen too, and the
            backward pass ends there. None: only matrices are frozen.
        max_frozen_ratio: never more than this fraction of the matrices is frozen, in (0, 1].
        stop_when_frozen: end the training when that fraction is reached.
        release_state: free the optimizer's state of frozen parameters. Re-opened ones begin with a new state.
        max_events: times at most that the set of trained parameters changes, evenly spaced after the grace period,
            >= 1: each costs DDP new buckets and ``torch.compile`` a recompilation (torch gives up after 8). None: at
            any check.
        unfreeze: re-open a matrix that was frozen too soon (beyond the paper): ``"loss"`` when the training loss rises
            above what it was at the freezing, ``"neighbours"`` when the metric of the other matrices in its block does.
            None: never.
        unfreeze_factor: by how much it must rise, > 1.
        log_metric: also log, for every matrix, ``grades/metric/<name>`` and ``grades/metric_per_element/<name>``.
        heat_map: at the end draw the metric of every matrix over the run (needs the extra ``plots`` and a logger).

    Logs, at the Trainer's ``log_every_n_steps``: ``grades/frozen_ratio``, of the matrices; ``grades/frozen_params``,
    the number of elements that are frozen; ``grades/backward_flops_saved``, the fraction of the backward pass's
    products with weights; ``grades/frozen_attention`` and so on, matrices by their role. TensorBoard also gets a text
    for each event (``grades/events``) and the heat map (``grades/heat_map``), which any other logger has as a PNG file
    beside its own.

    After the fit all parameters are open again. ``trainer.fit`` on the same objects goes on where it was; with a new
    model and Trainer the callback starts anew.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: in ``setup``, for a strategy or another callback that does not go with it; at the
            start of ``fit``, for patterns that select nothing, and for a Trainer without a limit that ``alpha`` or
            ``max_events`` could be a fraction of.

    Example:
        >>> import lightning as L
        >>> from lightning_eff.callbacks import GradES
        >>> trainer = L.Trainer(max_steps=1, callbacks=[GradES(tau=0.5, check_every_n_steps=20)], logger=False)

    Source: Wen et al., "GradES: Significantly Faster Training in Transformers with Gradient-Based Early Stopping",
    arXiv 2509.01842. What the authors' code does otherwise, and why, is in the method's card.
    """

    observes_gradients = True
    changes_trainable = True

    def __init__(
        self,
        tau: float = 0.5,
        alpha: float = 0.5,
        metric: Metric = "grad_change",
        tau_mode: TauMode = "relative",
        check_every_n_steps: int = 10,
        patience: int = 3,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        prefix: list[str] | None = None,
        max_frozen_ratio: float = 1.0,
        stop_when_frozen: bool = True,
        release_state: bool = False,
        max_events: int | None = 6,
        unfreeze: Unfreeze | None = None,
        unfreeze_factor: float = 1.5,
        log_metric: bool = False,
        heat_map: bool = True,
    ) -> None:
        check("alpha", alpha, 0 <= alpha < 1, "in [0, 1)")
        check("metric", metric, metric in get_args(Metric), f"one of {get_args(Metric)}")
        count = is_count(check_every_n_steps)
        check("check_every_n_steps", check_every_n_steps, count, "an integer of at least 1")
        check("max_frozen_ratio", max_frozen_ratio, 0 < max_frozen_ratio <= 1, "in (0, 1]")
        check("max_events", max_events, max_events is None or is_count(max_events), "an integer of at least 1, or None")
        check("unfreeze", unfreeze, unfreeze in (None, *get_args(Unfreeze)), f"one of {get_args(Unfreeze)}, or None")
        check("unfreeze_factor", unfreeze_factor, 1 < unfreeze_factor < float("inf"), "above 1 and finite")
        for name, patterns in (("include", include), ("exclude", exclude), ("prefix", prefix)):
            check(name, patterns, not isinstance(patterns, str) and patterns != [], "a list of patterns, or None")
        factor = unfreeze_factor if unfreeze else None
        self.config = GradESConfig(tau=tau, tau_mode=tau_mode, patience=patience, unfreeze_factor=factor)
        self.alpha = alpha
        self.metric: Metric = metric
        self.check_every_n_steps = check_every_n_steps
        self.include, self.exclude, self.prefix = include, exclude, prefix
        self.max_frozen_ratio = max_frozen_ratio
        self.stop_when_frozen = stop_when_frozen
        self.release_state = release_state
        self.max_events = max_events
        self.unfreeze = unfreeze
        self.log_metric = log_metric
        self.heat_map = heat_map
        self._watch: UnitWatch | None = None  # in a fit
        self._rank_state: RankState | None = None
        self._closed: dict[str, nn.Parameter] = {}  # by this callback, in this fit
        self._decision: HostCopy | None = None
        self._flops = (0, 0)  # of a backward pass, before and now
        self._stepped = self._checked = self._armed = False  # in this batch
        self._reset()

    def _reset(self) -> None:
        """As before any training."""
        self._saved: dict[str, Any] = {"step": 0, "attempts": [], "slots": 0, "decided": False, "watch": None}
        self._saved_copies: dict[str, Tensor] = {}
        self._step = 0
        self._attempts: list[int] = []  # steps of each optimizer
        self._slots = 0  # of max_events, that are behind

    @property
    def frozen(self) -> dict[str, int]:
        """Name of each frozen unit -> the step at which it was frozen."""
        if self._watch is not None:
            return dict(self._watch.frozen)
        return dict(self._saved["watch"]["frozen"]) if self._saved["watch"] else {}

    # --- a run begins and ends --------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_trainable_support(trainer)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if other is not self and getattr(other, "changes_trainable", False):
                raise MisconfigurationException(
                    f"GradES and {type(other).__name__} would both open and close parameters: keep one of them"
                )
        allow_absent_states(trainer.strategy)
        if not isinstance(trainer.strategy, ModelParallelStrategy) or self.metric == "grad":
            self._rank_state = None
            return
        if self._rank_state is None:
            self._rank_state = RankState("grades", save=self._copies, load=self._load_copies)
        self._rank_state.attach(trainer.strategy)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.release_state:
            check_release_support(trainer.optimizers, reopen=self.unfreeze is not None)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (self.alpha > 0 or self.max_events is not None) and fraction_done(trainer, 0) is None:
            raise MisconfigurationException(
                f"GradES(alpha={self.alpha}, max_events={self.max_events}) are parts of a run without an end: give the "
                "Trainer max_steps, or max_epochs with data of a known length, or set alpha=0 and max_events=None"
            )
        if trainer.global_step < self._step:
            self._reset()  # another run
        if self._closed:  # by a run within this fit, such as the learning rate finder's
            set_trainable(trainer, dict.fromkeys(self._closed, True))
            self._closed = {}
        units = FreezableUnits(pl_module, trainer.optimizers, self.include, self.exclude, self.prefix)
        if len(self._attempts) != len(trainer.optimizers):
            self._attempts = [0] * len(trainer.optimizers)
        self._flops = (backward_flops(pl_module),) * 2
        device = trainer.strategy.root_device
        self._watch = UnitWatch(units, self.config, self.metric, self.unfreeze, self.heat_map, device)
        self._restore()
        if self._watch.frozen:
            self._take_up(trainer)

    def _take_up(self, trainer: Trainer) -> None:
        """Go on with what is frozen in the state that was taken."""
        assert self._watch is not None
        if self.stop_when_frozen and len(self._watch.frozen) >= self._limit:
            self._stop(trainer, "are frozen already")
        else:
            self._close(trainer)

    def _restore(self) -> None:
        """Take the loaded state, if there is one."""
        assert self._watch is not None
        self._stepped = self._checked = False
        if self._saved["watch"] is not None:
            self._watch.load_state_dict(self._saved["watch"], self._saved_copies)
        self._decision = self._watch.decide() if self._saved["decided"] else None
        self._saved_copies = {}

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watch is None:
            return
        if self._armed and not self._watch.frozen:  # else a user looks for a mistake of his own
            rank_zero_info(f"GradES froze nothing of {len(self._watch.units.names)} matrices: {self._watch.why_none()}")
        if self._watch.map is not None:
            unit = "over its level" if self.config.tau_mode == "relative" else "per element"
            title = f"GradES: {self.metric} of each matrix, {unit}"
            self._watch.map.publish(trainer, "grades/heat_map", title, scale="log", missing="frozen")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open what was closed, and keep the state alone: freezing belongs to the run and not to the model."""
        if self._watch is not None:
            self._saved, self._saved_copies = self.state_dict(), self._watch.copies()
        for parameter in self._closed.values():
            parameter.requires_grad_(True)
        self._closed = {}
        self._watch = self._decision = None

    # --- a step -----------------------------------------------------------------------------------------------------

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        index = next(i for i, candidate in enumerate(trainer.optimizers) if candidate is optimizer)
        self._stepped = True
        self._attempts[index] += 1
        if self._attempts[index] % self.check_every_n_steps:
            return
        assert self._watch is not None
        done = fraction_done(trainer, trainer.global_step + 1)
        self._armed = self.alpha == 0 or (done is not None and done > self.alpha)
        scale = applied_scale(trainer, optimizer)
        self._checked |= self._watch.check(index, scale, armed=self._armed, step=trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._stepped or self._watch is None:
            return  # in the middle of an accumulation
        self._stepped, checked = False, self._checked
        self._checked = False
        self._step = trainer.global_step
        if checked and self.unfreeze == "loss":
            self._watch.hear_loss(mean_loss(trainer, outputs))
        decision, self._decision = self._decision, None
        if decision is not None:
            self._act(trainer, *self._watch.chosen(decision, self._limit))
        if checked and self._armed:
            # Read when the next step has been made: the device has long come so far by then.
            self._decision = self._watch.decide()
        if trainer._logger_connector.should_update_logs:
            for name, value in self._watch.scalars(self.log_metric).items():
                pl_module.log(f"grades/{name}", value, on_step=True, on_epoch=False, batch_size=1)
            before, now = self._flops
            saved = 1 - now / before if before else 0.0
            pl_module.log("grades/backward_flops_saved", saved, on_step=True, on_epoch=False, batch_size=1)

    # --- an event ---------------------------------------------------------------------------------------------------

    @property
    def _limit(self) -> int:
        """How many units may be frozen."""
        assert self._watch is not None
        return max(1, int(self.max_frozen_ratio * len(self._watch.units.names) + 1e-9))

    def _act(self, trainer: Trainer, frozen: list[int], opened: list[int]) -> None:
        """Freeze and re-open units, if an event is due."""
        assert self._watch is not None
        if not frozen and not opened:
            return
        ends = self.stop_when_frozen and len(self._watch.frozen) + len(frozen) - len(opened) >= self._limit
        if not ends and self.max_events is not None:
            done = fraction_done(trainer, trainer.global_step) or 0.0
            slots = passed_slots(done, self.alpha, self.max_events)
            if slots <= self._slots:
                return
            self._slots = slots
        self._watch.mark(trainer.global_step, frozen, opened)
        self._tell(trainer, frozen, opened)
        if ends:
            self._stop(trainer, "are frozen")
        else:
            self._close(trainer)

    def _close(self, trainer: Trainer) -> None:
        """Let autograd, the strategy and the optimizer know which parameters are trained from now on."""
        assert self._watch is not None
        units = self._watch.units
        closed = units.closed(self._watch.frozen)
        if units.leaves_nothing(closed):
            self._stop(trainer, "are frozen and nothing else is trained")
            return
        set_trainable(trainer, {name: name not in closed for name in closed | set(self._closed)})
        self._closed = {name: units.parameters[name] for name in sorted(closed)}
        if self.release_state:
            release_state(trainer.optimizers, self._closed.values())
        self._flops = (self._flops[0], backward_flops(trainer.lightning_module))

    def _stop(self, trainer: Trainer, why: str) -> None:
        assert self._watch is not None
        rank_zero_info(f"GradES: {self._watch.count()} {why}: training stops at step {trainer.global_step}")
        trainer.should_stop = True

    def _tell(self, trainer: Trainer, frozen: list[int], opened: list[int]) -> None:
        assert self._watch is not None
        text, names = self._watch.describe(trainer.global_step, frozen, opened)
        rank_zero_info(text)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_text("grades/events", text + names, trainer.global_step)

    def tensorboard_charts(self, trainer: Trainer) -> dict[str, list[Any]]:
        """Charts for :class:`~lightning_eff.callbacks.TensorBoardLayout`."""
        return charts(self.log_metric)

    # --- its state --------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._watch is None:
            return dict(self._saved)
        return self._state(self._watch.state_dict())

    def _state(self, watch: dict[str, Any]) -> dict[str, Any]:
        return {
            "step": self._step,
            "attempts": list(self._attempts),
            "slots": self._slots,
            "decided": self._decision is not None,
            "watch": watch,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = dict(state_dict)
        self._step = state_dict["step"]
        self._attempts = list(state_dict["attempts"])
        self._slots = state_dict["slots"]

    def _copies(self) -> dict[str, Tensor]:
        return self._saved_copies if self._watch is None else self._watch.copies()

    def _load_copies(self, copies: dict[str, Tensor] | None) -> None:
        self._saved_copies = copies or {}

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._rank_state is None and trainer.is_global_zero:
            checkpoint[_COPIES] = self._copies()

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._rank_state is None:
            self._load_copies(checkpoint.get(_COPIES))

    def run_state(self) -> dict[str, Any]:
        """All that `load_run_state` needs, by reference."""
        watch = self._watch
        return {
            "state": self.state_dict() if watch is None else self._state(watch.state_dict(by_reference=True)),
            "copies": self._saved_copies if watch is None else watch.copies(by_reference=True),
            "flags": [self._stepped, self._checked, self._armed],
            "decision": None if self._decision is None else self._decision.source,
        }

    def load_run_state(
        self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any], *, within_step: bool
    ) -> None:
        """Go on from a state of this run, on all ranks together."""
        self._load_copies(state["copies"])
        self.load_state_dict(state["state"])
        self._restore()
        if within_step:  # the same parameters are frozen here as there; what is due comes at the end of the step
            assert self._watch is not None
            self._stepped, self._checked, self._armed = state["flags"]
            decision = state["decision"]
            self._decision = None if decision is None else HostCopy(decision.to(trainer.strategy.root_device))
            units = self._watch.units
            self._closed = {name: units.parameters[name] for name in sorted(units.closed(self._watch.frozen))}
        else:
            self._take_up(trainer)
