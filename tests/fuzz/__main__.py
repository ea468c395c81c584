"""Count what the fuzz finds: `python -m tests.fuzz [NAME]`; with a name, each call of that target."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.fuzz.calls import is_of_every_step, outcomes
from tests.fuzz.targets import targets


def main(name: str = "") -> None:
    counts: Counter[str] = Counter()
    bad: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for target in targets():
            for argument, annotation in target.arguments.items():
                if is_of_every_step(annotation) or name not in ("", target.name):
                    continue
                counts["arguments"] += 1
                for value, outcome, said in outcomes(target, argument, Path(folder)):
                    counts[outcome] += 1
                    if name:
                        print(f"{outcome:9} {argument}={value!r} {said}")
                    if outcome in ("unnamed", "accepted") and argument not in bad.setdefault(target.name, []):
                        bad[target.name].append(argument)
    for target_name, arguments in bad.items():
        if arguments:
            print(f"    {target_name!r}: {' '.join(arguments)!r},")
    print(dict(counts), "calls", sum(counts.values()) - counts["arguments"])


if __name__ == "__main__":
    main(*sys.argv[1:])
