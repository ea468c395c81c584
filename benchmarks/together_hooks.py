"""Which callback does something in which hook, in what order: docs/order_of_hooks.md, from a run.

python -m benchmarks.together_hooks        # writes the page
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import lightning as L

import lightning_eff.training.hooks as own_hooks
from benchmarks.together_runs import Settings, callbacks, train

PAGE = Path(__file__).parents[1] / "docs" / "order_of_hooks.md"

STEPS = 4
"""Of the run, each of two batches: a validation comes behind the seventh batch and a checkpoint behind the eighth."""

_LIGHTNINGS = [name for name in vars(L.Callback) if name.startswith("on_")]
_LIGHTNINGS += ["setup", "teardown", "state_dict", "load_state_dict"]
_OURS = [
    name
    for _, protocol in inspect.getmembers(own_hooks, inspect.isclass)
    if getattr(protocol, "_is_protocol", False)
    for name in vars(protocol)
    if name.startswith(("on_", "before_"))
]

Call = tuple[str, str]


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """Notes each call of a hook that a callback has of its own: the hook and the callback, in their order."""
    calls: list[Call] = []

    @contextlib.contextmanager
    def noted(call: Call) -> Iterator[None]:
        calls.append(call)
        yield

    with surrounded(noted):
        yield calls


@contextlib.contextmanager
def surrounded(by: Callable[[Call], AbstractContextManager[None]]) -> Iterator[None]:
    """Put a context around each call of a hook that a callback has of its own."""
    with contextlib.ExitStack() as stack:
        for kind in map(type, callbacks("single")):
            for hook in (*_LIGHTNINGS, *_OURS):
                inner = getattr(kind, hook, None)
                if inner is not None and inner is not getattr(L.Callback, hook, None):
                    stack.callback(_restore, kind, hook, vars(kind).get(hook))
                    setattr(kind, hook, _within(by, (hook, kind.__name__), inner))
        yield


def _within(by: Callable[[Call], AbstractContextManager[None]], call: Call, inner: Any) -> Any:
    def within(*args: Any, **kwargs: Any) -> Any:
        with by(call):
            return inner(*args, **kwargs)

    return within


def _restore(kind: type, hook: str, own: Any) -> None:
    if own is None:
        delattr(kind, hook)
    else:
        setattr(kind, hook, own)


def record() -> tuple[list[Call], list[str]]:
    """The calls of a run on one device, and its callbacks as the Trainer has sorted them."""
    order = _Order()
    with tempfile.TemporaryDirectory() as folder, recorded() as calls:
        train(Settings(Path(folder), steps=STEPS, save_every=STEPS, resume=None), order)
    begun = next(number for number, (hook, _) in enumerate(calls) if hook == "setup")
    return calls[begun:], order.names


class _Order(L.Callback):
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        ours = [each for each in cast(Any, trainer).callbacks if type(each).__module__.startswith("lightning_eff")]
        self.names = [type(each).__name__ for each in ours]


def page() -> str:
    """The page, from a run of now."""
    calls, order = record()
    hooks: dict[str, list[str]] = {}
    for hook, name in calls:
        hooks.setdefault(hook, []).append(name)
    rows = []
    for hook, names in hooks.items():
        times = max(map(names.count, names))
        rows.append(f"| `{hook}` | {times} | {', '.join(dict.fromkeys(names))} |")
    runs = {type(each).__name__: _line(type(each), "Runs in") for each in callbacks("single")}
    head = f"""# The order of hooks

Twelve callbacks in one Trainer, and what each is called for. This page is written by
`python -m benchmarks.together_hooks` from a run of {STEPS} steps of two batches each on one device, with a validation
behind the seventh batch and a checkpoint behind the last; a test compares it with a run of its own.

Whatever order they are given in, the callbacks are sorted, here to:
{", ".join(order[:7])},
{", ".join(order[7:])}.
Those that must see a batch before all others come first, those that change gradients come behind those that read them,
those that put right what others have done come last, and Lightning's `ModelCheckpoint` behind all.

## By hook

In the order in which each is first called; how often in this run; and the callbacks that answer, in the order in
which they are called.

| hook | calls | callbacks |
| --- | --- | --- |
"""
    middle = """
## Beside the hooks

Some of what they do is in no hook of a callback: loops, optimizers and strategies are stood in front of. Each says so:

| callback | runs in |
| --- | --- |
"""
    return head + "\n".join(rows) + "\n" + middle + "\n".join(f"| {name} | {runs[name]} |" for name in order) + "\n"


def _line(kind: type, label: str) -> str:
    """A labelled line of a docstring, and those it goes on in."""
    lines = inspect.getdoc(kind).splitlines()  # type: ignore[union-attr]
    at = next(number for number, line in enumerate(lines) if line.startswith(f"{label}:"))
    found = [lines[at].partition(":")[2].strip()]
    for line in lines[at + 1 :]:
        if not line or line.split(":")[0] in ("Reads", "Changes"):
            break
        found.append(line.strip())
    return " ".join(found).replace("``", "`").rstrip(".")


if __name__ == "__main__":
    PAGE.write_text(page())
