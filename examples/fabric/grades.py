"""GradES in a Fabric loop: a weight matrix that has little left to gain is frozen.

python -m examples.fabric.grades
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from examples.fabric.task import batch, loss_of, network, validation_loss
from lightning_eff.functional.grades import GradESConfig, GradESState, MatrixMetric, grades_update, settled_units


def train(fabric: L.Fabric, steps: int = 400, every: int = 5) -> dict[str, Any]:
    """Train at a rate that decays; says which matrix was frozen at which step.

    On several devices freeze on all of them alike: under DDP the gradients are equal, and so is the decision. A frozen
    parameter then has to leave DDP's buckets: wrap the module anew, or set find_unused_parameters.
    """
    fabric.seed_everything(0, verbose=False)
    module = network()
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.98**step)
    matrices = {name: p for name, p in module.named_parameters() if p.ndim >= 2}
    metric = MatrixMetric([{name: p} for name, p in matrices.items()], "gain")
    state = GradESState(len(matrices), GradESConfig(tau=0.02))
    frozen: dict[str, int] = {}
    for step in range(steps):
        fabric.backward(loss_of(model, *batch(0, size=64)))  # one batch: there is an end to learning
        if step % every == 0:
            rates, done = dict.fromkeys(matrices, optimizer.param_groups[0]["lr"]), (step + 1) / steps
            grades_update(metric.measure(rates=rates), state, armed=done > 0.25, done=done)
            settled = settled_units(state).isfinite().nonzero().flatten().tolist()  # one read of the device
            for unit in settled:
                name, parameter = list(matrices.items())[unit]
                parameter.requires_grad_(False)
                parameter.grad = None
                frozen[name] = step
            state.mark(frozen=settled)
            metric.forget(settled)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {"module": module, "frozen": frozen, "loss": validation_loss(module)}


if __name__ == "__main__":
    fabric = L.Fabric(accelerator="auto", devices=1)
    found = train(fabric)
    fabric.print(f"frozen: {found['frozen']}")
