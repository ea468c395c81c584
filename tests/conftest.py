"""Fixtures for every test."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import pytest
import torch

import lightning_eff  # noqa: F401  (registers its strategies now, so that no test is blamed for it)
from harness.leaks import Photograph, WrittenFiles, leaks_since
from harness.network import Network, why_not
from harness.operators import OperatorCounter
from harness.poison import PoisonedEmpty
from harness.pool import Pool
from harness.runs import seed_everything

# The models of the tests are so small that a second thread only waits, most of all on a busy machine.
torch.set_num_threads(1)

# Helpers that assert: their messages show the values, as those of tests do.
pytest.register_assert_rewrite("tests.suite.runs", "tests.strategies.fault_tolerant.replica_checks")

# Lightning keeps its messages to itself where it is imported before pytest listens, as with pytest 8.0.
logging.getLogger("lightning.pytorch").propagate = True

# Dynamo's trace for its own tools: tens of thousands of records in the report of a failed test.
logging.getLogger("torch.__trace").propagate = False


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Two gloo workers, shared by all tests: `pool.run(fn, *args) -> [result of rank 0, result of rank 1]`."""
    with Pool(2) as pool:
        yield pool


@pytest.fixture
def network() -> Iterator[Callable[..., Network]]:
    """Makes shaped networks that end with the test: `network(2, mbit=200)`. Such a test is `slow`."""
    if reason := why_not():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(Network(*args, **kwargs))


@pytest.fixture(scope="session")
def written_files() -> WrittenFiles:
    """One listener for the session."""
    return WrittenFiles()


@pytest.fixture(autouse=True)
def leak_police(written_files: WrittenFiles) -> Iterator[None]:
    """Every test starts from the same seeds and leaves nothing behind: see harness/leaks.py."""
    seed_everything(0)
    before = Photograph.take()
    # An example that is quiet for its readers would be so for the tests behind it.
    levels = {logger: logger.level for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric"))}
    written_files.start()
    yield
    for logger, level in levels.items():
        logger.setLevel(level)
    left = written_files.stop() + leaks_since(before)
    if left:
        pytest.fail("left behind: " + "; ".join(left), pytrace=False)


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """`torch.empty` and its relatives return NaN."""
    with PoisonedEmpty():
        yield


@pytest.fixture
def operators() -> Iterator[OperatorCounter]:
    """Counts the operator calls and host syncs of the whole test; for a part of it use `OperatorCounter` directly."""
    with OperatorCounter() as counter:
        yield counter
