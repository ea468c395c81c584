"""How many steps a replica that is told to leave still takes part in."""

from __future__ import annotations

import pytest

from lightning_eff.strategies.fault_tolerant import departure
from lightning_eff.strategies.fault_tolerant.departure import Departure


def test_it_stays_for_as_long_as_the_lighthouse_needs_by_the_length_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 103.0, 103.5])
    monkeypatch.setattr(departure.time, "monotonic", lambda: next(times))
    leaving = Departure(seconds=6.0)
    assert leaving.steps_to_stay() == 0
    leaving.wanted = True
    unknown = []
    for _ in range(3):
        unknown.append(leaving.steps_to_stay())
        leaving.note_step()
    # Before the first step, and behind it, of which nobody knows how long it took: not by thousands of steps.
    assert unknown == [-1, -1, 3]
    assert leaving.steps_to_stay() == 13


def test_whoever_does_not_know_how_long_asks_again_or_goes_with_another() -> None:
    leaving = Departure(seconds=6.0)
    leaving.wanted, leaving.status = True, 7
    leaving.agree(step=1, stay=-1)
    assert not leaving.agreed
    leaving.end()
    leaving.agree(step=2, stay=13)
    assert [leaving.under_way(step) for step in (2, 14, 15)] == [True, True, False]
    with pytest.raises(SystemExit, match="7"):
        leaving.end()
