"""Pictures for the cards of rows that were tables only; `python -m benchmarks.plots` draws them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.rows import read_rows
from harness.plots import by_step, mean_and_range, panels

OURS, OTHERS = "tab:blue", "grey"


def rows(name: str, **where: str) -> list[dict[str, str]]:
    """The rows of a results file that have these values."""
    found = [row for row in read_rows(name) if all(row[key] == value for key, value in where.items())]
    if not found:
        raise ValueError(f"{name}.csv has no row with {where}")
    return found


def bars(axis: Any, values: dict[str, float], text: str, ours: Sequence[str], **settings: Any) -> None:
    """Bars that lie, the first above, each with its value beside it; ours are blue."""
    for place, (name, value) in enumerate(reversed(values.items())):
        axis.barh(place, value, color=OURS if name in ours else OTHERS)
        axis.annotate(text.format(value), (value, place), (4, 0), textcoords="offset points", va="center")
    axis.set_yticks(range(len(values)), list(values)[::-1])
    axis.margins(x=0.18)
    axis.set(**settings)


def saves() -> Any:
    """How long a save holds up training."""
    figure, axis = panels(height=1.9)
    stalls = {row["variant"]: float(row["stall_ms"]) / 1000 for row in rows("async_checkpoint_stall_124m")}
    bars(
        axis,
        stalls,
        "{:.2f} s",
        ["AsyncCheckpoint"],
        xscale="log",
        title="A save of 1.45 GB, two CPU cores",
    )
    axis.set(xlabel="seconds that training stands still, median behind the first", xlim=(0.02, 15))
    return figure


def sharded_saves() -> Any:
    """The same for shards, beside a bare copy of the bytes."""
    figure, axis = panels(height=2.1)
    found = rows("fsdp2_saves")
    stalls = {row["run"]: float(row["median_s"]) for row in found}
    stalls["a bare copy of the bytes"] = max(float(row["bare_copy_s"]) for row in found)
    ours = [name for name in stalls if "fsdp2" in name or "AsyncCheckpoint" in name]
    bars(
        axis,
        stalls,
        "{:.3f} s",
        ours,
        xscale="log",
        xlim=(0.01, 3),
        title="A save of 515 MB, two ranks on two CPU cores",
    )
    axis.set(xlabel="seconds that training stands still, median")
    return figure


def resume() -> Any:
    """Going on at batch 100,000: what it takes, and whether the samples are the right ones."""
    figure, axis = panels(height=2.4)
    names = {
        "ExactResume": "ExactResume",
        "StatefulDataLoader, snapshot every 1": "torchdata's StatefulDataLoader",
        "loaded again and dropped": "load and drop what was seen",
        "Lightning: the epoch anew": "Lightning: the epoch anew, wrong samples",
    }
    seconds = {label: float(rows("exact_resume_seek", run=run)[0]["cpu_seconds"]) for run, label in names.items()}
    bars(axis, seconds, "{:.2f} s", ["ExactResume"], xscale="log", xlim=(0.03, 15), title="Resuming at batch 100,000")
    axis.set(xlabel="seconds of CPU time until the next batch")
    return figure


def left_out() -> Any:
    """What CompressionMonitor logs as relative error, and what the loss then was."""
    figure, axis = panels(height=3.6)
    for row in rows("compression_quality"):
        error, worse = (
            float(row["relative_error"]),
            float(row["val_loss"]) - float(rows("compression_quality", variant="dense")[0]["val_loss"]),
        )
        if row["variant"].endswith(", none") or row["variant"] in ("bf16", "int8"):
            axis.plot(error, worse, "o", color=OURS)
            axis.annotate(
                row["variant"].removesuffix(", none"), (error, worse), (5, 3), textcoords="offset points", fontsize=8
            )
    axis.set(xscale="log", xlabel="comm/relative_error, without error feedback", ylabel="validation loss above dense")
    axis.set(title="0.27 M GPT, 200 steps, mean of three seeds", xlim=(0.001, 12), ylim=(-0.03, 0.42))
    return figure


def frozen() -> Any:
    """What a step takes with a part of the matrices frozen, and what the count of operations allows."""
    figure, axis = panels(height=3.4)
    for name, label, color in (
        ("grades_ceiling_10m", "10 M", "tab:blue"),
        ("grades_ceiling_50m", "50 M", "tab:orange"),
    ):
        shares = [int(row["frozen"].split()[0]) for row in rows(name)]
        low, middle, high = ([float(row[f"over_unfrozen{end}"]) for row in rows(name)] for end in ("_q1", "", "_q3"))
        axis.plot(shares, middle, "o-", color=color, label=f"{label} GPT, median and quartiles")
        axis.fill_between(shares, low, high, color=color, alpha=0.12, linewidth=0)
        axis.plot(shares, [float(row["flop_limit"]) for row in rows(name)], ":", color=color, label="by operations")
    axis.set(xlabel="% of the matrices frozen", ylabel="step time over none frozen", ylim=(0.5, 1.3))
    axis.legend(fontsize=8)
    return figure


def one_pass() -> Any:
    """Bytes that the gradients' statistics move."""
    figure, axis = panels(height=1.6)
    moved = {
        {"ours": "kernel tensor_stats", "torch foreach": "torch._foreach"}[row["provider"]]: int(row["bytes"]) / 1e9
        for row in rows("kernels_bytes", op="tensor_stats", size="124m", dtype="fp32")
    }
    bars(axis, moved, "{:.2f} GB", ["kernel tensor_stats"], xlabel="GB moved for norm, extreme, zeros and non-finite")
    axis.set(title="Gradients of 124 M parameters in float32, by count")
    return figure


