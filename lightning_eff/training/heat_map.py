"""A number for each of many names over a run, in bounded memory, and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_eff.arguments import check, check_count
from lightning_eff.training.namespaces import is_a
from lightning_eff.training.trainer import tensorboards

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scale = Literal["linear", "log"]


class HeatMap:
    """Rows are names, columns are steps; what is not finite is left out and drawn grey.

    Memory is bounded: when all columns are taken, neighbours become one, and from then on a column is the mean of twice
    as many values. ``add`` only queues work on the values' device and never waits for it.

    Args:
        names: the rows, from top to bottom.
        columns: an even number of at least 2; 2 * columns * rows float32 numbers are held.

    Raises:
        ValueError: an argument out of its range, or values that do not fit the rows.

    Example:
        >>> table = HeatMap(["a", "b"], columns=2)
        >>> for step in range(3):
        ...     table.add(step, torch.tensor([step, torch.inf]))
        >>> table.steps, table.values().tolist()
        ([0, 2], [[0.5, 2.0], [nan, nan]])
    """

    def __init__(self, names: Sequence[str], columns: int = 512) -> None:
        check("names", names, len(names) > 0, "a list with a name for each row")
        check_count("columns", columns, least=2)
        check("columns", columns, columns % 2 == 0, "an even integer")
        self.names = list(names)
        self.columns = columns
        self.steps: list[int] = []
        """The first step of each column."""
        self._end = 0  # behind the last step
        self._each = 1  # values that make up a column
        self._filling = 0  # values in the last column
        self._sums = torch.zeros(columns, len(names))
        self._counts = torch.zeros(columns, len(names))

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, values: Tensor) -> None:
        """Take the values of one step, of shape (rows,), on any device; steps grow."""
        if values.shape != (len(self.names),):
            raise ValueError(f"values of shape {tuple(values.shape)} do not fit {len(self.names)} rows")
        values = values.detach()
        if self._sums.device != values.device:
            self._sums, self._counts = self._sums.to(values.device), self._counts.to(values.device)
        if not self.steps or self._filling == self._each:
            if len(self.steps) == self.columns:
                self._halve()
            self.steps.append(step)
            self._filling = 0
        column = len(self.steps) - 1
        finite = values.isfinite()
        self._sums[column] += torch.where(finite, values, 0.0)
        self._counts[column] += finite
        self._filling += 1
        self._end = step + 1

    def _halve(self) -> None:
        half = self.columns // 2
        for table in (self._sums, self._counts):
            pairs = table.view(half, 2, -1).sum(1)
            table.zero_()[:half] = pairs
        self.steps = self.steps[::2]
        self._each *= 2

    def values(self) -> Tensor:
        """A copy on the host, float32 of shape (rows, columns in use); NaN: none. Waits for the device."""
        used = slice(len(self.steps))
        return (self._sums[used] / self._counts[used]).T.cpu()  # 0 / 0 is NaN

    def draw(self, title: str, *, scale: Scale = "linear", missing: str = "no value") -> Figure:
        """A matplotlib figure: names from top to bottom, steps to the right, a colour bar under the title's unit.

        Args:
            title: above the map.
            scale: of the colours; ``"log"`` leaves out what is not positive.
            missing: what the grey of absent values stands for.

        Raises:
            ModuleNotFoundError: matplotlib is missing; the message names the extra.
        """
        try:
            from matplotlib import colormaps
            from matplotlib.colors import LogNorm, Normalize
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "a heat map is drawn by matplotlib: pip install 'lightning-eff[plots]'", name=error.name
            ) from error
        rows = len(self.names)
        values = self.values()
        if scale == "log":
            values = torch.where(values > 0, values, torch.nan)
        seen = values[values.isfinite()]
        # One outlier must not make all the rest one colour.
        limits = seen.quantile(torch.tensor([0.01, 0.99])).tolist() if len(seen) else [1.0, 1.0]
        norm = (LogNorm if scale == "log" else Normalize)(limits[0], max(limits[1], limits[0] * (1 + 1e-6) + 1e-30))
        colours = colormaps["viridis"].with_extremes(bad="0.8")
        # Not by pyplot, which keeps figures and chooses a window system: this must work in any thread and process.
        figure = Figure(figsize=(10, min(2 + 0.16 * rows, 24)), layout="constrained")
        axes = figure.subplots()
        edges = [*self.steps, self._end] if self.steps else [0, 1]
        shown = values.numpy() if self.steps else [[float("nan")]] * rows
        mesh = axes.pcolormesh(edges, range(rows + 1), shown, norm=norm, cmap=colours, rasterized=True)
        axes.invert_yaxis()
        every = -(-rows // 140)  # more labels than that cannot be read
        axes.set_yticks([row + 0.5 for row in range(0, rows, every)], self.names[::every], fontsize=6)
        axes.set(title=title, xlabel=f"step (grey: {missing})")
        figure.colorbar(mesh, ax=axes, extend="both", pad=0.01)
        return figure

    def publish(
        self, trainer: Trainer, tag: str, title: str, *, scale: Scale = "linear", missing: str = "no value"
    ) -> Path | None:
        """Draw, as an image ``tag`` to each TensorBoard logger and as ``<tag>.png`` beside the logs.

        Call it on all ranks at the end of a fit; rank zero draws. Without a logger or without a value nothing is
        written. Without matplotlib a warning names the extra: a run does not fail at its end for a picture.

        Returns:
            The PNG file on rank zero, None where none was written.
        """
        if not self.steps or all(is_a(logger, DummyLogger) for logger in trainer.loggers):
            return None  # a run without a logger, or a tuner's
        folder = trainer.log_dir  # a broadcast
        if not trainer.is_global_zero:
            return None
        try:
            figure = self.draw(title, scale=scale, missing=missing)
        except ModuleNotFoundError as error:
            rank_zero_warn(f"{tag} is not drawn: {error}")
            return None
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(figure)
        path = None
        if folder is not None:
            path = Path(folder) / f"{tag.replace('/', '_')}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=120)
        for board in tensorboards(trainer):
            canvas.draw()
            pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
            width, height = canvas.get_width_height()
            image = pixels.view(height, width, 4)[..., :3]
            board.add_image(tag, image, trainer.global_step, dataformats="HWC")
        return path

    def state_dict(self, *, by_reference: bool = False) -> dict[str, Any]:
        """All that is needed to go on exactly: copies on the host, or the map's own tensors."""
        used = slice(len(self.steps))
        sums, counts = self._sums[used], self._counts[used]
        return {
            "names": list(self.names),
            "columns": self.columns,
            "steps": list(self.steps),
            "counters": [self._end, self._each, self._filling],
            "sums": sums if by_reference else sums.to("cpu", copy=True),
            "counts": counts if by_reference else counts.to("cpu", copy=True),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; one of other names or columns is left alone, and the map starts anew."""
        if state["names"] != self.names or state["columns"] != self.columns:
            return
        self.steps = list(state["steps"])
        self._end, self._each, self._filling = state["counters"]
        self._sums.zero_()[: len(self.steps)] = state["sums"]
        self._counts.zero_()[: len(self.steps)] = state["counts"]
