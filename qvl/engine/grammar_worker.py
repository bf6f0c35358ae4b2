"""A process that tries constraints out: `python -m qvl.engine.grammar_worker FOLDER`, started by a backend.

Compilers of grammars can be made to run for minutes, to eat memory and to overflow the stack by a text of a few hundred
characters. Here that costs nobody anything: a process that takes longer than CPU_SECONDS over one constraint is killed
by the kernel, and whoever asked starts another. One constraint as JSON per line of standard input; one verdict per line
of standard output, null or why not. Knows nothing of requests and engines.
"""

from __future__ import annotations

import os
import resource
import signal
import sys

import msgspec

from qvl.engine.grammar import Grammars
from qvl.engine.protocol import GRAMMARS_READY
from qvl.errors import InvalidRequest
from qvl.specs import load_spec
from qvl.types import Constraint

CPU_SECONDS = 2.0
MEMORY_BYTES = 4 * 1024**3  # of address space, most of it stacks that are never touched


def main() -> None:
    for sign in (signal.SIGINT, signal.SIGTERM):  # for the parent, whose end closes standard input
        signal.signal(sign, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    os.nice(5)
    grammars = Grammars(load_spec(sys.argv[1]))
    grammars.prepare()
    _say(GRAMMARS_READY)
    for line in sys.stdin.buffer:
        constraint = msgspec.json.decode(line, type=Constraint)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # its signal has no handler: it ends the process
        verdict = None
        try:
            grammars.check(constraint)
        except InvalidRequest as error:
            verdict = error.message
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(msgspec.json.encode(verdict) + b"\n")


def _say(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
