"""Parts with a process group: every compressor on two gloo ranks that share the card, NCCL with one, and FSDP2."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu.faults import plant
from benchmarks.gpu.report import DEVICE, DTYPES, OUT, SMALL, Report, difference
from benchmarks.gpu.training import Losses, train
from lightning_eff.compression import BF16, FP16, ArcTopK, Compressor, Int8, PowerSGD, RandK, TopK, comm_hook
from lightning_eff.functional.zclip import ZClipConfig, ZClipState, zclip_grad_norm_

SMALL_ONES = {"min_numel": 64}
COMPRESSORS: dict[str, Callable[[], Compressor]] = {
    "ArcTopK": lambda: ArcTopK(ratio=0.3, **SMALL_ONES),
    "ArcTopK ef14": lambda: ArcTopK(ratio=0.3, error_feedback="ef14", **SMALL_ONES),
    "ArcTopK ef21m": lambda: ArcTopK(ratio=0.3, error_feedback="ef21m", **SMALL_ONES),
    "RandK": lambda: RandK(ratio=0.2, **SMALL_ONES),
    "TopK": lambda: TopK(ratio=0.1, **SMALL_ONES),
    "PowerSGD": lambda: PowerSGD(rank=4, **SMALL_ONES),
    "Int8": Int8,
    "BF16": BF16,
    "FP16": FP16,
}
NEAR_DENSE = {"Int8": 0.05, "BF16": 0.01, "FP16": 0.01}
"""How far from the mean of the ranks those may be that send something of every element, relative to the largest."""


def _reduced(
    compressor: Compressor | None, device: torch.device, dtype: torch.dtype, rank: int
) -> tuple[Tensor, float, float]:
    """The third step's averaged gradients, its seconds, and the bytes sent as a fraction of the dense ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(129, 256), nn.Tanh(), nn.Linear(256, 96), nn.Tanh(), nn.Linear(96, 8))
    model = model.to(device, dtype)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.1)
    step, reduction = 0, None
    if compressor is not None:
        reduction = comm_hook.CompressedReduction(compressor, dict(model.named_parameters()), lambda: step)
        ddp.register_comm_hook(reduction, comm_hook.hook)
    seconds = 0.0
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + rank)
        inputs = torch.randn(64, 129, generator=generator).to(device, dtype)
        model.zero_grad()
        start = time.perf_counter()
        ddp(inputs).float().square().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    flat = torch.cat([p.grad.detach().float().cpu().flatten() for p in model.parameters() if p.grad is not None])
    sent = reduction.traffic.last_bytes / max(1.0, reduction.traffic.last_dense_bytes) if reduction else 1.0
    return flat, seconds, sent


def _compress(rank: int, world: int, report: Report) -> None:
    """Rows of rank 0, of what all ranks have."""
    for dtype_name, dtype in DTYPES.items():
        dense, _, _ = _reduced(None, DEVICE, dtype, rank)
        for name, build in COMPRESSORS.items():
            if world == 1:  # nothing is sent, and so nothing pays
                comm_hook.pays = lambda compressor, shape, *_: len(shape) >= 2 or compressor.whole_buckets  # type: ignore[assignment]
            result, seconds, sent = _reduced(build(), DEVICE, dtype, rank)
            on_cpu = result if world == 1 else _reduced(build(), torch.device("cpu"), dtype, rank)[0]
            everyone: list[Any] = [None] * world
            dist.all_gather_object(everyone, result, group=dist.new_group(backend="gloo"))
            equal = all(torch.equal(each, result) for each in everyone)
            from_dense, from_cpu = difference(result, dense), difference(result, on_cpu)
            # On another device sums are rounded otherwise, and a row or an element may be selected in place of another.
            near = from_dense <= NEAR_DENSE.get(name, 5.0) and (name not in NEAR_DENSE or from_cpu <= NEAR_DENSE[name])
            if rank == 0:
                right = equal and near and bool(result.isfinite().all())
                report.row(f"{name} {dtype_name}, {world} ranks", right, ranks_equal=equal, from_dense=from_dense,
                           from_cpu=from_cpu, ms=1e3 * seconds, sent=sent)  # fmt: skip


