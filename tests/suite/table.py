"""The contract table: a callback that is a row here keeps every rule in tests/suite/rules, on every strategy.

How to add one: append a `Row` to `ROWS`. A rule that it cannot keep goes into `exceptions`, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import lightning as L

from lightning_eff.callbacks import (
    EMA,
    MISA,
    AsyncCheckpoint,
    CheckpointAveraging,
    CompressionMonitor,
    ExactResume,
    FaultInjector,
    GradES,
    GradientStats,
    ModelSurgery,
    Preemption,
    RunHealth,
    SpectralAlignmentMonitor,
    TensorBoardLayout,
    TrainingGuard,
    ZClip,
)
from lightning_eff.plugins import AsyncCheckpointIO
from lightning_eff.strategies import ArcTopK, CompressedDDPStrategy
from tests.suite.device import DEVICE
from tests.suite.probe import Probe


@dataclass(frozen=True)
class Strategy:
    """A column of the table."""

    name: str
    ranks: int
    build: Callable[[int], Any]
    """The Trainer's `strategy` for a model with that many optimizers."""

    lossy: bool = False
    """Gradients are compressed: the ranks still agree, but on something else than one device would do."""

    package: str = "lightning.pytorch"
    """Or `pytorch_lightning`: whose Trainer, module and strategy they are."""


def _single(optimizers: int) -> str:
    return "auto"


def _ddp(optimizers: int) -> str:
    # Each of several losses leaves some parameters without a gradient.
    return "ddp" if optimizers == 1 else "ddp_find_unused_parameters_true"


def _fsdp2(optimizers: int) -> str:
    return "fsdp2"


def _arc_topk(optimizers: int) -> CompressedDDPStrategy:
    # Such that it compresses models as small as these. An unused parameter and error feedback do not go together.
    settings = {"ratio": 0.5, "rank": 1, "min_numel": 64}
    if optimizers == 1:
        return CompressedDDPStrategy(ArcTopK(error_feedback="ef14", **settings))
    return CompressedDDPStrategy(ArcTopK(**settings), find_unused_parameters=True)


SINGLE = Strategy("single", 1, _single)
DDP = Strategy("ddp", 2, _ddp)
FSDP2 = Strategy("fsdp2", 2, _fsdp2)
ARC_TOPK = Strategy("arc_topk", 2, _arc_topk, lossy=True)
STRATEGIES = (SINGLE, DDP, FSDP2, ARC_TOPK)


@dataclass(frozen=True)
class Row:
    """One callback under the contract."""

    callback: type[L.Callback]
    arguments: dict[str, Any] = field(default_factory=dict)
    """Such that the method acts within ten steps; steps 5, 6 and 8 of the models have spikes. As YAML has them."""

    name: str = ""
    """Of the row, where one class has several."""

    crash_steps: tuple[int, ...] = (3, 7)
    """Completed steps after which a run is broken off and resumed: the phases of the method's state."""

    tags: tuple[str, ...] = ()
    """Scalars that a logger gets with one optimizer."""

    tags_two_optimizers: tuple[str, ...] = ()
    """And with two."""

    tags_later: tuple[str, ...] = ()
    """Of these, those that have no number before there is something to tell."""

    logs_from: int = 1
    """The first step, of those that Lightning logs, at which there is a number."""

    hangs_on_rounding: tuple[str, ...] = ()
    """Entries of its state that another order of summation changes by more than rounding, as a share of zeros."""

    syncs_per_log: int | None = None
    """Host syncs allowed on a step that Lightning logs; None: one for each tag."""

    changes_training: bool = True
    """False for a monitor: the weights must be the same with and without it."""

    refused_strategies: dict[str, str] = field(default_factory=dict)
    """Strategy name -> words of the MisconfigurationException."""

    refused_models: dict[str, str] = field(default_factory=dict)
    """Model name ("gan" is manual optimization with two optimizers) -> words of the MisconfigurationException."""

    bad_arguments: tuple[dict[str, Any], ...] = ()
    """Each has one bad argument: a ValueError must give its name and its value."""

    conflicts: tuple[tuple[dict[str, Any], str], ...] = ()
    """Trainer arguments that the callback refuses, and words of the MisconfigurationException."""

    exceptions: dict[str, str] = field(default_factory=dict)
    """Rule, or rule-strategy, that is not kept -> the reason; a strict xfail."""

    slow: bool = False
    """A second row of a class that `make test-all` alone checks."""

    @property
    def id(self) -> str:
        return self.name or self.callback.__name__

    def build(self, **changes: Any) -> L.Callback:
        return self.callback(**_objects({**self.arguments, **changes}))


