"""Selection by globs: one loop and one message for every argument that takes patterns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase


def select(
    candidates: Iterable[str] | Mapping[str, Sequence[str]],
    patterns: str | Sequence[str],
    argument: str,
    what: str = "name",
) -> list[str]:
    """The candidates that at least one pattern matches, in their own order.

    Args:
        candidates: names; or each name with the further names by which it may be called too.
        patterns: shell-style globs (``fnmatch``, case-sensitive, ``*`` also matches dots); one or several.
        argument: what the patterns are called in the message.
        what: what a candidate is, in the singular.

    Raises:
        ValueError: a pattern matches none, with the closest and the first candidates.

    Example:
        >>> select(["h.0.attn", "h.0.mlp", "h.1.attn"], ["*attn"], "include")
        ['h.0.attn', 'h.1.attn']
        >>> select(["h.0.attn", "h.0.mlp"], ["h.0.atn"], "include", "module")
        Traceback (most recent call last):
        ValueError: include='h.0.atn' matches no module. Did you mean: h.0.attn? There are: h.0.attn, h.0.mlp
    """
    names = candidates if isinstance(candidates, Mapping) else dict.fromkeys(candidates, ())
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {name for name, more in names.items() if any(fnmatchcase(each, pattern) for each in (name, *more))}
        if not hits:
            close = get_close_matches(pattern, names)
            meant = f" Did you mean: {', '.join(close)}?" if close else ""
            raise ValueError(f"{argument}={pattern!r} matches no {what}.{meant} There are: {listed(list(names))}")
        chosen |= hits
    return [name for name in names if name in chosen]


def listed(names: Sequence[str], limit: int = 20) -> str:
    """Names in one line, the first of many.

    Example:
        >>> listed(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more
