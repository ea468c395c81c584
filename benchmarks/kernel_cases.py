"""What benchmarks/kernels.py measures: each op's inputs, its providers with the bytes they move, and the truth.

A provider leaves its result in what it returns; the gate compares that with float64 arithmetic on the same inputs
before anything is timed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_eff.functional.zclip import ZClipConfig, ZClipState, zclip_update
from lightning_eff.kernels import alignment, grad_norm, moc, moc_decode, row_pack, row_sketch, tensor_stats

RANK = 4
RATIO = 0.2
WORLD = 8
BINS = 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Size:
    """A GPT's parameter list and the activations of one of its layers."""

    layers: int
    width: int
    vocabulary: int
    context: int
    tokens: int

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of all parameters."""
        w = self.width
        block: list[tuple[int, ...]] = [(3 * w, w), (3 * w,), (w, w), (w,), (4 * w, w), (4 * w,), (w, 4 * w), (w,)]
        norms: list[tuple[int, ...]] = [(w,)] * 4
        return [(self.vocabulary, w), (self.context, w), *(block + norms) * self.layers, (w,), (w,)]


SIZES = {
    "tiny": Size(layers=2, width=64, vocabulary=300, context=32, tokens=512),
    "124m": Size(layers=12, width=768, vocabulary=50257, context=1024, tokens=16384),
    "1300m": Size(layers=24, width=2048, vocabulary=50257, context=2048, tokens=16384),
}


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to do the op: the call, the bytes it reads and writes, and how exact it can be."""

    run: Callable[[], Any]
    bytes: int
    tolerance: float = 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on one input. ``reset`` restores what a call changes in place; ``truth`` is computed after a reset."""

    op: str
    providers: dict[str, Provider]
    truth: Callable[[], list[Tensor]]
    reset: Callable[[], None] = lambda: None


def values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Normal values; on the meta device, where bytes are counted, a shape alone."""
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def cases(size: Size, dtype: torch.dtype, device: torch.device, compiled: bool) -> Iterator[Case]:
    """All cases, one after the other, so that only one holds memory."""
    yield from gradient_cases(size, dtype, device, compiled)
    yield from stats_cases(size, dtype, device, compiled)
    yield from row_cases(size, dtype, device, compiled)
    yield from alignment_cases(size, dtype, device, compiled)
    yield from moc_cases(size, dtype, device, compiled)
    yield from moc_decode_cases(size, dtype, device)


def _with_compiled(
    providers: dict[str, Provider], compiled: bool, function: Callable[[], Any], size: int, tolerance: float = 1e-4
) -> None:
    if compiled:
        providers["torch.compile"] = Provider(torch.compile(function), size, tolerance)


