"""`lightning-eff`: LightningCLI's commands and the suite's own, told apart by the first argument."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from lightning_eff import __version__
from lightning_eff.cli.parser import did_you_mean


class Command(NamedTuple):
    """A subcommand: the module whose `main(argv) -> exit status` runs it, and its line in the help."""

    module: str
    help: str


# A new command is a line here and a module with `main` and `make_parser`. Modules are imported when they are called, so
# that `--help` is quick and one command's missing dependency is no matter to the others.
COMMANDS = {
    "advise": Command("lightning_eff.cli.advise", "what pays on this link, and for this model (advise link | model)"),
    "branch-decay": Command("lightning_eff.cli.branch_decay", "train on from a stable checkpoint at a decaying rate"),
    "completion": Command("lightning_eff.cli.completion", "print what bash or zsh needs to complete a command line"),
    "doctor": Command("lightning_eff.cli.doctor", "show what is installed, which kernels run, and what is missing"),
    "launch": Command("lightning_eff.cli.launch.run", "start a fault-tolerant run: replicas may die and come back"),
    "lighthouse": Command("lightning_eff.cli.lighthouse", "the rendezvous of a fault-tolerant run's replicas"),
    "list": Command("lightning_eff.cli.listing", "name the suite's callbacks, strategies, plugins, compressors"),
    "merge": Command("lightning_eff.cli.merge", "average checkpoints: by a scheme, or by search on data"),
    "recipe": Command("lightning_eff.cli.recipe", "callbacks with settings that belong together, as YAML"),
    "verify": Command("lightning_eff.cli.verify", "check checkpoints: cut off, flipped bytes, missing rank files"),
    "verify-resume": Command("lightning_eff.cli.verify_resume.run", "does your script go on exactly after `kill -9`?"),
}

# The methods of the Trainer that LightningCLI offers; it parses their arguments itself.
TRAINING = {
    "fit": "train a model",
    "validate": "one evaluation over the validation set",
    "test": "one evaluation over the test set",
    "predict": "run inference over the data",
}

_HELP = """\
usage: lightning-eff COMMAND [ARGUMENTS]
       lightning-eff --help | --version

{description}

training, with LightningCLI:
{training}

tools:
{tools}

`lightning-eff COMMAND --help` lists the arguments of a command. Callbacks and
strategies of the suite, and of Lightning, go by their short names:

  lightning-eff fit --model=my_module.MyModel --data=my_module.MyData \\
      --trainer.max_steps=1000 \\
      --trainer.callbacks+=TensorBoardLayout \\
      --trainer.callbacks+=LearningRateMonitor \\
      --trainer.callbacks.logging_interval=step
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (that of the process by default) and return its exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    first = args[0] if args else "--help"
    if first in ("-h", "--help"):
        print(_help(), end="")
        return 0
    if first == "--version":
        print(f"lightning-eff {__version__}")
        return 0
    if first in COMMANDS:
        return int(import_module(COMMANDS[first].module).main(args[1:]))
    # LightningCLI also takes options before its command: `lightning-eff --config run.yaml fit`.
    if first not in TRAINING and not first.startswith("-"):
        meant = did_you_mean(first, [*TRAINING, *COMMANDS])
        print(f"lightning-eff: no command `{first}`.{meant} See `lightning-eff --help`.", file=sys.stderr)
        return 2
    need_jsonargparse(first)
    train = import_module("lightning_eff.cli.training")
    # None and not the list: given arguments, LightningCLI warns that those of the process are not read.
    return int(train.main(None if argv is None else args))


def _help() -> str:
    def lines(commands: dict[str, str]) -> str:
        return "\n".join(f"  {name:<13} {text}" for name, text in commands.items())

    return _HELP.format(
        description="PyTorch Lightning callbacks and strategies that make training stable, cheap and\nhard to kill.",
        training=lines(TRAINING),
        tools=lines({name: command.help for name, command in COMMANDS.items()}),
    )


def need_jsonargparse(command: str) -> None:
    """End with what to install, if LightningCLI cannot work here."""
    missing = [name for name in ("jsonargparse", "docstring_parser", "typeshed_client") if find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"lightning-eff {command}: {', '.join(missing)} cannot be found.\n"
            "LightningCLI needs it; it comes with: pip install 'lightning-eff[cli]'"
        )
