"""`lightning-eff advise link | model`: told apart by the first argument."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from lightning_eff.cli.parser import Parser

SUBJECTS = {
    "link": "measure the link between the ranks: which way to reduce gradients pays on it?",
    "model": "count what training a module takes on this machine: which of the suite's choices pay?",
}
_DESCRIPTION = """\
Advise on a link or on a model, by what is measured and counted and not by what is usual. `lightning-eff advise link
--help` and `lightning-eff advise model --help` list their arguments.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the advice; return 0, or 1 with the reason where something cannot be read."""
    args = list(sys.argv[2:] if argv is None else argv)
    if args and args[0] in SUBJECTS:
        return int(import_module(f"{__name__}.{args[0]}").main(args[1:]))
    parser = make_parser()
    if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
        now = " ".join(["lightning-eff advise link", *args])
        parser.error(f"`link` or `model` comes first: what was `lightning-eff advise` is `{now}`")
    parser.parse_args(args)
    raise AssertionError("the parser has let a word pass that is none of its own")


def make_parser() -> Parser:
    """The first argument alone."""
    parser = Parser("lightning-eff advise", description=_DESCRIPTION)
    subjects = parser.add_argument("subject", choices=list(SUBJECTS), help="; ".join(map(": ".join, SUBJECTS.items())))
    subjects.metavar = "|".join(SUBJECTS)
    return parser


def words() -> list[str]:
    """What a shell completes behind it."""
    parsers = [import_module(f"{__name__}.{subject}").make_parser() for subject in SUBJECTS]
    options = dict.fromkeys(option for parser in parsers for option in parser._option_string_actions)
    return [*SUBJECTS, *options]
