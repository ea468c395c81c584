"""Train the digits network from the command line or a YAML file, in seconds.

Usage:
    python -m examples.digits.train fit --config examples/digits/config.yaml
    python -m examples.digits.train fit --config examples/digits/config.yaml --model.lr 0.1 --trainer.max_epochs 5
"""

from __future__ import annotations

from lightning.pytorch.cli import ArgsType, LightningCLI

import lightning_eff.callbacks  # noqa: F401  an imported callback is known to the command line by its short name
from examples.digits.data import DigitsDataModule
from examples.digits.module import DigitsModule


def main(args: ArgsType = None) -> LightningCLI:
    return LightningCLI(DigitsModule, DigitsDataModule, args=args)


if __name__ == "__main__":
    main()
