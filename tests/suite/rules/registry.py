"""Which rules there are, and on which strategies each is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.suite.runs import Place
from tests.suite.table import SINGLE, Row, Strategy


@dataclass(frozen=True)
class Rule:
    """A rule by the name of its function."""

    check: Callable[[Row, Place], None]
    strategies: tuple[Strategy, ...]
    slow: tuple[Strategy, ...] = ()
    """Where it is checked by `make test-all` alone."""

    @property
    def name(self) -> str:
        return self.check.__name__


RULES: dict[str, Rule] = {}


def rule(
    *strategies: Strategy, slow: tuple[Strategy, ...] = ()
) -> Callable[[Callable[[Row, Place], None]], Callable[[Row, Place], None]]:
    """Register a rule; without strategies it is checked on one device."""

    def register(check: Callable[[Row, Place], None]) -> Callable[[Row, Place], None]:
        RULES[check.__name__] = Rule(check, strategies or (SINGLE,), slow)
        return check

    return register
