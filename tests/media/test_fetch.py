"""Data URLs, files and bytes, within the policy."""

from __future__ import annotations

import base64
import os
import random
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvl.errors import BadMedia, InvalidRequest, MediaRefused, PayloadTooLarge
from qvl.media.fetch import _BASE64_SLICE, MediaPolicy, is_frame_list, read, read_frame_list

STRICT = MediaPolicy(max_bytes=1000)
SECRET = b"root:x:0:0"


def fetch(source, policy: MediaPolicy = STRICT, expect="image") -> bytes:
    return read(source, policy, expect=expect)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# -- data URLs


@given(st.binary(max_size=300))
def test_data_urls_in_every_good_spelling(data):
    text = b64(data)
    for url in (
        f"data:image/png;base64,{text}",
        f"DATA:image/PNG;charset=utf-8;BASE64,{text}",
        f"data:image;base64,{text}",
        f"data:image/png;base64,{quote(text, safe='')}",
        f"data:application/octet-stream;base64,{text}",
        f"data:;base64,{text}",  # a browser that does not know the file's type
        "data:image/png;base64," + base64.encodebytes(data).decode(),
        f"data:image/png,{quote(data)}",
    ):
        assert fetch(url) == data


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("data:image/png;base64", "comma"),
        ("data:", "comma"),
        ("data:image/png;base64,@@@@", "base64"),
        ("data:image/png;base64,AAA", "base64"),
        ("data:image/png;base64,AA-_", "base64"),  # the alphabet for URLs is another one
        ("data:image/png;base64,AAAA=AAA", "base64"),
        ("data:image/png;base64,AAAA=", "base64"),
        ("data:image/png;base64,AA\\/A", "base64"),  # JSON's spelling of a slash
        ('data:image/png;base64,AAAA"', "base64"),
        ("data:image/png;base64,\u00e9\u00e9\u00e9\u00e9", "base64"),
        ("data:image/png;base64,\ud800AAA", "base64"),
        ("data:text/html;base64,AAAA", "media type"),
        ("data:,AAAA", "media type"),
        ("data:video/mp4;base64,AAAA", "media type of image/..., and has video/mp4"),
        ("data:image/png,iVBORw0KGgo" + "A" * 300, "data:image/png;base64,"),
        ("data:image/svg+xml;base64,AAAA", "SVG"),
        ("data:image/svg+xml,<svg/>", "SVG"),
        ("data:" + "x" * 5000 + ",AAAA", "comma"),
    ],
)
def test_bad_data_urls(url, match):
    with pytest.raises(BadMedia, match=match):
        fetch(url)


