"""Parts without a Trainer: the machine, each kernel against float64, the benchmark, ZClip's step, and large tensors."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import kernels, rows
from benchmarks.gpu.report import DEVICE, DTYPES, OUT, SMALL, Report, difference
from benchmarks.kernel_cases import SIZES
from harness.interpreter import mended_bfloat16
from lightning_eff.functional.zclip import ZClipConfig, ZClipState, zclip_grad_norm_
from lightning_eff.kernels import alignment, grad_norm, moc, moc_decode, row_pack, row_sketch, status, tensor_stats

PACKAGES = ("torch", "triton", "lightning", "numpy", "safetensors", "tensorboard", "rich", "jsonargparse", "torchft")
SIZE = "tiny" if SMALL else "124m"


def environment(report: Report) -> None:
    """What there is, and that the kernels would be taken."""
    found = {distribution.metadata["Name"].lower(): distribution.version for distribution in metadata.distributions()}
    report.row("versions", python=platform.python_version(), **{name: found.get(name, "-") for name in PACKAGES})
    tools = {name: bool(shutil.which(name)) for name in ("gcc", "ptxas", "nvcc", "compute-sanitizer")}
    report.row("machine", cores=os.cpu_count(), cuda=torch.version.cuda, hip=torch.version.hip, **tools)
    if not SMALL:
        properties = torch.cuda.get_device_properties(0)
        report.row(
            "device",
            name=properties.name,
            memory_gb=properties.total_memory / 1e9,
            processors=properties.multi_processor_count,
        )
    for op in status():
        report.row(f"kernel {op.op}", op.implementation == ("reference" if SMALL else "triton"), reason=op.reason)
    copy = kernels.copy_bandwidth(DEVICE)
    report.row("copy bandwidth", copy > 0, gb_s=copy / 1e9)


def _inputs(dtype: torch.dtype, shift: int = 0) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Tensors of odd sizes, the matrices among them, and errors; ``shift`` puts them at odd addresses."""
    generator = torch.Generator().manual_seed(3)
    tensors = []
    for shape in ((33, 65), (7, 1032), (5, 1023), (4099,), (16385,), (1,)):
        flat = torch.randn(torch.Size(shape).numel() + shift, generator=generator).to(DEVICE, dtype)
        tensors.append(flat[shift:].view(shape))
    matrices = [tensor for tensor in tensors if tensor.ndim == 2]
    return tensors, matrices, [torch.randn(m.shape, generator=generator).to(DEVICE) for m in matrices]


def smoke(report: Report, dtypes: Any = DTYPES, shifts: tuple[int, ...] = (0, 1)) -> None:
    """Every op once, on odd sizes and at odd addresses, against float64; with the time of the first call."""
    for name, dtype in dtypes.items():
        for shift in shifts:
            for op, check in CHECKS.items():
                with report.guarded(f"{op} {name} shift {shift}"):
                    start = time.perf_counter()
                    error, allowed = check(dtype, shift)
                    seconds = time.perf_counter() - start
                    report.row(f"{op} {name} shift {shift}", error <= allowed, error=error, first_call_s=seconds)


def _norm(dtype: torch.dtype, shift: int) -> tuple[float, float]:
    tensors, _, _ = _inputs(dtype, shift)
    truth = torch.stack([t.double().square().sum() for t in tensors]).sum()
    return difference(grad_norm.sum_of_squares(tensors), truth), 1e-5


def _scale(dtype: torch.dtype, shift: int) -> tuple[float, float]:
    tensors, _, _ = _inputs(dtype, shift)
    factor = torch.tensor(0.3141592653589793, dtype=torch.float64, device=DEVICE)
    truth = [(t.float() * factor.float()).to(dtype) for t in tensors]
    grad_norm.scale_(tensors, factor)
    return max(map(difference, tensors, truth)), 0.0


