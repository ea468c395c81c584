"""Checks of constructor arguments, with one form of message, and sizes for people."""

from __future__ import annotations

from typing import Any


def is_count(value: Any) -> bool:
    """Whether a value is an integer of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check(name: str, value: Any, ok: bool, allowed: str) -> None:
    """Raise a ValueError for an argument that is not allowed."""
    if not ok:
        raise ValueError(f"{name}={value!r} is not allowed: it must be {allowed}")


def readable_size(size: float) -> str:
    """A number of bytes with a unit.

    Example:
        >>> readable_size(40_090_000)
        '40.1 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
