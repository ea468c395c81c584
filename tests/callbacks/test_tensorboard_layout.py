import logging
import re
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from harness.runs import quiet_trainer
from lightning_eff.callbacks import TensorBoardLayout
from lightning_eff.callbacks.tensorboard_layout.charts import FLAT, check_charts, draws
from lightning_eff.callbacks.tensorboard_layout.listener import Listener
from lightning_eff.strategies import ArcTopK, CompressedDDPStrategy
from tests.suite.probe import Probe
from tests.suite.table import ROWS

TAG = "custom_scalars__config__"


class Clipper(Callback):
    """A callback that speaks the protocol, and does nothing else."""

    def tensorboard_charts(self, trainer):
        return {
            "norm": ["Margin", ["clip/norm", "clip/clipped", "clip/threshold"]],
            "events": ["Multiline", ["clip/fraction", "clip/skipped"]],
        }


class ChartPerOptimizer(Callback):
    def tensorboard_charts(self, trainer):
        return {f"norm {i}": ["Multiline", [f"norms/{i}"]] for i in range(len(trainer.optimizers))}


def fit(tmp_path, *callbacks, logger=None, ckpt_path=None, max_steps=2, **kwargs):
    trainer = quiet_trainer(
        *callbacks,
        accelerator="cpu",
        logger=TensorBoardLogger(tmp_path, name="", version="run") if logger is None else logger,
        default_root_dir=tmp_path,
        max_steps=max_steps,
        limit_train_batches=2,  # whole epochs: Lightning warns when a run resumes within one
        limit_val_batches=0,
        **kwargs,
    )
    trainer.fit(BoringModel(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def written(path):
    """Every layout in a log directory, as `{category: {title: (kind, tags)}}`."""
    accumulator = EventAccumulator(str(path), size_guidance={"tensors": 0}).Reload()
    if TAG not in accumulator.Tags()["tensors"]:
        return []
    assert accumulator.SummaryMetadata(TAG).plugin_data.plugin_name == "custom_scalars"
    layouts = []
    for event in accumulator.Tensors(TAG):
        proto = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
        layouts.append({c.title: {chart.title: _chart(chart) for chart in c.chart} for c in proto.category})
        assert [c.title for c in proto.category if c.closed] == [c.title for c in proto.category if c.title == FLAT]
    return layouts


def _chart(chart):
    if chart.WhichOneof("content") == "margin":
        (series,) = chart.margin.series
        return "Margin", [series.value, series.lower, series.upper]
    return "Multiline", list(chart.multiline.tag)


def test_collects_the_charts_of_every_callback_that_has_some(tmp_path):
    fit(tmp_path, TensorBoardLayout(), Clipper(), LearningRateMonitor(), Callback())
    (layout,) = written(tmp_path / "run")
    assert list(layout) == ["training", "Clipper"]
    assert list(layout["training"]) == ["loss", "learning rate"]
    assert layout["Clipper"] == {
        "norm": ("Margin", ["clip/norm", "clip/clipped", "clip/threshold"]),
        "events": ("Multiline", ["(?:clip/fraction)$", "(?:clip/skipped)$"]),
    }


@pytest.mark.parametrize(
    ("tag", "drawn"),
    [
        ("train_loss", True),
        ("train_loss_epoch", True),
        ("train/loss", True),
        ("loss", True),
        ("val_loss", False),  # in a run of its own, for its own colour
        ("dashboard/val_loss", True),
        ("dashboard/valid/loss", True),
        ("train_loss_scale", False),
        ("val_accuracy", False),
    ],
)
def test_default_loss_chart(tmp_path, tag, drawn):
    # TensorBoard draws a tag when one of the chart's patterns matches at its start.
    trainer = pl.Trainer(logger=TensorBoardLogger(tmp_path), enable_checkpointing=False, accelerator="cpu")
    layout = TensorBoardLayout()
    layout.on_train_start(trainer, BoringModel())
    trainer.logger.finalize("success")
    trainer.logger.experiment.close()
    (found,) = written(trainer.logger.log_dir)
    assert any(re.match(pattern, tag) for pattern in found["training"]["loss"][1]) is drawn


def test_own_charts_are_added_and_replace_a_category_of_the_same_name(tmp_path):
    own = {
        "accuracy": {"both": ["Multiline", ["train_acc", "val_acc"]]},
        "Clipper": {"only": ["Multiline", ["clip/norm"]]},
        "training": {},
    }
    fit(tmp_path, TensorBoardLayout(own), Clipper())
    (layout,) = written(tmp_path / "run")
    assert layout == {
        "Clipper": {"only": ("Multiline", ["(?:clip/norm)$"])},
        "accuracy": {"both": ("Multiline", ["(?:train_acc)$", "(?:val_acc)$"])},
    }


def test_nothing_is_written_when_no_chart_is_left(tmp_path):
    fit(tmp_path, TensorBoardLayout({"training": {}}))
    assert written(tmp_path / "run") == []


def test_two_callbacks_of_one_class_keep_their_charts(tmp_path):
    class Named(Clipper):
        def __init__(self, name):
            self.name = name

        @property
        def state_key(self):
            return self.name

        def tensorboard_charts(self, trainer):
            return {"norm": ["Multiline", [self.name]]}

    fit(tmp_path, TensorBoardLayout(), Named("a"), Named("b"))
    (layout,) = written(tmp_path / "run")
    assert layout["Named"] == {"norm": ("Multiline", ["(?:a)$"])}
    assert layout["Named 2"] == {"norm": ("Multiline", ["(?:b)$"])}


def test_charts_may_depend_on_the_optimizers(tmp_path):
    fit(tmp_path, TensorBoardLayout(), ChartPerOptimizer())
    (layout,) = written(tmp_path / "run")
    assert list(layout["ChartPerOptimizer"]) == ["norm 0"]


def test_a_logger_with_a_prefix_gets_tags_with_the_prefix(tmp_path):
    fit(tmp_path, TensorBoardLayout(), Clipper(), logger=TensorBoardLogger(tmp_path, "", "run", prefix="a.b"))
    (layout,) = written(tmp_path / "run")
    assert layout["Clipper"]["norm"] == ("Margin", ["a.b-clip/norm", "a.b-clip/clipped", "a.b-clip/threshold"])
    pattern = layout["Clipper"]["events"][1][0]
    assert re.match(pattern, "a.b-clip/fraction")
    assert not re.match(pattern, "axb-clip/fraction")


def test_every_tensorboard_logger_gets_it(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, "", "one"), CSVLogger(tmp_path), TensorBoardLogger(tmp_path, "", "two")]
    fit(tmp_path, TensorBoardLayout(), logger=loggers)
    assert written(tmp_path / "one") == written(tmp_path / "two") != []


@pytest.mark.parametrize("logger", [False, "csv"])
def test_no_tensorboard_logger_is_fine(tmp_path, caplog, logger):
    with caplog.at_level(logging.INFO):
        fit(tmp_path, TensorBoardLayout(), Clipper(), logger=CSVLogger(tmp_path) if logger == "csv" else logger)
    assert caplog.text.count("no TensorBoardLogger") == 1


def test_a_second_fit_does_not_write_it_again(tmp_path):
    layout = TensorBoardLayout()
    fit(tmp_path, layout, Clipper())
    fit(tmp_path, layout, Clipper())
    assert len(written(tmp_path / "run")) == 1
    fit(tmp_path, layout, Clipper(), logger=TensorBoardLogger(tmp_path, "", "other"))
    assert len(written(tmp_path / "other")) == 1


def test_resume_writes_only_what_is_new(tmp_path):
    trainer = fit(tmp_path, TensorBoardLayout(), Clipper())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["TensorBoardLayout"]
    assert list(state["written"]) == [str(tmp_path / "run")]

    fit(tmp_path, TensorBoardLayout(), Clipper(), ckpt_path=tmp_path / "a.ckpt", max_steps=4)
    assert len(written(tmp_path / "run")) == 1

    # A callback that joined the run: the dashboard must learn about it.
    fit(tmp_path, TensorBoardLayout(), Clipper(), ChartPerOptimizer(), ckpt_path=tmp_path / "a.ckpt", max_steps=4)
    before, after = written(tmp_path / "run")
    assert "ChartPerOptimizer" not in before
    assert "ChartPerOptimizer" in after


def test_only_rank_zero_collects_and_writes(tmp_path, monkeypatch):
    class Refuse(Callback):
        def tensorboard_charts(self, trainer):
            raise AssertionError("asked on another rank than zero")

    trainer = pl.Trainer(logger=TensorBoardLogger(tmp_path), callbacks=[Refuse()], accelerator="cpu")
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    TensorBoardLayout().on_train_start(trainer, BoringModel())
    assert list(tmp_path.rglob("events*")) == []


@pytest.mark.parametrize(
    ("charts", "message"),
    [
        ("x", r"charts='x' is not allowed"),
        ({"a": {"b": ["Line", ["x"]]}}, r"charts\['a'\]\['b'\] must be \['Multiline'"),
        ({"a": {"b": "x"}}, r"charts\['a'\]\['b'\] must be"),
        ({"a": ["Multiline", ["x"]]}, r"charts\['a'\] must be a dict of charts"),
        ({"a": {"b": ["Multiline", "x"]}}, "list of tags"),
        ({"a": {"b": ["Multiline", []]}}, "list of tags"),
        ({"a": {"b": ["Margin", ["x", "y"]]}}, "exactly three tags .* not 2"),
        ({"a": {"b": ["Colours", ["x"]]}}, "must have a dict .*, but it is"),
        ({"a": {"b": ["Colours", {}]}}, "must have a dict .*, but it is"),
        ({"a": {"b": ["Colours", {"../x": ["x"]}]}}, "must have a dict .*, but it is"),
        ({"a": {"b": ["Colours", {"x": []}]}}, "list of tags"),
        ({"a": {"b": ["Multiline", ["lr-("]]}}, "not a valid regular expression"),
    ],
)
def test_bad_charts_are_refused(charts, message):
    with pytest.raises(ValueError, match=message):
        TensorBoardLayout(charts)


def test_bad_charts_of_a_callback_are_refused_by_its_name(tmp_path):
    class Wrong(Callback):
        def tensorboard_charts(self, trainer):
            return {"norm": ["Margin", ["a"]]}

    with pytest.raises(ValueError, match=r"Wrong.tensorboard_charts\['norm'\]"):
        fit(tmp_path, TensorBoardLayout(), Wrong())


class Learner(BoringModel):
    """Logs a training and a validation loss that differ, and a counter that moves only when it is told to."""

    def __init__(self, moves_at=None):
        super().__init__()
        self.moves_at = moves_at

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        self.log("train_loss", self.global_step + 1.0)
        self.log("count/events", float(self.moves_at is not None and self.global_step >= self.moves_at))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.global_step + 0.5)
        self.log("ema/val_loss", self.global_step + 0.25)


