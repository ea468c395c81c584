"""Copies in host memory."""

import threading

import numpy
import pytest
import torch

from lightning_eff.plugins.async_checkpoint import copies
from lightning_eff.plugins.async_checkpoint.copies import Buffers, copy_all


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
    monkeypatch.setattr(copies, "_SMALL", 1)
    monkeypatch.setattr(copies, "_PIECE", 1001)
    source = list(_tensors())[index]
    target = torch.empty_like(source, requires_grad=False)
    with torch.no_grad():
        copy_all([(target, source)])
    # `view` refuses what is conjugated and what is not dense: bytes of what the two stand for.
    mine, its = (each.detach().resolve_conj().contiguous().view(-1).view(torch.uint8) for each in (target, source))
    assert torch.equal(mine, its)
    assert target.numel() == 0 or target.data_ptr() != source.data_ptr()


def test_a_thread_that_is_held_up_holds_up_one_piece(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(copies, "_PIECE", 128 * 1024)
    copied, taken, held, inner = {}, threading.Event(), threading.Event(), numpy.copyto

    class Started(threading.Thread):
        """Has a piece in hand before the others go on."""

        def start(self) -> None:
            super().start()
            assert taken.wait(30)

    def slow(target, source):
        if threading.current_thread() is not threading.main_thread():
            taken.set()
            assert held.wait(30)  # until the other one has done the rest
        inner(target, source)
        copied[threading.get_ident()] = copied.get(threading.get_ident(), 0) + 1
        if sum(copied.values()) == 15:
            held.set()

    monkeypatch.setattr(copies.numpy, "copyto", slow)
    values = {str(i): torch.full((128, 1024), float(i)) for i in range(4)}  # sixteen pieces
    monkeypatch.setattr(copies.threading, "Thread", Started)
    assert all(torch.equal(copy, values[name]) for name, copy in Buffers().copy(values).items())
    assert sorted(copied.values()) == [1, 15]


def test_small_tensors_and_views_are_left_to_torch(monkeypatch):
    calls = []
    monkeypatch.setattr(copies.numpy, "copyto", lambda target, source: calls.append(target.nbytes))
    Buffers().copy({"large": torch.zeros(64, 1024), "small": torch.zeros(8), "view": torch.zeros(512, 512).T})
    assert calls == [4 * 64 * 1024]
