"""From names to items: files, folders, PDFs, addresses, standard input; and what cannot be read."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageGrab

from qvl.errors import InvalidRequest
from qvl.tasks.inputs import Item, Pages, Reading, items, one_part
from qvl.tasks.pdf import Resolution
from qvl.types import MediaPart, TextPart
from tests.tasks import documents

ALL = Reading(frozenset({"image", "video", "text"}))
PICTURES = Reading(frozenset({"image"}))


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    (folder / "deep").mkdir(parents=True)
    for name in ("2.png", "1.jpg", "deep/3.webp"):
        Image.new("RGB", (60, 40), "white").save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"x")
    (folder / "two.pdf").write_bytes(documents.pdf_of([documents.printed("a"), documents.printed("b")]))
    return folder


@pytest.fixture
def web(scans: Path) -> Iterator[str]:
    """The folder behind an address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(scans))

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def named(found: list[Item]) -> list[tuple[str, int | None]]:
    return [(item.file, item.page) for item in found]


def source(item: Item) -> Any:
    part = item.load()
    assert isinstance(part, MediaPart)
    return part.source


def test_a_folder_in_the_order_of_names(scans: Path) -> None:
    found = items([f"{scans}/"], PICTURES)
    assert named(found) == [
        (f"{scans}/1.jpg", None),
        (f"{scans}/2.png", None),
        (f"{scans}/two.pdf", 1),
        (f"{scans}/two.pdf", 2),
        (f"{scans}/deep/3.webp", None),
    ]
    assert [item.name for item in found] == ["1.jpg", "2.png", "two.pdf", "two.pdf", "deep/3.webp"]
    assert source(found[0]) == scans / "1.jpg"
    assert source(found[3]).size[0] > 0
    assert found[3].title == f"{scans}/two.pdf, page 2"


def test_several_in_the_order_of_naming(scans: Path) -> None:
    found = items([scans / "2.png", f"file://{scans}/1.jpg", scans / "nope.png", scans / "deep"], PICTURES)
    assert [Path(item.file).name for item in found] == ["2.png", "1.jpg", "nope.png", "3.webp"]
    assert [item.error is None for item in found] == [True, True, False, True]
    with pytest.raises(InvalidRequest, match="no such file"):
        found[2].load()


@pytest.mark.parametrize(
    "text, count, pages",
    [("1-3", 5, [1, 2, 3]), ("2", 5, [2]),
     ("4-", 5, [4, 5]), ("5,1-2", 5, [1, 2, 5]), ("1-9", 2, [1, 2]), ("7", 3, [])],
)  # fmt: skip
def test_pages(text: str, count: int, pages: list[int]) -> None:
    assert Pages.parse(text).of(count) == pages


@pytest.mark.parametrize("text", ["", "0", "3-1", "a", "1-2-3", "-2", "1,,2", "99999999"])
def test_no_pages(text: str) -> None:
    with pytest.raises(InvalidRequest, match="names no pages"):
        Pages.parse(text)


def test_wanted_pages(scans: Path) -> None:
    assert named(items([scans / "two.pdf"], Reading(pages=Pages.parse("2-")))) == [(f"{scans}/two.pdf", 2)]
    assert named(items([scans], Reading(pages=Pages.parse("1"))))[2] == (f"{scans}/two.pdf", 1)
    [missing] = items([scans / "two.pdf"], Reading(pages=Pages.parse("3")))
    with pytest.raises(InvalidRequest, match="the PDF has 2 pages"):
        missing.load()
    with pytest.raises(InvalidRequest, match="--pages is for PDFs"):
        items([scans / "2.png"], Reading(pages=Pages.parse("1")))


