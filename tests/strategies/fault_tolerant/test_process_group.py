"""The process groups of fault-tolerant DDP, by themselves."""

from __future__ import annotations

import gc
import os
import threading
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")

from harness.processes import free_port
from lightning_eff.strategies.fault_tolerant.process_group import Gloo, Nobody, _sockets, store_on


def _objects() -> Counter[str]:
    gc.collect()
    return Counter(type(each).__name__ for each in gc.get_objects())


@pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified")
def test_steps_leave_nothing_behind() -> None:
    model = DistributedDataParallel(nn.Linear(4, 4), process_group=Nobody(), find_unused_parameters=True)

    def steps(count: int) -> None:
        for _ in range(count):
            model(torch.ones(2, 4)).sum().backward()

    steps(30)
    before = _objects()
    steps(100)
    grown = {name: count - before[name] for name, count in _objects().items() if count - before[name] >= 50}
    assert grown == {}


def test_a_forked_child_holds_no_connection_of_any_group() -> None:
    """Two groups at once, as the first process of a replica has them."""
    store = store_on("127.0.0.1")
    groups = [Gloo("127.0.0.1", timedelta(seconds=10), timedelta(seconds=10)) for _ in range(4)]
    for name, pair in (("one", groups[:2]), ("other", groups[2:])):
        threads = [
            threading.Thread(target=group.configure, args=(f"127.0.0.1:{store.port}/{name}", "", rank, 2))
            for rank, group in enumerate(pair)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(group._connections for group in groups)
    reading, writing = os.pipe()
    names = {name for group in groups for name in group._connections.values()}
    pid = os.fork()
    if pid == 0:
        left = set(_sockets().values())
        os.write(writing, str(len(names & left)).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reading, 100) == b"0"
    os.close(reading), os.close(writing)
    for group in groups:
        group.abort()
        assert group._connections == {}


@pytest.mark.parametrize("port", [0, None])
def test_the_store_listens_on_one_address(port: int | None) -> None:
    if port is None:
        port = free_port()
    store = store_on("127.0.0.1", port)
    assert port in (0, store.port)
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    listening = [row[1].split(":") for row in rows if row[3] == "0A"]
    assert [address for address, where in listening if int(where, 16) == store.port] == ["0100007F"]
