"""One TensorBoard dashboard for whatever callbacks are in the Trainer."""

from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_eff.arguments import check
from lightning_eff.callbacks.tensorboard_layout.charts import (
    FLAT,
    Charts,
    as_logged,
    check_charts,
    copied_to,
    write_layout,
)
from lightning_eff.callbacks.tensorboard_layout.listener import Listener, writes_now
from lightning_eff.training.hooks import HasCharts
from lightning_eff.training.namespaces import is_a
from lightning_eff.training.state_version import check_version
from lightning_eff.training.trainer import callbacks_of

# The names that Lightning's users give to a loss: `train_loss`, `val/loss`, `train_loss_step`, `loss`.
_LOSSES = {"": [r"(train(ing)?[_/.-])?loss(_step|_epoch)?"], "validation": [r"val(id|idation)?[_/.-]loss(_epoch)?"]}


class TensorBoardLayout(Callback):
    """Write a custom-scalars layout, so that TensorBoard opens on the charts that matter.

    Every callback in the Trainer that has a method ``tensorboard_charts(trainer)`` gets a category of its own, next to
    a category ``training`` with the losses and, with a ``LearningRateMonitor``, the learning rates. The charts are in
    TensorBoard's tab "Custom Scalars" (``http://localhost:6006/#custom_scalars``). Without a ``TensorBoardLogger``
    the callback does nothing.

    The form of a chart is that of ``SummaryWriter.add_custom_scalars``. The tags of a ``Multiline`` chart are regular
    expressions, and here they match a whole tag: TensorBoard alone would also draw ``zclip/grad_norm_clipped`` for
    ``zclip/grad_norm``. The three tags of a ``Margin`` chart (value, lower, upper) are names.

    TensorBoard colours by run: all curves of a run look alike but for their marks. ``["Colours", {"": ["train_loss"],
    "validation": ["val_loss"]}]`` draws each group in a colour of its own, the one without a name in the logger's;
    what belongs to the others is also written to a run of that name below the logger's. The losses are drawn so.

    A callback's chart in which nothing moves, such as the rollbacks of a run that had none, goes to a category
    ``flat so far`` at the end, which is folded. That is judged anew after every validation and at the end of the fit,
    and a chart in which something has happened comes back to its place.

    Runs in: ``on_train_start``, ``on_validation_end``, ``on_train_end``, and where a logger is given its numbers.
    Reads: the callbacks and loggers of the Trainer, and the scalars that are logged.
    Changes: nothing in training; writes into the event files of each ``TensorBoardLogger``.
    Collectives: none; rank zero alone collects and writes.
    Host syncs: none; it sees a number when the logger has it.
    Strategies: all.

    The layout is written once for each log directory, and again when the charts have changed; TensorBoard shows the
    latest.

    Args:
        charts: Charts of your own, ``{category: {chart title: chart}}``. A category with the name of one that is there
            replaces it; ``{"training": {}}`` leaves the default losses out.

    Raises:
        ValueError: A chart, given here or by a callback, that TensorBoard could not draw.

    Example:
        >>> import lightning.pytorch as pl
        >>> from lightning_eff.callbacks import TensorBoardLayout
        >>> layout = TensorBoardLayout(charts={"accuracy": {"train and val": ["Multiline", ["train_acc", "val_acc"]]}})
        >>> trainer = pl.Trainer(callbacks=[layout], logger=False)
        >>> sorted(layout.layout(trainer))
        ['accuracy', 'training']

    """

    def __init__(self, charts: dict[str, dict[str, list[Any]]] | None = None) -> None:
        check(
            "charts", charts, charts is None or isinstance(charts, dict), "a dict {category: {title: chart}}, or None"
        )
        self.charts = charts or {}
        for category, category_charts in self.charts.items():
            check_charts(category_charts, f"charts[{category!r}]")
        self._written: dict[str, dict[str, Charts]] = {}
        self._seen: dict[str, dict[str, list[Any]]] = {}
        self._listeners: list[Listener] = []
        self._begun = False

    def layout(self, trainer: "pl.Trainer") -> dict[str, Charts]:
        """Collect the charts of this Trainer, ``{category: {chart title: chart}}``."""
        training: Charts = {"loss": ["Colours", _LOSSES]}
        callbacks = callbacks_of(trainer)
        if any(is_a(callback, LearningRateMonitor) for callback in callbacks):
            training["learning rate"] = ["Multiline", ["lr-.*"]]
        layout = {"training": training}
        for callback in callbacks:
            if not isinstance(callback, HasCharts):
                continue
            charts = callback.tensorboard_charts(trainer)
            check_charts(charts, f"{type(callback).__name__}.tensorboard_charts")
            layout[_free_name(type(callback).__name__, layout)] = charts
        layout.update(self.charts)
        return {category: charts for category, charts in layout.items() if charts}

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        # Here and not earlier: the charts may depend on the optimizers and on state that was restored.
        self._leave()
        self._begun = False
        self._begin(trainer)

    def _begin(self, trainer: "pl.Trainer") -> None:
        """Once, where the loggers write: with `ddp_ft` that may be here only when the one that wrote has died."""
        if self._begun or not trainer.is_global_zero:
            return
        self._begun = True
        loggers = [logger for logger in trainer.loggers if is_a(logger, TensorBoardLogger)]
        if not loggers:
            found = "" if find_spec("tensorboard") else ", which needs: pip install 'lightning-eff[tensorboard]'"
            rank_zero_info(f"TensorBoardLayout: the Trainer has no TensorBoardLogger{found}. No layout is written.")
            return
        layout = self.layout(trainer)
        for logger in loggers:
            self._listeners.append(Listener(logger, copied_to(layout), self._seen.get(logger.log_dir, {})))
        self._write(layout)

    def _write(self, layout: dict[str, Charts]) -> None:
        """Write the layout where it is another than what was written last."""
        for listener in self._listeners:
            logger = listener.logger
            self._seen[logger.log_dir] = listener.seen
            named = as_logged(self._folded(layout, listener), logger)
            if not named or self._written.get(logger.log_dir) == named:
                continue
            # Through the logger's own writer: TensorBoard stops reading a run's older event file when a newer one
            # appears beside it, so a file of ours would hide what the logger writes from then on.
            write_layout(logger.experiment, named)
            logger.experiment.flush()  # else the tab is empty for the first two minutes
            self._written[logger.log_dir] = named

    def _folded(self, layout: dict[str, Charts], listener: Listener) -> dict[str, Charts]:
        """Put what is flat into a category of its own, but for the losses and what the user has asked for."""
        open_charts: dict[str, Charts] = {}
        flat: Charts = {}
        for category, charts in layout.items():
            for title, chart in charts.items():
                if category != "training" and category not in self.charts and listener.is_flat(chart):
                    flat[f"{category}: {title}"] = chart
                else:
                    open_charts.setdefault(category, {})[title] = chart
        return {**open_charts, FLAT: flat} if flat else open_charts

    def _write_again(self, trainer: "pl.Trainer") -> None:
        if not writes_now() or trainer.sanity_checking:
            return
        if self._listeners:
            self._write(self.layout(trainer))
        else:
            self._begin(trainer)

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._write_again(trainer)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._write_again(trainer)

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        self._leave()

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._leave()

    def _leave(self) -> None:
        for listener in self._listeners:
            listener.leave()
        self._listeners = []

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"version": 1, "written": self._written, "seen": self._seen}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_version("TensorBoardLayout", state_dict, known=1)
        self._written = dict(state_dict["written"])
        self._seen = dict(state_dict.get("seen", {}))  # 0.1 had none

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_listeners": []}


def _free_name(name: str, taken: dict[str, Charts]) -> str:
    """Two callbacks of one class get two categories."""
    free, number = name, 2
    while free in taken:
        free, number = f"{name} {number}", number + 1
    return free
