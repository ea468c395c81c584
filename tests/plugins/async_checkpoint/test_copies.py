"""Copies in host memory."""

import pytest
import torch

from lightning_eff.plugins.async_checkpoint import copies
from lightning_eff.plugins.async_checkpoint.copies import Buffers, copy_into


@pytest.fixture(params=[1, 2, 3])
def threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return request.param


def _tensors():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 200, generator=generator)
    yield from (matrix, matrix.T, matrix[::2, 3:], matrix.expand(2, 300, 200), matrix[0, 0], torch.empty(0, 7))
    yield from (matrix.bfloat16(), matrix.half(), matrix.double(), matrix > 0, matrix.long())
    yield from (torch.complex(matrix, matrix.flip(0)), torch.complex(matrix, -matrix).conj())
    yield from (matrix.to(torch.float8_e4m3fn), torch.nn.Parameter(matrix))


@pytest.mark.parametrize("index", range(len(list(_tensors()))))
def test_copies_are_equal_to_the_bit_whatever_their_form(threads, index, monkeypatch):
    monkeypatch.setattr(copies, "_LARGE", 1)
    source = list(_tensors())[index]
    copy = torch.empty_like(source, requires_grad=False)
    with torch.no_grad():
        copy_into(copy, source)
    # `view` refuses what is conjugated and what is not dense: bytes of what the two stand for.
    mine, its = (each.detach().resolve_conj().contiguous().view(-1).view(torch.uint8) for each in (copy, source))
    assert torch.equal(mine, its)
    assert copy.numel() == 0 or copy.data_ptr() != source.data_ptr()


def test_one_thread_copies_what_is_large_where_torch_has_two(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    calls = []
    monkeypatch.setattr(copies.numpy, "copyto", lambda copy, source: calls.append(copy.nbytes))
    Buffers().copy({"large": torch.zeros(64, 1024), "small": torch.zeros(8), "view": torch.zeros(512, 512).T})
    assert calls == [4 * 64 * 1024]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    Buffers().copy({"large": torch.zeros(64, 1024)})
    assert len(calls) == 1
