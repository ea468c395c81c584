"""Compiled modules run uncompiled while somebody looks into a forward pass, where hooks and modes would never fire.

The stance of ``torch.compiler`` is one for the whole process, and who sets it remembers what was there before. Two that
look at the same step do not end in the reverse of the order in which they began, least of all after an error: each by
itself would put back what the other had set. So it is set by the first of them and put back by the last.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch


class Uncompiled:
    """From ``begin`` to ``end`` compiled modules run as they are written; each may be called as often as one likes.

    Example:
        >>> first, second = Uncompiled(), Uncompiled()
        >>> first.begin()
        >>> second.begin()
        >>> first.end()
        >>> second.end()
    """

    _open: ClassVar[int] = 0
    _stance: ClassVar[Any] = None  # knows what was there before

    def __init__(self) -> None:
        self._is_open = False

    def begin(self) -> None:
        """No compiled code from now on."""
        if self._is_open or "torch._dynamo" not in sys.modules:  # without it nothing can be compiled
            return
        if not Uncompiled._open:
            Uncompiled._stance = torch.compiler.set_stance("force_eager")
        Uncompiled._open += 1
        self._is_open = True

    def end(self) -> None:
        """As before, if nobody else looks."""
        if not self._is_open:
            return
        self._is_open = False
        Uncompiled._open -= 1
        if not Uncompiled._open:
            Uncompiled._stance.__exit__(None, None, None)
            Uncompiled._stance = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_is_open": False}
