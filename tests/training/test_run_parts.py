"""The parts of a running Trainer's state, one by one; together they are tested by who uses them."""

from __future__ import annotations

import copy
import random
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_eff.training.logged import epoch_means, logged_values, set_epoch_means, set_logged_values
from lightning_eff.training.random_state import draw_anew, random_state, set_random_state
from lightning_eff.training.run_parts import (
    group_values,
    model_tensors,
    set_group_values,
    set_model_tensors,
    set_optimizer_states,
)
from tests.suite.models import MODELS, Net
from tests.suite.runs import fit, random_states

CPU = torch.device("cpu")


def _draws() -> list[Any]:
    return [torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()]


class TestRandomState:
    def test_it_comes_back(self):
        state = random_state(CPU)
        drawn = _draws()
        assert _draws() != drawn
        set_random_state(state, CPU)
        assert _draws() == drawn

    def test_it_goes_through_a_file_that_is_loaded_safely(self, tmp_path):
        torch.save(random_state(CPU), tmp_path / "state")
        drawn = _draws()
        set_random_state(torch.load(tmp_path / "state", weights_only=True), CPU)
        assert _draws() == drawn

    def test_numbers_drawn_anew_are_others_in_every_generator(self):
        state = random_state(CPU)
        drawn = [_draws()]
        for number in (1, 2, 2):
            draw_anew(state, number, CPU)
            drawn.append(_draws())
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert all(a != b for a, b in zip(drawn[one], drawn[other], strict=True))
        assert drawn[2] == drawn[3]

    def test_generators_that_differ_go_on_to_differ(self):
        torch.manual_seed(1)
        one = random_state(CPU)
        torch.manual_seed(2)
        other = random_state(CPU)
        drawn = []
        for state in (one, other):
            draw_anew(state, 1, CPU)
            drawn.append(torch.rand(3).tolist())
        assert drawn[0] != drawn[1]

    def test_only_the_generators_change(self):
        before = random_states()
        random_state(CPU)
        assert repr(random_states()) == repr(before)


class _Buffers(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.arange(length), persistent=False)
        self.register_buffer("count", torch.ones(1))


class TestModel:
    def test_a_table_that_has_grown_stays(self):
        """Tables of positions are made anew for longer inputs, and are in no checkpoint."""
        saved = {name: tensor.clone() for name, tensor in model_tensors(_Buffers(3)).items()}
        module = _Buffers(5)
        module.weight.data.fill_(7)
        module.count.fill_(7)
        set_model_tensors(module, saved)
        assert module.weight.tolist() == [1, 1]
        assert module.count.tolist() == [1]
        assert module.table.tolist() == [0, 1, 2, 3, 4]

    def test_an_expanded_buffer_stays(self):
        """Several of its elements are one, which nothing can have been written to."""
        module = _Buffers(3)
        module.register_buffer("mask", torch.ones(1, 2).expand(4, 2))
        saved = {name: tensor.clone() for name, tensor in model_tensors(module).items()}
        module.count.fill_(7)
        set_model_tensors(module, saved)
        assert module.count.tolist() == [1]
        assert module.mask.stride() == (0, 1)

    def test_another_shape_is_named(self):
        module = _Buffers(3)
        saved = {**model_tensors(module), "weight": torch.ones(3)}
        with pytest.raises(RuntimeError, match=r"cannot be put back: weight$"):
            set_model_tensors(module, saved)


