"""SkipV1Former: heads written out, a cache that gives what the whole sequence gives, values beside a model's code."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.utils.checkpoint import checkpoint

from examples.gpt.model import rotary_angles, rotate
from lightning_eff.layers.skipv1 import FirstValue, Relay, SkippedValue, SkipV1Attention, SkipV1Cache

HEADS = [(4, 4), (4, 2), (8, 4)]


def stack(n_head: int, n_kv_head: int, layers: int = 3, dtype: torch.dtype = torch.float64) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(SkipV1Attention(32, n_head, n_kv_head, first=index == 0).to(dtype) for index in range(layers))


def run(layers: nn.ModuleList, x: Tensor, cache: SkipV1Cache | None = None) -> Tensor:
    v1 = None
    for index, layer in enumerate(layers):
        y, v1 = layer(x, v1, None if cache is None else cache.layer(index))
        x = x + y
    if cache is not None:
        cache.advance(x.shape[1])
    return x


def head_by_head(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """One head after the other: which key and value head it reads is counted out."""
    time, first = x.shape[1], None
    for layer in layers:
        size, n_kv = layer.head_dim, layer.n_kv_head
        angles = rotary_angles(time, size, x.device)
        cos, sin = angles.cos().double(), angles.sin().double()
        W = {name: module.weight for name, module in layer.named_children()}
        value = x @ W["value"].T
        values = list(value.split(size, dim=-1))
        if first is None:
            first = values
        else:
            values += first[n_kv // 2 :]
        assert len(values) == n_kv
        outputs = []
        for head in range(layer.n_head):
            group = head * n_kv // layer.n_head
            q = rotate(x @ W["query"][head * size : (head + 1) * size].T, cos, sin)
            k = rotate(x @ W["key"][group * size : (group + 1) * size].T, cos, sin)
            scores = (q @ k.mT / math.sqrt(size)).masked_fill(torch.ones(time, time).triu(1).bool(), -math.inf)
            outputs.append(scores.softmax(-1) @ values[group])
        x = x + torch.cat(outputs, dim=-1) @ W["out"].T
    return x


@pytest.mark.parametrize(("n_head", "n_kv_head"), HEADS)
def test_each_head_reads_the_values_that_the_paper_says(n_head, n_kv_head):
    layers, x = stack(n_head, n_kv_head), torch.randn(2, 7, 32, dtype=torch.float64)
    torch.testing.assert_close(run(layers, x), head_by_head(layers, x), rtol=1e-12, atol=1e-12)


def test_weights_are_fewer_by_half_of_the_values_of_later_layers():
    layers = stack(4, 4)
    assert [sum(p.numel() for p in layer.parameters()) for layer in layers] == [4 * 32**2, 3.5 * 32**2, 3.5 * 32**2]


@pytest.mark.parametrize(("n_head", "n_kv_head"), HEADS)
@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 1, 3], [9]])
def test_the_cache_gives_what_the_whole_sequence_gives(n_head, n_kv_head, pieces):
    layers, x = stack(n_head, n_kv_head), torch.randn(2, 9, 32, dtype=torch.float64)
    cache = SkipV1Cache(3, 2, 9, n_kv_head, 32 // n_head, like=x)
    with torch.no_grad():
        parts = [run(layers, piece, cache) for piece in x.split(pieces, dim=1)]
        # Angles of position 8 from position 0 on, or from 8 on: float32 rounds them alike.
        torch.testing.assert_close(torch.cat(parts, dim=1), run(layers, x), rtol=1e-9, atol=1e-9)
        with pytest.raises(ValueError, match="cache='9 positions' is not allowed: it must be long enough for 10"):
            run(layers, x[:, :1], cache)


@pytest.mark.parametrize("layers", [1, 2, 24, 32])
def test_the_cache_has_a_quarter_less_times_all_but_the_first_layer(layers):
    cache = SkipV1Cache(layers, 2, 16, 4, 8)
    usual = 2 * layers * 2 * 4 * 16 * 8 * 4
    assert cache.nbytes == pytest.approx(usual * (1 - 0.25 * (layers - 1) / layers))
    assert cache.keys.nbytes == usual / 2
    assert cache.nbytes - cache.keys.nbytes == usual / 2 * (layers + 1) / 2 / layers


def test_checkpointed_with_v1_as_an_argument_gradients_are_the_same():
    layers, x = stack(4, 2), torch.randn(2, 7, 32, dtype=torch.float64)
    run(layers, x).square().sum().backward()
    wanted = [parameter.grad for parameter in layers.parameters()]
    layers.zero_grad()
    y, v1 = x, None
    for layer in layers:
        out, v1 = checkpoint(layer, y, v1, use_reentrant=False)
        y = y + out
    y.square().sum().backward()
    for parameter, right in zip(layers.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, right, rtol=1e-12, atol=1e-12)


class Blocks(nn.Module):
    """One block or several; the first layer's values come out where they come from."""

    def __init__(self, *layers: SkipV1Attention) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, v1: Tensor | None = None) -> Any:
        given = v1
        for layer in self.layers:
            y, given = layer(x, given)
            x = x + y
        return (x, given) if v1 is None else x


