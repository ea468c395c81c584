"""The rules of the contract. Each takes a row and a place, and fails with an AssertionError that says what is wrong."""

from tests.suite.rules import doors, logs, namespaces, quiet, resume, rollback, training  # noqa: F401  (each registers its rules)
from tests.suite.rules.registry import RULES, Rule

__all__ = ["RULES", "Rule"]
