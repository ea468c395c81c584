"""Files with a line of JSON for each event, which a process that may die at any time writes and another one reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def append(path: Path, event: Any) -> None:
    """Write a line; it is there when this returns, whatever happens to the process then."""
    with path.open("a") as file:
        file.write(json.dumps(event) + "\n")


def read(*paths: Path) -> list[Any]:
    """The lines of some files, one after the other; a file that is not there has none, and half a line is none."""
    texts = [path.read_text() for path in paths if path.exists()]
    return [json.loads(line) for text in texts for line in text[: text.rfind("\n") + 1].splitlines()]
