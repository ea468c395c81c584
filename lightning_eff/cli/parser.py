"""The parser of the suite's own commands: an error is one line that helps, and no page of options."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, NoReturn


class UsageError(ValueError):
    """A command line that cannot be meant: exit status 2, as for what the parser itself refuses."""


class Parser(argparse.ArgumentParser):
    """An ``argparse.ArgumentParser`` that guesses what was meant and says where the options are listed."""

    def error(self, message: str) -> NoReturn:
        """End with exit status 2 and one line."""
        unknown = re.fullmatch(r"unrecognized arguments: (--?[\w-]+).*", message, re.DOTALL)
        meant = did_you_mean(unknown[1], self._option_string_actions) if unknown else ""
        self.exit(2, f"{self.prog}: {message.rstrip('.')}.{meant} See `{self.prog} --help`.\n")

    def status(self, command: Callable[[], int]) -> int:
        """A command's exit status: 2 with one line for a `UsageError`, 1 with the reason where it cannot be done."""
        try:
            return command()
        except UsageError as error:
            self.error(str(error))
        except (ValueError, OSError, RuntimeError) as error:
            print(f"{self.prog}: {error}", file=sys.stderr)
            return 1

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            allowed = f"one of {', '.join(choices)}"
            raise argparse.ArgumentError(action, f"{value} is not {allowed}.{did_you_mean(str(value), choices)}")


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """A guess as a sentence with a space before it, or nothing.

    Example:
        >>> did_you_mean("ZClp", ["EMA", "MISA", "ZClip"])
        ' Did you mean `ZClip`?'
    """
    candidates = list(candidates)
    # Whoever writes `zclip` means `ZClip`: letters first, and their case then.
    lower = {name.lower(): name for name in reversed(candidates)}
    close = get_close_matches(word.lower(), lower, n=1)
    return f" Did you mean `{lower[close[0]]}`?" if close else ""
