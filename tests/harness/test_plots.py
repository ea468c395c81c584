"""Pictures: what is drawn, and where it goes."""

import pytest

pytest.importorskip("matplotlib")

from harness.plots import by_step, mean_and_range, panels, save


def test_values_of_several_runs_by_step():
    points = [("5", "1.5"), (0, 2.0), ("5", 2.5), (10, "3")]
    assert by_step(points) == {0: [2.0], 5: [1.5, 2.5], 10: [3.0]}
    assert list(by_step(points)) == [0, 5, 10]


def test_the_mean_is_a_line_and_the_range_a_band(tmp_path):
    figure, (left, right) = panels(2, 3.0, 2.0, sharey=True)
    values = {0: [1.0, 3.0], 5: [2.0, 2.0]}
    mean_and_range(left, values, label="both")
    mean_and_range(right, values, band=False)

    (line,) = left.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 5], [2.0, 2.0])
    (band,) = left.collections
    heights = {tuple(map(float, corner)) for corner in band.get_paths()[0].vertices}
    assert {(0.0, 1.0), (0.0, 3.0), (5.0, 2.0)} <= heights
    assert len(right.lines) == 1
    assert not right.collections
    assert list(figure.get_size_inches()) == [6.0, 2.0]

    path = save(figure, tmp_path / "folder" / "both.png")
    assert path.read_bytes().startswith(b"\x89PNG")
