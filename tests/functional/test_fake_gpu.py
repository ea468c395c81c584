"""Methods on CUDA tensors without data, which need no GPU: a tensor of the CPU, or a value that is read, raises."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_eff.compression import BF16, ArcTopK, Compressor, PowerSGD, RandK, TopK
from lightning_eff.compression.exchange import Slot, Step, exchange_bucket
from lightning_eff.compression.interface import AllGather, AllReduce, Collective
from lightning_eff.functional.ema import Shadows
from lightning_eff.functional.zclip import ZClipConfig, ZClipState, zclip_grad_norm_
from lightning_eff.kernels.row_pack import layout
from lightning_eff.kernels.row_sketch import reference
from lightning_eff.training.snapshots import SnapshotWindow

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="torch is not built for CUDA, a GPU is not needed")

# Seen with 2.8 ("CUDA driver version is insufficient"); with 2.11 and 2.14 no driver is asked.
touches_the_driver = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.11") and not torch.cuda.is_available(),
    reason="before torch 2.11 indexing and copying a fake CUDA tensor ask the CUDA driver, which is missing here",
)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LIGHTNING_EFF_KERNELS", "reference")  # a fake tensor has no address for a kernel
    # Streams and pinned memory are of a real device.
    monkeypatch.setattr(layout, "stream_of", lambda device: 0)
    monkeypatch.setattr(layout, "to_device", lambda values, dtype, device: torch.as_tensor(values).to(device, dtype))
    with FakeTensorMode():
        yield
    for kept in (reference._counters, layout._layout):
        kept.cache_clear()  # which is fake now


def test_a_tensor_of_the_cpu_is_noticed():
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(3, device="cuda") + torch.zeros(3)


@touches_the_driver
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zclip(dtype):
    parameters = [torch.nn.Parameter(torch.zeros(shape, device="cuda", dtype=dtype)) for shape in ((3, 2), (5,))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    for clip_option in ("adaptive_scaling", "mean", "percentile"):
        state = ZClipState(ZClipConfig(clip_option=clip_option))
        assert all(zclip_grad_norm_(parameters, state).device.type == "cuda" for _ in range(3))


@pytest.mark.parametrize("device", [None, "cpu"])
def test_ema(device):
    weights = [torch.zeros(4, 3, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    weights.append(torch.zeros((), device="cuda"))
    shadows = Shadows(weights, device)
    shadows.update(shadows.sort(weights), 0.9)
    assert {shadow.device.type for shadow in shadows.tensors} == {device or "cuda"}


@touches_the_driver
def test_snapshots():
    window = SnapshotWindow(2, "model")
    for step in range(3):
        window.take(step, {"weight": torch.zeros(3, device="cuda")})
    assert window.read()[0]["weight"].device.type == "cuda"


@touches_the_driver
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "compressor",  # Int8 draws from a generator of the device, which is never fake
    [
        *(ArcTopK(ratio=0.5, error_feedback=scheme) for scheme in ("none", "ef14", "ef21", "ef21m")),
        *(RandK(ratio=0.5, error_feedback=scheme) for scheme in ("none", "ef14")),
        *(TopK(ratio=0.2, error_feedback=scheme) for scheme in ("none", "ef14", "ef21m")),
        *(PowerSGD(rank=2, error_feedback=scheme) for scheme in ("none", "ef14")),
        BF16(),
    ],
    ids=repr,
)
def test_an_exchange(compressor, dtype):
    buffer = torch.zeros(200, device="cuda", dtype=dtype)
    compressed, dense = [Slot("weight", 0, 12, 15)], [Slot("bias", 180, 1, 20)]
    if compressor.whole_buckets:
        compressed, dense = [Slot("weight", 0, 1, 200)], []
    memory = {}
    for number in range(3):
        step = Step(number, 0, 2, scale=torch.ones((), device="cuda"), measure=number == 1)
        _exchange(compressor, buffer, compressed, dense, memory, step)
    assert {tensor.device.type for entry in memory.values() for tensor in entry.values()} <= {"cuda"}


def _exchange(compressor: Compressor, buffer, compressed, dense, memory, step) -> None:
    exchange = exchange_bucket(compressor, buffer, compressed, dense, memory, step)
    stage = next(exchange)
    while True:
        step.accepted = torch.ones((), device="cuda", dtype=torch.bool)
        try:
            stage = exchange.send([_sent(request) for request in stage.requests])
        except StopIteration:
            return


def _sent(request: Collective) -> torch.Tensor:
    assert request.tensor.device.type == "cuda"
    if isinstance(request, AllReduce):
        return request.tensor
    return request.tensor.flatten().repeat(2, 1) if isinstance(request, AllGather) else torch.empty_like(request.tensor)