class Counter(Callback):
    """One chart that is flat until something happens, one of what is never logged, one that moves, one in colours."""

    def tensorboard_charts(self, trainer):
        return {
            "events": ["Multiline", ["count/events"]],
            "never": ["Multiline", ["count/never"]],
            "moves": ["Margin", ["train_loss", "train_loss", "train_loss"]],
            "averages": ["Colours", {"validation": ["val_loss"], "ema": ["ema/val_loss"]}],
        }


def learn(tmp_path, module, *, steps=8, logger=None, layout=None, ckpt_path=None):
    trainer = quiet_trainer(
        layout or TensorBoardLayout(),
        Counter(),
        accelerator="cpu",
        logger=logger or TensorBoardLogger(tmp_path, name="", version="run"),
        default_root_dir=tmp_path,
        max_steps=steps,
        limit_train_batches=4,
        limit_val_batches=1,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def scalars(path, tag):
    return [(event.step, event.value) for event in EventAccumulator(str(path)).Reload().Scalars(tag)]


def test_a_validation_loss_has_a_run_and_so_a_colour_of_its_own(tmp_path):
    learn(tmp_path, Learner())
    losses = scalars(tmp_path / "run", "val_loss")
    assert [value for _, value in losses] == [4.5, 8.5]
    assert scalars(tmp_path / "run" / "validation", "dashboard/val_loss") == losses  # the same steps and values
    assert [value for _, value in scalars(tmp_path / "run" / "ema", "dashboard/ema/val_loss")] == [4.25, 8.25]
    # Whatever run TensorBoard looks in, a chart draws each curve once.
    runs = {"run": ["train_loss", "val_loss", "ema/val_loss"], "run/validation": ["dashboard/val_loss"]}
    loss = written(tmp_path / "run")[-1]["training"]["loss"][1]
    drawn = [(run, tag) for run, tags in runs.items() for tag in tags if any(re.match(p, tag) for p in loss)]
    assert drawn == [("run", "train_loss"), ("run/validation", "dashboard/val_loss")]


def test_copies_have_the_logger_s_prefix(tmp_path):
    learn(tmp_path, Learner(), logger=TensorBoardLogger(tmp_path, "", "run", prefix="p"))
    assert len(scalars(tmp_path / "run" / "validation", "dashboard/p-val_loss")) == 2
    assert re.match(written(tmp_path / "run")[-1]["training"]["loss"][1][1], "dashboard/p-val_loss")


def test_what_is_flat_is_folded_and_comes_back_when_it_moves(tmp_path):
    learn(tmp_path, Learner(moves_at=6))
    first, flat, last = written(tmp_path / "run")
    assert list(first["Counter"]) == ["events", "never", "moves", "averages"]
    assert list(flat["Counter"]) == ["moves", "averages"]  # one validation loss is too few to be called flat
    assert list(flat[FLAT]) == ["Counter: events", "Counter: never"]
    assert list(flat)[-1] == FLAT
    assert list(last["Counter"]) == ["events", "moves", "averages"]
    assert list(last[FLAT]) == ["Counter: never"]


def test_what_the_user_has_asked_for_and_the_losses_are_not_folded(tmp_path):
    layout = TensorBoardLayout({"mine": {"events": ["Multiline", ["count/events"]]}})
    learn(tmp_path, Learner(), layout=layout)
    last = written(tmp_path / "run")[-1]
    assert list(last["mine"]) == ["events"]
    assert "Counter: events" in last[FLAT]


def test_a_resumed_run_knows_what_has_moved(tmp_path):
    learn(tmp_path, Learner(moves_at=2)).save_checkpoint(tmp_path / "a.ckpt")
    before = written(tmp_path / "run")
    learn(tmp_path, Learner(moves_at=0), steps=12, ckpt_path=tmp_path / "a.ckpt")  # a 1 from now on
    assert written(tmp_path / "run") == before


def test_another_replica_may_write_meanwhile(tmp_path, monkeypatch):
    """With ddp_ft the one that wrote at first may come back as one that does not."""

    class Hands(Learner):
        def on_train_batch_start(self, batch, batch_idx):
            monkeypatch.setattr(rank_zero_only, "rank", int(self.global_step < 4))

    learn(tmp_path, Hands())
    assert scalars(tmp_path / "run" / "validation", "dashboard/val_loss") == [(7, 8.5)]


def test_a_replica_that_begins_to_write_later_writes_the_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(SingleDeviceStrategy, "is_global_zero", property(lambda self: rank_zero_only.rank == 0))
    monkeypatch.setattr(rank_zero_only, "rank", 1)

    class Takes(Learner):
        def on_train_batch_start(self, batch, batch_idx):
            monkeypatch.setattr(rank_zero_only, "rank", int(self.global_step < 2))

    learn(tmp_path, Takes())
    assert written(tmp_path / "run")


def test_the_logger_is_left_as_it_was(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run")

    class Failing(Learner):
        def on_train_batch_end(self, *_):
            assert "log_metrics" in vars(logger)
            raise RuntimeError("it fails")

    learn(tmp_path, Learner(), logger=logger)
    assert "log_metrics" not in vars(logger)
    with pytest.raises(RuntimeError, match="it fails"):
        learn(tmp_path, Failing(), logger=logger)
    assert "log_metrics" not in vars(logger)


def test_not_a_number_is_one_value(tmp_path):
    listener = Listener(TensorBoardLogger(tmp_path), {}, {})
    chart = ["Multiline", ["a|b"]]
    for _ in range(3):
        listener.logger.log_metrics({"a": float("nan")}, 0)
    assert listener.is_flat(chart)
    listener.logger.log_metrics({"a": 1.0}, 0)
    assert not listener.is_flat(chart)
    listener.leave()
    listener.logger.finalize("success")


NOT_DRAWN = "|".join(
    (
        r"zclip/(mean|std|spikes|relearned)",  # of `log_details`
        r"gradients/max_abs",
        r"gradients/\w+/(max_abs|zeros|nonfinite)",  # by role, where the whole model's are drawn
        r"grades/frozen_params",  # the share of them is
        r"spectral_alignment/worst_layer",  # an index is no curve
    )
)


@pytest.mark.parametrize("row", [row for row in ROWS if row.tags and row.callback is not Probe], ids=lambda row: row.id)
def test_what_a_callback_of_the_suite_logs_has_a_chart(row):
    trainer = SimpleNamespace(optimizers=[None], strategy=CompressedDDPStrategy(ArcTopK()))
    charts = row.build().tensorboard_charts(trainer)
    check_charts(charts, row.id)
    for tag in row.tags:
        assert any(draws(chart, tag) for chart in charts.values()) != bool(re.fullmatch(NOT_DRAWN, tag)), tag
    for kind, tags in charts.values():  # curves of one run look alike: one a chart, or a bundle of a pattern
        assert kind != "Multiline" or len(tags) == 1
