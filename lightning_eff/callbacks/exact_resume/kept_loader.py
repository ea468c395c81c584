"""A DataLoader that keeps its own place: what it and its workers draw goes on too."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils.worker import _generate_state

from lightning_eff.callbacks.exact_resume.generators import Generators
from lightning_eff.callbacks.exact_resume.loader import with_attributes
from lightning_eff.callbacks.exact_resume.order import Delivery
from lightning_eff.callbacks.exact_resume.worker import Carried, Carrier, RawState, WorkerStart, readable
from lightning_eff.training.random_state import random_state, set_random_state, undisturbed
from lightning_eff.training.wrapping import Wrapper

_CPU = torch.device("cpu")

Note = tuple[dict[str, Any], int, dict[int, Carried]]


class KeptLoader:
    """Follows a loader whose place is its own affair, and that knows nothing of generators.

    Its iterator is made anew in the epoch with which a run goes on, at the first batch where ``__iter__`` is a
    generator; the seed of its workers is drawn then, which in the unbroken run was long before. The new workers go on
    as those whose turn it was: the first as the one that would have made the next batch. One with an iterator of its
    own kind (torchdata's) has workers of its own kind, which are left to it.

    Args:
        loader: a DataLoader with ``state_dict`` and ``load_state_dict``.
    """

    is_ahead = is_seeded = False  # as `Delivery` asks

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.target: dict[str, Any] | None = None
        """What its next iterator goes on from."""
        self._generators = Generators(loader=loader, dataset=None if loader.num_workers else loader.dataset)
        self._created: dict[str, Any] = {}
        self._last = -1
        self._workers: dict[int, Carried] = {}
        self._roles: list[int] = []  # which worker of the unbroken run each of them is
        self._wrapper = Wrapper(loader, "_get_iterator", self._get_iterator)

    def detach(self) -> None:
        """Leave the loader as it was."""
        self._wrapper.remove()

    def note(self) -> Note:
        """Where it stands, for `state`."""
        return self._created, self._last, dict(self._workers)

    def state(self, note: Note) -> dict[str, Any]:
        """What its iterator was made from, and the workers in the order in which the next batches are theirs."""
        created, last, workers = note
        number = self.loader.num_workers
        turns = []
        for turn in range(number if created else 0):
            worker = (last + 1 + turn) % number
            carried = workers.get(worker)
            found = {} if carried is None else {"random": readable(carried.random), "generators": carried.generators}
            turns.append({"role": self._roles[worker], **found})
        return {"created": created, "turns": turns}

    def deliver(self, iterator: Any, data: Any, worker: int | None, before: RawState | None) -> Any:
        """A batch has come from a worker."""
        assert worker is not None
        batch, data.batch = data.batch, None
        self._last, self._workers[worker] = worker, data
        return batch

    def _get_iterator(self, inner: Callable[[], Any]) -> Any:
        target, self.target = self.target, None
        if not target or not target["created"]:
            self._created = self._draws()
            return self._made(inner, [])
        now = self._generators.state()
        with undisturbed():
            self._set_draws(target["created"])
            iterator = self._made(inner, target["turns"])
        self._generators.set(now)
        self._created = target["created"]
        return iterator

    def _made(self, inner: Callable[[], Any], turns: list[dict[str, Any]]) -> Any:
        loader: Any = self.loader
        if turns and len(turns) != loader.num_workers:
            rank_zero_warn(
                f"ExactResume: the loader has {loader.num_workers} workers and had {len(turns)}: what they draw is "
                "not the same, and from here on the run is not equal to the bit"
            )
            turns = []
        self._last, self._workers = -1, {}
        self._roles = [turn["role"] for turn in turns] or list(range(loader.num_workers))
        if not loader.num_workers or type(loader)._get_iterator is not DataLoader._get_iterator:
            return inner()
        others = {
            "collate_fn": Carrier(loader.collate_fn, getattr(loader.batch_sampler, "batch_size", None)),
            "worker_init_fn": TurnStart(loader.worker_init_fn, dict(enumerate(turns))),
        }
        with with_attributes(loader, others):
            iterator = inner()
        iterator._process_data = Delivery(weakref.ref(iterator), "_process_data", self)
        return iterator

    def _draws(self) -> dict[str, Any]:
        return {"random": random_state(_CPU), "generators": self._generators.state()}

    def _set_draws(self, saved: dict[str, Any]) -> None:
        set_random_state(saved["random"], _CPU)
        self._generators.set(saved["generators"])


class TurnStart(WorkerStart):
    """A worker that takes the turns of another one: one that has not begun has only that one's seeds."""

    def __call__(self, worker: int) -> None:
        """Called in a worker when it starts."""
        state = self.states.get(worker, {})
        if "role" in state and "random" not in state:
            information: Any = get_worker_info()  # type: ignore[no-untyped-call]
            base, role = information.seed - information.id, state["role"]
            torch.manual_seed(base + role)
            random.seed(base + role)
            np.random.seed(_generate_state(base, role))  # type: ignore[no-untyped-call]
            self.states = {}
        super().__call__(worker)