def ema_curve() -> Any:
    """The EMA along a run at a constant rate, and what a decayed rate comes to."""
    figure, axis = panels(height=3.4)
    found = rows("checkpoint_averaging_worth_curves")
    for curve in dict.fromkeys(row["curve"] for row in found if row["curve"].startswith(("constant", "EMA"))):
        losses = by_step((row["step"], row["val_loss"]) for row in found if row["curve"] == curve)
        mean_and_range(axis, {step: each for step, each in losses.items() if step >= 200}, label=curve)
    ends = [float(row["val_loss"]) for row in found if row["curve"].startswith("real decay") and row["step"] == "800"]
    axis.plot(800, statistics.fmean(ends), "D", color="black", label="a rate that decays")
    axis.set(xlabel="step", ylabel="validation loss", title="1 M GPT, mean and range of three seeds")
    axis.legend()
    return figure


def signals() -> Any:
    """From a signal to one rank until the state of all is saved, by what that rank was doing."""
    figure, axis = panels(height=3.4)
    found = rows("preemption_signal")
    phases = list(dict.fromkeys(row["phase"] for row in found))
    for ranks, marker in (("2", "o"), ("3", "s")):
        mine = [row for row in found if row["ranks"] == ranks]
        seconds, places = [float(row["seconds_to_saved"]) for row in mine], [phases.index(row["phase"]) for row in mine]
        axis.plot(seconds, places, marker, label=f"{ranks} ranks")
    axis.set_yticks(range(len(phases)), phases)
    axis.invert_yaxis()
    axis.set(xlim=(0, None), xlabel="seconds from SIGTERM to the saved state", title="What the rank was doing, CPU")
    axis.legend()
    return figure


def hangs() -> Any:
    """How long behind the limit a hang is named, and in how many steps a slow rank is."""
    figure, axes = panels(2, width=4.5, height=2.8)
    found = rows("run_health_detect")
    faults = {"stop": "SIGSTOP", "loop": "endless loop", "worker": "data worker", "left_out": "a collective left out"}
    for fault, place in zip(faults, range(len(faults)), strict=True):
        behind = [float(row["beyond_limit_s"]) for row in found if row["fault"] == fault]
        axes[0].plot(behind, [place] * len(behind), "o", color=OURS)
    axes[0].set_yticks(range(len(faults)), faults.values())
    axes[0].set(
        xlim=(0, 0.5), xlabel="seconds behind the limit of 3 s", title=f"{len(found)} hangs, rank and phase right"
    )
    slow = rows("run_health_slow")
    named = [row for row in slow if row["named_after_steps"]]
    axes[1].plot(
        [float(row["load"]) for row in named], [int(row["named_after_steps"]) for row in named], "o", color=OURS
    )
    axes[1].set(xlabel="load of the machine", ylabel="steps until it is named", ylim=(0, None))
    axes[1].set(title=f"A rank throttled by a fifth: {len(named)} of {len(slow)}")
    return figure


def kept_bytes() -> Any:
    """What a feed-forward network keeps for its backward pass, and what its step takes."""
    figure, axis = panels(height=2.6)
    (width,) = {row["d_model"] for row in rows("layers_bytes")}  # steps have been measured at another one, too
    steps = {row["variant"]: float(row["over_dense"]) for row in rows("layers_steps", d_model=width)}
    kept = {
        f"{row['variant']}: step {steps[row['variant']]:.2f}": float(row["over_dense"])
        for row in rows("layers_bytes", dtype="bfloat16")
    }
    bars(
        axis,
        kept,
        "{:.2f}",
        [name for name in kept if name.startswith("moc")],
        xlabel="bytes kept over dense, bfloat16",
    )
    axis.set(title="A SwiGLU of 512 by 1376; step: its time over dense, CPU")
    return figure


