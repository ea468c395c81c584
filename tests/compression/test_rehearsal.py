import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_eff.compression import ArcTopK, all_compressors, predict
from lightning_eff.compression.forecast.advice import Forecast, advise, forecast, forecasts
from lightning_eff.compression.forecast.link import Link
from lightning_eff.compression.forecast.rehearsal import BucketPlan, Compute, dense_plan, rehearse, step_seconds

SHAPES = {
    "embed": (300, 64), "a": (256, 128), "a.bias": (256,), "conv": (64, 32, 3, 3), "b": (128, 500), "norm": (500,)
}  # fmt: skip


@pytest.mark.parametrize("name", all_compressors())
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_rehearsed_step_sends_what_is_predicted(name, world_size):
    compressor = all_compressors()[name]

    plan = rehearse(compressor, SHAPES, world_size, bucket_mb=25, repeats=1)

    assert sum(bucket.numel for bucket in plan) == 19200 + 32768 + 256 + 18432 + 64000 + 500
    predicted = predict(compressor, SHAPES, world_size).bytes_sent
    assert sum(size for bucket in plan for size in bucket.stages) == pytest.approx(predicted, rel=0.01)
    assert all(bucket.before > 0 and bucket.after > 0 for bucket in plan)


@pytest.mark.parametrize("name", all_compressors())
def test_a_rehearsal_leaves_the_random_state_alone(name):
    state = torch.get_rng_state()
    rehearse(all_compressors()[name], SHAPES, 2, bucket_mb=25, repeats=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_dense_steps_at_the_beginning_are_left_out():
    late = rehearse(ArcTopK(start_step=100), SHAPES, 2, bucket_mb=25, repeats=1)
    at_once = rehearse(ArcTopK(), SHAPES, 2, bucket_mb=25, repeats=1)

    assert [bucket.stages for bucket in late] == [bucket.stages for bucket in at_once]


def _buckets_of_ddp(widths, bucket_mb):
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=bucket_mb)
    sizes = []

    def record(state, bucket):
        sizes[-1].append(bucket.buffer().numel())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model.register_comm_hook(None, record)
    for _ in range(3):  # the buckets are made anew after the first step
        sizes.append([])
        model(torch.randn(2, widths[0])).sum().backward()
    return sizes[-1], {name: tuple(p.shape) for name, p in model.module.named_parameters()}, dist.get_rank()


@pytest.mark.parametrize("bucket_mb", [0.5, 1, 25, None])
def test_the_buckets_are_those_of_ddp(pool, bucket_mb):
    sizes, shapes, _ = pool.run(_buckets_of_ddp, [300, 800, 100, 900, 500, 700, 30], bucket_mb)[0]

    assert [bucket.numel for bucket in dense_plan(shapes, 2, bucket_mb)] == sizes


# --- the model of a step ----------------------------------------------------------------------------------------------

LINK = Link(2, bandwidth=1e6, latency=0.0)
COMPUTE = Compute(forward=1.0, backward=2.0, optimizer=0.5)


def test_one_bucket_hides_nothing():
    assert step_seconds([BucketPlan(100, (3e6,))], LINK, COMPUTE) == pytest.approx(1 + 2 + 3 + 0.5)


def test_many_small_buckets_hide_behind_the_backward_pass():
    plan = [BucketPlan(10, (0.1e6,))] * 10  # 0.1 s each, every 0.2 s: only the last one is seen
    assert step_seconds(plan, LINK, COMPUTE) == pytest.approx(1 + 2 + 0.1 + 0.5)


def test_a_slow_link_hides_the_backward_pass():
    plan = [BucketPlan(10, (1e6,))] * 10  # the first one is ready after 0.2 s, then the link is never free
    assert step_seconds(plan, LINK, COMPUTE) == pytest.approx(1 + 0.2 + 10 + 0.5)


