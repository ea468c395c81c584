"""ZClip's arithmetic: golden values, a plain reference in Python floats, and the streams that the method fails on."""

import io
import math
import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.operators import OperatorCounter
from lightning_eff.functional.zclip import AUTO_CAP, ZClipConfig, ZClipState, zclip_grad_norm_, zclip_update
from tests.functional.zclip_golden import GOLDEN


class Reference:
    """The method of arXiv 2504.02507, section 3, and its released code's details, one norm at a time in floats."""

    def __init__(self, config):
        self.config, self.buffer, self.mean, self.var = config, [], None, None

    def step(self, norm):
        """Return the norm after clipping."""
        c = self.config
        target = None
        warming_up = self.mean is None
        if not warming_up:
            std = math.sqrt(self.var)
            if c.clip_option == "percentile":
                target = self.mean + c.z_thresh * std if norm > self.mean + c.z_thresh * std else None
            else:
                z = (norm - self.mean) / (std + c.eps)
                if z > c.z_thresh:
                    adaptive = (self.mean + c.z_thresh * std / (z / c.z_thresh)) * c.clip_factor
                    target = adaptive if c.clip_option == "adaptive_scaling" else self.mean
        limit = norm if target is None else target
        cap = math.inf if c.max_grad_norm is None else c.max_grad_norm
        if cap == "auto":
            level = max(sum(self.buffer) / len(self.buffer), self.buffer[-1]) if self.buffer else math.inf
            cap = AUTO_CAP * (level if warming_up else self.mean)
        limit = min(limit, cap)
        clipped = norm * limit / (norm + 1e-6) if norm > limit else norm
        if warming_up:
            self.buffer.append(min(norm, cap) if c.max_grad_norm == "auto" else norm)
            if len(self.buffer) == c.warmup_steps:
                self.mean = sum(self.buffer) / len(self.buffer)
                self.var = sum((b - self.mean) ** 2 for b in self.buffer) / len(self.buffer)
        elif not (target is not None and c.skip_update_on_spike):
            seen = norm if target is None else target
            self.mean = c.alpha * self.mean + (1 - c.alpha) * seen
            self.var = c.alpha * self.var + (1 - c.alpha) * (seen - self.mean) ** 2
        return clipped


def feed(state, norms):
    """Run ZClip over a list of norms and return the norms after clipping."""
    clipped = []
    for norm in norms:
        zclip_update(torch.tensor(norm, dtype=torch.float64), state)
        clipped.append(state["norm_clipped"].item())
    return clipped


def normal_norms(seed, n, mean, std):
    generator = random.Random(seed)
    return [generator.gauss(mean, std) for _ in range(n)]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
    arguments, clipped, mean, var = GOLDEN[name]
    state = ZClipState(ZClipConfig(warmup_steps=4, **arguments))
    parameter = torch.nn.Parameter(torch.zeros(3))
    for norm in (1.0, 1.2, 0.8, 1.0):
        parameter.grad = torch.tensor([norm, 0.0, 0.0])
        zclip_grad_norm_([parameter], state)
    assert state["mean"].item() == pytest.approx(1.0, abs=1e-7)
    assert state["var"].item() == pytest.approx(0.02, abs=1e-7)
    for norm in (1.1, 5.0):
        parameter.grad = torch.tensor([norm, 0.0, 0.0])
        assert zclip_grad_norm_([parameter], state).item() == pytest.approx(norm)
    assert parameter.grad.norm().item() == pytest.approx(clipped, abs=1e-6)
    assert state["mean"].item() == pytest.approx(mean, abs=1e-8)
    assert state["var"].item() == pytest.approx(var, abs=1e-8)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        dict(z_thresh=1e3),  # the cap alone
        dict(max_grad_norm=1.0),
        dict(max_grad_norm=None),
        dict(max_grad_norm=None, clip_option="mean"),
        dict(max_grad_norm=None, clip_option="percentile", z_thresh=1.5),
        dict(max_grad_norm=1.3, skip_update_on_spike=True),
        dict(max_grad_norm=None, clip_factor=0.9, alpha=0.95, z_thresh=2.0),
        dict(warmup_steps=2, eps=0.0),
    ],
    ids=str,
)
def test_equals_the_reference_on_heavy_tailed_streams(arguments):
    config = ZClipConfig(**{"warmup_steps": 10, **arguments})
    generator = random.Random(7)
    norms = [math.exp(generator.gauss(0.0, 0.5)) * (10 if generator.random() < 0.03 else 1) for _ in range(400)]
    reference = Reference(config)
    expected = [reference.step(norm) for norm in norms]
    state = ZClipState(config)

    assert feed(state, norms) == pytest.approx(expected, rel=1e-12)
    assert state["mean"].item() == pytest.approx(reference.mean, rel=1e-12)
    assert state["var"].item() == pytest.approx(reference.var, rel=1e-11)
    assert state["clipped"].item() == sum(e < n for e, n in zip(expected, norms, strict=True)) > 5
    assert state["relearned"].item() == 0


