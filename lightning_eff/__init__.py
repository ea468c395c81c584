"""PyTorch Lightning callbacks and strategies that make training stable, cheap and hard to kill."""

from lightning_eff._registration import register

__version__ = "0.1.0"

register()
del register
