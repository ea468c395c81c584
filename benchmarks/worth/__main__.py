"""Run one part, `python -m benchmarks.worth <part>`; each part's module says what it is about."""

from __future__ import annotations

import argparse
import logging
import warnings

import torch

from benchmarks.worth import averaging, compression, grades, misa, zclip


def main() -> None:
    """The part that the command names."""
    parts = {
        "averaging": averaging.compare,
        "averaging-decay": averaging.compare_decay,
        "compression": lambda: compression.compare(given.names),
        "grades": lambda: grades.compare(given.names),
        "misa": misa.compare,
        "zclip": lambda: zclip.compare(given.names),
        "zclip-rates": zclip.rates,
        "zclip-report": zclip.report,
        "zclip-relearn": zclip.relearn,
    }
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worth", description=(__doc__ or "").split(";")[0])
    parser.add_argument("part", choices=parts)
    parser.add_argument("names", nargs="*", metavar="name", help="what alone is run")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    parts[given.part]()


if __name__ == "__main__":
    main()
