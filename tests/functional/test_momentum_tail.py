import pytest
import torch

from lightning_eff.functional.momentum_tail import has_momentum_tail, momentum_tail_
from tests.gpu_rounding import GpuRounding

LR = 0.1


def stepped(build, steps=5):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.float64)) for _ in range(2)]
    optimizer = build(weights)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(3, 2, generator=generator, dtype=torch.float64)
        optimizer.step()
    return optimizer, weights


ADAM = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=LR, betas=(0.8, 0.9), weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=LR, betas=(0.8, 0.9)),
    "fused": lambda p: torch.optim.AdamW(p, lr=LR, betas=(0.8, 0.9), fused=True),
    "tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(LR, dtype=torch.float64), betas=(0.8, 0.9)),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=LR, betas=(0.8, 0.9), amsgrad=True),
    "maximize": lambda p: torch.optim.AdamW(p, lr=LR, betas=(0.8, 0.9), maximize=True),
}


@pytest.mark.parametrize("name", ADAM)
def test_adams_step_by_its_formula(name):
    optimizer, (one, other) = stepped(ADAM[name])
    before, untouched = one.detach().clone(), other.detach().clone()
    state = optimizer.state[one]
    m = state["exp_avg"] / (1 - 0.8**5)
    v = state["max_exp_avg_sq" if name == "amsgrad" else "exp_avg_sq"] / (1 - 0.9**5)
    step = LR * 0.8 / (1 - 0.8) * m / (v.sqrt() + 1e-8)
    momentum_tail_(optimizer, [one])

    torch.testing.assert_close(one.detach(), before - step, rtol=1e-6, atol=0)
    assert torch.equal(other, untouched)
    assert state["step"].item() == 5  # the state is read alone


def test_a_gpu_does_not_round_the_correction_of_bias_to_sixteen_bits():
    weight = torch.nn.Parameter(torch.randn(200, generator=torch.Generator().manual_seed(0)).bfloat16())
    optimizer = torch.optim.AdamW([weight], lr=LR)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state, before = optimizer.state[weight], weight.detach().clone()
    state["exp_avg"].copy_(torch.linspace(0.01, 1, 200))
    m, v = state["exp_avg"].double() / (1 - 0.9), state["exp_avg_sq"].double() / (1 - 0.999)
    expected = (before.double() - LR * 9 * m / (v.sqrt() + 1e-8)).bfloat16()
    with GpuRounding():
        momentum_tail_(optimizer, [weight])
    assert (weight.detach() != expected).sum() <= 2  # of 200, at the edge between two numbers of 16 bits


def test_after_many_steps_it_is_the_papers_formula():
    optimizer, (one, _) = stepped(ADAM["adam"], steps=300)
    before, state = one.detach().clone(), optimizer.state[one]
    momentum_tail_(optimizer, [one])
    paper = LR * 0.8 / (1 - 0.8) * state["exp_avg"] / (state["exp_avg_sq"] + 1e-8).sqrt()
    torch.testing.assert_close(one.detach(), before - paper, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_sgds_tail_is_what_steps_without_gradients_would_have_done(nesterov, maximize):
    def build(parameters):
        return torch.optim.SGD(parameters, lr=LR, momentum=0.7, nesterov=nesterov, maximize=maximize)

    optimizer, (one, _) = stepped(build)
    other_optimizer, (same, _) = stepped(build)
    momentum_tail_(optimizer, [one])
    for _ in range(200):
        same.grad = torch.zeros_like(same)
        other_optimizer.step()
    torch.testing.assert_close(one, same, rtol=1e-10, atol=1e-12)


def test_without_momentum_or_state_nothing_moves():
    optimizer, (one, other) = stepped(lambda p: torch.optim.SGD(p, lr=LR))
    before = one.detach().clone()
    momentum_tail_(optimizer, [one])
    assert torch.equal(one, before)
    optimizer = torch.optim.AdamW([other])
    before = other.detach().clone()
    momentum_tail_(optimizer, [other])
    assert torch.equal(other, before)
    assert not optimizer.state


def test_an_unknown_momentum_is_refused():
    optimizer, weights = stepped(lambda p: torch.optim.Adamax(p, lr=LR))
    assert not has_momentum_tail(optimizer)
    with pytest.raises(TypeError, match="momentum of Adamax is not known"):
        momentum_tail_(optimizer, weights)
