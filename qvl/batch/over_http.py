"""Asking a server: qvl's own, or any that speaks OpenAI's API.

Built on the lean HTTP of the load generator: a batch shares its machine with the server more often than not. Knows
headers. Does not know bodies, and does not try anything twice.
"""

from __future__ import annotations

import asyncio
import email.utils
import ssl
import time
from typing import Any

import msgspec

from qvl import wire
from qvl.batch.ask import NoAnswer, Reply
from qvl.bench.load.http import REUSE_SECONDS, Address, Connection, HttpError
from qvl.errors import QvlError, RequestFailed, Unavailable

CONNECT_SECONDS = 10.0


class HttpAsker:
    """Asks the server at `address`. `timeout`: seconds for one whole answer, which comes all at once."""

    num_seqs: int | None = None
    paths_as_data = True

    def __init__(self, address: Address, model: str, *, api_key: str | None = None, timeout: float = 3600.0) -> None:
        self.where = f"{address.scheme}://{address.host}:{address.port}{address.prefix}"
        self.model = model
        self._address = address
        self._api_key = api_key
        self._timeout = timeout
        self._idle: list[_Connection] = []
        self._tls = ssl.create_default_context() if address.scheme == "https" else None

    async def ask(self, url: str, body: bytes) -> Reply:
        return await self._exchange(self._address.request("POST", url, body, self._api_key), self._timeout)

    async def get(self, url: str, timeout: float) -> Reply:
        """One GET. Raises `NoAnswer`."""
        return await self._exchange(self._address.request("GET", url, api_key=self._api_key), timeout)

    async def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _exchange(self, request: bytes, timeout: float) -> Reply:
        connection = await self._connection()
        pieces: list[bytes] = []
        try:
            status = await asyncio.wait_for(connection.exchange(request, pieces.append, pieces.append), timeout)
        except HttpError as error:
            raise NoAnswer(str(error), sent=True) from error
        except (TimeoutError, asyncio.TimeoutError) as error:  # two classes before Python 3.11
            raise NoAnswer(f"no whole answer within {timeout:g} s", sent=True) from error
        finally:
            # Whatever was not read to its end cannot be used again; what is idle and open can.
            (self._idle.append if connection.is_free else _Connection.close)(connection)
        headers = connection.headers
        return Reply(status, b"".join(pieces), headers.get(b"x-request-id", b"").decode("latin-1"), _wait(headers))

    async def _connection(self) -> _Connection:
        loop = asyncio.get_running_loop()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and loop.time() - connection.idle_since < REUSE_SECONDS:
                return connection
            connection.close()
        opening = loop.create_connection(_Connection, self._address.host, self._address.port, ssl=self._tls)
        try:
            return (await asyncio.wait_for(opening, CONNECT_SECONDS))[1]
        except (OSError, TimeoutError, asyncio.TimeoutError) as error:
            raise NoAnswer(f"no connection to {self.where}: {error or 'no reply'}", sent=False) from error


class _Connection(Connection):
    """A connection that keeps the headers of the last answer and says whether another request may follow."""

    def __init__(self) -> None:
        super().__init__()
        self.headers: dict[bytes, bytes] = {}
        self.is_idle = False

    @property
    def is_free(self) -> bool:
        return self.is_idle and self.is_open

    async def exchange(self, *given: Any) -> int:
        self.is_idle = False
        status = await super().exchange(*given)
        self.is_idle = True
        return status

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self.headers[name.lower()] = value


async def connect(base_url: str, *, model: str | None, api_key: str | None, timeout: float) -> HttpAsker:
    """An asker for the server at `base_url`; `model` None takes the first that it serves.

    Raises `InvalidRequest` for what is no address, `Unavailable` when nothing answers, and what the server answers.
    """
    asker = HttpAsker(Address.read(base_url), model or "", api_key=api_key, timeout=timeout)
    try:
        names = await _models(asker)
    except NoAnswer as error:
        raise Unavailable(f"no server answers at {asker.where}; `qvl serve` starts one") from error
    except QvlError:
        if model is None:
            raise
        names = []  # some servers do not say what they serve
    finally:
        await asker.close()
    if not names and model is None:
        raise Unavailable(f"the server at {asker.where} serves no model")
    asker.model = model or names[0]
    return asker


async def probe(base_url: str, *, model: str | None, api_key: str | None, timeout: float) -> HttpAsker | None:
    """As `connect`; None unless that server is ready within two seconds and serves `model`."""
    asker = HttpAsker(Address.read(base_url), model or "", api_key=api_key, timeout=timeout)
    try:
        ready = await asker.get("/ready", 2.0)
        names = await _models(asker) if ready.status == 200 else []
    except (NoAnswer, QvlError):
        names = []
    if not names or (model is not None and model not in names):
        await asker.close()
        return None
    asker.model = model or names[0]
    return asker


async def _models(asker: HttpAsker) -> list[str]:
    reply = await asker.get("/v1/models", CONNECT_SECONDS)
    if reply.status != 200:
        raise wire.read_error(reply.status, reply.body)
    try:
        return [model["id"] for model in msgspec.json.decode(reply.body)["data"]]
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise RequestFailed(f"the server at {asker.where} does not say which models it serves") from error


def _wait(headers: dict[bytes, bytes]) -> float | None:
    """Seconds of a Retry-After header, which may also be a date."""
    text = headers.get(b"retry-after", b"").decode("latin-1").strip()
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