def gradient_cases(size: Size, dtype: torch.dtype, device: torch.device, compiled: bool) -> Iterator[Case]:
    """The norm alone, an ordinary step (nothing to clip) and a clipped one."""
    grads = [values(shape, dtype, device, seed) for seed, shape in enumerate(size.shapes())]
    n = sum(grad.numel() * grad.element_size() for grad in grads)
    keep = [grad.clone() for grad in grads]

    def reset() -> None:
        torch._foreach_copy_(grads, keep)

    def squares() -> Tensor:
        return torch.stack([grad.double().square().sum() for grad in keep]).sum()

    def foreach_norm() -> Tensor:
        return (
            torch.stack([norm.double() for norm in torch._foreach_norm(grads, 2, dtype=torch.float32)]).square().sum()
        )

    def read() -> Tensor:
        return grad_norm.sum_of_squares(grads)

    providers = {"ours": Provider(read, n), "torch foreach": Provider(foreach_norm, n)}
    _with_compiled(providers, compiled, functools.partial(grad_norm.reference.sum_of_squares, grads), n)
    yield Case("grad_norm: read", providers, lambda: [squares()])

    parameters = [torch.nn.Parameter(torch.empty(0, device=device)) for _ in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.data = grad  # of the gradient's shape; nobody reads the values
        parameter.grad = grad
    state = ZClipState(ZClipConfig(max_grad_norm=None))

    def step(coefficient: Tensor) -> list[Tensor]:
        # The decision is taken and paid for, and then overruled: it depends on the steps before.
        norm = grad_norm.sum_of_squares(grads).sqrt()
        zclip_update(norm, state)
        grad_norm.scale_(grads, coefficient)
        return [norm, *grads]

    def plain_step(coefficient: Tensor) -> list[Tensor]:
        norm = grad_norm.reference.sum_of_squares(grads).sqrt()
        grad_norm.reference.scale_(grads, coefficient, zero_nonfinite=False)
        return [norm, *grads]

    @functools.cache
    def norm_at_first() -> float:
        return float(squares().sqrt())

    def library(factor: float) -> list[Tensor]:
        norm = torch.nn.utils.clip_grad_norm_(parameters, factor * norm_at_first(), foreach=True)
        return [norm.double(), *grads]

    def truth(factor: float) -> list[Tensor]:
        return [squares().sqrt(), *(grad.double() * factor for grad in keep)]

    exactness = 1e-4 if dtype == torch.float32 else 1e-2
    for name, factor, moved in (("ordinary step", 1.0, n), ("clipped step", 0.999, 3 * n)):
        coefficient = torch.full((), factor, dtype=torch.float64, device=device)
        providers = {
            "ours": Provider(functools.partial(step, coefficient), moved, exactness),
            "clip_grad_norm_": Provider(functools.partial(library, factor), 3 * n, exactness),
        }
        _with_compiled(providers, compiled, functools.partial(plain_step, coefficient), 3 * n, exactness)
        yield Case(f"grad_norm: {name}", providers, functools.partial(truth, factor), reset)


def stats_cases(size: Size, dtype: torch.dtype, device: torch.device, compiled: bool) -> Iterator[Case]:
    """GradES's three metrics, with the copy of the last gradient kept up to date."""
    tensors = [values(shape, dtype, device, seed) for seed, shape in enumerate(size.shapes())]
    old = [values(shape, dtype, device, seed + 1000) for seed, shape in enumerate(size.shapes())]
    copies = [copy.clone() for copy in old]
    n = sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def foreach() -> list[Tensor]:
        l1 = torch._foreach_norm(tensors, 1, dtype=torch.float32)
        l2 = torch._foreach_norm(tensors, 2, dtype=torch.float32)
        change = torch._foreach_norm(torch._foreach_sub(tensors, copies), 1, dtype=torch.float32)
        torch._foreach_copy_(copies, tensors)
        return [torch.stack(list(l1)), torch.stack(list(l2)).square(), torch.stack(list(change))]

    def truth() -> list[Tensor]:
        pairs = [(tensor.double(), copy.double()) for tensor, copy in zip(tensors, old, strict=True)]
        rows = [(a.abs().sum(), a.square().sum(), (a - b).abs().sum()) for a, b in pairs]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    providers = {
        "ours": Provider(lambda: list(tensor_stats.tensor_stats(tensors, copies)[:3]), 3 * n),
        "torch foreach": Provider(foreach, 8 * n, 2e-2),  # differences of 16-bit tensors are rounded to 16 bits
    }
    reference = functools.partial(tensor_stats.reference.tensor_stats, tensors, copies, None)
    _with_compiled(providers, compiled, lambda: list(reference()), 3 * n)
    yield Case("tensor_stats", providers, truth, lambda: torch._foreach_copy_(copies, old))


def row_cases(size: Size, dtype: torch.dtype, device: torch.device, compiled: bool) -> Iterator[Case]:
    """The compressed all-reduce's passes over the gradients, with a float32 error memory."""
    shapes = [shape for shape in size.shapes() if len(shape) == 2]
    keep = [values(shape, dtype, device, seed) for seed, shape in enumerate(shapes)]
    keep_errors = [values(shape, torch.float32, device, seed + 1000) for seed, shape in enumerate(shapes)]
    matrices, errors = [matrix.clone() for matrix in keep], [error.clone() for error in keep_errors]
    casts = 0 if dtype == torch.float32 else 1  # whether there are any
    elements = sum(matrix.numel() for matrix in matrices)
    n = elements * dtype.itemsize
    v = [row_sketch.signs(shape[1], RANK, 1, stream, device) for stream, shape in enumerate(shapes)]
    sketch_bytes = 4 * RANK * sum(shape[0] for shape in shapes)
    v_bytes = 4 * RANK * sum(shape[1] for shape in shapes)

    def sums() -> list[Tensor]:
        return [matrix.double() + error.double() for matrix, error in zip(keep, keep_errors, strict=True)]

    def plain_sketch() -> Tensor:
        added = [error + matrix for matrix, error in zip(matrices, errors, strict=True)]
        return torch.cat([matrix @ signs for matrix, signs in zip(added, v, strict=True)])

    providers = {
        "ours": Provider(
            lambda: [row_sketch.row_sketch(matrices, RANK, 1, errors=errors)], n + 4 * elements + sketch_bytes
        ),
        "torch add and matmul": Provider(lambda: [plain_sketch()], n + 12 * elements + v_bytes + 3 * sketch_bytes),
    }
    _with_compiled(providers, compiled, lambda: [plain_sketch()], n + 4 * elements + v_bytes + sketch_bytes)
    yield Case(
        "row_sketch: with error",
        providers,
        lambda: [torch.cat([total @ signs.double() for total, signs in zip(sums(), v, strict=True)])],
    )

    def library_sketch() -> Tensor:
        # cuBLAS in the gradients' own dtype, which rounds the sketch to it.
        return torch.cat([(matrix @ signs.to(dtype)).float() for matrix, signs in zip(matrices, v, strict=True)])

    exactness = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    providers = {
        "ours": Provider(lambda: [row_sketch.row_sketch(matrices, RANK, 1)], n + sketch_bytes),
        "torch matmul": Provider(lambda: [library_sketch()], n + v_bytes + 3 * sketch_bytes, exactness),
    }
    _with_compiled(providers, compiled, lambda: [library_sketch()], n + v_bytes + sketch_bytes, exactness)
    yield Case(
        "row_sketch: no error",
        providers,
        lambda: [torch.cat([matrix.double() @ signs.double() for matrix, signs in zip(keep, v, strict=True)])],
    )

    counts = [max(1, int(rows * RATIO)) for rows, _ in shapes]
    scores = row_pack.row_scores(row_sketch.row_sketch(matrices, RANK, 1, errors=errors))
    selected = row_pack.select_rows(scores, [rows for rows, _ in shapes], counts)
    k = sum(count * shape[1] for count, shape in zip(counts, shapes, strict=True))
    pack = (matrices, selected, counts, WORLD, errors)
    true_pack = (keep, selected, counts, WORLD, keep_errors)
    least = k * (2 * dtype.itemsize + 4)
    providers = {
        "ours": Provider(lambda: [row_pack.pack_rows(*pack, dtype=dtype)], least, 1e-2),
        # index both, cast up, add, divide, cast down, concatenate
        "torch indexing": Provider(
            lambda: [row_pack.reference.pack_rows(*pack, dtype)], k * (4 * dtype.itemsize + 28 + casts * 12), 1e-2
        ),
    }
    _with_compiled(providers, compiled, lambda: [row_pack.reference.pack_rows(*pack, dtype)], least, 1e-2)
    yield Case(
        "row_pack: pack",
        providers,
        lambda: [row_pack.reference.pack_rows(*true_pack, torch.float64)],
    )
    buffer = row_pack.pack_rows(*pack, dtype=dtype)

    def reset() -> None:
        torch._foreach_copy_(matrices, keep)
        torch._foreach_copy_(errors, keep_errors)

    def scattered(function: Callable[..., None]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            function(matrices, buffer, selected, counts, errors, None)
            return [*matrices, *errors]

        return run

    def truth() -> list[Tensor]:
        wide = [matrix.double() for matrix in keep]
        kept = [error.double() for error in keep_errors]
        row_pack.reference.scatter_rows_(wide, buffer.double(), selected, counts, kept, None)
        return [*wide, *kept]

    rest = elements - k
    least = k * dtype.itemsize + rest * (dtype.itemsize + 4) + n + 4 * elements
    providers = {
        "ours": Provider(scattered(row_pack.scatter_rows_), least),
        # cast up, add, zero rows, copy to E, zero G, write the rows
        "torch indexing": Provider(
            scattered(row_pack.reference.scatter_rows_),
            2 * n + (16 + casts * 8) * elements + k * (2 * dtype.itemsize + 4),
        ),
    }
    _with_compiled(providers, compiled, scattered(row_pack.reference.scatter_rows_), least)
    yield Case("row_pack: scatter", providers, truth, reset)


def alignment_cases(size: Size, dtype: torch.dtype, device: torch.device, compiled: bool) -> Iterator[Case]:
    """The monitor's counts for one layer's input."""
    x = values((size.tokens, size.width), dtype, device, 0)
    v = torch.nn.functional.normalize(values((size.width,), torch.float32, device, 1), dim=0)
    n = x.numel() * x.element_size()

    def torch_ops() -> list[Tensor]:
        dots = (x @ v.to(dtype)).float()
        cosines = dots / (torch.linalg.vector_norm(x, dim=1, dtype=torch.float32) + 1e-6)
        return [torch.histc(cosines, BINS, -1, 1), (dots > 0).sum(), (dots < 0).sum()]

    def truth() -> list[Tensor]:
        dots = x.double() @ v.double()
        cosines = dots / (x.double().norm(dim=1) + 1e-6)
        return [torch.histc(cosines, BINS, -1, 1), (dots > 0).sum(), (dots < 0).sum()]

    def counted(counts: Tensor) -> list[Tensor]:
        return [counts[:BINS], counts[BINS], counts[BINS + 1]]

    # Tokens at an edge of a bin, or at 0 in 16 bits, may fall on either side: a hundredth of them at most.
    slack = 1e-2
    providers = {
        "ours": Provider(lambda: list(alignment.alignment_stats(x, v, bins=BINS)[:3]), n, slack),
        "torch matmul and norm": Provider(torch_ops, 2 * n, 3 * slack),  # v is rounded to 16 bits as well
    }
    reference = functools.partial(alignment.reference.alignment_counts, x, v, BINS, 1e-6)
    _with_compiled(providers, compiled, lambda: counted(reference()), n, slack)
    yield Case("alignment", providers, truth)


def moc_cases(size: Size, dtype: torch.dtype, device: torch.device, compiled: bool) -> Iterator[Case]:
    """Half of the width's channels of a SwiGLU network, between its products; both ways write d_ff-wide zeros."""
    k, d_ff, w = size.width // 2, size.width * 8 // 3, dtype.itemsize
    up, grad = (values((size.tokens, d_ff), dtype, device, seed) for seed in (0, 1))
    gates, channels = values((size.tokens, d_ff), dtype, device, 2).topk(k, sorted=False)
    narrow = channels.to(torch.int16)
    u, s, _, _ = moc.reference.activate(up, gates, channels)
    zeros = up.numel() * w
    exactness = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]

    def true_forward() -> list[Tensor]:
        return list(moc.reference.activate(up.double(), gates.double(), channels))

    def true_backward() -> list[Tensor]:
        wide = [tensor.double() for tensor in (grad, gates, u, s)]
        return list(moc.reference.activate_backward(wide[0], wide[1], channels, wide[2], wide[3]))

    chosen = gates.numel()
    for name, call, given, truth, ours, plain in (
        ("forward", "activate", (up, gates, channels), true_forward, 6 * w + 8, 9 * w + 16),
        ("backward", "activate_backward", (grad, gates, narrow, u, s), true_backward, 6 * w + 2, 12 * w + 34),
    ):
        kernel, torchs = (functools.partial(getattr(module, call), *given) for module in (moc, moc.reference))
        buffers, copied = (zeros, 0) if name == "forward" else (2 * zeros, zeros)
        providers = {
            "ours": Provider(lambda f=kernel: list(f()), buffers + chosen * ours, exactness),
            # gather, silu, product, scatter; backward with an index made of 8 bytes, and zeros that are copied once
            "torch": Provider(lambda f=torchs: list(f()), buffers + copied + chosen * plain, exactness),
        }
        _with_compiled(providers, compiled, lambda f=torchs: list(f()), buffers + chosen * ours, exactness)
        yield Case(f"moc: {name}", providers, truth)


def moc_decode_cases(size: Size, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """One token through half of the width's channels, or two of each eight; torch copies the selected up rows."""
    k, d_ff, w = size.width // 2, size.width // 3 * 8, dtype.itemsize
    x, up = (values((n, size.width), dtype, device, seed) for seed, n in enumerate((1, d_ff)))
    gates, channels = values((1, d_ff), dtype, device, 2).topk(k, sorted=False)
    # Eight gates that are 1 to 8 in any order: no rounding makes two of them alike.
    ranks = values((d_ff // 8, 8), torch.float32, device, 3).argsort(-1).flatten() + 1
    gate = (ranks[:, None] * x.float() / x.float().square().sum()).to(dtype)
    rows, every = k * size.width * w, d_ff * size.width * w
    exactness = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    given: dict[str, tuple[str, tuple[Tensor, ...], int, int]] = {
        "up": ("selected_up", (x, up, gates, channels), rows, 3 * rows),
        "down": ("selected_down", (gates, channels, up), rows, rows),
        "2:8 up": ("pairs_up", (x, gate, up), every + every // 4, every + 3 * every // 4),
    }
    for name, (call, tensors, ours, plain) in given.items():

        def run(module: Any, call: str = call, tensors: tuple[Tensor, ...] = tensors) -> list[Tensor]:
            result = getattr(module, call)(*tensors)
            return list(result) if isinstance(result, tuple) else [result]

        def truth(call: str = call, tensors: tuple[Tensor, ...] = tensors) -> list[Tensor]:
            wide = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors)
            return run(moc_decode.reference, call, wide)

        providers = {
            "ours": Provider(functools.partial(run, moc_decode), ours, exactness),
            "torch": Provider(functools.partial(run, moc_decode.reference), plain, exactness),
        }
        yield Case(f"moc_decode: {name}", providers, truth)
