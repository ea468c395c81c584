"""Holds the thread that writes checkpoints."""

from __future__ import annotations

import os
import threading

from lightning_eff.plugins.async_checkpoint import io as module


class Gate:
    """Holds the writing thread back, or lets it fail, before it writes each file."""

    def __init__(self, monkeypatch):
        self.open = threading.Event()
        self.open.set()
        self.failures = []
        self.wrote = []
        write = module.write_staged

        def gated(staged, path):
            assert self.open.wait(20)
            if self.failures and (failure := self.failures.pop(0)) is not None:
                raise failure
            write(staged, path)
            self.wrote.append(os.path.basename(path))

        monkeypatch.setattr(module, "write_staged", gated)
