"""`qvl ask`: where the answer comes from, what goes in by which door, and what is printed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageGrab

from qvl.cli.app import run
from qvl.cli.spoken import given_medium
from qvl.errors import InvalidRequest
from tests.client.misbehaving import STREAM, misbehaving, reply
from tests.server.live import Live

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server at the default address, whatever runs on the developer's machine."""
    monkeypatch.setattr("qvl.cli.answer.DEFAULT_URL", "http://127.0.0.1:9")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "dot.png"
    Image.new("RGB", (40, 40), "red").save(path)
    return path


def piped(data: bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """The command with `data` on its standard input."""
    return subprocess.run(
        [sys.executable, "-m", "qvl", "ask", *arguments], cwd=ROOT, input=data, capture_output=True, timeout=300,
        check=False,
    )  # fmt: skip


def test_a_question_about_pictures(server: Live, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ask", "What?", str(picture), str(picture), "--base-url", server.url]) == 0
    assert run(["ask", "What?", str(picture), "--base-url", server.url.removeprefix("http://") + "/v1/"]) == 0
    assert capsys.readouterr().out == "What? [2 images]\nWhat? [1 image]\n"


def test_the_server_at_the_default_address_is_found(
    server: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qvl.cli.answer.DEFAULT_URL", server.url)
    assert run(["ask", "Hello", "--model", "parrot"]) == 0
    assert run(["ask", "Hello"]) == 0
    assert capsys.readouterr().out == "Hello\nHello\n"


def test_json_tells_everything(server: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ask", "Hello", "--json", "--max-tokens", "3", "--base-url", server.url]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "text": "Hel",
        "finish_reason": "length",
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "cached_tokens": 0,
        "answered_by": f"parrot at {server.url}",
    }


def test_a_cut_answer_is_said_on_stderr(server: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ask", "Hello", "--max-tokens", "3", "--base-url", server.url]) == 0
    out, err = capsys.readouterr()
    assert out == "Hel\n"
    assert "--max-tokens" in err
    assert run(["ask", "Hello", "--max-tokens", "3", "--base-url", server.url, "-q"]) == 0
    assert capsys.readouterr() == ("Hel\n", "")


def test_the_screen_is_a_picture_by_name(
    server: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ImageGrab, "grab", lambda: Image.new("RGB", (300, 200)))
    assert run(["ask", "What?", "screen:", "screen:0,0,50,60", "--base-url", server.url]) == 0
    assert capsys.readouterr().out == "What? [2 images]\n"
    assert run(["ask", "What?", "screen:0,0,500,60", "--base-url", server.url]) == 2
    assert "no region" in capsys.readouterr().err


def test_text_and_pictures_by_pipe(server: Live, picture: Path) -> None:
    page = "第一行\nsecond line\n".encode()
    assert piped(page, "Summarise.", "--base-url", server.url).stdout.decode() == "Summarise.\n\n第一行\nsecond line\n"
    assert piped(page, "-", "--base-url", server.url).stdout == page
    assert piped(picture.read_bytes(), "What?", "-", "--base-url", server.url).stdout == b"What? [1 image]\n"
    wrong = piped(picture.read_bytes(), "What?", "--base-url", server.url)
    assert (wrong.returncode, wrong.stdout) == (2, b"")
    assert b"qvl ask QUESTION -" in wrong.stderr


def test_the_error_of_a_server_ends_the_command(server: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ask", "Hi", "--base-url", server.url, "--model", "nightingale"]) == 2
    assert "nightingale" in capsys.readouterr().err
    assert run(["ask", "Hi", "--base-url", "http://127.0.0.1:9"]) == 1
    assert "no server answers" in capsys.readouterr().err


@pytest.mark.usefixtures("nobody")
def test_without_a_server_the_answer_is_made_here(
    checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["ask", "What?", str(picture), "--model", str(checkpoint), "--max-tokens", "5", "--temperature", "0"]
    assert run([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert 1 <= told["completion_tokens"] <= 5
    assert told["answered_by"].endswith("in process")
    assert "loading" in err
    assert run(arguments) == 0
    assert capsys.readouterr().out.removesuffix("\n") == told["text"].removesuffix("\n")


def test_a_model_that_the_local_server_does_not_have_is_loaded_here(
    server: Live, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qvl.cli.answer.DEFAULT_URL", server.url)
    assert run(["ask", "Hi", "--model", str(checkpoint), "--max-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answered_by"].endswith("in process")


def test_an_unreadable_picture_is_told_in_one_line(
    server: Live, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qvl.cli.answer.DEFAULT_URL", "http://127.0.0.1:9")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG but not really")
    assert run(["ask", "What?", str(broken), "--model", str(checkpoint)]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("qvl: ")
    assert not any("Traceback" in line for line in err)


def test_a_folder_and_a_document_are_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "two.PDF"
    document.touch()
    assert run(["ask", "What?", str(document)]) == 2
    assert f"`qvl ocr {document}`" in capsys.readouterr().err
    assert run(["ask", "What?", str(tmp_path)]) == 2
    assert f"{tmp_path} is a folder: `qvl batch {tmp_path} --prompt" in capsys.readouterr().err
    with pytest.raises(InvalidRequest, match="is a folder"):
        given_medium(str(tmp_path), "image")


def test_a_terminal_or_dev_null_is_not_read(server: Live) -> None:
    with open(os.devnull, "rb") as null:
        done = subprocess.run(
            [sys.executable, "-m", "qvl", "ask", "Hi", "--base-url", server.url],
            cwd=ROOT, stdin=null, capture_output=True, timeout=300, check=False,
        )  # fmt: skip
    assert done.stdout == b"Hi\n"


def test_a_picture_survives_the_way(server: Live) -> None:
    """Bytes on standard input arrive unchanged: a GIF stays a GIF."""
    buffer = io.BytesIO()
    Image.new("P", (3, 3)).save(buffer, "GIF")
    assert piped(buffer.getvalue(), "What?", "-", "--base-url", server.url).stdout == b"What? [1 image]\n"


def body_of(request: bytes) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(request.partition(b"\r\n\r\n")[2])
    return told


def test_how_closely_pictures_and_videos_are_looked_at(picture: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"a clip")
    arguments = ["ask", "What?", str(picture), str(clip), "--model", "m", "--image-detail", "low", "--fps", "0.5"]
    with misbehaving([reply("404 Not Found"), reply("200 OK", STREAM)]) as server:
        assert run([*arguments, "--base-url", server.url]) == 0
        parts = body_of(server.requests[-1])["messages"][0]["content"]
    assert parts[0]["image_url"]["max_pixels"] == 512 * 512
    assert parts[1]["video_url"]["fps"] == 0.5
    assert "max_pixels" not in parts[1]["video_url"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--image-detail", "low"], "--image-detail is for pictures"),
        (["--fps", "2"], "--fps is for videos"),
        (["--fps", "0"], "--fps"),
        (["--image-detail", "huge"], "--image-detail"),
        (["--schema", "nowhere.json"], "cannot read the schema"),
    ],
)
def test_wishes_that_nothing_grants(
    server: Live, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert run(["ask", "Hi", "--base-url", server.url, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and len(err.splitlines()) == 1


@pytest.fixture
def room(tmp_path: Path) -> Path:
    path = tmp_path / "room.json"
    path.write_text('{"type": "object", "properties": {"room": {"type": "integer"}}, "required": ["room"]}')
    return path


def test_an_answer_that_keeps_to_a_schema(server: Live, room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The server repeats the question."""
    arguments = ["ask", '{"room": 204}', "--schema", str(room), "--base-url", server.url]
    assert run(arguments) == 0
    assert capsys.readouterr() == ('{\n  "room": 204\n}\n', "")
    assert run([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["text"], told["value"], told["finish_reason"]) == ('{"room": 204}', {"room": 204}, "stop")


def test_an_answer_that_does_not_is_asked_for_again_and_never_printed(
    room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = STREAM.replace(b'"yes"', json.dumps('{"room": 7}').encode())
    with misbehaving([reply("200 OK", STREAM), reply("200 OK", good), reply("200 OK", STREAM)]) as server:
        arguments = ["ask", "Which room?", "--schema", str(room), "--model", "m", "--base-url", server.url]
        assert run(arguments) == 0
        first, second = (body_of(request) for request in server.requests)
        assert first["response_format"]["json_schema"]["schema"] == json.loads(room.read_text())
        assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
        assert "JSON schema" not in json.dumps(first["messages"]) and "JSON schema" in json.dumps(second["messages"][0])
        out, err = capsys.readouterr()
        assert json.loads(out) == {"room": 7} and "asked once more" in err
        assert run(arguments) == 1
        out, err = capsys.readouterr()
        assert out == "" and "does not keep to the schema" in err
