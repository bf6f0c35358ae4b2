"""Documents and numbers run: `python tools/check_docs.py [--no-run]`, part of `make check`.

A code block after the line `<!-- run -->` is executed against a running server of the bundled checkpoint;
`<!-- run: words -->` also wants these words in its output, `<!-- run: some ... others -->` both, in this order. Beside
that: links point at files, both READMEs show the same commands, docs/flags.md is what the commands say, and pages of
numbers name hardware, commit and command.

Knows Markdown as far as it is used here. Does not know what the commands do.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README, TRANSLATION = ROOT / "README.md", ROOT / "README.zh-CN.md"
NUMBERS = [ROOT / "docs" / name for name in ("performance.md", "performance-log.md")]
DEFAULT_ADDRESS = "127.0.0.1:8000"
LANGUAGES = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
SECONDS_PER_BLOCK = 300  # two slow cores with other work on them
SECONDS_TO_READY = 300
SECONDS_TO_END = 60

_BLOCK = re.compile(
    r"^(?:<!-- run(?:: (?P<expect>.*?))? -->\n+)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
_MARK = re.compile(r"^<!-- run\b.*-->$", re.M)
_LINK = re.compile(r"\[[^\]]*\]\((?!https?://|mailto:|#)([^)#\s]+)[^)]*\)")


@dataclass(frozen=True)
class Block:
    """A fenced code block; `run` says that it is marked, `expect` what its output must hold."""

    page: Path
    line: int
    language: str
    code: str
    run: bool
    expect: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        marked = match.group().startswith("<!-- run")
        yield Block(page, line, match["language"], match["code"], marked, (match["expect"] or "").strip())


def complaints(page: Path) -> Iterator[str]:
    """What is wrong with a page as it stands."""
    text = page.read_text(encoding="utf-8")
    name = page.relative_to(ROOT)
    for target in _LINK.findall(text):
        if not (page.parent / target).exists():
            yield f"{name}: the link {target} points at nothing"
    marked = [block for block in blocks(page) if block.run]
    if len(marked) != len(_MARK.findall(text)):
        yield f"{name}: a <!-- run --> line stands before something that is no code block"
    for block in marked:
        if block.language not in LANGUAGES:
            yield f"{block.place}: cannot run a block of '{block.language}'"


def translation_complaints() -> Iterator[str]:
    """The two READMEs show the same code, but for comments and texts in the reader's language."""
    ours, theirs = list(blocks(README)), list(blocks(TRANSLATION))
    if len(ours) != len(theirs):
        yield f"README.md has {len(ours)} code blocks, README.zh-CN.md has {len(theirs)}"
        return
    for one, other in zip(ours, theirs, strict=True):
        if commands_of(one) != commands_of(other) or (one.run, one.expect) != (other.run, other.expect):
            yield f"{other.place}: differs from {one.place}"


def commands_of(block: Block) -> str:
    """The block without comments."""
    return re.sub(r"\s*(?<!\S)#.*$", "", block.code, flags=re.M).strip()


def number_complaints() -> Iterator[str]:
    """Every section with a table of figures says on what, from which commit and by which command it was measured.

    Figures that nobody measured say so instead, in a line that begins with `Computed:` and names what they come from.
    """
    for page in NUMBERS:
        for section in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.M)[1:]:
            title = section.splitlines()[0]
            if re.search(r"^\|[-: |]+\|$", section, re.M) and "Computed:" not in section:
                for fact in ("Hardware:", "Commit:", "Command:"):
                    if fact not in section:
                        yield f"{page.relative_to(ROOT)}: '{title}' has figures but no '{fact}'"


@contextmanager
def server() -> Iterator[str]:
    """HOST:PORT of a server of the bundled checkpoint."""
    command = [sys.executable, "-m", "qvl", "serve", "demo", "--port", "0", "--num-threads", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        spoke, _, _ = select.select([process.stdout], [], [], SECONDS_TO_READY)
        ready = re.search(r"http://(\S+)", process.stdout.readline()) if spoke else None
        if ready is None:
            raise SystemExit("the server of the bundled checkpoint did not start")
        yield ready[1]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()


def failure(block: Block, address: str) -> str | None:
    """Run one block; why it failed, or None.

    Every block runs in the repository, with a scratch folder as HOME; only caches (compiled kernels) are the user's.
    """
    programs = Path(sys.executable).parent
    code = block.code.replace(DEFAULT_ADDRESS, address).replace(".venv/bin/activate", f"'{programs}/activate'")
    with tempfile.TemporaryDirectory() as home:
        environment = {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "QVL_BASE_URL": f"http://{address}",
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"),
            "HOME": home,
            "OMP_NUM_THREADS": "1",  # threads that wait for each other on cores with other work are slower than one
        }
        try:
            done = subprocess.run(
                [*LANGUAGES[block.language], code], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=SECONDS_PER_BLOCK, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"took longer than {SECONDS_PER_BLOCK} s"
    if done.returncode != 0:
        return f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    place = 0
    for words in block.expect.split(" ... "):
        found = done.stdout.find(words, place)
        if found < 0:
            return f"'{words}' is not in its output, or not in its place:\n{done.stdout}{done.stderr}"
        place = found + len(words)
    return None


def run_all(todo: list[Block]) -> Iterator[str]:
    with server() as address:
        for block in todo:
            began = time.monotonic()
            reason = failure(block, address)
            verdict = "ok" if reason is None else "FAILED"
            print(f"{block.place}: {verdict} ({time.monotonic() - began:.1f} s)", flush=True)
            if reason is not None:
                yield f"{block.place}: {reason}"


def main() -> int:
    found = [text for page in pages() for text in complaints(page)]
    found += [*translation_complaints(), *number_complaints()]
    flags = subprocess.run([sys.executable, str(ROOT / "tools" / "write_flags.py"), "--check"], check=False)
    if flags.returncode != 0:
        found.append("docs/flags.md is out of date")
    todo = [block for page in pages() for block in blocks(page) if block.run and page != TRANSLATION]
    if not found and "--no-run" not in sys.argv[1:]:
        found += run_all(todo)
    for text in found:
        print(text, file=sys.stderr)
    print(f"documents: {len(todo)} blocks to run, {len(found)} complaints")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
