"""How the docstrings become Markdown, where they and Markdown differ: an extension of griffe, which reads them."""

import re

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
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called by griffe for everything that it has read."""
        if obj.docstring:
            for pattern, replacement in _REWRITES:
                obj.docstring.value = pattern.sub(replacement, obj.docstring.value)
