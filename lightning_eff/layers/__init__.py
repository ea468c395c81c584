"""Layers that keep less for the backward pass or in the cache, in place of a model's own; plain `nn.Module`s."""

from lightning_eff.layers.cr_net import CRFirst, CRLinear
from lightning_eff.layers.cr_stack import CRStack
from lightning_eff.layers.moc import MoCFeedForward, SelectedChannels, moc_feed_forward
from lightning_eff.layers.replace import describe_plan, replace_layers, uptrain
from lightning_eff.layers.skipv1 import SkipV1Attention, SkipV1Cache
from lightning_eff.layers.specs import CR, MoC, SkipV1

__all__ = [
    "CR",
    "CRFirst",
    "CRLinear",
    "CRStack",
    "MoC",
    "MoCFeedForward",
    "SelectedChannels",
    "SkipV1",
    "SkipV1Attention",
    "SkipV1Cache",
    "describe_plan",
    "moc_feed_forward",
    "replace_layers",
    "uptrain",
]
