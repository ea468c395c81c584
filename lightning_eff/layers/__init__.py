"""Layers that keep less for the backward pass or in the cache, in place of a model's own; plain `nn.Module`s."""

from lightning_eff.layers.moc import MoCFeedForward, SelectedChannels, moc_feed_forward
from lightning_eff.layers.skipv1 import SkipV1Attention, SkipV1Cache

__all__ = ["MoCFeedForward", "SelectedChannels", "SkipV1Attention", "SkipV1Cache", "moc_feed_forward"]