def _gradients_of_shards() -> list[Tensor]:
    blocks = nn.ModuleList(Blocks(layer) for layer in stack(4, 2, dtype=torch.float32))
    for block in blocks:
        torch.distributed.fsdp.fully_shard(block)
    x, v1 = blocks[0](torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1)))
    for block in blocks[1:]:
        x = block(x, v1)
    x.square().sum().backward()
    return [parameter.grad.full_tensor() for parameter in blocks.parameters()]


def _gradients_of_stages() -> list[Tensor]:
    rank, layers = torch.distributed.get_rank(), stack(4, 2, dtype=torch.float32)
    stage = Blocks(layers[0]) if rank == 0 else Blocks(*layers[1:])
    pipe = pipelining.PipelineStage(stage, rank, 2, torch.device("cpu"))
    schedule = pipelining.ScheduleGPipe(pipe, 2, loss_fn=lambda y, _: y.square().sum(), scale_grads=False)
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    schedule.step(x) if rank == 0 else schedule.step(target=x)
    return [parameter.grad for parameter in stage.parameters()]


@pytest.mark.slow
def test_sharded_and_in_a_pipeline_gradients_are_the_same(pool):
    layers = stack(4, 2, dtype=torch.float32)
    run(layers, torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    wanted = [parameter.grad for parameter in layers.parameters()]
    stages = pool.run(_gradients_of_stages)
    for got in (*pool.run(_gradients_of_shards), [*stages[0], *stages[1]]):
        for mine, right in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, right)


def test_gradients_of_all_layers_meet_in_the_first_ones_values():
    layers, x = stack(4, 4), torch.randn(1, 5, 32, dtype=torch.float64)
    grads = torch.autograd.grad(run(layers, x).sum(), layers[0].value.weight)
    own, shared = grads[0].chunk(2)
    step = 1e-6
    with torch.no_grad():
        before = run(layers, x).sum()
        layers[0].value.weight[20, 3] += step
        assert shared[20 - 16, 3].item() == pytest.approx((run(layers, x).sum() - before).item() / step, rel=1e-4)
    assert own.abs().sum() > 0


@pytest.mark.slow
def test_compiled_it_is_the_same():
    layer, x, v1 = SkipV1Attention(32, 4, 2), torch.randn(2, 7, 32), torch.randn(2, 7, 8)
    y, _ = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, v1)
    torch.testing.assert_close(y, layer(x, v1)[0])


def test_bad_arguments_are_named():
    for arguments, words in (
        ({"n_head": 3}, "n_head=3"),
        ({"n_head": 1}, "n_head=1 is not allowed: it must be even: half of the value heads"),
        ({"n_kv_head": 1}, "n_kv_head=1 is not allowed: it must be even"),
        ({"n_head": 8, "n_kv_head": 6}, "n_kv_head=6 is not allowed: it must be a divisor of n_head=8"),
        ({"theta": 0}, "theta=0"),
    ):
        with pytest.raises(ValueError, match=words):
            SkipV1Attention(**{"d_model": 32, "n_head": 4, **arguments})
    with pytest.raises(
        ValueError, match=r"v1=None is not allowed: it must be the first layer's, of shape \(2, 5, 16\)"
    ):
        SkipV1Attention(32, 4)(torch.ones(2, 5, 32))
    with pytest.raises(ValueError, match=r"v1 of shape \(2, 5, 16\) is not allowed: it must be None"):
        SkipV1Attention(32, 4, first=True)(torch.ones(2, 5, 32), torch.ones(2, 5, 16))
    with pytest.raises(ValueError, match="n_kv_head=3"):
        SkipV1Cache(2, 1, 8, 3, 4)


