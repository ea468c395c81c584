"""What `replace_layers` puts in place of a model's layers, as plain settings that YAML and a checkpoint hold."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_eff.arguments import check, check_choice, check_count, check_flag, check_globs, check_number, check_rank
from lightning_eff.layers.moc import WIDEST, Pattern


@dataclass(frozen=True)
class MoC:
    """Feed-forward networks become :class:`MoCFeedForward`.

    A SwiGLU without biases keeps its weights. What it is is not taken from names: the network is run on random weights
    and compared with ``down(silu(gate(x)) * up(x))``.

    Args:
        k: channels that a token keeps; None: half of the model's width. None with "2:8".
        pattern: "global" or "2:8".
        recompute: keep less, and compute it again in the backward pass.
        new_weights: also replace networks without a gate, by a SwiGLU of as many weights (two thirds of the channels,
            a multiple of 8) that are new, of the same standard deviation. For a model that has not been trained.

    Raises:
        ValueError: an argument that is not allowed.
    """

    k: int | None = None
    pattern: Pattern = "global"
    recompute: bool = False
    new_weights: bool = False

    def __post_init__(self) -> None:
        check_count("k", self.k, most=WIDEST, optional=True)
        check_choice("pattern", self.pattern, Pattern)
        check("k", self.k, self.pattern == "global" or self.k is None, 'None with pattern="2:8"')
        check_flag("recompute", self.recompute)
        check_flag("new_weights", self.new_weights)


@dataclass(frozen=True)
class SkipV1:
    """Value projections take half of their heads from the first layer's; the attentions' own code goes on around them.

    A cache of the model's own holds all values, as before: :class:`SkipV1Attention` with its cache saves there.

    Args:
        mean: for a model that has been trained: a layer's own heads begin as the mean of each two consecutive heads;
            else as the first half of the heads.
        value: patterns of the value projections' names, in place of what is found in an attention: ``v_proj``,
            ``value`` and the like, or a projection that ends with all values behind the queries and keys.
        head_dim: channels of a value head; None: as the attention's attributes or its ``config`` say.

    Raises:
        ValueError: an argument that is not allowed.
    """

    mean: bool = False
    value: list[str] | None = None
    head_dim: int | None = None

    def __post_init__(self) -> None:
        check_flag("mean", self.mean)
        check_globs("value", self.value)
        check_count("head_dim", self.head_dim, most=WIDEST, optional=True)


@dataclass(frozen=True)
class CR:
    """Projections of attentions and feed-forward networks become :class:`CRLinear` from the second block on.

    Their weights are new: for a model that has not been trained.

    Args:
        rank: of the products: a number, or a fraction of the shorter side, as in the paper.
        beta: start of the scalars that the layer below is multiplied by, not 0.
        std: standard deviation of the products' elements at the start; None: that of the weights that they replace.
        recompute: keep block inputs and low-rank activations, see :class:`CRStack`.
        max_growth: of the rounding error of what is found again, see :class:`CRStack`.

    Raises:
        ValueError: an argument that is not allowed.
    """

    rank: int | float = 0.25
    beta: float = 0.5
    std: float | None = None
    recompute: bool = False
    max_growth: float = 32.0

    def __post_init__(self) -> None:
        check_rank("rank", self.rank)
        check_number("beta", self.beta)
        check("beta", self.beta, self.beta != 0, "a number other than 0")
        check_number("std", self.std, least=0, optional=True)
        check_flag("recompute", self.recompute)
        check_number("max_growth", self.max_growth, above=0)
