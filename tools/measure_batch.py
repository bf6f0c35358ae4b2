"""What `qvl batch` reaches of what `qvl bench serve` reaches: `python tools/measure_batch.py`.

Starts a server with the bundled checkpoint (or asks `--base-url`) and lets the two take turns on it in short slices:
the same number of requests, the same number under way, bodies drawn by the same recipe; no two requests are alike, so
no cache helps either. What else the machine does falls on both alike, and the median over many pairs stands still where
single slices do not. Knows how both are called in a program. Does not know what they do inside.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qvl.batch import BatchOptions, JsonLines, run_batch
from qvl.batch.over_http import HttpAsker, connect
from qvl.bench.load import run
from qvl.bench.load.cases import Load
from qvl.bench.load.prompts import bodies
from qvl.bench.load.worker import Target
from qvl.bench.machine import describe

QVL = (sys.executable, "-m", "qvl")
OPTIONS = {"ignore_eos": True}
WARM_UP = 4  # requests of each slice of bench
NOT_IN_A_LINE = {"stream": None, "stream_options": None}


@contextmanager
def server(port: int, flags: list[str]) -> Iterator[int]:
    """The process id of a server that is ready."""
    command = [*QVL, "serve", "demo", "--port", str(port), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise SystemExit("the server did not start; what it said stands above")
        try:
            yield process.pid
        finally:
            process.terminate()


def cpu_seconds(pid: int) -> float:
    """Of a process and all below it, since they began."""
    stats = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        stats[int(path.parent.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    family = {pid}
    while more := {child for child, (parent, _) in stats.items() if parent in family} - family:
        family |= more
    return sum(ticks for member, (_, ticks) in stats.items() if member in family) / os.sysconf("SC_CLK_TCK")


def bench(load: Load, target: Target) -> float:
    """Requests a second, by a client process of its own."""
    figures = run.measure(target, load, processes=1, warm_up=WARM_UP, tell=lambda _: None)
    if figures.errors:
        raise SystemExit(f"requests of bench failed: {figures.first_error}")
    return figures.req_s


def batch(load: Load, target: Target, url: str, folder: Path) -> float:
    """Lines a second."""
    lines, answers = folder / f"{load.seed}.jsonl", folder / f"{load.seed}.answers"
    words = max(1, round(load.input_tokens / target.tokens_per_word))
    with lines.open("wb") as file:
        for body in bodies(load, range(load.requests), {**OPTIONS, **NOT_IN_A_LINE, "model": target.model}, words):
            file.write(body + b"\n")

    def asker() -> Coroutine[Any, Any, HttpAsker]:
        return connect(url, model=target.model, api_key=None, timeout=target.timeout)

    report = asyncio.run(run_batch(JsonLines(lines), answers, asker, BatchOptions(concurrency=load.concurrency)))
    if report.any_failed:
        raise SystemExit(f"lines of batch failed: {report.errors}")
    return float(report.as_dict()["lines_per_second"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", help="a server of yours; its CPU time is then not told")
    parser.add_argument("--port", type=int, default=8123, help="of the server that is started here")
    parser.add_argument("--rounds", type=int, default=20, help="pairs of slices")
    parser.add_argument("--requests", type=int, default=24, help="of a slice")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--input-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--side", type=int, default=224, help="of the pictures")
    parser.add_argument("flags", nargs="*", help="further flags of qvl serve, after --")
    return parser.parse_args()


def measure(asked: argparse.Namespace, url: str, pid: int | None) -> None:
    """Prints a line per pair, then the median and the quarters around it."""
    target = run.connect(url, model=None, api_key=None, timeout=600, options=OPTIONS)
    shape = (asked.requests, asked.concurrency, None, asked.input_tokens, asked.output_tokens, asked.pictures)
    size = (asked.side, asked.side)
    ratios: list[float] = []
    spent: dict[str, float] = {"bench": 0.0, "batch": 0.0}
    print(f"{describe('cpu')}; slices of {asked.requests} requests, {asked.concurrency} at once\n")
    print("| pair | bench, requests/s | batch, lines/s | batch / bench |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(asked.rounds):
            rates: dict[str, float] = {}
            for name in ("bench", "batch") if number % 2 else ("batch", "bench"):  # neither is always the first
                load = Load("batch", *shape, *size, seed=random.randrange(10**9))
                before = cpu_seconds(pid) if pid else 0.0
                rates[name] = bench(load, target) if name == "bench" else batch(load, target, url, Path(folder))
                # Requests that warm bench up are paid for by the server too.
                share = 1.0 if name == "batch" else load.requests / (load.requests + WARM_UP)
                spent[name] += (cpu_seconds(pid) - before) * share if pid else 0.0
            ratios.append(rates["batch"] / rates["bench"])
            print(f"| {number + 1} | {rates['bench']:.2f} | {rates['batch']:.2f} | {ratios[-1]:.3f} |", flush=True)
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    print(f"\nbatch / bench: median {middle:.3f}, half of the pairs from {low:.3f} to {high:.3f}")
    if pid:
        print(f"the server's CPU time: {spent['bench']:.1f} s for bench, {spent['batch']:.1f} s for batch")


def main() -> None:
    asked = arguments()
    if asked.base_url:
        measure(asked, asked.base_url, None)
        return
    with server(asked.port, asked.flags) as pid:
        time.sleep(0.5)
        measure(asked, f"http://127.0.0.1:{asked.port}", pid)


if __name__ == "__main__":
    main()