class _WithOptimizer:
    """What there is of a Trainer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizers = [optimizer]


class TestOptimizers:
    def _stepped(self) -> tuple[Any, list[nn.Parameter]]:
        parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
        optimizer = torch.optim.AdamW(parameters[:1], lr=0.1)
        parameters[0].grad = torch.ones(2)
        optimizer.step()
        return _WithOptimizer(optimizer), parameters

    def test_a_group_that_was_added_stays_and_has_no_state(self):
        trainer, parameters = self._stepped()
        (optimizer,) = trainer.optimizers
        state = copy.deepcopy(optimizer.state_dict())
        optimizer.add_param_group({"params": parameters[1:], "lr": 0.5})
        for parameter in parameters:
            parameter.grad = torch.ones(2)
        optimizer.step()
        optimizer.state.clear()
        set_optimizer_states(trainer, [state])
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]
        assert optimizer.state[parameters[0]]["step"].item() == 1
        assert parameters[1] not in optimizer.state

    def test_a_group_that_is_gone_is_named(self):
        trainer, _ = self._stepped()
        (optimizer,) = trainer.optimizers
        state = copy.deepcopy(optimizer.state_dict())
        del optimizer.param_groups[0]
        optimizer.state.clear()
        with pytest.raises(RuntimeError, match=r"groups of optimizer 0 have changed .*sizes \[1\], now \[\]"):
            set_optimizer_states(trainer, [state])

    def test_rates_that_are_tensors_are_set_in_place(self):
        rate = torch.tensor(0.5)
        trainer: Any = _WithOptimizer(torch.optim.AdamW([nn.Parameter(torch.ones(2))], lr=rate))
        saved = group_values(trainer)
        rate.mul_(2)
        set_group_values(trainer, saved)
        assert trainer.optimizers[0].param_groups[0]["lr"] is rate
        assert rate.item() == 0.5


class _Logs(Net):
    """Logs the number of its batch in three ways."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.metric = MeanMetric()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        number = torch.tensor(float(batch_idx))
        self.log("number", number, on_step=True, on_epoch=True, batch_size=1)
        self.log("highest", number, on_step=False, on_epoch=True, reduce_fx="max", batch_size=1)
        self.metric(number)
        self.log("metric", self.metric, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


@pytest.fixture
def logs(monkeypatch):
    monkeypatch.setitem(MODELS, "logs", _Logs)


class TestLogged:
    """Six batches an epoch: 0 to 5."""

    def _run(self, tmp_path: Any, around: L.Callback, **arguments: Any) -> dict[str, float]:
        run = fit(
            None, tmp_path, around=[around], model="logs", limit_val_batches=0, val_check_interval=None, **arguments
        )
        return {name: float(value) for name, value in run.trainer.callback_metrics.items()}

    def test_steps_that_were_undone_are_in_no_mean_of_the_epoch(self, logs, tmp_path):
        class GoesBack(L.Callback):
            def on_train_batch_end(self, trainer, *_):
                if trainer.global_step == 2:
                    self.kept = copy.deepcopy(epoch_means(trainer))
                if trainer.global_step == 4:
                    set_epoch_means(trainer, self.kept)

        found = self._run(tmp_path, GoesBack(), steps=6)
        assert found["number_epoch"] == pytest.approx((0 + 1 + 4 + 5) / 4)
        assert found["metric"] == pytest.approx((0 + 1 + 4 + 5) / 4)
        assert found["highest"] == 5
        assert found["number_step"] == 5

    def test_of_another_epoch_nothing_is_left(self, logs, tmp_path):
        class GoesBack(L.Callback):
            def on_train_batch_end(self, trainer, *_):
                if trainer.global_step == 4:
                    self.kept = copy.deepcopy(epoch_means(trainer))
                if trainer.global_step == 8:  # two batches of the second epoch
                    set_epoch_means(trainer, self.kept)

        found = self._run(tmp_path, GoesBack(), steps=12)
        assert found["number_epoch"] == found["metric"] == pytest.approx((2 + 3 + 4 + 5) / 4)

    def test_what_is_logged_in_the_step_that_goes_back_is_still_shown(self, logs, tmp_path):
        shown = []

        class GoesBack(L.Callback):
            def on_train_batch_end(self, trainer, *_):
                if trainer.global_step == 1:
                    self.kept = copy.deepcopy(epoch_means(trainer))
                if trainer.global_step == 3:
                    set_epoch_means(trainer, self.kept)
                    shown.append(trainer.callback_metrics["number_step"].item())

        self._run(tmp_path, GoesBack(), steps=4)
        assert shown == [2]

    def test_a_step_that_is_repeated_twice_is_logged_once(self, logs, tmp_path):
        from lightning_eff.strategies.fault_tolerant.logged_values import LoggedValues

        class Repeats(L.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                if batch_idx == 2:
                    results = trainer.fit_loop.epoch_loop._results
                    kept = LoggedValues(results, pl_module)
                    for _ in range(2):
                        pl_module._current_fx_name = "training_step"
                        pl_module.metric(torch.tensor(100.0))
                        results["training_step.number"].update(torch.tensor(100.0), 1)
                        kept.restore()

        found = self._run(tmp_path, Repeats(), steps=6)
        assert found["metric"] == found["number_epoch"] == pytest.approx(2.5)

    def test_what_was_logged_for_the_first_time_is_forgotten(self, logs, tmp_path):
        class Repeats(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, *_):
                results = trainer.fit_loop.epoch_loop._results
                if trainer.global_step == 2:
                    saved = logged_values(results, pl_module)
                    saved = {**saved, "results": {k: v for k, v in saved["results"].items() if "highest" not in k}}
                    set_logged_values(results, pl_module, saved)
                    self.left = [key for key in results if "highest" in key]

        repeats = Repeats()
        self._run(tmp_path, repeats, steps=2)
        assert repeats.left == []
