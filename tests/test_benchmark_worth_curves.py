"""Averages, branched decays, compression in a decay, GradES beside EarlyStopping: what is compared is what is said."""

from __future__ import annotations

import math
from functools import partial

import lightning as L
import pytest
import torch

from benchmarks import grades_records
from benchmarks.worth import averaging, compression, grades
from benchmarks.worth.clips import Fixed
from benchmarks.worth.stacks import Stack
from benchmarks.worth.workloads import WORKLOADS
from examples.gpt.data import find_files, is_validation
from examples.gpt.model import GPT
from lightning_eff.callbacks import GradES
from lightning_eff.compression import BF16
from lightning_eff.functional.wsd import WSD


def _stack() -> Stack:
    return Stack(WORKLOADS["CNN"], [3, 4], [partial(Fixed, math.inf)] * 2, 0.05)


def _train(stack, schedule, begin, end):
    for step in range(begin, end):
        stack.step(step)
        schedule.step()


def test_a_decay_that_branches_off_is_the_run_that_had_it_from_the_start_and_leaves_its_own_alone(monkeypatch):
    monkeypatch.setattr(averaging, "WARM_UP", 2)
    planned, stable, alone = _stack(), _stack(), _stack()
    _train(planned, WSD(planned.optimizers[""], ends=9, warmup_steps=2, decay_steps=4), 0, 9)
    schedules = [WSD(each.optimizers[""], ends=100, warmup_steps=2) for each in (stable, alone)]
    _train(stable, schedules[0], 0, 5)
    decayed = averaging._decayed(stable, schedules[0], 5, 9)
    _train(stable, schedules[0], 5, 7)
    _train(alone, schedules[1], 0, 7)

    torch.testing.assert_close(decayed, planned.score(), rtol=0, atol=0)
    for name, value in stable.parameters.items():
        assert torch.equal(value, alone.parameters[name])


def test_averages_are_of_the_last_snapshots_and_of_every_step(monkeypatch):
    monkeypatch.setattr(averaging, "WARM_UP", 0)
    stack = _stack()
    averages = averaging.Averages(stack)
    name, value = next(iter(stack.parameters.items()))
    start = value.detach().clone()
    for step in range(1, 41):
        with torch.no_grad():
            value.add_(1)
        averages.update(step)

    torch.testing.assert_close(averages.of(40, number=3, apart=10)[name], start + 30)
    kept = 0.5 ** (1 / 25)
    behind = sum((1 - kept) * kept**age * age for age in range(40)) + kept**40 * 40
    torch.testing.assert_close(averages.ema[25][name], start + 40 - behind)


def test_noise_is_what_a_straight_line_leaves():
    line = torch.linspace(2, 1, 101)
    about = 0.1 * torch.tensor([1.0, -1.0]).repeat(51)[:101]
    found = averaging._noise(torch.stack([line + about, line - about], 1))

    assert found["checkpoint_sd"] == pytest.approx(0.1, rel=0.02)
    assert found["seed_sd"] == pytest.approx(0.2 / math.sqrt(2), rel=1e-3)
    assert averaging._noise(line[:, None].repeat(1, 2))["later_is_better"] == 1.0


def test_a_compressed_run_is_dense_training_but_for_what_the_compressor_loses(monkeypatch):
    monkeypatch.setattr(compression, "STEPS", 8)
    monkeypatch.setattr(compression, "WARM_UP", 2)
    dense = compression.train(None, 0)

    assert compression.train(BF16(), 0) == pytest.approx(dense, abs=1e-3)
    assert dense[1] < dense[0] < math.log(256)


