"""The benchmark checks before it times, and does not pass CPU times off for kernels."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from benchmarks import kernels
from benchmarks.kernel_cases import SIZES, Case, Provider, cases

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        kernels, "milliseconds", lambda function, device: (function(), kernels.Times(2.0, 1.0, 3.0, 0.5))[1]
    )
    monkeypatch.delenv("LIGHTNING_EFF_KERNELS", raising=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it writes its rows")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_provider_passes_the_gate(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--sizes", "tiny", "--dtypes", dtype]) == 0
    output = capsys.readouterr().out
    assert "GPU figures are not measured" in output
    assert "ours" not in output
    for op in ("grad_norm", "tensor_stats", "row_sketch", "row_pack", "alignment", "moc", "moc_decode"):
        assert f"{op}" in output


def test_a_wrong_result_gets_no_time() -> None:
    case = Case("op", {}, lambda: [torch.ones(3)])
    provider = Provider(lambda: torch.tensor([1.0, 1.0, 1.1]), bytes=12, tolerance=1e-2)
    row = kernels.measure(case, provider, CPU, copy=1e9)
    assert row["gate"] == "wrong"
    assert [row[name] for name in kernels.TIMES] == [""] * 5
    right = kernels.measure(case, dataclasses.replace(provider, tolerance=0.2), CPU, copy=1e9)
    assert (right["gate"], right["ms"], right["copy_fraction"]) == ("ok", "2", "6e-06")
    for bad in (torch.full((3,), float("nan")), torch.ones(4), [torch.ones(3), torch.ones(3)]):
        result = dataclasses.replace(provider, run=lambda bad=bad: bad)
        assert kernels.measure(case, result, CPU, copy=1e9)["gate"] == "wrong"


def test_a_provider_that_fails_or_does_not_end_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LIMIT_S", 1)

    def fails() -> None:
        raise RuntimeError("no such kernel\nand more")

    def never_ends() -> None:
        while True:
            time.sleep(0.01)

    resets: list[int] = []
    case = Case("op", {}, lambda: [torch.ones(3)], lambda: resets.append(1))
    for run, gate in ((fails, "failed: RuntimeError: no such kernel"), (never_ends, "failed: TimeoutError: more than")):
        row = kernels.measure(case, Provider(run, bytes=12), CPU, copy=1e9)
        assert row["gate"].startswith(gate)
        assert row["ms"] == ""
    assert len(resets) == 4  # what a failure has left half done is put back


def test_an_ordinary_step_reads_a_third_of_what_clipping_moves() -> None:
    case = next(
        case for case in cases(SIZES["124m"], torch.bfloat16, torch.device("meta"), False) if "ordinary" in case.op
    )
    assert 3 * case.providers["ours"].bytes == case.providers["clip_grad_norm_"].bytes
    assert case.providers["ours"].bytes == pytest.approx(2 * 124.4e6, rel=1e-3)
