"""Values that an annotation forbids, and values of its type that are out of most ranges."""

from __future__ import annotations

import math
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import isclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

CANDIDATES: tuple[Any, ...] = (
    None,
    "three",
    "",
    "false",
    True,
    -1,
    0,
    5,
    10**12,
    0.5,
    math.nan,
    math.inf,
    -math.inf,
    [],
    [None],
    ["three"],
    [0.5],
    [math.nan],
    {},
    {"three": None},
    object(),
)


def allows(annotation: Any, value: Any) -> bool | None:
    """Whether an annotation allows a value; None where it does not say. NaN and infinity are no numbers to anybody."""
    if annotation is Any or isinstance(annotation, TypeVar | str):
        return None
    if annotation is None or annotation is type(None):
        return value is None
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        answers = [allows(each, value) for each in inner]
        return True if True in answers else None if None in answers else False
    if origin is Literal:
        return any(value is each or (isinstance(value, str) and value == each) for each in inner)
    if annotation is bool:
        return isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if annotation is str:
        return isinstance(value, str)
    kind = origin or annotation
    if kind is Callable:
        return callable(value)
    if not isclass(kind):
        return None
    if issubclass(kind, os.PathLike):
        return isinstance(value, kind)
    if issubclass(kind, Mapping):
        if not isinstance(value, Mapping):
            return False
        return _all([allows(inner[1], each) for each in value.values()] if inner else [])
    if (issubclass(kind, Sequence | Iterable) and issubclass(kind, Sequence | set | frozenset)) or kind is Iterable:
        if isinstance(value, str) or not isinstance(value, Iterable) or isinstance(value, Mapping):
            return False
        return _all([allows(inner[0], each) for each in value] if inner else [])
    return isinstance(value, kind)


def _all(answers: list[bool | None]) -> bool | None:
    return False if False in answers else None if None in answers else True