@pytest.mark.parametrize("num_bytes", [_BASE64_SLICE // 4 * 3 + extra for extra in (-1, 0, 1, 2, 3)])
def test_data_urls_longer_than_what_is_decoded_at_once(num_bytes):
    data = random.Random(num_bytes).randbytes(num_bytes)
    assert fetch(f"data:image/png;base64,{b64(data)}", MediaPolicy()) == data


def test_no_padding_where_a_long_one_goes_on():
    text = "A" * (_BASE64_SLICE - 2) + "==" + "AAAA"
    with pytest.raises(BadMedia, match="base64"):
        fetch(f"data:image/png;base64,{text}", MediaPolicy())


def test_media_type_of_videos():
    assert fetch("data:video/mp4;base64,AAAA", expect="video") == bytes(3)
    assert fetch("data:image/gif;base64,AAAA", expect="video") == bytes(3)
    with pytest.raises(BadMedia, match="video"):
        fetch("data:image/png;base64,AAAA", expect="video")


def test_data_urls_are_capped_before_decoding(monkeypatch):
    monkeypatch.setattr("qvl.media.fetch._from_base64", lambda _: pytest.fail("decoded"))
    with pytest.raises(PayloadTooLarge):
        fetch("data:image/png;base64," + "A" * 2000)
    with pytest.raises(PayloadTooLarge):
        fetch("data:image/png," + "A" * 2000)


def test_frame_lists():
    url = "data:video/jpeg;base64," + ",".join(b64(bytes([n])) for n in range(4))
    assert is_frame_list(url)
    assert is_frame_list(url.replace("data:video", "DATA:Video"))
    assert read_frame_list(url, STRICT, max_frames=4) == [b"\x00", b"\x01", b"\x02", b"\x03"]
    for other in ("data:video/mp4;base64,AAAA", "data:image/jpeg;base64,AAAA", b"x", ["a"], None):
        assert not is_frame_list(other)


def test_frame_lists_are_counted_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr("qvl.media.fetch._from_base64", lambda _: pytest.fail("decoded"))
    with pytest.raises(BadMedia, match="100000 frames"):
        read_frame_list("data:video/jpeg;base64," + "," * 99_999, STRICT, max_frames=768)
    with pytest.raises(PayloadTooLarge):
        read_frame_list("data:video/jpeg;base64," + "AAAA," * 700, STRICT, max_frames=768)


def test_a_bad_frame_in_a_list():
    with pytest.raises(BadMedia, match="base64"):
        read_frame_list("data:video/jpeg;base64,AAAA,@", STRICT, max_frames=9)


# -- bytes


def test_bytes_are_themselves_and_capped():
    for source in (b"abc", bytearray(b"abc"), memoryview(b"abc")):
        assert fetch(source) == b"abc"
    with pytest.raises(PayloadTooLarge):
        fetch(bytes(1001))


# -- files


@pytest.fixture
def folder(tmp_path) -> Path:
    """media/ with a picture, a folder, and links; secret.txt beside it."""
    media = tmp_path / "media"
    (media / "sub folder").mkdir(parents=True)
    (tmp_path / "media-evil").mkdir()
    (media / "a.png").write_bytes(b"picture")
    (media / "sub folder" / "b.png").write_bytes(b"other")
    (tmp_path / "secret.txt").write_bytes(SECRET)
    (tmp_path / "media-evil" / "c.png").write_bytes(SECRET)
    (media / "link-out").symlink_to(tmp_path / "secret.txt")
    (media / "dir-out").symlink_to(tmp_path)
    (media / "link-in").symlink_to(media / "a.png")
    (media / "loop").symlink_to(media / "loop")
    os.mkfifo(media / "fifo")
    return media


def test_local_files_are_refused_by_default(folder):
    for source in (
        f"file://{folder}/a.png",
        f"{folder}/a.png",
        "a.png",
        folder / "a.png",
        "/etc/passwd",
        "file:/etc/passwd",
    ):
        with pytest.raises(MediaRefused) as caught:
            fetch(source)
        assert str(folder) not in caught.value.message


def test_files_under_the_allowed_folder(folder):
    policy = MediaPolicy(allowed_local_path=folder)
    urls = [f"file://{folder}/a.png", f"file://localhost{folder}/a.png", f"FILE://{folder}/a.png"]
    for source in (*urls, f"{folder}/a.png", "a.png", folder / "a.png", "link-in", "sub folder/../a.png"):
        assert fetch(source, policy) == b"picture"
    assert fetch(f"file://{folder}/sub%20folder/b.png", policy) == b"other"


def test_the_allowed_folder_may_itself_be_a_link(folder, tmp_path):
    (tmp_path / "alias").symlink_to(folder)
    policy = MediaPolicy(allowed_local_path=tmp_path / "alias")
    assert fetch(f"file://{tmp_path}/alias/a.png", policy) == b"picture"
    assert fetch(f"file://{folder}/a.png", policy) == b"picture"


@pytest.mark.parametrize(
    "name",
    ["../secret.txt", "link-out", "dir-out/secret.txt", "../media-evil/c.png", "%2e%2e/secret.txt", "sub folder", ".",
     "fifo", "loop", "missing.png", "a.png\x00.txt", "~/x", "/etc/passwd", "x" * 5000],
)  # fmt: skip
def test_out_of_the_folder_missing_and_odd_files_look_the_same(folder, name):
    policy = MediaPolicy(allowed_local_path=folder)
    texts = set()
    for source in (name, f"file://{folder}/{name}", str(folder / name)):
        with pytest.raises(MediaRefused) as caught:
            fetch(source, policy)
        texts.add(caught.value.message)
    assert texts == {"no readable file under the folder that --allowed-local-media-path names"}


def test_file_urls_of_other_hosts(folder):
    with pytest.raises(MediaRefused):
        fetch(f"file://evil.example{folder}/a.png", MediaPolicy(allowed_local_path=folder))


def test_in_process_any_file_can_be_read(folder, monkeypatch):
    policy = MediaPolicy(allow_any_local_path=True)
    monkeypatch.chdir(folder)
    for source in ("a.png", Path("a.png"), str(folder / "a.png"), f"file://{folder}/a.png", "dir-out/media/a.png"):
        assert fetch(source, policy) == b"picture"
    for source, says in (
        ("missing.png", "missing.png cannot be read: No such file"),
        (Path("missing.png"), "missing.png cannot be read: No such file"),
        ("fifo", "fifo cannot be read: not a regular file"),
        ("nul\0", "cannot be read: embedded null"),
        ("loop", "loop cannot be read: "),
    ):
        with pytest.raises(BadMedia, match=says):
            fetch(source, policy)


def test_base64_and_nothing_around_it(folder):
    """No path, though a JPEG begins as one: `/9j/`."""
    for first in (b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"):
        data = first + bytes(range(256))
        for policy in (STRICT, MediaPolicy(allow_any_local_path=True), MediaPolicy(allowed_local_path=folder)):
            for source in (b64(data), base64.encodebytes(data).decode()):
                with pytest.raises(BadMedia, match="data:image/png;base64,"):
                    fetch(source, policy)
    for path in ("", "  "):
        with pytest.raises(BadMedia, match="empty"):
            fetch(path)
    with pytest.raises(MediaRefused, match="no local files"):
        fetch("folder/" * 100 + "a.png")


def test_files_are_capped(folder):
    with pytest.raises(PayloadTooLarge):
        fetch("a.png", MediaPolicy(allowed_local_path=folder, max_bytes=6))
    assert fetch("a.png", MediaPolicy(allowed_local_path=folder, max_bytes=7)) == b"picture"


def test_a_device_without_end_is_no_file(folder):
    (folder / "zero").symlink_to("/dev/zero")
    for policy in (MediaPolicy(allowed_local_path=Path("/dev")), MediaPolicy(allow_any_local_path=True)):
        with pytest.raises(InvalidRequest):
            fetch("/dev/zero", policy)


def test_a_link_that_appears_after_the_check_is_not_followed(folder, tmp_path, monkeypatch):
    """Between resolving and opening, the picture is swapped for a link to the secret."""
    real = os.open

    def swap(path, flags, *args):
        if Path(path).name == "a.png":
            (folder / "a.png").unlink()
            (folder / "a.png").symlink_to(tmp_path / "secret.txt")
        return real(path, flags, *args)

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises(MediaRefused):
        fetch("a.png", MediaPolicy(allowed_local_path=folder))


def test_other_schemes():
    for source in ("ftp://x/a.png", "s3://bucket/a.png", "javascript://x", "FILE+x://y"):
        with pytest.raises(MediaRefused, match="http"):
            fetch(source)
