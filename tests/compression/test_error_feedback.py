"""Error feedback: the identities of the literature, and what must not enter a memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_eff.compression import FP16, ArcTopK, Compressor, Int8, PowerSGD, RandK, TopK
from lightning_eff.compression.in_process import InProcessRanks
from lightning_eff.kernels.row_sketch import signs
from tests.compression.ranks import SHAPES, Always, gradients, mean, memory_of

MATRICES = ("0.weight", "1.weight", "2.weight")
ARC = {"ratio": 0.3, "min_numel": 1}


class AlwaysTopK(TopK):
    def bytes_sent(self, rows, columns, itemsize, world_size):
        return 0.0


class AlwaysRandK(RandK):
    def bytes_sent(self, rows, columns, itemsize, world_size):
        return 0.0


class AlwaysPowerSGD(PowerSGD):
    def bytes_sent(self, rows, columns, itemsize, world_size):
        return 0.0


def with_memory() -> list[Compressor]:
    found: list[Compressor] = [AlwaysPowerSGD(rank=2, min_numel=1)]
    for scheme in ("ef14", "ef21", "ef21m"):
        found.append(Always(**ARC, error_feedback=scheme))
        found.append(AlwaysTopK(ratio=0.2, min_numel=1, error_feedback=scheme))
        found.append(AlwaysRandK(ratio=0.2, min_numel=1, error_feedback=scheme))
    return found


def name_of(compressor: Compressor) -> str:
    return f"{type(compressor).__name__.removeprefix('Always')}-{compressor.error_feedback}"


every_memory = pytest.mark.parametrize("compressor", with_memory(), ids=name_of)
ef14 = [compressor for compressor in with_memory() if compressor.error_feedback == "ef14"]
ef21 = [compressor for compressor in with_memory() if compressor.error_feedback in ("ef21", "ef21m")]


@pytest.mark.parametrize("compressor", ef14, ids=name_of)
def test_ef14_telescopes(compressor):
    """All that was sent, and the mean of what is still kept, is all that there was."""
    ranks = InProcessRanks(compressor, 3)
    sent = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    there = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for step in range(12):
        own = gradients(step, 3)
        found = ranks.average(own)[0]
        for name in SHAPES:
            sent[name] += found[name]
            there[name] += mean(own)[name]
        for name in MATRICES:
            kept = torch.stack([memory[name]["error"].double() for memory in ranks.memories]).mean(0)
            torch.testing.assert_close(sent[name] + kept.view_as(sent[name]), there[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sent["0.bias"], there["0.bias"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compressor", ef21, ids=name_of)
def test_mean_of_the_local_estimates_is_the_global_one(compressor):
    ranks = InProcessRanks(compressor, 3)
    eta = 1.0 if compressor.error_feedback == "ef21" else compressor.eta
    for step in range(12):
        own = gradients(step, 3)
        found = ranks.average(own)
        for name in MATRICES:
            local = []
            for memory, gradient in zip(ranks.memories, own, strict=True):
                momentum = memory[name].get("momentum", gradient[name].flatten(1))
                local.append((1 - eta) * momentum.double() - eta * memory[name]["error"].double())
            estimate = ranks.memories[0][name]["estimate"].double()
            torch.testing.assert_close(torch.stack(local).mean(0), estimate, rtol=1e-4, atol=1e-5)
            assert torch.equal(found[0][name].flatten(1).double(), estimate)
            for memory in ranks.memories[1:]:
                assert torch.equal(memory[name]["estimate"].double(), estimate)


@pytest.mark.parametrize("scheme", ["ef21", "ef21m"])
def test_ef21_is_the_papers_recursion(scheme):
    """h_i and v_i kept as the papers write them, in float64."""
    eta, count = (1.0, 7) if scheme == "ef21" else (0.1, 7)
    ranks = InProcessRanks(Always(**ARC, error_feedback=scheme, eta=0.1, rank=4), 2)
    local, momenta, total = [], [], torch.zeros(())
    for step in range(10):
        own = [part["0.weight"].double() for part in gradients(step, 2)]
        found = ranks.average(gradients(step, 2))[0]["0.weight"]
        if step == 0:
            local, momenta, total = [g.clone() for g in own], [g.clone() for g in own], sum(own) / 2
        else:
            momenta = [(1 - eta) * v + eta * g for v, g in zip(momenta, own, strict=True)]
            differences = [v - h for v, h in zip(momenta, local, strict=True)]
            V = signs(16, 4, seed=step, stream=_stream("0.weight")).double()
            rows = (sum(differences) @ V).square().sum(1).topk(count).indices
            for difference, h in zip(differences, local, strict=True):
                h[rows] += difference[rows]
                total[rows] += difference[rows] / 2
        torch.testing.assert_close(found.double(), total, rtol=1e-4, atol=1e-5)


def _stream(name: str) -> int:
    import zlib

    return zlib.crc32(name.encode())


def test_ef21m_with_eta_one_is_ef21():
    one = InProcessRanks(Always(**ARC, error_feedback="ef21m", eta=1.0), 2)
    other = InProcessRanks(Always(**ARC, error_feedback="ef21"), 2)
    for step in range(8):
        found, expected = one.average(gradients(step, 2))[0], other.average(gradients(step, 2))[0]
        assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


@every_memory
def test_what_is_not_finite_stays_out(compressor):
    """An infinity on one rank: every memory on every rank is as it was, and the averages show it."""
    ranks = InProcessRanks(compressor, 2)
    for step in range(3):
        ranks.average(gradients(step, 2))
    before = memory_of(ranks.memories)
    for value in (torch.inf, torch.nan):
        bad = gradients(3, 2)
        bad[1]["0.weight"][5, 3] = value
        found = ranks.average(bad)
        assert not all(found[0][name].isfinite().all() for name in SHAPES)
        for old, new in zip(before, memory_of(ranks.memories), strict=True):
            assert torch.equal(old, new)
    ranks.steps = 3  # the run goes on as if the step had not been
    untouched = InProcessRanks(compressor, 2)
    for step in range(3):
        untouched.average(gradients(step, 2))
    found, expected = ranks.average(gradients(4, 2))[0], untouched.average(gradients(4, 2))[0]
    assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


@every_memory
def test_a_first_step_that_is_not_finite_begins_nothing(compressor):
    bad = gradients(0, 2)
    bad[1]["0.weight"][5, 3] = torch.inf
    ranks = InProcessRanks(compressor, 2)
    ranks.average(bad)
    assert all(tensor.isfinite().all() for tensor in memory_of(ranks.memories))


@every_memory
def test_the_memory_does_not_know_the_loss_scale(compressor):
    """A GradScaler changes its scale on the way: memories and unscaled averages stay bit for bit the same."""
    plain, scaled = InProcessRanks(compressor, 2), InProcessRanks(compressor, 2)
    for step in range(6):
        scale = 2.0 ** (16 - 4 * step)
        own = gradients(step, 2)
        larger = [{name: tensor * scale for name, tensor in part.items()} for part in own]
        found, expected = scaled.average(larger, scale=scale)[0], plain.average(own)[0]
        assert all(torch.equal(found[name] / scale, expected[name]) for name in SHAPES)
    for one, other in zip(memory_of(plain.memories), memory_of(scaled.memories), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize(
    "compressor",
    [
        *with_memory(),
        AlwaysPowerSGD(rank=2, min_numel=1, error_feedback="none"),
        Always(**ARC),
        AlwaysTopK(ratio=0.2, min_numel=1, error_feedback="none"),
        AlwaysRandK(ratio=0.05, min_numel=1),  # may not have drawn it
        FP16(),
        Int8(),
    ],
    ids=name_of,
)
def test_an_overflow_is_shown_to_the_grad_scaler(compressor, value):
    """Whatever was sent, the scaled averages of the matrix are not finite on any rank."""
    ranks = InProcessRanks(compressor, 2)
    for step in range(5):
        bad = gradients(step, 2)
        bad[0]["2.weight"][1, 1] = value
        assert not any(found["2.weight"].isfinite().all() for found in ranks.average(bad, scale=1024.0))


def test_dense_warm_up_keeps_no_error():
    ranks = InProcessRanks(Always(**ARC, error_feedback="ef14", start_step=2), 2)
    for step in range(2):
        own = gradients(step, 2)
        found = ranks.average(own)[0]
        for name, exact in mean(own).items():
            torch.testing.assert_close(found[name].double(), exact, rtol=1e-6, atol=1e-6)
    assert not any(ranks.memories)
    ranks.average(gradients(2, 2))
    assert set(ranks.memories[0]) == set(MATRICES)


@pytest.mark.parametrize("compressor", [*with_memory(), ArcTopK(**ARC)], ids=name_of)
def test_measures_what_is_left_out(compressor):
    ranks = InProcessRanks(compressor, 2)
    for step in range(3):
        plain = memory_of(ranks.memories)
        ranks.average(gradients(step, 2), measure=True)
    assert 0 < ranks.left_out < 1.5
    if compressor.error_feedback == "ef14":
        own = gradients(3, 2)
        inputs = [
            (part[name].flatten(1) + memory[name]["error"]).double()
            for part, memory in zip(own, ranks.memories, strict=True)
            for name in MATRICES
        ]
        ranks.average(own, measure=True)
        rest = [memory[name]["error"].double() for memory in ranks.memories for name in MATRICES]
        expected = sum(e.square().sum() for e in rest) / sum(u.square().sum() for u in inputs)
        assert ranks.left_out == pytest.approx(float(expected.sqrt()), rel=1e-5)
    elif compressor.error_feedback == "none":
        assert not plain


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_scale_is_never_rounded_to_16_bits(dtype):
    """A GPU casts a 0-d float32 tensor to the other operand's 16 bits: 65536 is infinite in float16."""
    found = []

    class Operands(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name in ("aten::mul_", "aten::div_", "aten::mul", "aten::div"):
                tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
                if len(tensors) == 2 and tensors[0].itemsize < tensors[1].itemsize:
                    found.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    own = [{name: tensor.to(dtype) for name, tensor in part.items()} for part in gradients(0, 2)]
    with Operands():
        InProcessRanks(Always(error_feedback="ef14"), 2).average(own, scale=65536.0)
    assert found == []