def _objects(value: Any) -> Any:
    """What YAML's ``class_path`` and ``init_args`` stand for."""
    if isinstance(value, dict) and "class_path" in value:
        module, _, name = value["class_path"].rpartition(".")
        return getattr(import_module(module), name)(**_objects(value["init_args"]))
    if isinstance(value, dict):
        return {key: _objects(entry) for key, entry in value.items()}
    return [_objects(entry) for entry in value] if isinstance(value, list) else value


def _zclip_tags(prefix: str) -> tuple[str, ...]:
    names = ("grad_norm", "grad_norm_clipped", "threshold", "z_score", "clipped", "skipped")
    return tuple(f"{prefix}/{name}" for name in names)


def _misa_tags() -> tuple[str, ...]:
    names = ("active", "trainable", "used", "effective", "optimizer_bytes")
    return tuple(f"misa/{name}" for name in (*names, *(("peak_memory_bytes",) if DEVICE == "cuda" else ())))


def _later(tags: tuple[str, ...], *names: str) -> tuple[str, ...]:
    return tuple(tag for tag in tags if tag.rpartition("/")[2] in names)


_ZCLIP = {"warmup_steps": 4, "z_thresh": 1.5, "alpha": 0.9}

_GUARD_TAGS = tuple(f"training_guard/{name}" for name in ("alarms", "rollbacks", "undone_steps", "lr_factor"))
_GUARD_COPIES = "the few numbers that its rules have not read yet are copied, on the device"
_GRADES_WAITS = (
    "AdamW on the CPU reads its count of steps for each parameter, and for a frozen one no longer: that hides "
    "the callback's own reads, which tests/callbacks/grades/test_grades.py counts"
)

_MISA_COPIES = "the sampler's few numbers are copied, which lie on the host anyway"
_MISA_WAITS = (
    "AdamW on the CPU reads its count of steps for each parameter, and of a frozen one none: that hides the callback's "
    "own reads, which tests/callbacks/misa/test_misa.py counts"
)

_SPECTRAL_TAGS = tuple(
    f"spectral_alignment/{name}" for name in ("worst_majority", "worst_layer", "collapsed_layers", "armed_layers")
)

_MOC = {"k": 3, "pattern": "global", "recompute": False, "new_weights": True}
_CR = {"rank": 2, "beta": 0.5, "std": None, "recompute": True, "max_growth": 32.0}
_SURGERY = "the layers that it has put into the model stay there"

_SURGERY_WAITS = "AdamW on the CPU reads its count of steps for each parameter, and there are more or fewer than before"

_GRADIENT_NUMBERS = ("norm", "max_abs", "zeros", "nonfinite")
_GRADIENT_TAGS = tuple(f"gradients/{name}" for name in _GRADIENT_NUMBERS)
_HEALTH_TAGS = tuple(f"run_health/{name}" for name in ("step_seconds", "data", "waiting", "spread"))

