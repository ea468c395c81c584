"""Pictures of the rows that are in the repository."""

from __future__ import annotations

import pytest

from benchmarks import plots
from harness.plots import IMAGES


def test_every_picture_is_drawn_from_the_rows(tmp_path, capsys):
    plots.main([], tmp_path)

    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {file for _, file in plots.PLOTS.values()}
    assert all((IMAGES / name).exists() for name in drawn)  # and shown by a card


def test_a_row_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"zclip_cost.csv has no row with \{'clip': 'nobody'\}"):
        plots.rows("zclip_cost", clip="nobody")
