"""For a Trainer of ``pytorch_lightning``: what cannot be one class for both names of Lightning.

Callbacks can, and come from ``lightning_eff.callbacks``; so do strategy strings, once ``lightning_eff`` is imported.
"""
