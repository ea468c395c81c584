"""The table of names and steps: what it keeps, what it costs, what it draws."""

from __future__ import annotations

import math
import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from harness.operators import OperatorCounter
from harness.runs import fit
from lightning_eff.training.heat_map import HeatMap


def _filled(count, columns=8, rows=3):
    table = HeatMap([f"row {i}" for i in range(rows)], columns)
    for step in range(count):
        table.add(10 * step, torch.tensor([float(step), 2.0 * step, math.nan])[:rows])
    return table


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17, 100])
def test_a_column_is_the_mean_of_as_many_values_as_the_memory_asks_for(count):
    table = _filled(count)

    each = 1
    while count > 8 * each:
        each *= 2
    groups = [range(start, min(start + each, count)) for start in range(0, count, each)]
    means = torch.tensor([sum(group) / len(group) for group in groups])
    assert table.steps == [10 * group[0] for group in groups]
    torch.testing.assert_close(table.values()[0], means)
    torch.testing.assert_close(table.values()[1], 2 * means)
    assert table.values()[2].isnan().all()
    assert len(table) <= 8


def test_what_is_not_finite_is_left_out_of_the_mean():
    table = HeatMap(["a"], 2)
    for step, value in enumerate([1.0, math.inf, math.nan, -math.inf]):
        table.add(step, torch.tensor([value]))
    table.add(4, torch.tensor([3.0]))
    assert table.steps == [0, 4]
    torch.testing.assert_close(table.values(), torch.tensor([[1.0, 3.0]]))


def test_adding_does_not_wait():
    with OperatorCounter() as counter:
        _filled(50)
    assert counter.host_syncs == 0


def test_the_callers_tensor_is_not_kept():
    table, values = HeatMap(["a"]), torch.ones(1)
    table.add(0, values)
    values.zero_()
    assert table.values().item() == 1


@pytest.mark.parametrize("cut", [1, 8, 11, 16])
def test_a_saved_table_goes_on_exactly(cut, tmp_path):
    whole, half = _filled(30), _filled(cut)
    torch.save(half.state_dict(), tmp_path / "state.pt")
    resumed = HeatMap(half.names, 8)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    half.add(1000, torch.zeros(3))  # what was saved is a copy
    for step in range(cut, 30):
        resumed.add(10 * step, torch.tensor([float(step), 2.0 * step, math.nan]))
    one, other = whole.state_dict(), resumed.state_dict()
    for name in ("sums", "counts"):
        assert torch.equal(one.pop(name), other.pop(name))
    assert one == other


def test_a_table_of_other_names_starts_anew():
    table = HeatMap(["x", "y"], 8)
    table.load_state_dict(_filled(5, rows=2).state_dict())
    assert len(table) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"names": []}, "names=\\[\\]"), ({"names": ["a"], "columns": 3}, "columns=3 .* even")],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        HeatMap(**arguments)


def test_values_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\) do not fit 2 rows"):
        HeatMap(["a", "b"]).add(0, torch.ones(3))


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("count", [0, 1, 30])
def test_a_figure_has_the_rows_the_steps_and_the_colours(count, scale):
    pytest.importorskip("matplotlib")
    figure = _filled(count).draw("the title", scale=scale, missing="frozen")
    axes = figure.axes[0]
    assert axes.get_title() == "the title"
    assert "frozen" in axes.get_xlabel()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["row 0", "row 1", "row 2"]
    if count == 30:
        assert axes.get_xlim() == (0, 291)
        shown = axes.collections[0].get_array()
        assert shown.shape == (3, 8)
        assert shown.mask[2].all()
        assert shown.mask[0].sum() == 0  # the mean of the first four is positive on a logarithmic scale too
    figure.canvas.draw()


class _Owner(L.Callback):
    def __init__(self):
        self.table = HeatMap(["a", "b"])
        self.path = None

    def on_train_batch_end(self, trainer, *_):
        self.table.add(trainer.global_step, torch.tensor([1.0, trainer.global_step]))

    def on_train_end(self, trainer, *_):
        self.path = self.table.publish(trainer, "method/map", "a map")


def _fit(owner, tmp_path, **arguments):
    fit(BoringModel(), owner, max_steps=4, limit_val_batches=0, default_root_dir=tmp_path, **arguments)
    return owner


def test_an_image_goes_to_tensorboard_and_a_file_beside_it(tmp_path):
    pytest.importorskip("matplotlib")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    owner = _fit(_Owner(), tmp_path, logger=logger)
    assert str(owner.path) == f"{logger.log_dir}/method_map.png"
    assert owner.path.read_bytes().startswith(b"\x89PNG")
    (image,) = EventAccumulator(logger.log_dir).Reload().Images("method/map")
    assert image.step == 4
    assert min(image.width, image.height) > 100


def test_another_logger_gets_the_file_alone(tmp_path):
    pytest.importorskip("matplotlib")
    logger = CSVLogger(tmp_path)
    assert str(_fit(_Owner(), tmp_path, logger=logger).path) == f"{logger.log_dir}/method_map.png"


def test_without_a_logger_nothing_is_written(tmp_path):
    assert _fit(_Owner(), tmp_path, logger=False).path is None
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-eff\[plots\]"):
        _filled(3).draw("t")
    with pytest.warns(UserWarning, match=r"method/map is not drawn.*lightning-eff\[plots\]"):
        assert _fit(_Owner(), tmp_path, logger=CSVLogger(tmp_path)).path is None
