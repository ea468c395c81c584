"""Lightning runs that print nothing but the figures."""

from __future__ import annotations

import logging
import warnings

QUIET = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
"""Arguments of a Trainer."""


def quiet_lightning(*messages: str) -> None:
    """Leave out advice about data workers and devices, and the warnings that begin with one of ``messages``."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for message in (".*does not have many workers", ".*LeafSpec", *messages):
        warnings.filterwarnings("ignore", message=message)
