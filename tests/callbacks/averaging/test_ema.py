"""EMA: the update; what it shares with CheckpointAveraging is tested there."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from harness.operators import OperatorCounter
from lightning_eff.callbacks import EMA
from lightning_eff.functional.averaging import weighted_average
from lightning_eff.functional.ema import posthoc_weights, power_decay, power_from_width, warmup_decay
from tests.callbacks.averaging.averaging_models import Odd, Weights, averaged, fit, loss_of
from tests.suite.models import Net
from tests.suite.runs import SaveAt, differences


def _recursion(weights: Weights, steps: list[int], decays: list[float]) -> dict[str, torch.Tensor]:
    """In float64, from the weights after each step."""
    average = {name: tensor.double() for name, tensor in weights.history[steps[0]].items()}
    for step, decay in zip(steps[1:], decays, strict=True):
        for name, tensor in weights.history[step].items():
            average[name] = decay * average[name] + (1 - decay) * tensor.double()
    return {name: tensor.float() for name, tensor in average.items()}


@pytest.mark.parametrize(
    ("arguments", "steps", "decays"),
    [
        ({"decay": 0.9, "warmup": False}, range(1, 11), [0.9] * 9),
        ({"decay": 0.6}, range(1, 11), [warmup_decay(n, 0.6) for n in range(2, 11)]),
        ({"half_life": 4, "every_n_steps": 2, "warmup": False}, range(2, 11, 2), [2**-0.5] * 4),
        (
            {"widths": [0.1], "every_n_steps": 3, "start_step": 4},
            range(6, 11, 3),
            [power_decay(9, power_from_width(0.1), 3)],
        ),
    ],
    ids=["constant", "warm-up", "half-life", "power"],
)
def test_the_average_follows_its_recursion(arguments, steps, decays, tmp_path):
    weights, ema = Weights(), EMA(**arguments)
    fit(tmp_path, weights, ema, SaveAt(10, tmp_path / "run.ckpt"))
    state = averaged(tmp_path / "ema-run.ckpt")
    assert not differences(_recursion(weights, list(steps), decays), state, rtol=1e-6, atol=1e-7)


def test_another_width_is_made_of_the_files_of_two(tmp_path):
    stored = EMA(widths=[0.08, 0.16], name="stored", save="safetensors")
    wanted = EMA(widths=[0.12], name="wanted", save="safetensors")
    around = [SaveAt(step, tmp_path / f"{step}.ckpt") for step in (10, 20, 30, 40)]
    fit(tmp_path, stored, wanted, *around, steps=40)
    files, steps, widths = [], [], []
    for step in (10, 20, 30, 40):
        for width, name in ((0.08, f"stored-{step}"), (0.16, f"stored-0.16-{step}")):
            path = tmp_path / f"{name}.safetensors"
            files.append(load_file(path))
            with safe_open(path, framework="pt") as file:
                about = file.metadata()
            assert (float(about["sigma_rel"]), int(about["step"])) == (width, step)
            steps.append(step)
            widths.append(width)
    factors = posthoc_weights(steps, widths, 0.12)
    target = load_file(tmp_path / "wanted-40.safetensors")
    live = torch.load(tmp_path / "40.ckpt", weights_only=True)["state_dict"]
    for name, tensor in target.items():
        made = weighted_average([file[name] for file in files], factors)
        assert (made - tensor).norm() < 0.05 * (live[name] - tensor).norm(), name


def test_several_widths_are_validated_side_by_side(tmp_path):
    ema = EMA(widths=[0.05, 0.2])
    save = SaveAt(12, tmp_path / "run.ckpt")
    trainer, module = fit(tmp_path, ema, save, module=Odd(), steps=12, val_check_interval=4)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert metrics["val_loss"] == loss_of(module, tmp_path)
    for name, file in (("ema/val_loss", "ema-run.ckpt"), ("ema/0.2/val_loss", "ema-0.2-run.ckpt")):
        # An evaluation reads the float32 average; so does what is loaded.
        assert metrics[name] == loss_of(Odd.load_from_checkpoint(tmp_path / file), tmp_path) != metrics["val_loss"]


def test_the_average_of_bfloat16_weights_moves_and_keeps_its_digits(tmp_path):
    class Half(Net):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs.to(self.head.weight)).float()

    weights, ema = Weights(), EMA(0.99, warmup=False)
    save = SaveAt(10, tmp_path / "run.ckpt")
    _, module = fit(tmp_path, weights, ema, save, module=Half(), precision="bf16-true")  # with validations in between
    state = averaged(tmp_path / "ema-run.ckpt")
    assert not differences(_recursion(weights, list(range(1, 11)), [0.99] * 9), state, rtol=1e-5, atol=1e-6)
    assert next(module.parameters()).dtype == torch.bfloat16
    moved = [name for name in state if not torch.equal(state[name], weights.history[1][name].float())]
    assert len(moved) > len(state) / 2


def test_a_checkpoint_saved_in_the_middle_of_a_validation_is_no_other(tmp_path):
    class Saves(Odd):
        def on_validation_epoch_end(self) -> None:
            super().on_validation_epoch_end()
            if self.trainer.global_step == 8:
                self.trainer.save_checkpoint(tmp_path / "within.ckpt")

    arguments = {"steps": 12, "val_check_interval": 4}
    weights, ema, save = Weights(), EMA(0.8, validate_with="average"), SaveAt(8, tmp_path / "before.ckpt")
    trainer, _ = fit(tmp_path, weights, ema, save, module=Saves(), **arguments)
    before, within = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("before", "within"))
    assert not differences(dict(before["state_dict"]), dict(within["state_dict"]))
    files = [averaged(tmp_path / f"ema-{name}.ckpt") for name in ("before", "within")]
    assert not differences(*files)
    ranks = [torch.load(next((tmp_path / f"{name}.ckpt.ranks").iterdir())) for name in ("before", "within")]
    assert not differences(ranks[0]["state"], ranks[1]["state"])
    plain, _ = fit(tmp_path, EMA(0.8, validate_with="average"), module=Odd(), **arguments)
    assert trainer.callback_metrics["val_loss"] == plain.callback_metrics["val_loss"]


def test_small_tensors_of_one_form_are_averaged_by_one_operator(tmp_path):
    calls = {}
    for steps in (4, 8):
        with OperatorCounter() as counter:
            fit(tmp_path, EMA(0.9), steps=steps, limit_val_batches=0)
        calls[steps] = (counter.operators["aten::lerp_"], counter.operators["aten::_foreach_lerp_"])
    # The first update copies. There are vectors, and matrices of 8 and of 16 columns.
    assert calls == {4: (3 * 3, 0), 8: (3 * 7, 0)}


def test_too_many_ways_to_say_it():
    with pytest.raises(ValueError, match=r"decay=0.9, half_life=10 exclude each other"):
        EMA(decay=0.9, half_life=10)
    assert EMA().decay == 0.999
    assert EMA(half_life=100, every_n_steps=100).decay == 0.5