def test_few_steps_of_a_stationary_stream_are_clipped():
    state = ZClipState(ZClipConfig(max_grad_norm=None))
    feed(state, normal_norms(0, 10_000, 1.0, 0.1))
    # 0.98 % over 200,000 steps of the authors' code; P(Z > 2.5) is 0.62 %.
    assert 0.006 < state["spikes"].item() / 10_000 < 0.014


def test_threshold_is_the_norm_above_which_a_step_is_clipped():
    for arguments in (
        dict(max_grad_norm=None),
        dict(max_grad_norm=1.15),
        dict(z_thresh=40.0),
        dict(max_grad_norm=None, clip_option="percentile"),
    ):
        state = ZClipState(ZClipConfig(warmup_steps=10, **arguments))
        for norm in [*normal_norms(1, 300, 1.0, 0.1), 30.0]:
            before = state["clipped"].item()
            feed(state, [norm])
            assert (state["clipped"].item() > before) == (norm > state["threshold"].item())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_cap_follows_the_run_whatever_the_unit_of_its_norms(scale):
    """A spike before the end of the warm-up is cut down, and learned as no more than the cap."""
    norms = normal_norms(3, 200, 1.0, 0.1)
    norms[0], norms[12] = 1.0, 500.0
    states = {cap: ZClipState(ZClipConfig(max_grad_norm=cap, eps=0.0)) for cap in ("auto", None)}
    clipped = {cap: feed(state, [scale * norm for norm in norms]) for cap, state in states.items()}
    level = max(sum(norms[:12]) / 12, norms[11])
    assert clipped["auto"][12] / scale == pytest.approx(AUTO_CAP * level, rel=1e-2)
    assert clipped[None][12] == scale * 500.0
    assert [c for c, n in zip(clipped["auto"][:12], norms, strict=False) if c != scale * n] == []
    # Six deviations: an outlier to the one, and nothing to the other, whose deviation is still that of the spike.
    after = {cap: feed(state, [scale * 1.6])[0] / scale for cap, state in states.items()}
    assert after["auto"] < 1.5
    assert after[None] == pytest.approx(1.6)


@pytest.mark.parametrize("first", [1e-2, 1e-6, 1e-10])
def test_a_first_norm_of_nearly_nothing_does_not_hold_the_run_down(first):
    """A batch that is masked, say: the level is reached in the warm-up, fivefold a step."""
    state = ZClipState(ZClipConfig(eps=0.0))
    clipped = feed(state, [first, *normal_norms(3, 60, 1.0, 0.1)])
    steps = math.ceil(math.log(1.3 / first, AUTO_CAP)) + 1
    assert clipped[steps:25] == pytest.approx(normal_norms(3, 60, 1.0, 0.1)[steps - 1 : 24])
    assert min(clipped[25:]) > 0.5


def test_the_first_step_has_no_cap_of_its_own_unit():
    state = ZClipState(ZClipConfig())
    assert feed(state, [1e6, 1e6]) == [1e6, 1e6]
    assert state["threshold"].item() == AUTO_CAP * 1e6


LOCKING = {
    "twice": ({}, 2.0),
    "four times": ({}, 4.0),
    "skip_update": (dict(skip_update_on_spike=True), 2.0),
    "mean": (dict(clip_option="mean"), 2.0),
}


@pytest.mark.parametrize("name", LOCKING)
def test_a_lasting_shift_is_learned(name):
    """The authors' method clips every step for ever once the norms have doubled; ours sees a new level."""
    arguments, shift = LOCKING[name]
    before, after = normal_norms(0, 200, 1.0, 0.1), normal_norms(1, 400, shift, 0.1 * shift)

    official = ZClipState(ZClipConfig(max_grad_norm=None, relearn_after=None, **arguments))
    feed(official, before)
    start = official["spikes"].item()
    feed(official, after)
    assert official["spikes"].item() - start == 400
    assert official["mean"].item() < 1.15

    ours = ZClipState(ZClipConfig(max_grad_norm=None, **arguments))
    feed(ours, before)
    feed(ours, after[:60])
    assert ours["relearned"].item() == 1
    start = ours["spikes"].item()
    feed(ours, after[60:])
    assert ours["spikes"].item() - start < 0.1 * 340
    assert ours["mean"].item() == pytest.approx(shift, rel=0.1)


