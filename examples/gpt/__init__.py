"""A byte-level GPT on real text: the demo, and the workload of the benchmarks."""

from examples.gpt.data import TextDataModule
from examples.gpt.model import GPT, GPTConfig
from examples.gpt.module import GPTModule

__all__ = ["GPT", "GPTConfig", "GPTModule", "TextDataModule"]
