"""`lightning-eff recipe`: callbacks with settings that belong together, as a part of a config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from lightning_eff.cli.parser import Parser
from lightning_eff.recipes import Purpose, recipe_yaml

_DESCRIPTION = """\
Print callbacks with settings that belong together, as YAML: `lightning-eff fit --config run.yaml --config recipe.yaml`
runs with them. Their list takes the place of the callbacks in run.yaml.
"""
_EPILOG = 'From Python it is lightning_eff.recipe("pretrain", steps=10_000), whose docstring says why each is there.'


def make_parser() -> Parser:
    """The arguments."""
    parser = Parser("lightning-eff recipe", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("purpose", choices=list(get_args(Purpose)))
    parser.add_argument("--steps", type=int, required=True, metavar="N", help="optimizer steps of the whole run")
    parser.add_argument("--low-memory", action="store_true", help="finetune: train a few matrices at a time (MISA)")
    parser.add_argument("--not-resumable", action="store_true", help="without what survives kills and preemptions")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the YAML; return 0."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        text = recipe_yaml(args.purpose, args.steps, low_memory=args.low_memory, resumable=not args.not_resumable)
    except ValueError as error:
        parser.error(f"--{str(error).replace('low_memory', 'low-memory', 1)}")
    print(text, end="")
    return 0
