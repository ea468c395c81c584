"""Layers found by structure and replaced, and the plan that does the same to another copy."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.gpt.model import GPT, GPTConfig
from lightning_eff.layers import CR, CRLinear, MoC, MoCFeedForward, SkipV1, describe_plan, replace_layers, uptrain
from lightning_eff.layers.replace import connections
from lightning_eff.structure import find_blocks

CONFIG = GPTConfig(block_size=17, n_layer=3, n_head=2, n_embd=16)


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG)


class Gated(nn.Module):
    """A gated network whose names tell nothing, and whose order is not the usual one."""

    def __init__(self, activation=F.silu, bias: bool = False, dropout: float = 0.0, scale: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16)) if scale else 1.0
        self.one, self.two = nn.Linear(16, 40, bias=bias), nn.Linear(16, 40, bias=bias)
        self.three = nn.Linear(40, 16, bias=bias)
        self.activation, self.dropout = activation, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.dropout(self.three(self.one(x) * self.activation(self.two(x))))


def swiglu(**arguments) -> GPT:
    model = gpt()
    for block in model.blocks:
        block.mlp = Gated(**arguments)
    return model


def tokens() -> Tensor:
    return torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(0))


def test_a_swiglu_keeps_its_weights_and_is_told_by_what_it_computes():
    model = swiglu()
    weights = [(block.mlp.two.weight, block.mlp.one.weight, block.mlp.three.weight) for block in model.blocks]
    wanted = model.eval()(tokens())
    model.train()
    plan = replace_layers(model, feed_forward=MoC(k=40))
    assert set(plan["replaced"]) == {f"blocks.{index}.mlp" for index in range(3)}
    for block, (gate, up, down) in zip(model.blocks, weights, strict=True):
        assert block.mlp.gate.weight is gate
        assert block.mlp.up.weight is up
        assert block.mlp.down.weight is down
        assert block.mlp.training
    torch.testing.assert_close(model(tokens()), wanted)  # with all of its channels it is what it was


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"activation": F.gelu}, "it does not compute down"),
        ({"activation": torch.sigmoid}, "it does not compute down"),
        ({"bias": True}, "it has biases"),
        ({"scale": True}, "it does not compute down"),  # which would be lost
        ({"dropout": 0.5}, "it has a dropout"),
    ],
)
def test_other_gated_networks_are_left_with_the_reason(arguments, words):
    model = swiglu(**arguments)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=f"feed_forward: nothing can be replaced: .*{words}"):
        replace_layers(model, feed_forward=MoC())
    assert dict(model.named_modules()) == before


def test_a_network_without_a_gate_becomes_one_of_as_many_new_weights_where_that_is_asked():
    model = gpt()
    before = sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="new_weights=True makes new ones"):
        replace_layers(model, feed_forward=MoC())
    state = torch.get_rng_state()
    deviations = [block.mlp.up.weight.std().item() for block in model.blocks]
    replace_layers(model, feed_forward=MoC(new_weights=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.blocks[0].mlp.gate.out_features == 40  # 64 * 2 / 3, a multiple of 8
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(before, rel=0.07)
    for block, deviation in zip(model.blocks, deviations, strict=True):
        assert block.mlp.gate.weight.std().item() == pytest.approx(deviation, rel=0.15)
        assert block.mlp.k == 8
    model.loss(tokens()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_values_of_the_first_layer():
    model = gpt()
    plan = replace_layers(model, attention=SkipV1())
    assert [block.attn.value.weight.shape for block in model.blocks] == [(16, 16), (8, 16), (8, 16)]
    assert plan["replaced"]["blocks.0.attn.value"] == "FirstValue"
    assert plan["replaced"]["blocks.2.attn.value"] == "SkippedValue, 1 of 2 heads of its own"
    model.loss(tokens()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_uptraining_begins_with_the_mean_of_each_two_heads():
    model = gpt()
    values = [block.attn.value.weight.detach().clone() for block in model.blocks]
    uptrain(model)
    assert torch.equal(model.blocks[0].attn.value.weight, values[0])
    for block, value in list(zip(model.blocks, values, strict=True))[1:]:
        assert torch.equal(block.attn.value.weight, value.view(2, 8, 16).mean(0))


# --- what GPT-2 has: transposed weights, and queries, keys and values in one projection -------------------------------


class Conv1D(nn.Module):
    """The linear layer of GPT-2 in `transformers`: its weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(0.3 * torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Fused(nn.Module):
    """An attention with queries, keys and values in one projection: each after the other, or head by head."""

    def __init__(self, linear=Conv1D, head_by_head: bool = False) -> None:
        super().__init__()
        self.n_head, self.head_by_head = 2, head_by_head
        self.c_attn = Conv1D(48, 16) if linear is Conv1D else nn.Linear(16, 48)
        self.c_proj = Conv1D(16, 16) if linear is Conv1D else nn.Linear(16, 16)

    def forward(self, x: Tensor, *_) -> Tensor:
        joined = self.c_attn(x)
        if self.head_by_head:
            q, k, v = joined.unflatten(-1, (2, 24)).transpose(1, 2).chunk(3, dim=-1)
        else:
            q, k, v = (each.unflatten(-1, (2, 8)).transpose(1, 2) for each in joined.chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(-2))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(64, 16), Conv1D(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


def gpt2(**arguments) -> GPT:
    model = gpt()
    for block in model.blocks:
        block.attn, block.mlp = Fused(**arguments), Network()
    return model


def trains(model: GPT) -> None:
    model.loss(tokens()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("linear", [Conv1D, nn.Linear])
def test_a_fused_projection_keeps_queries_and_keys_and_half_of_its_values(linear):
    model = gpt2(linear=linear)
    before = copy.deepcopy(model)
    plan = replace_layers(model, attention=SkipV1(mean=True))
    assert plan["replaced"]["blocks.0.attn.c_attn"] == "FirstValue"
    assert plan["replaced"]["blocks.2.attn.c_attn"] == "SkippedValue, 1 of 2 heads of its own"
    x = torch.randn(2, 5, 16)
    first, later = (model.blocks[index].attn.c_attn for index in (0, 1))
    plain = [before.blocks[index].attn.c_attn(x) for index in (0, 1)]
    torch.testing.assert_close(first(x), plain[0])
    queries_and_keys, own, other = plain[1].split([32, 8, 8], dim=-1)
    wanted = torch.cat([queries_and_keys, (own + other) / 2, plain[0][..., 40:]], dim=-1)
    torch.testing.assert_close(later(x), wanted)
    assert later.weight.shape == (40, 16)
    trains(model)


def test_a_projection_that_is_fused_head_by_head_is_left_with_the_reason():
    with pytest.raises(ValueError, match="no value projection is found in it, by itself or fused"):
        replace_layers(gpt2(head_by_head=True), attention=SkipV1())


def test_what_tells_a_fused_projection_leaves_the_model_as_it_was():
    model = gpt2()
    model.blocks[1].attn.c_attn.eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    for block in model.blocks:
        del block.attn.n_head
    with pytest.raises(ValueError, match="give head_dim"):
        replace_layers(model, attention=SkipV1())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_transposed_weights_become_low_rank_differences_and_those_of_the_first_block_stay():
    model = gpt2()
    x = torch.randn(2, 5, 16)
    wanted = model.blocks[0](x, None, None)
    plan = replace_layers(model, linear=CR(rank=0.25, recompute=True))
    assert len(plan["replaced"]) == 3 * 4
    assert not plan["left"]
    torch.testing.assert_close(model.blocks[0](x, None, None), wanted)
    assert model.blocks[1].attn.c_attn.b.bias is not None
    trains(model)


def test_a_network_of_transposed_weights_gets_new_ones():
    model = gpt2()
    replace_layers(model, feed_forward=MoC(new_weights=True))
    assert isinstance(model.blocks[0].mlp, MoCFeedForward)
    assert model.blocks[0].mlp.gate.weight.shape == (40, 16)
    assert model.blocks[0].mlp.gate.weight.std().item() == pytest.approx(0.3, rel=0.15)
    trains(model)


def test_heads_come_from_attributes_a_config_or_the_argument():
    for change, words in (
        (lambda attn: setattr(attn, "n_head", 1), "it has 1 value head, and half"),
        (lambda attn: delattr(attn, "n_head"), "give head_dim"),
        (lambda attn: setattr(attn, "value", nn.Identity()), "it is a Identity and no nn.Linear"),
    ):
        model = gpt()
        for block in model.blocks:
            change(block.attn)
        with pytest.raises(ValueError, match=f"attention: nothing can be replaced: .*({words}|no attention)"):
            replace_layers(model, attention=SkipV1())
    model = gpt()
    for block in model.blocks:
        del block.attn.n_head
        block.attn.config = type("Config", (), {"num_attention_heads": 8, "num_key_value_heads": 4})
    assert "2 of 4 heads" in replace_layers(model, attention=SkipV1())["replaced"]["blocks.1.attn.value"]
    model = gpt()
    plan = replace_layers(model, attention=SkipV1(head_dim=2, value=["*.key"]))
    assert "4 of 8 heads" in plan["replaced"]["blocks.1.attn.key"]


@pytest.mark.parametrize("recompute", [False, True])
def test_projections_become_low_rank_differences(recompute):
    model = gpt()
    state = torch.get_rng_state()
    plan = replace_layers(model, linear=CR(rank=0.25, recompute=recompute))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(plan["replaced"]) == 3 * 6
    assert plan["replaced"]["blocks.1.mlp.up"] == "CRLinear of rank 4"
    layers = [module for module in model.modules() if isinstance(module, CRLinear)]
    assert sum(layer.a.weight.numel() + layer.b.weight.numel() for layer in layers) == 2 * 4 * (4 * 32 + 2 * 80)
    assert (layers[0].b.weight @ layers[0].a.weight).std().item() == pytest.approx(0.02, rel=0.3)
    for _ in range(2):
        model.zero_grad()
        model.loss(tokens()).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    (connection,) = connections(model)
    assert connection.passes == (2 if recompute else 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"feed_forward": MoC(new_weights=True)},
        {"feed_forward": MoC(pattern="2:8", new_weights=True), "attention": SkipV1()},
        {"linear": CR(rank=3, recompute=True)},
    ],
    ids=str,
)
def test_the_plan_does_the_same_to_another_copy(settings):
    model, other = gpt(), gpt()
    plan = replace_layers(model, **settings, seed=5)
    plan = json.loads(json.dumps(plan))  # plain data
    assert replace_layers(other, plan) == plan
    for (name, one), (again, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert name == again
        assert torch.equal(one, two)
    assert describe_plan(plan).startswith(f"replaced {len(plan['replaced'])} layers: blocks.0.")
    for deep in (copy.deepcopy(model), other):
        deep.load_state_dict(model.state_dict())
        torch.testing.assert_close(deep(tokens()), model(tokens()))
    with torch.device("meta"):
        shapes = GPT(CONFIG)
    replace_layers(shapes, plan)
    assert {n: p.shape for n, p in shapes.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(parameter.is_meta for parameter in shapes.parameters())


@pytest.mark.parametrize(
    "settings",
    [{"feed_forward": MoC(new_weights=True)}, {"attention": SkipV1()}, {"linear": CR(rank=3)}],
    ids=["moc", "skipv1", "cr"],
)
def test_where_the_model_is_built_other_defaults_change_nothing(settings):
    """Strategies build models within a default device, and half precision within a default dtype."""
    model, other = gpt(), gpt()
    replace_layers(model, **settings)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            replace_layers(other, **settings)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        assert one.dtype is two.dtype


def test_a_swiglu_is_told_apart_under_other_defaults_too():
    model = swiglu()
    with torch.device("meta"):
        replace_layers(model, feed_forward=MoC())
    assert isinstance(model.blocks[0].mlp, MoCFeedForward)


def test_a_plan_of_another_model_and_a_second_time_are_refused():
    plan = replace_layers(gpt(), attention=SkipV1())
    deeper = GPT(GPTConfig(block_size=17, n_layer=4, n_head=2, n_embd=16))
    with pytest.raises(ValueError, match=r"plan is of another model: they differ in blocks\.3\.attn\.value"):
        replace_layers(deeper, plan)
    model = gpt()
    replace_layers(model, plan)
    with pytest.raises(ValueError, match=r"model='blocks\.0\.attn\.value, .* whose layers have not been replaced"):
        replace_layers(model, plan)
    with pytest.raises(ValueError, match="plan='a plan' is not allowed: it must be given without"):
        replace_layers(gpt(), plan, linear=CR())
    with pytest.raises(ValueError, match=r"linear=.* it must be alone"):
        replace_layers(gpt(), linear=CR(), attention=SkipV1())
    with pytest.raises(ValueError, match="feed_forward=None"):
        replace_layers(gpt())
    with pytest.raises(ValueError, match=r"nothing can be replaced: .*no repeated blocks"):
        replace_layers(nn.Sequential(nn.Linear(3, 4)), feed_forward=MoC())


def test_roles_stay_what_they_were():
    model = swiglu()
    replace_layers(model, feed_forward=MoC(), attention=SkipV1())
    roles = {matrix.name: matrix.role for block in find_blocks(model) for matrix in block.matrices}
    assert {role for name, role in roles.items() if ".mlp." in name} == {"ffn"}
    assert {role for name, role in roles.items() if ".attn." in name} == {"attention"}
    assert isinstance(model.blocks[0].mlp, MoCFeedForward)


@pytest.mark.parametrize("model", [gpt(), swiglu()], ids=["gelu", "swiglu"])
def test_both_factors_have_the_role_of_the_projection_that_they_are(model):
    before = {matrix.name: matrix.role for block in find_blocks(model) for matrix in block.matrices}
    replace_layers(model, linear=CR(rank=3))
    after = {matrix.name: matrix.role for block in find_blocks(model) for matrix in block.matrices}
    factors = {name.replace("weight", f"{factor}.weight"): role for name, role in before.items() for factor in "ab"}
    assert after == {
        **{name: role for name, role in before.items() if name.startswith("blocks.0.")},
        **{name: role for name, role in factors.items() if not name.startswith("blocks.0.")},
    }
    assert set(after.values()) == {"attention", "ffn"}


def test_a_network_that_all_blocks_share_is_replaced_in_all():
    model = swiglu()
    for block in model.blocks[1:]:
        block.mlp = model.blocks[0].mlp
    plan = replace_layers(model, feed_forward=MoC(k=2))
    assert list(plan["replaced"]) == ["blocks.0.mlp"]
    assert isinstance(model.blocks[0].mlp, MoCFeedForward)
    assert all(block.mlp is model.blocks[0].mlp for block in model.blocks)


def test_what_replaces_frozen_layers_is_frozen():
    model = gpt()
    model.blocks[1].requires_grad_(False)
    plan = replace_layers(model, linear=CR(rank=2))
    for path in plan["replaced"]:
        trained = {parameter.requires_grad for parameter in model.get_submodule(path).parameters()}
        assert trained == {not path.startswith("blocks.1.")}
