"""The entry points through which `lightning-eff verify-resume` reaches the Trainer of a user's script, on every rank.

Lightning asks them for callbacks in every Trainer of every program, so nothing is imported unless they are called for.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

ORDERS = "LIGHTNING_EFF_VERIFY_RESUME"
"""What the witness has to do, as JSON."""


def of_lightning() -> list[Any]:
    """The witness under ``lightning.pytorch``."""
    return _witness("lightning.pytorch")


def of_pytorch_lightning() -> list[Any]:
    """The witness under ``pytorch_lightning``."""
    return _witness("pytorch_lightning")


def _witness(package: str) -> list[Any]:
    orders = os.environ.get(ORDERS)
    if orders is None:
        return []
    witness = import_module("lightning_eff.cli.verify_resume.witness").witness(package, orders)
    return [witness]
