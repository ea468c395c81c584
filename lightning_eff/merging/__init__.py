"""Merging checkpoints after the run: ``lightning-eff merge``, and the same from Python.

::

    sources = [open_source(path) for path in paths]
    write_merged(Merger(sources), uniform_weights(range(len(sources))), "merged.ckpt")
"""

from lightning_eff.merging.merge import Merger, write_merged
from lightning_eff.merging.sources import Source, open_source

__all__ = ["Merger", "Source", "open_source", "write_merged"]
