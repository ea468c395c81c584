"""SpectralAlignmentMonitor: watches whether the inputs of layers collapse to one side of their weights."""

from lightning_eff.callbacks.spectral_alignment.callback import SpectralAlignmentMonitor

__all__ = ["SpectralAlignmentMonitor"]
