"""Tables are kept from call to call, for as many lists as a step asks for."""

from __future__ import annotations

import types

import pytest
import torch

from lightning_eff.kernels import tables
from lightning_eff.kernels.matrices import inspect_matrices, matrix_table
from lightning_eff.kernels.row_pack import layout
from lightning_eff.kernels.tables import address_table, inspect

CPU = torch.device("cpu")


def test_the_tables_of_all_buckets_are_found_again() -> None:
    """A model of 1,000 small parameters in 100 buckets, with error feedback: two lists of addresses for each."""
    buckets = [[torch.zeros(4, 4 + bucket % 50) for _ in range(10)] for bucket in range(100)]
    errors = [[torch.zeros_like(matrix) for matrix in bucket] for bucket in buckets]

    def step() -> None:
        for index, (matrices, kept) in enumerate(zip(buckets, errors, strict=True)):
            inspected = inspect_matrices("test", matrices)
            matrix_table(inspected)
            address_table(inspected.listed)
            address_table(inspect("test", kept))
            layout.pack_layout(inspected.shapes, [1 + index // 50] * 10, CPU)

    caches = (tables._addresses, layout._layout)
    step()
    before = [cache.cache_info() for cache in caches]
    step()
    after = [cache.cache_info() for cache in caches]
    assert [new.hits - old.hits for new, old in zip(after, before, strict=True)] == [200, 100]
    assert [new.misses - old.misses for new, old in zip(after, before, strict=True)] == [0, 0]


@pytest.mark.parametrize("capturing", [True, False])
def test_what_a_graph_copies_again_is_kept(monkeypatch: pytest.MonkeyPatch, capturing: bool) -> None:
    """A replay of a CUDA graph reads the pinned memory anew."""
    pinned, table = torch.zeros(2), torch.ones(2)
    host = types.SimpleNamespace(pin_memory=lambda: pinned)
    monkeypatch.setattr(tables, "_CAPTURED", [])
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: host)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(tables, "_to_cuda", lambda *_: table)
    assert tables.to_device([1, 2], torch.int64, torch.device("cuda")) is table
    kept = [id(tensor) for tensor in tables._CAPTURED]
    assert kept == ([id(pinned), id(table)] if capturing else [])
