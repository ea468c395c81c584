"""ZClip in a Fabric loop: an outlier among the gradient norms is clipped, and its statistics are saved with the run.

python -m examples.fabric.zclip
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch

from examples.fabric.task import batch, loss_of, network
from lightning_eff.functional.zclip import ZClipConfig, ZClipState, zclip_grad_norm_


def train(
    fabric: L.Fabric, steps: int = 60, spike_at: int = 40, checkpoint: Path | None = None, resume: Path | None = None
) -> dict[str, Any]:
    """Train, meet one bad batch, and save behind the last step; or go on from there."""
    fabric.seed_everything(0, verbose=False)
    module = network()
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-2))
    zclip = ZClipState(ZClipConfig(warmup_steps=10))
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0, "zclip": None}
    if resume is not None:
        fabric.load(resume, state)
        zclip.load_state_dict(state["zclip"])
    clipped = []
    for step in range(state["step"], steps):
        x, y = batch(step)
        loss = loss_of(model, x, 1e4 * y if step == spike_at else y)
        fabric.backward(loss)
        fabric.strategy.precision.unscale_gradients(optimizer)  # does something with 16-mixed alone
        zclip_grad_norm_(model.parameters(), zclip)
        if zclip["coefficient"] < 1:  # for this example: in a loop on a GPU, read it where you log
            clipped.append(step)
        optimizer.step()
        optimizer.zero_grad()
    if checkpoint is not None:
        fabric.save(checkpoint, {**state, "step": steps, "zclip": zclip.state_dict()})
    return {"module": module, "clipped": clipped, "norm": zclip["norm"].item(), "steps": int(zclip["steps"])}


if __name__ == "__main__":
    fabric = L.Fabric(accelerator="auto", devices=1)
    fabric.print(f"clipped at steps {train(fabric)['clipped']}; the bad batch came at step 40")
