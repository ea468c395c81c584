"""Checks of arguments, with one form of message, and sizes for people.

    ValueError: z_thresh=-1 is not allowed: it must be a number above 0

A wrong type is met before a wrong range, and both are a ValueError: the argument, its value, what is allowed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from numbers import Real
from typing import Any, NoReturn, get_args


def check(name: str, value: Any, ok: bool, allowed: str) -> None:
    """Raise a ValueError for an argument that is not allowed."""
    if not ok:
        refuse(name, value, allowed)


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is an integer of at least 1, or of another bound."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether a value is a finite number: no bool, and no number in a string."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that is larger than every float
        return False


def are_numbers(value: Any) -> bool:
    """Whether a value is a sequence, maybe an empty one, of finite numbers."""
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(is_number, value))


def refuse(name: str, value: Any, allowed: str) -> NoReturn:
    """Raise the ValueError of an argument that is not allowed."""
    shown = repr(value)
    if len(shown) > 200:
        shown = f"{shown[:200]}..."
    raise ValueError(f"{name}={shown} is not allowed: it must be {allowed}")


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    optional: bool = False,
    unit: str = "",
) -> None:
    """A finite number within bounds; no bool, and no number in a string.

    Args:
        name: of the argument.
        value: what was given.
        above: an open lower bound.
        least: a closed lower bound.
        below: an open upper bound.
        most: a closed upper bound.
        optional: whether None is allowed.
        unit: what the number counts, for the message.

    Example:
        >>> check_number("alpha", 1.5, least=0, below=1)
        Traceback (most recent call last):
        ValueError: alpha=1.5 is not allowed: it must be a number of at least 0 and below 1
    """
    if value is None and optional:
        return
    if is_number(value) and _within(value, above, least, below, most):
        return
    words = _bounds(above, least, below, most)
    allowed = " ".join(filter(None, ["a", "" if words else "finite", "number", unit and f"of {unit}", words]))
    refuse(name, value, f"{allowed}, or None" if optional else allowed)


def _within(value: Any, above: float | None, least: float | None, below: float | None, most: float | None) -> bool:
    return (
        (above is None or value > above)
        and (least is None or value >= least)
        and (below is None or value < below)
        and (most is None or value <= most)
    )


def _bounds(above: float | None, least: float | None, below: float | None, most: float | None) -> str:
    bounds = (("above", above), ("of at least", least), ("below", below), ("at most", most))
    return " and ".join(f"{word} {bound:.6g}" for word, bound in bounds if bound is not None)


def check_count(
    name: str, value: Any, *, least: int = 1, most: int | None = None, optional: bool = False, unit: str = ""
) -> None:
    """An integer within closed bounds; no bool, and no float of an integer's value.

    Example:
        >>> check_count("every_n_steps", 0)
        Traceback (most recent call last):
        ValueError: every_n_steps=0 is not allowed: it must be an integer of at least 1
    """
    if value is None and optional:
        return
    if is_count(value, least) and (most is None or value <= most):
        return
    words = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
    allowed = f"{words} ({unit})" if unit else words
    refuse(name, value, f"{allowed}, or None" if optional else allowed)


def check_counts(name: str, value: Any, *, least: int = 1) -> None:
    """A sequence of integers that is not empty.

    Example:
        >>> check_counts("owners", [0, 1.0], least=0)
        Traceback (most recent call last):
        ValueError: owners=[0, 1.0] is not allowed: it must be a list of integers of at least 0, at least one
    """
    ok = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    ok = ok and all(is_count(each, least) for each in value)
    check(name, value, ok, f"a list of integers of at least {least}, at least one")


def check_rank(name: str, value: Any) -> None:
    """A rank: a number of singular vectors, or a fraction of all.

    Example:
        >>> check_rank("rank", 1.5)
        Traceback (most recent call last):
        ValueError: rank=1.5 is not allowed: it must be an integer of at least 1, or a fraction above 0 and at most 1
    """
    ok = is_count(value) or (isinstance(value, float) and 0 < value <= 1)
    check(name, value, ok, "an integer of at least 1, or a fraction above 0 and at most 1")


def check_flag(name: str, value: Any) -> None:
    """True or False itself: a string "false" would be true.

    Example:
        >>> check_flag("heat_map", "false")
        Traceback (most recent call last):
        ValueError: heat_map='false' is not allowed: it must be True or False
    """
    check(name, value, isinstance(value, bool), "True or False")


def check_choice(name: str, value: Any, choices: Any, *, optional: bool = False) -> None:
    """One of the words of a ``Literal``, or of a sequence.

    Example:
        >>> from typing import Literal
        >>> check_choice("action", "go", Literal["warn", "stop"])
        Traceback (most recent call last):
        ValueError: action='go' is not allowed: it must be one of 'warn', 'stop'
    """
    if value is None and optional:
        return
    words = choices if isinstance(choices, Sequence) else get_args(choices)
    allowed = f"one of {', '.join(map(repr, words))}"
    ok = isinstance(value, str) and value in words
    check(name, value, ok, f"{allowed}, or None" if optional else allowed)


def check_globs(name: str, value: Any, *, or_one: bool = False) -> None:
    """None, or a list of shell-style patterns that is not empty; with ``or_one`` also a pattern by itself.

    Example:
        >>> check_globs("include", "*.weight")
        Traceback (most recent call last):
        ValueError: include='*.weight' is not allowed: it must be a list of patterns, such as ['*.weight'], or None
    """
    ok = value is None or (
        isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(p, str) and p for p in value)
    )
    ok = ok or (or_one and isinstance(value, str) and value != "")
    check(name, value, ok, f"{'a pattern, or ' if or_one else ''}a list of patterns, such as ['*.weight'], or None")


def check_text(name: str, value: Any, *, optional: bool = False) -> None:
    """A string that is not empty.

    Example:
        >>> check_text("folder", "")
        Traceback (most recent call last):
        ValueError: folder='' is not allowed: it must be a string that is not empty
    """
    if value is None and optional:
        return
    ok = isinstance(value, str) and value != ""
    check(name, value, ok, "a string that is not empty, or None" if optional else "a string that is not empty")


def check_address(name: str, value: Any) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``, of ``[::1]:PORT``, and of either with ``http://`` before it.

    Example:
        >>> check_address("bind", "http://10.0.0.1:29510"), check_address("bind", "[::1]:0")
        (('10.0.0.1', 29510), ('::1', 0))
    """
    host, _, port = str(value).removeprefix("http://").rstrip("/").rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    ok = isinstance(value, str) and port.isascii() and port.isdecimal() and int(port) <= 65535
    ok = ok and host != "" and (bracketed or ":" not in host) and "/" not in host
    check(name, value, ok, "HOST:PORT or http://HOST:PORT, such as 127.0.0.1:29510")
    return host.strip("[]"), int(port)


