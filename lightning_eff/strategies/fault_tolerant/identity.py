"""Who a replica is, and where it and the others are reached."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lightning_eff import _launched
from lightning_eff.arguments import check_address, check_count, check_text


@dataclass(frozen=True)
class Identity:
    """Of one replica; see `FaultTolerantDDPStrategy`."""

    index: int
    """The same after a restart."""
    count: int
    """The largest number of replicas."""
    host: str
    """Where it listens, and under which the peers reach it."""
    lighthouse: str | None
    run: str
    """The run's id; "" where none is given."""

    @staticmethod
    def of(
        replica: int | None, max_replicas: int | None, host: str | None, lighthouse: str | None, run_id: str | None
    ) -> Identity:
        """From arguments; what is None comes from the environment, which the launcher sets.

        Raises:
            ValueError: something is out of its range, or not known.
        """
        environment = os.environ.get
        if max_replicas is None:
            max_replicas = _count(_launched.REPLICAS, "max_replicas")
        if replica is None:
            replica = _count(_launched.REPLICA, "replica")
        check_count("max_replicas", max_replicas)
        check_count("replica", replica, least=0, most=max_replicas - 1)
        host = environment(_launched.HOST, "127.0.0.1") if host is None else host
        lighthouse = environment(_launched.LIGHTHOUSE) if lighthouse is None else lighthouse
        run_id = environment(_launched.RUN_ID) if run_id is None else run_id
        check_text("host", host)
        check_text("run_id", run_id, optional=True)
        if lighthouse is not None:
            check_address("lighthouse", lighthouse)
        return Identity(replica, max_replicas, host, lighthouse, run_id or "")


def _count(variable: str, argument: str) -> int:
    value = os.environ.get(variable)
    if value is None or not value.isdigit():
        raise ValueError(
            f"{argument} is not given, and the environment variable {variable} is {value!r}: start with "
            "`lightning-eff launch --replicas N script.py`, or give it"
        )
    return int(value)
