"""Who opens the server in a browser finds what runs and where to go; a program finds the same as JSON."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Iterator

import pytest
import requests

from qvl import __version__
from qvl.backends.echo import EchoBackend
from qvl.server.options import ServerOptions
from tests.server.live import Live, live

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


class Starting(EchoBackend):
    """One whose model is still being loaded."""

    async def start(self) -> None:
        pass


@pytest.fixture(scope="module")
def prefixed() -> Iterator[Live]:
    with live(EchoBackend("<b>parrot</b>"), ServerOptions(root_path="/prefix")) as running:
        yield running


def test_a_browser_sees_what_runs_and_links_that_lead_somewhere(server: Live) -> None:
    reply = server.get("/", headers=BROWSER)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert __version__ in reply.text and "echo" in reply.text and "refresh" not in reply.text
    links = [link for link in re.findall(r'href="([^"]+)"', reply.text) if not link.startswith("data:")]
    assert {"docs", "v1/models", "health", "metrics"} <= set(links)
    for link in links:
        assert server.get(f"/{link}").status_code == 200


def test_its_line_for_curl_works_as_it_stands(server: Live) -> None:
    found = re.search(r"<pre>(.*)</pre>", server.get("/", headers=BROWSER).text)
    assert found is not None
    curl, url, option, body = shlex.split(html.unescape(found[1]))
    assert (curl, url, option) == ("curl", f"{server.url}/v1/chat/completions", "-d")
    # As curl sends it, which names no JSON.
    reply = requests.post(url, body, headers={"Content-Type": "application/x-www-form-urlencoded"}, timeout=120)
    assert reply.json()["choices"][0]["message"]["content"] == "Hello!"


@pytest.mark.parametrize(
    "accept, is_html",
    [
        ("text/html", True),
        ("TEXT/HTML , */*;q=0.1", True),
        ("text/*, application/json;q=0.5", True),
        ("*/*", False),  # curl and requests
        ("", False),
        ("application/json", False),
        ("application/json, text/plain, */*", False),
        ("text/html;q=0.5, application/json", False),
        ("text/html;q=zero", False),
    ],
)
def test_html_is_for_who_prefers_it_to_json(server: Live, accept: str, is_html: bool) -> None:
    reply = server.get("/", headers={"Accept": accept})
    assert reply.headers["content-type"].startswith("text/html" if is_html else "application/json")
    assert "Accept" in reply.headers["vary"]


@pytest.mark.parametrize(
    "languages, lang",
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("fr-FR, zh-TW;q=0.3", "zh"),
        ("en-US,en;q=0.9,zh-CN;q=0.8", "en"),
        ("fr", "en"),
        ("", "en"),
    ],
)
@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_speaks_chinese_to_who_reads_it_rather_than_english(
    server: Live, path: str, languages: str, lang: str
) -> None:
    text = server.get(path, headers={**BROWSER, "Accept-Language": languages}).text
    assert f'<html lang="{lang}">' in text
    assert bool(re.search("[\u4e00-\u9fff]", text)) is (lang == "zh")


def test_a_program_reads_the_same_as_json(server: Live) -> None:
    told = server.get("/").json()
    assert told == {
        "name": "qvl",
        "version": __version__,
        "models": ["echo"],
        "status": "ready",
        "max_model_len": 4096,
        "device": "none",
        "dtype": "none",
    }
    assert server.get("/openapi.json").json()["paths"]["/"]["get"]["responses"].keys() == {"200", "401"}


def test_while_the_model_loads_the_page_says_so_and_looks_again() -> None:
    with live(Starting(), wait_ready=False) as running:
        assert running.get("/").json()["reason"] == "the backend is not started"
        page = running.get("/", headers=BROWSER)
        assert page.status_code == 200
        assert "the backend is not started" in page.text and 'http-equiv="refresh"' in page.text


def test_below_a_prefix_links_and_lines_carry_it_and_names_are_no_html(prefixed: Live) -> None:
    for path in ("/", "/prefix/"):
        text = prefixed.get(path, headers=BROWSER).text
        assert f"{prefixed.url}/prefix/v1/chat/completions" in text and 'href="/prefix/docs"' in text
        assert "<b>" not in text and "&lt;b&gt;parrot" in text
    page = prefixed.get("/prefix/docs").text
    assert 'href="/prefix/openapi.json"' in page and 'url: "/prefix/openapi.json"' in page


def test_docs_list_every_route_where_its_viewer_cannot_be_fetched(server: Live) -> None:
    page = server.get("/docs").text
    before_the_viewer = page[: page.index("https://")]
    for path in server.get("/openapi.json").json()["paths"]:
        assert f" {html.escape(path)}</code>" in before_the_viewer
    assert 'href="openapi.json"' in before_the_viewer


def test_with_keys_no_page_tells_the_models_name() -> None:
    with live(EchoBackend("secret-model"), ServerOptions(api_keys=("key",))) as running:
        for path in ("/", "/docs"):
            reply = requests.get(running.url + path, headers=BROWSER, timeout=120)
            assert reply.status_code == 401
            assert "secret-model" not in reply.text
        assert "secret-model" in running.get("/", headers={"X-Api-Key": "key"}).text