def test_evaluations_are_those_of_the_last_third_and_smoothing_is_of_the_curve_alone(monkeypatch):
    monkeypatch.setattr(averaging, "STEPS", 120)
    stack = _stack()
    averages = averaging.Averages(stack)
    evaluations, scores = averaging.Evaluations(stack, averages, "cosine"), []
    for step in range(1, 121):
        stack.step(step - 1)
        averages.update(step)
        evaluations.look(step)
        if step % 10 == 0:
            scores.append(stack.score())

    live, smoothed, ema, snapshots = evaluations.losses.values()
    assert [len(each) for each in evaluations.losses.values()] == [4] * 4
    torch.testing.assert_close(torch.stack(live), torch.stack(scores[-4:]), rtol=0, atol=0)
    torch.testing.assert_close(smoothed[-1], torch.stack(scores[-8:]).mean(0))
    torch.testing.assert_close(ema[-1], stack.score(averages.ema[25]), rtol=0, atol=0)
    torch.testing.assert_close(snapshots[-1], stack.score(averages.of(120)), rtol=0, atol=0)
    assert list(evaluations.losses)[:2] == ["cosine", "cosine, mean of its last 8 losses"]


@pytest.fixture
def short_cnn(monkeypatch):
    runs = grades_records.RUNS
    monkeypatch.setitem(runs, "CNN, cosine", (*runs["CNN, cosine"][:2], 40))
    monkeypatch.setattr(grades, "VALIDATIONS", 4)
    monkeypatch.setattr(grades, "LOOK_EVERY", 5)


@pytest.mark.parametrize("arm", grades.ARMS)
def test_only_early_stopping_validates(arm, short_cnn):
    row = grades.train("CNN, cosine", 0, arm, wanted=0.0)

    assert (row["validating"] > 0) == (row["best"] != "") == (arm == "EarlyStopping")
    assert row["seconds"] > max(row["validating"], row["reached_s"]) > 0
    assert row["steps"] == 40
    assert grades.train("CNN, cosine", 0, arm, wanted=1.1)["reached_s"] == ""


def test_what_goes_on_saves_by_freezing_alone(short_cnn, monkeypatch):
    now = {"metric": "grad", "tau_mode": "absolute", "tau": 1e9, "alpha": 0.5, "every_n_steps": 1, "patience": 1}
    monkeypatch.setattr(grades, "GradES", partial(GradES, **now))
    stops, goes_on = (grades.train("CNN, cosine", 0, arm) for arm in ("GradES()", grades.GOES_ON))

    assert stops["steps"] < goes_on["steps"] == 40
    assert stops["frozen"] == goes_on["frozen"] == 4
    assert stops["spared"] == 0 < goes_on["spared"] < 0.5


def test_what_is_spared_is_the_weight_gradients_of_the_steps_behind_a_freezing():
    module = L.LightningModule()
    module.net = torch.nn.Sequential(torch.nn.Linear(4, 5, bias=False), torch.nn.Linear(5, 6, bias=False))
    # A pass: 2 * 20 for the first, 2 * 30 twice for the second, whose weight gradient is left out in 3 of 10 steps.
    assert grades.spared(module, {"net.1.weight": 7}, 10) == pytest.approx(60 / 160 * 0.3)
    assert module.net[1].weight.requires_grad


def test_held_out_snippets_are_of_other_files():
    train, held_out = grades_records._snippets()
    count = len(grades_records.PACKAGES)
    for (pieces, labels), number in zip((train, held_out), grades_records.SNIPPETS, strict=True):
        assert pieces.shape == (count * number, grades_records.LENGTH)
        assert labels.bincount().tolist() == [number] * count
    library = grades_records.LIBRARY
    files = [file for package in grades_records.PACKAGES for file in find_files(library / package, "*.py")]
    away = [file for file in files if is_validation(file.relative_to(library).as_posix(), 0.2)]
    text = b"\0".join(file.read_bytes() for file in away)
    inside = [sum(bytes(piece.tolist()) in text for piece in pieces) / len(pieces) for pieces, _ in (train, held_out)]
    assert inside[0] < 0.05  # some pieces are the same everywhere: blanks, licences
    assert inside[1] > 0.95  # all but those that lie across the ends of two files of a package


def test_a_classifier_hears_every_byte():
    net = grades_records.Classifier(GPT(grades_records.CONFIG), 8)
    tokens = torch.randint(256, (2, 64))
    other = tokens.clone()
    other[0, 0] += 1
    changed = (net(tokens) - net(other % 256)).abs().sum(1)
    assert changed[0] > 0
    assert changed[1] == 0
