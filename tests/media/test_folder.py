"""Which files of a folder count, and their order."""

from __future__ import annotations

from pathlib import Path

from qvl.media.folder import PICTURE_SUFFIXES, files_below


def test_names_in_an_order_that_is_the_same_everywhere(tmp_path: Path) -> None:
    for name in ("b.png", "A.JPG", "a/z.webp", "a/b/c.tiff", "notes.txt", ".hidden.png", ".git/x.png", "a.png.bak"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert list(files_below(str(tmp_path), PICTURE_SUFFIXES)) == ["A.JPG", "b.png", "a/z.webp", "a/b/c.tiff"]
    assert list(files_below(f"{tmp_path}/", (".txt",))) == ["notes.txt"]
    assert list(files_below(str(tmp_path / "nowhere"), PICTURE_SUFFIXES)) == []
