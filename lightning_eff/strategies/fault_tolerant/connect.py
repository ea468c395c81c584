"""How a replica comes to know the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from lightning_eff import _launched
from lightning_eff.arguments import check_address
from lightning_eff.strategies.fault_tolerant.handover import Handover
from lightning_eff.strategies.fault_tolerant.identity import Identity
from lightning_eff.strategies.fault_tolerant.limits import Limits
from lightning_eff.strategies.fault_tolerant.manager import QuorumManager
from lightning_eff.strategies.fault_tolerant.replicas import Replicas
from lightning_eff.strategies.fault_tolerant.start import reach_lighthouse


def connected(
    identity: Identity,
    limits: Limits,
    state: Callable[[], dict[str, Any]],
    load: Callable[[dict[str, Any]], None],
    layout: Callable[[], int],
    size: Callable[[], int],
) -> Replicas:
    """A replica that can have a rendezvous with the others.

    Args:
        identity: of this replica.
        limits: how long it waits, and how often it tries.
        state: called when a peer needs the state of this replica.
        load: called with a peer's state.
        layout: see `Replicas`.
        size: see `Replicas`.

    Raises:
        ConnectionError: the lighthouse cannot be reached.
    """
    address, port = check_address("lighthouse", identity.lighthouse)
    reach_lighthouse(address, port, limits.connect_timeout)
    handover = Handover(state, load, identity.run)
    manager = QuorumManager(
        name=f"replica_{identity.index:05d}",
        host=identity.host,
        lighthouse=f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}",
        connect_timeout=timedelta(seconds=limits.connect_timeout),
        timeout=timedelta(seconds=limits.collective_timeout),
        quorum_timeout=timedelta(seconds=limits.quorum_timeout),
        quorum_retries=limits.quorum_retries,
        state=handover.give,
        load=handover.take,
    )
    _launched.note_progress(name=manager.name, pid=os.getpid(), step=-1, over=False, left=False, anew=False)
    seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed())) % 2**62
    return Replicas(identity.index, identity.count, manager, limits, seed, layout, handover, size)
