"""PyTorch Lightning callbacks and strategies that make training stable, cheap and hard to kill."""

from lightning_eff._registration import register
from lightning_eff.recipes import recipe, recipe_yaml

__version__ = "0.2.0"
__all__ = ["recipe", "recipe_yaml"]

register()
del register
