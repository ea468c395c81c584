"""One TensorBoard dashboard for whatever callbacks are in the Trainer."""

import re
from importlib.util import find_spec
from typing import Any, TypeAlias

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_eff.arguments import check
from lightning_eff.training.hooks import HasCharts
from lightning_eff.training.namespaces import is_a
from lightning_eff.training.state_version import check_version
from lightning_eff.training.trainer import callbacks_of

Charts: TypeAlias = dict[str, list[Any]]
"""``{chart title: ["Multiline", [tag, ...]] or ["Margin", [value, lower, upper]]}``."""

# The names that Lightning's users give to a loss: `train_loss`, `val/loss`, `train_loss_step`, `loss`.
_LOSS_TAGS = [r"(train(ing)?[_/.-])?loss(_step|_epoch)?", r"val(id|idation)?[_/.-]loss(_epoch)?"]


class TensorBoardLayout(Callback):
    """Write a custom-scalars layout, so that TensorBoard opens on the charts that matter.

    Every callback in the Trainer that has a method ``tensorboard_charts(trainer)`` gets a category of its own, next to
    a category ``training`` with the losses and, with a ``LearningRateMonitor``, the learning rates. The charts are in
    TensorBoard's tab "Custom Scalars" (``http://localhost:6006/#custom_scalars``). Without a ``TensorBoardLogger``
    the callback does nothing.

    The form of a chart is that of ``SummaryWriter.add_custom_scalars``. The tags of a ``Multiline`` chart are regular
    expressions, and here they match a whole tag: TensorBoard alone would also draw ``zclip/grad_norm_clipped`` for
    ``zclip/grad_norm``. The three tags of a ``Margin`` chart (value, lower, upper) are names.

    Runs in: ``on_train_start``.
    Reads: the callbacks and loggers of the Trainer.
    Changes: nothing in training; writes one summary into the event file of each ``TensorBoardLogger``.
    Collectives: none; rank zero alone collects and writes.
    Host syncs: none.
    Strategies: all.

    The layout is written once for each log directory. A second ``fit`` and a run that resumes into the same directory
    write it again only when the charts have changed; TensorBoard shows the latest.

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
            _check(category_charts, f"charts[{category!r}]")
        self._written: dict[str, dict[str, Charts]] = {}

    def layout(self, trainer: "pl.Trainer") -> dict[str, Charts]:
        """Collect the charts of this Trainer, ``{category: {chart title: chart}}``."""
        training: Charts = {"loss": ["Multiline", _LOSS_TAGS]}
        callbacks = callbacks_of(trainer)
        if any(is_a(callback, LearningRateMonitor) for callback in callbacks):
            training["learning rate"] = ["Multiline", ["lr-.*"]]
        layout = {"training": training}
        for callback in callbacks:
            if not isinstance(callback, HasCharts):
                continue
            charts = callback.tensorboard_charts(trainer)
            _check(charts, f"{type(callback).__name__}.tensorboard_charts")
            layout[_free_name(type(callback).__name__, layout)] = charts
        layout.update(self.charts)
        return {category: charts for category, charts in layout.items() if charts}

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        # Here and not earlier: the charts may depend on the optimizers and on state that was restored.
        if not trainer.is_global_zero:
            return
        loggers = [logger for logger in trainer.loggers if is_a(logger, TensorBoardLogger)]
        if not loggers:
            found = "" if find_spec("tensorboard") else ", which needs: pip install 'lightning-eff[tensorboard]'"
            rank_zero_info(f"TensorBoardLayout: the Trainer has no TensorBoardLogger{found}. No layout is written.")
            return
        layout = self.layout(trainer)
        for logger in loggers:
            named = _as_logged(layout, logger)
            if not named or self._written.get(logger.log_dir) == named:
                continue
            # Through the logger's own writer: TensorBoard stops reading a run's older event file when a newer one
            # appears beside it, so a file of ours would hide what the logger writes from then on.
            logger.experiment.add_custom_scalars(named)
            logger.experiment.flush()  # else the tab is empty for the first two minutes
            self._written[logger.log_dir] = named

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"version": 1, "written": self._written}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_version("TensorBoardLayout", state_dict, known=1)
        self._written = dict(state_dict["written"])


def _free_name(name: str, taken: dict[str, Charts]) -> str:
    """Two callbacks of one class get two categories."""
    free, number = name, 2
    while free in taken:
        free, number = f"{name} {number}", number + 1
    return free


def _as_logged(layout: dict[str, Charts], logger: TensorBoardLogger) -> dict[str, Charts]:
    """Write the tags as this logger does, with its prefix, and end every pattern where the tag ends."""
    prefix = f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""
    pattern_prefix = re.escape(prefix)
    return {
        category: {
            title: [kind, [prefix + tag if kind == "Margin" else f"{pattern_prefix}(?:{tag})$" for tag in tags]]
            for title, (kind, tags) in charts.items()
        }
        for category, charts in layout.items()
    }


def _check(charts: object, source: str) -> None:
    """Refuse what TensorBoard would leave out without a word."""
    if not isinstance(charts, dict):
        raise ValueError(f"{source} must be a dict of charts, {{title: [kind, tags]}}, but it is {charts!r}.")
    for title, chart in charts.items():
        where = f"{source}[{title!r}]"
        if not isinstance(chart, list | tuple) or len(chart) != 2 or chart[0] not in ("Multiline", "Margin"):
            raise ValueError(
                f"{where} must be ['Multiline', [tag, ...]] or ['Margin', [value, lower, upper]], but it is {chart!r}."
            )
        kind, tags = chart
        if not isinstance(tags, list | tuple) or not tags or not all(isinstance(tag, str) and tag for tag in tags):
            raise ValueError(f"{where} must have a list of tags as its second item, but it is {tags!r}.")
        if kind == "Margin" and len(tags) != 3:
            raise ValueError(f"{where} is a margin chart of exactly three tags (value, lower, upper), not {len(tags)}.")
        if kind == "Multiline":
            try:
                list(map(re.compile, tags))
            except re.error as error:
                raise ValueError(f"{where}: {error.pattern!r} is not a valid regular expression: {error}.") from error