def _stats(dtype: torch.dtype, shift: int) -> tuple[float, float]:
    tensors, _, _ = _inputs(dtype, shift)
    copies = [torch.ones_like(t) for t in tensors]
    for t in tensors[:-1]:
        t.view(-1)[:5] = 0
    truth = [
        [t.abs().sum(), t.square().sum(), (t - 1).abs().sum(), t.abs().max(), (t == 0).double().sum(), t.new_zeros(())]
        for t in (tensor.double() for tensor in tensors)
    ]
    stats = tensor_stats.tensor_stats(tensors, copies, extremes=True)
    same = all(torch.equal(t, copy) for t, copy in zip(tensors, copies, strict=True))
    error = max(
        difference(got, torch.stack(right))
        for got, right in zip(stats, map(list, zip(*truth, strict=True)), strict=True)
    )
    return error if same else float("inf"), 1e-5


def _sketch(dtype: torch.dtype, shift: int) -> tuple[float, float]:
    _, matrices, errors = _inputs(dtype, shift)
    signs = [row_sketch.signs(m.shape[1], 4, 7, stream, DEVICE) for stream, m in enumerate(matrices)]
    truth = torch.cat([(m.double() + e) @ s.double() for m, e, s in zip(matrices, errors, signs, strict=True)])
    return difference(row_sketch.row_sketch(matrices, 4, 7, errors=errors), truth), 1e-4


def _rows(dtype: torch.dtype, shift: int) -> tuple[float, float]:
    _, matrices, errors = _inputs(dtype, shift)
    counts, selected = [2, 2, 1], torch.tensor([0, 32, 33, 39, 44], device=DEVICE)
    whole = [m.double() + e.double() for m, e in zip(matrices, errors, strict=True)]
    sent = torch.cat([whole[0][[0, 32]].flatten(), whole[1][[0, 6]].flatten(), whole[2][[4]].flatten()])
    buffer = row_pack.pack_rows(matrices, selected, counts, 2, errors)
    error = difference(buffer, sent / 2)
    row_pack.scatter_rows_(matrices, buffer, selected, counts, errors)
    whole[0][[0, 32]] = 0
    kept = difference(errors[0], whole[0])
    return max(error, kept), 1e-2 if dtype == torch.bfloat16 else 1e-5


def _alignment(dtype: torch.dtype, shift: int) -> tuple[float, float]:
    _, (matrix, *_), _ = _inputs(dtype, shift)
    vector = torch.ones(matrix.shape[1], device=DEVICE)
    histogram, above, below = list(alignment.alignment_stats(matrix, vector, bins=8))[:3]
    dots = matrix.double() @ vector.double()
    wrong = (
        abs(float(above - (dots > 0).sum()))
        + abs(float(below - (dots < 0).sum()))
        + abs(float(histogram.sum()) - len(matrix))
    )
    return wrong, 1.0  # a token at 0 may fall on either side


