"""`lightning-eff completion bash | zsh`: what a shell needs to complete a command line.

The words are written into the script: importing torch at every press of the key would take seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from lightning_eff.cli import COMMANDS, TRAINING, need_jsonargparse
from lightning_eff.cli.parser import Parser

_EPILOG = "bash: lightning-eff completion bash > ~/.local/share/bash-completion/completions/lightning-eff"

# `=` and `+=` are words of their own to bash; the names of a class are offered behind either of them.
_SCRIPT = """\
_lightning_eff() {{
    local cur="${{COMP_WORDS[COMP_CWORD]}}" key="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    if [[ $cur == "=" || $cur == "+=" ]]; then cur=""
    elif [[ $key == "=" || $key == "+=" ]]; then key="${{COMP_WORDS[COMP_CWORD-2]}}"; fi
    case "${{key%+}}" in
        --trainer.callbacks) words="{callbacks}" ;;
        --trainer.strategy) words="{strategies}" ;;
        --trainer.strategy.compressor) words="{compressors}" ;;
        *) case "${{COMP_WORDS[1]}}" in
{cases}
            *) words="{commands}" ;;
        esac ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    [[ -n $words && $cur == -* ]] || COMPREPLY+=($(compgen -f -- "$cur"))
}}
complete -o nosort -F _lightning_eff lightning-eff
"""


def make_parser() -> Parser:
    """The arguments."""
    parser = Parser(
        "lightning-eff completion", description="Print a script that lets a shell complete.", epilog=_EPILOG
    )
    parser.add_argument("shell", choices=["bash", "zsh"])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the script; return 0."""
    args = make_parser().parse_args(argv)
    need_jsonargparse("completion")
    if args.shell == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    print(script(), end="")
    return 0


def script() -> str:
    """The script for bash."""
    from lightning_eff.cli.listing import listed
    from lightning_eff.cli.training import training_options

    names = {title.split(",")[0]: " ".join(name for name, _ in rows) for title, rows in listed().items()}
    words = {"|".join(TRAINING): training_options()}
    for name, command in COMMANDS.items():
        module = import_module(command.module)
        words[name] = module.words() if hasattr(module, "words") else list(module.make_parser()._option_string_actions)
    cases = "\n".join(f'            {name}) words="{" ".join(options)}" ;;' for name, options in words.items())
    return _SCRIPT.format(
        callbacks=names["Callbacks"],
        strategies=names["Strategies"],
        compressors=names["Compressors"],
        cases=cases,
        commands=" ".join([*TRAINING, *COMMANDS]),
    )
