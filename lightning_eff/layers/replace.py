"""A model's layers replaced by others, found by structure, and a plan of it that does the same to another copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lightning_eff.arguments import check, check_count, check_instance, check_number
from lightning_eff.layers.cr_net import CRFirst, CRLinear
from lightning_eff.layers.cr_stack import Connection
from lightning_eff.layers.moc import MoCFeedForward
from lightning_eff.layers.skipv1 import FirstValue, Relay, SkippedValue
from lightning_eff.layers.specs import CR, MoC, SkipV1
from lightning_eff.structure import Block, BlockParts, clean_named_modules, find_block_parts, find_blocks
from lightning_eff.structure.select import listed, select
from lightning_eff.structure.tree import replace_module, unwrap

OURS = (MoCFeedForward, FirstValue, SkippedValue, CRFirst, CRLinear)

VALUES = ("v_proj", "value", "v", "wv", "to_v", "v_lin", "value_proj", "v_linear")
"""Last parts of a value projection's name. Shapes cannot tell it from the key's."""

_HEAD_COUNTS = ("num_key_value_heads", "n_kv_heads", "n_kv_head", "num_kv_heads")
_ALL_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads", "heads")

PLAIN: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
"""Where and in what is drawn, whatever the defaults are where the model is built."""

_SPECS: dict[str, Callable[..., Any]] = {"feed_forward": MoC, "attention": SkipV1, "linear": CR}


def replace_layers(
    model: nn.Module,
    plan: dict[str, Any] | None = None,
    *,
    feed_forward: MoC | None = None,
    attention: SkipV1 | None = None,
    linear: CR | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Replace layers of a model in place, before it is wrapped, sharded, or given to an optimizer.

    Blocks, attentions and feed-forward networks are found by shape (`lightning_eff.structure`). Weights that stay are
    the same parameters; new ones are drawn from a generator of their own, equal on all ranks.

    Args:
        model: any module.
        plan: what an earlier call has returned, to do the same to a model of the same kind; then nothing else is given.
        feed_forward: what becomes of the feed-forward networks.
        attention: what becomes of the attentions.
        linear: what becomes of the projections of both; not together with one of the others.
        seed: of the generator, >= 0.

    Returns:
        The plan, plain data: the arguments, ``"replaced"`` (path -> by what) and ``"left"`` (path -> why it was left).

    Raises:
        ValueError: nothing can be replaced, with the reasons; the model's layers have been replaced already; the plan
            is of another model; or an argument that is not allowed.

    Example:
        >>> block = lambda: nn.TransformerEncoderLayer(8, 2, 32)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ModuleList([block(), block()]))
        >>> plan = replace_layers(model, linear=CR(rank=2))
        >>> plan["replaced"]["1.0.linear1"], plan["replaced"]["1.1.linear1"]
        ('CRFirst', 'CRLinear of rank 2')
    """
    check_instance("model", model, nn.Module, "an nn.Module")
    specs = {"feed_forward": feed_forward, "attention": attention, "linear": linear}
    if plan is not None:
        _check_plan(plan)
        check("plan", "a plan", not any(specs.values()), "given without other settings")
        specs = {name: None if plan[name] is None else make(**plan[name]) for name, make in _SPECS.items()}
        seed = plan["seed"]
    for name, spec in specs.items():
        check_instance(name, spec, _SPECS[name], f"a {_SPECS[name].__name__}", optional=True)  # type: ignore[arg-type]
    check_count("seed", seed, least=0, most=2**63 - 1)
    check("feed_forward", None, any(specs.values()), "a MoC, or attention a SkipV1, or linear a CR: one at least")
    check(
        "linear", linear, linear is None or not (feed_forward or attention), "alone: it replaces the others' matrices"
    )
    root = unwrap(model)
    done = [path for path, module in clean_named_modules(root).items() if isinstance(module, OURS)]
    check("model", listed(done, 3), not done, "one whose layers have not been replaced")
    made: dict[str, Any] = {name: None if spec is None else asdict(spec) for name, spec in specs.items()}  # type: ignore[call-overload]
    made |= {"version": 1, "seed": seed, "replaced": {}, "left": {}}
    generator = torch.Generator().manual_seed(seed)
    for spec in specs.values():
        if isinstance(spec, MoC):
            _feed_forwards(root, spec, made, generator)
        elif isinstance(spec, SkipV1):
            _attentions(root, spec, made)
        elif isinstance(spec, CR):
            _linears(root, spec, made, generator)
    if plan is not None and plan["replaced"] != made["replaced"]:
        wrong = sorted(set(plan["replaced"].items()) ^ set(made["replaced"].items()))
        raise ValueError(f"plan is of another model: they differ in {listed([path for path, _ in wrong], 5)}")
    return made


