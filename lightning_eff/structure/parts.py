"""The attentions and feed-forward networks of a transformer's blocks as modules, found by structure or by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_eff.arguments import check_globs, check_instance
from lightning_eff.structure.blocks import find_blocks
from lightning_eff.structure.roles import Role
from lightning_eff.structure.select import select
from lightning_eff.structure.tree import clean_named_modules


@dataclass(frozen=True)
class BlockParts:
    """One block with its attention and feed-forward modules.

    Attributes:
        name: clean path of the block; of the common parent of its parts where these were given by patterns.
        block: the block itself.
        attention: its attention modules by clean path: one, or two in a decoder with cross-attention.
        ffn: its feed-forward modules by clean path. More than one where they have no common module, as in
            ``nn.TransformerEncoderLayer``; none in a block that has only an attention.
    """

    name: str
    block: nn.Module
    attention: dict[str, nn.Module]
    ffn: dict[str, nn.Module]


def find_block_parts(
    model: nn.Module,
    attention: str | Sequence[str] | None = None,
    ffn: str | Sequence[str] | None = None,
) -> list[BlockParts]:
    """Blocks with their attention and feed-forward modules.

    A part is the largest module within a block whose matrices all have one role, as
    `lightning_eff.structure.blocks` tells it from their shapes.

    Args:
        model: any module; wrappers (``torch.compile``, DDP) are looked through.
        attention: shell-style globs (``fnmatch``) on clean names of modules, in place of what is found; of nested
            matches the outermost counts.
        ffn: the same for feed-forward modules.

    Raises:
        ValueError: a pattern matches no module, or no attention or no feed-forward network is recognised; the message
            says what the blocks are made of.

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 32), 2, enable_nested_tensor=False)
        >>> for parts in find_block_parts(encoder):
        ...     print(parts.name, list(parts.attention), list(parts.ffn))
        layers.0 ['layers.0.self_attn'] ['layers.0.linear1', 'layers.0.linear2']
        layers.1 ['layers.1.self_attn'] ['layers.1.linear1', 'layers.1.linear2']
    """
    check_instance("model", model, nn.Module, "an nn.Module")
    check_globs("attention", attention, or_one=True)
    check_globs("ffn", ffn, or_one=True)
    modules = clean_named_modules(model)
    blocks = find_blocks(model)
    roles = {matrix.name: matrix.role for block in blocks for matrix in block.matrices}
    names = [block.name for block in blocks]
    found: dict[Role, list[str]] = {}
    for role, patterns in (("attention", attention), ("ffn", ffn)):
        if patterns is None:
            found[role] = [path for name in names for path in _pure(name, modules, roles, role)]  # type: ignore[index,arg-type]
        else:
            found[role] = _matching(modules, patterns, role)  # type: ignore[index]
        if not found[role]:  # type: ignore[index]
            inside = sorted({f"{matrix.name} ({matrix.role})" for matrix in (blocks[0].matrices if blocks else ())})
            seen = f"the first block, {names[0]}, has {', '.join(inside)}" if blocks else "there are no repeated blocks"
            what = "attention" if role == "attention" else "feed-forward network"
            raise ValueError(f"no {what} with a module of its own is recognised: {seen}. Name it with {role}='*.name'")
    parts: dict[str, BlockParts] = {}
    for role, paths in found.items():
        for path in paths:
            owner = max((name for name in names if _below(path, name)), key=len, default=path.rpartition(".")[0])
            block = parts.setdefault(owner, BlockParts(owner, modules[owner], {}, {}))
            (block.attention if role == "attention" else block.ffn)[path] = modules[path]
    return list(parts.values())


def _pure(path: str, modules: dict[str, nn.Module], roles: dict[str, Role], role: Role) -> Iterator[str]:
    """Largest modules from ``path`` downwards whose matrices all have the role; a block is never a part of itself."""
    for child in [name for name in modules if name.rpartition(".")[0] == path and name != path]:
        inside = {matrix_role for name, matrix_role in roles.items() if _below(name, child)}
        if inside == {role}:
            yield child
        elif role in inside:
            yield from _pure(child, modules, roles, role)


def _matching(modules: dict[str, nn.Module], patterns: str | Sequence[str], argument: str) -> list[str]:
    hits = select([name for name in modules if name], patterns, argument, "module")
    return [name for name in hits if not any(_below(name, other) and name != other for other in hits)]


def _below(name: str, path: str) -> bool:
    """Whether a clean name lies in a module, or is it."""
    return not path or f"{name}.".startswith(f"{path}.")
