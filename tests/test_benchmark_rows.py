"""Rows of results: which older ones a new one replaces."""

from __future__ import annotations

import pytest

from benchmarks import rows


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)


def _written(name: str = "figures") -> list[tuple[str, ...]]:
    return [(row["arm"], row["step"], row["loss"]) for row in rows.read_rows(name)]


def test_a_file_is_replaced_and_says_where_its_rows_come_from():
    rows.write_rows("figures", [{"arm": "a", "step": 1, "loss": 0.5}])
    rows.write_rows("figures", [{"arm": "b", "step": 1, "loss": 0.25}])

    assert _written() == [("b", "1", "0.25")]
    (row,) = rows.read_rows("figures")
    assert {name: row[name] for name in rows.provenance()} == rows.provenance()


def test_with_a_key_only_what_was_measured_again_is_replaced():
    key = ("arm",)
    rows.write_rows("figures", [{"arm": "a", "step": step, "loss": 1} for step in range(3)], key)
    rows.write_rows("figures", [{"arm": "b", "step": 0, "loss": 2}], key)
    rows.write_rows("figures", [{"arm": "a", "step": step, "loss": 3} for step in range(2)], key)

    # A shorter run leaves nothing of the longer one, and stands where it stood.
    assert _written() == [("a", "0", "3"), ("a", "1", "3"), ("b", "0", "2")]


def test_rows_that_are_not_there_are_none():
    assert rows.read_rows("never") == []


def test_a_new_column_is_empty_in_rows_that_stay():
    rows.write_rows("figures", [{"arm": arm, "loss": 1} for arm in "ab"], ("arm",))
    rows.write_rows("figures", [{"arm": "b", "memory": 3, "loss": 2}], ("arm",))
    found = {row["arm"]: (row["memory"], row["loss"]) for row in rows.read_rows("figures")}
    assert found == {"a": ("", "1"), "b": ("3", "2")}
