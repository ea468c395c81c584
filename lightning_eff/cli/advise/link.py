"""`lightning-eff advise link`: measure the link between the ranks, and say which way to reduce gradients pays on it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_eff.arguments import readable_size
from lightning_eff.cli import tables
from lightning_eff.cli.advise.modules import Shapes, add_model_arguments, model_shapes, parse
from lightning_eff.cli.parser import Parser, UsageError
from lightning_eff.compression import all_compressors
from lightning_eff.compression.forecast.advice import DENSE, Forecast, advise, forecasts
from lightning_eff.compression.forecast.link import Link, Sample, fit_link, measure_link
from lightning_eff.compression.forecast.rehearsal import Compute
from lightning_eff.compression.plan import bucket_cap_mb

_DESCRIPTION = """\
Measure the link between the ranks by all-reduces, rehearse every compressor on gradients of the model's shapes, and
predict bytes and time of a step. Started by torchrun it measures between torchrun's ranks, which is how to see a link
between machines; else between processes that it starts on this one. With --link nothing is measured: what if?
"""
_TIMEOUT = timedelta(minutes=5)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the advice; return 0, or 1 with the reason where a file or the link cannot be read."""
    parser = make_parser()
    args, rest = parse(parser, argv)
    if args.checkpoint is not None and (args.model is not None or args.config is not None):
        parser.error("--checkpoint excludes --model and --config")
    if "RANK" in os.environ and args.ranks is not None and args.link is None:
        parser.error("--ranks has no effect under torchrun, which has started the ranks")
    return parser.status(lambda: _run(args, rest))


def make_parser() -> Parser:
    """The arguments, but those of the model."""
    parser = Parser("lightning-eff advise link", description=_DESCRIPTION, allow_abbrev=False)
    model = add_model_arguments(parser, "the model (default: GPT-2 with 124 M parameters)")
    model.add_argument("--checkpoint", type=Path, metavar="FILE", help="Lightning's, a state dict, or safetensors")
    model.add_argument(
        "--compute",
        type=float,
        metavar="SECONDS",
        help="a training step on one rank alone; without it only the communication is predicted",
    )
    add_link_arguments(parser, "processes to start here, or to count with; default 2")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def add_link_arguments(parser: Parser, ranks: str) -> None:
    """How the link is measured, or what it would be."""
    link = parser.add_argument_group("the link")
    link.add_argument("--ranks", type=int, metavar="N", help=ranks)
    link.add_argument("--link", type=float, metavar="MBIT", help="do not measure: so many Mbit/s out of each rank")
    link.add_argument("--latency", type=float, metavar="MS", help="with --link: of a collective; default 0.5")
    link.add_argument("--backend", choices=["gloo", "nccl"], help="default: nccl where each rank has a GPU, else gloo")
    link.add_argument("--budget", type=float, default=20.0, metavar="SECONDS", help="of measuring; default 20")


