"""Callbacks with settings that belong together, for three kinds of run: from Python, or as YAML.

A setting here follows from the length of the run, so that all clocks of a short run are short. Where a number was
measured the reason names the rows; all else is a choice, and said to be one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightning_eff.arguments import check, check_choice, check_count, check_flag

if TYPE_CHECKING:
    from lightning.pytorch import Callback

Purpose = Literal["pretrain", "finetune", "vision"]

SHORTEST = 20
"""Optimizer steps; in a shorter run nothing here would act."""


class Entry(NamedTuple):
    """One callback of a recipe."""

    name: str
    """Of the class in ``lightning_eff.callbacks``, which is its short name in YAML."""

    arguments: dict[str, Any]
    why: str
    """In one line, for the YAML."""


def recipe(purpose: Purpose, steps: int, *, low_memory: bool = False, resumable: bool = True) -> list[Callback]:
    """Callbacks for one kind of run, to be given to the Trainer with what else it has.

    All three have ``ZClip`` with its defaults, whose cap follows the run in any unit of the loss; the Trainer's
    ``gradient_clip_val`` has to go, and it says so. All end with ``TensorBoardLayout``. With ``resumable`` they have
    ``ExactResume``, ``AsyncCheckpoint`` and ``Preemption``: the run ends between two steps on SIGTERM, with exit
    status 143, and ``fit(ckpt_path="last")`` goes on to the bit. Add a ``ModelCheckpoint`` that says when to save.

    ``"pretrain"``: a long run from nothing.

    - ``TrainingGuard(action="rollback")``: a diverged run of days is worth three snapshots in host memory. Its clocks
      hang together: a snapshot every hundredth of the run (20 to 100 steps), ``margin`` half of it, the rate lowered
      for twice, the count forgotten after ten times as long; at 10,000 steps these are its defaults. `ddp_ft`, FSDP1
      and DeepSpeed refuse a rollback: there take another purpose.
    - ``EMA(half_life=steps / 32)``: a float32 copy of the weights, no host sync; 25 of 800 steps in
      ``benchmarks/results/checkpoint_averaging_worth.csv``.

    ``"finetune"``: a short run from weights that are worth keeping.

    - ``TrainingGuard(action="stop")``: such a run is begun anew with a lower rate; no snapshots, any strategy.
    - ``CheckpointAveraging``: the mean of four snapshots of the last quarter, in host memory, where frozen weights
      take nothing; a short run has no time for an average that has to forget its beginning.
    - with ``low_memory``: ``MISA(momentum_step=False)``, which trains 3 % of the parameters at a time. Without the
      momentum step, which needs a lower rate, and was worse at short intervals
      (``benchmarks/results/misa_worth.csv``). LoRA was better than it there, at as little memory: take that where your
      model has it. A new head is not trained unless you name it: ``MISA(always=["*head*"])`` by hand.

    ``"vision"``: a network with BatchNorm, some epochs.

    - ``TrainingGuard(action="stop")``, as above.
    - ``EMA(half_life=steps / 32, buffers="average")``: running statistics that belong to the averaged weights, without
      a pass over training data before each evaluation.

    Args:
        purpose: ``"pretrain"``, ``"finetune"`` or ``"vision"``.
        steps: optimizer steps that the run will have, the Trainer's ``max_steps`` or
            ``estimated_stepping_batches``, >= 20.
        low_memory: fewer gradients and optimizer states, with ``"finetune"`` only.
        resumable: the run survives being killed, and a queue's end.

    Returns:
        New callbacks; their order does not matter, each knows its place.

    Raises:
        ValueError: an argument out of its range, or ``low_memory`` with another purpose than ``"finetune"``.

    Example:
        >>> import lightning as L
        >>> import lightning_eff
        >>> callbacks = lightning_eff.recipe("pretrain", steps=10_000)
        >>> [type(callback).__name__ for callback in callbacks][:3]
        ['ZClip', 'TrainingGuard', 'EMA']
        >>> trainer = L.Trainer(max_steps=10_000, callbacks=callbacks, accelerator="cpu", logger=False)
    """
    from lightning_eff import callbacks  # and not above: `import lightning_eff` does not import Lightning

    chosen = entries(purpose, steps, low_memory=low_memory, resumable=resumable)
    return [getattr(callbacks, entry.name)(**entry.arguments) for entry in chosen]


def recipe_yaml(purpose: Purpose, steps: int, *, low_memory: bool = False, resumable: bool = True) -> str:
    """The same as a part of a config for `lightning-eff fit`; the arguments are those of :func:`recipe`.

    Args:
        purpose: ``"pretrain"``, ``"finetune"`` or ``"vision"``.
        steps: optimizer steps that the run will have, >= 20; it is the Trainer's ``max_steps`` in the text.
        low_memory: fewer gradients and optimizer states, with ``"finetune"`` only.
        resumable: the run survives being killed, and a queue's end.

    Raises:
        ValueError: as :func:`recipe`.

    Example:
        >>> print(recipe_yaml("vision", steps=800, resumable=False))
        trainer:
          max_steps: 800
          callbacks:
            # clips a step whose gradient norm is an outlier; takes the place of gradient_clip_val
            - class_path: ZClip
            # ends a run whose loss has gone, with a checkpoint
            - class_path: TrainingGuard
              init_args: {action: "stop"}
            # averaged weights, with averaged BatchNorm statistics; logged as ema/val_loss, saved as ema-*.ckpt
            - class_path: EMA
              init_args: {half_life: 25, buffers: "average"}
            # all charts on one dashboard
            - class_path: TensorBoardLayout
        <BLANKLINE>
    """
    lines = ["trainer:", f"  max_steps: {steps}", "  callbacks:"]
    for entry in entries(purpose, steps, low_memory=low_memory, resumable=resumable):
        lines += [f"    # {entry.why}", f"    - class_path: {entry.name}"]
        if entry.arguments:
            arguments = ", ".join(f"{name}: {json.dumps(value)}" for name, value in entry.arguments.items())
            lines.append(f"      init_args: {{{arguments}}}")
    return "\n".join([*lines, ""])


def entries(purpose: Purpose, steps: int, *, low_memory: bool, resumable: bool) -> list[Entry]:
    """What a recipe is made of."""
    check_choice("purpose", purpose, Purpose)
    check_count("steps", steps, least=SHORTEST, unit="optimizer steps of the whole run")
    check_flag("low_memory", low_memory)
    check_flag("resumable", resumable)
    check("low_memory", low_memory, purpose == "finetune" or not low_memory, f"False with purpose={purpose!r}")
    chosen = [
        Entry("ZClip", {}, "clips a step whose gradient norm is an outlier; takes the place of gradient_clip_val")
    ]
    chosen += {"pretrain": _pretrain, "finetune": _finetune, "vision": _vision}[purpose](steps)
    if low_memory:
        # Twenty turns at least in a run; the first round takes a tenth of the time for each.
        arguments = {"every_n_steps": max(2, min(50, steps // 20)), "momentum_step": False}
        chosen.append(Entry("MISA", arguments, "trains a few matrices at a time: 3 % of the gradients and states"))
    if resumable:
        chosen += [
            Entry("ExactResume", {}, "a resumed run is the unbroken one, to the bit"),
            Entry("AsyncCheckpoint", {}, "saves while training goes on: two checkpoints of host memory"),
            Entry("Preemption", {}, "on SIGTERM the run ends between two steps, with its state saved"),
        ]
    return [*chosen, Entry("TensorBoardLayout", {}, "all charts on one dashboard")]


def _pretrain(steps: int) -> list[Entry]:
    every = max(20, min(100, steps // 100))
    guard = {
        "action": "rollback",
        "every_n_steps": every,
        "margin": every // 2,
        "read_every_n_steps": every // 10,
        "lr_steps": 2 * every,
        "forget_after": 10 * every,
    }
    return [
        Entry("TrainingGuard", guard, "goes back to a snapshot when the loss has gone: three copies of host memory"),
        Entry("EMA", {"half_life": _half_life(steps)}, "averaged weights; logged as ema/val_loss, saved as ema-*.ckpt"),
    ]


def _finetune(steps: int) -> list[Entry]:
    every = max(1, steps // 16)
    average = {"scheme": "uniform", "window": 4, "every_n_steps": every, "start_step": steps - 4 * every}
    why = "the mean of four snapshots of the last quarter; logged as average/val_loss, saved as average-*.ckpt"
    return [_STOP, Entry("CheckpointAveraging", average, why)]


def _vision(steps: int) -> list[Entry]:
    why = "averaged weights, with averaged BatchNorm statistics; logged as ema/val_loss, saved as ema-*.ckpt"
    return [_STOP, Entry("EMA", {"half_life": _half_life(steps), "buffers": "average"}, why)]


_STOP = Entry("TrainingGuard", {"action": "stop"}, "ends a run whose loss has gone, with a checkpoint")


def _half_life(steps: int) -> int:
    return max(1, steps // 32)
