"""What `qvl batch` reaches of what `qvl bench serve` reaches: `python tools/measure_batch.py --rounds 5`.

Starts a server with the bundled checkpoint (or asks `--base-url`) and lets the two commands take turns on it, each as
its own processes, with the same number of requests, the same number under way and bodies drawn by the same recipe; no
two requests are alike, so no cache helps either. Knows the two commands' JSON. Does not know what they do inside.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qvl.bench.load import run
from qvl.bench.load.cases import Load
from qvl.bench.load.prompts import bodies
from qvl.bench.load.worker import Target
from qvl.bench.machine import describe

QVL = (sys.executable, "-m", "qvl")
OPTIONS = {"ignore_eos": True}
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


def last_line(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def bench(url: str, load: Load) -> float:
    """Requests a second."""
    command = [*QVL, "bench", "serve", "--base-url", url, "--seed", str(load.seed), "--requests", str(load.requests)]
    command += ["--concurrency", str(load.concurrency), "--input-tokens", str(load.input_tokens), "--processes", "1"]
    command += ["--output-tokens", str(load.output_tokens), "--num-pictures", str(load.pictures)]
    return float(
        last_line([*command, "--picture", f"{load.width}x{load.height}", "--warm-up", "4"])["runs"][0]["req_s"]
    )


def batch(url: str, load: Load, target: Target, folder: Path) -> float:
    """Lines a second."""
    lines, answers = folder / f"{load.seed}.jsonl", folder / f"{load.seed}.answers"
    words = max(1, round(load.input_tokens / target.tokens_per_word))
    with lines.open("wb") as file:
        for body in bodies(load, range(load.requests), {**OPTIONS, **NOT_IN_A_LINE, "model": target.model}, words):
            file.write(body + b"\n")
    command = [*QVL, "batch", str(lines), "-o", str(answers), "--base-url", url, "--json"]
    return float(last_line([*command, "--concurrency", str(load.concurrency)])["lines_per_second"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", help="a server of yours; its CPU time is then not told")
    parser.add_argument("--port", type=int, default=8123, help="of the server that is started here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--input-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--side", type=int, default=224, help="of the pictures")
    parser.add_argument("flags", nargs="*", help="further flags of qvl serve, after --")
    return parser.parse_args()


def measure(asked: argparse.Namespace, url: str, pid: int | None) -> None:
    """Prints a line per round, then the medians."""
    target = run.connect(url, model=None, api_key=None, timeout=600, options=OPTIONS)
    side = asked.side
    shape = (
        asked.requests,
        asked.concurrency,
        None,
        asked.input_tokens,
        asked.output_tokens,
        asked.pictures,
        side,
        side,
    )
    ratios: list[float] = []
    print(f"{describe('cpu')}; {asked.requests} requests, {asked.concurrency} at once\n")
    print("| round | bench, requests/s | batch, lines/s | batch / bench | server CPU s, bench | batch |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(asked.rounds):
            seeds = random.sample(range(10**9), 2)
            found: dict[str, tuple[float, float]] = {}
            for name in ("bench", "batch") if number % 2 else ("batch", "bench"):
                load = Load("batch", *shape, seed=seeds[name == "bench"])
                before = cpu_seconds(pid) if pid else 0.0
                rate = bench(url, load) if name == "bench" else batch(url, load, target, Path(folder))
                found[name] = rate, (cpu_seconds(pid) - before if pid else 0.0)
            (fast, fast_cpu), (ours, our_cpu) = found["bench"], found["batch"]
            ratios.append(ours / fast)
            spent = f"{fast_cpu:.1f} | {our_cpu:.1f}" if pid else "- | -"
            print(f"| {number + 1} | {fast:.2f} | {ours:.2f} | {ours / fast:.3f} | {spent} |", flush=True)
    print(f"\nmedian of batch / bench: {statistics.median(ratios):.3f}")


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
