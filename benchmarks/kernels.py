"""The kernels against what torch offers, on a GPU; their byte counts and compiled resources, anywhere.

    python -m benchmarks.kernels              # time everything; without a GPU the references on small sizes
    python -m benchmarks.kernels --resources  # compile ahead of time and count bytes; needs no GPU

Every provider's result is checked first, and one that is wrong gets no time; one that fails, or takes longer than its
limit, leaves the others alone. Times on a GPU go to benchmarks/results/kernels.csv row by row: the device's, and beside
it the host's time to launch the call. Times on a CPU say nothing about kernels and are only printed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.kernel_cases import DTYPES, SIZES, Case, Provider, cases
from benchmarks.rows import write_rows
from lightning_eff.kernels import compile_report

COPY_BYTES = 2**30
LIMIT_S = 120  # of one provider, its compilation included
TIMES = ("ms", "ms_q20", "ms_q80", "host_ms", "copy_fraction")


def versions() -> dict[str, str]:
    """What rows.provenance() does not know of."""
    try:
        return {"triton": importlib.metadata.version("triton")}
    except importlib.metadata.PackageNotFoundError:
        return {"triton": "none"}


class Times(NamedTuple):
    """Of one call, in milliseconds: the median and the 20 % and 80 % quantiles on the device, and the host's median."""

    median: float
    low: float
    high: float
    host: float


def milliseconds(function: Callable[[], Any], device: torch.device) -> Times:
    """A call's time on the device, without the host's: work is queued ahead, so that the device never waits for it."""
    if device.type == "cuda":
        return _on_gpu(function, device)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    fifths = statistics.quantiles(times[1:], n=5)
    return Times(statistics.median(times[1:]), fifths[0], fifths[-1], statistics.median(times[1:]))


def _on_gpu(function: Callable[[], Any], device: torch.device, budget: float = 0.3) -> Times:
    """Between two events, behind a kernel that sleeps for longer than the host needs to launch the call."""
    cache = torch.empty(2**28, dtype=torch.uint8, device=device)  # more than any second-level cache holds
    hosts = []
    for _ in range(5):  # compiles, too
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        hosts.append(time.perf_counter() - start)
        torch.cuda.synchronize(device)
    whole = time.perf_counter() - start
    host = statistics.median(hosts[1:])
    cycles = int(3e9 * (2 * host + 1e-4))  # no GPU has a faster clock
    device_times = []
    for _ in range(max(10, min(100, int(budget / (whole + host + 1e-3))))):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        torch.cuda._sleep(cycles)
        first.record()
        start = time.perf_counter()
        function()
        hosts.append(time.perf_counter() - start)
        last.record()
        torch.cuda.synchronize(device)
        device_times.append(first.elapsed_time(last))
    fifths = statistics.quantiles(device_times, n=5)
    return Times(statistics.median(device_times), fifths[0], fifths[-1], 1e3 * statistics.median(hosts[1:]))


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """A TimeoutError in the midst of Python work that takes longer: a compilation may. In the main thread."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before, start = signal.signal(signal.SIGALRM, stop), time.monotonic()
    others, _ = signal.setitimer(signal.ITIMER_REAL, seconds)  # there is one such timer in a process
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if others:
            signal.setitimer(signal.ITIMER_REAL, max(others - (time.monotonic() - start), 1e-3))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a plain copy: what a kernel that only streams can reach."""
    elements = COPY_BYTES // 4 if device.type == "cuda" else 2**22
    source, target = torch.ones(elements, device=device), torch.empty(elements, device=device)
    return 2 * 4 * elements / (1e-3 * milliseconds(lambda: target.copy_(source), device).median)


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
    """The figures of one provider, without a time where its result is wrong or it fails."""
    figures: dict[str, Any] = {"bytes": provider.bytes, "error": "", **dict.fromkeys(TIMES, "")}
    try:
        with limit(LIMIT_S):
            case.reset()
            error = error_of(provider.run(), case.truth())
            case.reset()
            figures |= {"error": f"{error:.1e}", "gate": "ok" if error <= provider.tolerance else "wrong"}
            if figures["gate"] == "ok":
                times = milliseconds(provider.run, device)
                fraction = provider.bytes / (1e-3 * times.median) / copy
                figures |= {name: f"{value:.4g}" for name, value in zip(TIMES, (*times, fraction), strict=True)}
    except Exception as failure:  # one that fails, or does not end, must not take the others' figures along
        words = " ".join(f"{type(failure).__name__}: {failure}".split())
        figures["gate"] = f"failed: {words[:100]}"
    finally:
        case.reset()
    return figures


def time_all(
    sizes: Iterable[str],
    dtypes: Iterable[str],
    ops: Iterable[str],
    device: torch.device,
    compiled: bool | None = None,
) -> Iterator[dict[str, Any]]:
    """One row for each op, size, dtype and provider; ``compiled``: of torch.compile alone, or of all the others."""
    copy = copy_bandwidth(device)
    print(f"copy bandwidth {copy / 1e9:.0f} GB/s")
    with_compile = device.type == "cuda" if compiled is None else compiled
    for size in sizes:
        for dtype in dtypes:
            for case in cases(SIZES[size], DTYPES[dtype], device, compiled=with_compile):
                if not any(case.op.startswith(op) for op in ops):
                    continue
                for name, provider in case.providers.items():
                    if compiled and name != "torch.compile":
                        continue
                    # On the CPU our ops are their references, and are not to pass for kernels.
                    name = "reference" if name == "ours" and device.type == "cpu" else name
                    figures = measure(case, provider, device, copy)
                    row = {"op": case.op, "size": size, "dtype": dtype, "provider": name, **figures}
                    print("  ".join(str(value) for value in row.values()), flush=True)
                    row |= {"copy_gb_per_s": f"{copy / 1e9:.1f}", **versions()}
                    if device.type == "cuda":  # at once: what comes later may end the process
                        write_rows("kernels", [row], key=("op", "size", "dtype", "provider"))
                    yield row


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
    """Run what was asked for; 1 where a provider's result was wrong or missing."""
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
    rows = list(time_all(given.sizes, given.dtypes, given.ops, device))
    if not on_gpu:
        print("No GPU here: these are times of the references on the CPU. GPU figures are not measured.")
    return 1 if any(row["gate"] != "ok" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