def test_a_climb_of_the_norms_is_followed():
    """As of a GAN's generator, which begins with next to no gradient: 40 times as much in 45 steps, and it stays."""
    state = ZClipState()
    feed(state, normal_norms(0, 25, 0.03, 0.003))
    feed(state, [0.03 * 40 ** (n / 45) for n in range(45)])
    feed(state, normal_norms(1, 30, 1.2, 0.12))
    start = state["clipped"].item()
    feed(state, normal_norms(2, 200, 1.2, 0.12))
    assert state["clipped"].item() - start < 0.1 * 200


def test_relearning_takes_the_last_raw_norms():
    state = ZClipState(ZClipConfig(warmup_steps=5, relearn_after=7, max_grad_norm=None))
    feed(state, [1.0, 1.1, 0.9, 1.0, 1.0])
    shifted = [8.0, 8.1, 8.2, 8.3, 8.4, 8.5, 8.6]
    feed(state, shifted[:-1])
    assert (state["relearned"].item(), state["streak"].item()) == (0, 6)
    feed(state, shifted[-1:])
    assert (state["relearned"].item(), state["streak"].item()) == (1, 0)
    assert state["mean"].item() == pytest.approx(8.4)
    assert state["var"].item() == pytest.approx(0.02)


def test_a_short_relearn_after_waits_for_a_ring_of_outliers():
    state = ZClipState(ZClipConfig(warmup_steps=5, relearn_after=2, max_grad_norm=None))
    feed(state, [1.0, 1.1, 0.9, 1.0, 1.0, 8.0, 8.0, 8.0, 8.0])
    assert state["relearned"].item() == 0
    feed(state, [8.0])
    assert state["relearned"].item() == 1
    assert state["mean"].item() == 8.0


def test_a_moderate_shift_is_learned_without_relearning():
    state = ZClipState(ZClipConfig(max_grad_norm=None, relearn_after=None))
    feed(state, normal_norms(0, 200, 1.0, 0.1))
    feed(state, normal_norms(1, 300, 1.5, 0.15))
    start = state["spikes"].item()
    feed(state, normal_norms(2, 300, 1.5, 0.15))
    assert state["spikes"].item() - start < 0.05 * 300


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("place", [2, 8], ids=["warm-up", "after"])
def test_a_norm_that_says_nothing_leaves_the_statistics_alone(bad, place):
    norms = normal_norms(0, 12, 1.0, 0.1)
    config = ZClipConfig(warmup_steps=4, max_grad_norm=None)
    with_bad, without = ZClipState(config), ZClipState(config)
    feed(with_bad, [*norms[:place], bad, *norms[place:]])
    feed(without, norms)

    assert with_bad["nonfinite"].item() == (bad != 0)
    for name in ("mean", "var", "count", "streak", "spikes", "clipped"):
        assert with_bad[name].item() == without[name].item(), name
    assert torch.equal(with_bad.norms, without.norms)


def test_a_nonfinite_norm_gives_the_coefficient_that_was_asked_for():
    state = ZClipState()
    assert zclip_update(torch.tensor(math.nan), state).item() == 0
    assert zclip_update(torch.tensor(math.inf), state, on_nonfinite=1.0).item() == 1


def test_nonfinite_gradients_become_zeros():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    for bad in (math.nan, math.inf):
        parameters[0].grad = torch.tensor([1.0, bad])
        parameters[1].grad = torch.tensor([1.0, 2.0])
        zclip_grad_norm_(parameters, ZClipState())
        assert [p.grad.tolist() for p in parameters] == [[0.0, 0.0], [0.0, 0.0]]


def test_a_warm_up_of_equal_norms_does_not_clip_for_ever():
    state = ZClipState(ZClipConfig(max_grad_norm=None, relearn_after=None))
    feed(state, [1.0] * 25)
    assert state["var"].item() == 0
    feed(state, [1.0 + 1e-5 * (i % 3) for i in range(50)])
    assert state["spikes"].item() == 0
    assert state["var"].item() > 0