def cache() -> Any:
    """Bytes of a KV cache."""
    figure, axis = panels(height=2.0)
    names = {"mha": "attention", "skipv1": "SkipV1", "gqa": "grouped queries", "skipv1, gqa": "SkipV1, grouped queries"}
    sizes = {names[row["variant"]]: int(row["cache_bytes"]) / 1e6 for row in rows("layers_cache_bytes")}
    bars(
        axis, {name: sizes[name] for name in names.values()}, "{:.1f} MB", [name for name in sizes if "SkipV1" in name]
    )
    axis.set(xlabel="MB for 1,024 positions", title="KV cache, 24 layers of 512 channels, float32")
    return figure


def _quality(ours: Sequence[str], others: Sequence[str], title: str) -> Any:
    """Losses of small GPTs, a point for each seed."""
    figure, axes = panels(2, width=5.5, height=0.9 + 0.3 * len([*ours, *others]))
    for axis, size in zip(axes, ("1m", "4m"), strict=True):
        labels = []
        for place, arm in enumerate([*others[::-1], *ours[::-1]]):
            found = rows("layers_quality", size=size, arm=arm)
            losses = [float(row["val_loss"]) for row in found]
            axis.plot(losses, [place] * len(losses), "o", color=OURS if arm in ours else OTHERS)
            labels.append(f"{arm} ({int(found[0]['parameters']) / 1e6:.2f} M)")
        axis.set_yticks(range(len(labels)), labels)
        axis.set_ylim(-0.6, len(labels) - 0.4)
        axis.set(xlabel=f"loss after {int(found[0]['tokens']) / 1e6:.2f} M tokens, a point for each seed")
        axis.set(title=title.format(size[0]))
    return figure


def replaced_layers() -> Any:
    """Small GPTs with other layers: parameters and loss."""
    ours = ["moc, K = d/2", "moc 2:8", "skipv1", "skipv1, gqa", "cr-net, r = h/4"]
    return _quality(ours, ["dense", "gqa", "smaller dense"], "A {} M GPT with its layers replaced")


def low_rank() -> Any:
    """CR-Net beside dense networks of more and of as many parameters."""
    return _quality(["cr-net, r = h/4"], ["dense", "smaller dense"], "CR-Net beside dense networks, {} M")


def step_of_ddp_ft() -> Any:
    """A step of `ddp_ft`, nothing measured: what happens in it, and where it goes when somebody dies."""
    figure, axis = panels(width=9.5, height=2.9)
    axis.axis("off")
    axis.set(xlim=(0, 6.15), ylim=(-1.15, 1.2))
    parts = [
        ("quorum", "who is there;\nwho lags behind\nheals"),
        ("forward, backward", "the orphans'\nmicro-batches\nfirst"),
        ("all-reduce", "DDP's buckets, in\na hook that\nnever raises"),
        ("vote", "does everybody\nhave all of it?"),
        ("hooks, clip, update", "committed steps\nonly"),
        ("settle", "all have the step;\nnobody is more\nthan one ahead"),
    ]
    box = {"boxstyle": "round,pad=0.3", "facecolor": "#dbe7f3", "edgecolor": OURS}
    for place, (name, what) in enumerate(parts):
        axis.text(place + 0.55, 0.55, name, ha="center", va="center", bbox=box, fontsize=8.5)
        axis.text(place + 0.55, 0.22, what, ha="center", va="top", fontsize=8)
        if place:
            axis.annotate("", (place + 0.13, 0.55), (place - 0.03, 0.55), arrowprops={"arrowstyle": "->"})
    for start, end, height, words in (
        (
            3.55,
            0.55,
            -0.95,
            "somebody died: the same step again, without them",
        ),
        (5.55, 0.55, 1.15, "the next step"),
    ):
        side = -0.35 if height < 0 else 0.75
        axis.plot([start, start, end, end], [side, height, height, side], color=OTHERS, linewidth=1)
        axis.annotate("", (end, side), (end, height), arrowprops={"arrowstyle": "->", "color": OTHERS})
        axis.text((start + end) / 2, height + 0.04, words, ha="center", va="bottom", fontsize=8.5)
    return figure


CARDS: dict[str, tuple[Callable[[], Any], str]] = {
    "saves": (saves, "async_checkpoint.png"),
    "sharded_saves": (sharded_saves, "fsdp2_saves.png"),
    "resume": (resume, "exact_resume.png"),
    "left_out": (left_out, "compression_error.png"),
    "frozen": (frozen, "grades_ceiling.png"),
    "one_pass": (one_pass, "gradient_stats.png"),
    "ema_curve": (ema_curve, "ema.png"),
    "signals": (signals, "preemption.png"),
    "hangs": (hangs, "run_health.png"),
    "kept_bytes": (kept_bytes, "moc.png"),
    "cache": (cache, "skipv1.png"),
    "replaced_layers": (replaced_layers, "model_surgery.png"),
    "low_rank": (low_rank, "cr_net.png"),
    "step_of_ddp_ft": (step_of_ddp_ft, "ddp_ft_step.png"),
}
