"""`lightning-eff fit | validate | test | predict`."""

import inspect
import os
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import Strategy
from typing_extensions import override

# LightningCLI knows a class by its short name once it is imported, and a strategy once it is registered.
import lightning_eff.callbacks
import lightning_eff.strategies
from lightning_eff import __version__
from lightning_eff.callbacks.model_surgery import missing_surgery
from lightning_eff.cli import TRAINING
from lightning_eff.cli.complaints import complaint, refusal

_DEBUG = "JSONARGPARSE_DEBUG"

# Of these are the frames between a command line and what refuses an argument. Any other is of the user's own code.
_PACKAGES = {"contextlib", "importlib", "jsonargparse", "lightning", "lightning_eff", "lightning_utilities", "torch"}


class _WrongArgumentError(Exception):
    """An argument is refused: by the parser, or by the constructor that it goes to."""


class _TrainingCLI(LightningCLI):
    """LightningCLI, in which whatever refuses an argument ends in one message."""

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        try:
            super().parse_arguments(parser, args)
            self._take_strategy_by_name()
        except ArgumentError as error:
            raise _WrongArgumentError(str(error), self.options()) from error

    def _take_strategy_by_name(self) -> None:
        """A class of the suite, which jsonargparse takes for text where no argument of the class is given."""
        command = self.config.subcommand
        name, room = self.config[command].trainer.strategy, lightning_eff.strategies
        named = getattr(room, name.removeprefix(f"{room.__name__}."), None) if isinstance(name, str) else None
        if inspect.isclass(named) and issubclass(named, Strategy):
            strategy = {"class_path": f"{room.__name__}.{named.__name__}"}
            self.config = self.parser.parse_object({command: {"trainer": {"strategy": strategy}}}, self.config)

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
            return
        except Exception as error:
            raised = _raised_by_the_class(error)
            if (message := _refused(error, raised)) is not None:
                raise _WrongArgumentError(message, []) from error
        raise raised  # out here, for its traceback and what it was raised from are its own

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except RuntimeError as error:
            # A checkpoint of other layers, of which torch lists the keys.
            if "state_dict" in str(error) and (why := missing_surgery(self.trainer)) is not None:
                raise MisconfigurationException(why) from error
            raise

    def options(self) -> list[str]:
        """The options of `fit`, and with it of all commands, that do not hang on a class."""
        actions = self._subcommand_parsers["fit"]._option_string_actions
        return [option for option in actions if option.startswith("--")]


def _raised_by_the_class(error: BaseException) -> BaseException:
    """jsonargparse puts errors of its own around it; what it was raised from belongs to it."""
    while _came_through(error)[-1:] == ["jsonargparse"]:
        deeper = error.__cause__ or error.__context__
        if deeper is None:
            break
        error = deeper
    return error


def _refused(error: BaseException, raised: BaseException) -> str | None:
    """The message, where an argument is wrong or a package missing; None for a fault, which has its traceback."""
    # For a strategy, which may be text too, jsonargparse raises from that: what the class said is in its message alone.
    for each in (error, raised):
        if (sentence := refusal(str(each))) is not None:
            return sentence
    packages = _came_through(raised)
    if packages[-1:] == ["jsonargparse"]:
        return str(error)
    refuses = isinstance(raised, ValueError | MisconfigurationException | ImportError)
    return str(raised) if refuses and set(packages) <= _PACKAGES else None


def _came_through(error: BaseException) -> list[str]:
    """The packages of the frames, down to where it was raised."""
    frames = traceback.walk_tb(error.__traceback__)
    return [frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in frames]


def main(argv: Sequence[str] | None = None) -> int:
    """Run LightningCLI on these arguments, or on those of the process; return 2 for arguments that are wrong."""
    # As with `python -m`: a model in the current directory can be named, `--model=examples.gpt.GPTModule`.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        # None and not the list: given arguments, LightningCLI warns that those of the process are not read.
        _build(_TrainingCLI, None if argv is None else list(argv))
    except (_WrongArgumentError, MisconfigurationException) as error:
        if os.environ.get(_DEBUG) == "true" or not _PACKAGES.issuperset(_came_through(error)):
            raise
        args = list(sys.argv[1:] if argv is None else argv)
        message, options = error.args if isinstance(error, _WrongArgumentError) else (str(error), [])
        where = "" if options else f"; {_DEBUG}=true shows where it happened"
        command = next((arg for arg in args if arg in TRAINING), "")
        prog = f"lightning-eff {command}".strip()
        print(f"{prog}: {complaint(message, args, options)}", file=sys.stderr)
        print(f"See `{prog} --help`{where}.", file=sys.stderr)
        return 2
    return 0


def _build(cls: type[LightningCLI], args: ArgsType) -> None:
    raising = {"exit_on_error": False}
    cls(
        # No class is given: `--model` takes any LightningModule, and `--data`, which is optional, any DataModule.
        # A job that is started again in the same log directory (after a crash, by a scheduler) must not stop at the
        # config.yaml that it wrote itself.
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "prog": "lightning-eff",
            "version": f"lightning-eff {__version__}",
            **raising,
            **dict.fromkeys(TRAINING, raising),
        },
        args=args,
    )


class _Parsers(_TrainingCLI):
    """Stops where the parsers are there, and nothing is parsed or run."""

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        raise _WrongArgumentError("", self.options())


def training_options() -> list[str]:
    """The options of the training commands that do not hang on a class, for a shell that completes them."""
    try:
        _build(_Parsers, [])
    except _WrongArgumentError as built:
        options: list[str] = built.args[1]
        return options
    raise AssertionError("LightningCLI has parsed nothing")
