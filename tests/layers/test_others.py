"""Layers replaced in models of other people; `make test-architectures` has the packages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_eff.layers import CR, MoC, SkipV1, replace_layers

transformers = pytest.importorskip("transformers", reason="`make test-architectures` has it")
timm = pytest.importorskip("timm", reason="`make test-architectures` has it")

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = dict(
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
)
IDS = torch.arange(18).view(2, 9) % 64


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    config, model = (getattr(transformers, f"{name}{ending}") for ending in ("Config", "ForCausalLM"))
    return model(config(**SMALL))


def gradients(model: Any) -> list[torch.Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def decodes_with_its_own_cache(model: Any) -> None:
    model.eval()
    with torch.no_grad():
        whole = model(input_ids=IDS, use_cache=False).logits
        first = model(input_ids=IDS[:, :5], use_cache=True)
        rest = model(input_ids=IDS[:, 5:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 5:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2"])
@pytest.mark.parametrize(
    "settings",
    [{"feed_forward": MoC()}, {"attention": SkipV1(mean=True)}, {"linear": CR(rank=0.25, recompute=True)}],
    ids=["moc", "skipv1", "cr"],
)
def test_it_trains_and_decodes_with_its_own_cache(settings: Any, name: str) -> None:
    model: Any = build(name)
    plan = replace_layers(model, **settings)
    assert len(plan["replaced"]) == (21 if "linear" in settings else 3)
    assert not plan["left"]
    assert all(grad is not None for grad in gradients(model))
    decodes_with_its_own_cache(model)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2"])
def test_with_all_of_its_channels_it_is_what_it_was(name: str) -> None:
    model: Any = build(name).eval()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        replace_layers(model, feed_forward=MoC(k=88))
        torch.testing.assert_close(model(input_ids=IDS).logits, before)


@pytest.mark.parametrize("settings", [{"feed_forward": MoC()}, {"attention": SkipV1()}], ids=["moc", "skipv1"])
def test_its_own_activation_checkpointing_gives_the_same_gradients(settings: Any) -> None:
    model: Any = build("Llama")
    replace_layers(model, **settings)
    wanted = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for got, right in zip(gradients(model), wanted, strict=True):
        torch.testing.assert_close(got, right)


def gpt2(**dropouts: float) -> nn.Module:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **dropouts))


@pytest.mark.parametrize(
    ("settings", "replaced"),
    [
        ({"feed_forward": MoC(new_weights=True)}, 3),
        ({"attention": SkipV1(mean=True)}, 3),
        ({"linear": CR(rank=0.25, recompute=True)}, 12),
    ],
    ids=["moc", "skipv1", "cr"],
)
def test_gpt2_whose_weights_are_transposed_and_whose_values_are_fused(settings: Any, replaced: int) -> None:
    model: Any = gpt2(resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
    plan = replace_layers(model, **settings)
    assert len(plan["replaced"]) == replaced
    assert not plan["left"]
    assert all(grad is not None for grad in gradients(model))
    decodes_with_its_own_cache(model)


def test_gpt2_as_it_comes_has_dropouts_that_a_new_network_would_lose() -> None:
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.mlp \(it has a dropout, which would be lost\)"):
        replace_layers(gpt2(), feed_forward=MoC(new_weights=True))
    assert len(replace_layers(gpt2(), attention=SkipV1())["replaced"]) == 3


def test_a_gpt2s_first_block_is_what_it_was_and_later_ones_begin_with_the_means_of_their_values() -> None:
    model: Any = gpt2().eval()
    x, blocks = torch.randn(2, 5, 32), model.transformer.h
    with torch.no_grad():
        before = [block.attn.c_attn(x) for block in blocks]
        replace_layers(model, attention=SkipV1(mean=True))
        torch.testing.assert_close(blocks[0].attn.c_attn(x), before[0])
        queries_and_keys, values = before[2].split([64, 32], dim=-1)
        own = values.unflatten(-1, (2, 2, 8)).mean(-2).flatten(-2)
        wanted = torch.cat([queries_and_keys, own, before[0][..., 80:]], dim=-1)
        torch.testing.assert_close(blocks[2].attn.c_attn(x), wanted)


def vit(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
    return timm.models.VisionTransformer(**shape, **arguments)


@pytest.mark.parametrize(
    ("settings", "replaced"),
    [
        ({"feed_forward": MoC(new_weights=True)}, 3),
        ({"attention": SkipV1()}, 3),
        ({"linear": CR(rank=0.25, recompute=True)}, 12),
    ],
    ids=["moc", "skipv1", "cr"],
)
def test_a_vit_that_has_not_been_trained_gets_new_networks_or_projections_and_learns(
    settings: Any, replaced: int
) -> None:
    model = vit()
    plan = replace_layers(model, **settings)
    assert len(plan["replaced"]) == replaced
    assert not plan["left"]
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        ({}, {"feed_forward": MoC()}, r"blocks\.0\.mlp \(it has no gate"),
        ({"mlp_layer": timm.layers.SwiGLU}, {"feed_forward": MoC()}, r"blocks\.0\.mlp \(it has biases"),
    ],
)
def test_what_does_not_fit_a_vit_is_left_with_the_reason(arguments: Any, settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"nothing can be replaced: {words}"):
        replace_layers(vit(**arguments), **settings)
