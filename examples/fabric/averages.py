"""Averages in a Fabric loop: an exponential one at every step, and one of the last snapshots (WSM).

python -m examples.fabric.averages
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from examples.fabric.task import batch, loss_of, network, validation_loss
from lightning_eff.functional.averaging import weighted_average, wsm_weights
from lightning_eff.functional.ema import ema_update_, float32_copies, half_life_decay, warmup_decay


@torch.no_grad()
def swap(parameters: Iterable[nn.Parameter], others: Iterable[Tensor]) -> None:
    """Exchange the weights with an average, in place; a second call brings them back."""
    for parameter, other in zip(parameters, others, strict=True):
        kept = parameter.clone()
        parameter.copy_(other)
        other.copy_(kept)


def train(fabric: L.Fabric, steps: int = 200, every: int = 20) -> dict[str, Any]:
    """Train at a constant rate; validate the live weights and both averages."""
    fabric.seed_everything(0, verbose=False)
    module = network()
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=2e-2))
    parameters = list(module.parameters())
    shadows = float32_copies(parameters)
    decay = half_life_decay(half_life=20)
    window: deque[tuple[int, list[Tensor]]] = deque(maxlen=4)
    for step in range(steps):
        fabric.backward(loss_of(model, *batch(step)))
        optimizer.step()
        optimizer.zero_grad()
        ema_update_(shadows, parameters, warmup_decay(step + 1, decay))
        if (step + 1) % every == 0:
            window.append((step + 1, [p.detach().to("cpu", copy=True) for p in parameters]))

    losses = {"live": validation_loss(module)}
    weights = wsm_weights([step for step, _ in window], decay="1-sqrt")
    snapshots = zip(*(tensors for _, tensors in window), strict=True)
    for name, average in {"ema": shadows, "wsm": [weighted_average(each, weights) for each in snapshots]}.items():
        swap(parameters, average)
        try:
            losses[name] = validation_loss(module)
        finally:
            swap(parameters, average)
    return {"module": module, "losses": losses, "shadows": shadows}


if __name__ == "__main__":
    fabric = L.Fabric(accelerator="auto", devices=1)
    fabric.print({name: round(loss, 4) for name, loss in train(fabric)["losses"].items()})