def _moc(dtype: torch.dtype, shift: int) -> tuple[float, float]:
    """Forward and backward against autograd through silu(v) u, with the channels put in place by a product of masks."""
    _, (up, *_), (gates, *_) = _inputs(dtype, shift)
    values, channels = gates.to(dtype).topk(up.shape[1] // 2)
    leaves = gate, wide_up = [t.double().requires_grad_() for t in (gates.to(dtype), up)]
    mask = torch.zeros_like(gate).scatter_(1, channels, 1.0)
    placed = torch.nn.functional.silu(gate) * wide_up * mask
    truth = torch.autograd.grad(placed, leaves, up.double())
    u, s, z, ours = moc.activate(up, values, channels)
    error = max(difference(ours, placed.detach()), difference(z, placed.detach().gather(1, channels)))
    grads = moc.activate_backward(up, values, channels.to(torch.int16), u, s)
    return max(error, *map(difference, grads, truth)), 2e-2 if dtype == torch.bfloat16 else 1e-5


def _moc_decode(dtype: torch.dtype, shift: int) -> tuple[float, float]:
    """A token's products with selected rows, and with those of the two largest of each eight, put together again."""
    _, (matrix, *_), _ = _inputs(dtype, shift)
    token, rows = matrix[:1], matrix[: len(matrix) // 8 * 8]
    dots = token.double() @ rows.double().T
    values, channels = dots.to(dtype).topk(len(rows) // 2)
    z = moc_decode.selected_up(token, rows, values, channels)
    two, of_eight = moc_decode.pairs_up(token, rows, rows)
    error = 0.0
    for got, which in ((z, channels), (two, of_eight)):
        chosen = dots.gather(1, which)
        error = max(error, difference(got, torch.nn.functional.silu(chosen) * chosen))
        truth = got.double() @ rows.double()[which[0]]
        error = max(error, difference(moc_decode.selected_down(got, which, rows), truth))
    best = dots.view(-1, 8).topk(2).values.sum(1)
    error = max(error, difference(dots.gather(1, of_eight).view(-1, 2).sum(1), best))
    return error, {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]


CHECKS = {
    "sum_of_squares": _norm, "scale_": _scale, "tensor_stats": _stats, "row_sketch": _sketch, "row_pack": _rows,
    "alignment": _alignment, "moc": _moc, "moc_decode": _moc_decode,
}  # fmt: skip


def tiny(report: Report) -> None:
    """The kernels themselves on little work, for compute-sanitizer; on the CPU under Triton's interpreter."""
    os.environ["LIGHTNING_EFF_KERNELS"] = "triton"
    if not SMALL:
        smoke(report)
        return
    with mended_bfloat16():
        smoke(report, {"fp32": torch.float32}, (1,))


def _bench(report: Report, sizes: list[str], dtypes: list[str], compiled: bool) -> None:
    rows.RESULTS = OUT  # what comes back from the machine; to be copied to benchmarks/results
    ours = [""] if not compiled else ["grad_norm", "tensor_stats", "alignment", "moc"]
    for row in kernels.time_all(sizes, dtypes, ours, DEVICE, compiled=compiled):
        name = " ".join(str(row[key]) for key in ("op", "size", "dtype", "provider"))
        figures = {key: row[key] for key in ("error", *kernels.TIMES)}
        report.row(name, row["gate"] == "ok", gate=row["gate"], **figures)


def bench(report: Report) -> None:
    """Our ops and torch's, times behind a check; then a tensor at an odd address, as a view of DDP's bucket may be."""
    for size in ["tiny"] if SMALL else ["124m", "1300m"]:
        for dtype in ("bf16", "fp32"):
            with report.guarded(f"{size} {dtype}"):
                _bench(report, [size], [dtype], compiled=False)
    numel = 2**16 if SMALL else 2**28
    for name, dtype in DTYPES.items():
        flat = torch.ones(numel + 8, device=DEVICE, dtype=dtype)
        for shift in (0, 1):
            with report.guarded(f"one tensor {name} shift {shift}"):
                view = flat[shift : shift + numel]
                times = kernels.milliseconds(lambda view=view: grad_norm.sum_of_squares([view]), DEVICE)
                right = abs(grad_norm.sum_of_squares([view]).item() / numel - 1) < 1e-6
                report.row(
                    f"one tensor {name} shift {shift}", right, ms=times.median, gb_s=view.nbytes / times.median / 1e6
                )


def compile_(report: Report) -> None:
    """What torch.compile makes of the references: late, since it takes long."""
    _bench(report, [SIZE], ["bf16"], compiled=True)


def zclip(report: Report) -> None:
    """A step of ZClip against ``clip_grad_norm_``: the norm, the time, the launches, and inside a CUDA graph."""
    for name, dtype in DTYPES.items():
        with report.guarded(f"ZClip {name}"):
            parameters = [
                nn.Parameter(torch.empty(shape, device=DEVICE, dtype=dtype)) for shape in SIZES[SIZE].shapes()
            ]
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter) * 1e-3
            grads = [parameter.grad for parameter in parameters]
            truth = torch.stack([g.double().square().sum() for g in grads if g is not None]).sum().sqrt()
            state = ZClipState(ZClipConfig(max_grad_norm=None))
            error = difference(zclip_grad_norm_(parameters, state), truth)
            ours = kernels.milliseconds(lambda p=parameters, s=state: zclip_grad_norm_(p, s), DEVICE)
            torchs = kernels.milliseconds(
                lambda p=parameters: torch.nn.utils.clip_grad_norm_(p, 1e9, foreach=True), DEVICE
            )
            report.row(f"ZClip {name}", error < 1e-4, error=error, ms=ours.median, host_ms=ours.host,
                       clip_grad_norm_ms=torchs.median, clip_grad_norm_host_ms=torchs.host,
                       times_faster=torchs.median / ours.median, aim=2.5)  # fmt: skip
            if DEVICE.type == "cuda":
                _on_gpu(report, name, parameters, state)


def _on_gpu(report: Report, name: str, parameters: list[nn.Parameter], state: ZClipState) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        zclip_grad_norm_(parameters, state)
        torch.cuda.synchronize()
    launches = [event.name[:40] for event in profiled.events() if str(event.device_type).endswith("CUDA")]
    report.row(f"launches {name}", len(launches) <= 8, launches=len(launches), names=launches)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        zclip_grad_norm_(parameters, state)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        norm = zclip_grad_norm_(parameters, state)
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.fill_(1e-3)
    graph.replay()
    torch.cuda.synchronize()
    truth = 1e-3 * sum(parameter.numel() for parameter in parameters) ** 0.5
    report.row(f"CUDA graph {name}", abs(float(norm) / truth - 1) < 1e-2, norm=float(norm), truth=truth)


def big(report: Report) -> None:
    """One tensor and one matrix of more than 2^31 elements: no kernel may count them in 32 bits."""
    n = 2**16 + 41 if SMALL else 2**31 + 40_961
    with report.guarded("a vector"):
        x = torch.ones(n, dtype=torch.bfloat16, device=DEVICE)
        x[-1] = 3
        error = abs(grad_norm.sum_of_squares([x]).item() / (n + 8) - 1)
        report.row("sum_of_squares", error < 1e-6, error=error, elements=n)
        grad_norm.scale_([x], torch.full((), 0.5, device=DEVICE))
        report.row("scale_", bool((x[:-1] == 0.5).all()) and x[-1].item() == 1.5)
        copy = torch.zeros_like(x)
        l1 = tensor_stats.tensor_stats([x], [copy]).l1.item()
        report.row("tensor_stats", abs(l1 / (0.5 * (n - 1) + 1.5) - 1) < 1e-6 and copy[-1].item() == 1.5)
        del x, copy
    with report.guarded("a matrix"):
        height, width = (48, 1368) if SMALL else (2**19 + 32, 4104)
        matrix = torch.zeros(height, width, dtype=torch.bfloat16, device=DEVICE)
        matrix[-1], matrix[-2] = 2.0, 1.0
        sketch = row_sketch.row_sketch([matrix], 4, 7)
        truth = matrix[-1].double() @ row_sketch.signs(width, 4, 7, 0, DEVICE).double()
        report.row(
            "row_sketch", difference(sketch[-1], truth) < 1e-4 and not sketch[:-2].any(), elements=matrix.numel()
        )
        selected = row_pack.select_rows(row_pack.row_scores(sketch), [height], [2])
        buffer = row_pack.pack_rows([matrix], selected, [2], 2)
        report.row("pack_rows", bool((buffer[:width] == 0.5).all()) and bool((buffer[width:] == 1).all()))
        row_pack.scatter_rows_([matrix], buffer, selected, [2])
        report.row("scatter_rows_", bool((matrix[-1] == 1).all()) and not matrix[:-2].any())
        channels = torch.arange(width - 8, width, device=DEVICE).expand(height, 8).contiguous()
        values = torch.full((height, 8), 20.0, dtype=matrix.dtype, device=DEVICE)  # where silu(v) is v
        u, s, z, placed = moc.activate(matrix, values, channels)
        right = bool((z[-1] == 20).all()) and bool((placed[-1, -8:] == 20).all()) and not placed[:-2].any()
        report.row("moc forward", right and not placed[:, :-8].any())
        del placed, z
        d_gate, d_up = moc.activate_backward(matrix, values, channels, u, s)
        right = bool((d_up[-1, -8:] == 20).all()) and bool(((d_gate[-1, -8:] - 1).abs() < 1e-2).all())
        report.row("moc backward", right and not d_up[:, :-8].any() and not d_up[:-2].any())


if __name__ == "__main__":
    sys.exit("run benchmarks/gpu.sh")
