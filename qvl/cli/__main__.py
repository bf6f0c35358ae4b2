"""`python -m qvl.cli`: the `qvl` command where it is not installed."""

from __future__ import annotations

from qvl.cli.app import main

if __name__ == "__main__":
    main()
