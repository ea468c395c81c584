"""ZClip through the kernels: the same golden values, and the same statistics as plain torch on every kind of step."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from harness.runs import fit
from lightning_eff.callbacks import ZClip
from lightning_eff.functional.zclip import FIELDS, ZClipConfig, ZClipState, zclip_grad_norm_, zclip_update
from lightning_eff.kernels import zclip
from tests.functional.zclip_golden import GOLDEN

NORMS = (1.0, 1.2, 0.8, 1.0, 1.1, 5.0)

pytestmark = pytest.mark.usefixtures("triton_kernels")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each of the kernels' launchers was called: proof that the path goes through them."""
    from lightning_eff.kernels.grad_norm import kernel
    from lightning_eff.kernels.zclip import kernel as zclip_kernel

    counts = dict.fromkeys(("sum_of_squares", "decide", "scale_"), 0)

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for module, name in ((kernel, "sum_of_squares"), (zclip_kernel, "decide"), (kernel, "scale_")):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return counts


def test_the_values_are_laid_out_as_the_functional_says() -> None:
    assert zclip.VALUES == FIELDS


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name: str, device: torch.device, launches: dict[str, int]) -> None:
    arguments, clipped, mean, var = GOLDEN[name]
    state = ZClipState(ZClipConfig(warmup_steps=4, **arguments))
    parameters = [torch.nn.Parameter(torch.zeros(3, device=device)), torch.nn.Parameter(torch.zeros(2, device=device))]
    for norm in NORMS:
        parameters[0].grad = torch.tensor([0.6 * norm, 0.0, 0.0], device=device)
        parameters[1].grad = torch.tensor([0.0, 0.8 * norm], device=device)
        zclip_grad_norm_(parameters, state)
    assert torch.cat([parameter.grad for parameter in parameters]).norm().item() == pytest.approx(clipped, rel=1e-6)
    assert state["mean"].item() == pytest.approx(mean, rel=1e-7)
    assert state["var"].item() == pytest.approx(var, rel=1e-6)
    assert launches == dict.fromkeys(launches, len(NORMS))


class Prescribed(L.LightningModule):
    """One parameter whose gradient at step t has the norm NORMS[t]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.norms: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight * batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        assert self.weight.grad is not None
        self.norms.append(self.weight.grad.norm().item())


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values_through_the_callback(name: str, launches: dict[str, int]) -> None:
    arguments, clipped, mean, var = GOLDEN[name]
    gradients = torch.tensor([[0.0, norm, 0.0] for norm in NORMS])
    callback = ZClip(warmup_steps=4, **arguments)
    model, data = Prescribed(), torch.utils.data.DataLoader(gradients, batch_size=1)
    accelerator = "auto" if torch.cuda.is_available() else "cpu"
    fit(model, callback, data=data, max_epochs=1, accelerator=accelerator, devices=1)
    state = callback._states[0]
    assert model.norms[-1] == pytest.approx(clipped, rel=1e-6)
    assert state["mean"].item() == pytest.approx(mean, rel=1e-7)
    assert state["var"].item() == pytest.approx(var, rel=1e-6)
    assert launches == dict.fromkeys(launches, len(NORMS))


@pytest.mark.parametrize("on_nonfinite", [0.0, 1.0])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"max_grad_norm": None},
        {"max_grad_norm": None, "clip_option": "mean"},
        {"max_grad_norm": None, "clip_option": "percentile"},
        {"max_grad_norm": None, "skip_update_on_spike": True},
        {"max_grad_norm": None, "clip_factor": 0.5},
        {"max_grad_norm": None, "relearn_after": None},
        {"max_grad_norm": 3.0, "relearn_after": 6, "warmup_steps": 5},
        {"max_grad_norm": 1.0},
        {"max_grad_norm": "auto", "warmup_steps": 12},  # the spike and the broken steps lie in it
    ],
    ids=str,
)
def test_every_figure_follows_the_plain_torch_one(
    arguments: dict[str, Any], on_nonfinite: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = (0.1 * torch.randn(20, generator=generator)).tolist()
    # Quiet, a spike, broken steps and an empty one, then a level four times as high, which is learned anew or not.
    norms = [*NORMS, math.nan, math.inf, 0.0, *(1 + x for x in noise), *(4 + x for x in noise)]
    config = ZClipConfig(**{"warmup_steps": 4, **arguments})
    plain, launched = ZClipState(config), ZClipState(config)
    for norm in norms:
        given = torch.tensor(norm, dtype=torch.float64, device=device)
        with monkeypatch.context() as patch:
            patch.setenv("LIGHTNING_EFF_KERNELS", "reference")
            zclip_update(given, plain, on_nonfinite=on_nonfinite)
        zclip_update(given, launched, on_nonfinite=on_nonfinite)
        torch.testing.assert_close(launched.values, plain.values, rtol=1e-12, atol=1e-14, equal_nan=True)
        torch.testing.assert_close(launched.norms, plain.norms, rtol=1e-14, atol=0.0)
    relearned = 1 if arguments.get("relearn_after") == 6 else 0
    assert plain["relearned"].item() == relearned


def test_a_broken_step_becomes_zeros(device: torch.device) -> None:
    parameter = torch.nn.Parameter(torch.zeros(5, device=device))
    parameter.grad = torch.tensor([1.0, math.nan, math.inf, 0.0, -math.inf], device=device)
    zclip_grad_norm_([parameter], ZClipState(ZClipConfig()))
    assert parameter.grad.tolist() == [0.0] * 5


def test_decide_refuses_what_it_would_misread(device: torch.device) -> None:
    values, ring = (
        torch.zeros(17, dtype=torch.float64, device=device),
        torch.zeros(4, dtype=torch.float64, device=device),
    )
    norm = torch.ones((), device=device)
    constants = zclip.Constants(*[1.0] * 11)
    modes = {"percentile": False, "to_mean": False, "skip_spikes": False}
    with pytest.raises(ValueError, match=r"values of shape \(16,\)"):
        zclip.decide(norm, values[:16], ring, constants, **modes)
    with pytest.raises(ValueError, match=r"ring of shape \(4,\), torch.float32"):
        zclip.decide(norm, values, ring.float(), constants, **modes)
    with pytest.raises(ValueError, match=r"norm of shape \(2,\)"):
        zclip.decide(torch.ones(2, device=device), values, ring, constants, **modes)


def test_lists_that_kernels_cannot_take_go_the_old_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_EFF_KERNELS")
    parameters = [torch.nn.Parameter(torch.zeros(1, dtype=dtype)) for dtype in (torch.complex64, torch.float64)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3 + 4j]), torch.tensor([12.0], dtype=torch.float64)
    norm = zclip_grad_norm_(parameters, ZClipState(ZClipConfig(max_grad_norm=6.5)))
    assert norm is not None
    assert norm.item() == pytest.approx(13)
    assert parameters[0].grad.item() == pytest.approx(1.5 + 2j)
