"""GradES as a Lightning callback."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_eff.arguments import check_choice, check_count, check_flag, check_globs, check_number
from lightning_eff.callbacks.grades.freezing import NEW, Freezing
from lightning_eff.callbacks.grades.progress import fraction_done, rising_again
from lightning_eff.callbacks.grades.watch import Unfreeze, charts
from lightning_eff.functional.grades import GradESConfig, Metric, TauMode
from lightning_eff.training.host_copy import HostCopy
from lightning_eff.training.namespaces import MisconfigurationException, is_a
from lightning_eff.training.optimizer_state import allow_absent_states, check_release_support
from lightning_eff.training.rank_state import RankState
from lightning_eff.training.state_version import check_version
from lightning_eff.training.trainable import check_trainable_support, refuse_other_deciders
from lightning_eff.training.trainer import log_values, logs_now, refuse_lazy

_COPIES = "lightning_eff_grades"  # in the checkpoint, where the ranks are equal


class GradES(Callback):
    """Freezes each weight matrix once it has little left to gain, and ends the training when all are frozen.

    A frozen matrix gets no gradient: its part of the backward pass, of the reduction between ranks and of the
    optimizer's step is really left out. Gradients still flow through it to the layers before.

    Runs in: ``on_before_optimizer_step`` every ``every_n_steps``; events in ``on_train_batch_end``, a step later.
    Reads: the gradients of the matrices that are not frozen (``metric="weight_change"``: their weights) and the
        learning rate, once a check.
    Changes: ``requires_grad``; with ``release_state`` the optimizer's state; ``trainer.should_stop``.
    Collectives: those of ``set_trainable`` at an event; a check one small one on FSDP2, and with ``unfreeze="loss"``.
    Host syncs: after the grace period one read a check, of values that were queued a step before; one for the forecast.
    Strategies: one device, DDP and its kin without ``static_graph``, ``ddp_ft``, FSDP2 and tensor parallelism.

    Args:
        tau: a matrix is frozen when its metric stays below, > 0; what the number means says ``tau_mode``.
        alpha: grace period, as a fraction of the run, in [0, 1): nothing is frozen in it.
        metric: ``"gain"``: learning rate times the gradient's sum of absolute values, by which a step of that size
            along its signs lowers the loss; ``"grad_change"``: sum of absolute differences to the gradient at the check
            before (the paper's formula where every step is a check); ``"grad"``: sum of absolute values;
            ``"weight_change"``: sum of the absolute changes of the weights since the check before (the authors' code;
            it falls with the learning rate alone). The two changes keep one copy of what they watch, in memory and in
            the checkpoint.
        tau_mode: ``"remaining"``: a matrix has settled when the rest of the run, if its metric stayed at the mean of
            the last ten checks, would bring less than ``tau`` of what the run has brought so far, and that mean is
            below half of the mean of all its checks; ``"relative"``: when its metric is below ``tau`` times its level,
            the mean of its last five checks in the grace period; ``"absolute"``: in units of the metric, as in the
            paper: never carry such a number over to another metric, model, batch size or learning rate.
        every_n_steps: optimizer steps from check to check, >= 1.
        patience: checks below the threshold in a row, >= 1.
        include: globs on the names of parameters to watch; None: the matrices inside repeated blocks. Embeddings, heads
            and norms are left out unless they are named here. A LoRA pair is one unit.
        exclude: globs of what to leave out again.
        prefix: globs on the names of what lies before the blocks, ``["*embed*"]`` for instance. When all matrices of
            the first blocks are frozen, it and the rest of these blocks (norms, biases) are frozen too, and the
            backward pass ends there. None: only matrices are frozen.
        max_frozen_ratio: never more than this fraction of the matrices is frozen, in (0, 1].
        stop_when_frozen: end the training when that fraction is reached. Until ``min_steps`` and ``min_epochs`` of the
            Trainer are, it goes on with what is left; one matrix stays unfrozen where that would be nothing.
        release_state: free the optimizer's state of frozen parameters. Unfrozen ones begin with a new state.
        max_events: times at most that the set of trained parameters changes, evenly spaced after the grace period,
            >= 1: each costs DDP new buckets and ``torch.compile`` a recompilation (torch gives up after 8). None: at
            any check.
        unfreeze: unfreeze a matrix that was frozen too soon (beyond the paper): ``"loss"`` when the training loss rises
            above what it was at the freezing, ``"neighbours"`` when the metric of the other matrices in its block does.
            None: never.
        unfreeze_factor: by how much it must rise, > 1.
        log_details: also log, for every matrix, ``grades/metric/<name>`` and ``grades/metric_per_element/<name>``.
        heat_map: at the end draw the metric of every matrix over the run (needs the extra ``plots`` and a logger).

    Logs, at the Trainer's ``log_every_n_steps``: ``grades/frozen_ratio``, of the matrices; ``grades/frozen_params``,
    the number of elements that are frozen; ``grades/backward_flops_saved``, the fraction of the backward pass's
    products with weights; ``grades/frozen_attention`` and so on, matrices by their role. TensorBoard also gets a text
    for each event (``grades/events``) and the heat map (``grades/heat_map``), which any other logger has as a PNG file
    beside its own.

    At half of the run (at the end of a longer grace period) a line says what freezing will save in it, if rate and
    gradients go on falling as they have since a quarter; at the end one says what was saved, or why nothing was.

    After the fit all parameters are unfrozen again. ``trainer.fit`` on the same objects goes on where it was; with a
    new model and Trainer the callback starts anew.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: in ``setup``, for a strategy or another callback that does not go with it; at the
            start of ``fit``, for patterns that select nothing, for a Trainer without a limit that ``alpha`` or
            ``max_events`` could be a fraction of, and for ``"gain"`` with a scheduler that raises the rate again.

    Example:
        >>> import lightning as L
        >>> from lightning_eff.callbacks import GradES
        >>> trainer = L.Trainer(max_steps=1, callbacks=[GradES(every_n_steps=20)], logger=False)

    Source: Wen et al., "GradES: Significantly Faster Training in Transformers with Gradient-Based Early Stopping",
    arXiv 2509.01842. What the authors' code does otherwise, and why, is in the method's card.
    """

    changes_trainable = True

    def __init__(
        self,
        tau: float = 0.02,
        alpha: float = 0.5,
        metric: Metric = "gain",
        tau_mode: TauMode = "remaining",
        every_n_steps: int = 10,
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
        log_details: bool = False,
        heat_map: bool = False,
    ) -> None:
        factor = unfreeze_factor if unfreeze else None
        check_number("alpha", alpha, least=0, below=1)
        check_choice("metric", metric, Metric)
        check_count("every_n_steps", every_n_steps)
        check_number("max_frozen_ratio", max_frozen_ratio, above=0, most=1)
        check_count("max_events", max_events, optional=True)
        check_choice("unfreeze", unfreeze, Unfreeze, optional=True)
        check_number("unfreeze_factor", unfreeze_factor, above=1)
        for name, patterns in (("include", include), ("exclude", exclude), ("prefix", prefix)):
            check_globs(name, patterns)
        flags = {"stop_when_frozen": stop_when_frozen, "release_state": release_state}
        for name, flag in (flags | {"log_details": log_details, "heat_map": heat_map}).items():
            check_flag(name, flag)
        self.config = GradESConfig(tau=tau, tau_mode=tau_mode, patience=patience, unfreeze_factor=factor)
        self.alpha = alpha
        self.metric: Metric = metric
        self.every_n_steps = every_n_steps
        self.include, self.exclude, self.prefix = include, exclude, prefix
        self.max_frozen_ratio = max_frozen_ratio
        self.stop_when_frozen = stop_when_frozen
        self.release_state = release_state
        self.max_events = max_events
        self.unfreeze = unfreeze
        self.log_details = log_details
        self.heat_map = heat_map
        self._fit: Freezing | None = None  # what there is only within a fit
        self._saved, self._saved_copies = dict(NEW), dict[str, Tensor]()  # its state, from outside of one
        self._rank_state: RankState | None = None

    @property
    def frozen(self) -> dict[str, int]:
        """Name of each frozen unit -> the step at which it was frozen."""
        if self._fit is not None:
            return dict(self._fit.watch.frozen)
        return dict(self._saved["watch"]["frozen"]) if self._saved["watch"] else {}

    # --- a run begins and ends --------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_trainable_support(trainer)
        refuse_other_deciders(trainer, self)
        allow_absent_states(trainer.strategy)
        if not is_a(trainer.strategy, ModelParallelStrategy) or self.metric in ("gain", "grad"):  # no copies
            self._rank_state = None
            return
        if self._rank_state is None:
            self._rank_state = RankState("grades", save=self._copies, load=self._load_copies)
        self._rank_state.attach(trainer.strategy)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.release_state:
            check_release_support(trainer.optimizers, again=self.unfreeze is not None)
        if self.metric == "gain" and (rising := rising_again(trainer)):
            raise MisconfigurationException(
                f"GradES(metric='gain') takes a rate that has fallen for one that stays low, and {rising} raises it "
                "again: set metric='grad', which leaves the rate out"
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (self.alpha > 0 or self.max_events is not None) and fraction_done(trainer, 0) is None:
            raise MisconfigurationException(
                f"GradES(alpha={self.alpha}, max_events={self.max_events}) are parts of a run without an end: give the "
                "Trainer max_steps, or max_epochs with data of a known length, or set alpha=0 and max_events=None"
            )
        refuse_lazy(pl_module, "GradES")
        if trainer.global_step < self._saved["step"]:  # another run
            self._saved, self._saved_copies = dict(NEW), {}
        if self._fit is not None:  # a run within this fit, such as the learning rate finder's
            self._fit.unfreeze_all(in_fit=True)
        self._fit = Freezing(self, trainer, pl_module, self._saved, self._saved_copies)
        self._saved_copies = {}
        self._fit.begin()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._fit is not None:
            self._fit.observe(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._fit is not None and self._fit.end_step(outputs) and logs_now(trainer):
            log_values(pl_module, "grades", self._fit.scalars())

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fit is not None:
            self._fit.end()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Unfreeze all, and keep the state alone: freezing belongs to the run and not to the model."""
        if self._fit is not None:
            self._saved, self._saved_copies = self.state_dict(), self._copies()
            self._fit.unfreeze_all(in_fit=False)
            self._fit = None

    def tensorboard_charts(self, trainer: Trainer) -> dict[str, list[Any]]:
        """Charts for :class:`~lightning_eff.callbacks.TensorBoardLayout`."""
        return charts(self.log_details)

    # --- its state --------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**(self._saved if self._fit is None else self._fit.state_dict()), "version": 2}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_version("GradES", state_dict, known=2)
        self._saved = dict(state_dict)

    def _copies(self) -> dict[str, Tensor]:
        return self._saved_copies if self._fit is None else self._fit.watch.copies()

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
        fit = self._fit
        if fit is None:
            return {"state": self.state_dict(), "copies": self._saved_copies, "flags": [False] * 3, "decision": None}
        return {
            "state": fit.state_dict(by_reference=True),
            "copies": fit.watch.copies(by_reference=True),
            "flags": [fit.stepped, fit.checked, fit.armed],
            "decision": None if fit.decision is None else fit.decision.source,
        }

    def load_run_state(
        self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any], *, within_step: bool
    ) -> None:
        """Go on from a state of this run, on all ranks together."""
        self._load_copies(state["copies"])
        self.load_state_dict(state["state"])
        if fit := self._fit:
            fit.load_state_dict(self._saved, self._saved_copies)
            self._saved_copies = {}
            if within_step:  # the same parameters are frozen here as there; what is due comes at the end of the step
                fit.stepped, fit.checked, fit.armed = state["flags"]
                decision = state["decision"]
                fit.decision = None if decision is None else HostCopy(decision.to(trainer.strategy.root_device))
                fit.note_frozen()
            else:
                fit.take_up()