def check_numbers(args: argparse.Namespace) -> None:
    """The numbers of the link and of the step, before anything is measured."""
    for name in ("compute", "link", "budget"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise UsageError(f"--{name}={value} is not allowed: it must be above 0")
    if args.latency is not None and args.link is None:
        raise UsageError("--latency has an effect only with --link")


def _run(args: argparse.Namespace, model_arguments: Sequence[str]) -> int:
    check_numbers(args)
    if args.ranks is not None and args.ranks < 2:
        raise UsageError(f"--ranks={args.ranks} is not allowed: a link has at least 2 ranks")
    # Before anything is measured: a model that cannot be read is the earlier error.
    name, shapes = model_shapes(args, model_arguments)
    measured = measure(args)
    if measured is None:
        return 0  # a rank that prints nothing
    found, advised = foretell(shapes, measured, args.compute)
    if args.json:
        report = {
            "link": asdict(measured.link),
            "samples": [asdict(sample) for sample in measured.samples],
            "parameters": sum(map(prod, shapes.values())),
            "forecasts": [asdict(each) for each in found],
            "advice": advised.strategy,
        }
        print(json.dumps(report, indent=2))
    else:
        _show(name, shapes, measured, args.compute, found, advised)
    return 0


def foretell(shapes: Shapes, measured: Measured, compute: float | None) -> tuple[list[Forecast], Forecast]:
    """Each way to reduce gradients, rehearsed here, and the one that is advised."""
    seconds = Compute() if compute is None else Compute.of_step(compute)
    _say("compressing random gradients of the model's shapes with each compressor ...")
    found = []
    for forecast in forecasts(all_compressors(), shapes, measured.link, seconds, bucket_cap_mb, measured.device):
        _say(f"  {forecast.strategy}")
        found.append(forecast)
    return found, advise(found)


def _say(text: str) -> None:
    """Progress, at once and beside the report, of rank zero alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


# --- the link ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """The link, and how it is known."""

    link: Link
    samples: list[Sample]
    how: str
    device: str


def measure(args: argparse.Namespace) -> Measured | None:
    """The link; None on the ranks that have nothing to say."""
    if args.link is not None:
        link = Link(args.ranks or 2, args.link * 1e6 / 8, 1e-3 * (0.5 if args.latency is None else args.latency))
        return Measured(link, [], "as given, not measured", "cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" in os.environ:
        world_size, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0"))
        if world_size < 2:
            raise ValueError("torchrun has started one rank, and a link has at least 2: --nproc-per-node or --nnodes")
        backend, device = _backend(args.backend, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), local)
        _say(f"measuring the link between torchrun's {world_size} ranks, for about {args.budget:g} s ...")
        with _stdout_kept():
            dist.init_process_group(backend, timeout=_TIMEOUT)
            try:
                samples = measure_link(device=device, budget=args.budget)
                rank = dist.get_rank()
            finally:
                dist.destroy_process_group()
        how = f"measured between torchrun's ranks, {backend}"
        return Measured(fit_link(samples, world_size), samples, how, device) if rank == 0 else None
    ranks = args.ranks or 2
    _say(f"measuring the link between {ranks} processes of this machine, for about {args.budget:g} s ...")
    backend, device = _backend(args.backend, ranks, 0)
    with tempfile.TemporaryDirectory(prefix="lightning-eff-advise-") as folder:
        torch.multiprocessing.spawn(_measure_here, (ranks, args.backend, args.budget, folder), ranks)  # type: ignore
        samples = [Sample(**sample) for sample in json.loads((Path(folder) / "samples").read_text())]
    how = f"measured between {ranks} processes of this machine, {backend}"
    return Measured(fit_link(samples, ranks), samples, how, device)


def _measure_here(rank: int, ranks: int, backend: str | None, budget: float, folder: str) -> None:
    """One of the processes that are started here; the first one writes down what all of them have measured."""
    torch.set_num_threads(1)
    chosen, device = _backend(backend, ranks, rank)
    store = dist.FileStore(f"{folder}/store", ranks)  # type: ignore[attr-defined]
    with _stdout_kept():
        dist.init_process_group(chosen, store=store, rank=rank, world_size=ranks, timeout=_TIMEOUT)
        samples = measure_link(device=device, budget=budget)
        if rank == 0:
            (Path(folder) / "samples").write_text(json.dumps([asdict(sample) for sample in samples]))
        dist.barrier()
        dist.destroy_process_group()


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """Nothing but the report is on stdout: gloo says there, in C++, which ranks it reaches, in torch 2.8."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _backend(wish: str | None, ranks: int, local: int) -> tuple[str, str]:
    """Backend and device of a rank."""
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= ranks
    backend = wish or ("nccl" if enough and dist.is_nccl_available() else "gloo")
    if backend == "gloo":
        return backend, "cpu"
    if not enough:
        raise ValueError(f"--backend=nccl needs a GPU for each rank: {torch.cuda.device_count()} for {ranks} here")
    torch.cuda.set_device(local)
    return backend, f"cuda:{local}"


# --- the report -------------------------------------------------------------------------------------------------------


def _show(
    name: str, shapes: Shapes, measured: Measured, compute: float | None, found: list[Forecast], advised: Forecast
) -> None:
    link = measured.link
    speed = f"{link.bandwidth * 8e-6:.4g} Mbit/s out of each rank, {1e3 * link.latency:.3g} ms a collective"
    print(f"Link: {link.world_size} ranks, {speed} ({measured.how})")
    matrices = sum(len(shape) >= 2 for shape in shapes.values())
    parameters = sum(map(prod, shapes.values()))
    print(f"Model: {parameters / 1e6:.4g} M parameters, {matrices} matrices, {len(shapes) - matrices} vectors ({name})")
    share = 2 * (link.world_size - 1) / link.world_size
    tables.table(
        "All-reduce, as measured",
        ["payload", "ms", "Mbit/s out of a rank"],
        [
            [readable_size(s.payload), f"{1e3 * s.seconds:.3g}", f"{share * s.payload * 8e-6 / s.seconds:.3g}"]
            for s in measured.samples
        ],
    )
    dense = next(each for each in found if each.strategy == DENSE)
    what = "step" if compute else "communication"
    tables.table(
        f"A step{f' with {compute:g} s of computation' if compute else ''}, predicted",
        ["strategy", "bytes out of a rank", "link, s", "own work, s", f"{what}, s", f"of {DENSE}'s"],
        [
            [
                each.strategy,
                readable_size(each.bytes_sent),
                f"{each.wire:.3g}",
                f"{each.own:.3g}",
                f"{each.step:.3g}",
                f"{each.step / dense.step:.2f}",
            ]
            for each in found
        ],
    )
    print()
    for line in conclusion(measured, compute, dense, found, advised):
        print(line)


def conclusion(
    measured: Measured, compute: float | None, dense: Forecast, found: list[Forecast], advised: Forecast
) -> list[str]:
    """The advice in sentences."""
    lines = []
    if advised is dense:
        others = [each for each in found if each is not dense]
        best = min(others, key=lambda each: each.step)
        gain = 1 - best.step / dense.step
        why = (
            f"{best.strategy} would save {gain:.0%}, too little for what it changes"
            if gain > 0
            else "nothing is faster"
        )
        lines.append(f'Advice: stay with strategy="{DENSE}": {why}.')
    else:
        saved = f"{dense.step:.3g} s become {advised.step:.3g} s"
        lines.append(f'Advice: strategy="{advised.strategy}": {saved}.')
        if advised.strategy not in ("ddp_bf16", "ddp_fp16"):
            lines.append(
                "It changes the gradients: compare the losses of a short run with those of plain DDP first "
                "(docs/methods/compressed_allreduce.md)."
            )
    if compute is None:
        lines.append(
            "Without --compute this is about the communication alone, none of it hidden behind the backward pass: of a"
            " step the gain is a smaller part."
        )
    if "of this machine" in measured.how:
        lines.append("For the link between machines start it there: torchrun --nnodes=... -m lightning_eff advise link")
    return lines
