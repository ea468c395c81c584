"""`lightning-eff fit | validate | test | predict`."""

import os
import sys
from collections.abc import Sequence

from lightning.pytorch.cli import LightningCLI

# LightningCLI knows a class by its short name once it is imported, and a strategy once it is registered.
import lightning_eff.callbacks  # noqa: F401
from lightning_eff import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run LightningCLI on these arguments, or on those of the process."""
    # As with `python -m`: a model in the current directory can be named, `--model=examples.gpt.model.GPTModule`.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    LightningCLI(
        # No class is given: `--model` takes any LightningModule, and `--data`, which is optional, any DataModule.
        # A job that is started again in the same log directory (after a crash, by a scheduler) must not stop at the
        # config.yaml that it wrote itself.
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "lightning-eff", "version": f"lightning-eff {__version__}"},
        args=None if argv is None else list(argv),
    )
    return 0
