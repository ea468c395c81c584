"""What ZClip costs, and what it is worth.

    python -m benchmarks.zclip cost     # what it takes of a step, beside Lightning's clipping
    python -m benchmarks.zclip worth    # training at a rate at which the example GPT spikes, three seeds
    python -m benchmarks.zclip plot     # the curves of the last `worth`, as docs/images/zclip_worth.png
    python -m benchmarks.zclip lock-in  # the streams of norms on which the authors' code clips every step

Rows go to benchmarks/results/zclip_<part>.csv.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch

from benchmarks.gpt import GPT_1M, GPT_10M, constant, text, train, validation_loss
from benchmarks.rows import CONSOLE, publish, read_rows, write_rows
from examples.gpt.model import GPTConfig
from examples.gpt.module import GPTModule
from harness.alternating import Alternating
from harness.operators import OperatorCounter
from harness.plots import IMAGES, by_step, mean_and_range, panels, save
from harness.processes import spawned
from harness.recorders import Losses
from harness.runs import begin, quiet_lightning
from lightning_eff.callbacks import ZClip
from lightning_eff.functional.zclip import ZClipConfig, ZClipState, zclip_update

# --- cost ------------------------------------------------------------------------------------------------------------


def train_with(clip: str, model: GPTModule, data: Any, *callbacks: L.Callback, **arguments: Any) -> None:
    """Train with one way to clip."""
    if clip.startswith("zclip"):
        # "skip" folds the clip into a fused optimizer's step.
        callbacks = (*callbacks, ZClip(nonfinite="skip" if clip == "zclip, folded" else "zero"))
    if clip.startswith("lightning"):
        arguments |= dict(gradient_clip_val=1.0, gradient_clip_algorithm=clip.split()[1])
    train(model, data, *callbacks, **arguments)


def cost(rounds: int, batch_size: int) -> None:
    """What clipping takes of a step of the 10 M GPT; operator calls and host syncs of a step."""
    data = text(GPT_10M, batch_size)
    rows = []
    for fused, ours in ((False, "zclip"), (True, "zclip"), (True, "zclip, folded")):
        arms = ("none", "lightning norm", ours)
        step, seconds = in_one_run(constant(GPT_10M, fused), data, arms, rounds)
        calls = {clip: operators(clip, fused) for clip in arms}
        for clip in arms[1:]:
            low, middle, high = statistics.quantiles([1e3 * each for each in seconds[clip]], n=4)
            rows.append(
                {
                    **{"tokens_per_step": batch_size * GPT_10M.block_size, "beside": ours, "clip": clip},
                    **{"optimizer": "AdamW fused" if fused else "AdamW foreach", "steps": len(seconds[clip])},
                    **{"clip_ms": round(middle, 2), "clip_ms_q1": round(low, 2), "clip_ms_q3": round(high, 2)},
                    **{"step_ms": round(1e3 * step, 1), "of_a_step": round(middle / 1e3 / step, 4)},
                    "host_syncs_per_step": calls[clip][0] - calls["none"][0],
                    "operator_calls_per_step": calls[clip][1] - calls["none"][1],
                }
            )
    publish("Cost of clipping", "zclip_cost", rows)


def in_one_run(model: GPTModule, data: Any, arms: tuple[str, ...], rounds: int) -> tuple[float, dict[str, list[float]]]:
    """CPU seconds of a step without a clip, the median, and of each clip of the run, which takes turns with the others.

    Two steps without differ by more than a clip takes, so the clips' own calls are timed.
    """
    zclip = ZClip(nonfinite="skip" if arms[-1] == "zclip, folded" else "zero")
    seconds: dict[str, list[float]] = {arms[1]: [], arms[-1]: []}

    def enter(trainer: Any, clip: str) -> None:
        trainer.gradient_clip_val = 1.0 if clip.startswith("lightning") else None
        others = [callback for callback in trainer.callbacks if callback is not zclip]
        trainer.callbacks = [zclip, *others] if clip.startswith("zclip") else others

    def timed(call: Callable[..., Any], clip: str) -> Callable[..., Any]:
        def run(*arguments: Any, **more: Any) -> Any:
            begun = time.process_time()
            call(*arguments, **more)
            if alternating.arm == clip:
                seconds[clip].append(time.process_time() - begun)

        return run

    order = (arms[-1], *arms[:-1])  # it begins as it is built
    alternating = Alternating({clip: partial(enter, clip=clip) for clip in order}, block=1, warm=2)
    zclip.on_before_optimizer_step = timed(zclip.on_before_optimizer_step, arms[-1])  # type: ignore[method-assign]
    model.configure_gradient_clipping = timed(model.configure_gradient_clipping, arms[1])  # type: ignore[method-assign]
    train(model, data, zclip, alternating, max_steps=3 + len(arms) * rounds)
    return statistics.median(alternating.figures()["cpu"]["none"]), seconds


def operators(clip: str, fused: bool) -> tuple[float, float]:
    """Host syncs and operator calls of one step, as the difference of two runs that differ in their length only."""
    counts = []
    for steps in (4, 8):
        config = GPTConfig(GPT_10M.block_size, GPT_10M.n_layer, 2, 8)
        with OperatorCounter() as counter:
            train_with(clip, GPTModule(config, schedule="constant", fused=fused), text(config, 1), max_steps=steps)
        counts.append((counter.host_syncs, counter.calls))
    (syncs, calls), (more_syncs, more_calls) = counts
    return (more_syncs - syncs) / 4, (more_calls - calls) / 4


# --- worth -----------------------------------------------------------------------------------------------------------


WORTH: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "norm 1.0": lambda: dict(gradient_clip_val=1.0),
    "value 0.01": lambda: dict(gradient_clip_val=0.01, gradient_clip_algorithm="value"),
    "ZClip": lambda: dict(callbacks=[ZClip(max_grad_norm=1.0)]),
    "ZClip, no cap": lambda: dict(callbacks=[ZClip(max_grad_norm=None)]),
}


def loss_spikes(losses: list[float], window: int = 30, height: float = 0.3) -> int:
    """Times that the loss rises by more than ``height`` nats above the median of the ``window`` steps before."""
    spikes, inside = 0, False
    for step in range(window, len(losses)):
        above = not losses[step] <= statistics.median(losses[step - window : step]) + height
        spikes += above and not inside
        inside = above
    return spikes


def run(lr: float, clip: str, seed: int, steps: int) -> tuple[dict[str, Any], list[float]]:
    """One run of the 1 M GPT on one thread: its row and the loss of every step."""
    begin(seed, "the mean gradient norm")
    model = constant(GPT_1M, lr=lr)
    data = text(GPT_1M, 16, val_windows=256, seed=seed)
    arguments = WORTH[clip]()
    record = Losses()
    callbacks = arguments.pop("callbacks", [])
    train(model, data, record, *callbacks, max_steps=steps, **arguments)
    losses = record.values
    row = {
        "lr": lr,
        "clip": clip,
        "seed": seed,
        "steps": steps,
        "val_loss": round(validation_loss(model, data), 4),
        "train_loss_last_50": round(statistics.fmean(losses[-50:]), 4),
        "loss_spikes": loss_spikes(losses),
        "steps_clipped_as_spikes": sum(sum(c.spikes) for c in callbacks if isinstance(c, ZClip)),
    }
    return row, losses


def worth(steps: int, rates: list[float], seeds: int, workers: int) -> None:
    """Train the 1 M GPT without a warm-up of the rate, at rates from high to far too high."""
    runs = [(lr, clip, seed, steps) for lr in rates for clip in WORTH for seed in range(seeds)]
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    with spawned(workers) as pool:
        for row, losses in pool.map(run, *zip(*runs, strict=True)):
            rows.append(row)
            about = {name: row[name] for name in ("lr", "clip", "seed")}
            curves += [{**about, "step": s, "train_loss": round(losses[s], 4)} for s in range(0, steps, 5)]
            CONSOLE.print(row)
    publish("Worth of clipping", "zclip_worth", rows)
    CONSOLE.print(write_rows("zclip_worth_curves", curves))


def plot() -> None:
    """Mean over the seeds of the training loss, a panel for each rate, with the range over the seeds."""
    rows = read_rows("zclip_worth_curves")
    rates = sorted({float(row["lr"]) for row in rows})
    figure, axes = panels(len(rates), 4.5)
    for axis, lr in zip(axes, rates, strict=True):
        for clip in WORTH:
            mine = [row for row in rows if float(row["lr"]) == lr and row["clip"] == clip and row["step"] != "0"]
            mean_and_range(axis, by_step((row["step"], row["train_loss"]) for row in mine), label=clip, linewidth=1.2)
        axis.set(title=f"learning rate {lr:g}", xlabel="step", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("training loss, nats a byte")
    axes[-1].legend()
    CONSOLE.print(save(figure, IMAGES / "zclip_worth.png"))


# --- lock-in ---------------------------------------------------------------------------------------------------------


def lock_in() -> None:
    """Norms N(1, 0.1), then N(s, 0.1 s) for 2,000 steps: how many are clipped as spikes, and when that ends."""
    rows = []
    options = {"adaptive_scaling": {}, "mean": dict(clip_option="mean"), "skip_update": dict(skip_update_on_spike=True)}
    for name, arguments in {**options, "percentile": dict(clip_option="percentile")}.items():
        for shift in (1.3, 1.5, 2.0, 4.0):
            for relearn_after in (None, ZClipConfig.relearn_after):
                generator = random.Random(0)
                state = ZClipState(ZClipConfig(max_grad_norm=None, relearn_after=relearn_after, **arguments))

                def feed(mean: float, state: ZClipState = state, generator: random.Random = generator) -> bool:
                    before = state["spikes"].item()
                    zclip_update(torch.tensor(generator.gauss(mean, 0.1 * mean), dtype=torch.float64), state)
                    return state["spikes"].item() > before

                for _ in range(500):
                    feed(1.0)
                clipped = [feed(shift) for _ in range(2000)]
                rows.append(
                    {
                        "option": name,
                        "shift": shift,
                        "relearn_after": relearn_after,
                        "clipped_of_2000": sum(clipped),
                        "clipped_of_last_1000": sum(clipped[1000:]),
                        "mean_after": round(state["mean"].item(), 4),
                    }
                )
    publish("A lasting shift of the norms", "zclip_lock_in", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("cost", "worth", "plot", "lock-in"))
    parser.add_argument("--steps", type=int, help="training steps of a run of worth (300)")
    parser.add_argument("--rounds", type=int, default=20, help="cost: steps of each variant")
    parser.add_argument("--batch-size", type=int, default=4, help="cost: sequences of 256 bytes a step")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.1, 0.3], help="worth: learning rates")
    parser.add_argument("--seeds", type=int, default=3, help="worth: number of seeds")
    parser.add_argument("--workers", type=int, default=2, help="worth: runs at a time, one thread each")
    arguments = parser.parse_args()
    quiet_lightning("the mean gradient norm")
    if arguments.part == "cost":
        cost(arguments.rounds, arguments.batch_size)
    elif arguments.part == "worth":
        worth(arguments.steps or 300, arguments.rates, arguments.seeds, arguments.workers)
    elif arguments.part == "plot":
        plot()
    else:
        lock_in()


if __name__ == "__main__":
    main()
