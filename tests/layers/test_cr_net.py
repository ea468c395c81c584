"""CR-Net: the recursion written out, and that what is found again gives the gradients that what was kept would give."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_eff.layers.cr_net import CRFirst, CRLinear
from lightning_eff.layers.cr_stack import CRStack, kept_layers

WIDTH, HIDDEN, RANK = 16, 40, 4
SHAPES = {
    **dict.fromkeys(("query", "key", "value", "out"), (WIDTH, WIDTH)),
    **{"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)},
}


class Block(nn.Module):
    """A Llama's block as people write it."""

    def __init__(self, first: bool, beta: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2, self.dropout = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(dropout)
        for name, shape in SHAPES.items():
            linear = CRFirst(nn.Linear(*shape, bias=False)) if first else CRLinear(*shape, RANK, beta, std=0.2)
            setattr(self, name, linear)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        h = self.norm2(x)
        return x + self.dropout(self.down(F.silu(self.gate(h)) * self.up(h)))


def stack(betas: list[float], dtype=torch.float32, dropout: float = 0.0, **arguments) -> CRStack:
    torch.manual_seed(0)
    return CRStack([Block(index == 0, beta, dropout) for index, beta in enumerate([1.0, *betas])], **arguments).to(
        dtype
    )


def inputs(dtype=torch.float32) -> Tensor:
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1), dtype=dtype)


