"""PyTorch Lightning callbacks and strategies that make training stable, cheap and hard to kill."""

__version__ = "0.1.0"
