"""Pictures of rows that other benchmarks have measured, for README and the cards. Nothing is run.

Usage:
    python -m benchmarks.plots [picture ...]      # all, if none is named; --help lists them
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.plots_cards import CARDS, rows
from harness.plots import IMAGES, panels, save


def step_time() -> Any:
    """A step of two ranks over links of different speed, dense and compressed, and where the lines cross."""
    figure, axis = panels()
    links = ["50", "200", "1000", "loopback"]
    arms = {
        "dense": "dense",
        "bf16": "bf16",
        "int8": "int8",
        "powersgd 4": "PowerSGD, rank 4",
        "arc_topk 0.2": "ARC-Top-K, 0.2",
    }
    measured = {
        (row["link_mbit"], row["arm"]): float(row["step_s"])
        for row in rows("compressed_allreduce_steps", ranks="2", size="5m")
    }
    for arm, label in arms.items():
        seconds = [measured[link, arm] for link in links]
        axis.plot(links, seconds, marker="o", label=label, color="black" if arm == "dense" else None)
    axis.plot(links, [measured[link, "compute alone"] for link in links], ":", color="grey", label="compute alone")
    axis.set(yscale="log", xlabel="link, Mbit/s", ylabel="seconds a step", title="Two ranks, 4.9 M parameters, CPU")
    _crossover(
        axis, [measured[link, "dense"] for link in links], [[measured[link, arm] for link in links] for arm in arms]
    )
    axis.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    axis.minorticks_off()
    axis.legend()
    return figure


def _crossover(axis: Any, dense: list[float], others: list[list[float]]) -> None:
    """Shade what lies between the slowest link on which each compressor loses and the fastest on which each gains."""
    gains = [all(arm[place] <= dense[place] for arm in others) for place in range(len(dense))]
    last, first = max(i for i, each in enumerate(gains) if each), gains.index(False)
    axis.axvspan(last, first, color="grey", alpha=0.12, linewidth=0)
    axis.text((last + first) / 2, max(dense) * 0.55, "here dense\nbecomes faster", ha="center", fontsize=9)


_COSTS = [  # file, column of the name, its value, columns of median and quartiles, label
    ("checkpoint_averaging_cost", "callback", "CheckpointAveraging, every 10", "over_none", "CheckpointAveraging"),
    ("checkpoint_averaging_cost", "callback", "EMA, every step", "over_none", "EMA, every step"),
    ("checkpoint_averaging_cost", "callback", "Lightning EMAWeightAveraging", "over_none", "Lightning's EMA"),
    ("training_guard_cost", "guard", "guard, a snapshot in 10 steps", "over_none", "TrainingGuard, a snapshot in 10"),
    ("spectral_alignment_cost", "every_n_steps", "20", "over_without", "SpectralAlignmentMonitor, every 20"),
]  # fmt: skip


def overhead() -> Any:
    """What callbacks cost, as medians with quartiles of ratios to the same run without them.

    Left where it matters; right every one of them, where Python's work for each tensor would show.
    """
    figure, axes = panels(2, width=6.0, height=4.4)
    clips = {"zclip": "ZClip", "lightning norm": "Lightning's clip_grad_norm"}
    large = [
        (label, *(1 + float(row[f"clip_ms{end}"]) / float(row["step_ms"]) for end in ("_q1", "", "_q3")))
        for label, row in ((label, rows("zclip_cost", clip=clip)[0]) for clip, label in clips.items())
    ]
    large += [
        (label, *(float(rows(name, **{column: value})[0][f"{ratio}{end}"]) for end in ("_q1", "", "_q3")))
        for name, column, value, ratio, label in _COSTS
    ]
    many = [
        (row["arm"], *(float(row[f"over_none{end}"]) for end in ("_q1", "", "_q3")))
        for row in rows("many_tensors")
        if row["arm"] != "none"
    ]
    _forest(axes[0], large, "10.8 M GPT, CPU: step time")
    _forest(axes[1], many, "1,000 tensors of 4 x 4: CPU time")
    return figure


def _forest(axis: Any, found: list[tuple[str, float, float, float]], title: str) -> None:
    """Lines from quartile to quartile, one below the other, each with its median."""
    for place, (label, low, middle, high) in enumerate(reversed(found)):
        color = "grey" if label.startswith("Lightning") else "tab:blue"
        axis.plot([low, high], [place, place], color=color)
        axis.plot(middle, place, "o", color=color)
        axis.text(1.02, place, f"{middle:.3f}", va="center", transform=axis.get_yaxis_transform())
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(found)), [label for label, *_ in reversed(found)])
    axis.set(xlim=(0.87, 1.15), xlabel="over none: median and quartiles", title=title)


def recovery() -> Any:
    """Seconds from ``kill -9`` to the next step, and the steps that are made again."""
    figure, axis = panels(height=2.2)
    labels = []
    for place, strategy in enumerate(["ddp, restart", "ddp_ft"]):
        row = rows("fault_tolerance_recovery", strategy=strategy, quantity="kill_to_commit")[0]
        lost = float(rows("fault_tolerance_recovery", strategy=strategy, quantity="steps_lost")[0]["median"])
        labels.append(f"{strategy}\n({row['model']} GPT)")
        axis.barh(place, float(row["median"]), color="tab:blue" if strategy == "ddp_ft" else "grey")
        axis.text(
            float(row["median"]) + 0.2, place, f"{float(row['median']):.1f} s, {lost:.0f} steps made again", va="center"
        )
    axis.set_yticks(range(len(labels)), labels)
    axis.set(xlim=(0, 21), xlabel="seconds from kill -9 to the next step (median, three replicas, CPU)")
    return figure


def _curve(strategy: str, event: str) -> list[dict[str, str]]:
    return rows("fault_tolerance_curves", strategy=strategy, event=event)


def loss_through_kills() -> Any:
    """The loss by the clock through the same two kills: one run goes on, the other is started again."""
    figure, axis = panels(width=8.0, height=3.6)
    for strategy, label, color in (
        ("ddp", "ddp, started again at once from a checkpoint every 10 steps", "grey"),
        ("ddp_ft", "ddp_ft", "tab:blue"),
    ):
        made = [(float(row["seconds"]), float(row["loss"])) for row in _curve(strategy, "step")]
        # No line over the time in which no step is made.
        pauses = [place for place, (one, other) in enumerate(pairwise(made), 1) if other[0] - one[0] > 10]
        for start, end in pairwise([0, *pauses, len(made)]):
            axis.plot(*zip(*made[start:end], strict=True), color=color, linewidth=1.2)
        axis.plot([], [], color=color, label=f"{label}: {len(made)} steps in {made[-1][0]:.0f} s")
        for kill in _curve(strategy, "kill"):
            last = max(point for point in made if point[0] <= float(kill["seconds"]))
            axis.plot(*last, "x", color="tab:red", markersize=9, markeredgewidth=2)
    axis.plot([], [], "x", color="tab:red", label="kill -9 of one of three replicas")
    axis.set(xlabel="seconds", ylabel="training loss", title="0.85 M GPT, three replicas that share two cores")
    axis.legend()
    return figure


def lock_in() -> Any:
    """How many of 2,000 steps are clipped behind a jump of the gradients' level, by what is done about it."""
    figure, axes = panels(2, width=4.5, height=3.2, sharey=True)
    for axis, relearn in zip(axes, ("", "25"), strict=True):
        for option, width in {"adaptive_scaling": 5, "mean": 3, "skip_update": 1.5, "percentile": 1}.items():
            found = rows("zclip_lock_in", option=option, relearn_after=relearn)
            shares = [int(row["clipped_of_last_1000"]) / 10 for row in found]
            axis.plot([float(row["shift"]) for row in found], shares, marker="o", linewidth=width, label=option)
        axis.set(
            xlabel="the level grows by a factor of", title=f"relearn_after={relearn}" if relearn else "as in the paper"
        )
    axes[0].set(ylabel="% clipped of the last 1,000 steps")
    axes[0].legend()
    return figure


