"""What the matrices of a transformer block do, told from their shapes: attention, feed-forward, or something else.

Every matrix of an attention or of a feed-forward network has the model's width d on one side. The other sides say
which it is: (a, b, b, a) are query, key, value and output, (a + 2b, a) a fused projection and its output; (f, f) with
f different from d goes up and down, (f, f, f) has a gate.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["attention", "ffn", "other"]

_HINTS: tuple[tuple[str, Role], ...] = (
    ("attn", "attention"),
    ("attention", "attention"),
    ("mlp", "ffn"),
    ("ffn", "ffn"),
    ("feed_forward", "ffn"),
    ("feedforward", "ffn"),
)


@dataclass(frozen=True)
class Shape:
    """A matrix as the matching sees it.

    Attributes:
        path: dotted path of the module that owns it.
        inputs: size of what goes in.
        outputs: size of what comes out.
        directed: whether it is known which side is which; a bare or transposed parameter does not tell.
        linear: whether it is a matrix product; a convolution is not, and has no role.
    """

    path: str
    inputs: int
    outputs: int
    directed: bool = True
    linear: bool = True

    def other_side(self, width: int) -> int | None:
        """The side that is not ``width``; None where neither is."""
        if self.inputs == width:
            return self.outputs
        return self.inputs if self.outputs == width else None


def roles_of(shapes: Sequence[Shape], chains: Collection[str] = ()) -> list[Role]:
    """The role of each matrix of one block.

    The smallest module whose matrices fit a pattern decides. Names decide only for what fits none (such as latent
    attention) and has the block's width on a side; what is left then is looked at once more. Four square matrices are
    taken for an attention unless they follow each other in a chain, and two or three beside one for a feed-forward
    network as wide as the model.

    Args:
        shapes: the matrices in the order of definition.
        chains: paths of the modules that apply their children one after the other (``nn.Sequential``).

    Example:
        >>> roles_of([Shape("attn.qkv", 8, 24), Shape("attn.out", 8, 8), Shape("up", 8, 32), Shape("down", 32, 8)])
        ['attention', 'attention', 'ffn', 'ffn']
    """
    roles: dict[int, Role] = {}
    _by_shape(shapes, chains, roles)
    linear = [shape for shape in shapes if shape.linear]
    sides = Counter(side for shape in linear for side in {shape.inputs, shape.outputs})
    width = max(sides, key=lambda side: (sides[side], -side), default=0)
    for index, shape in enumerate(shapes):
        hint = _hint(shape)
        if index not in roles and shape.linear and hint != "other" and width in (shape.inputs, shape.outputs):
            roles[index] = hint
    _by_shape(shapes, chains, roles, width)
    left = [index for index, shape in enumerate(shapes) if index not in roles and shape.linear]
    square = all(shapes[index].inputs == shapes[index].outputs == width for index in left)
    chained = _common_path([shapes[index] for index in left]) in chains if left else True
    if "attention" in roles.values() and "ffn" not in roles.values() and len(left) in (2, 3) and square and not chained:
        roles |= dict.fromkeys(left, "ffn")  # type: ignore[arg-type]
    return [roles.get(index, "other") for index in range(len(shapes))]


def _by_shape(
    shapes: Sequence[Shape], chains: Collection[str], roles: dict[int, Role], width: int | None = None
) -> None:
    """Give roles to what has none and fits a pattern, the matrices of the deepest modules first.

    With a ``width`` only to matrices that have it on a side.
    """
    ancestors = {".".join(parts[:n]) for s in shapes for parts in [s.path.split(".")] for n in range(len(parts) + 1)}
    for path in sorted(ancestors, key=lambda name: (-name.count(".") if name else 1, name)):
        below = [i for i, shape in enumerate(shapes) if not path or f"{shape.path}.".startswith(f"{path}.")]
        inside = [index for index in below if index not in roles and shapes[index].linear]
        inside = [i for i in inside if width in (None, shapes[i].inputs, shapes[i].outputs)]
        convolves = any(not shapes[index].linear for index in below)
        for cut in (0, *range(2, len(inside) - 1)):  # all of them, or two neighbours without modules of their own
            parts = [part for part in (inside[:cut], inside[cut:]) if part]
            found = [_match([shapes[index] for index in part], chains) for part in parts]
            if (
                convolves
                and len(inside) == 2
                and (found == ["attention"] or not _is_plain([shapes[i] for i in inside]))
            ):
                break  # the two projections of a state space model, around its convolution
            if "ffn" in found and _stands_alone(parts[found.index("ffn")], shapes):
                continue
            if None not in found and len(set(found)) == len(found):
                for part, role in zip(parts, found, strict=True):
                    roles |= dict.fromkeys(part, role)  # type: ignore[arg-type]
                break


def _stands_alone(part: Sequence[int], shapes: Sequence[Shape]) -> bool:
    """Whether a feed-forward network works on a width that nothing else in its block has: it is none."""
    inside = [{shapes[index].inputs, shapes[index].outputs} for index in part]
    width = set.intersection(*inside)
    if _is_plain([shapes[index] for index in part]):
        return False  # such as one over the positions of a sequence
    others = [shape for index, shape in enumerate(shapes) if index not in part and shape.linear]
    return bool(others) and not any(width & {shape.inputs, shape.outputs} for shape in others)


def _match(shapes: list[Shape], chains: Collection[str]) -> Role | None:
    if len(shapes) < 2:
        return None
    counts = Counter(side for shape in shapes for side in {shape.inputs, shape.outputs})
    for width in sorted(side for side, count in counts.items() if count == len(shapes)):
        if _is_ffn(shapes, width):
            return "ffn"
        if _is_attention(shapes, width) and _common_path(shapes) not in chains:
            # A gated channel mixing as wide as the model has the shapes of a query, a fused key and value, an output.
            return "ffn" if len(shapes) == 3 and all(_hint(shape) == "ffn" for shape in shapes) else "attention"
    return "attention" if _is_cross_attention(shapes) else None


def _is_plain(shapes: Sequence[Shape]) -> bool:
    """Whether all matrices go between the same two widths."""
    return len({frozenset((shape.inputs, shape.outputs)) for shape in shapes}) == 1


def _is_ffn(shapes: list[Shape], width: int) -> bool:
    sides = sorted(shape.other_side(width) or 0 for shape in shapes)
    inner = sides[0]
    patterns = ([inner, inner], [inner, inner, inner], [inner, 2 * inner])
    return inner != width and sides in patterns and _goes_and_returns(shapes, width)


def _is_attention(shapes: list[Shape], width: int) -> bool:
    sides = [shape.other_side(width) or 0 for shape in shapes]
    counts = Counter(sides)
    if len(shapes) == 2:  # fused projection and output
        inner, fused = sorted(sides)
        group = fused - inner  # keys and values
        return 0 < group <= 2 * inner and group % 2 == 0 and _goes_and_returns(shapes, width)
    pairs = [side for side, count in counts.items() if count in (2, 4)]
    if len(shapes) == 3:  # query, fused key and value, output
        if len(pairs) != 1:
            return False
        (inner,), (group,) = pairs, [side for side in sides if side != pairs[0]]
        if sides[-1] == group:  # what comes last is the output: these are two layers and the gated one behind them
            return False
        ends = [shape for shape, side in zip(shapes, sides, strict=True) if side == inner]
        return group <= 2 * inner and group % 2 == 0 and _goes_and_returns(ends, width)
    # Query, key, value and output, and perhaps single matrices beside them (a gate for each head).
    paired = sum(counts[side] for side in pairs)
    return paired == 4 and max(counts.values()) in (2, 4) and _goes_and_returns(shapes, width)


def _is_cross_attention(shapes: list[Shape]) -> bool:
    """Query and output on the model's width, key and value on the width of what they look at."""
    if len(shapes) != 4:
        return False
    kinds = Counter(frozenset((shape.inputs, shape.outputs)) for shape in shapes)
    return sorted(kinds.values()) == [2, 2] and len(frozenset.intersection(*kinds)) == 1


def _goes_and_returns(shapes: list[Shape], width: int) -> bool:
    known = [shape for shape in shapes if shape.directed and shape.inputs != shape.outputs]
    squares = any(shape.directed and shape.inputs == shape.outputs for shape in shapes)
    if len(known) < len(shapes) and not squares:
        return True  # some may go either way
    goes = squares or any(shape.inputs == width for shape in known)
    returns = squares or any(shape.outputs == width for shape in known)
    return goes and returns


def _common_path(shapes: list[Shape]) -> str:
    common: list[str] = []
    for parts in zip(*(shape.path.split(".") for shape in shapes)):  # noqa: B905 (up to the shortest)
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _hint(shape: Shape) -> Role:
    path = shape.path.lower()
    if re.search(r"(^|[._])(gate|router)$", path):  # which expert it is
        return "other"
    return next((role for word, role in _HINTS if word in path), "other")
