"""How much work a backward pass has, by which parameters are trained."""

from __future__ import annotations

from torch import nn

from lightning_eff.arguments import check_instance

_NO_PRODUCT = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def backward_flops(model: nn.Module) -> int:
    """Multiplications and additions of a backward pass for one position, in the products with weight matrices.

    A matrix of n elements costs 2 n for its own gradient, where it is trained, and 2 n to hand the gradient on, where
    something before it is trained: before is by the order of definition. Products without a weight (attention scores)
    are not counted, and a convolution counts as if it had as many positions as a linear layer.

    Args:
        model: whose parameters are counted as they are now, trained or frozen.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 6, bias=False))
        >>> backward_flops(model)  # 2 * 20 for the first, 2 * 30 twice for the second
        160
        >>> _ = model[1].requires_grad_(False)
        >>> backward_flops(model)
        100
        >>> _ = model.requires_grad_(False)
        >>> backward_flops(model)
        0
    """
    check_instance("model", model, nn.Module, "an nn.Module")
    total = 0
    trained_before = False
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            if parameter.ndim >= 2 and not isinstance(module, _NO_PRODUCT):
                total += 2 * parameter.numel() * (int(parameter.requires_grad) + int(trained_before))
        trained_before |= any(p is not None and p.requires_grad for p in module._parameters.values())
    return total
