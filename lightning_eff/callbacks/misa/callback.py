"""MISA as a Lightning callback."""

from __future__ import annotations

import weakref
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_eff.arguments import check_choice, check_count, check_flag, check_globs
from lightning_eff.callbacks.misa.intervals import MAPS, Intervals
from lightning_eff.callbacks.misa.units import Granularity
from lightning_eff.functional.misa import Auto, SamplerConfig, Sampling, Variant
from lightning_eff.training.optimizer_state import allow_absent_states
from lightning_eff.training.state_version import check_version
from lightning_eff.training.trainable import check_trainable_support, refuse_other_deciders
from lightning_eff.training.trainer import log_values, logs_now, refuse_lazy
from lightning_eff.training.update_count import UpdateCount

_NEW: dict[str, Any] = {"names": [], "sampler": None, "active": [], "due": 0, "measured": None, "maps": {}}
"""The state of a run that has not begun."""


class MISA(Callback):
    """Trains a few weight matrices at a time, sampled by importance, and frees the memory of all others.

    For ``every_n_steps`` optimizer steps, an interval, a sample of matrices within ``budget`` is trained and everything
    else is frozen: no gradient, no optimizer state. Then the importance of those that were trained is updated from
    their gradients, their optimizer state is released and the next ones are sampled; at first those that never had a
    turn. Works with the optimizer that the module configures.

    LISA is ``MISA(granularity="layer", sampling="uniform", units=2, always=["*embed*", "*head*"],
    momentum_step=False)``; BAdam is ``MISA(granularity="layer", sampling="cyclic", units=1, momentum_step=False)``.

    **A new head, embeddings, norms and biases are not trained unless you say so**, with ``always`` or ``include``.

    Runs in: ``on_before_backward``, ``on_before_optimizer_step``; ``on_train_start``; ``on_train_batch_end``.
    Reads: the gradients of the sampled matrices, once a step.
    Changes: which parameters are trained; at an interval's end the optimizer state, and weights by the momentum step.
    Collectives: FSDP2 one small all-reduce a step; at an interval's end one broadcast and those of ``set_trainable``.
    Host syncs: none in a step; a few at an interval's end.
    Strategies: one device, DDP, ``ddp_ft`` and kin (wrapped anew at an interval's end), ``ModelParallelStrategy``.

    Args:
        budget: the sampled matrices together have at most this fraction of all parameters of the module, in (0, 1].
            None for 0.03, or in a small model, of which one matrix is more, for as much as the largest of them is.
        every_n_steps: optimizer steps between two samples, >= 1; a step that was skipped is none.
        eta: how strongly importance decides. ``"auto"``: at every sample so that the probabilities amount to half of
            the matrices that have had a turn, which ``misa/effective`` shows. Or a number, >= 0, in units of 1 /
            importance, so that its scale depends on the model's gradients and on ``variant``; 0 is uniform. A warning
            says when a number does nothing.
        beta: weight of the past in the importance, in [0, 1).
        granularity: what is sampled: ``"module"``, single matrices; ``"layer"``, whole blocks with their norms and
            biases.
        sampling: ``"importance"``; ``"uniform"``; ``"cyclic"``, in the model's order.
        variant: ``"paper"``: importance is the running mean of the squared gradient norm divided by the number of
            elements, p ~ exp(eta G). ``"official"``: the released code's, a mean of gradient norms whose correction of
            bias compounds, p ~ exp(min(5, eta G^2)).
        units: so many matrices or layers at a time in place of ``budget``, >= 1.
        include: globs on names of the matrices to sample; None: those inside the model's repeated blocks, or all
            hidden ones where there are none or these are less than half. Embeddings and heads by their names.
        exclude: globs of what not to sample.
        always: globs on names of parameters that are trained all the time, beside the budget: norms, biases, a head.
        sample_last: how many of those that have waited longest come first in a sample by importance, >= 0. None: 2,
            and with ``eta="auto"`` in every second sample only, since a sample may have room for no more.
        first_every_n_steps: steps of an interval as long as some matrix has not had its turn, >= 1. None:
            ``every_n_steps`` with ``"paper"``, and a tenth of it with ``eta="auto"`` too, without the momentum step;
            1 with ``"official"``.
        momentum_step: before its state is released, each matrix makes the steps that its momentum would still have
            made. None: with ``"paper"``. Adam, AdamW and SGD.
        debias: ``"paper"``: sample by importance without its bias towards 0, since some had more turns than others.
            False is the paper to the letter.
        seed: of the private random generator, >= 0; the same on all ranks.
        log_details: also log ``misa/importance/<name>`` and ``misa/probability/<name>``.
        heat_map: draw both over the run, as images to TensorBoard and as PNG files beside the logs.

    Logs, at the Trainer's ``log_every_n_steps``: ``misa/active``, matrices or layers in training; ``misa/trainable``,
    the fraction of all parameters in training; ``misa/used``, the fraction of matrices that have had a turn;
    ``misa/effective``, how many of them the probabilities amount to (their perplexity); ``misa/optimizer_bytes``, state
    on this rank; on a GPU ``misa/peak_memory_bytes``.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: in ``setup``, for a strategy whose set of trainable parameters is fixed (FSDP1,
            DeepSpeed, ``static_graph``) and for another callback that decides what is trained; at the start of ``fit``,
            for patterns that select nothing, sparse gradients, a budget that no matrix fits, matrices of several
            optimizers, and an optimizer that cannot do with it.

    Example:
        >>> import lightning as L
        >>> from lightning_eff.callbacks import MISA
        >>> trainer = L.Trainer(max_steps=1, callbacks=[MISA(budget=0.1, always=["*norm*"])], logger=False)

    Source: MISA, arXiv 2511.00056, and its released code; LISA, arXiv 2403.17919; BAdam, arXiv 2404.02827.
    """

    changes_trainable = True

    def __init__(
        self,
        budget: float | None = None,
        every_n_steps: int = 50,
        eta: float | Auto = "auto",
        beta: float = 0.8,
        granularity: Granularity = "module",
        sampling: Sampling = "importance",
        variant: Variant = "paper",
        units: int | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        always: list[str] | None = None,
        sample_last: int | None = None,
        first_every_n_steps: int | None = None,
        momentum_step: bool | None = None,
        debias: bool = True,
        seed: int = 0,
        log_details: bool = False,
        heat_map: bool = False,
    ) -> None:
        self.fixed_budget = budget is not None
        self.config = SamplerConfig(
            SamplerConfig.budget if budget is None else budget,
            *(units, eta, beta, sampling, variant, sample_last, debias, seed),
        )
        check_count("every_n_steps", every_n_steps)
        check_choice("granularity", granularity, Granularity)
        check_count("first_every_n_steps", first_every_n_steps, optional=True)
        for name, patterns in (("include", include), ("exclude", exclude), ("always", always)):
            check_globs(name, patterns)
        if momentum_step is None:
            momentum_step = variant == "paper"
        flags = {"momentum_step": momentum_step, "log_details": log_details, "heat_map": heat_map}
        for name, flag in flags.items():
            check_flag(name, flag)
        self.every_n_steps, self.granularity = every_n_steps, granularity
        soon = eta == "auto" and variant == "paper" and sampling == "importance" and first_every_n_steps is None
        self.first_momentum_step = not soon  # after a few steps it would be most of what a matrix has made
        least = max(1, every_n_steps // 10) if soon else every_n_steps
        self.first_every_n_steps = first_every_n_steps or (1 if variant == "official" else least)
        self.include, self.exclude, self.always = include, exclude, always
        self.momentum_step, self.log_details, self.heat_map = momentum_step, log_details, heat_map
        self._updates = UpdateCount()
        self._fit: Intervals | None = None  # what there is only within a fit
        self._saved = dict(_NEW)  # its state, from outside of one
        self._evaluates = False  # this is no fit
        self._loaded = False  # from a checkpoint, and no run has begun with it yet
        self._module: weakref.ref[LightningModule] | None = None  # of the last fit

    @property
    def active(self) -> list[str]:
        """Names of the matrices or layers that are trained now."""
        if self._fit is not None and not self._loaded:
            return [self._fit.units.names[index] for index in self._fit.active]
        return [self._saved["names"][index] for index in self._saved["active"]]

    @property
    def importance(self) -> dict[str, float]:
        """The running importance of each matrix or layer; 0 for one that has not had its turn."""
        state = self.state_dict()
        return dict(zip(state["names"], state["sampler"]["importance"].tolist(), strict=True)) if state["names"] else {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._evaluates = stage != "fit"
        if self._evaluates:
            return
        check_trainable_support(trainer)
        refuse_other_deciders(trainer, self)
        allow_absent_states(trainer.strategy)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._updates.attach(trainer.optimizers)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_lazy(pl_module, "MISA")
        if (fit := self._fit) is None:  # not before the module's own `on_fit_start`, which may freeze what it likes
            fit = self._fit = Intervals(self, trainer, pl_module, self._updates)
        loaded, self._loaded = self._loaded, False
        another = self._module is not None and self._module() is not pl_module
        self._module = weakref.ref(pl_module)
        if loaded and self._saved["names"]:
            if fit.take(self._saved):
                fit.go_on()
                return
            rank_zero_warn("the saved state of MISA is of other matrices: it starts anew")
        elif not another and trainer.global_step > 0 and (fit.active or fit.take(self._saved)):
            fit.apply()  # a second fit goes on
            return
        fit.begin()

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._fit is not None and not loss.requires_grad:
            self._fit.pass_over(loss)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._fit is not None:
            self._fit.observe(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._fit is not None:
            if logs_now(trainer):
                log_values(pl_module, "misa", self._fit.scalars())
            self._fit.end_step()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fit is not None:
            self._fit.end()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Unfreeze all, and keep the state alone: what is trained belongs to the run and not to the model."""
        self._updates.detach()
        self._evaluates = False
        if self._fit is not None:
            self._saved = self.state_dict()
            self._fit.leave()
            self._fit = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**self._state(by_reference=False), "version": 1}

    def _state(self, by_reference: bool) -> dict[str, Any]:
        if self._loaded or self._fit is None or not self._fit.active:
            return {**self._saved, **self._updates.state_dict()}
        return {**self._fit.state_dict(by_reference=by_reference), **self._updates.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_version("MISA", state_dict, known=1)
        if self._evaluates:  # `Trainer.test(ckpt_path=...)` gives callbacks their states too, and no run goes on
            return
        self._saved, self._loaded = dict(state_dict), True  # the matrices are not there yet
        self._updates.load_state_dict(state_dict)

    def run_state(self) -> dict[str, Any]:
        """The state, by reference."""
        return self._state(by_reference=True)

    def load_run_state(
        self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any], *, within_step: bool
    ) -> None:
        """Go on from a state of this run. Within a step the trained matrices are those of the peer already."""
        self._loaded = False
        self._updates.load_state_dict(state)
        if self._fit is not None and self._fit.take(state) and not within_step:
            self._fit.apply()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_fit": None, "_module": None}

    def tensorboard_charts(self, trainer: Trainer) -> dict[str, list[Any]]:
        """Charts for :class:`~lightning_eff.callbacks.TensorBoardLayout`."""
        charts: dict[str, list[Any]] = {
            "weights that are trained (share)": ["Multiline", ["misa/trainable"]],
            "budget that is used (share)": ["Multiline", ["misa/used"]],
            "matrices that are active": ["Multiline", ["misa/active"]],
            "matrices that count (effective number)": ["Multiline", ["misa/effective"]],
            "optimizer's memory (bytes)": ["Multiline", ["misa/optimizer_bytes"]],
            "peak of memory (bytes)": ["Multiline", ["misa/peak_memory_bytes"]],
        }
        if self.log_details:
            charts |= {name: ["Multiline", [f"misa/{name}/.*"]] for name in MAPS}
        return charts
