"""Fixtures for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Two gloo workers, shared by all tests: `pool.run(fn, *args) -> [result of rank 0, result of rank 1]`."""
    pool = Pool(2)
    yield pool
    pool.close()
