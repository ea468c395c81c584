"""Why one check of MoC failed in the first run on a GPU: two gates that are equal, of which its mask took both.

    python -m benchmarks.gpu.tie

The check (`MoC 2:8` in benchmarks/results/gpu_layers.csv, since mended) compared a layer with the dense formula in
float64, under a mask of all gates that are at least as large as the second of their eight. Its input was drawn on the
GPU; here it is drawn again by the same generator's formula, Philox4x32-10 and Box and Muller, on any machine.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.report import difference
from benchmarks.rows import CONSOLE, read_rows
from lightning_eff.layers import MoCFeedForward

TOKENS, WIDTH, CHANNELS, GROUP = 256, 768, 2048, 8


def cuda_randn(count: int, offset: int) -> Tensor:
    """`torch.randn(count, device="cuda")` behind a seed of 0 and so many numbers, where each thread draws one."""
    low = np.uint64(0xFFFFFFFF)
    zeros = np.zeros(count, np.uint64)
    a, b, c, d = np.full(count, offset // 4, np.uint64), zeros, np.arange(count, dtype=np.uint64), zeros
    keys = 0, 0
    for _ in range(10):
        left, right = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        high = np.uint64(32)
        a, b, c, d = (
            (right >> high) ^ b ^ np.uint64(keys[0]),
            right & low,
            (left >> high) ^ d ^ np.uint64(keys[1]),
            left & low,
        )
        keys = (keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF
    step, turn = np.float32(2**-32), np.float32(2**-32 * 2 * np.pi)
    length = np.sqrt(np.float32(-2) * np.log(np.float32(a) * step + step / 2))
    return torch.from_numpy((length * np.sin(np.float32(b) * turn + turn / 2)).astype(np.float32))


def results(layer: MoCFeedForward, x: Tensor, mask: Tensor) -> list[Tensor]:
    """Output and gradients of the dense formula under a mask."""
    weights = [layer.gate.weight, layer.up.weight, layer.down.weight]
    y = (F.silu(x @ weights[0].T) * (x @ weights[1].T) * mask) @ weights[2].T
    return [y.detach(), *torch.autograd.grad(y.square().mean(), weights)]


def main() -> None:
    torch.manual_seed(0)
    # The checks before drew two layers, and eight numbers of each thread.
    layer = [MoCFeedForward(WIDTH, CHANNELS, pattern=pattern) for pattern in ("global", "global", "2:8")][-1]
    x = cuda_randn(TOKENS * WIDTH, offset=8).view(TOKENS, WIDTH)
    exact = copy.deepcopy(layer).double()
    with torch.no_grad():
        gates, rounded = x.double() @ exact.gate.weight.T, x @ layer.gate.weight.T
    groups = gates.unflatten(-1, (-1, GROUP))
    largest = groups.topk(3)
    gaps = largest.values[..., 1] - largest.values[..., 2]
    token, group = divmod(int(gaps.argmin()), CHANNELS // GROUP)
    second, third = (GROUP * group + int(place) for place in largest.indices[token, group, 1:])
    CONSOLE.print(
        f"token {token}, channels {second} and {third}: {gaps.min():.2g} apart in float64, in float32 "
        f"{float(rounded[token, second]):.9g} and {float(rounded[token, third]):.9g}"
    )
    both = (groups >= largest.values[..., 1:2]).flatten(-2)
    both[token, third] = True  # as the check's mask in float32
    one = both.clone()
    one[token, second] = False  # as the layer, which takes two of eight
    pairs = zip(results(exact, x.double(), one), results(exact, x.double(), both), strict=True)
    error = max(difference(got, truth) for got, truth in pairs)
    seen = next(float(row["error"]) for row in read_rows("gpu_layers") if row["what"] == "MoC 2:8")
    CONSOLE.print(f"a layer that took the one, against a mask that took both: {error:.6f}; seen on the GPU: {seen:.6f}")


if __name__ == "__main__":
    main()