def throughput() -> Any:
    """The share of the throughput that failures take, by what is done about them (simulated from measured times)."""
    figure, axes = panels(2, width=4.5, height=3.2, sharey=True)
    labels = {
        "mecefo": "MeCeFO",
        "takeover": "exact takeover",
        "shrink": "drop the share",
        "restart from checkpoint": "restart",
    }
    scenarios = {row["scenario"]: row["failure_every_h"] for row in rows("fault_tolerance_simulation")}
    for axis, replicas in zip(axes, ("8", "32"), strict=True):
        for system, label in labels.items():
            lost = [
                float(
                    rows("fault_tolerance_simulation", scenario=s, replicas=replicas, system=system)[0][
                        "throughput_lost_percent"
                    ]
                )
                for s in scenarios
            ]
            axis.plot([f"{hours} h" for hours in scenarios.values()], lost, marker="o", label=label)
        axis.set(xlabel="a failure every", title=f"{replicas} replicas", ylim=(0, None))
    axes[0].set(ylabel="% of the throughput lost")
    axes[0].legend(loc="lower right")
    return figure


def detectors() -> Any:
    """How many steps ahead of each divergence a detector warns; those that it does not warn of stand at zero."""
    figure, axis = panels(height=3.2)
    found = [row for row in rows("detectors_lead") if row["diverged_at"]]
    names = list(dict.fromkeys(row["detector"] for row in found))
    causes = list(dict.fromkeys(row["run"].partition(": ")[2] for row in found))
    for cause, marker, shift in zip(causes, "os^", (0.2, 0.0, -0.2), strict=False):
        points = [
            (int(row["steps_of_warning"]), len(names) - 1 - names.index(row["detector"]) + shift)
            for row in found
            if row["run"].endswith(cause)
        ]
        axis.scatter(*zip(*points, strict=True), marker=marker, label=cause, alpha=0.7)
    axis.axvline(30, color="grey", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(names)), names[::-1])
    axis.set(xlabel="steps of warning", title="Runs that diverge: GPT, ViT, LSTM")
    axis.legend(fontsize=8)
    return figure


