"""What the layers ask of torch."""

from __future__ import annotations

import torch
from torch import nn

from lightning_eff.layers.autograd import in_backward, take_weights
from lightning_eff.layers.cr_net import CRFirst


def test_a_backward_pass_is_known_from_within():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: seen.append(in_backward()))
    seen.append(in_backward())
    y.sum().backward()
    seen.append(in_backward())
    assert seen == [False, True, False]


def test_the_parameters_are_the_very_ones():
    linear = nn.Linear(3, 2)
    new = CRFirst.__new__(CRFirst)
    take_weights(new, linear)
    assert new.weight is linear.weight
    assert new.bias is linear.bias
    assert torch.equal(new(torch.ones(1, 3)), linear(torch.ones(1, 3)))