def describe_plan(plan: dict[str, Any]) -> str:
    """A plan in a line for the log.

    Args:
        plan: what :func:`replace_layers` has returned.

    Example:
        >>> describe_plan({"replaced": {"h.0.mlp": "MoCFeedForward"}, "left": {"h.0.attn": "it has one head"}})
        'replaced 1 layer: h.0.mlp (MoCFeedForward); left as they are: h.0.attn (it has one head)'
    """
    _check_plan(plan)
    replaced = [f"{path} ({what})" for path, what in plan["replaced"].items()]
    left = [f"{path} ({why})" for path, why in plan["left"].items()]
    rest = f"; left as they are: {listed(left, 4)}" if left else ""
    return f"replaced {len(replaced)} layer{'s' * (len(replaced) != 1)}: {listed(replaced, 4)}{rest}"


def uptrain(model: nn.Module, head_dim: int | None = None) -> dict[str, Any]:
    """Make a SkipV1Former of a trained model: own value heads begin as the mean of each two consecutive heads.

    The first layer is unchanged. The loss is far off before training goes on; by the paper 10 to 15 % of the compute
    of training from scratch reaches the loss of that. The plan is returned, as by :func:`replace_layers`.

    Args:
        model: as in :func:`replace_layers`.
        head_dim: channels of a value head; None: as the attention's attributes or its ``config`` say.

    Raises:
        ValueError: as :func:`replace_layers`.

    Example:
        >>> from examples.gpt.model import GPT, GPTConfig  # of the repository; any transformer will do
        >>> model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16))
        >>> list(uptrain(model)["replaced"].values())
        ['FirstValue', 'SkippedValue, 1 of 2 heads of its own']
    """
    return replace_layers(model, attention=SkipV1(mean=True, head_dim=head_dim))


def is_replaced(model: nn.Module) -> bool:
    """Whether a model has layers of this room in place of its own."""
    check_instance("model", model, nn.Module, "an nn.Module")
    return any(isinstance(module, OURS) for module in model.modules())


def connections(model: nn.Module) -> list[Connection]:
    """What connects the blocks of a model whose projections are :class:`CRLinear`; none in any other."""
    check_instance("model", model, nn.Module, "an nn.Module")
    found = [getattr(module.__dict__.get("forward"), "connection", None) for module in model.modules()]
    return list(dict.fromkeys(connection for connection in found if isinstance(connection, Connection)))


def _check_plan(plan: Any) -> None:
    ok = isinstance(plan, dict) and {"replaced", "left"} <= set(plan)
    check("plan", plan, ok, "what replace_layers has returned")


def _finish(plan: dict[str, Any], argument: str, replaced: dict[str, str], left: dict[str, str]) -> None:
    if not replaced:
        why = listed([f"{path} ({reason})" for path, reason in left.items()], 4)
        raise ValueError(f"{argument}: nothing can be replaced: {why}")
    plan["replaced"] |= replaced
    plan["left"] |= left


def _parts(root: nn.Module, argument: str) -> list[BlockParts]:
    try:
        return find_block_parts(root)
    except ValueError as error:
        raise ValueError(f"{argument}: nothing can be replaced: {error}") from None


# --- feed-forward networks -------------------------------------------------------------------------------------------


def _feed_forwards(root: nn.Module, spec: MoC, plan: dict[str, Any], generator: torch.Generator) -> None:
    replaced, left = {}, {}
    for parts in _parts(root, "feed_forward"):
        for path, module in parts.ffn.items():
            together = len(parts.ffn) == 1 and not isinstance(module, nn.Linear)
            layer = _moc(module, spec, generator) if together else "its matrices have no module in common"
            if isinstance(layer, str):
                left[path] = layer
            else:
                replace_module(root, path, layer)
                replaced[path] = f"MoCFeedForward, {layer.k} of {layer.gate.out_features} channels"
    _finish(plan, "feed_forward", replaced, left)


def _moc(module: nn.Module, spec: MoC, generator: torch.Generator) -> MoCFeedForward | str:
    """What takes the network's place, or why nothing can."""
    linears = [each for each in module.modules() if isinstance(each, nn.Linear)]
    matrices = [parameter for parameter in module.parameters() if parameter.ndim >= 2]
    if len(linears) != len(matrices):
        return "its matrices are not those of nn.Linear"
    if any(isinstance(each, nn.Dropout) and each.p > 0 for each in module.modules()):
        return "it has a dropout, which would be lost"
    if len(linears) == 3:
        ordered = _swiglu(module, linears)
        return ordered if isinstance(ordered, str) else _from(spec, [each.weight for each in ordered], module)
    if len(linears) != 2:
        return f"it has {len(linears)} matrices"
    if not spec.new_weights:
        return "it has no gate, and its weights cannot be kept: new_weights=True makes new ones"
    first, last = linears
    width, channels = first.in_features, max(8, round(first.out_features * 2 / 24) * 8)
    if (last.in_features, last.out_features) != (first.out_features, width):
        return "its two matrices do not go up and down again"
    shapes = ((first, (channels, width)), (first, (channels, width)), (last, (width, channels)))
    return _from(spec, [_drawn(like.weight, shape, generator) for like, shape in shapes], module)


