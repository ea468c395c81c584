"""The simulation of failure scenarios against what can be calculated by hand."""

from __future__ import annotations

import pytest

from benchmarks.fault_tolerance_simulation import SCENARIOS, Scenario, System, Times, simulate, systems

TIMES = Times(step=4, takeover=2.0, mecefo=1.5, heartbeat=5, kill_to_commit=0.5, heal=1, restart=30, checkpoint=600)


def test_nothing_is_lost_without_failures():
    never = Scenario("never", 1e9, 1)
    for system in systems(TIMES).values():
        assert simulate(system, never, 8, 1000, seed=0) == (pytest.approx(1.0), 0.0)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_dead_replicas_on_average(scenario):
    """As many as failures in the time of a repair (Little's law), where the cluster is large."""
    _, dead = simulate(systems(TIMES)["shrink"], scenario, 200, 40_000, seed=1)
    assert dead == pytest.approx(scenario.repair_h / scenario.failure_h, rel=0.05)


def test_shrinking_loses_the_dead_share_and_the_standstill():
    scenario = SCENARIOS[2]
    fraction, dead = simulate(System(lambda dead, n: (n - dead) / n, 36.0, 72.0), scenario, 200, 40_000, seed=2)
    standstill = (36 + 72) / (scenario.failure_h * 3600)
    assert fraction == pytest.approx((1 - dead / 200) * (1 - standstill), rel=0.003)


def test_rates():
    by_name = systems(TIMES)
    assert [by_name["takeover"].rate(dead, 4) for dead in range(5)] == [1, 0.5, 0.5, 0.25, 0]
    assert by_name["mecefo"].rate(1, 4) == 1 / 1.5
    assert by_name["shrink"].rate(1, 4) == 0.75
    assert by_name["takeover"].failure == 5 + 0.5 + 2
    assert by_name["restart from checkpoint"].failure == 30 + 300
