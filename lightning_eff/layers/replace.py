"""A model's layers replaced by others, found by structure, and a plan of it that does the same to another copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_eff.arguments import check, check_count, check_instance, check_number
from lightning_eff.layers.cr_net import CRFirst, CRLinear
from lightning_eff.layers.cr_stack import Connection
from lightning_eff.layers.moc import MoCFeedForward
from lightning_eff.layers.recognise import PLAIN, as_linear, sides, swiglu, value_heads, value_projection
from lightning_eff.layers.skipv1 import FirstValue, Relay, SkippedValue
from lightning_eff.layers.specs import CR, MoC, SkipV1
from lightning_eff.structure import Block, BlockParts, clean_named_modules, find_block_parts, find_blocks
from lightning_eff.structure.select import listed, select
from lightning_eff.structure.tree import replace_module, unwrap

OURS = (MoCFeedForward, FirstValue, SkippedValue, CRFirst, CRLinear)

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
    the same parameters, but those of GPT-2's ``Conv1D``, which are transposed; new ones are drawn from a generator of
    their own, equal on all ranks.

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
    layers = [each for each in module.modules() if isinstance(each, nn.Linear) or sides(each) is not None]
    matrices = [parameter for parameter in module.parameters() if parameter.ndim >= 2]
    if len(layers) != len(matrices):
        return "its matrices are not those of linear layers"
    if any(isinstance(each, nn.Dropout) and each.p > 0 for each in module.modules()):
        return "it has a dropout, which would be lost"
    if len(layers) == 3:
        ordered = swiglu(module, [as_linear(each) for each in layers])
        return ordered if isinstance(ordered, str) else _from(spec, [each.weight for each in ordered], module)
    if len(layers) != 2:
        return f"it has {len(layers)} matrices"
    if not spec.new_weights:
        return "it has no gate, and its weights cannot be kept: new_weights=True makes new ones"
    first, last = (as_linear(each) for each in layers)
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


# --- attentions ------------------------------------------------------------------------------------------------------


class _Values(NamedTuple):
    """A value projection, or one that ends with the values."""

    path: str
    module: nn.Module
    heads: int
    width: int


def _attentions(root: nn.Module, spec: SkipV1, plan: dict[str, Any]) -> None:
    left: dict[str, str] = {}
    stacks: dict[str, list[_Values]] = {}
    modules = clean_named_modules(root)
    for family, path, holder, width in _value_projections(root, spec, left):
        stacks.setdefault(family, []).extend(_value(path, modules[path], modules[holder], width, spec, left))
    replaced = {}
    for found in stacks.values():
        shapes = {(sides(each.module), each.heads, each.width) for each in found}
        if len(found) < 2 or len(shapes) > 1:
            left |= {each.path: "there are not two layers or more of equal value projections" for each in found}
            continue
        relay = Relay()
        for index, (path, module, heads, width) in enumerate(found):
            linear = as_linear(module)
            new = SkippedValue(linear, relay, heads, spec.mean, width) if index else FirstValue(linear, relay, width)
            replace_module(root, path, new.train(module.training))
            replaced[path] = f"SkippedValue, {heads // 2} of {heads} heads of its own" if index else "FirstValue"
    _finish(plan, "attention", replaced, left)


def _value_projections(root: nn.Module, spec: SkipV1, left: dict[str, str]) -> list[tuple[str, str, str, int | None]]:
    """The stack that it belongs to, its path, that of the attention, and its values, of each value projection."""
    blocks = find_blocks(root)
    if spec.value is not None:
        named = select([name for name in clean_named_modules(root) if name], spec.value, "value", "module")
        owners = {path: next((b.family for b in blocks if path.startswith(f"{b.name}.")), "") for path in named}
        return [(family, path, path.rpartition(".")[0], None) for path, family in owners.items()]
    found = []
    for parts in _parts(root, "attention"):
        if len(parts.attention) != 1:
            left[parts.name] = f"it has {len(parts.attention)} attentions"
            continue
        ((path, module),) = parts.attention.items()
        inside = value_projection(module)
        if inside is None:
            left[path] = "no value projection is found in it, by itself or fused: name one with value=['*.name']"
        else:
            found.append((parts.name.rpartition(".")[0], f"{path}.{inside[0]}", path, inside[1]))
    return found


def _value(
    path: str, module: nn.Module, attention: nn.Module, width: int | None, spec: SkipV1, left: dict[str, str]
) -> list[_Values]:
    shape = sides(module)
    if shape is None:
        left[path] = f"it is a {type(module).__name__} and no nn.Linear"
        return []
    width = width or shape[1]
    heads = value_heads(attention, width, spec.head_dim)
    if heads is None:
        left[path] = "the number of its heads is not known: give head_dim"
    elif heads == 0 or (spec.head_dim is not None and heads % 2):
        left[path] = f"head_dim={spec.head_dim} does not make an even number of heads of its {width} channels"
    elif heads % 2 or width % heads:
        left[path] = f"it has {heads} value head{'s' * (heads != 1)}, and half of them are wanted"
    else:
        return [_Values(path, module, heads, width)]
    return []


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
        shapes = [{name: sides(layer) for name, layer in found.items()} for found in inside]
        if len(blocks) < 2 or not shapes[0] or any(each != shapes[0] for each in shapes):
            left |= {block.name: "there are not two blocks or more of equal projections" for block in blocks}
            continue
        for index, (block, found) in enumerate(zip(blocks, inside, strict=True)):
            for name, layer in found.items():
                linear = as_linear(layer)
                new = _cr(linear, spec, generator) if index else CRFirst(linear)
                path = f"{block.name}.{name}"
                replace_module(root, path, new.train(layer.training))
                replaced[path] = f"CRLinear of rank {new.rank}" if isinstance(new, CRLinear) else "CRFirst"
        Connection([modules[block.name] for block in blocks], spec.recompute, spec.max_growth)
    _finish(plan, "linear", replaced, left)


def _projections(block: Block, modules: dict[str, nn.Module], left: dict[str, str]) -> dict[str, nn.Module]:
    """The linear layers of a block's attention and feed-forward network, by their path in it."""
    found = {}
    for matrix in block.matrices:
        path = matrix.name.removesuffix(".weight")
        layer = modules.get(path)
        if matrix.role == "other":
            left[path] = "it is neither of an attention nor of a feed-forward network"
        elif layer is not None and sides(layer) is not None:
            found[path.removeprefix(f"{block.name}.")] = layer
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