def _drawn(like: Tensor, shape: tuple[int, int], generator: torch.Generator) -> nn.Parameter:
    """A normal matrix with the standard deviation of another one, where that one is."""
    drawn = torch.randn(shape, generator=generator, **PLAIN) * _spread(like)
    return nn.Parameter(drawn.to(like.device, like.dtype))


def _spread(weight: Tensor) -> float:
    return 0.02 if weight.is_meta else weight.detach().float().std().item()


def _from(spec: MoC, weights: Sequence[Tensor], module: nn.Module) -> MoCFeedForward | str:
    """The layer with these weights of gate, up and down."""
    channels, width = weights[0].shape
    if spec.k is not None and spec.k > channels:
        return f"it has {channels} channels, fewer than k={spec.k}"
    with torch.device("meta"):  # its own weights are not wanted
        layer = MoCFeedForward(width, channels, spec.k, spec.pattern, spec.recompute)
    for linear, weight in zip((layer.gate, layer.up, layer.down), weights, strict=True):
        linear.weight = weight  # type: ignore[assignment]
    return layer.train(module.training)


def _swiglu(module: nn.Module, linears: list[nn.Linear]) -> list[nn.Linear] | str:
    """Gate, up and down of a SwiGLU, told by what it computes with random weights, or why it is none."""
    if any(linear.bias is not None for linear in linears):
        return "it has biases"
    down = [each for each in linears if sum(each.in_features == other.out_features for other in linears) >= 2]
    wide = [each for each in linears if each not in down]
    if len(down) != 1 or {each.weight.shape for each in wide} != {down[0].weight.T.shape}:
        return "its three matrices are not those of a gated network"
    generator = torch.Generator().manual_seed(0)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    drawn = {names[id(each.weight)]: torch.randn(each.weight.shape, generator=generator, **PLAIN) for each in linears}
    others = {name: torch.ones(p.shape, **PLAIN) for name, p in module.named_parameters() if name not in drawn}
    x = torch.randn(2, 3, wide[0].in_features, generator=generator, **PLAIN)
    x = x / x.norm(dim=-1, keepdim=True)
    training = module.training
    try:
        with torch.no_grad():
            y = functional_call(module.eval(), drawn | others, (x,))
    except Exception as error:
        return f"it cannot be called with one tensor ({type(error).__name__})"
    finally:
        module.train(training)
    W = [drawn[names[id(each.weight)]] for each in (*wide, down[0])]
    for order in ((0, 1), (1, 0)):
        gate, up = (W[index] for index in order)
        expected = (F.silu(x @ gate.T) * (x @ up.T)) @ W[2].T
        if isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, rtol=1e-3, atol=1e-3):
            return [wide[order[0]], wide[order[1]], down[0]]
    return "it does not compute down(silu(gate(x)) * up(x))"


# --- attentions ------------------------------------------------------------------------------------------------------


def _attentions(root: nn.Module, spec: SkipV1, plan: dict[str, Any]) -> None:
    left: dict[str, str] = {}
    stacks: dict[str, list[tuple[str, nn.Linear, int]]] = {}
    modules = clean_named_modules(root)
    for family, path, holder in _value_projections(root, spec, left):
        stacks.setdefault(family, []).extend(_value(path, modules[path], modules[holder], spec, left))
    replaced = {}
    for found in stacks.values():
        shapes = {(linear.in_features, linear.out_features, heads) for _, linear, heads in found}
        if len(found) < 2 or len(shapes) > 1:
            left |= {path: "there are not two layers or more of equal value projections" for path, _, _ in found}
            continue
        relay = Relay()
        for index, (path, linear, heads) in enumerate(found):
            new = SkippedValue(linear, relay, heads, spec.mean) if index else FirstValue(linear, relay)
            replace_module(root, path, new.train(linear.training))
            replaced[path] = f"SkippedValue, {heads // 2} of {heads} heads of its own" if index else "FirstValue"
    _finish(plan, "attention", replaced, left)