def test_own_work_delays_the_backward_pass_and_the_end():
    plan = [BucketPlan(10, (0.1e6,), before=0.05, after=0.01)] * 10
    assert step_seconds(plan, LINK, COMPUTE) == pytest.approx(1 + 2 + 10 * 0.05 + 0.1 + 10 * 0.01 + 0.5)


def test_a_second_collective_waits_for_the_first_one_of_its_bucket():
    # Ready at 2 and 3. Link: sketch 1 from 2 to 2.5, sketch 2 from 3 to 3.5, values 1 to 4.5, values 2 to 5.5.
    plan = [BucketPlan(10, (0.5e6, 1e6))] * 2
    assert step_seconds(plan, LINK, COMPUTE) == pytest.approx(5.5 + 0.5)


def test_a_latency_counts_for_every_collective():
    plan = [BucketPlan(10, (0.0, 0.0))] * 2
    link = Link(2, 1e6, latency=0.1)
    assert step_seconds(plan, link, Compute()) == pytest.approx(0.4)


def test_a_computed_step_is_a_third_forward():
    assert Compute.of_step(0.9) == Compute(forward=pytest.approx(0.3), backward=pytest.approx(0.6))
    assert Compute.of_step(0.9).total == pytest.approx(0.9)


# --- advice -----------------------------------------------------------------------------------------------------------


def _forecast(**steps):
    return [Forecast(name, 0.0, 0.0, 0.0, seconds) for name, seconds in steps.items()]


@pytest.mark.parametrize(
    ("steps", "advised"),
    [
        (dict(ddp=1.0, ddp_bf16=0.96, ddp_arc_topk=0.8), "ddp"),
        (dict(ddp=1.0, ddp_bf16=1.2, ddp_arc_topk=1.5), "ddp"),
        (dict(ddp=1.0, ddp_bf16=0.9, ddp_arc_topk=0.7), "ddp_bf16"),
        (dict(ddp=1.0, ddp_bf16=0.9, ddp_arc_topk=0.67), "ddp_arc_topk"),
        (dict(ddp=1.0, ddp_fp16=0.8, ddp_bf16=0.81), "ddp_bf16"),  # float32's range
        (dict(ddp=1.0, ddp_bf16=0.6, ddp_int8=0.42, ddp_arc_topk=0.40), "ddp_int8"),
        (dict(ddp=1.0, ddp_bf16=0.6, ddp_arc_topk=0.25, ddp_powersgd=0.24), "ddp_powersgd"),
        (dict(ddp=1.0, ddp_randk=0.1), "ddp"),
    ],
)
def test_what_changes_more_must_save_more(steps, advised):
    assert advise(_forecast(**steps)).strategy == advised


def test_forecasts_of_a_slow_and_of_a_fast_link():
    shapes = {f"{i}.weight": (512, 512) for i in range(8)}
    slow = list(forecasts(all_compressors(), shapes, Link(2, 1e6, 1e-4), Compute.of_step(0.5), lambda size: 1.0))
    fast = list(forecasts(all_compressors(), shapes, Link(2, 1e12, 0.0), Compute.of_step(0.5), lambda size: 1.0))

    assert [each.strategy for each in slow] == ["ddp", *(f"ddp_{name}" for name in all_compressors())]
    assert slow[0].bytes_sent == 8 * 512 * 512 * 4
    assert slow[0].wire == pytest.approx(8.39 + 3e-4, rel=0.01)
    assert advise(slow).strategy not in ("ddp", "ddp_bf16", "ddp_fp16")
    assert advise(fast).strategy == "ddp"


def test_a_forecast_sums_the_plan():
    plan = [BucketPlan(10, (1e6, 2e6), before=0.1, after=0.2), BucketPlan(10, (3e6,), before=0.1)]
    found = forecast("ddp_x", plan, Link(2, 1e6, latency=0.01), Compute())

    assert (found.bytes_sent, found.wire, found.own) == (6e6, pytest.approx(6.03), pytest.approx(0.4))
