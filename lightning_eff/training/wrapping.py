"""Standing in front of a method of somebody else's object, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_ABSENT = object()


class Wrapper:
    """Stands in front of one method of one instance, until it is removed.

    Several may stand behind each other and leave in any order. What the instance had under that name itself, its own
    attribute and not its class's, is put back.

    Args:
        target: the instance; a strategy or a loop of Lightning.
        name: of its method.
        call: called in its place as ``call(method, *args, **kwargs)``, where ``method`` is what was there before.
        innermost: behind all that stand there already, right in front of the method: for whoever does it in its place.

    Example:
        >>> class Loop:
        ...     def run(self):
        ...         return "run"
        >>> loop = Loop()
        >>> wrapper = Wrapper(loop, "run", lambda run: f"around {run()}")
        >>> loop.run()
        'around run'
        >>> wrapper.remove()
        >>> loop.run(), vars(loop)
        ('run', {})
    """

    def __init__(self, target: Any, name: str, call: Callable[..., Any], innermost: bool = False) -> None:
        self.target = target
        self.name = name
        self.call = call
        self._own = vars(target).get(name, _ABSENT)
        self._method: Callable[..., Any] = getattr(target, name)
        self._removed = False
        outer: Wrapper | None = None
        while innermost and isinstance(self._method, Wrapper):
            outer = self._method
            self._own, self._method = outer._own, outer._method
        if outer is None:
            setattr(target, name, self)
        else:
            outer._own = outer._method = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the instance's method is for everybody else."""
        if self._removed:  # and still called by somebody who has wrapped this wrapper
            return self._method(*args, **kwargs)
        return self.call(self._method, *args, **kwargs)

    def remove(self) -> None:
        """Leave. Doing it again is harmless."""
        if self._removed:
            return
        self._removed = True
        outer, here = None, vars(self.target).get(self.name)
        while isinstance(here, Wrapper) and here is not self:
            outer, here = here, here._method
        if here is not self:
            return  # somebody else's wrapper hides this one, which only calls on from now on
        if outer is not None:
            outer._own, outer._method = self._own, self._method
        elif self._own is _ABSENT:
            delattr(self.target, self.name)
        else:
            setattr(self.target, self.name, self._own)
