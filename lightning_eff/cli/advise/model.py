"""`lightning-eff advise model`: what training a module takes on this machine, and which of the suite's choices pay."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from textwrap import fill
from typing import Any, Literal, get_args

import torch

from lightning_eff.arguments import readable_size as _size
from lightning_eff.cli.advise.link import add_link_arguments, check_numbers, conclusion, foretell, measure
from lightning_eff.cli.advise.memory import Counts, Sharded, count
from lightning_eff.cli.advise.modules import add_model_arguments, build, parse, trained_shapes
from lightning_eff.cli.parser import Parser, UsageError
from lightning_eff.compression.forecast.advice import DENSE
from lightning_eff.training.snapshots import free_host_memory

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"]

_DESCRIPTION = """\
Count the bytes that training a module takes, without taking them (on the meta device), and say which of the suite's
choices pay on this machine. Activations are not counted: they depend on the batch. Under torchrun, or with --link, it
also says which way to reduce gradients pays on the link between the ranks.
"""
RANKS = (2, 4, 8)
WINDOW, SNAPSHOTS, SAVES = 6, 3, 2
"""By default: snapshots of `CheckpointAveraging` and of `TrainingGuard`, buffers of `AsyncCheckpoint`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the advice; return 0, or 1 with the reason where a file or the link cannot be read."""
    parser = make_parser()
    args, rest = parse(parser, argv)
    if args.model is None and args.config is None:
        parser.error("which model? --model=my_module.MyModel, or --config=run.yaml")
    return parser.status(lambda: _run(args, rest))


def make_parser() -> Parser:
    """The arguments, but those of the model."""
    parser = Parser("lightning-eff advise model", description=_DESCRIPTION, allow_abbrev=False)
    model = add_model_arguments(parser, "the model")
    model.add_argument("--precision", choices=get_args(Precision), default="32-true", help="the Trainer's")
    model.add_argument("--memory", type=float, metavar="GB", help="of a rank, in place of what is free here")
    model.add_argument("--compute", type=float, metavar="SECONDS", help="a training step on one rank alone")
    add_link_arguments(parser, "of the run; default: torchrun's, else 2, 4 and 8 side by side")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of sentences")
    return parser


def _run(args: argparse.Namespace, model_arguments: Sequence[str]) -> int:
    check_numbers(args)
    if args.ranks is not None and args.ranks < 1:
        raise UsageError(f"--ranks={args.ranks} is not allowed: it must be at least 1")
    if args.link is not None and args.ranks == 1:
        raise UsageError("--ranks=1 is not allowed: a link has at least 2 ranks")
    if args.memory is not None and not args.memory > 0:
        raise UsageError(f"--memory={args.memory} is not allowed: it must be above 0")
    torchrun = "RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1
    if torchrun and args.ranks is not None and args.link is None:
        raise UsageError("--ranks has no effect under torchrun, which has started the ranks")
    module = build(args.model, model_arguments, args.config)
    shapes = trained_shapes(module)
    ranks = int(os.environ["WORLD_SIZE"]) if torchrun and args.ranks is None else args.ranks
    some = RANKS if ranks is None else (ranks,) if ranks > 1 else ()
    counts = count(module, args.precision, some, torch.cuda.is_available(), WINDOW)  # type: ignore[arg-type]
    link: list[str] = []
    if torchrun or args.link is not None:
        measured = measure(args)
        if measured is None:
            return 0  # a rank that prints nothing
        found, advised = foretell(shapes, measured, args.compute)
        dense = next(each for each in found if each.strategy == DENSE)
        speed = f"{measured.link.bandwidth * 8e-6:.4g} Mbit/s out of each of {measured.link.world_size} ranks"
        link = [f"{speed} ({measured.how}).", *conclusion(measured, args.compute, dense, found, advised)]
    free, where = _memory(args.memory)
    if args.json:
        print(json.dumps({"model": type(module).__name__, "free": free, **_plain(counts), "link": link}, indent=2))
        return 0
    for title, lines in _page(type(module).__name__, counts, args.precision, free, where, link):
        print(f"{title}\n")
        for line in lines:
            print(fill(line, 100, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False))
        print()
    return 0


def _memory(given: float | None) -> tuple[int | None, str]:
    """Bytes for one rank, and whose they are."""
    if given is not None:
        return int(given * 1e9), "as given"
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], f"free on {torch.cuda.get_device_name()}"
    return free_host_memory(), "free host memory, since there is no GPU here"


def _plain(counts: Counts) -> dict[str, Any]:
    found = asdict(counts)
    found["dense"]["total"] = counts.dense.total
    for each, sharded in zip(found["sharded"], counts.sharded, strict=True):
        each["total"] = sharded.total
    return found


# --- the page ---------------------------------------------------------------------------------------------------------


def _page(
    name: str, counts: Counts, precision: str, free: int | None, where: str, link: list[str]
) -> Iterator[tuple[str, list[str]]]:
    yield f"{name}, precision {precision}, without activations", _takes(counts, free, where)
    yield "What saves memory", list(_saves(counts, free))
    yield "What takes more", list(_costs(counts))
    yield "The link", link or [_UNMEASURED]


_UNMEASURED = (
    "Not measured: there is one rank. Between machines: torchrun --nnodes=... -m lightning_eff advise model ...; for a "
    "link that is not there: --ranks=2 --link=MBIT."
)


def _takes(counts: Counts, free: int | None, where: str) -> list[str]:
    dense = counts.dense
    trained = "all" if counts.trained == counts.parameters else f"{counts.trained:,}"
    lines = [
        f"{counts.parameters:,} parameters in {counts.tensors} tensors, {trained} of them trained; {counts.blocks} "
        "repeated blocks.",
        f"Weights {_size(dense.weights)}, buffers {_size(dense.buffers)}, gradients {_size(dense.gradients)}, states "
        f"of {dense.optimizers} {_size(dense.states)}: {_size(dense.total)} together. DDP has buckets of the "
        "gradients' size besides, unless gradient_as_bucket_view=True.",
    ]
    if free is None:
        return [*lines, "How much memory is free here is not known: say it with --memory=GB."]
    share = dense.total / free
    if share > 1:
        verdict = "it does not fit without one of the next"
    elif share > 0.5:
        verdict = "little is left for activations: the next pay where these do not fit"
    else:
        verdict = "memory is no reason for one of the next, if activations fit into the rest"
    return [*lines, f"That is {share:.2g} of {_size(free)} ({where}): {verdict}."]


def _saves(counts: Counts, free: int | None) -> Iterator[str]:
    total = counts.dense.total
    for sharded in counts.sharded:
        yield (
            f'strategy="fsdp2" on {sharded.ranks} ranks: a rank holds {_size(sharded.total)} of weights, gradients and '
            f"states, {sharded.total / total:.2g} of the above, and while it computes at most "
            f"{_size(sharded.gathered)} of gathered weights.{_fits(sharded, free)}"
        )
    if (misa := counts.misa) is not None:
        held = misa.gradients + misa.states
        before = counts.dense.gradients + counts.dense.states
        yield (
            f"MISA(): gradients and states of at most {_size(held)} in place of {_size(before)}, since "
            f"{misa.budget:.2g} of the parameters are trained at a time, of {misa.matrices} matrices. "
            "For fine-tuning; LoRA takes about as little."
        )
    else:
        yield f"MISA() is not possible: {_short(counts.why['misa'])}."
    if (moc := counts.moc) is not None:
        yield (
            f"ModelSurgery(feed_forward=MoC()): {moc.networks} feed-forward networks keep {_size(moc.moc)} of a token "
            f"for the backward pass, {_size(moc.moc_recomputed)} with recompute=True, in place of {_size(moc.dense)}. "
            "It changes the model; recomputing the networks by torch.utils.checkpoint keeps none of this, for time."
        )
    else:
        yield f"ModelSurgery(feed_forward=MoC()) is not possible: {_short(counts.why['moc'])}."


def _fits(sharded: Sharded, free: int | None) -> str:
    if free is None or sharded.total + sharded.gathered <= free:
        return ""
    return " That does not fit either."


def _costs(counts: Counts) -> Iterator[str]:
    dense = counts.dense
    state = dense.weights + dense.buffers + dense.states
    yield f"EMA(): {_size(counts.ema)} beside the weights for each width, float32; storage='cpu' keeps it on the host."
    yield (
        f"CheckpointAveraging(): {_size(counts.window)} of host memory on each rank, {WINDOW} snapshots, and one more "
        "while it evaluates or saves."
    )
    yield f"TrainingGuard(): {_size(SNAPSHOTS * state)} of host memory on each rank; action='stop' takes nothing."
    yield f"AsyncCheckpoint(): {_size(SAVES * state)} of host memory, on rank zero, for {SAVES} checkpoints."
    if counts.grades is not None:
        yield (
            "GradES(): a few numbers for each matrix; with metric='grad_change' a copy of the gradients it watches,"
            f" {_size(counts.grades)} on the device."
        )
    else:
        yield f"GradES() is not possible: {_short(counts.why['grades'])}."


def _short(why: str) -> str:
    """A reason without the name of whom it is said by, and of many layers the first alone."""
    why = why.removeprefix("MISA: ").removeprefix("feed_forward: ").rstrip(".")
    first, more, _ = why.partition("), ")
    return f"{first}) and others" if more else why
