"""`lightning-eff branch-decay`: train on from a checkpoint of a stable rate, while the rate decays to nothing."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from lightning_eff.callbacks.training_guard.rate_factor import RateFactor
from lightning_eff.cli import need_jsonargparse
from lightning_eff.cli.parser import Parser
from lightning_eff.functional.averaging import CURVES, Curve
from lightning_eff.merging import open_source
from lightning_eff.training.namespaces import is_a
from lightning_eff.training.trainer import callbacks_of

_DESCRIPTION = """\
Train on from a checkpoint whose learning rate is stable, while the rate decays, and save the model at the end: what the
run would be worth if it ended now. The run itself is not touched and can go on. Model, data and Trainer are those of
the run's config; of its callbacks those that save or stop are left out, and max_steps is the end of the decay.
"""
_EPILOG = "The exit status is 0 when the output is written, 1 when it is not, and 2 for arguments that are wrong."


class Decay(L.Callback):
    """Multiplies the run's own rate by a curve that falls from 1 to ``least`` over the steps that are left."""

    def __init__(self, curve: Curve, least: float) -> None:
        self.curve, self.least = curve, least
        self.rates = RateFactor()
        self.begin = 0
        self.own: list[list[float]] = []  # what the run's own schedule says at the first step and at the last

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin = trainer.global_step
        self.rates.attach(trainer.optimizers)

    @override
    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        done = (trainer.global_step - self.begin) / (trainer.max_steps - self.begin)
        self.rates.factor = self.least + (1 - self.least) * CURVES[self.curve](done)
        if not self.own or trainer.global_step == trainer.max_steps - 1:
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            self.own = [*self.own[:1], [float(group["lr"]) for group in groups]]

    @override
    def on_train_end(self, *_: Any) -> None:
        self.rates.detach()

    @override
    def on_exception(self, *_: Any) -> None:
        self.rates.detach()


def main(argv: Sequence[str] | None = None) -> int:
    """Train and save; return 0 where the output is written, and 1, with the reason, where it is not."""
    parser = make_parser()
    args = parser.parse_args(argv)
    return parser.status(lambda: _run(parser, args))


def make_parser() -> Parser:
    """The arguments."""
    parser = Parser("lightning-eff branch-decay", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of the stable stretch; a file or a folder")
    parser.add_argument("--config", required=True, help="LightningCLI's YAML, e.g. the config.yaml that a run saves")
    parser.add_argument("--steps", required=True, type=int, help="of the decay, as the Trainer counts max_steps")
    parser.add_argument("-o", "--output", required=True, type=Path, help="the checkpoint at the end of the decay")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--curve", choices=get_args(Curve), default="1-sqrt", help="default 1-sqrt: fast at first")
    parser.add_argument("--least", type=float, default=0.0, help="what is left of the rate; a fraction, default 0")
    parser.add_argument("--model", metavar="CLASS", help="class of the model, if the config has its arguments only")
    parser.add_argument("--data", metavar="CLASS", help="class of the data, likewise")
    return parser


def _run(parser: Parser, args: argparse.Namespace) -> int:
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}: a decay takes at least 1")
    if not 0 <= args.least < 1:
        parser.error(f"--least is {args.least}: a fraction of at least 0 and below 1")
    if not args.output.parent.is_dir():
        raise FileNotFoundError(f"{args.output.parent}: no such folder to write {args.output.name} into")
    if args.output.exists() and not args.overwrite:
        raise FileExistsError(f"{args.output} exists; --overwrite replaces it")
    step = open_source(args.checkpoint).step
    if step is None:
        raise ValueError(f"{args.checkpoint} does not say its step: it is no checkpoint that training resumes from")
    need_jsonargparse("branch-decay")
    from lightning_eff.cli.validation import TRAINING_PARTS, built, read_config

    settings = read_config(Path(args.config), {"model": args.model, "data": args.data}, TRAINING_PARTS)
    end = step + args.steps
    cli = built(settings, {"max_steps": end, "max_epochs": -1, "max_time": None})
    trainer, decay = cli.trainer, Decay(args.curve, args.least)
    callbacks = callbacks_of(trainer)
    callbacks[:] = [*(each for each in callbacks if not is_a(each, Checkpoint, EarlyStopping)), decay]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")  # of those that are left out
        trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=args.checkpoint)
    if trainer.global_step != end:
        raise RuntimeError(f"the training has ended at step {trainer.global_step}, not at {end}: nothing is saved")
    trainer.save_checkpoint(args.output)
    _tell(args, step, end, decay)
    return 0


@rank_zero_only
def _tell(args: argparse.Namespace, step: int, end: int, decay: Decay) -> None:
    first, last = decay.own[0], decay.own[-1]
    if first != last:
        warnings.warn(
            f"the run's own schedule has taken its rate from {first[0]:.3g} to {last[0]:.3g} between steps {step} and "
            f"{end}: the decay was multiplied with it. Branch off where the rate is stable",
            stacklevel=2,
        )
    print(f"{args.output}: steps {step} to {end}, rate from {first[0]:.3g} to {args.least:g} of it by {args.curve}")
