"""How checkpoints are written."""

__all__: list[str] = []
