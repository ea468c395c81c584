"""docs/order_of_hooks.md is what a run does."""

from __future__ import annotations

from benchmarks.together_hooks import PAGE, page


def test_the_page_is_what_a_run_does():
    assert PAGE.read_text() == page()
