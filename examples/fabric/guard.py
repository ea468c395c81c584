"""TrainingGuard's rules in a Fabric loop: the loss is judged, and on an alarm the run goes back to a copy.

python -m examples.fabric.guard
"""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch

from examples.fabric.task import batch, loss_of, network, validation_loss
from lightning_eff.callbacks import AlarmRule, ExplodingLoss, NonFiniteLoss


def train(
    fabric: L.Fabric, steps: int = 150, broken_at: int = 90, every: int = 25, guarded: bool = True
) -> dict[str, Any]:
    """Train; at one step a weight's bit flips, as a cosmic ray would have it."""
    fabric.seed_everything(0, verbose=False)
    module = network()
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-2))
    rules: list[AlarmRule] = [NonFiniteLoss(patience=2), ExplodingLoss(over_n_steps=20)] if guarded else []
    # As the callback does, one snapshot is kept from before the last: an alarm speaks some steps late.
    snapshots: list[dict[str, Any]] = []
    alarms = []
    for step in range(steps):  # batches go on behind a rollback: what broke the run is not seen again
        if step % every == 0:
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            snapshots = [*snapshots[-1:], copy.deepcopy(parts)]
        loss = loss_of(model, *batch(step))
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step == broken_at:
            with torch.no_grad():
                module[2].weight[0, 0] = float("inf")
        value = fabric.all_reduce(loss.detach(), reduce_op="mean").item()  # alike on all ranks, who decide alike
        words = [(rule.name, rule.judge(step, value)) for rule in rules]
        if said := [f"{name}: {why}" for name, why in words if why]:
            alarms.append((step, *said))
            model.load_state_dict(snapshots[0]["model"])
            optimizer.load_state_dict(copy.deepcopy(snapshots[0]["optimizer"]))
            snapshots = snapshots[:1]
    return {"module": module, "alarms": alarms, "loss": validation_loss(module)}


if __name__ == "__main__":
    fabric = L.Fabric(accelerator="auto", devices=1)
    found = train(fabric)
    fabric.print(f"alarms: {found['alarms']}\nvalidation loss {found['loss']:.4f}")
