"""The `qvl` command, also as `python -m qvl` where it is not installed, or for a certain Python.

Knows how the command is loaded. What it does is `qvl.cli.app`'s.
"""

from __future__ import annotations

import signal


def main() -> None:
    """Entry point of the console script.

    Ctrl-C while the command loads ends it without a word: in the middle of an import Python would tell it at length, or
    lose it. A process that is not to hear of Ctrl-C, in the background of a script, does not.
    """
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heard:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from qvl.cli import app

    if heard:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    app.main()


if __name__ == "__main__":
    main()
