"""Lines in and lines out: OpenAI's batch lines, plain bodies, pictures of this machine, refusals."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qvl.batch import media
from qvl.batch.ask import Reply, judge
from qvl.batch.lines import ANSWERED, Defaults, answer_line, error_line, mark_of, read_request
from qvl.errors import InvalidRequest

MARK = b"0123456789abcdef" * 2
MESSAGES = [{"role": "user", "content": "Hi"}]


def read(line: Any, defaults: Defaults | None = None, base: Path | None = None) -> tuple[str, dict[str, Any]]:
    data = line if isinstance(line, bytes) else json.dumps(line).encode()
    request = read_request(data, defaults or Defaults(), media.as_data_urls(base) if base is not None else None)
    return request.url, json.loads(request.body)


def test_a_batch_line_and_a_plain_body() -> None:
    body = {"model": "m", "messages": MESSAGES, "vendor_field": [1, {"a": None}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    assert read(line) == ("/v1/chat/completions", body)
    assert read(body) == ("/v1/chat/completions", body)
    assert read({"custom_id": "a", **body}) == ("/v1/chat/completions", body)
    assert read({"prompt": "Once"}) == ("/v1/completions", {"prompt": "Once"})
    assert read({**line, "url": "/v1/completions", "body": {"prompt": "x"}}) == ("/v1/completions", {"prompt": "x"})


def test_what_the_command_line_adds() -> None:
    filled = Defaults(fields={"model": "first", "max_tokens": 9})
    assert read({"messages": MESSAGES}, filled)[1] == {"messages": MESSAGES, "model": "first", "max_tokens": 9}
    given = {"messages": MESSAGES, "model": "theirs", "max_tokens": 1}
    assert read(given, filled)[1] == given
    assert read(given, Defaults("ours"))[1] == {**given, "model": "ours"}


@pytest.mark.parametrize(
    "line, says",
    [
        (b'{"messages": [', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        ('{"custom_id": "你好"}'.encode("gbk"), "it is not in UTF-8"),
        ([1], "JSON object"),
        ({"custom_id": 7, "messages": MESSAGES}, "custom_id"),
        ({"custom_id": "a", "method": "GET", "body": {"messages": MESSAGES}}, "POST"),
        ({"url": "/v1/embeddings", "body": {"input": "x"}}, "/v1/completions"),
        ({"body": [1]}, "'body'"),
        ({"body": {}}, "neither"),
        ({"messages": MESSAGES, "stream": True}, "stream"),
    ],
)
def test_what_is_no_request_is_said(line: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        read(line)


def test_nesting_beyond_all_bounds_is_an_error_of_its_line() -> None:
    with pytest.raises(InvalidRequest):
        read(b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")


def test_pictures_of_this_machine_travel_in_every_spelling(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a b.png").write_bytes(b"png")
    url = "data:image/png;base64," + base64.b64encode(b"png").decode()
    place = (tmp_path / "sub" / "a b.png").as_posix()
    parts = [
        {"type": "image_url", "image_url": {"url": "sub/a b.png", "detail": "low"}},
        {"type": "image_url", "image_url": "sub/a b.png"},
        {"type": "image", "image": place},
        {"type": "image", "image": "file://" + place.replace(" ", "%20")},
        {"type": "video", "video": ["sub/a b.png", "https://x/y.png"]},
        {"type": "image_url", "image_url": {"url": "https://x/sub/a.png"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        {"type": "text", "text": "sub/a b.png"},
    ]
    _, body = read({"messages": [{"role": "user", "content": parts}]}, base=tmp_path)
    sent = body["messages"][0]["content"]
    assert sent[0] == {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    assert [part.get("image_url", part.get("image")) for part in sent[1:4]] == [url] * 3
    assert sent[4]["video"] == [url, "https://x/y.png"]
    assert sent[5:] == parts[5:]


def test_a_picture_that_is_not_there_is_an_error_of_its_line(tmp_path: Path) -> None:
    line = {"messages": [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}]}
    with pytest.raises(InvalidRequest, match=r"gone\.png"):
        read(line, base=tmp_path)
    assert read(line)[1] == line  # without a base, addresses are the server's business


def test_an_answer_line_is_openai_s() -> None:
    body = {"id": "chatcmpl-1", "choices": [], "usage": {"prompt_tokens": 1}}
    line = answer_line(MARK, 'a "quoted" ü', Reply(200, json.dumps(body, indent=2).encode()))
    assert b"\n" not in line
    assert line.endswith(ANSWERED)
    assert mark_of(line) == MARK
    response = {"status_code": 200, "request_id": "chatcmpl-1", "body": body}
    told = json.loads(line)
    assert told == {
        "id": f"batch_req_{MARK.decode()}",
        "custom_id": 'a "quoted" ü',
        "response": response,
        "error": None,
    }


def test_a_refusal_is_told_in_both_places() -> None:
    body = {"error": {"message": "no", "type": "t", "param": None, "code": "invalid_media"}}
    told = json.loads(answer_line(MARK, "a", Reply(400, json.dumps(body).encode(), "r1")))
    assert told["response"] == {"status_code": 400, "request_id": "r1", "body": body}
    assert told["error"] == {"code": "invalid_media", "message": "no"}
    page = json.loads(answer_line(MARK, "a", Reply(502, b"<html>bad\ngateway</html>")))
    assert "bad gateway" in page["response"]["body"]["error"]["message"]
    lost = json.loads(error_line(MARK, "a", InvalidRequest("not JSON")))
    assert (lost["response"], lost["error"]) == (None, {"code": "invalid_value", "message": "not JSON"})


@pytest.mark.parametrize(
    "reply, verdict",
    [
        (Reply(200, b'{"usage": null}'), "done"),
        (Reply(200, b"<html>"), "broken"),
        (Reply(200, b'{"a": "\xff"}'), "broken"),
        (Reply(200, b"[1]"), "broken"),
        (Reply(400, b"{}"), "refused"),
        (Reply(404, b"{}"), "refused"),
        (Reply(401, b"{}"), "stop"),
        (Reply(408, b"{}"), "broken"),
        (Reply(429, b"{}"), "busy"),
        (Reply(429, b'{"error": {"code": "insufficient_quota"}}'), "stop"),
        (Reply(500, b"{}"), "broken"),
        (Reply(502, b""), "broken"),
        (Reply(503, b"{}"), "busy"),
    ],
)
def test_what_is_made_of_an_answer(reply: Reply, verdict: str) -> None:
    assert judge(reply) == verdict


def test_bodies_are_handed_on_without_loss() -> None:
    """Big integers, exponents and escapes survive: the body of an answer is never taken apart."""
    body = b'{"choices":[],"big":123456789012345678901234567890,"f":1e-300,"s":"\\u0000\\ud83d\\ude00"}'
    line = answer_line(MARK, "a", Reply(200, body))
    assert body in line
    assert msgspec.json.decode(line)["response"]["body"]["s"] == "\x00😀"
