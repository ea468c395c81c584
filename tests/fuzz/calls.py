"""One call with one wrong argument, and what comes of it."""

from __future__ import annotations

import re
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException

from tests.fuzz.targets import Target, given
from tests.fuzz.values import CANDIDATES, allows

Outcome = Literal["named", "fine", "unnamed", "accepted"]
"""An error that names the argument; a value that is allowed; another error, or a hang; a value that is forbidden."""

_SECONDS = 3.0  # of the processor


class _HangError(BaseException):
    """The call takes too long."""


@contextmanager
def _limited() -> Iterator[None]:
    def end(*_: Any) -> None:
        raise _HangError

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def is_of_every_step(annotation: Any) -> bool:
    """Tensors and states are passed in every step, where looking at each of them would be work that grows."""
    text = str(annotation)
    return "Tensor" in text or "State" in text or "Optimizer" in text


def outcomes(target: Target, argument: str, folder: Path) -> Iterator[tuple[Any, Outcome, str]]:
    """Each value, what became of it, and the error in words."""
    annotation = target.arguments[argument]
    for value in CANDIDATES:
        allowed = allows(annotation, value)
        arguments = {**given(target.name, folder), argument: value}
        said = ""
        try:
            with _limited(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target.call(**arguments)
            outcome: Outcome = "accepted" if allowed is False else "fine"
        except (ValueError, TypeError, MisconfigurationException) as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            outcome = "named" if re.search(rf"\b{argument}\b", str(error)) else "unnamed"
        except (FileNotFoundError, FileExistsError) as error:  # a path that is none: its text is the name
            said, outcome = str(error), "named" if allowed else "unnamed"
        except _HangError:
            said, outcome = "it hangs", "unnamed"
        except Exception as error:
            said, outcome = f"{type(error).__name__}: {error}", "unnamed"
        yield value, outcome, said
