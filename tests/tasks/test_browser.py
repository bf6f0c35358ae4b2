"""The browser is called so that a stranger's page can do no harm, and it is gone afterwards. A script plays its part;
with a real one in CHROME_PATH the same is seen for real."""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from qvl.errors import ConfigError, RequestFailed
from qvl.tasks import browser
from qvl.tasks.page import self_contained
from tests.server.live import wait_until

PAGE = self_contained("<html><body>hello</body></html>")
assert PAGE is not None
REAL = os.environ.get("CHROME_PATH")

FAKE = """#!{python}
import json, os, sys
given = dict(word.partition("=")[::2] for word in sys.argv[1:])
here = dict(arguments=sys.argv[1:], cwd=os.getcwd(), home=os.environ["HOME"], pid=os.getpid(),
            proxies=[name for name in os.environ if name.lower().endswith("_proxy")],
            page=open(sys.argv[-1].removeprefix("file://")).read())
open({log!r}, "a").write(json.dumps(here) + chr(10))
{does}
"""
DRAWS = """
from PIL import Image
width, height = map(int, given["--window-size"].split(","))
Image.new("RGB", (width, max(1, height - {bars})), "red").save(given["--screenshot"])
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def fake(tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Installs a browser that does what is said."""

    def install(does: str) -> None:
        path = tmp_path / "browser"
        path.write_text(FAKE.format(python=sys.executable, log=str(log), does=does))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CHROME_PATH", str(path))

    return install


def calls(log: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_a_page_is_shown_in_a_window_of_the_size(fake, log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    fake(DRAWS.format(bars=0))
    shown = browser.render(PAGE, 321, 123, seconds=300)
    assert shown.size == (321, 123) and shown.getcolors() == [(321 * 123, (255, 0, 0))]
    (call,) = calls(log)
    assert call["page"] == PAGE.html and call["proxies"] == []
    assert "--headless" in call["arguments"] and "--window-size=321,123" in call["arguments"]


def test_nothing_of_the_person_and_of_the_network_is_within_reach(fake, log) -> None:
    fake(DRAWS.format(bars=0))
    browser.render(PAGE, 20, 20, seconds=300)
    (call,) = calls(log)
    arguments = list(map(str, call["arguments"]))
    profile = next(word for word in arguments if word.startswith("--user-data-dir=")).partition("=")[2]
    assert profile.startswith(str(call["cwd"])) and call["home"] == call["cwd"] != os.environ.get("HOME")
    assert "--host-resolver-rules=MAP * ~NOTFOUND" in arguments and "--proxy-server=127.0.0.1:9" in arguments
    assert ("--no-sandbox" in arguments) == (os.geteuid() == 0)
    assert not Path(str(call["cwd"])).exists()


def test_a_browser_that_counts_its_own_bars_is_asked_again(fake, log) -> None:
    fake(DRAWS.format(bars=87))
    assert browser.render(PAGE, 200, 300, seconds=300).getcolors() == [(60000, (255, 0, 0))]
    assert [str(call["arguments"][-2]) for call in calls(log)] == ["--window-size=200,300", "--window-size=200,387"]


def test_a_page_larger_than_any_window_is_shown_in_part(fake, log) -> None:
    fake(DRAWS.format(bars=0))
    assert browser.render(PAGE, 10, 9000, seconds=300).size == (10, 9000)
    assert "--window-size=10,8192" in calls(log)[0]["arguments"]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_browser_that_hangs_is_ended_with_its_helpers(fake, log) -> None:
    fake(
        "import subprocess, time\n"
        "helper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])\n"
        f"open({str(log)!r}, 'a').write(json.dumps(dict(pid=helper.pid)) + chr(10))\n"
        "time.sleep(3600)"
    )
    with pytest.raises(RequestFailed, match="within 5 seconds"):
        browser.render(PAGE, 20, 20, seconds=5)
    for call in calls(log) if log.exists() else []:  # on a slow machine it may not have come so far
        wait_until(lambda pid=call["pid"]: gone(int(pid)), "the browser lives on")


@pytest.mark.parametrize(
    "does, says",
    [
        ("sys.exit('no display here')", "no display here"),
        ("open(given['--screenshot'], 'w').write('not a picture')", "made no picture"),
        ("", "made no picture"),
    ],
)
def test_a_browser_that_makes_no_picture_is_told(fake, does: str, says: str) -> None:
    fake(does)
    with pytest.raises(RequestFailed, match=says):
        browser.render(PAGE, 20, 20, seconds=300)


def test_no_browser_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CHROME_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="apt install chromium"):
        browser.find_browser()
    monkeypatch.setenv("CHROME_PATH", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="is no program"):
        browser.find_browser()
    program = tmp_path / "google-chrome"
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.delenv("CHROME_PATH")
    assert browser.find_browser() == str(program)


class Ear(BaseHTTPRequestHandler):
    """Hears every request that a page makes."""

    heard: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.heard.append(self.path)
        self.send_error(404)

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


@pytest.mark.skipif(REAL is None, reason="name a Chromium in CHROME_PATH to see a real one")
def test_a_real_browser_shows_the_page_and_asks_nobody() -> None:
    server = HTTPServer(("127.0.0.1", 0), Ear)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    # a page as if nothing had been taken out of it: policy and switches alone hold
    hostile = (
        f"<style>@import url({address}/css); body {{ margin: 0; background: #0f0 url({address}/bg) }}"
        f"@font-face {{ font-family: f; src: url({address}/font) }} p {{ font-family: f }}</style>"
        f"<body><p>x</p><img src={address}/img><iframe src={address}/frame></iframe><iframe src=file:///etc/passwd></iframe>"
        f"<script>document.body.style.background = 'red'; fetch('{address}/fetch'); location = '{address}/go'</script>"
        f"<script src={address}/script></script></body>"
    )
    for page in (PAGE.html.replace("hello", hostile), hostile.partition("<script>")[0]):
        shown = browser.render(type(PAGE)(page), 320, 200, seconds=300)
        assert shown.getpixel((319, 2)) == (0, 255, 0)
    server.shutdown()
    server.server_close()
    assert Ear.heard == []