def check_numbers(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> None:
    """A sequence of finite numbers within bounds that is not empty. The bounds are those of :func:`check_number`.

    Example:
        >>> check_numbers("weights", [0.5, float("nan")])
        Traceback (most recent call last):
        ValueError: weights=[0.5, nan] is not allowed: it must be a list of finite numbers, at least one
        >>> check_numbers("losses", [0.5, 0], above=0)
        Traceback (most recent call last):
        ValueError: losses=[0.5, 0] is not allowed: it must be a list of finite numbers above 0, at least one
    """
    if are_numbers(value) and len(value) > 0 and all(_within(each, above, least, below, most) for each in value):
        return
    words = _bounds(above, least, below, most)
    refuse(name, value, f"a list of finite numbers{words and ' ' + words}, at least one")


def check_instance(name: str, value: Any, kind: type | tuple[type, ...], what: str, *, optional: bool = False) -> None:
    """An instance of a class.

    Example:
        >>> check_instance("model", "GPT", int, "an nn.Module")
        Traceback (most recent call last):
        ValueError: model='GPT' is not allowed: it must be an nn.Module
    """
    if isinstance(value, kind) or (optional and value is None):
        return
    refuse(name, value, f"{what}, or None" if optional else what)


def check_trainer(value: Any) -> None:
    """The argument ``trainer``: a Trainer of either of Lightning's two packages, told by what is asked of it."""
    check("trainer", value, hasattr(value, "strategy"), "a Trainer")


def check_instances(name: str, value: Any, kind: type, what: str) -> None:
    """A sequence of instances of a class that is not empty.

    Example:
        >>> check_instances("parts", [1, "two"], int, "integers, at least one")
        Traceback (most recent call last):
        ValueError: parts=[1, 'two'] is not allowed: it must be a list of integers, at least one
    """
    ok = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    check(name, value, ok and all(isinstance(each, kind) for each in value), f"a list of {what}")


def check_path(name: str, value: Any) -> None:
    """A path, as a string that is not empty or a path object.

    Example:
        >>> check_path("output", 5)
        Traceback (most recent call last):
        ValueError: output=5 is not allowed: it must be a path
    """
    check(name, value, isinstance(value, str | os.PathLike) and str(value) != "", "a path")


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
