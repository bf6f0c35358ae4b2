"""Batch work: many requests from a file or a folder of pictures, answered once each and in order, whatever crashes.

    run_batch(JsonLines(Path("in.jsonl")), Path("out.jsonl"), open_asker)

`source` says where requests come from, `ledger` keeps some bytes per line, `journal` owns the output, `pace` decides
how many are under way, `ask` is the seam to whoever answers (`over_http`, `in_process`), `run` brings them together.
"""

from __future__ import annotations

from qvl.batch.ask import Asker, NoAnswer, Reply
from qvl.batch.lines import Defaults
from qvl.batch.report import Report
from qvl.batch.run import BatchOptions, OpenAsker, run_batch
from qvl.batch.source import JsonLines, Pictures, Source

__all__ = [
    "Asker",
    "BatchOptions",
    "Defaults",
    "JsonLines",
    "NoAnswer",
    "OpenAsker",
    "Pictures",
    "Reply",
    "Report",
    "Source",
    "run_batch",
]
