"""Charts as callbacks give them, checked, and as TensorBoard takes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any, TypeAlias

from lightning.pytorch.loggers import TensorBoardLogger

Charts: TypeAlias = dict[str, list[Any]]
"""``{title: ["Multiline", [tag, ...]], ["Colours", {run: [tag, ...]}] or ["Margin", [value, lower, upper]]}``."""

FLAT = "flat so far"
"""The category, folded when the page is opened, of charts in which nothing has moved."""

COPIED = "dashboard/"
"""What a tag has in front in the run below the logger's that it is copied to."""


def tags_of(chart: list[Any]) -> list[str]:
    """Patterns (of a margin, names) of all that a chart draws."""
    kind, tags = chart
    return [tag for group in tags.values() for tag in group] if kind == "Colours" else list(tags)


def draws(chart: list[Any], tag: str) -> bool:
    """Whether a chart draws a tag."""
    if chart[0] == "Margin":
        return tag in chart[1]
    return any(re.fullmatch(pattern, tag) for pattern in tags_of(chart))


def copied_to(layout: Mapping[str, Charts]) -> dict[str, list[str]]:
    """The runs below the logger's that the charts ask for, each with the patterns that it gets."""
    runs: dict[str, list[str]] = {}
    for charts in layout.values():
        for kind, groups in charts.values():
            for run, tags in groups.items() if kind == "Colours" else ():
                if run:
                    runs.setdefault(run, []).extend(tag for tag in tags if tag not in runs.get(run, ()))
    return runs


def prefix_of(logger: TensorBoardLogger) -> str:
    """What a logger puts in front of every tag."""
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""


def as_logged(layout: Mapping[str, Charts], logger: TensorBoardLogger) -> dict[str, Charts]:
    """Write the tags as this logger does, with its prefix, and end every pattern where the tag ends."""
    prefix = prefix_of(logger)

    def whole(tags: Iterable[str], copied: str = "") -> list[str]:
        return [f"{re.escape(copied + prefix)}(?:{tag})$" for tag in tags]

    def chart(kind: str, tags: Any) -> list[Any]:
        if kind == "Margin":
            return [kind, [prefix + tag for tag in tags]]
        groups = tags if kind == "Colours" else {"": tags}
        return ["Multiline", [tag for run, group in groups.items() for tag in whole(group, COPIED if run else "")]]

    return {category: {title: chart(*given) for title, given in charts.items()} for category, charts in layout.items()}


def write_layout(writer: Any, layout: Mapping[str, Charts]) -> None:
    """Write it as ``SummaryWriter.add_custom_scalars`` does, which cannot fold a category."""
    if FLAT not in layout or not find_spec("tensorboard"):  # without it Lightning's writer is tensorboardX's
        writer.add_custom_scalars(layout)
        return
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
    from torch.utils.tensorboard.summary import custom_scalars

    summary = custom_scalars(layout)  # type: ignore[no-untyped-call]
    (value,) = summary.value
    proto = Layout.FromString(value.tensor.string_val[0])
    for category in proto.category:
        category.closed = category.title == FLAT
    value.tensor.string_val[0] = proto.SerializeToString()
    writer._get_file_writer().add_summary(summary)


def check_charts(charts: object, source: str) -> None:
    """Refuse what TensorBoard would leave out without a word."""
    if not isinstance(charts, dict):
        raise ValueError(f"{source} must be a dict of charts, {{title: [kind, tags]}}, but it is {charts!r}.")
    for title, chart in charts.items():
        where = f"{source}[{title!r}]"
        if not isinstance(chart, list | tuple) or len(chart) != 2 or chart[0] not in ("Multiline", "Colours", "Margin"):
            raise ValueError(
                f"{where} must be ['Multiline', [tag, ...]], ['Colours', {{run: [tag, ...]}}] or "
                f"['Margin', [value, lower, upper]], but it is {chart!r}."
            )
        kind, tags = chart
        if kind == "Colours":
            names = isinstance(tags, dict) and all(
                isinstance(run, str) and re.fullmatch(r"[\w .-]*", run) and run not in (".", "..") for run in tags
            )
            if not names or not tags:
                raise ValueError(f"{where} must have a dict {{name of a run: [tag, ...]}}, but it is {tags!r}.")
        for group in tags.values() if kind == "Colours" else [tags]:
            _check_tags(group, kind, where)


def _check_tags(tags: object, kind: str, where: str) -> None:
    if not isinstance(tags, list | tuple) or not tags or not all(isinstance(tag, str) and tag for tag in tags):
        raise ValueError(f"{where} must have a list of tags as its second item, but it is {tags!r}.")
    if kind == "Margin":
        if len(tags) != 3:
            raise ValueError(f"{where} is a margin chart of exactly three tags (value, lower, upper), not {len(tags)}.")
        return
    try:
        list(map(re.compile, tags))
    except re.error as error:
        raise ValueError(f"{where}: {error.pattern!r} is not a valid regular expression: {error}.") from error
