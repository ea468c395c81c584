"""MISA as a Lightning callback."""

from __future__ import annotations

import weakref
from typing import Any, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_eff.arguments import check, is_count
from lightning_eff.callbacks.misa.units import Granularity, ModuleUnits, StepMeans
from lightning_eff.functional.gradients import squared_grad_norms
from lightning_eff.functional.misa import Mode, Sampler, SamplerConfig, Sampling
from lightning_eff.functional.momentum_tail import has_momentum_tail, momentum_tail_
from lightning_eff.training.dtensor import reshard
from lightning_eff.training.heat_map import HeatMap, Scale
from lightning_eff.training.optimizer_state import (
    allow_absent_states,
    check_release_support,
    release_state,
    state_bytes,
)
from lightning_eff.training.trainable import check_trainable_support, set_trainable
from lightning_eff.training.trainer import applied_scale
from lightning_eff.training.update_count import UpdateCount

_MAPS = ("importance", "probability")


class MISA(Callback):
    """Trains a few weight matrices at a time, sampled by importance, and frees the memory of all others.

    For ``interval`` optimizer steps a sample of matrices within ``budget`` is trained and everything else is closed: no
    gradient, no optimizer state. Then the importance of those that were trained is updated from their gradients, their
    optimizer state is released and the next ones are sampled; at first those that never had a turn. Works with the
    optimizer that the module configures.

    LISA is ``MISA(granularity="layer", sampling="uniform", units=2, always=["*embed*", "*head*"],
    momentum_step=False)``; BAdam is ``MISA(granularity="layer", sampling="cyclic", units=1, momentum_step=False)``.

    **A new head, embeddings, norms and biases are not trained unless you say so**, with ``always`` or ``include``.

    Runs in: ``on_before_optimizer_step``; ``on_train_start`` and, at an interval's end, ``on_train_batch_end``.
    Reads: the gradients of the sampled matrices, once a step.
    Changes: which parameters are trained; at an interval's end the optimizer state, and weights by the momentum step.
    Collectives: FSDP2 one small all-reduce a step; at an interval's end one broadcast and those of ``set_trainable``.
    Host syncs: none in a step; a few at an interval's end.
    Strategies: one device, DDP, ``ddp_ft`` and kin (wrapped anew at an interval's end), ``ModelParallelStrategy``.

    Args:
        budget: the sampled matrices together have at most this fraction of all parameters of the module, in (0, 1].
        interval: optimizer steps between two samples, >= 1; a step that was skipped is none.
        eta: how strongly importance decides, >= 0; 0 is uniform. In units of 1 / importance, so that its scale depends
            on the model's gradients and on ``mode``: ``misa/effective`` shows what it does, and a warning says when it
            does nothing.
        beta: weight of the past in the importance, in [0, 1).
        granularity: what is sampled: ``"module"``, single matrices; ``"layer"``, whole blocks with their norms and
            biases.
        sampling: ``"importance"``; ``"uniform"``; ``"cyclic"``, in the model's order.
        mode: ``"paper"``: importance is the running mean of the squared gradient norm divided by the number of
            elements, p ~ exp(eta G). ``"official"``: the released code's, a mean of gradient norms whose correction of
            bias compounds, p ~ exp(min(5, eta G^2)).
        units: so many matrices or layers at a time in place of ``budget``, >= 1.
        include: globs on names of the matrices to sample; None: those inside the model's repeated blocks. Embeddings
            and heads by their names.
        exclude: globs of what not to sample.
        always: globs on names of parameters that are trained all the time, beside the budget: norms, biases, a head.
        sample_last: how many of those that have waited longest come first in a sample by importance, >= 0.
        first_interval: steps of an interval as long as some matrix has not had its turn, >= 1. None: ``interval`` with
            ``"paper"``, 1 with ``"official"``.
        momentum_step: before its state is released, each matrix makes the steps that its momentum would still have
            made. None: with ``"paper"``. Adam, AdamW and SGD.
        debias: ``"paper"``: sample by importance without its bias towards 0, since some had more turns than others.
            False is the paper to the letter.
        seed: of the private random generator, >= 0; the same on all ranks.
        log_modules: also log ``misa/importance/<name>`` and ``misa/probability/<name>``.
        heat_map: draw both over the run, as images to TensorBoard and as PNG files beside the logs.

    Logs, at the Trainer's ``log_every_n_steps``: ``misa/active``, matrices or layers in training; ``misa/trainable``,
    the fraction of all parameters in training; ``misa/used``, the fraction of matrices that have had a turn;
    ``misa/effective``, how many of them the probabilities amount to (their perplexity); ``misa/optimizer_bytes``, state
    on this rank; on a GPU ``misa/peak_memory_bytes``.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: in ``setup``, for a strategy whose set of trainable parameters is fixed (FSDP1,
            DeepSpeed, ``static_graph``) and for another callback that decides what is trained; at the start of ``fit``,
            for patterns that select nothing, a budget that no matrix fits, matrices of several optimizers, and an
            optimizer that cannot do with it.

    Example:
        >>> import lightning as L
        >>> from lightning_eff.callbacks import MISA
        >>> trainer = L.Trainer(max_steps=1, callbacks=[MISA(budget=0.1, always=["*norm*"])], logger=False)

    Source: MISA, arXiv 2511.00056, and its released code; LISA, arXiv 2403.17919; BAdam, arXiv 2404.02827.
    """

    observes_gradients = True
    changes_trainable = True

    def __init__(
        self,
        budget: float = 0.03,
        interval: int = 50,
        eta: float = 1.0,
        beta: float = 0.8,
        granularity: Granularity = "module",
        sampling: Sampling = "importance",
        mode: Mode = "paper",
        units: int | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        always: list[str] | None = None,
        sample_last: int = 2,
        first_interval: int | None = None,
        momentum_step: bool | None = None,
        debias: bool = True,
        seed: int = 0,
        log_modules: bool = False,
        heat_map: bool = False,
    ) -> None:
        self.config = SamplerConfig(budget, units, eta, beta, sampling, mode, sample_last, debias, seed)
        check("interval", interval, is_count(interval), "an integer of at least 1")
        check("granularity", granularity, granularity in get_args(Granularity), f"one of {get_args(Granularity)}")
        fits = first_interval is None or is_count(first_interval)
        check("first_interval", first_interval, fits, "an integer of at least 1, or None")
        for name, patterns in (("include", include), ("exclude", exclude), ("always", always)):
            check(name, patterns, not isinstance(patterns, str) and patterns != [], "a list of patterns, or None")
        self.interval, self.granularity = interval, granularity
        self.first_interval = first_interval or (1 if mode == "official" else interval)
        self.include, self.exclude, self.always = include, exclude, always
        self.momentum_step = mode == "paper" if momentum_step is None else momentum_step
        self.log_modules, self.heat_map = log_modules, heat_map
        self._updates = UpdateCount()
        self._units: ModuleUnits | None = None  # of the fit that is running
        self._module: weakref.ref[LightningModule] | None = None  # whose units these are
        self._names: list[str] = []
        self._sampler: Sampler | None = None
        self._active: list[int] = []
        self._due = 0
        self._measured = StepMeans(0)  # of each active unit, over the interval
        self._maps: dict[str, HeatMap] = {}
        self._restored: dict[str, Any] | None = None
        self._advised = False

    @property
    def active(self) -> list[str]:
        """Names of the matrices or layers that are trained now."""
        return [self._names[index] for index in self._active]

    @property
    def importance(self) -> dict[str, float]:
        """The running importance of each matrix or layer; 0 for one that has not had its turn."""
        return {} if self._sampler is None else dict(zip(self._names, self._sampler.importance.tolist(), strict=True))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_trainable_support(trainer)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            decides = getattr(other, "changes_trainable", False) or isinstance(other, BaseFinetuning)
            if decides and other is not self:
                raise MisconfigurationException(
                    f"MISA and {type(other).__name__} would both decide which parameters are trained: keep one of them"
                )
        allow_absent_states(trainer.strategy)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._units = units = ModuleUnits(
            pl_module, trainer.optimizers, self.granularity, self.include, self.exclude, self.always
        )
        optimizer = trainer.optimizers[units.optimizer]
        check_release_support([optimizer])
        if self.momentum_step and not has_momentum_tail(optimizer):
            raise MisconfigurationException(
                f"MISA's momentum step is known for Adam, AdamW and SGD, and not for {type(optimizer).__name__}: "
                "set momentum_step=False"
            )
        try:
            Sampler(units.sizes, self.config, units.total)
        except ValueError as error:
            raise MisconfigurationException(f"MISA: {error}") from error
        self._updates.attach(trainer.optimizers)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restored, self._restored = self._restored, None
        another = self._module is not None and self._module() is not pl_module
        self._module = weakref.ref(pl_module)
        if restored is not None and restored["names"]:
            if self._take(restored):
                self._apply(trainer)
                if self._count() >= self._due:  # it was saved between the interval's last step and its end
                    self._end_interval(trainer, pl_module)
                return
            rank_zero_warn("the saved state of MISA is of other matrices: it starts anew")
        elif self._sampler is not None and not another and trainer.global_step > 0:  # a second fit goes on
            self._apply(trainer)
            return
        self._start(trainer)

    def _start(self, trainer: Trainer) -> None:
        """A new run begins."""
        units = self._running
        self._names = units.names
        self._sampler = sampler = Sampler(units.sizes, self.config, units.total)
        self._maps = {name: HeatMap(self._names) for name in _MAPS if self.heat_map}
        self._advised = False
        self._updates.load_state_dict({"updates": [0] * len(trainer.optimizers)})
        self._active = []
        self._next(trainer)
        if never := [name for name, size in zip(units.names, units.sizes, strict=True) if not sampler.fits(size)]:
            rank_zero_warn(
                f"MISA(budget={self.config.budget}) has no room for {len(never)} of {len(units.names)}, which are "
                f"never trained: {', '.join(never[:10])}. Raise it, or exclude them"
            )
        rank_zero_info(
            f"MISA samples from {len(units.names)} units with {sum(units.sizes):,} of {units.total:,} parameters, "
            f"{len(self._active)} at first; {len(units.always)} tensors are always trained and {len(units.never)} never"
        )

    @property
    def _running(self) -> ModuleUnits:
        assert self._units is not None
        return self._units

    def _count(self) -> int:
        return self._updates.exact(self._running.optimizer)

    def _next(self, trainer: Trainer) -> None:
        assert self._sampler is not None
        sampler, before = self._sampler, self._active
        self._active = sampler.select()
        waiting = any(last < 0 and sampler.fits(size) for last, size in zip(sampler.last, sampler.sizes, strict=True))
        self._due = self._count() + (self.first_interval if waiting else self.interval)
        self._measured = StepMeans(len(self._active))
        if self.config.mode == "paper":  # else the state of what is sampled again is kept
            for members in self._running.tensors(before):
                release_state(trainer.optimizers, members)
        self._apply(trainer)

    def _apply(self, trainer: Trainer) -> None:
        """Train what is active, and nothing else of that optimizer."""
        units = self._running
        wanted = units.trainable(self._active)
        set_trainable(trainer, wanted)
        release_state(trainer.optimizers, [units.parameters[name] for name, is_open in wanted.items() if not is_open])

    def _end_interval(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._sampler is not None
        reshard(pl_module)
        if self.momentum_step:
            optimizer = trainer.optimizers[self._running.optimizer]
            momentum_tail_(optimizer, [p for members in self._running.tensors(self._active) for p in members])
        # Equal on all ranks as far as the reduction of gradients is; what follows from it has to be equal.
        means: list[float] = trainer.strategy.broadcast(self._measured.means())
        measured = torch.tensor(means, dtype=torch.float64)
        if self.config.mode == "paper":
            measured /= torch.tensor([self._sampler.sizes[index] for index in self._active])
        self._sampler.measure(self._active, measured)
        self._next(trainer)
        if not self._advised and -1 not in self._sampler.last:
            self._advised = True  # once, when all have had their turn
            if (advice := self._sampler.eta_advice()) is not None:
                rank_zero_warn(f"MISA({advice}")
        if self._maps:
            turned = self._sampler.turns > 0
            self._maps["importance"].add(self._count(), torch.where(turned, self._sampler.importance, torch.nan))
            self._maps["probability"].add(self._count(), self._sampler.probabilities)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if optimizer is not trainer.optimizers[self._running.optimizer]:
            return
        squares = squared_grad_norms(self._running.tensors(self._active))
        if squares is None:  # training_step returned None
            return
        scale = applied_scale(trainer, optimizer)
        if scale is not None:
            squares = squares / scale.to(squares).square()
        self._measured.add(squares.sqrt() if self.config.mode == "official" else squares)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer._logger_connector.should_update_logs:
            self._log(trainer, pl_module)
        # The exact count waits for a fused optimizer that has skipped steps, so it is asked for only where it matters.
        if self._updates.at_most(self._running.optimizer) >= self._due and self._count() >= self._due:
            self._end_interval(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._sampler is not None
        units, p = self._running, self._sampler.probabilities
        trained = sum(each.numel() for each in units.parameters.values() if each.requires_grad)
        values: dict[str, Any] = {
            "active": float(len(self._active)),
            "trainable": trained / units.total,
            "used": sum(last >= 0 for last in self._sampler.last) / len(self._names),
            "effective": torch.exp(-torch.xlogy(p, p).sum()),
            "optimizer_bytes": float(state_bytes(trainer.optimizers)),
        }
        if trainer.strategy.root_device.type == "cuda":
            values["peak_memory_bytes"] = float(torch.cuda.max_memory_allocated(trainer.strategy.root_device))
        if self.log_modules:
            for name, value, probability in zip(self._names, self._sampler.importance, p, strict=True):
                values |= {f"importance/{name}": value, f"probability/{name}": probability}
        logged = {f"misa/{name}": value for name, value in values.items()}
        pl_module.log_dict(logged, on_step=True, on_epoch=False, batch_size=1)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scale: dict[str, Scale] = {"importance": "log", "probability": "linear"}
        for name, heat_map in self._maps.items():
            title = f"MISA: {name} of each {self.granularity}"
            heat_map.publish(trainer, f"misa/{name}_map", title, scale=scale[name], missing="no turn yet")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave()

    def _leave(self) -> None:
        """Open what was open before the fit."""
        self._updates.detach()
        if self._units is not None:
            for name in self._units.trainable([]):
                self._units.parameters[name].requires_grad_(True)
            self._units = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._state(by_reference=False)

    def _state(self, by_reference: bool) -> dict[str, Any]:
        if self._restored is not None:
            return self._restored
        return {
            "names": list(self._names),
            "sampler": None if self._sampler is None else self._sampler.state_dict(),
            "active": list(self._active),
            "due": self._due,
            "measured": self._measured.state_dict(by_reference=by_reference),
            "maps": {name: heat_map.state_dict(by_reference=by_reference) for name, heat_map in self._maps.items()},
            **self._updates.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict  # the matrices are not there yet
        self._updates.load_state_dict(state_dict)

    def _take(self, state: dict[str, Any]) -> bool:
        units = self._running
        if state["names"] != units.names:
            return False
        self._names = units.names
        self._sampler = Sampler(units.sizes, self.config, units.total)
        self._sampler.load_state_dict(state["sampler"])
        self._active, self._due = list(state["active"]), state["due"]
        self._measured = StepMeans(len(self._active))
        self._measured.load_state_dict(state["measured"])
        self._maps = {name: HeatMap(self._names) for name in _MAPS if self.heat_map}
        for name in self._maps.keys() & state["maps"].keys():
            self._maps[name].load_state_dict(state["maps"][name])
        return True

    def run_state(self) -> dict[str, Any]:
        """The state, by reference."""
        return self._state(by_reference=True)

    def load_run_state(
        self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any], *, within_step: bool
    ) -> None:
        """Go on from a state of this run. Within a step the trained matrices are those of the peer already."""
        self._restored = None
        self._updates.load_state_dict(state)
        if self._take(state) and not within_step:
            self._apply(trainer)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_units": None, "_module": None}

    def tensorboard_charts(self, trainer: Trainer) -> dict[str, list[Any]]:
        """Charts for :class:`~lightning_eff.callbacks.TensorBoardLayout`."""
        charts: dict[str, list[Any]] = {
            "trainable and used (fractions)": ["Multiline", ["misa/trainable", "misa/used"]],
            "active and effective (matrices)": ["Multiline", ["misa/active", "misa/effective"]],
            "memory (bytes)": ["Multiline", ["misa/optimizer_bytes", "misa/peak_memory_bytes"]],
        }
        if self.log_modules:
            charts |= {name: ["Multiline", [f"misa/{name}/.*"]] for name in _MAPS}
        return charts
