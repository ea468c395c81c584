"""Every way to train does the same: accumulation, ranks, precision, compilation, manual optimization, odd data."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner

from harness.poison import PoisonedEmpty
from tests.suite.device import DEVICE
from tests.suite.models import STEPS, EndlessIndices, Indices, Net
from tests.suite.rules.registry import rule
from tests.suite.runs import Place, build_trainer, differences, fit
from tests.suite.table import ARC_TOPK, DDP, FSDP2, Row, Strategy

# Sums of eight numbers in another order, through ten steps with momentum.
_CLOSE = {"rtol": 1e-3, "atol": 1e-5}
_SGD = {"optimizer": "sgd"}


@rule()
def accumulates(row: Row, place: Place) -> None:
    """Two micro-batches are one step: the same weights and state as with the whole batch at once."""
    whole = fit(row, place.folder, model_arguments=_SGD)
    halves = fit(
        row, place.folder, model_arguments=_SGD | {"micro_batches": 2}, accumulate_grad_batches=2, val_check_interval=6
    )
    assert halves.trainer.global_step == whole.trainer.global_step == STEPS
    wrong = differences(_rounded(row, whole.outcome()), _rounded(row, halves.outcome()), **_CLOSE)
    assert not wrong, wrong


@rule(DDP, FSDP2, ARC_TOPK)
def ranks_agree(row: Row, place: Place) -> None:
    """Two ranks with half of a batch each end with equal bits, and close to one device with the whole batch."""
    one, other = place.run(_outcome, row, place.strategy, place.folder)
    wrong = differences(one, other)
    assert not wrong, f"rank 0 against rank 1: {wrong}"
    if place.strategy.lossy:
        return
    wrong = differences(_rounded(row, _outcome(row, None, place.folder)), _rounded(row, one), **_CLOSE)
    assert not wrong, f"one device against two ranks: {wrong}"


def _rounded(row: Row, outcome: dict[str, Any]) -> dict[str, Any]:
    """Without what is close to itself in the same order of summation only."""
    state = outcome["callback"] or {}
    return outcome | {"callback": {name: value for name, value in state.items() if name not in row.hangs_on_rounding}}


def _outcome(row: Row, strategy: Strategy | None, folder: Path) -> dict[str, Any]:
    run = fit(row, folder, model_arguments=_SGD, **({"strategy": strategy} if strategy else {}))
    outcome = run.outcome()
    outcome.pop("optimizers")  # FSDP2's state dict names its entries otherwise; the weights follow from it anyway
    return outcome


@rule()
def trains_in_bfloat16(row: Row, place: Place) -> None:
    """`bf16-mixed`: the weights stay finite and float32, and move."""
    _assert_trained(fit(row, place.folder, precision="bf16-mixed"))


@rule()
def survives_overflow(row: Row, place: Place) -> None:
    """`16-mixed`: steps that the GradScaler drops leave no trace in the weights that follow."""
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**40, backoff_factor=2.0**-15, growth_interval=1000)
    overflowed = fit(row, place.folder, plugins=[_half(scaler)])
    drops = {2.0**25: 1, 2.0**10: 2, 2.0**-5: 3}.get(scaler.get_scale())
    assert drops, f"the scale went from 2^40 to {scaler.get_scale()}: no overflow, or one at every step"
    _assert_trained(overflowed)
    state = overflowed.outcome()["callback"]
    assert not _not_numbers(state), f"NaN in the state: {_not_numbers(state)}"

    scaler = torch.amp.GradScaler(DEVICE, init_scale=scaler.get_scale(), growth_interval=1000)
    later = {"skip_steps": drops}
    without = fit(row, place.folder, plugins=[_half(scaler)], steps=STEPS - drops, model_arguments=later)
    wrong = differences(without.parameters(), overflowed.parameters())
    assert not wrong, f"the {drops} dropped steps left a trace: {wrong}"


def _half(scaler: torch.amp.GradScaler) -> MixedPrecision:
    # Passed as a plugin: `precision="16-mixed"` on the CPU becomes bfloat16, which needs no scaler.
    return MixedPrecision("16-mixed", DEVICE, scaler)


@rule()
def trains_compiled(row: Row, place: Place) -> None:
    """A compiled module trains to the same weights and state."""
    plain = fit(row, place.folder, model_arguments=_SGD)
    with warnings.catch_warnings():
        # Dynamo looks at every tensor that it traces, also at the `.grad` of those that have none.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        compiled = fit(row, place.folder, model_arguments=_SGD | {"compiled": True})
    wrong = differences(plain.outcome(), compiled.outcome(), **_CLOSE)
    assert not wrong, wrong


@rule()
def trains_two_optimizers_by_hand(row: Row, place: Place) -> None:
    """Manual optimization with two optimizers trains both."""
    if "gan" in row.refused_models:
        return  # `refuses_conflicts` checks how
    _assert_trained(fit(row, place.folder, model="gan"))


@rule()
def ignores_the_sanity_check(row: Row, place: Place) -> None:
    """Validation before the first step changes nothing."""
    checked = fit(row, place.folder, num_sanity_val_steps=2)
    unchecked = fit(row, place.folder, num_sanity_val_steps=0)
    wrong = differences(unchecked.outcome(), checked.outcome())
    assert not wrong, wrong


@rule()
def evaluates_on_two_loaders(row: Row, place: Place) -> None:
    """Two loaders in `fit`, `validate` and `test`: the metrics of each are there, under the names that they have."""
    model = Net()
    model.validation_loaders = 2
    trainer = build_trainer(place.folder, place.strategy, [row.build()], [], model, 6, {})
    names = {f"val_loss/dataloader_idx_{index}" for index in range(2)}
    for run in (trainer.fit, trainer.validate, trainer.test):
        try:
            run(model)
        except Exception as error:
            raise AssertionError(f"{run.__name__} does not run: {error}") from error
        assert names <= set(trainer.callback_metrics), f"in {run.__name__} there is {sorted(trainer.callback_metrics)}"


@rule()
def takes_data_without_a_length(row: Row, place: Place) -> None:
    """Endless data trains as an epoch of known length does."""
    known = fit(row, place.folder, data=Indices(STEPS), val_check_interval=None, limit_val_batches=0)
    endless = fit(row, place.folder, data=EndlessIndices(), val_check_interval=None, limit_val_batches=0)
    wrong = differences(known.outcome(), endless.outcome())
    assert not wrong, wrong
    validated = fit(row, place.folder, data=EndlessIndices(), check_val_every_n_epoch=None)
    assert validated.trainer.global_step == STEPS


@rule()
def reads_no_memory_that_it_did_not_write(row: Row, place: Place) -> None:
    """With NaN in all that `torch.empty` returns, nothing changes."""
    clean = fit(row, place.folder).outcome()
    with PoisonedEmpty():
        poisoned = fit(row, place.folder).outcome()
    wrong = differences(clean, poisoned)
    assert not wrong, wrong


@rule()
def fits_twice(row: Row, place: Place) -> None:
    """A second `fit` on the same objects goes on, and a new Trainer takes the used callback."""
    run = fit(row, place.folder)
    before = run.parameters()
    run.trainer.fit_loop.epoch_loop.max_steps += STEPS
    run.trainer.fit(run.model)
    assert run.trainer.global_step == 2 * STEPS
    assert differences(before, run.parameters()), "the second fit changed nothing"
    _assert_trained(run)
    _assert_trained(fit(row, place.folder, callback=run.callback))


@rule()
def leaves_the_learning_rate_finder_alone(row: Row, place: Place) -> None:
    """After `lr_find` a fit ends as without it."""
    plain = fit(row, place.folder).outcome()
    callback, model = row.build(), Net()
    trainer = build_trainer(place.folder, place.strategy, [callback], [], model, STEPS, {})
    Tuner(trainer).lr_find(model, num_training=3, early_stop_threshold=None, update_attr=False)
    trainer.fit(model)
    found = {
        "parameters": {name: parameter.detach() for name, parameter in model.named_parameters()},
        "callback": callback.state_dict(),
    }
    wrong = differences({key: plain[key] for key in found}, found)
    assert not wrong, wrong


def _assert_trained(run: Any) -> None:
    untrained = dict(type(run.model)().named_parameters())
    for name, parameter in run.parameters().items():
        assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}"
        assert parameter.isfinite().all(), f"{name} is not finite"
    weights = run.parameters()  # some may be others than before: a method may have put them there
    same = [n for n, weight in untrained.items() if n in weights and torch.equal(weights[n], weight)]
    moved = sorted(set(weights) - set(same))
    assert len(moved) > len(untrained) / 2, f"only {moved} moved"


def _not_numbers(value: Any, where: str = "state") -> list[str]:
    if isinstance(value, dict):
        return [text for key, entry in value.items() for text in _not_numbers(entry, f"{where}.{key}")]
    if isinstance(value, list | tuple):
        return [text for i, entry in enumerate(value) for text in _not_numbers(entry, f"{where}[{i}]")]
    bad = isinstance(value, torch.Tensor | float) and bool(torch.as_tensor(value).isnan().any())
    return [where] if bad else []
