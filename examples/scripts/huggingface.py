"""A Llama of `transformers` made from its config, nothing downloaded, fine-tuned by LoRA (`peft`) or by MISA.

python -m examples.scripts.huggingface lora | misa      # pip install transformers peft
"""

from __future__ import annotations

import sys
from typing import Literal

import lightning as L
import torch
from torch import Tensor

import lightning_eff
from examples.gpt import TextDataModule

try:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError as error:
    raise ImportError(f"{error.name} cannot be found. It comes with: pip install transformers peft") from error

How = Literal["lora", "misa"]


class FineTuned(L.LightningModule):
    """With a path in place of the config, `LlamaForCausalLM.from_pretrained(path)`, it is the same."""

    def __init__(self, how: How, lr: float) -> None:
        super().__init__()
        self.lr = lr
        shape = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=128, **shape))
        adapters = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        self.model = get_peft_model(model, adapters) if how == "lora" else model

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        tokens = batch.long()
        loss = self.model(input_ids=tokens, labels=tokens).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        tokens = batch.long()
        self.log("val_loss", self.model(input_ids=tokens, labels=tokens).loss, batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.lr)


def main(how: How = "lora", steps: int = 200, folder: str | None = None) -> L.Trainer:
    """Train on this Python's sources, or on the text files of a folder."""
    L.seed_everything(0, verbose=False)
    # MISA unfreezes and freezes what it samples; under LoRA the base is frozen for good.
    callbacks = lightning_eff.recipe("finetune", steps, low_memory=how == "misa", resumable=False)
    text = TextDataModule(
        folder, pattern="*.py" if folder is None else "*.txt", block_size=64, batch_size=8, val_windows=16,
        val_fraction=0.03 if folder is None else 0.3,
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=steps, accelerator="auto", devices=1, callbacks=callbacks, logger=False, log_every_n_steps=5,
        enable_checkpointing=False, num_sanity_val_steps=0, val_check_interval=max(1, steps // 4),
    )  # fmt: skip
    trainer.fit(FineTuned(how, lr=2e-3), datamodule=text)
    return trainer


if __name__ == "__main__":
    metrics = main(*sys.argv[1:2]).callback_metrics  # type: ignore[arg-type]
    print({name: round(float(metrics[name]), 3) for name in ("val_loss", "average/val_loss")})
