"""A chat server on a real socket that does what a script says, in a process of its own or in a thread.

    python tests/batch/scripted.py PORT SECONDS LOG     echoes the last text, after a random time of up to 2 * SECONDS

Every request that it has read is a line of LOG, so a test can see what was asked twice. It answers as many requests as
the last number on its standard input says, and lets the others wait.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """What to do about one request: `status` None closes the connection instead of an answer."""

    status: int | None = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


Script = Callable[[dict[str, Any], int], Answer]  # (body, how often this text was asked before) -> what to do


def text_of(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def echo(body: dict[str, Any], asked: int = 0) -> Answer:
    text = text_of(body)
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": len(text), "completion_tokens": 3, "total_tokens": len(text) + 3}
    return Answer(body={"id": f"chatcmpl-{text}", "object": "chat.completion", "choices": [choice], "usage": usage})


def refusal(status: int, code: str = "no", **headers: str) -> Answer:
    told = {"error": {"message": f"refused with {status}", "type": "t", "param": None, "code": code}}
    return Answer(status, told, {name.replace("_", "-"): value for name, value in headers.items()})


@dataclass
class Scripted:
    """The running server: what it was asked, and how many requests were open at once at most."""

    script: Script
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    running: int = 0
    most: int = 0
    asked: dict[str, int] = field(default_factory=dict)
    heard: Callable[[str], None] = lambda text: None
    most_answers: int = sys.maxsize
    num_answers: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        data = await reader.readexactly(int(lines.get("content-length", "0")))
        if not data:
            self._write(writer, Answer(body={"data": [{"id": "scripted"}], "status": "ready"}))
            return True
        body = json.loads(data)
        text = text_of(body)
        self.bodies.append(body)
        self.keys.append(lines.get("authorization", ""))
        self.heard(text)
        self.running += 1
        self.most = max(self.most, self.running)
        answer = self.script(body, self.asked.get(text, 0))
        self.asked[text] = self.asked.get(text, 0) + 1
        while self.num_answers >= self.most_answers:
            await asyncio.sleep(0.005)
        self.num_answers += 1
        await asyncio.sleep(answer.seconds)
        self.running -= 1
        if answer.status is None:
            return False
        self._write(writer, answer)
        return True

    def _write(self, writer: asyncio.StreamWriter, answer: Answer) -> None:
        data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **answer.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {answer.status} X\r\n{head}\r\n".encode() + data)


@contextmanager
def scripted(script: Script = echo) -> Iterator[Scripted]:
    """In a thread of this process, for the time of a block."""
    server = Scripted(script)
    loop = asyncio.new_event_loop()
    listening = loop.run_until_complete(asyncio.start_server(server.serve, "127.0.0.1", 0, limit=1 << 24))
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(_end_all(listening), loop).result(120)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(120)
        loop.close()


async def _end_all(listening: asyncio.Server) -> None:
    listening.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def main(port: int, seconds: float, log: str) -> None:
    """Until it is killed."""

    def slow(body: dict[str, Any], asked: int) -> Answer:
        answer = echo(body)
        answer.seconds = random.uniform(0, 2 * seconds)
        return answer

    def obey(server: Scripted) -> None:
        for line in sys.stdin:
            server.most_answers = int(line)

    async def run() -> None:
        with open(log, "a", buffering=1, encoding="utf-8") as file:
            server = Scripted(slow, heard=lambda text: print(text, file=file), most_answers=0)
            threading.Thread(target=obey, args=(server,), daemon=True).start()
            listening = await asyncio.start_server(server.serve, "127.0.0.1", port)
            print(listening.sockets[0].getsockname()[1], flush=True)
            await listening.serve_forever()

    asyncio.run(run())


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