def test_no_gradient_means_no_observation():
    state = ZClipState()
    assert zclip_grad_norm_([torch.nn.Parameter(torch.zeros(3))], state) is None
    assert state["steps"].item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sixteen_bit_gradients_are_measured_in_more(dtype):
    parameter = torch.nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    parameter.grad = torch.full((64, 64), 2000.0, dtype=dtype)
    norm = zclip_grad_norm_([parameter], ZClipState(ZClipConfig(max_grad_norm=None)))
    assert norm.item() == 128_000.0  # float16 itself ends at 65,504


@pytest.mark.parametrize("cut", [3, 4, 9, 27], ids=["warm-up", "its end", "after", "among outliers"])
def test_state_carries_on_exactly(cut):
    config = ZClipConfig(warmup_steps=4, max_grad_norm=None, relearn_after=10)
    norms = normal_norms(0, 20, 1.0, 0.1) + normal_norms(1, 30, 3.0, 0.3)
    unbroken, first = ZClipState(config), ZClipState(config)
    feed(unbroken, norms)
    feed(first, norms[:cut])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = ZClipState(config)
    second.load_state_dict(torch.load(file, weights_only=True))
    feed(second, norms[cut:])

    assert torch.equal(second.values, unbroken.values)
    assert torch.equal(second.norms, unbroken.norms)
    assert unbroken["relearned"].item() == 1


# --- another level, since other parameters are trained ---------------------------------------------------------------


def changing_norms(seed, sets, steps, spread=0.1):
    """Norms of sets of parameters whose levels differ by up to a factor of 20."""
    generator = random.Random(seed)
    levels = [math.exp(generator.uniform(-1.5, 1.5)) for _ in range(sets)]
    return [[level * generator.gauss(1.0, spread) for _ in range(steps)] for level in levels]


def feed_sets(state, sets, tell=True):
    """Returns for each set the indices of the norms that were clipped as outliers."""
    found = []
    for number, norms in enumerate(sets):
        if number and tell:
            state.change_level()
        spikes = []
        for index, norm in enumerate(norms):
            before = state["spikes"].item()
            zclip_update(torch.tensor(norm, dtype=torch.float64), state)
            spikes += [index] * (state["spikes"].item() > before)
        found.append(spikes)
    return found


