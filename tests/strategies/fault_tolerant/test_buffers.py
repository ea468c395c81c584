"""Which buffers a step has changed on any of two replicas, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")

from lightning_eff.strategies.fault_tolerant.buffers import Buffers
from lightning_eff.strategies.fault_tolerant.process_group import Gloo, store_on


class Module(nn.Module):
    constant: Tensor
    written: Tensor
    replaced: Tensor
    table: Tensor
    wide: Tensor
    none: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"norm": nn.BatchNorm1d(2)})
        for name in ("constant", "written", "replaced", "table"):
            self.register_buffer(name, torch.zeros(2))
        self.register_buffer("wide", torch.zeros(1).expand(2))
        self.register_buffer("none", None)


@pytest.fixture
def groups() -> Iterator[list[Gloo]]:
    store = store_on("127.0.0.1")
    groups = [Gloo("127.0.0.1", timedelta(seconds=10), timedelta(seconds=10)) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        address = f"127.0.0.1:{store.port}/buffers"
        list(pool.map(lambda rank: groups[rank].configure(address, "", rank, 2), range(2)))
    yield groups
    for group in groups:
        group.abort()


def shared(groups: list[Gloo], pair: list[Buffers]) -> list[str]:
    """Which of them are, at the end of a step."""
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda rank: pair[rank].share(pair[rank].changes(), groups[rank]), range(2)))
    for buffers, each in zip(pair, both, strict=True):
        buffers.adopt(each)
    names = [each[0] if each else [] for each in both]
    assert names[0] == names[1]
    return list(names[0])


def test_what_any_replica_has_changed_is_the_first_ones(groups: list[Gloo]) -> None:
    modules = [Module().eval() for _ in groups]
    with torch.inference_mode():
        for module in modules:
            module.constant = torch.zeros(2)  # as in a validation
    one, other = modules
    pair = [Buffers(module) for module in modules]
    for buffers in pair:
        buffers.begin()
    assert shared(groups, pair) == []
    one.replaced = one.replaced + 3  # whose version is that of the one before
    other.written += 5
    one.table, other.table = torch.ones(3), torch.ones(4)  # for batches of other lengths
    one.wide = torch.ones(1).expand(2)
    other.none = torch.ones(2)
    assert shared(groups, pair) == ["written", "replaced"]
    assert torch.equal(one.replaced, other.replaced)
    assert other.written.tolist() == [0.0, 0.0]
    assert (len(one.table), len(other.table)) == (3, 4)
    for buffers in pair:
        buffers.begin()
    for module in modules:
        module.train()
    one.inner["norm"](torch.randn(4, 2))
    names = ("running_mean", "running_var", "num_batches_tracked")
    assert shared(groups, pair) == [f"inner.norm.{name}" for name in names]
    assert all(map(torch.equal, one.inner.buffers(), other.inner.buffers()))


def test_a_step_that_failed_leaves_no_trace() -> None:
    module = Module()
    buffers = Buffers(module)
    buffers.begin()
    before = dict(module.named_buffers())
    values = {name: buffer.clone() for name, buffer in before.items()}

    def change() -> None:
        module.inner["norm"](torch.randn(4, 2))
        module.written += 1
        module.replaced += 1
        module.replaced = module.replaced.clone()
        module.none = torch.ones(2)

    def same() -> bool:
        now: dict[str, Tensor] = dict(module.named_buffers())
        return now.keys() == before.keys() and all(
            now[name] is before[name] and torch.equal(now[name], values[name]) for name in now
        )

    with buffers.kept():
        change()
        assert not same()
    assert same()
    change()
    buffers.restore()
    assert same()
    assert module.constant._version == 0
