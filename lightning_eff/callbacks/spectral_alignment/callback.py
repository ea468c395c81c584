"""Spectral alignment as a Lightning callback."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning_utilities.core.rank_zero import rank_zero_debug
from torch import Tensor, nn
from typing_extensions import override

from lightning_eff.arguments import check_choice, check_count, check_flag, check_globs, check_number
from lightning_eff.callbacks.spectral_alignment.probe import AlignmentProbe, watched_layers
from lightning_eff.callbacks.spectral_alignment.tensorboard import charts, write_histograms
from lightning_eff.callbacks.spectral_alignment.window import ProbeWindow
from lightning_eff.functional.spectral_alignment import (
    CollapseConfig,
    CollapseState,
    collapse_update,
    collapsed_share,
    majority_fraction,
    why_unarmed,
)
from lightning_eff.structure.select import listed
from lightning_eff.training.alarms import Alarm, sound
from lightning_eff.training.heat_map import HeatMap
from lightning_eff.training.namespaces import MisconfigurationException, is_a, overrides
from lightning_eff.training.state_version import check_version
from lightning_eff.training.trainer import callbacks_of, log_values, logs_now, refuse_flattened, refuse_lazy
from lightning_eff.training.uncompiled import Uncompiled

Action = Literal["log", "warn", "stop", "rollback"]

BINS = 32  # of the histograms
TELL_AFTER = 50  # observations after which it is said that no layer has ever been armed


class SpectralAlignmentMonitor(Callback):
    """Watches whether the inputs of a layer fall on one side of its weight's leading singular vector.

    A return of layers that were diverse to one side is a sign that representations collapse, which may come before
    the loss shows it.

    Runs in: ``on_train_batch_start`` and ``on_train_batch_end``; forward hooks on the steps that observe.
    Reads: the inputs and the weights of the layers, once every ``every_n_steps`` steps.
    Changes: nothing; with ``action="stop"`` or ``"rollback"`` the course of training.
    Collectives: one all-reduce of (32 + 6) numbers a layer on a step that observes, none on one device.
    Host syncs: one on a step that is logged until a layer is armed; one on a step that observes but with ``"log"``.
    Strategies: one device, DDP and its kin, FSDP2 (``ModelParallelStrategy`` without tensor parallelism).

    On a step that observes, a model compiled by ``torch.compile`` runs without its compilation, since hooks added
    after it never fire.

    Args:
        every_n_steps: steps (of the optimizer, accumulated batches together) between two observations, >= 1.
        include: shell-style globs (``*`` also matches dots) on names of modules: which ``nn.Linear`` and convolutions
            to watch. None: those of the model's blocks, found by structure, or of all hidden matrices: the linear
            ones, and where there is none the convolutions.
        exclude: globs of what to leave out again.
        max_tokens: of each rank's batch, spread evenly over it; None for all.
        power_iterations: two products with the weight each, >= 1. The singular vector is kept between observations.
        threshold: a layer counts as collapsed from this share of tokens on one side on, in (0.5, 1]. This argument and
            those below down to ``max_residual`` are this package's, not the paper's.
        hysteresis: a layer is armed once the median over ``look_back`` observations has been at most
            ``threshold - hysteresis``; >= 0, and less than ``threshold - 0.5``.
        patience: observations in a row, >= 1.
        look_back: observations that the median is taken over, >= 1. No alarm is possible before so many.
        severity: an alarm begins when at least this share of the watched layers has collapsed, in (0, 1], and at least
            three layers are armed (all of them, where fewer are watched).
        max_residual: observations whose singular vector has a larger relative residual |W^T u - s v| / s do not
            count, > 0.
        action: what an alarm does. ``"log"``: nothing, and nobody hears of it. With the others it sounds, so that
            callbacks that listen to alarms hear it. ``"warn"``: a warning, if nobody listens. ``"stop"``: a warning,
            and training ends. ``"rollback"``: a :class:`~lightning_eff.callbacks.TrainingGuard` goes back to a
            snapshot.
        log_details: also log ``spectral_alignment/majority/<layer>`` of every layer (NaN: its vector has not
            converged).
        log_histograms: also write the histograms of the alignments to TensorBoard.
        heat_map: draw layers over steps at the end, to TensorBoard and as ``spectral_alignment_heat_map.png``; needs
            matplotlib.

    Logs, at the Trainer's ``log_every_n_steps``, of the latest observation: ``spectral_alignment/worst_majority``, the
    largest share of one side among the armed layers, and ``spectral_alignment/worst_layer``, that layer's place in
    ``layers``, from when one is armed (0.5 and -1 when none is any more); ``spectral_alignment/collapsed_layers`` and
    ``spectral_alignment/armed_layers``, their numbers.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: in ``setup`` (at the start of the fit for a model built in ``configure_model``), for
            patterns that match nothing, a layer that cannot be watched, a model without repeated blocks,
            ``"rollback"`` without a guard; for FSDP1, DeepSpeed and tensor parallelism.

    Example:
        >>> import lightning as L
        >>> from lightning_eff.callbacks import SpectralAlignmentMonitor
        >>> trainer = L.Trainer(callbacks=[SpectralAlignmentMonitor(every_n_steps=50, action="warn")], logger=False)

    Source: Qiu et al., arXiv 2510.04202, for the quantity; the rule of the alarm is ours.
    """

    def __init__(
        self,
        every_n_steps: int = 20,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        max_tokens: int | None = 4096,
        power_iterations: int = 1,
        threshold: float = 0.99,
        hysteresis: float = 0.25,
        patience: int = 3,
        look_back: int = 16,
        severity: float = 0.2,
        max_residual: float = 0.3,
        action: Action = "log",
        log_details: bool = False,
        log_histograms: bool = False,
        heat_map: bool = False,
    ) -> None:
        check_count("every_n_steps", every_n_steps)
        check_globs("include", include)
        check_globs("exclude", exclude)
        check_count("max_tokens", max_tokens, optional=True)
        check_count("power_iterations", power_iterations)
        self.config = CollapseConfig(threshold, hysteresis, patience, look_back)
        check_number("severity", severity, above=0, most=1)
        check_number("max_residual", max_residual, above=0)
        check_choice("action", action, Action)
        for name, flag in (("log_details", log_details), ("log_histograms", log_histograms), ("heat_map", heat_map)):
            check_flag(name, flag)
        self.every_n_steps = every_n_steps
        self.include, self.exclude = include, exclude
        self.max_tokens = max_tokens
        self.power_iterations = power_iterations
        self.severity = severity
        self.max_residual = max_residual
        self.action: Action = action
        self.log_details, self.log_histograms, self.heat_map = log_details, log_histograms, heat_map
        self.layers: list[str] = []
        """Names of the layers that are watched, in the order of the model."""
        self._probe: AlignmentProbe | None = None
        self._state = CollapseState.of(0, self.config)
        self._majority = torch.zeros(0)  # of the latest observation, (layers,); NaN: none that can be trusted
        self._histograms = torch.zeros(0)  # (layers, bins)
        self._alarmed, self._any_armed = torch.tensor(False), False  # the latter as far as has been read
        self._vectors: dict[str, Tensor] = {}  # what the probe begins with
        self._map: HeatMap | None = None
        self._steps = 0  # completed steps
        self._observations = 0
        self._told = self._called = False  # that no layer is armed; any layer, on this rank
        self._window = ProbeWindow()
        self._global_step = -1  # when the batch began
        self._uncompiled = Uncompiled()

    @property
    def majority(self) -> dict[str, float]:
        """Share of one side in the latest observation, by layer; NaN: none that can be trusted. Waits."""
        return dict(zip(self.layers, self._majority.tolist(), strict=True))

    @property
    def armed(self) -> list[str]:
        """Layers that have been diverse, so that their collapse would be an alarm. Waits."""
        return self._names(self._state.armed)

    @property
    def collapsed(self) -> list[str]:
        """Armed layers that have collapsed. Waits."""
        return self._names(self._state.collapsed)

    def _names(self, chosen: Tensor) -> list[str]:
        return [name for name, is_chosen in zip(self.layers, chosen.tolist(), strict=True) if is_chosen]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        strategy = trainer.strategy
        refuse_flattened(
            trainer, type(self).__name__, "flattens or partitions the weights that the inputs are compared with"
        )
        if is_a(strategy, ModelParallelStrategy) and strategy._tensor_parallel_size not in ("auto", 1):
            raise MisconfigurationException(
                f"SpectralAlignmentMonitor does not support tensor_parallel_size={strategy._tensor_parallel_size}: a "
                "weight stays sharded in its forward pass, where each product would need a collective. Use FSDP2 alone"
            )
        if self.action == "rollback" and not any(getattr(each, "rolls_back", False) for each in callbacks_of(trainer)):
            raise MisconfigurationException(
                "SpectralAlignmentMonitor(action='rollback') needs a TrainingGuard(action='rollback') among the "
                "callbacks, which keeps the snapshots: add one, or choose action='warn' or 'stop'"
            )
        self._window.attach(trainer, pl_module)
        if not overrides(pl_module, "configure_model"):  # else there may be no layer yet
            self._find_layers(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = self._find_layers(pl_module)
        if list(layers) != self.layers:
            self._fit_state_to(list(layers))
        self._probe = AlignmentProbe(layers, bins=BINS, max_tokens=self.max_tokens, iterations=self.power_iterations)
        self._probe.vectors = self._vectors
        self._window.begin(self._probe)
        if self.heat_map and self._map is None:
            self._map = HeatMap(self.layers)
        self._told = self._called = False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._detach()  # from a batch that never came to its end
        self._global_step = trainer.global_step
        if self._steps % self.every_n_steps == 0 and self._probe is not None:
            self._probe.attach()
            self._uncompiled.begin()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._detach()
        if trainer.global_step == self._global_step or self._probe is None:
            return  # a batch that is accumulated
        if self._steps % self.every_n_steps == 0:
            self._observe(trainer, pl_module, self._probe)
        self._steps += 1
        if self.layers and logs_now(trainer):
            self._log(trainer, pl_module)

    def _observe(self, trainer: Trainer, pl_module: LightningModule, probe: AlignmentProbe) -> None:
        """Take in what the probe has counted, on all ranks, and sound the alarm."""
        self._called |= bool(probe.seen)
        table = trainer.strategy.reduce(probe.read(trainer.strategy.root_device), reduce_op="sum")
        self._histograms, (positive, negative, _, _, called, residuals) = table[:, :BINS], table[:, BINS:].unbind(1)
        trusted = (called > 0) & (residuals <= self.max_residual * called)
        majority = majority_fraction(positive, negative)
        self._majority = torch.where(trusted, majority, torch.nan)
        collapsed = collapse_update(majority, trusted, self._state)
        self._observations += 1
        if self._map is not None:
            self._map.add(trainer.global_step, self._majority)
        share = collapsed_share(collapsed, self._state)
        alarmed = share >= self.severity
        begins = alarmed & ~self._alarmed.to(alarmed)
        self._alarmed = alarmed
        if self.action != "log" and bool(begins):
            self._sound(trainer, pl_module, collapsed, float(share))
        if self._observations == max(TELL_AFTER, self.config.look_back):
            self._tell_if_unarmed()

    def _sound(self, trainer: Trainer, pl_module: LightningModule, collapsed: Tensor, share: float) -> None:
        names = self._names(collapsed)
        message = (
            f"{len(names)} of {len(self.layers)} layers were diverse and now have at least "
            f"{self.config.threshold:.4g} of their inputs on one side of their weight's leading singular vector, for "
            f"{self.config.patience} observations: {listed(names, limit=8)}"
        )
        heard = sound(trainer, Alarm("spectral_alignment", trainer.global_step, message, severity=share))
        if self.action == "stop" or (self.action == "warn" and not heard):
            end = ". Training stops" if self.action == "stop" else ""
            rank_zero_warn(f"SpectralAlignmentMonitor at global step {trainer.global_step}: {message}{end}")
        if self.action == "stop":
            trainer.should_stop = True

    def _tell_if_unarmed(self) -> None:
        """Say once why there could be no alarm."""
        if self._told or bool(self._state.armed.any()):
            return
        self._told, tell = True, rank_zero_warn
        if not self._called:
            why = "none of their forward passes was called (a weight that is used directly, or a scripted module?)"
        elif not bool(self._state.observations.any()):
            limit = f"max_residual={self.max_residual}"
            why = f"no singular vector had converged to {limit}: raise power_iterations or lower every_n_steps"
        else:
            why = why_unarmed(self._state)
            if self._observations < self.config.look_back:  # the run was short, with which nothing is wrong
                tell = rank_zero_debug if self.action == "log" else rank_zero_info
        tell(f"SpectralAlignmentMonitor: of {len(self.layers)} layers none was ever armed, so no alarm: {why}")

    def _detach(self) -> None:
        if self._probe is not None:
            self._probe.detach()
        self._uncompiled.end()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()  # a hook of the module may have ended the epoch at the start of a batch

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._observations < max(TELL_AFTER, self.config.look_back) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._tell_if_unarmed()
        if self._map is not None:
            self._map.publish(
                trainer, "spectral_alignment/heat_map", "share of inputs on one side of the singular vector",
                missing="no converged singular vector",
            )  # fmt: skip

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()
        self._probe = None

    def _find_layers(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        refuse_lazy(pl_module, "SpectralAlignmentMonitor")
        try:
            return watched_layers(pl_module, self.include, self.exclude)
        except ValueError as error:
            raise MisconfigurationException(f"SpectralAlignmentMonitor: {error}") from error

    def _fit_state_to(self, layers: list[str]) -> None:
        """Keep what is known of layers that there still are."""
        state, majority = CollapseState.of(len(layers), self.config), torch.full((len(layers),), torch.nan)
        kept = [name for name in layers if name in self.layers]
        if kept:
            old, new = ([names.index(name) for name in kept] for names in (self.layers, layers))
            state.take(new, self._state, old)
            majority[new] = self._majority.cpu().to(majority.dtype)[old]
        if self.layers:
            rank_zero_warn(
                f"SpectralAlignmentMonitor watches {len(layers)} layers, and {len(kept)} of them are among the "
                f"{len(self.layers)} that it has watched so far: the others are learned anew"
            )
        self.layers, self._state, self._majority = layers, state, majority
        self._vectors = {name: v for name, v in self._vectors.items() if name in kept}
        self._map = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"version": 1, **self._as_dict(by_reference=False)}

    def run_state(self) -> dict[str, Any]:
        """The state by reference: nothing waits for the device when a guard takes a snapshot."""
        return self._as_dict(by_reference=True)

    def load_run_state(
        self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any], *, within_step: bool
    ) -> None:
        """Go on from it."""
        self.load_state_dict(state)

    def _as_dict(self, by_reference: bool) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "vectors": dict(self._vectors),
            "state": self._state.state_dict(),
            "majority": self._majority,
            "alarmed": self._alarmed,
            "steps": self._steps,
            "observations": self._observations,
            "heat_map": None if self._map is None else self._map.state_dict(by_reference=by_reference),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_version("SpectralAlignmentMonitor", state_dict, known=1)
        self.layers = list(state_dict["layers"])
        self._vectors.clear()  # the probe holds the same dict, should a run go back in its middle
        self._vectors.update(state_dict["vectors"])
        self._state = CollapseState.of(len(self.layers), self.config)
        self._state.load_state_dict(state_dict["state"])
        self._majority, self._alarmed, self._any_armed = state_dict["majority"], state_dict["alarmed"], False
        self._steps, self._observations = state_dict["steps"], state_dict["observations"]
        self._map = None
        if self.heat_map and state_dict["heat_map"] is not None:
            self._map = HeatMap(self.layers)
            self._map.load_state_dict(state_dict["heat_map"])
        if self._probe is not None:
            self._probe.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_probe": None}

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state, armed = self._state, self._state.armed
        seen = torch.where(armed & self._majority.isfinite(), self._majority, -1.0)
        worst, layer = seen.max(dim=0)
        values = {"collapsed_layers": state.collapsed.sum(), "armed_layers": armed.sum()}
        self._any_armed = self._any_armed or bool(worst >= 0)
        if self._any_armed:  # no curve of what there is not yet
            values["worst_majority"] = torch.where(worst < 0, 0.5, worst)
            values["worst_layer"] = torch.where(worst < 0, -1, layer)
        if self.log_details:
            values |= {f"majority/{name}": m for name, m in zip(self.layers, self._majority.unbind(), strict=True)}
        log_values(pl_module, "spectral_alignment", values)
        if self.log_histograms and len(self._histograms):  # else nothing was observed since a resume
            tags = [f"spectral_alignment/alignment/{name}" for name in self.layers]
            write_histograms(trainer, tags, self._histograms, -1.0, 1.0)

    def tensorboard_charts(self, trainer: Trainer) -> dict[str, list[Any]]:
        """Charts for :class:`~lightning_eff.callbacks.TensorBoardLayout`."""
        return charts(self.log_details)