def regret() -> Any:
    """The worst regret of each way to clip, by workload, from small healthy norms to large ones."""
    figure, axis = panels(width=8.5, height=4.2)
    found = rows("worth_zclip")
    norms = {row["workload"]: float(row["median_norm"]) for row in found}
    names = sorted(norms, key=norms.__getitem__)
    arms = {"no clip": "grey", "1.0": "tab:red", "AutoClip": "tab:orange", "AGC": "tab:green", "ZClip()": "tab:blue"}
    for number, (arm, color) in enumerate(arms.items()):
        worst = [max(float(r["regret"]) for r in found if (r["workload"], r["arm"]) == (name, arm)) for name in names]
        places = [place + 0.15 * (number - 2) for place in range(len(names))]
        axis.bar(places, worst, width=0.15, color=color, label=arm)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(names)), [f"{name}\nnorm {norms[name]:.2g}" for name in names], fontsize=8)
    axis.set_yscale("symlog", linthresh=0.01)
    axis.set_ylabel("worst regret over clean and faulty runs")
    axis.set_title("What is not learned of what the best fixed clip learns, three seeds")
    axis.legend(ncols=5, fontsize=8)
    return figure


def time_to_loss() -> Any:
    """How much of a run is made and the held-out loss that it comes to, plain and stopped by GradES."""
    figure, axis = panels(height=3.6)
    found = rows("grades_settling")
    runs = list(dict.fromkeys((row["run"], row["seed"]) for row in found))
    markers = {"plain": "o", "GradES()": "D", "GradES, the default before": "x", "EarlyStopping": "s"}
    for number, (name, seed) in enumerate(runs):
        mine = [row for row in found if (row["run"], row["seed"]) == (name, seed)]
        points = sorted((int(row["steps"]) / int(row["planned_steps"]), float(row["loss"]), row["arm"]) for row in mine)
        color = f"C{number}"
        axis.plot([x for x, *_ in points], [y for _, y, _ in points], color=color, label=f"{name}, seed {seed}")
        for made, loss, arm in points:
            axis.plot(made, loss, markers[arm], color=color)
    for arm in dict.fromkeys(row["arm"] for row in found):
        axis.plot([], [], markers[arm], color="black", label=arm)
    axis.set(yscale="log", xlabel="part of the planned steps that is made", ylabel="held-out loss", title="Digits")
    axis.legend(fontsize=8)
    return figure


def memory() -> Any:
    """Bytes of weights, gradients and state against the loss after fine-tuning, with the range of the seeds."""
    figure, axis = panels(height=3.8)
    below = ("LISA",)  # where a label above would lie on another
    for row in rows("worth_misa_quality"):
        if row["arm"].startswith("uniform"):  # as MISA's in memory and loss
            continue
        low, middle, high = (float(row[name]) for name in ("lowest", "val_loss", "highest"))
        size, own = float(row["megabytes"]), row["arm"].startswith("MISA")
        axis.errorbar(size, middle, [[middle - low], [high - middle]], fmt="o", color="tab:blue" if own else "grey")
        axis.annotate(
            row["arm"],
            (size, middle),
            xytext=(6, -12 if row["arm"] in below else 4),
            textcoords="offset points",
            fontsize=8,
        )
    axis.set(xlabel="MB of weights, gradients and optimizer state", ylabel="validation loss, nats a byte", xlim=(5, 19))
    axis.set_title("1 M GPT, 140 steps of fine-tuning, three seeds")
    return figure


