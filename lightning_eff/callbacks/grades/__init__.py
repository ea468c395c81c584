"""GradES: freezes the weight matrices whose gradients have settled."""

from lightning_eff.callbacks.grades.callback import GradES

__all__ = ["GradES"]
