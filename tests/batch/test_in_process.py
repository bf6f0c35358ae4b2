"""Without a server: a backend answers on the same loop, in the same shapes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from qvl.backends.echo import EchoBackend
from qvl.batch import Asker, BatchOptions, Defaults, JsonLines, Pictures, Report, run_batch
from qvl.batch.in_process import BackendAsker
from qvl.batch.source import Source
from qvl.errors import Overloaded


def batch(source: Source, output: Path, backend: EchoBackend, options: BatchOptions | None = None) -> Report:
    async def open_asker() -> Asker:
        await backend.start()
        return BackendAsker(backend, "echo in process")

    return asyncio.run(run_batch(source, output, open_asker, options or BatchOptions()))


def test_every_kind_of_line(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Hello"}]}
    lines: list[dict[str, Any]] = [
        {"custom_id": "chat", "body": {**chat, "model": "gpt-of-somebody", "max_tokens": 3, "n": 2}},
        {"custom_id": "plain", "url": "/v1/completions", "body": {"prompt": ["ab", "cd"]}},
        {"custom_id": "wrong", "body": {**chat, "temperature": -1}},
        {"custom_id": "long", "body": {"messages": [{"role": "user", "content": "x" * 50_000}]}},
        {"custom_id": "big", "body": {**chat, "metadata": {"pad": "y" * 50_000}}},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = batch(JsonLines(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", EchoBackend("parrot"))
    told = {a["custom_id"]: a for a in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert list(told) == ["chat", "plain", "wrong", "long", "big"]
    body = told["chat"]["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["model"] == "parrot"  # one model was loaded, and it answers
    assert [choice["message"]["content"] for choice in body["choices"]] == ["Hel", "Hel"]
    assert body["usage"]["completion_tokens"] == 6
    assert body["id"] == told["chat"]["response"]["request_id"]
    assert [choice["text"] for choice in told["plain"]["response"]["body"]["choices"]] == ["ab", "cd"]
    assert (told["wrong"]["response"]["status_code"], told["wrong"]["error"]["code"]) == (400, "invalid_value")
    assert told["long"]["error"]["code"] == "context_length_exceeded"
    assert told["big"]["error"] is None
    assert (report.answered, report.failed, report.where) == (3, 2, "echo in process")


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    for name in ("b", "a"):
        Image.new("RGB", (30, 30)).save(tmp_path / f"{name}.png")
    batch(Pictures(tmp_path, "Read.", {"max_tokens": 50}), tmp_path / "out.jsonl", EchoBackend())
    told = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [a["custom_id"] for a in told] == ["a.png", "b.png"]
    texts = {a["response"]["body"]["choices"][0]["message"]["content"] for a in told}
    assert texts == {"Read. [1 image]"}


def test_what_is_skipped_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hello"}]}))
    source = JsonLines(tmp_path / "in.jsonl")
    source.skipped = "'a.png' is skipped"
    told: list[str] = []

    async def open_asker() -> Asker:
        backend = EchoBackend()
        await backend.start()
        return BackendAsker(backend, "echo in process")

    asyncio.run(run_batch(source, tmp_path / "out.jsonl", open_asker, tell=told.append))
    assert told == ["'a.png' is skipped"]


def test_a_full_engine_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a backend raises goes by the same rules as what a server answers."""
    backend = EchoBackend()
    real = backend.chat
    refused: list[str] = []

    def full_once(request: Any, request_id: str) -> Any:
        if not refused:
            refused.append(request_id)
            raise Overloaded("no room for pictures", retry_after=0)
        return real(request, request_id)

    monkeypatch.setattr(backend, "chat", full_once)
    (tmp_path / "in.jsonl").write_bytes(msgspec.json.encode({"messages": [{"role": "user", "content": "Hi"}]}))
    report = batch(JsonLines(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", backend, BatchOptions(retries=0))
    assert (report.answered, report.asked_again) == (1, 1)


def test_as_many_are_under_way_as_the_engine_computes_at_once(tmp_path: Path) -> None:
    lines = [{"messages": [{"role": "user", "content": f"{i:04}"}]} for i in range(100)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    backend = EchoBackend(max_num_seqs=16, seconds_per_token=0.002)
    report = batch(JsonLines(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", backend, BatchOptions(defaults=Defaults()))
    assert 16 <= report.concurrency <= 20
