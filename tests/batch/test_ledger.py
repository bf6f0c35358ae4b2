"""The first pass over the input: identities, duplicates, what is not a request, odd files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from qvl.batch import JsonLines, Pictures
from qvl.batch.ledger import NOWHERE, hash_of, scan
from qvl.errors import InvalidRequest


def source(tmp_path: Path, text: str | bytes) -> JsonLines:
    path = tmp_path / "in.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return JsonLines(path)


def line(custom_id: str, **more: object) -> str:
    return json.dumps({"custom_id": custom_id, **more})


def test_every_line_is_found_again(tmp_path: Path) -> None:
    """A byte order mark, blank lines, Windows ends, long lines and a last line without an end."""
    long = line("long", pad="x" * 100_000)
    text = "\ufeff" + line("a") + "\r\n\n   \n" + long + "\n" + line("b ü", x="\u2028") + "\n" + line("last")
    lines = source(tmp_path, text)
    ledger = scan(lines)
    assert ledger.numbers.tolist() == [1, 4, 5, 6]
    read = [lines.read(int(offset)) for offset in ledger.offsets]
    assert [json.loads(data)["custom_id"] for data in read] == ["a", "long", "b ü", "last"]
    assert [hash_of(data) for data in read] == ledger.contents.tolist()


def test_a_repeated_custom_id_is_told_by_line_number(tmp_path: Path) -> None:
    text = "\n".join([line("a"), line("b"), "{broken", line("a", x=1), line("b")])
    with pytest.raises(InvalidRequest, match=r"line 4 repeats the custom_id 'a' of line 1 \(1 more"):
        scan(source(tmp_path, text))


def test_a_custom_id_that_looks_like_a_line_without_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"repeats the custom_id 'line-2' of line 1"):
        scan(source(tmp_path, line("line-2") + '\n{"messages": []}\n'))


def test_lines_that_are_no_requests_are_counted(tmp_path: Path) -> None:
    text = line("a") + "\n{oops\n[1]\n" + b"\xff\xfe".decode("latin-1") + "\n"
    assert scan(source(tmp_path, text)).num_unreadable == 3
    with pytest.raises(InvalidRequest, match="no line of"):
        scan(source(tmp_path, "a,b\n1,2\n"))
    with pytest.raises(InvalidRequest, match="nothing to ask"):
        scan(source(tmp_path, "\n\n"))


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot read"):
        JsonLines(tmp_path / "gone.jsonl")
    with pytest.raises(InvalidRequest, match="no plain file"):
        JsonLines(Path("/dev/null"))


def test_find(tmp_path: Path) -> None:
    ledger = scan(source(tmp_path, "\n".join(line(f"{i}") for i in range(100))))
    order = np.random.default_rng(0).permutation(100)
    assert ledger.find(ledger.keys[order]).tolist() == order.tolist()
    assert ledger.find(np.array([1, 2**63], np.uint64)).tolist() == [NOWHERE, NOWHERE]
    assert ledger.find(np.zeros(0, np.uint64)).tolist() == []


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.webp", "sub/notes.txt", ".hidden.png", ".git/d.png", "B/e.tiff"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    pictures = Pictures(tmp_path, "Read.", {"max_tokens": 5})
    ledger = scan(pictures)
    lines = [json.loads(pictures.read(int(offset))) for offset in ledger.offsets]
    assert [one["custom_id"] for one in lines] == ["a.JPG", "b.png", "B/e.tiff", "sub/c.webp"]
    content = [{"type": "image_url", "image_url": {"url": "B/e.tiff"}}, {"type": "text", "text": "Read."}]
    assert lines[2]["body"] == {"max_tokens": 5, "messages": [{"role": "user", "content": content}]}
    contents = ledger.contents.tolist()
    (tmp_path / "b.png").write_bytes(b"another picture")
    again = scan(pictures).contents.tolist()
    assert [old == new for old, new in zip(contents, again, strict=True)] == [True, False, True, True]


def test_an_empty_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="nothing to ask"):
        scan(Pictures(tmp_path, "Read.", {}))


def test_a_name_that_is_not_utf_8_is_skipped_and_said(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    _write_or_skip(tmp_path, b"caf\xe9.png")
    (tmp_path / "d.png").write_bytes(b"x")
    pictures = Pictures(tmp_path, "Read.", {})
    ledger = scan(pictures)
    asked = [json.loads(pictures.read(int(offset)))["custom_id"] for offset in ledger.offsets]
    assert asked == ["a.png", "d.png"]
    assert ledger.numbers.tolist() == [1, 2]
    assert r"'caf\xe9.png'" in pictures.skipped
    assert pictures.skipped.isascii() and "\n" not in pictures.skipped
    _write_or_skip(tmp_path, b"\xff.png")
    scan(pictures)
    assert pictures.skipped.startswith("2 files in ")


def test_a_folder_of_such_names_alone_is_refused(tmp_path: Path) -> None:
    _write_or_skip(tmp_path, b"caf\xe9.png")
    with pytest.raises(InvalidRequest, match=r"caf\\xe9\.png.*not UTF-8"):
        scan(Pictures(tmp_path, "Read.", {}))


def _write_or_skip(folder: Path, name: bytes) -> None:
    """A file system may refuse such names (macOS' does)."""
    try:
        Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
