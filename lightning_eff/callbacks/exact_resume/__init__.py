"""A run that was killed is the run that was not."""

from lightning_eff.callbacks.exact_resume.callback import ExactResume

__all__ = ["ExactResume"]
