"""What a model's own layers are: told by shapes, by names where nothing else tells, and by what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lightning_eff.structure import clean_named_modules
from lightning_eff.structure.weights import is_transposed

VALUES = ("v_proj", "value", "v", "wv", "to_v", "v_lin", "value_proj", "v_linear")
"""Last parts of a value projection's name. Shapes cannot tell it from the key's."""

_HEAD_COUNTS = ("num_key_value_heads", "n_kv_heads", "n_kv_head", "num_kv_heads")
_ALL_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads", "heads")

PLAIN: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
"""Where and in what is drawn, whatever the defaults are where the model is built."""


# --- linear layers ---------------------------------------------------------------------------------------------------


def sides(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, GPT-2's transposed one too; None of anything else, subclasses as well."""
    if type(module) is nn.Linear:
        return module.in_features, module.out_features
    if is_transposed(module):
        inputs, outputs = module.weight.shape  # type: ignore[union-attr, misc]
        return int(inputs), int(outputs)
    return None


def as_linear(module: nn.Module) -> nn.Linear:
    """The layer itself; in place of a transposed one an ``nn.Linear`` that does the same, with a copy of its weight."""
    if isinstance(module, nn.Linear):
        return module
    inputs, outputs = sides(module) or (0, 0)
    with torch.device("meta"):  # its own weights are not wanted
        linear = nn.Linear(inputs, outputs)
    weight, bias = module.weight, module.bias
    assert isinstance(weight, nn.Parameter)
    assert isinstance(bias, nn.Parameter)
    linear.weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=weight.requires_grad)
    linear.bias = bias
    return linear.train(module.training)


# --- what is computed ------------------------------------------------------------------------------------------------


def _called(module: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Any:
    """What a module gives with other weights, in evaluation, on the CPU whatever the default device is."""
    training = {each: each.training for each in module.modules()}
    try:
        with torch.no_grad(), torch.device("cpu"):
            return functional_call(module.eval(), tensors, (x,))
    finally:
        for each, was in training.items():
            each.training = was


def _random(module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Random parameters, and buffers as they are."""
    drawn = {n: torch.randn(p.shape, generator=generator, **PLAIN) for n, p in module.named_parameters()}
    for name, buffer in module.named_buffers():
        if not buffer.is_meta:
            drawn[name] = buffer.to("cpu", torch.float32 if buffer.is_floating_point() else buffer.dtype)
    return drawn


def swiglu(module: nn.Module, linears: Sequence[nn.Linear]) -> list[nn.Linear] | str:
    """Gate, up and down of a SwiGLU, or why it is none."""
    if any(linear.bias is not None for linear in linears):
        return "it has biases"
    down = [each for each in linears if sum(each.in_features == other.out_features for other in linears) >= 2]
    wide = [each for each in linears if each not in down]
    if len(down) != 1 or {each.weight.shape for each in wide} != {down[0].weight.T.shape}:
        return "its three matrices are not those of a gated network"
    generator = torch.Generator().manual_seed(0)
    drawn = _random(module, generator)  # vectors, too: a scale within it would be lost
    x = torch.randn(2, 3, wide[0].in_features, generator=generator, **PLAIN)
    x = x / x.norm(dim=-1, keepdim=True)
    try:
        y = _called(module, drawn, x)
    except Exception as error:
        return f"it cannot be called with one tensor ({type(error).__name__})"
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    W = [drawn[names[id(each.weight)]] for each in (*wide, down[0])]
    for order in ((0, 1), (1, 0)):
        gate, up = (W[index] for index in order)
        expected = (F.silu(x @ gate.T) * (x @ up.T)) @ W[2].T
        if isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, rtol=1e-3, atol=1e-3):
            return [wide[order[0]], wide[order[1]], down[0]]
    return "it does not compute down(silu(gate(x)) * up(x))"


def value_projection(attention: nn.Module) -> tuple[str, int | None] | None:
    """Path of an attention's value projection in it, and how many of its last channels are values where not all are.

    By itself it goes by its name. One that is fused with queries and keys is told by what the attention computes.
    """
    inside = clean_named_modules(attention)
    named = [name for name in inside if name.rpartition(".")[2] in VALUES]
    if len(named) == 1:
        return named[0], None
    layers = {name: module for name, module in inside.items() if sides(module) is not None}
    matrices = [parameter for parameter in attention.parameters() if parameter.ndim >= 2]
    if len(layers) != 2 or len(matrices) != 2:
        return None
    for (name, fused), (_, out) in permutations(layers.items()):
        (_, channels), (joined, _) = sides(fused) or (0, 0), sides(out) or (0, 0)
        values = (channels - joined) // 2  # queries are as wide as what goes into the output's projection
        if values > 0 and _ends_with_values(attention, fused, values):
            return name, values
    return None


def _ends_with_values(attention: nn.Module, fused: nn.Module, values: int) -> bool:
    """Whether nothing comes out without the last channels of a projection, and something without all others."""
    inputs, outputs = sides(fused) or (0, 0)
    generator = torch.Generator().manual_seed(0)
    drawn = _random(attention, generator)
    biases = [name for name, _ in attention.named_parameters() if name.endswith("bias")]
    drawn |= {name: torch.zeros(drawn[name].shape, **PLAIN) for name in biases}
    x = torch.randn(2, 4, inputs, generator=generator, **PLAIN)
    last = torch.arange(outputs, device="cpu") >= outputs - values
    calls = []

    def through(kept: Tensor) -> bool:
        def mask(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            calls.append(module)
            return output * kept

        handle = fused.register_forward_hook(mask)
        try:
            y = _called(attention, drawn, x)
        finally:
            handle.remove()
        y = y[0] if isinstance(y, tuple) else y
        return bool(isinstance(y, Tensor) and y.isfinite().all() and y.count_nonzero() > 0)

    try:
        return not through(~last) and through(last) and len(calls) == 2
    except Exception:  # it wants more than one tensor: angles, a mask
        return False


def value_heads(attention: nn.Module, channels: int, head_dim: int | None) -> int | None:
    """Value heads, from an argument, from attributes, or from those of a config; None: not known."""
    holders = [attention, getattr(attention, "config", None)]

    def known(*names: str) -> int | None:
        values = (getattr(holder, name, None) for holder in holders for name in names)
        return next((value for value in values if isinstance(value, int) and value > 0), None)

    size = head_dim or known("head_dim")
    return channels // size if size is not None else (known(*_HEAD_COUNTS) or known(*_ALL_HEADS))
