"""What a user would log, as torchmetrics."""

from lightning_eff.metrics.sign_diversity import SignDiversity

__all__ = ["SignDiversity"]
