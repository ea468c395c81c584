"""Layers that keep less for the backward pass or in the cache, in place of a model's own; plain `nn.Module`s."""

from lightning_eff.layers.moc import MoCFeedForward, SelectedChannels, moc_feed_forward

__all__ = ["MoCFeedForward", "SelectedChannels", "moc_feed_forward"]
