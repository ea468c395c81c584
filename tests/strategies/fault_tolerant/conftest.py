"""What the tests of fault tolerance share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.strategies.fault_tolerant.replica_runs import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()
