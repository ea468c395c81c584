"""Loggers that read nothing and write nothing."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers.logger import DummyLogger


class Discard(DummyLogger):
    """Takes every metric and forgets it, so that a count of what logging costs holds no logger's own work."""

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass
