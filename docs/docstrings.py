"""How the docstrings become Markdown, where they and Markdown differ: an extension of griffe, which reads them."""

import dataclasses
import re
from typing import Any

import griffe

_REWRITES = [
    # A role of Sphinx, `:class:`~package.Name``, is the name in code.
    (re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([^`]+)`"), r"`\1`"),
    # The fixed lines of a callback ("Runs in:", "Reads:", ...) are one paragraph to Markdown, and a list to a reader.
    (re.compile(r"^Runs in: ", re.MULTILINE), r"\n- Runs in: "),
    (re.compile(r"^(?=(?:Reads|Changes|Collectives|Host syncs|Strategies): )", re.MULTILINE), "- "),
    # griffe's section of doctests has the plural as its title.
    (re.compile(r"^Example:$", re.MULTILINE), "Examples:"),
]


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed, and shows what a type alias of the package stands for."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called by griffe for everything that it has read."""
        if obj.docstring:
            for pattern, replacement in _REWRITES:
                obj.docstring.value = pattern.sub(replacement, obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: object) -> None:
        """Called when the whole package is read: `Purpose` is no help to a reader, and what it may be is."""
        _show_aliases(pkg, pkg)


def _show_aliases(obj: griffe.Object, package: griffe.Module) -> None:
    if isinstance(obj, griffe.Function):
        obj.returns = _resolved(obj.returns, package)
        for parameter in obj.parameters:
            parameter.annotation = _resolved(parameter.annotation, package)
    elif isinstance(obj, griffe.Attribute):
        obj.annotation = _resolved(obj.annotation, package)
    for member in obj.members.values():
        if not member.is_alias:
            _show_aliases(member, package)


def _resolved(expression: Any, package: griffe.Module) -> Any:
    if isinstance(expression, griffe.ExprName):
        meant = _alias(expression, package)
        return expression if meant is None else _resolved(meant, package)
    if isinstance(expression, griffe.Expr):
        for field in dataclasses.fields(expression):
            setattr(expression, field.name, _resolved(getattr(expression, field.name), package))
    elif isinstance(expression, list | tuple):
        return type(expression)(_resolved(each, package) for each in expression)
    return expression


def _alias(name: griffe.ExprName, package: griffe.Module) -> griffe.Expr | None:
    """What stands behind `Name = Literal[...]` or a union at the top of a module; None for all other names."""
    room, _, path = name.canonical_path.partition(".")
    if room != package.name:
        return None
    try:
        obj = package[path]
        obj = obj.final_target if obj.is_alias else obj
    except (KeyError, griffe.AliasResolutionError):
        return None
    is_one = (
        obj.is_attribute and obj.parent.is_module and isinstance(obj.value, griffe.ExprSubscript | griffe.ExprBinOp)
    )
    return obj.value if is_one else None