# --- beside a model's own code ---------------------------------------------------------------------------------------


class Usual(nn.Module):
    """An attention as people write it, which knows nothing of the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


def beside(layers: int = 3, mean: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model, relay = nn.Sequential(*(Usual() for _ in range(layers))), Relay()
    for index, layer in enumerate(model):
        layer.value = SkippedValue(layer.value, relay, 4, mean) if index else FirstValue(layer.value, relay)
    return model


def explicit(model: nn.Sequential) -> nn.ModuleList:
    layers = nn.ModuleList(SkipV1Attention(32, 4, first=index == 0, theta=None) for index in range(len(model)))
    layers.load_state_dict(model.state_dict())
    return layers


def grads(model: nn.Module, forward, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    forward(x).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def test_beside_a_models_code_it_is_the_layer_with_an_argument():
    model, x = beside(), torch.randn(2, 7, 32)
    layers = explicit(model)  # their weights have the same names
    torch.testing.assert_close(model(x), run(layers, x))
    wanted = grads(layers, lambda x: run(layers, x), x)
    for got, right in zip(grads(model, model, x), wanted, strict=True):
        torch.testing.assert_close(got, right)


def test_under_checkpointing_and_in_copies_as_well():
    model, x = beside(), torch.randn(2, 7, 32)
    wanted = grads(model, model, x)

    def checkpointed(x):
        for layer in model:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    for got, right in zip(grads(model, checkpointed, x), wanted, strict=True):
        torch.testing.assert_close(got, right)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len({id(layer.value.relay) for layer in [*other, *model]}) == 2
        for got, right in zip(grads(other, other, x), wanted, strict=True):
            torch.testing.assert_close(got, right)


def test_two_passes_that_wait_are_no_trouble_but_under_checkpointing_where_they_are_refused():
    model, x = beside(), torch.randn(2, 7, 32)
    wanted = [a + b for a, b in zip(grads(model, model, x), grads(model, model, 2 * x), strict=True)]
    model.zero_grad()
    one, two = model(x), model(2 * x)
    (one.square().sum() + two.square().sum()).backward()
    for parameter, right in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, right)

    def checkpointed(x):
        return checkpoint(model[1], model[0](x), use_reentrant=False)

    dropped = checkpointed(x)  # a pass that never has a backward pass
    del dropped
    checkpointed(x).sum().backward()
    one, two = checkpointed(x), checkpointed(2 * x)
    with pytest.raises(RuntimeError, match="several forward passes wait"):
        (one.sum() + two.sum()).backward()


def test_layers_out_of_order_are_refused():
    model = beside()
    with pytest.raises(RuntimeError, match="there are none"):
        model[1](torch.ones(1, 3, 32))
    model[0](torch.ones(1, 3, 32))
    with pytest.raises(RuntimeError, match=r"those there are have shape \(1, 3, 16\)"):
        model[1](torch.ones(1, 4, 32))


def test_a_trained_model_begins_with_the_mean_of_each_two_heads():
    torch.manual_seed(0)
    usual = Usual()
    heads = usual.value.weight.detach().split(8)
    own = SkippedValue(usual.value, Relay(), 4, mean=True)
    assert torch.equal(own.weight, torch.cat([(heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2]))
    assert torch.equal(SkippedValue(usual.value, Relay(), 4).weight, torch.cat(heads[:2]))


@pytest.mark.slow
def test_compiled_beside_a_models_code():
    model, x = beside(), torch.randn(2, 7, 32)
    wanted = grads(model, model, x)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        for got, right in zip(grads(model, compiled, x), wanted, strict=True):
            torch.testing.assert_close(got, right)
