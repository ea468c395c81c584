"""RunHealth: who is slow, who hangs, who differs."""

from lightning_eff.callbacks.run_health.callback import RunHealth

__all__ = ["RunHealth"]
