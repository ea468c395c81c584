"""`lightning-eff merge`: average checkpoints after the run, by any scheme, or search for the coefficients."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch

from lightning_eff.cli import need_jsonargparse, tables
from lightning_eff.cli.parser import Parser
from lightning_eff.functional.averaging import CURVES, Scheme, scheme_weights
from lightning_eff.functional.coefficient_search import evolve, greedy_soup
from lightning_eff.functional.ema import posthoc_error, posthoc_weights
from lightning_eff.merging import Merger, Source, open_source, write_merged
from lightning_eff.merging.merge import check_output

_DESCRIPTION = """\
Average checkpoints into one: Lightning's .ckpt, plain state dicts, .safetensors, and folders of
torch.distributed.checkpoint. Tensors are read one by one and summed in float64, so that the memory is about one model
whatever the number of files. They are taken in the order of their steps where all know theirs, else as given. Integers
are copied from the last checkpoint. The output appears only once it is complete.
"""
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Which options belong to which choice: one that would have no effect is an error, and no silence.
_OF_SCHEME = {
    "alpha": ("exponential",),
    "decay": ("wsm",),
    "penalty": ("loss", "step"),
    "losses": ("loss",),
    "sigma_rel": ("posthoc",),
    "stored_sigma_rels": ("posthoc",),
}
_OF_SEARCH = ("metric", "mode", "config", "model", "data", "evaluations", "seed", "limit_val_batches")


def main(argv: Sequence[str] | None = None) -> int:
    """Merge; return 0 where the output is written, and 1, with the reason, where it is not."""
    parser = make_parser()
    args = parser.parse_args(argv)
    _check_combination(parser, args)
    try:
        _run(args)
    except (ValueError, OSError) as error:
        print(f"lightning-eff merge: {error}", file=sys.stderr)
        return 1
    return 0


def make_parser() -> Parser:
    """The arguments."""
    parser = Parser("lightning-eff merge", description=_DESCRIPTION)
    parser.add_argument("files", nargs="+", metavar="CHECKPOINT", help="files or folders, at least one")
    parser.add_argument("-o", "--output", required=True, type=Path, help="a .ckpt or a .safetensors file")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--order", choices=["step", "given"], default="step", help="default: by step where known")
    parser.add_argument("--dtype", choices=list(_DTYPES), help="of the averaged tensors; default: theirs")
    parser.add_argument(
        "--copy", action="append", default=[], metavar="PATTERN", help="copy these from the last; can be repeated"
    )
    scheme = parser.add_argument_group("coefficients by a scheme")
    scheme.add_argument("--scheme", choices=[*get_args(Scheme), "posthoc"], help="default: uniform")
    scheme.add_argument("--weights", nargs="+", type=float, metavar="W", help="or these, in the order given; sum 1")
    scheme.add_argument("--alpha", type=float, help="exponential: weight of a new checkpoint; default 0.2")
    scheme.add_argument("--decay", choices=list(CURVES), help="wsm: the curve; default 1-sqrt")
    scheme.add_argument("--penalty", type=float, help="loss: loss^-penalty, step: step^penalty; default 1")
    scheme.add_argument("--losses", nargs="+", type=float, metavar="L", help="loss: one each, in the order given")
    scheme.add_argument("--sigma-rel", type=float, help="posthoc: the width to make of power-function averages")
    scheme.add_argument(
        "--stored-sigma-rels",
        nargs="+",
        type=float,
        metavar="S",
        help="posthoc: widths of the files, if they do not say",
    )
    search = parser.add_argument_group("coefficients by search on a validation set")
    search.add_argument("--search", choices=["greedy", "evolution"], help="greedy soup, or any that sum to 1")
    search.add_argument("--metric", help="what the validation logs, e.g. val_loss")
    search.add_argument("--mode", choices=["min", "max"], help="which values are better; default min")
    search.add_argument("--config", help="LightningCLI's YAML with model, data and trainer, e.g. a run's config.yaml")
    search.add_argument("--model", metavar="CLASS", help="class of the model, if the config has its arguments only")
    search.add_argument("--data", metavar="CLASS", help="class of the data, likewise")
    search.add_argument("--evaluations", type=int, help="evolution: validations in all; default 100")
    search.add_argument("--seed", type=int, help="evolution: default 0")
    search.add_argument("--limit-val-batches", type=int, help="validate on so many batches only")
    return parser


def _check_combination(parser: Parser, args: argparse.Namespace) -> None:
    given = {name for name, value in vars(args).items() if value is not None}
    if len(given & {"scheme", "weights", "search"}) > 1:
        parser.error("--scheme, --weights and --search exclude each other")
    scheme = None if given & {"weights", "search"} else args.scheme or "uniform"
    for name, schemes in _OF_SCHEME.items():
        if name in given and scheme not in schemes:
            parser.error(f"--{name.replace('_', '-')} has an effect only with --scheme {' or '.join(schemes)}")
    for name in _OF_SEARCH:
        if name in given and args.search is None:
            parser.error(f"--{name.replace('_', '-')} has an effect only with --search")
    if args.search == "greedy" and given & {"evaluations", "seed"}:
        parser.error("--evaluations and --seed have an effect only with --search evolution")
    if args.search and not {"metric", "config"} <= given:
        parser.error("--search needs --metric and --config")
    if scheme == "posthoc" and args.sigma_rel is None:
        parser.error("--scheme posthoc needs --sigma-rel")
    for name in ("weights", "losses", "stored_sigma_rels"):
        if name in given and len(getattr(args, name)) != len(args.files):
            parser.error(f"--{name.replace('_', '-')}: {len(getattr(args, name))} for {len(args.files)} checkpoints")


def _run(args: argparse.Namespace) -> None:
    check_output(args.output, args.overwrite)
    sources = [open_source(file) for file in args.files]
    order = _order(sources, args.order)
    sources = [sources[place] for place in order]
    merger = Merger(sources, _DTYPES.get(args.dtype), args.copy or None)
    weights, about = _search(merger, args) if args.search else _by_scheme(sources, order, args)
    tables.table(
        "Checkpoints",
        ["checkpoint", "step", "weight"],
        [[source.path, source.step, f"{weight:.4f}"] for source, weight in zip(sources, weights, strict=True)],
    )
    start = time.perf_counter()
    merger.nonfinite.clear()
    with _progress(merger.size(weights)) as progress:
        write_merged(merger, weights, args.output, overwrite=args.overwrite, about=about, progress=progress)
    size, seconds = args.output.stat().st_size, time.perf_counter() - start
    print(f"\n{args.output}: {len(merger.specs)} tensors, {size / 1e6:.1f} MB, in {seconds:.1f} s")
    if merger.nonfinite:
        names = merger.nonfinite
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        print(f"Note: there are NaN or infinite values in {', '.join(names[:5])}{more}", file=sys.stderr)


def _order(sources: Sequence[Source], wish: str) -> list[int]:
    """Places of the checkpoints, oldest first. A shell sorts step=1000 before step=200."""
    places = list(range(len(sources)))
    steps = [source.step for source in sources]
    if wish == "step" and None not in steps:
        places.sort(key=lambda place: steps[place] or 0)  # stable: equal steps stay as given
    return places


def _by_scheme(sources: Sequence[Source], order: Sequence[int], args: argparse.Namespace) -> tuple[list[float], Any]:
    def reordered(values: Sequence[float] | None) -> list[float] | None:
        return None if values is None else [values[place] for place in order]

    if args.weights is not None:
        return reordered(args.weights) or [], {"scheme": "given"}
    scheme: Any = args.scheme or "uniform"
    if scheme == "posthoc":
        return _posthoc(sources, reordered(args.stored_sigma_rels), args.sigma_rel), {
            "scheme": scheme,
            "sigma_rel": args.sigma_rel,
        }
    settings = {name: getattr(args, name) for name in ("alpha", "decay", "penalty") if getattr(args, name) is not None}
    steps = [source.step for source in sources]
    # Checkpoints of several runs, or that know no step, are counted instead.
    known = [float(step) for step in steps if step is not None]
    if len(known) < len(steps) or sorted(set(known)) != known:
        if scheme == "step":
            raise ValueError(f"--scheme step needs checkpoints of different steps, oldest first; these are at {steps}")
        known = [float(number) for number in range(1, len(steps) + 1)]
    losses = reordered(args.losses)
    return scheme_weights(scheme, known, losses=losses, **settings), {"scheme": scheme, **settings}


def _posthoc(sources: Sequence[Source], widths: Sequence[float] | None, sigma_rel: float) -> list[float]:
    widths = widths or [source.sigma_rel or 0.0 for source in sources]
    steps = [source.step or 0 for source in sources]
    for source, step, width in zip(sources, steps, widths, strict=True):
        if not step:
            raise ValueError(f"{source.path} does not say its step, which --scheme posthoc needs")
        if not width:
            raise ValueError(f"{source.path} does not say the width of its average: give --stored-sigma-rels")
    weights = posthoc_weights(steps, widths, sigma_rel)
    error = posthoc_error(steps, widths, sigma_rel)
    print(f"The profile of width {sigma_rel} is met with a relative error of {error:.3f}.")
    return weights


def _search(merger: Merger, args: argparse.Namespace) -> tuple[list[float], Any]:
    need_jsonargparse("merge --search")
    from lightning_eff.cli.validation import Validation

    validation = Validation(
        merger,
        args.config,
        args.metric,
        args.mode or "min",
        model=args.model,
        data=args.data,
        limit_val_batches=args.limit_val_batches,
    )
    count = len(merger.sources)
    start = [[float(i == j) for j in range(count)] for i in range(count)]
    places = range(1, count + 1)
    start += [scheme_weights(scheme, places) for scheme in ("uniform", "linear", "exponential", "wsm")]
    total = 2 * count - 1 if args.search == "greedy" else args.evaluations or max(100, len(start))
    with _progress(total, unit="validations") as progress:

        def evaluate(weights: Sequence[float]) -> float:
            score = validation(weights)
            progress(1)
            return score

        if args.search == "greedy":
            found = greedy_soup(evaluate, count)
        else:
            found = evolve(evaluate, start, evaluations=total, seed=args.seed or 0)
    alone = min(
        score for weights, score in found.trials if sorted(weights)[-1] == 1.0 and weights.count(0.0) >= count - 1
    )
    best, single = validation.sign * found.score, validation.sign * alone
    print(
        f"{args.metric} {best:.6g} after {len(found.trials)} validations; the best single checkpoint has {single:.6g}."
    )
    return found.weights, {"scheme": args.search, args.metric: best}


@contextmanager
def _progress(total: int, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere or without rich."""
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        yield lambda amount: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:  # rich 13.0 ends even a disabled bar with an empty line
        yield lambda amount: None
        return
    columns: list[progress.ProgressColumn] = [progress.TextColumn("{task.description}"), progress.BarColumn()]
    if unit == "bytes":
        columns += [progress.DownloadColumn(), progress.TransferSpeedColumn()]
    else:
        columns += [progress.MofNCompleteColumn()]
    with progress.Progress(*columns, progress.TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("Merging" if unit == "bytes" else "Searching", total=total)
        yield lambda amount: bar.advance(task, amount)
