"""A picture of an HTML file as a browser shows it, taken by the Chromium of this machine, headless.

The page is a stranger's: it is shown from a private folder with a throw-away profile, without network, for a bounded
time; its own policy (`qvl.tasks.page`) keeps scripts from running. Does not know where the page comes from.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from qvl.errors import ConfigError, RequestFailed
from qvl.tasks.page import Page

SECONDS = 60.0
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")
MISSING = (
    "no browser was found to show the page with; install Chromium (on Debian: apt install chromium) or name one in "
    "CHROME_PATH"
)
LARGEST_SIDE = 8192  # pixels of a window
_SETTINGS = (
    "--headless",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no name has an address
    "--proxy-server=127.0.0.1:9",  # and where none is needed, nothing answers
    "--proxy-bypass-list=<-loopback>",
)


def find_browser() -> str:
    """The browser's program: CHROME_PATH, else the first that is installed. Raises `ConfigError`."""
    named = os.environ.get("CHROME_PATH")
    if named:
        if shutil.which(named) is None:
            raise ConfigError(f"CHROME_PATH names {named}, which is no program")
        return named
    found = next((path for name in PROGRAMS if (path := shutil.which(name)) is not None), None)
    if found is None:
        raise ConfigError(MISSING)
    return found


def render(page: Page, width: int, height: int, *, seconds: float = SECONDS) -> Image.Image:
    """The page as a window of this size shows it, on white where it is too large for the browser. Raises `ConfigError`
    without a browser, `RequestFailed` where it makes no picture."""
    program = find_browser()
    shown = _shot(program, page, width, height, seconds)
    if shown.height < height <= LARGEST_SIDE:  # some releases count their own bars to the window
        shown = _shot(program, page, width, height + (height - shown.height), seconds)
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(shown)
    return canvas


def _shot(program: str, page: Page, width: int, height: int, seconds: float) -> Image.Image:
    with tempfile.TemporaryDirectory(prefix="qvl-page-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "page.html").write_text(page.html, encoding="utf-8")
        said = _run(_command(program, folder, min(width, LARGEST_SIDE), min(height, LARGEST_SIDE)), folder, seconds)
        try:
            with Image.open(folder / "shot.png") as shot:
                return shot.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise RequestFailed(f"the browser made no picture of the page{_last_line(said)}") from error


def _command(program: str, folder: Path, width: int, height: int) -> list[str]:
    # Chromium refuses to run its sandbox as root; the page's policy lets no script run, and there is no network.
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
    return [
        program,
        *_SETTINGS,
        *as_root,
        f"--user-data-dir={folder / 'profile'}",
        f"--screenshot={folder / 'shot.png'}",
        f"--window-size={width},{height}",
        (folder / "page.html").as_uri(),
    ]


def _run(command: list[str], folder: Path, seconds: float) -> str:
    """What the browser said; it and its helpers are gone afterwards."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    log = folder / "said"
    with log.open("wb") as said:  # a file, since nobody waits for a helper to close it
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigError(f"the browser {command[0]} does not start: {error.strerror}") from error
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise RequestFailed(f"the browser did not finish the page within {seconds:g} seconds") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return log.read_text(encoding="utf-8", errors="replace")


def _last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f": {lines[-1][:300]}" if lines else ""
