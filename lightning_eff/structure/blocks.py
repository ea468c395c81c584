"""A model's repeated blocks and their matrices, attention and FFN told apart by shape rather than by name.

What repeats decides: siblings of one class are blocks, and the matrices inside them are what a method works on.
Embeddings, heads and everything else that occurs once are left out; so are norms.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from lightning_eff.arguments import check_instance
from lightning_eff.structure.roles import Role, roles_of
from lightning_eff.structure.tree import children, join, unwrap, walk
from lightning_eff.structure.weights import factored, once, weights_of, with_adapters, without_tables

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)

Found = dict[int, tuple[str, nn.Module]]  # id of a module -> its path and itself


@dataclass(frozen=True)
class Matrix:
    """One unit of work: a weight matrix, or an adapter's parameters.

    Attributes:
        name: clean name of the weight; of an adapter the name of the frozen base weight beside it.
        parameters: clean names of the parameters that belong together: the weight itself, or the adapter's, such as
            LoRA's pair (A, B). An adapter's base weight is not among them.
        role: what it does in its block: ``"attention"``, ``"ffn"`` or ``"other"``.
        block: clean path of the block that it lies in; empty outside the blocks.
    """

    name: str
    parameters: tuple[str, ...]
    role: Role
    block: str


@dataclass(frozen=True)
class Block:
    """One of a model's repeated blocks.

    Attributes:
        name: clean path of the module, such as ``"transformer.h.0"``.
        matrices: its matrices in the order of definition.
    """

    name: str
    matrices: tuple[Matrix, ...]

    @property
    def family(self) -> str:
        """Path of the container, the same for blocks that repeat each other, such as ``"encoder.block"``."""
        return self.name.rpartition(".")[0]


def find_blocks(model: nn.Module) -> list[Block]:
    """The repeated blocks of a model, outermost first, in the order of definition.

    Siblings of one class repeat each other, whatever their sizes, in a container (``ModuleList``, ``Sequential``,
    ``ModuleDict``) or as attributes; bare layers (an ``nn.Linear`` in a ``Sequential``) are no blocks. Of nested
    repetitions the outer one counts (a transformer block, not the experts within it), unless its members hold little
    else than the inner one (a stage of a hierarchical model). Where nothing repeats, a ``ModuleList`` of one is a stack
    of one. A block without a matrix is left out, and a tied weight belongs to the first block that holds it.

    Args:
        model: wrapped or not; it is only looked at.

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 32), 2, enable_nested_tensor=False)
        >>> for matrix in find_blocks(encoder)[0].matrices:
        ...     print(matrix.name, matrix.role)
        layers.0.self_attn.in_proj_weight attention
        layers.0.self_attn.out_proj.weight attention
        layers.0.linear1.weight ffn
        layers.0.linear2.weight ffn
    """
    check_instance("model", model, nn.Module, "an nn.Module")
    root = unwrap(model)
    families = _families("", root) or _stacks_of_one(root)
    order = {id(module): place for place, (_, module) in enumerate(walk("", root))}
    seen: set[int] = set()
    in_order = sorted(families.values(), key=lambda found: order[id(found[1])])
    blocks = [Block(path, tuple(_matrices_of_block(path, block, seen))) for path, block in in_order]
    return [block for block in blocks if block.matrices]


def _kind(module: nn.Module) -> object:
    """Modules of one kind repeat each other. A container's class says nothing, so its children's classes do."""
    if isinstance(module, _CONTAINERS):
        return tuple(type(child) for _, child in children(module))
    if type(module) is nn.Module:
        return tuple((name, type(child)) for name, child in children(module))
    return type(module)


def _is_composite(module: nn.Module) -> bool:
    """A block is made of modules and has weights: a bare layer is none, nor is a list of such that nobody calls."""
    inside = children(module)
    listed = type(module) in (nn.ModuleList, nn.ModuleDict) and not any(children(child) for _, child in inside)
    return bool(inside) and not listed and bool(_ids(module))


@dataclass(frozen=True)
class _Sibling:
    """A composite child, or what a stage holds in its place.

    Attributes:
        path: of the module.
        module: itself.
        in_stack: whether it lies in a ``ModuleList``, or in a stage: a block, whatever its class.
        in_stage: the latter.
        at_end: whether it is the first or the last of the container that it lies in.
    """

    path: str
    module: nn.Module
    in_stack: bool
    in_stage: bool
    at_end: bool


def _siblings(path: str, module: nn.Module, in_stage: bool = False) -> list[_Sibling]:
    """The composite children; in place of containers that hold nothing but such, unlike each other, what they hold.

    These are stages of a convolutional network, from one block to many.
    """
    composite = [(join(path, name), child) for name, child in children(module) if _is_composite(child)]
    stages = {id(child): _kind(child) for _, child in composite if _holds_blocks_alone(child)}
    alike = len(stages) > 1 and len(set(stages.values())) == 1
    in_stack = in_stage or isinstance(module, nn.ModuleList)
    found = []
    for place, (child_path, child) in enumerate(composite):
        if id(child) in stages and not alike:
            found += _siblings(child_path, child, in_stage=in_stage or len(stages) > 1)
        else:
            found.append(_Sibling(child_path, child, in_stack, in_stage, place in (0, len(composite) - 1)))
    return found


def _holds_blocks_alone(module: nn.Module) -> bool:
    inside = [child for _, child in children(module) if _ids(child)]
    return isinstance(module, _CONTAINERS) and bool(inside) and all(map(_is_composite, inside))


def _families(path: str, module: nn.Module) -> Found:
    siblings = _siblings(path, module)
    kinds = {id(one.module): _kind(one.module) for one in siblings}
    inner = {id(one.module): _families(one.path, one.module) for one in siblings}
    counts = Counter(kinds[id(one.module)] for one in siblings)
    most = max(counts.values(), default=0)
    stages = {
        id(one.module)
        for one in siblings
        if counts[kinds[id(one.module)]] > 1 and _is_stage(one.module, list(inner[id(one.module)].values()))
    }
    kinds_of_stages = {kinds[key] for key in stages}
    kinds_in_stages = {_kind(block) for key in stages for _, block in inner[key].values()}
    kinds_below = {kinds[id(o.module)]: {_kind(m) for _, m in walk("", o.module)} for o in siblings}
    # A stem and a head of one class, around blocks of another, are no blocks.
    amid = {kinds[id(one.module)] for one in siblings if not one.at_end}
    around = {kind for kind, count in counts.items() if kind not in amid and count < most}
    # Nor is what a larger block is made of.
    parts = {kind for kind in counts for k, n in counts.items() if n > 1 and k != kind and kind in kinds_below[k]}
    any_in_stage = any(one.in_stage for one in siblings)
    found: Found = {}
    for one in siblings:
        key = id(one.module)
        kind = kinds[key]
        between = any_in_stage and not one.in_stage  # stages, which is no block either
        repeats = counts[kind] > 1 and not (kind in around or between or kind in parts)
        held: Found = inner[key]
        if kind in kinds_of_stages:
            if key not in stages:  # a stage of a single block
                held = {id(m): (p, m) for p, m in walk(one.path, one.module) if _kind(m) in kinds_in_stages}
        elif not stages and (repeats or (one.in_stack and most > 1)):
            held = {key: (one.path, one.module)}
        found |= {k: v for k, v in held.items() if k not in found}
    return found


def _stacks_of_one(root: nn.Module) -> Found:
    """The members of the outermost ``ModuleList``s with a single one."""
    found: Found = {}
    for path, module in walk("", root):
        if any(path.startswith(f"{outer}.") for outer, _ in found.values()):
            continue
        if isinstance(module, nn.ModuleList) and len(module) == 1:
            (name, child) = children(module)[0]
            if _is_composite(child) and not isinstance(child, _CONTAINERS):
                found[id(child)] = (join(path, name), child)
    return found


def _is_stage(module: nn.Module, inner: list[tuple[str, nn.Module]]) -> bool:
    """Whether a module is but a stack of blocks: each does all that it does, and it has little beside them.

    Little is fewer matrices than one of the blocks has. The experts and the sublayers of a block repeat as well, but
    each is only a feed-forward network or only an attention, or a single convolution, or they have names of their own.
    """
    names = {re.sub(r"\d+\w?$", "", path.rpartition(".")[2]) for path, _ in inner}
    if not inner or len(names) > 1 or any(_tasks(module) - _tasks(block) for _, block in inner):
        return False
    held = [_ids(block) for _, block in inner]
    return 1 < max(map(len, held)) > len(_ids(module).difference(*held))


def _tasks(module: nn.Module) -> set[Role]:
    return {matrix.role for matrix in _matrices_of_block("", module, set()) if matrix.role != "other"}


def _ids(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter, _ in weights_of("", module)}


def _matrices_of_block(path: str, block: nn.Module, seen: set[int]) -> Iterator[Matrix]:
    weights = without_tables(with_adapters(once(weights_of(path, block), seen)))
    chains = [name for name, module in walk(path, block) if isinstance(module, nn.Sequential)]
    layers = factored(path, block)
    owners = {weight.name: weight.shape.path.rpartition(".")[0] for weight in weights}
    # The factors of a layer are one shape, under its path; any other weight goes by its own name.
    of = {name: owner if owner in layers else name for name, owner in owners.items()}
    shapes = {of[weight.name]: layers.get(of[weight.name], weight.shape) for weight in weights}
    roles = dict(zip(shapes, roles_of(list(shapes.values()), chains), strict=True))
    for weight in weights:
        yield Matrix(weight.name, weight.parameters, roles[of[weight.name]], path)