def _value_projections(root: nn.Module, spec: SkipV1, left: dict[str, str]) -> list[tuple[str, str, str]]:
    """The stack that it belongs to, its path, and that of the attention, of each value projection."""
    blocks = find_blocks(root)
    if spec.value is not None:
        named = select([name for name in clean_named_modules(root) if name], spec.value, "value", "module")
        owners = {path: next((b.family for b in blocks if path.startswith(f"{b.name}.")), "") for path in named}
        return [(family, path, path.rpartition(".")[0]) for path, family in owners.items()]
    found = []
    for parts in _parts(root, "attention"):
        if len(parts.attention) != 1:
            left[parts.name] = f"it has {len(parts.attention)} attentions"
            continue
        ((path, module),) = parts.attention.items()
        inside = [name for name in clean_named_modules(module) if name.rpartition(".")[2] in VALUES]
        if len(inside) == 1:
            found.append((parts.name.rpartition(".")[0], f"{path}.{inside[0]}", path))
        else:
            left[path] = "no value projection of a usual name by itself is in it: name it with value=['*.name']"
    return found


def _value(
    path: str, module: nn.Module, attention: nn.Module, spec: SkipV1, left: dict[str, str]
) -> list[tuple[str, nn.Linear, int]]:
    if type(module) is not nn.Linear:
        left[path] = f"it is a {type(module).__name__} and no nn.Linear"
        return []
    heads = _heads(attention, module.out_features, spec.head_dim)
    if heads is None:
        left[path] = "the number of its heads is not known: give head_dim"
    elif heads == 0 or (spec.head_dim is not None and heads % 2):
        left[path] = (
            f"head_dim={spec.head_dim} does not make an even number of heads of its {module.out_features} channels"
        )
    elif heads % 2 or module.out_features % heads:
        left[path] = f"it has {heads} value head{'s' * (heads != 1)}, and half of them are wanted"
    else:
        return [(path, module, heads)]
    return []


def _heads(attention: nn.Module, rows: int, head_dim: int | None) -> int | None:
    """Value heads, from an argument, from attributes, or from those of a config."""
    holders = [attention, getattr(attention, "config", None)]

    def known(*names: str) -> int | None:
        values = (getattr(holder, name, None) for holder in holders for name in names)
        return next((value for value in values if isinstance(value, int) and value > 0), None)

    size = head_dim or known("head_dim")
    return rows // size if size is not None else (known(*_HEAD_COUNTS) or known(*_ALL_HEADS))


# --- projections -----------------------------------------------------------------------------------------------------


def _linears(root: nn.Module, spec: CR, plan: dict[str, Any], generator: torch.Generator) -> None:
    modules = clean_named_modules(root)
    families: dict[str, list[Block]] = {}
    for block in find_blocks(root):
        families.setdefault(block.family, []).append(block)
    replaced: dict[str, str] = {}
    left: dict[str, str] = {}
    for blocks in families.values():
        inside = [_projections(block, modules, left) for block in blocks]
        shapes = [{name: linear.weight.shape for name, linear in found.items()} for found in inside]
        if len(blocks) < 2 or not shapes[0] or any(each != shapes[0] for each in shapes):
            left |= {block.name: "there are not two blocks or more of equal projections" for block in blocks}
            continue
        for index, (block, found) in enumerate(zip(blocks, inside, strict=True)):
            for name, linear in found.items():
                new = _cr(linear, spec, generator) if index else CRFirst(linear)
                path = f"{block.name}.{name}"
                replace_module(root, path, new.train(linear.training))
                replaced[path] = f"CRLinear of rank {new.rank}" if isinstance(new, CRLinear) else "CRFirst"
        Connection([modules[block.name] for block in blocks], spec.recompute, spec.max_growth)
    _finish(plan, "linear", replaced, left)


def _projections(block: Block, modules: dict[str, nn.Module], left: dict[str, str]) -> dict[str, nn.Linear]:
    """The linear layers of a block's attention and feed-forward network, by their path in it."""
    found = {}
    for matrix in block.matrices:
        path = matrix.name.removesuffix(".weight")
        linear = modules.get(path)
        if matrix.role == "other":
            left[path] = "it is neither of an attention nor of a feed-forward network"
        elif isinstance(linear, nn.Linear) and type(linear) is nn.Linear:
            found[path.removeprefix(f"{block.name}.")] = linear
        else:
            left[path] = "its matrix is not an nn.Linear's"
    return found


def _cr(linear: nn.Linear, spec: CR, generator: torch.Generator) -> CRLinear:
    shorter = min(linear.in_features, linear.out_features)
    rank = min(spec.rank, shorter) if isinstance(spec.rank, int) else max(1, round(spec.rank * shorter))
    std = _spread(linear.weight) if spec.std is None else spec.std
    check_number("std", std, least=0)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # its own draws do not count
        layer = CRLinear(linear.in_features, linear.out_features, rank, spec.beta, linear.bias is not None, std)
    layer.to(**PLAIN)
    nn.init.constant_(layer.beta, spec.beta)
    layer.reset_parameters(generator)
    return layer.to(linear.weight.device, linear.weight.dtype)
