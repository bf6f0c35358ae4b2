"""`python -m qvl`: the `qvl` command where it is not installed, or for a certain Python."""

from __future__ import annotations

from qvl.cli.app import main

if __name__ == "__main__":
    main()
