"""ARC-Top-K against its definition, and what may be asserted of its contraction."""

from __future__ import annotations

import pytest
import torch

from lightning_eff.compression import ArcTopK
from lightning_eff.compression.compressors import arc_topk
from lightning_eff.compression.exchange import Slot
from lightning_eff.compression.in_process import InProcessRanks
from lightning_eff.kernels import row_pack
from lightning_eff.kernels.row_sketch import signs
from tests.compression.ranks import SHAPES, Always, gradients, mean

ARC = {"ratio": 0.3, "rank": 4, "min_numel": 1}


@pytest.mark.parametrize("world_size", [2, 3])
def test_sends_the_rows_that_the_definition_selects(world_size):
    ranks = InProcessRanks(Always(**ARC, seed=5), world_size)
    for step in range(3):
        own = gradients(step, world_size)
        exact, found = mean(own), ranks.average(own)
        for other in found[1:]:
            assert all(torch.equal(found[0][name], other[name]) for name in SHAPES)
        torch.testing.assert_close(found[0]["0.bias"].double(), exact["0.bias"])
        for name in ("0.weight", "1.weight", "2.weight"):
            average = exact[name].flatten(1)
            V = signs(average.shape[1], 4, seed=5 << 32 | step, stream=Slot(name, 0, 1, 1).stream).double()
            count = max(1, int(len(average) * 0.3))
            rows = (average @ V).square().sum(1).topk(count).indices
            expected = torch.zeros_like(average)
            expected[rows] = average[rows]
            torch.testing.assert_close(found[0][name].flatten(1).double(), expected, rtol=1e-5, atol=1e-6)


def test_ratio_one_is_the_dense_mean():
    own = gradients(0, 3)
    found = InProcessRanks(Always(ratio=1.0, min_numel=1), 3).average(own)[0]
    for name, exact in mean(own).items():
        torch.testing.assert_close(found[name].double(), exact, rtol=1e-6, atol=1e-6)


def test_a_new_v_in_every_step_and_for_every_name():
    own = [{"a": torch.ones(64, 64), "b": torch.ones(64, 64)}] * 2
    noise = torch.Generator().manual_seed(0)
    own = [{name: tensor + 0.1 * torch.randn(64, 64, generator=noise) for name, tensor in part.items()} for part in own]
    ranks = InProcessRanks(ArcTopK(ratio=0.2, rank=1, min_numel=1), 2)
    first, second = ranks.average(own)[0], ranks.average(own)[0]
    assert not torch.equal(first["a"], second["a"])
    again = InProcessRanks(ArcTopK(ratio=0.2, rank=1, min_numel=1), 2)
    assert torch.equal(first["a"], again.average(own)[0]["a"])
    alone = InProcessRanks(ArcTopK(ratio=0.2, rank=1, min_numel=1), 2)
    found = alone.average([{"b": part["b"]} for part in own])[0]
    assert torch.equal(found["b"], first["b"]), "V depends on what else is in the bucket"


def _residual(matrix: torch.Tensor, count: int, draws: int) -> float:
    """Mean over V of the part of the averaged matrix's square that is left out, by ranks with equal gradients."""
    compressor = Always(ratio=count / len(matrix), rank=4, min_numel=1)
    ranks = InProcessRanks(compressor, 2)
    total = 0.0
    for _ in range(draws):
        found = ranks.average([{"w": matrix}] * 2)[0]["w"]
        total += float((matrix - found).square().sum() / matrix.square().sum())
    return total / draws


def test_contraction_holds_for_independent_rows():
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert _residual(matrix, 12, 100) < 1 - 12 / 64  # 0.805 measured elsewhere, against 0.8125


def test_contraction_of_correlated_rows_is_weaker():
    # 32 equal unit rows and 32 orthogonal ones of norm 0.9: 1 - K/n must not be asserted, half of it may.
    # In a rotated basis: of rows with one element other than zero a sketch of signs has the exact norms.
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).Q
    matrix = torch.cat([basis[:1].expand(32, 64), 0.9 * basis[32:]])
    residual = _residual(matrix, 12, 200)
    assert 1 - 12 / 64 < residual < 1 - 0.5 * 12 / 64
    assert residual == pytest.approx(0.82100, abs=3e-3)  # a Gaussian V, 4 columns, gives 0.82100 +- 0.00023


def test_no_contraction_on_one_rank():
    # Large rows that cancel over the ranks are never selected: the average is what counts.
    one, other = torch.zeros(2, 8), torch.zeros(2, 8)
    one[0, 0], other[0, 0] = 100.0, -100.0
    one[1, 1] = other[1, 1] = 1.0
    found = InProcessRanks(Always(ratio=0.5, min_numel=1), 2).average([{"w": one}, {"w": other}])[0]["w"]
    assert torch.equal(found, torch.tensor([[0.0] * 8, [0.0, 1.0] + [0.0] * 6]))


def test_ratio_schedule():
    compressor = ArcTopK(ratio=0.2, initial_ratio=0.8, ratio_steps=10, start_step=5)
    assert [compressor.ratio_at(step) for step in (0, 5, 10, 15, 100)] == pytest.approx([0.8, 0.8, 0.5, 0.2, 0.2])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ratio", 0.0), ("ratio", 1.1), ("rank", 0), ("rank", 17), ("error_feedback", "ef22"), ("eta", 0.0),
        ("eta", 1.5), ("start_step", -1), ("initial_ratio", 2.0), ("ratio_steps", 0), ("min_numel", -1), ("seed", -1),
    ],
)  # fmt: skip
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        ArcTopK(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_select_other_rows_are_told(monkeypatch, world_size, dtype):
    """Scores are sums, which an unlike CPU may round differently."""
    calls = []

    def scores(sketch):
        calls.append(1)
        found = row_pack.row_scores(sketch)
        return -found if len(calls) == world_size else found  # the last rank

    monkeypatch.setattr(arc_topk, "row_scores", scores)
    own = [{"w": part["w"].to(dtype)} for part in gradients(0, world_size, {"w": (300, 40)})]
    with pytest.raises(RuntimeError, match=r"the ranks do not send the same rows of w"):
        InProcessRanks(Always(), world_size).average(own)
