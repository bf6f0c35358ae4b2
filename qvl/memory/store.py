"""Where conversations live: one SQLite file, for several processes at once.

A turn is written whole, in one transaction, and leaves only when somebody cuts or forgets it. Knows rows. Does not know
windows, budgets or models.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from qvl.errors import InvalidRequest
from qvl.memory.database import connect, data_folder, sqlite_errors
from qvl.memory.media import Keep, Kept, StoredMedia, digests_of, keep_media, read_parts, write_parts
from qvl.memory.records import Forgotten, Hit, Info, Summary, Turn, opening, plain_text, read_turn, snippet
from qvl.memory.schema import ensure_search, fold, migrate, transaction
from qvl.types import FinishReason, MediaPart, Message, Usage

_TRIGRAM = 3


class Store:
    """All conversations of one file (default: `conversations.db` in `data_folder`), which only its owner can read.

    Safe to use from several threads and from several processes. Close it, or use it as a context manager. Raises
    `ConfigError` for a file that is not such a store, `Unavailable` when others hold it for too long.
    """

    def __init__(self, path: str | Path | None = None, *, keep: Keep = Keep()) -> None:  # noqa: B008  (frozen)
        self.path = Path(path).expanduser() if path is not None else data_folder() / "conversations.db"
        self.keep = keep
        self._lock = threading.RLock()
        self._db = connect(self.path)
        try:
            with sqlite_errors(self.path):
                migrate(self._db)
                self.has_index = ensure_search(self._db)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it, or nothing."""
        with self._lock, sqlite_errors(self.path), transaction(self._db):
            yield self._db

    def _read(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock, sqlite_errors(self.path):
            return self._db.execute(sql, values).fetchall()

    # Writing

    def append(
        self,
        conversation_id: str,
        message: Message,
        *,
        name: str = "",
        model: str | None = None,
        finish_reason: FinishReason | None = None,
        usage: Usage | None = None,
    ) -> Turn:
        """Write one turn at the end; the first one makes the conversation, called `name`.

        Raises what keeping its pictures raises (`InvalidRequest`, `BadMedia`, `PayloadTooLarge`); nothing is written
        then.
        """
        now = _now()
        with self._writing() as db:
            db.execute("INSERT OR IGNORE INTO conversations VALUES (?, ?, ?)", (conversation_id, name, now))
            parts = write_parts(message, lambda source: _keep(db, source, self.keep))
            stored = replace(message, parts=read_parts(parts))
            rows = "SELECT coalesce(max(number) + 1, 0) FROM turns WHERE conversation_id = ?"
            (number,) = db.execute(rows, (conversation_id,)).fetchone()
            tokens = (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) if usage else (None,) * 3
            cursor = db.execute(
                "INSERT INTO turns (conversation_id, number, role, parts, created, model, finish_reason,"
                " prompt_tokens, completion_tokens, cached_tokens, plain) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(conversation_id, number, message.role, parts, now, model, finish_reason),
                    *tokens,
                    plain_text(message),
                ),
            )
            turn_id = cursor.lastrowid
            assert turn_id is not None
            links = {(turn_id, digest) for digest in digests_of(stored)}
            db.executemany("INSERT INTO turn_media VALUES (?, ?)", sorted(links))
        return Turn(turn_id, number, stored, now, model, finish_reason, usage)

    def add_summary(self, conversation_id: str, covers: int, text: str, tokens: int) -> None:
        """Remember a running summary; the turns it covers stay as they are."""
        with self._writing() as db:
            db.execute(
                "INSERT INTO summaries (conversation_id, covers, text, tokens, created) VALUES (?, ?, ?, ?, ?)",
                (conversation_id, covers, text, tokens, _now()),
            )

    def rename(self, conversation_id: str, name: str) -> None:
        """Raises `InvalidRequest` where there is no such conversation."""
        with self._writing() as db:
            if not db.execute("UPDATE conversations SET name = ? WHERE id = ?", (name, conversation_id)).rowcount:
                raise _no_such(conversation_id)

    def take_back(self, turn: Turn) -> None:
        """Remove one turn that was refused, whatever came after it."""
        with self._writing() as db:
            db.execute("DELETE FROM turns WHERE id = ?", (turn.id,))
            _drop_unused_media(db)

    def cut(self, conversation_id: str, number: int) -> int:
        """Remove the turns from `number` on, and the summaries that told of them. Returns how many turns went."""
        with self._writing() as db:
            values = (conversation_id, number)
            gone = db.execute("DELETE FROM turns WHERE conversation_id = ? AND number >= ?", values).rowcount
            db.execute("DELETE FROM summaries WHERE conversation_id = ? AND covers > ?", values)
            _drop_unused_media(db)
        return gone

    def forget(self, conversation_id: str) -> Forgotten:
        """Delete a conversation for good: overwritten in the file, gone from the index and the log, the file shrunk.

        Pictures that other conversations use too stay. Raises `InvalidRequest` where there is no such conversation.
        """
        with self._writing() as db:
            (turns,) = db.execute("SELECT count(*) FROM turns WHERE conversation_id = ?", (conversation_id,)).fetchone()
            if not db.execute("DELETE FROM conversations WHERE id = ?", (conversation_id,)).rowcount:
                raise _no_such(conversation_id)
            media = _drop_unused_media(db)
            if self.has_index:
                db.execute("INSERT INTO turns_fts(turns_fts) VALUES ('optimize')")
        return Forgotten(turns, media, self._compact())

    def _compact(self) -> bool:
        with self._lock:
            try:
                self._db.execute("VACUUM")
                busy = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            except sqlite3.OperationalError:  # others are reading or writing: what was deleted is overwritten anyway
                return False
        return not busy

    # Reading

    def turn_ids(self, conversation_id: str) -> list[int]:
        """The ids of all turns in order: the same ids are the same turns, and a new turn has a new id."""
        rows = self._read("SELECT id FROM turns WHERE conversation_id = ? ORDER BY number", (conversation_id,))
        return [row[0] for row in rows]

    def turns(self, conversation_id: str, first: int = 0) -> list[Turn]:
        """The turns with numbers from `first` on in order; none for a conversation that is not there."""
        rows = self._read(
            "SELECT id, number, role, parts, created, model, finish_reason,"
            " prompt_tokens, completion_tokens, cached_tokens"
            " FROM turns WHERE conversation_id = ? AND number >= ? ORDER BY number",
            (conversation_id, first),
        )
        return [read_turn(row) for row in rows]

    def summaries(self, conversation_id: str) -> list[Summary]:
        """The running summaries of a conversation, the one in force last."""
        rows = self._read(
            "SELECT covers, text, tokens, created FROM summaries WHERE conversation_id = ? ORDER BY covers, id",
            (conversation_id,),
        )
        return [Summary(*row) for row in rows]

    def resolve(self, message: Message) -> Message:
        """The message with its pictures as they can be sent: bytes, paths and addresses instead of `StoredMedia`."""
        parts = tuple(
            replace(part, source=self._source(part.source)) if isinstance(part, MediaPart) else part
            for part in message.parts
        )
        return replace(message, parts=parts)

    def media(self, digest: str) -> Kept:
        """One kept picture or video. Raises `InvalidRequest` where there is none."""
        rows = self._read("SELECT digest, num_bytes, data, path, url FROM media WHERE digest = ?", (digest,))
        if not rows:
            raise InvalidRequest(f"the store has no picture {digest}")
        return Kept(*rows[0])

    def _source(self, source: Any) -> Any:
        if isinstance(source, tuple):
            return tuple(self._source(frame) for frame in source)
        return self.media(source.digest).source if isinstance(source, StoredMedia) else source

    def conversations(self, limit: int = 100) -> list[Info]:
        """The conversations, the one with the newest turn first."""
        rows = self._read(
            "SELECT c.id, c.name, c.created, max(t.created), count(t.id),"
            " (SELECT parts FROM turns WHERE conversation_id = c.id AND role = 'user' ORDER BY number LIMIT 1)"
            " FROM conversations c LEFT JOIN turns t ON t.conversation_id = c.id"
            " GROUP BY c.id ORDER BY max(t.id) DESC LIMIT ?",
            (limit,),
        )
        return [
            Info(id, name, name or opening(parts), created, updated or created, count)
            for id, name, created, updated, count, parts in rows
        ]

    def find(self, word: str) -> str:
        """The id of a conversation by its id, the beginning of its id, or its name ("last": the newest).

        Raises `InvalidRequest` when none or several answer to `word`.
        """
        known = self.conversations(limit=-1)
        for match in (
            [info.id for info in known if info.id == word],
            [info.id for info in known if word and info.name == word],
            [info.id for info in known if word and info.id.startswith(word)],
            [info.id for info in known[:1] if word == "last"],
        ):
            if len(match) > 1:
                raise InvalidRequest(f"'{word}' names {len(match)} conversations: {', '.join(match[:5])}")
            if match:
                return match[0]
        raise _no_such(word)

    def search(self, query: str, limit: int = 20) -> list[Hit]:
        """Turns that hold every word of `query`, newest first; case and width of letters do not count.

        Words match anywhere, so Chinese needs no spaces. Long words use the index, short ones are looked for.
        """
        words = fold(query).split()
        if not words:
            return []
        long = [word for word in words if len(word) >= _TRIGRAM] if self.has_index else []
        conditions, values = [], []
        if long:
            conditions.append("t.id IN (SELECT rowid FROM turns_fts WHERE turns_fts MATCH ?)")
            values.append(" AND ".join('"' + word.replace('"', '""') + '"' for word in long))
        for word in words:
            if word not in long:
                conditions.append("instr(t.plain, ?) > 0")
                values.append(word)
        rows = self._read(
            "SELECT t.conversation_id, c.name, t.number, t.role, t.parts, t.created,"
            " (SELECT parts FROM turns WHERE conversation_id = c.id AND role = 'user' ORDER BY number LIMIT 1)"
            f" FROM turns t JOIN conversations c ON c.id = t.conversation_id WHERE {' AND '.join(conditions)}"
            " ORDER BY t.id DESC LIMIT ?",
            (*values, limit),
        )
        return [
            Hit(id, name or opening(first), number, role, snippet(parts, words[0]), created)
            for id, name, number, role, parts, created, first in rows
        ]


def new_id() -> str:
    """An id for a conversation that nobody has yet."""
    return secrets.token_hex(6)


def _keep(db: sqlite3.Connection, source: Any, rule: Keep) -> str:
    if isinstance(source, StoredMedia):
        return source.digest
    (used,) = db.execute("SELECT coalesce(sum(length(data)), 0) FROM media").fetchone()
    kept = keep_media(source, rule, rule.all - used)
    # A picture that was only a path or an address before gets its bytes now, never the other way round.
    db.execute(
        "INSERT INTO media (digest, num_bytes, data, path, url) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT (digest) DO UPDATE"
        " SET data = coalesce(data, excluded.data), path = coalesce(path, excluded.path)",
        (kept.digest, kept.num_bytes, kept.data, kept.path, kept.url),
    )
    return kept.digest


def _drop_unused_media(db: sqlite3.Connection) -> int:
    return db.execute("DELETE FROM media WHERE digest NOT IN (SELECT digest FROM turn_media)").rowcount


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _no_such(word: str) -> InvalidRequest:
    return InvalidRequest(f"no conversation answers to '{word}'")
