"""README's figures are those of the rows, and what it links to is there."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable

import pytest

from benchmarks.rows import RESULTS, read_rows
from harness import REPOSITORY
from lightning_eff import __version__

README = (REPOSITORY / "README.md").read_text()


def of(name: str, column: str, **where: str) -> list[float]:
    found = [row[column] for row in read_rows(name) if all(row[key] == value for key, value in where.items())]
    assert found, (name, where)
    return [float(value) for value in found]


def mean(name: str, column: str, **where: str) -> float:
    return statistics.fmean(of(name, column, **where))


def recovery(strategy: str, quantity: str) -> float:
    return mean("fault_tolerance_recovery", "median", strategy=strategy, quantity=quantity)


def dense(arm: str) -> float:
    return mean("compressed_allreduce_steps", "over_dense", ranks="2", link_mbit="50", size="5m", arm=arm)


def clip_ms(clip: str) -> float:
    return mean("zclip_cost", "clip_ms", optimizer="AdamW foreach", clip=clip)


ROLLBACK = {"failure": "bit flip", "guard": "rollback, loss rules alone"}
FIGURES: dict[str, Callable[[], tuple[float, ...]]] = {
    r"\| ([\d.]+) s, no step made again": lambda: (recovery("ddp_ft", "kill_to_commit"),),
    r"\| ([\d.]+) s and (\d+) steps made again": lambda: (
        recovery("ddp, restart", "kill_to_commit"),
        recovery("ddp, restart", "steps_lost"),
    ),
    r"\| (\d+) of 20 \(\[`ExactResume`\].*?\| (\d+) of 20": lambda: tuple(
        mean("exact_resume_kills", "equal_to_the_bit", run=run) for run in ("ExactResume", "Lightning")
    ),
    r"\| ([\d.]+) s \(\[`AsyncCheckpoint`\].*?\| ([\d.]+) s; ([\d.]+) s with": lambda: tuple(
        mean("async_checkpoint_stall_124m", "stall_ms", variant=variant) / 1000
        for variant in ("AsyncCheckpoint", "Lightning", "Lightning, AsyncCheckpointIO")
    ),
    r"\| ([\d.]+) \(PowerSGD\) and ([\d.]+) \(int8\)": lambda: (dense("powersgd 4"), dense("int8")),
    r"\| ([\d.]+), and ([\d.]+) where none flips": lambda: (
        mean("training_guard_rescue", "val_loss", **ROLLBACK),
        mean("training_guard_rescue", "val_loss", failure="none"),
    ),
    r"\| ([\d.]+) of the time of Lightning's clip": lambda: (clip_ms("zclip") / clip_ms("lightning norm"),),
    r"a snapshot takes (\d+) ms of a step of (\d+) ms": lambda: (
        mean("training_guard_cost", "snapshot_ms", guard="none"),
        round(mean("training_guard_cost", "step_ms", guard="none"), -1),
    ),
    r"loss ([\d.]+) against ([\d.]+) at a constant rate; a decay ([\d.]+)": lambda: tuple(
        mean("checkpoint_averaging_worth", "val_loss", curve=curve)
        for curve in ("LAWA, 8 snapshots", "constant rate", "real decay (1-sqrt, last 20 %)")
    ),
    r"\| ([\d.]+) of a step \| \[ema\]": lambda: (
        mean("checkpoint_averaging_cost", "over_none", callback="EMA, every step"),
    ),
    r"ten of 124 M in ([\d.]+) s": lambda: (
        mean("checkpoint_merge", "merge_s", checkpoints="10", model="124m", output="ckpt"),
    ),
    r"all frozen takes ([\d.]+) to ([\d.]+)": lambda: tuple(
        mean(f"grades_ceiling_{size}", "over_unfrozen", frozen="100 %") for size in ("50m", "10m")
    ),
    r"([\d.]+) of AdamW's memory at a budget of 3 %": lambda: (
        mean("misa_memory", "of_full", model="124M", arm="MISA, 3 %"),
    ),
    r"MoC keeps ([\d.]+) of a SwiGLU's bytes": lambda: (
        mean("layers_bytes", "over_dense", variant="moc", dtype="bfloat16"),
    ),
    r"(\d+) line in place of (\d+)": lambda: tuple(
        statistics.fmean(of("fsdp2_lines", column, to="train by FSDP2")) for column in ("lines", "lines_by_hand")
    ),
    r"\| ([\d.]+), ([\d.]+), ([\d.]+) of a step of `ddp`": lambda: (
        *(dense("arc_topk 0.2"), dense("powersgd 4"), dense("int8")),
    ),
    r"\| ([\d.]+) s to the next step": lambda: (recovery("ddp_ft", "kill_to_commit"),),
    r"two tasks takes ([\d.]+) of a healthy one, ([\d.]+) when exact": lambda: tuple(
        mean("mecefo_cost", "over_healthy", variant=variant)
        for variant in ("mecefo, two tasks, rank 1/4", "takeover, two tasks")
    ),
    r"\| ([\d.]+) ms of CPU time a batch": lambda: (
        mean("exact_resume_cost", "added_cpu_ms", model="one number", run="ExactResume", workers="0"),
    ),
    r"\| ([\d.]+) to ([\d.]+) s from the signal": lambda: tuple(
        choose(of("preemption_signal", "seconds_to_saved")) for choose in (min, max)
    ),
    r"of (\d+) runs killed while saving": lambda: (
        mean("async_checkpoint_faults", "trials", fault="kill -9 while saving"),
    ),
    r"\| (\d+) of (\d+) hangs named": lambda: (
        float(sum(row["right_rank"] == row["right_phase"] == "True" for row in read_rows("run_health_detect"))),
        float(len(read_rows("run_health_detect"))),
    ),
}


@pytest.mark.parametrize("pattern", FIGURES)
def test_a_figure_is_that_of_the_rows(pattern):
    said = re.search(pattern, README)
    assert said, "README says it in other words: change both"
    for text, value in zip(said.groups(), FIGURES[pattern](), strict=True):
        digits = len(text.partition(".")[2])
        assert abs(float(text) - value) <= 0.5001 * 10**-digits, (text, value)


def test_every_number_of_the_table_of_methods_is_checked():
    (table,) = re.findall(r"\| \| what \| one number \| card \|\n.*\n((?:\|.*\n)+)", README)
    for line in table.splitlines():
        number = line.split(" | ")[2]
        if number not in ("no host sync",) and "healthy steps" not in number:
            assert any(re.search(pattern, line) for pattern in FIGURES), line


def test_no_false_alarm_of_the_spectral_monitor():
    (steps,) = re.findall(r"no false alarm in ([\d,]+) healthy steps", README)
    where = {"detector": "spectral alignment", "setting": "defaults"}
    assert sum(of("spectral_alignment_false_alarms", "healthy_steps", **where)) == int(steps.replace(",", ""))
    assert sum(of("spectral_alignment_false_alarms", "false_alarms", **where)) == 0


def test_files_of_rows_are_there():
    names = re.findall(r"`(\w+\.csv)`", README)
    assert len(names) >= 5
    assert [name for name in names if not (RESULTS / name).exists()] == []


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", README)
    assert len(links) > 30
    assert [link for link in links if not link.startswith("http") and not (REPOSITORY / link).exists()] == []


def test_it_is_this_version():
    assert f"Version {__version__}" in README
    assert f"version = {{{__version__}}}" in README