def test_pages_are_drawn_at_the_size_that_is_known_by_then(scans: Path) -> None:
    asked: list[int] = []

    def resolution() -> Resolution:
        asked.append(1)
        return Resolution(dpi=36)

    found = items([scans / "two.pdf"], Reading(resolution=resolution))
    assert asked == []
    width, height = documents.printed("a").size
    assert source(found[0]).size == (width // 2, height // 2)


@pytest.mark.parametrize(
    "data, kind",
    [
        (b"\x89PNG\r\n\x1a\n", "image"),
        ("Hello, 世界\n".encode(), "text"),
        (b"\x00\x00\x00\x18ftypmp42", "video"),
        (b"\xff\xd8\xff\xe0", "image"),
    ],
)
def test_standard_input_is_what_it_looks_like(data: bytes, kind: str) -> None:
    [item] = items(["-"], Reading(ALL.accepts, stdin=lambda: data))
    part = item.load()
    assert (part.kind if isinstance(part, MediaPart) else "text") == kind
    assert isinstance(part, TextPart) or part.source == data
    assert item.name == "stdin"


def test_a_pdf_on_standard_input(scans: Path) -> None:
    data = (scans / "two.pdf").read_bytes()
    assert named(items(["-"], Reading(PICTURES.accepts, stdin=lambda: data))) == [("-", 1), ("-", 2)]


def test_addresses_are_fetched_here(web: str, scans: Path) -> None:
    [picture] = items([f"{web}/2.png?size=large"], PICTURES)
    assert source(picture) == (scans / "2.png").read_bytes()
    assert (picture.file, picture.name) == (f"{web}/2.png?size=large", "2.png")
    assert [page for _, page in named(items([f"{web}/two.pdf"], PICTURES))] == [1, 2]
    gone, missing = items([f"{web}/none.png", f"{web}/none.pdf"], PICTURES)
    for item in (gone, missing):
        with pytest.raises(InvalidRequest):
            item.load()


def test_a_pdf_that_an_address_does_not_announce(web: str, scans: Path) -> None:
    (scans / "get").write_bytes((scans / "two.pdf").read_bytes())
    assert [page for _, page in named(items([f"{web}/get"], PICTURES))] == [1, 2]
    [second] = items([f"{web}/get"], Reading(pages=Pages.parse("2")))
    assert source(second).size[0] > 0


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("clip.mp4", b"x", "is a video, and this task takes pictures and PDFs"),
        ("page.txt", b"x", "is text, and this task takes pictures and PDFs"),
        ("bad.pdf", b"%PDF-1.4 no more", "broken"),
        ("locked.pdf", documents.locked(), "password"),
    ],
)
def test_what_a_task_does_not_take(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    [item] = items([tmp_path / name], PICTURES)
    assert item.error is not None and says in item.error.message


def test_an_empty_folder_and_an_empty_input(tmp_path: Path) -> None:
    for source_, says in (
        (tmp_path, "no pictures and PDFs in the folder"),
        ("-", "standard input is empty"),
        (b"", "is empty"),
    ):
        [item] = items([source_], PICTURES)
        assert item.error is not None and says in item.error.message


def test_text_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_bytes(b"\xff\xfe\x00")
    [item] = items([tmp_path / "page.txt"], ALL)
    with pytest.raises(InvalidRequest, match="not text in UTF-8"):
        item.load()


def test_what_a_program_holds(scans: Path) -> None:
    picture = Image.new("RGB", (4, 4))
    part = MediaPart("video", b"x")
    for held, expected in ((picture, picture), (b"\x89PNG", b"\x89PNG"), (part, b"x")):
        assert getattr(one_part(held, ALL), "source") == expected  # noqa: B009  either kind of part
    assert one_part(TextPart("hi"), ALL) == TextPart("hi")
    assert getattr(one_part(scans / "two.pdf", Reading(pages=Pages.parse("1"))), "source").size[0] > 0  # noqa: B009
    with pytest.raises(InvalidRequest, match=r"holds 2 pictures: name a page=.*qvl\.tasks\.each"):
        one_part(scans / "two.pdf", PICTURES)
    with pytest.raises(InvalidRequest, match=r"a list .*qvl\.tasks\.each"):
        one_part([scans / "one.png"], PICTURES)
    with pytest.raises(InvalidRequest, match="is a video"):
        one_part(part, PICTURES)


def test_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageGrab, "grab", lambda: Image.new("RGB", (300, 200)))
    (item,) = items(["screen:10,20,50,60"], PICTURES)
    part = item.load()
    assert item.title == "screen:10,20,50,60" and isinstance(part, MediaPart) and part.source.size == (40, 40)
    (wrong,) = items(["screen:1,2"], PICTURES)
    assert wrong.error is not None and "names no region" in wrong.error.message