def time_to_accuracy() -> Any:
    """CPU time until the end of a run and the held-out accuracy there, of GradES and EarlyStopping over plain."""
    found = rows("worth_grades")
    runs = list(dict.fromkeys(row["run"] for row in found))
    figure, axes = panels(len(runs), width=3.4, height=3.2)
    arms = {"plain": "grey", "EarlyStopping": "tab:orange", "GradES, goes on": "tab:green", "GradES()": "tab:blue"}
    for axis, run in zip(axes, runs, strict=True):
        whole = {row["seed"]: float(row["seconds"]) for row in rows("worth_grades", run=run, arm="plain")}
        for arm, color in arms.items():
            mine = [row for row in found if (row["run"], row["arm"]) == (run, arm)]  # not all arms are made of each
            made = [float(row["seconds"]) / whole[row["seed"]] for row in mine]
            axis.plot(made, [100 * float(row["accuracy"]) for row in mine], "o", color=color, label=arm, alpha=0.8)
        axis.set(xlabel="CPU time over plain", title=run.removesuffix(", cosine"), xlim=(0, None))
    axes[0].set_ylabel("held-out accuracy at the end, %")
    axes[-1].legend(fontsize=8, loc="center left")
    return figure


def evaluation_noise() -> Any:
    """The held-out loss at every tenth step, of live weights and of their average, and how it scatters."""
    steady, falling = "worth_averaging", "worth_averaging_decay"
    kinds = {
        (f"{steady}_noise", f"{steady}_curves", "constant rate"): ("grey", "constant rate, live weights"),
        (f"{steady}_noise", f"{steady}_curves", "EMA, half-life 25"): ("tab:blue", "constant rate, EMA"),
        (falling, f"{falling}_curves", "cosine"): ("tab:orange", "cosine, live weights"),
    }
    tasks = list(dict.fromkeys(row["task"] for row in rows(falling)))
    figure, axes = panels(len(tasks), width=4.0, height=3.2)
    for axis, task in zip(axes, tasks, strict=True):
        spread = []
        for (noise, curves, kind), (color, label) in kinds.items():
            spread.append(float(rows(noise, task=task, weights=kind)[0]["checkpoint_sd"]))
            found = rows(curves, task=task, weights=kind)
            for seed in dict.fromkeys(row["seed"] for row in found):
                mine = [(int(row["step"]), float(row["val_loss"])) for row in found if row["seed"] == seed]
                axis.plot(*zip(*mine, strict=True), color=color, linewidth=1, label=label if seed == "0" else None)
        axis.set(title=f"{task}: scatter {', '.join(f'{each:.2g}' for each in spread)}", xlabel="step")
    axes[0].set_ylabel("held-out loss, three seeds")
    axes[0].legend(fontsize=8)
    return figure


PLOTS: dict[str, tuple[Callable[[], Any], str]] = {
    "step_time": (step_time, "compression_step_time.png"),
    "overhead": (overhead, "overhead.png"),
    "recovery": (recovery, "recovery.png"),
    "loss_through_kills": (loss_through_kills, "loss_through_kills.png"),
    "lock_in": (lock_in, "zclip_lock_in.png"),
    "throughput": (throughput, "mecefo_throughput.png"),
    "detectors": (detectors, "detectors.png"),
    "regret": (regret, "zclip_regret.png"),
    "time_to_loss": (time_to_loss, "grades_time_to_loss.png"),
    "time_to_accuracy": (time_to_accuracy, "grades_time_to_accuracy.png"),
    "memory": (memory, "misa_memory_quality.png"),
    "evaluation_noise": (evaluation_noise, "evaluation_noise.png"),
    **CARDS,
}


def main(argv: Sequence[str] | None = None, folder: Path = IMAGES) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("plots", nargs="*", metavar="plot", help=f"of {', '.join(PLOTS)} (default: all)")
    for name in parser.parse_args(argv).plots or PLOTS:
        if name not in PLOTS:
            parser.error(f"{name!r} is none of {', '.join(PLOTS)}")
        draw, file = PLOTS[name]
        print(save(draw(), folder / file))


if __name__ == "__main__":
    main()
