"""Every state that goes into a checkpoint says of which version its format is.

Its owner writes it as ``"version"``, and counts on when old code could not read what it writes now. What release 0.1
wrote has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_version(owner: str, state: Mapping[str, Any], known: int) -> int:
    """Refuse a state that is newer than this code.

    Args:
        owner: whose state this is, for the message.
        state: that is to be loaded.
        known: the latest version that its owner can read, the one that it writes.

    Returns:
        The state's version, 0 for one of release 0.1.

    Raises:
        ValueError: the version is above ``known``.

    Example:
        >>> check_version("ZClip", {"version": 1, "optimizers": []}, known=1)
        1
    """
    version = int(state.get("version", 0))
    if version > known:
        raise ValueError(
            f"the state of {owner} was saved by a newer lightning_eff: state version {version}, this one knows up to "
            f"{known}"
        )
    return version
