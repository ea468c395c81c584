"""`python -m lightning_eff` is `lightning-eff`."""

import sys

from lightning_eff.cli import main

if __name__ == "__main__":
    sys.exit(main())
