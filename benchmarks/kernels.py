"""The kernels against what torch offers, on a GPU; their byte counts and compiled resources, anywhere.

    python -m benchmarks.kernels              # time everything; without a GPU the references on small sizes
    python -m benchmarks.kernels --resources  # compile ahead of time and count bytes; needs no GPU

Every provider's result is checked first, and one that is wrong gets no time. Times on a GPU go to
benchmarks/results/kernels.csv; times on a CPU say nothing about kernels and are only printed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases import DTYPES, SIZES, Case, Provider, cases
from benchmarks.rows import write_rows
from lightning_eff.kernels import compile_report

COPY_BYTES = 2**30


def versions() -> dict[str, str]:
    """What rows.provenance() does not know of."""
    try:
        return {"triton": importlib.metadata.version("triton")}
    except importlib.metadata.PackageNotFoundError:
        return {"triton": "none"}


def milliseconds(function: Callable[[], Any], device: torch.device) -> tuple[float, float, float]:
    """Median and 20 % and 80 % quantiles of a call's time."""
    if device.type == "cuda":
        import triton.testing

        median, low, high = triton.testing.do_bench(function, warmup=50, rep=200, quantiles=[0.5, 0.2, 0.8])
        return median, low, high
    times = []
    for _ in range(6):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    fifths = statistics.quantiles(times[1:], n=5)
    return statistics.median(times[1:]), fifths[0], fifths[-1]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a plain copy: what a kernel that only streams can reach."""
    elements = COPY_BYTES // 4 if device.type == "cuda" else 2**22
    source, target = torch.ones(elements, device=device), torch.empty(elements, device=device)
    return 2 * 4 * elements / (1e-3 * milliseconds(lambda: target.copy_(source), device)[0])


def error_of(result: Any, truth: list[Tensor]) -> float:
    """Largest difference of a provider's tensors to the truth, relative to the truth's largest element."""
    tensors = [result] if isinstance(result, Tensor) else list(result)
    if len(tensors) == 1 and len(truth) > 1:
        tensors = list(tensors[0])
    if len(tensors) != len(truth):
        return float("inf")
    worst = 0.0
    for tensor, right in zip(tensors, truth, strict=True):
        if tensor.shape != right.shape:
            return float("inf")
        if right.numel():
            difference = (tensor.double() - right.double()).abs().max() / right.double().abs().max().clamp_min(1e-30)
            worst = max(worst, float(difference)) if difference.isfinite() else float("inf")
    return worst


def measure(case: Case, provider: Provider, device: torch.device, copy: float) -> dict[str, Any]:
    """The figures of one provider, without a time where its result is wrong."""
    case.reset()
    error = error_of(provider.run(), case.truth())
    case.reset()
    figures: dict[str, Any] = {"bytes": provider.bytes, "error": f"{error:.1e}", "gate": "ok"}
    if not error <= provider.tolerance:
        return {**figures, "gate": "wrong", "ms": "", "ms_q20": "", "ms_q80": "", "copy_fraction": ""}
    median, low, high = milliseconds(provider.run, device)
    case.reset()
    fraction = provider.bytes / (1e-3 * median) / copy
    times = {"ms": median, "ms_q20": low, "ms_q80": high, "copy_fraction": fraction}
    return {**figures, **{name: f"{value:.4g}" for name, value in times.items()}}


def time_all(
    sizes: Iterable[str], dtypes: Iterable[str], ops: Iterable[str], device: torch.device
) -> list[dict[str, Any]]:
    """One row for each op, size, dtype and provider."""
    copy = copy_bandwidth(device)
    print(f"copy bandwidth {copy / 1e9:.0f} GB/s")
    rows = []
    for size in sizes:
        for dtype in dtypes:
            for case in cases(SIZES[size], DTYPES[dtype], device, compiled=device.type == "cuda"):
                if not any(case.op.startswith(op) for op in ops):
                    continue
                for name, provider in case.providers.items():
                    # On the CPU our ops are their references, and are not to pass for kernels.
                    name = "reference" if name == "ours" and device.type == "cpu" else name
                    figures = measure(case, provider, device, copy)
                    row = {"op": case.op, "size": size, "dtype": dtype, "provider": name, **figures}
                    print("  ".join(str(value) for value in row.values()), flush=True)
                    rows.append({**row, "copy_gb_per_s": f"{copy / 1e9:.1f}", **versions()})
    return rows


def resources() -> None:
    """Write the compiled kernels' resources for both targets, and the bytes that each provider moves."""
    compiled = [row for target in ("cuda:90", "hip:gfx942") for row in compile_report(target)]
    rows = [{**row._asdict(), "vectorised": row.vectorised, **versions()} for row in compiled]
    print(write_rows("kernels_resources", rows))
    counts = [
        {"op": case.op, "size": size, "dtype": dtype, "provider": name, "bytes": provider.bytes}
        for size in ("124m", "1300m")
        for dtype in ("fp32", "bf16")
        for case in cases(SIZES[size], DTYPES[dtype], torch.device("meta"), compiled=False)
        for name, provider in case.providers.items()
    ]
    print(write_rows("kernels_bytes", counts))


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for; 1 where a provider's result was wrong."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resources", action="store_true")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["124m", "1300m"] if on_gpu else ["tiny"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--ops", nargs="+", default=[""], help="names of ops, or how they begin")
    given = parser.parse_args(arguments)
    if given.resources:
        resources()
        return 0
    device = torch.device("cuda" if on_gpu else "cpu")
    rows = time_all(given.sizes, given.dtypes, given.ops, device)
    if on_gpu:
        print(write_rows("kernels", rows))
    else:
        print("No GPU here: these are times of the references on the CPU. GPU figures are not measured.")
    return 1 if any(row["gate"] == "wrong" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