@pytest.mark.parametrize(("steps", "at_most"), [(50, 25), (20, 30), (5, 45)], ids=["long", "within-warmup", "short"])
def test_another_set_of_parameters_is_no_spike(steps, at_most):
    config = ZClipConfig(max_grad_norm=None)
    sets = changing_norms(0, 1000 // steps, steps)
    told, untold = ZClipState(config), ZClipState(config)
    spikes, others = feed_sets(told, sets), feed_sets(untold, sets, tell=False)
    # A stationary stream of the same spread clips about 14 of 1,000; a level known from few norms adds some.
    assert sum(map(len, spikes)) <= at_most
    assert not any(0 in indices for indices in spikes)
    assert sum(0 in indices for indices in others) > 2  # what it is for


@pytest.mark.parametrize("place", [1, 2, 10, 40])
def test_a_spike_after_the_change_is_one(place):
    state = ZClipState(ZClipConfig(max_grad_norm=None))
    feed_sets(state, [normal_norms(0, 200, 1.0, 0.1)])
    norms = normal_norms(1, 50, 7.0, 0.7)
    norms[place] *= 3
    assert place in feed_sets(state, [[], norms])[1]


def test_the_statistics_after_a_change_by_hand():
    config = ZClipConfig(alpha=0.9, warmup_steps=2, max_grad_norm=None, z_thresh=100.0)
    state = ZClipState(config)
    feed(state, [0.9, 1.1])  # mean 1, variance 0.01
    state.change_level()
    feed(state, [math.nan, 5.0])  # a norm that says nothing is not the first one
    assert state["mean"].item() == pytest.approx(5.0, rel=1e-12)
    assert state["var"].item() == pytest.approx(0.9 * 0.01 * 25, rel=1e-12)
    assert state.norms.tolist() == pytest.approx([5.0, 5.5])  # 0.9 made room for 5.0, and 1.1 was scaled
    seen = [5.0]
    for norm in (6.0, 4.0, 4.5, 5.5):
        feed(state, [norm])
        seen.append(norm)
        assert state["mean"].item() == pytest.approx(sum(seen) / len(seen), rel=1e-12)
    feed(state, [5.0] * 4)
    before = state["mean"].item()  # nine norms: the next one has the weight of 1 - alpha, and all after it
    for norm in (8.0, 3.0):
        feed(state, [norm])
        assert state["mean"].item() == pytest.approx(0.9 * before + 0.1 * norm, rel=1e-12)
        before = state["mean"].item()


def test_a_change_in_the_warm_up_keeps_the_spread():
    state = ZClipState(ZClipConfig(warmup_steps=4, max_grad_norm=None))
    state.change_level()  # before any norm: nothing to scale
    feed(state, [0.9, 1.1])
    state.change_level()
    feed(state, [20.0, 22.0])
    ring = [18.0, 22.0, 20.0, 22.0]
    mean = sum(ring) / 4
    assert state.norms.tolist() == pytest.approx(ring)
    assert state["mean"].item() == pytest.approx(mean)
    assert state["var"].item() == pytest.approx(sum((norm - mean) ** 2 for norm in ring) / 4)


def test_a_lasting_rise_after_a_change_is_learned_as_ever():
    state = ZClipState(ZClipConfig(warmup_steps=4, relearn_after=6, max_grad_norm=None))
    feed(state, normal_norms(0, 40, 1.0, 0.1))
    state.change_level()
    feed(state, [2.0, 2.1, 1.9, 2.0, *[9.0, 9.1, 8.9] * 5])
    assert state["relearned"].item() == 1
    assert state["mean"].item() == pytest.approx(9.0, rel=0.02)


@pytest.mark.parametrize("cut", [50, 51, 60, 75], ids=["at the change", "one norm later", "soon after", "later"])
def test_a_state_after_a_change_carries_on_exactly(cut):
    config = ZClipConfig(warmup_steps=4, max_grad_norm=None)
    one, other = normal_norms(0, 50, 1.0, 0.1), normal_norms(1, 50, 3.0, 0.3)
    unbroken, first = ZClipState(config), ZClipState(config)
    for state in (unbroken, first):
        feed(state, one)
        state.change_level()
    feed(unbroken, other)
    feed(first, other[: cut - 50])
    second = ZClipState(config)
    second.load_state_dict(first.state_dict())
    feed(second, other[cut - 50 :])

    assert torch.equal(second.values, unbroken.values)
    assert torch.equal(second.norms, unbroken.norms)
    assert torch.equal(second.since, unbroken.since)


def test_a_state_of_an_earlier_version_has_seen_no_change():
    state, saved = ZClipState(), ZClipState().state_dict()
    del saved["since"]
    state.load_state_dict(saved)
    assert state.since is None


def test_another_warm_up_starts_anew_with_a_warning():
    saved = ZClipState(ZClipConfig(warmup_steps=4))
    feed(saved, [1.0] * 6)
    state = ZClipState(ZClipConfig(warmup_steps=5))
    with pytest.warns(UserWarning, match="warmup_steps=5 differs from the 4"):
        state.load_state_dict(saved.state_dict())
    assert state["count"].item() == 0


def test_runs_without_data():
    """Under fake tensors anything that depends on a value raises: no decision is taken on the host."""
    with FakeTensorMode():
        for clip_option in ("adaptive_scaling", "mean", "percentile"):
            parameters = [torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.zeros(5))]
            state = ZClipState(ZClipConfig(warmup_steps=2, clip_option=clip_option))
            for step in range(4):
                if step == 2:
                    state.change_level()
                for parameter in parameters:
                    parameter.grad = torch.ones_like(parameter)
                zclip_grad_norm_(parameters, state)


def test_a_step_never_waits_for_the_device():
    parameter = torch.nn.Parameter(torch.zeros(3))
    state = ZClipState(ZClipConfig(warmup_steps=2))
    with OperatorCounter() as counter:
        for norm in (1.0, 1.1, 1.0, 50.0, math.nan):
            if norm == 50.0:
                state.change_level()
            parameter.grad = torch.tensor([norm, 0.0, 0.0])
            zclip_grad_norm_([parameter], state)
    assert counter.host_syncs == 0


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("alpha", 1.0),
        ("alpha", -0.1),
        ("z_thresh", 0.0),
        ("z_thresh", math.nan),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", math.nan),
        ("max_grad_norm", "automatic"),
        ("max_grad_norm", True),
        ("eps", -1e-9),
        ("warmup_steps", 0),
        ("warmup_steps", 2.5),
        ("max_grad_norm", math.inf),
        ("skip_update_on_spike", "false"),
        ("clip_option", "MEAN"),
        ("clip_factor", 0.0),
        ("relearn_after", 0),
    ],
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=rf"^{argument}={value!r} is not allowed: it must be "):
        ZClipConfig(**{argument: value})


def test_a_setting_without_effect_warns():
    with pytest.warns(UserWarning, match=r"clip_factor=0\.5 has an effect only"):
        ZClipConfig(clip_option="mean", clip_factor=0.5)
