"""The HTML in an answer, made into one file that opens everywhere and loads nothing.

What the model wrote stays as it wrote it, but for three things: tags that a cut answer left open are closed; what
refers to anything outside of the file goes (pictures become grey boxes of the same size); and a content security policy
says the same to the browser, so that nothing which was overlooked can load or run. Does not know browsers or models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html.parser import HTMLParser

POLICY = (
    "default-src 'none'; img-src data:; font-src data:; media-src data:; style-src 'unsafe-inline'; form-action 'none'"
)
_HEAD = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
# A grey box: where a picture of the original stands that a model cannot know.
PLACEHOLDER = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' width='160' height='90'%3E"
    "%3Crect width='100%25' height='100%25' fill='%23c8c8c8'/%3E%3C/svg%3E"
)

_VOID = frozenset("area base br col embed frame hr img input link meta param source track wbr".split())
_OPTIONAL_END = frozenset("p li dt dd option optgroup tr td th thead tbody tfoot colgroup rp rt".split())
_RAW = ("style", "script", "title", "textarea")  # no tags inside: an open one swallows the rest of the page
_DROPPED = frozenset(("script", "iframe"))  # with all that is in them
_UNWRAPPED = frozenset(("base", "frame", "object", "embed", "applet", "noscript", "link"))
_SOURCES = frozenset(("src", "srcset", "poster", "background", "data", "imagesrcset", "xlink:href", "manifest"))
_LINKS = frozenset(("a", "area"))  # where a reader may go by a click; nothing is loaded
# No address runs on into the next one: a model that says `url(` without end is read in one go.
_URL = re.compile(r"""url\((?P<address>(?:[^"'()\\]|\\.)*|\s*"[^"]*"\s*|\s*'[^']*'\s*)\)""", re.I | re.S)
_IMPORT = re.compile(r"""@import\s+(?:url\(\s*)?["']?(?P<address>[^"');]*)[^;]*;?""", re.I)
_TAG = re.compile(r"<(?:[a-z/!]|$)", re.I)
_BEGINNINGS = (re.compile(r"<!doctype\b|<html\b", re.I), re.compile(r"<[a-z][a-z0-9]*[\s>]", re.I))  # the surest first


@dataclass(frozen=True, slots=True)
class Page:
    """A self-contained HTML file. `removed` are the references to elsewhere that it had, `closed` the tags added."""

    html: str
    removed: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()


def self_contained(answer: str) -> Page | None:
    """The page in an answer whose code fence is off; None when there is no HTML in it."""
    start = next((match for beginning in _BEGINNINGS if (match := beginning.search(answer))), None)
    if start is None:
        return None
    html = without_half_tag(_until_end(answer[start.start() :]))
    raw = [tag for tag in _RAW if html.lower().rfind(f"<{tag}") > html.lower().rfind(f"</{tag}")]
    rewriter = _Rewriter()
    rewriter.feed(html + "".join(f"</{tag}>" for tag in raw))
    rewriter.close()
    page = rewriter.page()
    return None if page is None else replace(page, closed=(*raw, *page.closed))


def _until_end(html: str) -> str:
    """Without what the model says after the page."""
    end = html.lower().rfind("</html>")
    return html if end < 0 else html[: end + len("</html>")]


def without_half_tag(html: str) -> str:
    """Without a tag that was cut in its middle."""
    comment = html.rfind("<!--")
    if comment > html.rfind("-->"):
        html = html[:comment]
    end, whole = len(html), html.rfind(">")
    while (last := html.rfind("<", whole + 1, end)) >= 0 and _TAG.match(html, last, end):
        end = last
    return html[:end]


class _Rewriter(HTMLParser):
    """Copies a page tag by tag, dropping and changing as the module says."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self._out: list[str] = []
        self._open: list[str] = []
        self._removed: dict[str, None] = {}
        self._inside: list[str] = []  # dropped elements that stand open
        self._policy_at = 0

    def page(self) -> Page | None:
        """After `close`: the whole page; None when nothing of it is left."""
        if not any(part.strip() for part in self._out):
            return None
        missing = [tag for tag in reversed(self._open) if tag not in _OPTIONAL_END]
        self._out += [f"</{tag}>" for tag in missing]
        html = "".join([*self._out[: self._policy_at], _HEAD, *self._out[self._policy_at :]])
        return Page(f"<!DOCTYPE html>\n{html.strip()}\n", tuple(self._removed), tuple(missing))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._start(tag, attrs, self.get_starttag_text() or "")
        if not self._inside and tag not in _VOID | _UNWRAPPED:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._start(tag, attrs, self.get_starttag_text() or "")
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def _start(self, tag: str, attrs: list[tuple[str, str | None]], text: str) -> None:
        fields = dict(attrs)
        if tag in _DROPPED | _UNWRAPPED or (tag == "meta" and "http-equiv" in fields):
            self._removed |= {str(fields[name]): None for name in ("src", "href", "data") if fields.get(name)}
            if tag in _DROPPED:
                self._inside.append(tag)
            return
        kept = [pair for name, value in attrs if (pair := self._attribute(tag, name, value)) is not None]
        self._copy(text if kept == attrs else _tag(tag, kept, text.rstrip().endswith("/>")))
        if tag in ("html", "head") and not any(part.strip() for part in self._out[self._policy_at : -1]):
            self._policy_at = len(self._out)

    def handle_endtag(self, tag: str) -> None:
        if self._inside:
            if self._inside[-1] == tag:
                self._inside.pop()
            return
        if tag in self._open:
            while self._open.pop() != tag:
                pass
        if tag not in _UNWRAPPED:
            self._copy(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        self._copy(self._style(data) if self._open and self._open[-1] == "style" else data)

    def handle_entityref(self, name: str) -> None:
        self._copy(f"&{name};")

    def handle_charref(self, name: str) -> None:
        self._copy(f"&#{name};")

    def _copy(self, text: str) -> None:
        if not self._inside:
            self._out.append(text)

    def _attribute(self, tag: str, name: str, value: str | None) -> tuple[str, str | None] | None:
        """An attribute as it may stay; None when it goes."""
        if name.startswith("on") or name in ("ping", "action", "formaction", "srcdoc"):
            return None
        address = (value or "").strip()
        if name == "href" and tag in _LINKS:
            return None if re.match(r"\s*(?:javascript|data|vbscript):", address, re.I) else (name, value)
        if name in _SOURCES or name == "href":
            if not address or address.startswith("#") or address.lower().startswith("data:"):
                return name, value
            self._removed[address] = None
            return (name, PLACEHOLDER) if tag == "img" and name == "src" else None
        return (name, self._style(value)) if name == "style" and value else (name, value)

    def _style(self, css: str) -> str:
        """CSS without imports and addresses of elsewhere."""

        def dropped(match: re.Match[str], instead: str) -> str:
            address = match["address"].strip().strip("\"'").strip()
            if address.lower().startswith("data:") or address.startswith("#"):
                return match[0]
            if address:
                self._removed[address] = None
            return instead

        css = _IMPORT.sub(lambda match: dropped(match, ""), css)
        return _URL.sub(lambda match: dropped(match, "none"), css)


def _tag(tag: str, attrs: Sequence[tuple[str, str | None]], closes_itself: bool) -> str:
    fields = "".join(f" {name}" if value is None else f' {name}="{_quoted(value)}"' for name, value in attrs)
    return f"<{tag}{fields}{' /' if closes_itself else ''}>"


def _quoted(value: str) -> str:
    return value.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
