"""A fine-tuning task for the benchmarks: a GPT pre-trained on one part of the standard library, tuned on another.

The GPT reads the standard library without its graphical packages, then learns these: other libraries, another style
(camelCase names, layout code). The pre-trained weights are made once and kept in `logs/`.

    python -m benchmarks.fine_tuning        # make them, and say what a fine-tuning has to gain
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from benchmarks.gpt import GPT_1M, train, validation_loss
from benchmarks.rows import CONSOLE
from examples.gpt.data import TextDataModule
from examples.gpt.module import GPTModule
from harness.runs import quiet_lightning

GRAPHICAL = ("idlelib", "tkinter", "turtledemo")
BATCH_SIZE = 16
PRETRAIN_STEPS = 2000
WEIGHTS = Path("logs") / "benchmarks" / "pretrained-1m.pt"


class PartOfLibrary(TextDataModule):
    """The standard library without its graphical packages, or these alone.

    Args:
        graphical: which of the two parts.
        seed: decides which crops are drawn.
        val_windows: validate on this many windows of 128 bytes; None: on all.
    """

    def __init__(self, graphical: bool, seed: int = 0, val_windows: int | None = 256) -> None:
        super().__init__(
            block_size=GPT_1M.block_size, batch_size=BATCH_SIZE, val_windows=val_windows, val_fraction=0.1, seed=seed
        )
        self.graphical = graphical

    def split_files(self) -> tuple[list[Path], list[Path]]:
        """As for the whole library, by the names of files."""

        def chosen(files: list[Path]) -> list[Path]:
            return [file for file in files if (file.relative_to(self.root).parts[0] in GRAPHICAL) == self.graphical]

        train, val = super().split_files()
        return chosen(train), chosen(val)


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained low-rank addition: W x + (scale / rank) B A x."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Linear(base.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_b.weight)  # the tuning begins at the pre-trained model
        self.factor = scale / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.factor * self.lora_b(self.lora_a(x))


def add_lora(model: nn.Module, rank: int = 8, scale: float = 16.0) -> None:
    """Freeze a GPT and give each linear layer of its blocks a low-rank pair."""
    model.requires_grad_(False)
    for block in model.blocks:
        for layers in (block.attn, block.mlp):
            for name, layer in list(layers.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(layers, name, LoRALinear(layer, rank, scale))


def pretrained(path: Path = WEIGHTS, steps: int = PRETRAIN_STEPS) -> dict[str, Tensor]:
    """The state dict of the pre-trained GPT; trained now if it is not there yet (minutes on one core)."""
    if not path.exists():
        L.seed_everything(0, verbose=False)
        module = GPTModule(GPT_1M, lr=3e-3, warmup_steps=100, fused=True)
        train(module, PartOfLibrary(graphical=False), max_steps=steps, gradient_clip_val=1.0)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(module.model.state_dict(), path)
    return torch.load(path, weights_only=True)


class EightBits(GPTModule):
    """With the AdamW of bitsandbytes, whose moments have eight bits; matrices below 4,096 elements keep 32."""

    def configure_optimizers(self) -> dict[str, Any]:
        try:
            import bitsandbytes
        except ImportError as error:
            raise ImportError("AdamW with a state of 8 bits is of bitsandbytes: pip install bitsandbytes") from error
        found = super().configure_optimizers()
        optimizer, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
        groups = [{key: group[key] for key in ("params", "weight_decay")} for group in optimizer.param_groups]
        found["optimizer"] = bitsandbytes.optim.AdamW8bit(groups, lr=self.lr, betas=self.betas)
        rates = torch.optim.lr_scheduler.LambdaLR(found["optimizer"], schedule.lr_lambdas)
        found["lr_scheduler"]["scheduler"] = rates
        return found


def tuned_module(
    rank: int, lr: float, seed: int = 0, schedule: str = "cosine", warmup_steps: int = 20, eight_bits: bool = False
) -> GPTModule:
    """The pre-trained GPT, to be tuned: low-rank pairs of this rank alone, or with 0 all parameters."""
    build = EightBits if eight_bits else GPTModule
    module = build(GPT_1M, lr=lr, schedule=schedule, warmup_steps=warmup_steps, weight_decay=0.01, fused=not eight_bits)
    module.model.load_state_dict(pretrained())
    if rank:
        torch.manual_seed(seed)
        add_lora(module.model, rank)
    return module


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    quiet_lightning()
    torch.set_num_threads(1)
    for name, graphical in (("the part that it was trained on", False), ("the graphical packages", True)):
        loss = validation_loss(tuned_module(0, lr=0.0), PartOfLibrary(graphical))
        CONSOLE.print(f"validation loss on {name}: {loss:.4f} nats a byte")


if __name__ == "__main__":
    main()
