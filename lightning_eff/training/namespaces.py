"""Lightning goes by two names, ``lightning.pytorch`` and ``pytorch_lightning``: two copies of the same classes.

A Trainer's strategy, callbacks, loggers and module are of the copy that the Trainer is of, and to ``isinstance`` the
two have nothing to do with each other. The suite names the classes of ``lightning.pytorch`` and asks here, where their
twins are found among the modules that somebody has imported. Nothing is imported for it.

A callback is one class for both: a Trainer calls its hooks by name and never asks what it is. A strategy is asked, so
each has its logic in a mixin, with ``lightning.pytorch``'s base in ``lightning_eff.strategies`` and the other's in
``lightning_eff.pytorch_lightning.strategies``.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException as _MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning_utilities.core.overrides import is_overridden
from typing_extensions import TypeIs

_NAMES = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}

_Kind = TypeVar("_Kind")


def both(*kinds: type) -> tuple[type, ...]:
    """Classes of Lightning, each with its twin under the other name if anybody has imported that one.

    Example:
        >>> import pytorch_lightning as pl
        >>> from lightning.pytorch.callbacks import Timer
        >>> both(Timer) == (Timer, pl.callbacks.Timer)
        True
    """
    twins = (_twin(kind) for kind in kinds)
    return (*kinds, *(twin for twin in twins if twin is not None))


def is_a(instance: object, *kinds: type[_Kind]) -> TypeIs[_Kind]:
    """``isinstance``, under either name.

    Example:
        >>> import pytorch_lightning as pl
        >>> from lightning.pytorch.callbacks import Timer
        >>> is_a(pl.callbacks.Timer(), Timer), isinstance(pl.callbacks.Timer(), Timer)
        (True, False)
    """
    return isinstance(instance, both(*kinds))


def overrides(instance: LightningModule | Callback, method: str) -> bool:
    """Whether a module or a callback has a hook of its own.

    Example:
        >>> import pytorch_lightning as pl
        >>> overrides(pl.LightningModule(), "configure_model")
        False
    """
    bases = both(LightningModule, Callback)
    base = next(kind for kind in type(instance).__mro__ if kind in bases)
    return bool(is_overridden(method, instance, base))


class MisconfigurationException(_MisconfigurationException):  # as Lightning calls it
    """Lightning's, to be caught under the name by which the user knows it.

    Example:
        >>> import pytorch_lightning as pl
        >>> try:
        ...     raise MisconfigurationException("a conflict")
        ... except pl.utilities.exceptions.MisconfigurationException as error:
        ...     print(error)
        a conflict
    """

    def __new__(cls, *args: Any) -> MisconfigurationException:
        """An instance of this class, and of the other name's if that is known."""
        twin = _twin(_MisconfigurationException)
        return super().__new__(cls if twin is None or issubclass(cls, twin) else _with(twin), *args)

    def __reduce__(self) -> Any:
        return MisconfigurationException, self.args


@lru_cache
def _with(twin: type[Exception]) -> type[MisconfigurationException]:
    ours = MisconfigurationException
    return type(ours.__name__, (ours, twin), {"__module__": ours.__module__, "__doc__": ours.__doc__})


def _twin(kind: type) -> type | None:
    for name, other in _NAMES.items():
        if kind.__module__.startswith(f"{name}."):
            module = sys.modules.get(other + kind.__module__.removeprefix(name))
            twin: type | None = getattr(module, kind.__name__, None)
            return twin
    return None