def grads(model: nn.Module, x: Tensor, forward=None) -> dict[str, Tensor]:
    model.zero_grad()
    (forward or model)(x).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def worst(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest error of a tensor's gradient relative to its norm; the scalars, sums that cancel, as one vector."""

    def vectors(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        scalars = torch.cat([grad for name, grad in grads.items() if name.endswith("beta")])
        return {"beta": scalars, **{name: grad for name, grad in grads.items() if not name.endswith("beta")}}

    one, other = vectors(one), vectors(other)
    return max(((one[name] - other[name]).norm() / other[name].norm()).item() for name in other)


def written_out(model: CRStack, x: Tensor) -> Tensor:
    below: dict[str, Tensor] = {}

    def project(block: Block, name: str, h: Tensor) -> Tensor:
        layer = getattr(block, name)
        if isinstance(layer, CRFirst):
            y = h @ layer.weight.T
        else:
            c = torch.sign(layer.beta) * (layer.beta.abs() + 1e-6)
            y = c * below[name] + (h @ layer.a.weight.T) @ layer.b.weight.T
        below[name] = y
        return y

    for block in model:
        h = block.norm1(x)
        q, k, v = (project(block, name, h).unflatten(-1, (2, -1)).transpose(1, 2) for name in ("query", "key", "value"))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + project(block, "out", y)
        h = block.norm2(x)
        x = x + project(block, "down", F.silu(project(block, "gate", h)) * project(block, "up", h))
    return x


@pytest.mark.parametrize("recompute", [False, True])
def test_value_and_gradients_are_those_of_the_recursion(recompute):
    model, x = stack([0.7, -0.5, 1.2], torch.float64, recompute=recompute), inputs(torch.float64)
    wanted = grads(model, x, lambda x: written_out(model, x))
    torch.testing.assert_close(model(x), written_out(model, x), rtol=1e-12, atol=1e-12)
    for _ in range(2):  # the first pass keeps everything
        got = grads(model, x)
        assert set(got) == set(wanted)
        assert worst(got, wanted) < 1e-12


@pytest.mark.parametrize("c", [2.0, 1.25, 1.0, 0.5, 0.25, 0.1, -0.1, 0.01, 1e-4])
def test_recomputed_gradients_are_the_plain_ones_at_any_c(c):
    """Without the bound c = 0.1 loses everything in eight layers: the next test."""
    betas = [c] * 8
    wanted = grads(stack(betas), inputs())
    # At c = 2, where the outputs grow 256-fold, float32 itself is far off.
    exact = grads(stack(betas).double(), inputs().double())
    rounding = worst({name: grad.double() for name, grad in wanted.items()}, exact)
    model = stack(betas, recompute=True)
    for _ in range(2):
        assert worst(grads(model, inputs()), wanted) < max(1e-5, 0.1 * rounding)
    assert rounding < 1e-4 or c == 2


def test_without_the_bound_a_small_c_loses_everything():
    betas = [0.1] * 8
    wanted = grads(stack(betas), inputs())
    model = stack(betas, recompute=True, max_growth=1e30)
    grads(model, inputs())
    assert worst(grads(model, inputs()), wanted) > 0.01


def test_a_single_bad_c_among_good_ones():
    betas = [1.0, 1.0, 0.003, 1.0, 0.9, 1.0]
    wanted = grads(stack(betas), inputs())
    model = stack(betas, recompute=True)
    for _ in range(2):
        assert worst(grads(model, inputs()), wanted) < 1e-5
    assert {layer for layer, name in model.connection.kept if name == "gate"} == {2, 6}


def test_which_layers_are_kept():
    assert kept_layers([1.0] * 31, 32) == [31]
    assert kept_layers([1.0] * 33, 32) == [0, 33]
    assert kept_layers([0.5] * 4, 32) == [4]  # 2, 6, 14, 30
    assert kept_layers([0.01] * 3, 32) == [0, 1, 2, 3]
    assert kept_layers([0.0] * 2, 32) == [0, 1, 2]


def test_in_bfloat16_the_sum_is_in_float32():
    betas = [0.5] * 6
    plain, model = stack(betas), stack(betas, recompute=True)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = grads(plain, inputs())
        for _ in range(2):
            assert worst(grads(model, inputs()), wanted) < 0.02  # what the two round apart of each other's bfloat16
        assert plain(inputs()).dtype is torch.float32  # of the residual stream
    dtypes = {tensor.dtype for tensor in _kept_of(model).values()}
    assert dtypes == {torch.float32}


def _kept_of(model: CRStack) -> dict[tuple[int, str], Tensor]:
    passes = []
    begin = model.connection._begin

    def seen(index):
        passes.append(begin(index))
        return passes[-1]

    model.connection._begin = seen
    model(inputs())
    model.connection._begin = begin
    return passes[0].kept


def test_a_pass_keeps_inputs_low_rank_activations_and_the_layers_of_the_bound():
    model, tokens = stack([1.0] * 5, recompute=True), 15
    grads(model, inputs())
    passes, outputs, begin, give = [], [], model.connection._begin, CRLinear.forward

    def seen(index):
        passes.append(begin(index))
        return passes[-1]

    def forward(layer, x, previous=None):
        y = give(layer, x, previous)
        outputs.append(weakref.ref(y))
        return y

    model.connection._begin, CRLinear.forward = seen, forward
    try:
        result = model(inputs())
    finally:
        CRLinear.forward = give
    gc.collect()
    alive = [ref for ref in outputs if ref() is not None]
    assert len(outputs) == 5 * 7
    assert len(alive) <= 7  # those of the last block, which are kept
    (current,) = set(passes)
    assert set(current.kept) == {(5, name) for name in SHAPES}
    assert sum(y.numel() for y in current.kept.values()) == tokens * (5 * WIDTH + 2 * HIDDEN)
    assert sum(low.numel() for low in current.lows.values()) == 5 * tokens * 7 * RANK
    assert not current.outputs
    del result


def test_dropout_draws_the_same_again():
    betas = [0.8] * 3
    torch.manual_seed(0)
    plain, model = stack(betas, dropout=0.5), stack(betas, dropout=0.5, recompute=True)
    torch.manual_seed(3)
    wanted = grads(plain, inputs())
    torch.manual_seed(3)
    assert worst(grads(model, inputs()), wanted) < 1e-5


def test_passes_that_wait_for_each_other_do_not_mix():
    model = stack([0.6] * 3, recompute=True)
    wanted = [grads(model, scale * inputs()) for scale in (1, 2)]
    model.zero_grad()
    losses = [model(scale * inputs()).square().mean() for scale in (1, 2)]
    with torch.no_grad():
        model(3 * inputs())
    (losses[0] + losses[1]).backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert worst(got, {name: wanted[0][name] + wanted[1][name] for name in got}) < 1e-5


def test_a_graph_can_be_gone_through_twice():
    model = stack([0.6] * 3, recompute=True)
    grads(model, inputs())
    wanted = grads(model, inputs())
    model.zero_grad()
    loss = model(inputs()).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert worst(got, {name: 2 * grad for name, grad in wanted.items()}) < 1e-5


def test_without_gradients_nothing_is_kept_or_counted():
    model = stack([0.6] * 2, recompute=True)
    with torch.no_grad():
        model(inputs())
    assert model.connection.passes == 0
    assert all(module.link is None for module in model.modules() if isinstance(module, CRFirst | CRLinear))


def test_copies_and_pickles_are_stacks_of_their_own():
    model = stack([0.6] * 2, recompute=True)
    grads(model, inputs())
    wanted = grads(model, inputs())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert worst(grads(other, inputs()), wanted) == 0
        assert other.connection is not model.connection
        assert all(other[0].forward.connection.blocks[i] is block for i, block in enumerate(other))


def test_the_layers_kept_go_on_after_a_resume():
    model = stack([0.6] * 3, recompute=True, every_n_passes=3)
    for _ in range(2):
        grads(model, inputs())
    other = stack([0.6] * 3, recompute=True, every_n_passes=3)
    other.connection.load_state(copy.deepcopy(model.connection.state()))
    other.load_state_dict(model.state_dict())
    for _ in range(3):
        assert worst(grads(other, inputs()), grads(model, inputs())) == 0
        assert other.connection.state() == model.connection.state()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's, on its own way
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_it_is_the_same(recompute):
    model = stack([0.6] * 2, recompute=recompute)
    wanted = grads(model, inputs())
    compiled = torch.compile(model, backend="aot_eager")
    assert worst(grads(model, inputs(), compiled), wanted) < 1e-5


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="previous=None is not allowed"):
        CRLinear(4, 4, 2)(torch.ones(1, 4))
    with pytest.raises(ValueError, match="rank=5 is not allowed: it must be an integer from 1 to 4"):
        CRLinear(4, 8, 5)
    with pytest.raises(ValueError, match="beta=0 is not allowed"):
        CRLinear(4, 4, 2, beta=0)
    with pytest.raises(ValueError, match="blocks=1 is not allowed: it must be two at least"):
        CRStack([Block(True, 1.0)])
    with pytest.raises(ValueError, match="it must be CRFirst in block 0"):
        CRStack([Block(False, 1.0), Block(False, 1.0)])
    with pytest.raises(ValueError, match="it must be CRLinear in block 1"):
        CRStack([Block(True, 1.0), Block(True, 1.0)])
    with pytest.raises(ValueError, match="the same projections in block 1"):
        CRStack([Block(True, 1.0), nn.Sequential(CRLinear(4, 4, 2))])
    model = stack([0.5] * 2)
    with pytest.raises(RuntimeError, match="block 2 of a CRStack must run right after block 1"):
        model[2](inputs())
    loss = checkpoint(model, inputs().requires_grad_(), use_reentrant=False).sum()
    with pytest.raises(RuntimeError, match="activation checkpointing of another kind"):
        loss.backward()
    model = stack([0.5] * 3, recompute=True)
    grads(model, inputs())
    middle = model[1](model[0](inputs()))
    with pytest.raises(RuntimeError, match="the loss must depend on the last block"):
        middle.sum().backward()


def test_a_bias_is_part_of_what_is_handed_on():
    layer = CRLinear(4, 4, 2, beta=0.5, bias=True)
    nn.init.ones_(layer.b.bias)
    x, previous = torch.randn(3, 4), torch.randn(3, 4)
    y = layer(x, previous)
    torch.testing.assert_close(layer.inverse(y, layer.a(x)), previous)


def test_the_start_is_as_wide_as_asked():
    torch.manual_seed(0)
    layer = CRLinear(256, 256, 64, std=0.05)
    assert (layer.b.weight @ layer.a.weight).std().item() == pytest.approx(0.05, rel=0.1)
    assert CRLinear(8, 8, 2, std=0).b.weight.abs().sum() == 0


def test_behind_frozen_blocks_recomputed_gradients_are_the_plain_ones():
    found = []
    for recompute in (False, True):
        model = stack([0.5] * 3, recompute=recompute)
        for block in list(model)[:2]:
            block.requires_grad_(False)
        found.append({name: grad for name, grad in grads(model, inputs()).items() if grad is not None})
    assert {name.split(".")[0] for name in found[0]} == {"2", "3"}
    assert worst(*found) < 1e-5