def _shard(rank: int, world: int, report: Report) -> None:
    """ZClip's norm of sharded gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 64)).to(DEVICE)
    mesh = init_device_mesh(DEVICE.type, (world,))
    for module in (model[0], model[2]):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    inputs = torch.randn(16, 128, generator=torch.Generator().manual_seed(rank)).to(DEVICE)
    model(inputs).square().sum().backward()
    whole = [p.grad.full_tensor().double() for p in model.parameters() if p.grad is not None]  # type: ignore[attr-defined]
    truth = torch.stack([grad.square().sum() for grad in whole]).sum().sqrt()
    norm = zclip_grad_norm_(model.parameters(), ZClipState(ZClipConfig()))
    error = difference(norm, truth)
    if rank == 0:
        report.row(f"ZClip under FSDP2, {world} ranks", error < 1e-5, error=error, norm=float(norm))


def _rank(rank: int, world: int, backend: str, store: str, part: str, work: Callable[..., None], results: Any) -> None:
    if fault := os.environ.get("GPU_FAULT"):
        plant(fault)
    report = Report(part)
    if DEVICE.type == "cuda":
        torch.cuda.set_device(0)
        torch.cuda.init()  # or a device mesh would choose the card by the rank
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        work(rank, world, report)
    except Exception as error:
        report.row(
            f"rank {rank} of {world}", False, failed=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        )
        with (OUT / "errors.txt").open("a") as file:
            file.write(f"\n### {part}, rank {rank}\n{traceback.format_exc()[-5000:]}\n")
        os._exit(3)  # the other rank may wait in a collective: the parent ends it
    results.put(report.wrong)
    dist.destroy_process_group()


def _spawn(report: Report, world: int, backend: str, work: Callable[..., None]) -> None:
    os.environ["LOCAL_RANK"] = "0"
    with tempfile.TemporaryDirectory() as folder, report.guarded(f"{world} ranks of {backend}"):
        results = mp.get_context("spawn").SimpleQueue()
        arguments = (world, backend, f"{folder}/store", report.part, work, results)
        mp.start_processes(_rank, arguments, nprocs=world, start_method="spawn")  # raises if a rank fails
        report.wrong += sum(results.get() for _ in range(world))


def gloo(report: Report) -> None:
    """Two ranks, one card: bits are equal on both, and what is near on the CPU is near here."""
    _spawn(report, 2, "gloo", _compress)


def nccl(report: Report) -> None:
    """NCCL takes one rank a card: every collective is launched, and what is averaged over one is itself."""
    _spawn(report, 1, "gloo" if SMALL else "nccl", _compress)


def _by_name(report: Report) -> None:
    """The suite's strategy: each step's loss is DDP's, to which Lightning deals the same batches."""
    losses = {strategy: Losses() for strategy in ("ddp", "fsdp2")}
    for strategy, seen in losses.items():
        train([seen], 4, strategy=strategy, precision="32-true")
        if dist.is_initialized():
            dist.destroy_process_group()
    replicated, sharded = (torch.tensor(seen.values) for seen in losses.values())
    error = difference(sharded, replicated) if len(replicated) == len(sharded) == 4 else float("inf")
    report.row("strategy fsdp2", error < 1e-4, error=error, loss=float(sharded[-1]))


def fsdp2(report: Report) -> None:
    """FSDP2 on one rank of NCCL and on two of gloo, and by the strategy's name."""
    with report.guarded("strategy fsdp2"):
        _by_name(report)
    _spawn(report, 1, "gloo" if SMALL else "nccl", _shard)
    _spawn(report, 2, "gloo", _shard)
