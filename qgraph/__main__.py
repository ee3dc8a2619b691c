"""`python -m qgraph` is the command `qgraph`."""

from __future__ import annotations

import sys

from qgraph.cli import main

if __name__ == "__main__":
    sys.exit(main())
