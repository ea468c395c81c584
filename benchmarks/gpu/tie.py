"""Why one check of MoC failed in the first run on a GPU: a tie of two gates, of which its mask took both.

    python -m benchmarks.gpu.tie

The check (`MoC 2:8` in benchmarks/results/gpu_layers.csv, since mended) compared a layer with the dense formula in
float64, under a mask of all gates that are at least as large as the second of their eight. Its input was drawn on the
GPU; here it is drawn again by the same generator's formula, Philox4x32-10 and Box and Muller, on any machine, but for
the last digit of a sine or a logarithm.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from benchmarks.gpu.layers import swiglu, with_gradients
from benchmarks.gpu.report import difference
from benchmarks.rows import CONSOLE, read_rows
from lightning_eff.kernels.philox import philox
from lightning_eff.layers import MoCFeedForward

TOKENS, WIDTH, CHANNELS, GROUP = 256, 768, 2048, 8


def cuda_randn(count: int, offset: int) -> Tensor:
    """`torch.randn(count, device="cuda")` behind a seed of 0 and so many numbers, where each thread draws one."""
    threads = torch.arange(count)
    first, second, *_ = philox(0, torch.full_like(threads, offset // 4), 0, threads)
    step, turn = 2.0**-32, 2.0**-32 * 2 * math.pi
    length = (-2 * (first.float() * step + step / 2).log()).sqrt()
    return length * (second.float() * turn + turn / 2).sin()


def main() -> None:
    torch.manual_seed(0)
    # The checks before drew two layers, and eight numbers of each thread.
    layer = [MoCFeedForward(WIDTH, CHANNELS, pattern=pattern) for pattern in ("global", "global", "2:8")][-1]
    x = cuda_randn(TOKENS * WIDTH, offset=8).view(TOKENS, WIDTH)
    exact = copy.deepcopy(layer).double()
    with torch.no_grad():
        gates = x.double() @ exact.gate.weight.T
    groups = gates.unflatten(-1, (-1, GROUP))
    largest = groups.topk(3)
    gaps = largest.values[..., 1] - largest.values[..., 2]
    token, group = divmod(int(gaps.argmin()), CHANNELS // GROUP)
    next_gap = float(gaps.flatten().kthvalue(2).values)
    second, third = (GROUP * group + int(place) for place in largest.indices[token, group, 1:])
    CONSOLE.print(
        f"token {token}, channels {second} and {third}: gates of {float(gates[token, second]):.6f}, {gaps.min():.1g} "
        f"apart; float32 has steps of {torch.finfo(torch.float32).eps / 2:.1g} there. The next tie: {next_gap:.1g}"
    )
    both = (groups >= largest.values[..., 1:2]).flatten(-2)
    both[token, third] = True  # as the check's mask, where they are equal in float32
    one = both.clone()
    one[token, second] = False  # as the layer, which takes two of eight
    got, truth = (with_gradients(exact, swiglu(exact, x.double(), mask)) for mask in (one, both))
    error = max(map(difference, got, truth))
    seen = next(float(row["error"]) for row in read_rows("gpu_layers") if row["what"] == "MoC 2:8")
    CONSOLE.print(f"a layer that took the one, against a mask that took both: {error:.6f}; seen on the GPU: {seen:.6f}")


if __name__ == "__main__":
    main()