ROWS = (
    Row(
        Probe,
        {"slope": 0.1},
        tags=("probe/norm",),
        tags_two_optimizers=("probe/0/norm", "probe/1/norm"),
        bad_arguments=({"slope": -1.0}, {"form": "cubic"}),
        conflicts=(({"gradient_clip_val": 1.0}, "gradient_clip_val"),),
    ),
    Row(
        ZClip,
        _ZCLIP,
        crash_steps=(2, 7),  # in the warm-up, and after it between two spikes
        tags=_zclip_tags("zclip"),
        tags_two_optimizers=_zclip_tags("zclip/0") + _zclip_tags("zclip/1"),
        tags_later=_later(_zclip_tags("zclip") + _zclip_tags("zclip/0") + _zclip_tags("zclip/1"), "z_score"),
        bad_arguments=(
            {"alpha": 1.0},
            {"alpha": -0.1},
            {"alpha": float("nan")},
            {"z_thresh": 0.0},
            {"max_grad_norm": 0.0},
            {"max_grad_norm": "automatic"},
            {"eps": -1e-6},
            {"warmup_steps": 0},
            {"clip_option": "max"},
            {"clip_factor": 0.0},
            {"relearn_after": 0},
            {"nonfinite": "explode"},
            {"skip_update_on_spike": "false"},
            {"log_details": 1},
        ),
        conflicts=(({"gradient_clip_val": 1.0}, "gradient_clip_val"),),
    ),
    Row(
        ZClip,
        {**_ZCLIP, "max_grad_norm": None, "nonfinite": "skip", "clip_option": "percentile", "log_details": True},
        name="ZClip-skip",
        crash_steps=(6,),
        tags=(*_zclip_tags("zclip"), "zclip/mean", "zclip/std", "zclip/spikes", "zclip/relearned"),
        tags_later=_later(_zclip_tags("zclip"), "z_score", "threshold"),
        exceptions={
            "waits_for_nothing": "without a fused optimizer an exact skip takes one read of the norm a step",
            "survives_overflow": "it warns that the setting has no effect under a GradScaler",
        },
    ),
    Row(
        ZClip,
        {**_ZCLIP, "max_grad_norm": 1e3},
        name="ZClip-fixed-cap",
        tags_later=_later(_zclip_tags("zclip"), "z_score"),
        syncs_per_log=8,  # six tags, and two to see whether the cap hides the statistics
        crash_steps=(2,),
        slow=True,
    ),
    Row(TensorBoardLayout, changes_training=False),
    Row(CompressionMonitor, crash_steps=(3,), changes_training=False),
    Row(
        CheckpointAveraging,
        {"scheme": "wsm", "window": 3, "every_n_steps": 2, "start_step": 3, "preview": [2]},
        crash_steps=(3, 7),  # before the first snapshot, and with half of a window
        changes_training=False,
        bad_arguments=(
            {"scheme": "loss"},
            {"window": 0},
            {"every_n_steps": 0},
            {"start_step": -1},
            {"decay": "exponential"},
            {"alpha": 0.0},
            {"penalty": -1.0},
            {"preview": [3]},
            {"storage": "tape"},
            {"validate_with": "all"},
            {"buffers": "none"},
            {"update_bn": 0},
            {"save": "pickle"},
            {"name": "a/b"},
        ),
    ),
    Row(
        CheckpointAveraging,
        {"window": 2, "every_n_steps": 3, "storage": "disk", "validate_with": "average", "buffers": "average"},
        name="CheckpointAveraging-disk",
        crash_steps=(7,),
        changes_training=False,
    ),
    Row(
        EMA,
        {"decay": 0.9, "validate_with": "average"},
        crash_steps=(3,),
        changes_training=False,
        bad_arguments=({"decay": 1.0}, {"every_n_steps": 0}, {"storage": "disk"}, {"name": ""}),
    ),
    Row(
        EMA,
        {"widths": [0.05, 0.1], "every_n_steps": 2, "storage": "cpu"},
        name="EMA-widths",
        crash_steps=(7,),
        exceptions={"waits_for_nothing": "averages in host memory wait for the weights"} if DEVICE == "cuda" else {},
        changes_training=False,
        bad_arguments=({"widths": [0.3]}, {"half_life": 0.0}, {"widths": []}),
    ),
    Row(
        TrainingGuard,
        {
            "rules": [
                {
                    "class_path": "lightning_eff.callbacks.ExplodingLoss",
                    "init_args": {
                        "factor": 2.0,
                        "deviations": 3.0,
                        "over_n_steps": 3,
                        "patience": 2,
                        "smooth_n_steps": 1,
                    },
                }
            ],
            "every_n_steps": 1,
            "keep": 8,
            "margin": 2,
            "read_every_n_steps": 1,
            "lr_steps": 6,
        },
        crash_steps=(3, 9),  # before the alarm at step 7, and after the run has gone back from step 8 to step 5
        exceptions={
            "waits_for_nothing": "with read_every_n_steps=1 it reads the numbers of the step before in each",
            "draws_no_random_numbers": "a rollback draws anew, and more batches are drawn after it",
            "a_snapshot_waits_for_nothing": _GUARD_COPIES,
        },
        bad_arguments=(
            {"action": "panic"},
            {"rules": ["loss"]},
            {"rules": "loss"},
            {"every_n_steps": 0},
            {"keep": 1},
            {"margin": 0},
            {"margin": 6},
            {"read_every_n_steps": 0},
            {"storage": "tape"},
            {"folder": ""},
            {"draw_anew": "false"},
            {"lr_factor": 0.0},
            {"lr_factor": 1.5},
            {"lr_steps": 0},
            {"max_rollbacks": 0},
            {"forget_after": 0},
            {"min_severity": 1.5},
        ),
    ),
    Row(
        TrainingGuard,
        # Those of "default" but for AttentionLogits: two ranks take the mean of their largest, one device the largest.
        {
            "rules": [
                {"class_path": "lightning_eff.callbacks.NonFiniteLoss", "init_args": {"patience": 2}},
                {
                    "class_path": "lightning_eff.callbacks.ExplodingLoss",
                    "init_args": {
                        "factor": 1.25,
                        "deviations": 4.0,
                        "over_n_steps": 50,
                        "patience": 5,
                        "smooth_n_steps": 20,
                    },
                },
                {
                    "class_path": "lightning_eff.callbacks.WeightGrowth",
                    "init_args": {"factor": 3.5, "least": 0.02, "over_n_steps": 50, "every_n_steps": 10, "patience": 2},
                },
            ],
            "storage": "disk",
        },
        name="TrainingGuard-idle",
        exceptions={"a_snapshot_waits_for_nothing": _GUARD_COPIES},
        crash_steps=(7,),
        changes_training=False,
        tags=_GUARD_TAGS,
        tags_two_optimizers=_GUARD_TAGS,
    ),
    Row(
        GradES,
        # The default asks for ten checks before its first decision, more than these runs have.
        {
            "tau": 5.0,
            "tau_mode": "relative",
            "alpha": 0.2,
            "every_n_steps": 1,
            "patience": 1,
            "max_frozen_ratio": 0.5,
            "stop_when_frozen": False,
            "release_state": True,
            "max_events": 4,
        },
        crash_steps=(3, 7, 9),
        tags=tuple(
            f"grades/{name}"
            for name in ("frozen_ratio", "frozen_params", "backward_flops_saved", "frozen_attention", "frozen_ffn")
        ),
        tags_two_optimizers=tuple(
            f"grades/{name}"
            for name in ("frozen_ratio", "frozen_params", "backward_flops_saved", "frozen_ffn", "frozen_other")
        ),
        bad_arguments=(
            {"tau": 0.0},
            {"tau": float("nan")},
            {"alpha": 1.0},
            {"alpha": -0.1},
            {"metric": "hessian"},
            {"tau_mode": "median"},
            {"every_n_steps": 0},
            {"patience": 0},
            {"include": "*"},
            {"exclude": []},
            {"prefix": "*embed*"},
            {"max_frozen_ratio": 0.0},
            {"max_frozen_ratio": 1.5},
            {"max_events": 0},
            {"unfreeze": "always"},
            {"unfreeze_factor": 1.0},
            {"stop_when_frozen": "false"},
            {"release_state": 1},
            {"log_details": None},
            {"heat_map": "true"},
        ),
        conflicts=(({"max_steps": -1, "max_epochs": -1}, "give the Trainer max_steps"),),
        exceptions={"waits_for_nothing": _GRADES_WAITS},
    ),
    Row(
        GradES,
        {
            "tau": 1e4,
            "alpha": 0.1,
            "metric": "weight_change",
            "tau_mode": "absolute",
            "every_n_steps": 2,
            "include": ["*weight"],
            "patience": 1,
            "max_frozen_ratio": 0.5,
            "stop_when_frozen": False,
            "max_events": None,
            "unfreeze": "neighbours",
            "unfreeze_factor": 1.2,
            "log_details": True,
        },
        name="GradES-absolute",
        crash_steps=(3, 7),
        exceptions={
            "waits_for_nothing": _GRADES_WAITS,
            "survives_overflow": "a run that is shorter by the dropped steps has its grace period and checks elsewhere",
        },
    ),
    Row(
        SpectralAlignmentMonitor,
        # All inputs, so that micro-batches and ranks add up to the whole batch. The patterns fit both models.
        {
            **{"every_n_steps": 2, "look_back": 1, "patience": 1, "hysteresis": 0.0},
            **{"include": ["*.0", "*.2"], "max_tokens": None},
        },
        crash_steps=(3, 6),  # between two observations, and before one
        changes_training=False,
        tags=_SPECTRAL_TAGS,
        tags_two_optimizers=_SPECTRAL_TAGS,
        tags_later=_SPECTRAL_TAGS[:2],  # from when a layer is armed
        syncs_per_log=5,  # four tags, and once whether a layer is armed
        bad_arguments=(
            {"every_n_steps": 0},
            {"include": []},
            {"exclude": "blocks"},
            {"max_tokens": 0},
            {"power_iterations": 0},
            {"threshold": 0.5},
            {"threshold": 1.1},
            {"hysteresis": 0.6},
            {"patience": 0},
            {"look_back": 0},
            {"severity": 0.0},
            {"max_residual": 0.0},
            {"max_residual": float("nan")},
            {"action": "explode"},
            {"log_details": "yes"},
            {"heat_map": 1},
        ),
    ),
    Row(
        MISA,
        # Intervals end after 2 and 11 steps: all matrices have had a turn by then.
        {
            "budget": 0.7,
            "first_every_n_steps": 2,
            "every_n_steps": 9,
            "always": ["*bias", "*norm*", "head*"],
        },
        crash_steps=(1, 2, 7),  # in the first interval, at its end before the new state is there, and in the second
        tags=_misa_tags(),
        refused_models={"gan": "belong to 2 optimizers"},
        exceptions={"waits_for_nothing": _MISA_WAITS, "a_snapshot_waits_for_nothing": _MISA_COPIES},
        bad_arguments=(
            {"budget": 0.0},
            {"budget": 1.5},
            {"every_n_steps": 0},
            {"eta": -1.0},
            {"eta": "automatic"},
            {"beta": 1.0},
            {"granularity": "head"},
            {"sampling": "greedy"},
            {"variant": "code"},
            {"units": 0},
            {"include": []},
            {"exclude": "*bias"},
            {"always": []},
            {"sample_last": -1},
            {"first_every_n_steps": 0},
            {"seed": -1},
            {"debias": "no"},
            {"momentum_step": 1},
            {"log_details": "yes"},
            {"heat_map": "yes"},
        ),
    ),
    Row(
        MISA,
        {
            "variant": "official",
            "granularity": "layer",
            "units": 1,
            "every_n_steps": 3,
            "always": ["head*"],
            "eta": 99.0,
        },
        name="MISA-official-layers",
        crash_steps=(1, 5),
        tags=_misa_tags(),
        refused_models={"gan": "belong to 2 optimizers"},
        exceptions={"waits_for_nothing": _MISA_WAITS, "a_snapshot_waits_for_nothing": _MISA_COPIES},
    ),
    Row(
        ExactResume,
        changes_training=False,
        bad_arguments=({"iterable": "sometimes"}, {"randomness": "none"}),
    ),
    Row(
        Preemption,
        {"signals": ["SIGUSR2"], "every_n_steps": 2},
        changes_training=False,
        bad_arguments=(
            {"signals": "SIGTERM"},
            {"signals": ["SIGKILL"]},
            {"file": ""},
            {"max_time": "1 hour"},
            {"every_n_steps": 0},
            {"exit_code": 256},
            {"requeue": "always"},
            {"emergency": "yes"},
            {"poll_seconds": 0.0},
            {"timeout": -1.0},
        ),
    ),
    Row(
        RunHealth,
        {"every_n_steps": 1, "weights_every_n_steps": 2, "gc_every_n_steps": 3},
        crash_steps=(3,),
        changes_training=False,
        tags=_HEALTH_TAGS,
        tags_two_optimizers=_HEALTH_TAGS,
        logs_from=3,  # a window is read two steps behind its end
        bad_arguments=(
            {"every_n_steps": 0},
            {"slow": 0.0},
            {"patience": 0},
            {"hang_seconds": -1.0},
            {"hang_factor": 1.0},
            {"first_seconds": 0.0},
            {"action": "panic"},
            {"exit_code": 0},
            {"folder": ""},
            {"weights_every_n_steps": 0},
            {"gc_every_n_steps": 0},
            {"log_details": "yes"},
        ),
    ),
    Row(
        FaultInjector,
        {"fault": "corrupt", "step": 1000},
        crash_steps=(3,),
        changes_training=False,
        bad_arguments=(
            {"fault": "explode"},
            {"step": -1},
            {"rank": -1},
            {"hook": "on_lunch"},
            {"slowdown": 0.0},
            {"seconds": 0.0},
            {"parameter": ""},
        ),
    ),
    Row(
        GradientStats,
        {"every_n_steps": 2},
        crash_steps=(3,),
        hangs_on_rounding=("measured",),
        syncs_per_log=17,  # sixteen tags, and the copy that all of them are read from
        changes_training=False,
        tags=(
            *_GRADIENT_TAGS,
            *(f"gradients/{role}/{name}" for role in ("attention", "ffn", "other") for name in _GRADIENT_NUMBERS),
        ),
        tags_two_optimizers=tuple(
            f"gradients/{index}{group}/{name}"
            for index, groups in ((0, ("", "/other")), (1, ("", "/other", "/ffn")))
            for group in groups
            for name in _GRADIENT_NUMBERS
        ),
        bad_arguments=(
            {"every_n_steps": 0},
            {"include": "*weight"},
            {"exclude": []},
            {"log_details": 1},
        ),
    ),
    Row(
        ModelSurgery,
        {"feed_forward": _MOC},
        crash_steps=(3,),
        refused_models={"gan": "nothing can be replaced"},
        exceptions={"an_exception_leaves_nothing_behind": _SURGERY},
        bad_arguments=({"feed_forward": 1}, {"attention": "skipv1"}, {"linear": 0}, {"seed": -1}),
    ),
    Row(
        ModelSurgery,
        {"linear": _CR},
        name="ModelSurgery-cr",
        slow=True,
        crash_steps=(3,),
        refused_models={"gan": "nothing can be replaced"},
        exceptions={
            "an_exception_leaves_nothing_behind": _SURGERY,
            "waits_for_nothing": _SURGERY_WAITS,
            "accumulates": "it counts forward passes, of which a step of two micro-batches has two",
        },
    ),
    Row(
        AsyncCheckpoint,
        {"when_busy": "skip", "on_error": "warn", "retries": 1, "retry_seconds": 0.0, "check_loads": False},
        changes_training=False,
        bad_arguments=(
            {"when_busy": "never"},
            {"on_error": "ignore"},
            {"retries": -1},
            {"retry_seconds": -1.0},
            {"check_loads": "yes"},
        ),
        conflicts=(({"plugins": [AsyncCheckpointIO()]}, "take AsyncCheckpointIO out"),),
    ),
)
