"""CR-Net: the projections of a layer are those of the layer below, scaled, plus a low-rank product.

    Y_1 = X_1 W_1                                 full rank, in the first layer
    Y_l = c_l Y_{l-1} + (X_l A_l) B_l             c = beta + 1e-6 sign(beta), one scalar for each layer and projection

for each of the projections (queries, keys, values, output, gate, up, down) by itself; Y is a projection's raw output.
The sum is kept in float32 at least, whatever the products are computed in: in bfloat16 each layer would round it again.

Parameters of layers 2 to L fall from in * out to r (in + out). With `recompute` a block keeps its input and the r
values X A of each projection; Y_{l-1} = (Y_l - X A B) / c is found again in the backward pass, and the rest is computed
from it. That division multiplies the error of Y_l by 1 / |c|, so Y is kept wherever a bound on the error says so.

Source: "CR-Net: Scaling Parameter-Efficient Training with Cross-Layer Low-Rank Structure", arXiv 2509.18993. The start
of beta, the initialisation of A and B and the treatment of biases are not known from the paper, and are ours.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_eff.arguments import check, check_count, check_flag, check_instance, check_number
from lightning_eff.layers.autograd import Marked, take_weights
from lightning_eff.layers.moc import WIDEST

if TYPE_CHECKING:
    from lightning_eff.layers.cr_stack import Link

LEAST = 1e-6
"""Of |c|."""


def exact(tensor: Tensor) -> Tensor:
    """In float32 or float64: the dtype in which Y is handed from layer to layer."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class CRFirst(Marked, nn.Linear):
    """A projection of the first block: an ``nn.Linear`` whose output the block above goes on from.

    Args:
        linear: the layer whose weights it takes.
    """

    link: Link | None = None

    def __init__(self, linear: nn.Linear) -> None:
        check_instance("linear", linear, nn.Linear, "an nn.Linear")
        take_weights(self, linear)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        y = super().forward(x)
        if self.link is not None:
            self.link.give(self, exact(y), None)
        return y


class CRLinear(Marked):
    """A projection of a later block: ``c * previous + b(a(x))``.

    In a :class:`CRStack` it is called as the ``nn.Linear`` that it takes the place of, and ``previous`` comes from the
    block below; by itself it takes it as an argument.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: of the product, from 1 to the shorter of the two.
        beta: start of the scalar, any number but 0.
        bias: whether a bias is added.
        std: standard deviation of the product's elements at the start; 0: ``b`` is zero, and the block begins with
            ``c * previous``.

    Raises:
        ValueError: an argument that is not allowed; in ``forward``, no ``previous`` outside of a stack.

    Example:
        >>> layer = CRLinear(8, 6, rank=2, beta=1.0, std=0.0)
        >>> previous = torch.randn(3, 6)
        >>> torch.testing.assert_close(layer(torch.randn(3, 8), previous), previous * (1 + 1e-6))
    """

    link: Link | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        beta: float = 0.5,
        bias: bool = False,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        check_count("in_features", in_features, most=WIDEST)
        check_count("out_features", out_features, most=WIDEST)
        check_count("rank", rank, most=min(in_features, out_features))
        check_number("beta", beta)
        check("beta", beta, beta != 0, "a number other than 0: of 0 there is no way back to the layer below")
        check_flag("bias", bias)
        check_number("std", std, least=0)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.a = nn.Linear(in_features, rank, bias=False)
        self.b = nn.Linear(rank, out_features, bias=bias)
        self.beta = nn.Parameter(torch.full((1,), float(beta)))  # not 0-d, which FSDP2 cannot shard
        self.std = std
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw ``a`` and ``b`` anew; a bias becomes zero."""
        nn.init.normal_(self.a.weight, std=1 / math.sqrt(self.in_features), generator=generator)
        spread = self.std * math.sqrt(self.in_features / self.rank)
        nn.init.normal_(self.b.weight, std=spread, generator=generator)
        if self.b.bias is not None:
            nn.init.zeros_(self.b.bias)

    @property
    def c(self) -> Tensor:
        """What the layer below is multiplied by, shape (1,)."""
        least: Tensor = torch.copysign(torch.full_like(self.beta, LEAST), self.beta.detach())
        return self.beta + least

    def forward(self, x: Tensor, previous: Tensor | None = None) -> Tensor:
        """(..., in) to (..., out); in the dtype of ``previous``, or, in a stack, of the product."""
        low: Tensor = self.a(x)
        product: Tensor = self.b(low)
        c = self.c.to(exact(product).dtype)
        if previous is not None:
            return (c * previous + product).to(previous.dtype)
        if self.link is None:
            raise ValueError("previous=None is not allowed: it must be the layer below's output, outside of a CRStack")
        y = c * self.link.take(self) + product
        self.link.give(self, y, low)
        return y.to(product.dtype)

    def inverse(self, y: Tensor, low: Tensor) -> Tensor:
        """The layer below's output from this one's and from ``a(x)``, without a gradient."""
        with torch.no_grad():
            below: Tensor = (y - self.b(low)) / self.c.to(y.dtype)
            return below

    def extra_repr(self) -> str:
        """What ``print`` shows beside the weights."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
