import pytest
import torch.distributed as dist

from lightning_eff.compression.forecast.link import Link, Sample, fit_link, measure_link


def test_seconds_are_latencies_and_bytes():
    link = Link(world_size=4, bandwidth=1e6, latency=0.01)

    assert link.seconds(2e6) == pytest.approx(2.01)
    assert link.seconds(2e6, collectives=10) == pytest.approx(2.1)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_fit_finds_the_link_that_made_the_samples(world_size):
    link = Link(world_size, bandwidth=25e6, latency=0.0004)
    share = 2 * (world_size - 1) / world_size
    samples = [Sample(size, link.seconds(share * size)) for size in (4, 32, 256, 2048, 131072, 1048576, 8388608)]

    fitted = fit_link(samples, world_size)

    assert fitted.latency == pytest.approx(0.0004, rel=0.01)
    assert fitted.bandwidth == pytest.approx(25e6, rel=0.01)


def test_a_fit_weighs_relative_errors():
    # 10 % too slow at 1 MB and exact at 10 MB: absolute least squares would hear of the second one only. With
    # a = 10^6 / 1.1 and b = 10^6 bytes a second, (a + b) / (a^2 + b^2) is the time of a byte.
    samples = [Sample(4, 0.0), Sample(10**6, 1.1), Sample(10**7, 10.0)]
    a, b = 1e6 / 1.1, 1e6

    assert fit_link(samples, 2).bandwidth == pytest.approx((a * a + b * b) / (a + b))


def test_a_link_that_shows_nothing_but_latency_is_as_fast_as_its_longest_payload():
    assert fit_link([Sample(4, 0.1), Sample(10**6, 0.11)], 2) == Link(2, 10**6 / 0.11, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(world_size=0, bandwidth=1.0, latency=0.0), "world_size=0"),
        (dict(world_size=2, bandwidth=0.0, latency=0.0), "bandwidth=0.0"),
        (dict(world_size=2, bandwidth=1.0, latency=-1.0), "latency=-1.0"),
    ],
)
def test_a_link_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Link(**arguments)


def test_a_fit_without_samples_or_ranks_is_refused():
    with pytest.raises(ValueError, match="samples"):
        fit_link([], 2)
    with pytest.raises(ValueError, match="world_size=1"):
        fit_link([Sample(4, 0.1)], 1)


def _measure(sizes, budget):
    return measure_link(sizes=sizes, budget=budget), dist.get_rank()


def test_every_rank_gets_the_same_samples(pool):
    (first, _), (second, _) = pool.run(_measure, (4, 4096, 1 << 20), 2.0)

    assert first == second
    assert [sample.payload for sample in first] == [4, 4096, 1 << 20]
    assert all(sample.seconds > 0 for sample in first)


def test_a_size_that_would_not_fit_into_the_budget_ends_the_series(pool):
    (samples, _), _ = pool.run(_measure, (4, 32, 256, 1 << 40), 0.5)

    assert [sample.payload for sample in samples] == [4, 32, 256]


def test_sizes_that_do_not_ascend_are_refused():
    with pytest.raises(ValueError, match="ascending"):
        measure_link(sizes=(8, 4))
