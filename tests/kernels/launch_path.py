"""Every launcher through Triton's own launch path, with a driver that compiles for cuda:90 and launches nothing.

Run as a process of its own: `python -m tests.kernels.launch_path`. The reports compile kernels for argument types that
are written down; this takes those that the launchers really pass, and Triton's specialisation on their values.
"""

from __future__ import annotations

import collections
import itertools
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from lightning_eff.kernels import alignment, grad_norm, moc, moc_decode, row_pack, row_sketch, tensor_stats, zclip
from lightning_eff.kernels.dispatch import Choice


class CompilingDriver:
    """What Triton asks a driver for before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    compiled: collections.Counter[str] = collections.Counter()
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled[self.fn.__name__] += 1
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    triton.runtime.driver.set_active(CompilingDriver())
    triton.JITFunction.run = compile_only
    for op in (alignment, grad_norm, moc, moc_decode, row_pack, row_sketch, tensor_stats):
        op.choose = lambda *_: Choice("triton", "compiled only")  # type: ignore[attr-defined]

    selected = torch.tensor([0])
    for shape, dtype in (((1, 1), torch.float32), ((64, 64), torch.bfloat16), ((5, 40007), torch.float16)):
        matrices, errors = [torch.ones(shape, dtype=dtype)], [torch.zeros(shape)]
        grad_norm.sum_of_squares(matrices)
        grad_norm.scale_(matrices, torch.ones((), dtype=torch.float64))
        tensor_stats.tensor_stats(matrices)
        tensor_stats.tensor_stats(matrices, [matrices[0].clone()], update=torch.tensor(True))
        ranks = ((1, 0), (4, 1), (16, 2**64 - 1))
        for rank, seed in ranks if dtype == torch.float32 else ranks[1:2]:
            row_sketch.row_sketch(matrices, rank, seed, [seed % 2**32], errors)
        buffer = row_pack.pack_rows(matrices, selected, [1], 1, errors)
        row_pack.scatter_rows_(matrices, buffer, selected, [1], errors, torch.tensor(1))
        alignment.alignment_stats(matrices[0], torch.ones(shape[1]))
        gates, channels = matrices[0].topk(1)
        u, s, _, _ = moc.activate(matrices[0], gates, channels)
        moc.activate_backward(matrices[0], gates, channels.to(torch.int16), u, s)
        token, rows = matrices[0][:1], matrices[0].repeat(8, 1)
        z, channels = moc_decode.pairs_up(token, rows, rows)
        moc_decode.selected_up(token, rows, z, channels)
        moc_decode.selected_down(z, channels, rows)
    values, norm = torch.zeros(17, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    constants = zclip.Constants(*[1.0] * len(zclip.Constants._fields))
    for warmup_steps, percentile, to_mean in itertools.product((1, 25), (False, True), (False, True)):
        ring = torch.zeros(warmup_steps, dtype=torch.float64)
        modes = {"percentile": percentile, "to_mean": to_mean, "skip_spikes": to_mean}
        zclip.decide(norm, values, ring, constants, **modes)
    print(" ".join(sorted(compiled)))


if __name__ == "__main__":
    main()
