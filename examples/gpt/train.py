"""Train the GPT from the command line or a YAML file.

Usage:
    python -m examples.gpt.train fit --config examples/gpt/configs/1m.yaml
    python -m examples.gpt.train fit --config examples/gpt/configs/10m.yaml --data.root ~/notes --data.pattern '*.md'
    python -m examples.gpt.train fit --config examples/gpt/configs/1m.yaml --model.lr 6e-3 --trainer.max_steps 500
    python -m examples.gpt.train fit --help
"""

from __future__ import annotations

import torch
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import lightning_eff.callbacks  # noqa: F401  an imported callback is known to the command line by its short name
from examples.gpt.data import TextDataModule
from examples.gpt.module import GPTModule


class GPTCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.config.block_size", "data.block_size")


def main(args: ArgsType = None) -> LightningCLI:
    return GPTCLI(GPTModule, TextDataModule, args=args)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")  # tensor cores, where there are any
    main()
