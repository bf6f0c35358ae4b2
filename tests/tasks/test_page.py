"""Pages that open by themselves: whatever the model wrote, nothing is loaded from elsewhere and nothing runs."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.tasks.page import PLACEHOLDER, POLICY, Page, self_contained


def page_of(html: str) -> Page:
    page = self_contained(html)
    assert page is not None
    return page


class Elements(HTMLParser):
    """All start tags of a page, and which stand open at its end."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "hr", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass


WHOLE = """<!DOCTYPE html>
<html lang="en">
<head><title>A &amp; B</title><style>body { color: #333 }</style></head>
<body><p>one<p>two &nbsp; <br><img src="data:image/png;base64,AAAA" alt='x'></p><a href="https://example.com/?a=1&amp;b=2">go</a>
<svg viewBox="0 0 1 1"><path d="M0 0"/><use href="#a"/></svg></body>
</html>"""


def test_a_page_that_needs_nothing_stays_as_it_was_written() -> None:
    page = page_of(WHOLE)
    policy = re.search(r'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy"[^>]*>', page.html)
    assert policy is not None and POLICY in policy[0]
    assert page.html.replace(policy[0], "").split() == WHOLE.split()
    assert page == Page(page.html, (), ())


@pytest.mark.parametrize(
    "html",
    [
        WHOLE,
        "<html><body>x",
        "<head><title>t</title></head><p>x",
        "<p>x",
        "<!DOCTYPE html>hello<html><head></head></html>",
        "<div><html><head><style>p{}</style></head>",
    ],
)
def test_the_policy_stands_before_all_that_it_governs(html: str) -> None:
    """A policy in a <meta> counts from where it stands, and only within the head."""
    before = page_of(html).html.partition('<meta http-equiv="Content-Security-Policy"')[0]
    tags = [tag for tag, _ in Elements(before).tags]
    assert set(tags) <= {"html", "head", "meta"}
    assert re.sub(r"<[^>]*>", "", before).strip() == ""


@pytest.mark.parametrize(
    "html, address",
    [
        ('<link rel="stylesheet" href="https://cdn/x.css">', "https://cdn/x.css"),
        ("<link rel=icon href=favicon.ico>", "favicon.ico"),
        ('<script src="//cdn/x.js"></script>', "//cdn/x.js"),
        ('<img src="logo.png">', "logo.png"),
        ('<img srcset="a.png 1x, b.png 2x">', "a.png 1x, b.png 2x"),
        ('<video poster="p.jpg"><source src="v.mp4"></video>', "v.mp4"),
        ('<iframe src="https://ads/"></iframe>', "https://ads/"),
        ('<embed src="x.swf">', "x.swf"),
        ('<object data="x.svg">old</object>', "x.svg"),
        ('<body background="b.gif">', "b.gif"),
        ("<style>@import url('https://fonts/a.css');</style>", "https://fonts/a.css"),
        ('<style>@import "a.css";</style>', "a.css"),
        ("<style>p { background: url( 'bg.png' ) }</style>", "bg.png"),
        ('<p style="background: url(bg.png)">', "bg.png"),
        ('<style>p { background: url("bg\'(1).png") }</style>', "bg'(1).png"),
        (r"<style>p { background: url(bg\(1\).png) }</style>", r"bg\(1\).png"),
        ('<p style="background: url(&quot;bg.png&quot;)">', "bg.png"),
        ('<base href="https://evil/">', "https://evil/"),
        ('<svg><image xlink:href="x.png" /></svg>', "x.png"),
        ("<IMG SRC=HTTP://CDN/X.PNG>", "HTTP://CDN/X.PNG"),
    ],
)
def test_what_refers_elsewhere_goes_and_is_named(html: str, address: str) -> None:
    page = page_of(f"<html><body>{html}</body></html>")
    assert address in page.removed
    assert address not in page.html


@pytest.mark.parametrize(
    "html",
    [
        "<script>alert(1)</script>",
        '<p onclick="alert(1)">x</p>',
        '<a href="javascript:alert(1)">x</a>',
        '<a href=" JaVaScRiPt:alert(1)">x</a>',
        '<form action="https://evil/"><button formaction="https://evil/">x</button></form>',
        '<meta http-equiv="refresh" content="0; url=https://evil/">',
        '<a ping="https://evil/" href="#x">x</a>',
        '<iframe srcdoc="<script>alert(1)</script>"></iframe>',
    ],
)
def test_nothing_that_acts_is_left(html: str) -> None:
    page = page_of(f"<html><body>{html}</body></html>").html
    assert "alert" not in page and "evil" not in page


def test_a_picture_that_goes_leaves_a_grey_box_of_its_size() -> None:
    page = page_of('<div><img src="logo.png" width="40" height=30 alt="Our &quot;logo&quot;"></div>')
    ((_, fields),) = [tag for tag in Elements(page.html).tags if tag[0] == "img"]
    assert fields == {"src": PLACEHOLDER, "width": "40", "height": "30", "alt": 'Our "logo"'}


@pytest.mark.parametrize(
    "html, closed",
    [
        ("<html><body><div><b>bold", ("b", "div", "body", "html")),
        ("<html><body><div><p>one<p>two<ul><li>x", ("ul", "div", "body", "html")),
        ("<html><body><div>text <span cla", ("div", "body", "html")),
        ("<html><body><div>text <", ("div", "body", "html")),
        ("<html><body>text <!-- half a com", ("body", "html")),
        ("<html><head><style>p { color: red", ("style", "head", "html")),
        ("<html><head><title>My sh", ("title", "head", "html")),
        ("<html><body><table><tr><td>1<td>2", ("table", "body", "html")),
    ],
)
def test_a_page_that_was_cut_is_completed(html: str, closed: tuple[str, ...]) -> None:
    page = page_of(html)
    assert page.closed == closed
    left = Elements(page.html).open
    assert all(tag in ("p", "li", "td", "tr") for tag in left)  # whose end may be left out
    assert "half a com" not in page.html and "<span cla" not in page.html


def test_what_was_in_a_cut_style_stays() -> None:
    assert "color: red" in page_of("<html><head><style>p { color: red").html


@pytest.mark.parametrize(
    "answer", ["", "I cannot do that.", "1 < 2 and 3 > 2", "<div class='a", "<!-- nothing -->", "<script>x</script>"]
)
def test_what_is_no_page(answer: str) -> None:
    assert self_contained(answer) is None


def test_talk_around_the_page_goes() -> None:
    page = page_of("Here is the page: <!DOCTYPE html><html><body>x</body></html>\nThat is all.")
    assert "Here is" not in page.html and "all" not in page.html


PIECES = (
    "<div> </div> <p > <script> </script> <style> </style> x \" ' <img/src=a.png> <!-- --> <!DOCTYPE/html> <html> "
    "<head> </head> <iframe/src=b> </iframe> url(c) <object/data=d> <svg/onload=alert(1)> <a/href='javascript:e'> "
    "&amp; <title> <textarea> ]]> <![CDATA["
).split()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12))
def test_any_page_is_made_harmless(pieces: list[str]) -> None:
    page = self_contained("".join(pieces))
    if page is None:
        return
    assert page.html.startswith("<!DOCTYPE html>") and page.html.count(POLICY) == 1
    for tag, fields in Elements(page.html).tags:
        assert tag not in ("script", "iframe", "object", "base", "link")
        assert not any(name.startswith("on") for name in fields)
        assert not str(fields.get("src", "data:")).startswith("a.png")
    again = self_contained(page.html)
    assert again is not None and again.removed == ()
