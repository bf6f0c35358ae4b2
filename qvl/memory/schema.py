"""The history of the store's schema, one small function per step, and the index that makes it searchable.

`PRAGMA user_version` is the number of steps a file has behind it. A released step is never changed: a new one follows.
Knows tables. Does not know what conversations do with them.
"""

from __future__ import annotations

import json
import sqlite3
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from qvl.errors import ConfigError

Migration: TypeAlias = Callable[[sqlite3.Connection], None]


def m001_conversations_and_turns(db: sqlite3.Connection) -> None:
    """Turns are never renumbered; ids are never used again."""
    db.execute("CREATE TABLE conversations (id TEXT PRIMARY KEY, name TEXT NOT NULL, created TEXT NOT NULL)")
    db.execute(
        "CREATE TABLE turns (id INTEGER PRIMARY KEY AUTOINCREMENT,"
        " conversation_id TEXT NOT NULL REFERENCES conversations(id) ON DELETE CASCADE,"
        " number INTEGER NOT NULL, role TEXT NOT NULL, parts TEXT NOT NULL, created TEXT NOT NULL,"
        " UNIQUE (conversation_id, number))"
    )


def m002_media(db: sqlite3.Connection) -> None:
    """Pictures and videos beside the turns, once each."""
    db.execute(
        "CREATE TABLE media (digest TEXT PRIMARY KEY, num_bytes INTEGER NOT NULL, data BLOB, path TEXT, url TEXT,"
        " CHECK (data IS NOT NULL OR path IS NOT NULL OR url IS NOT NULL))"
    )
    db.execute(
        "CREATE TABLE turn_media (turn_id INTEGER NOT NULL REFERENCES turns(id) ON DELETE CASCADE,"
        " digest TEXT NOT NULL REFERENCES media(digest), PRIMARY KEY (turn_id, digest)) WITHOUT ROWID"
    )
    db.execute("CREATE INDEX turn_media_by_digest ON turn_media (digest)")


def m003_usage(db: sqlite3.Connection) -> None:
    """Who answered, why it ended, what it took."""
    db.execute("ALTER TABLE turns ADD COLUMN model TEXT")
    db.execute("ALTER TABLE turns ADD COLUMN finish_reason TEXT")
    for name in ("prompt_tokens", "completion_tokens", "cached_tokens"):
        db.execute(f"ALTER TABLE turns ADD COLUMN {name} INTEGER")


def m004_summaries(db: sqlite3.Connection) -> None:
    """A summary stands for the turns with numbers below `covers`; older ones are kept."""
    db.execute(
        "CREATE TABLE summaries (id INTEGER PRIMARY KEY AUTOINCREMENT,"
        " conversation_id TEXT NOT NULL REFERENCES conversations(id) ON DELETE CASCADE,"
        " covers INTEGER NOT NULL, text TEXT NOT NULL, tokens INTEGER NOT NULL, created TEXT NOT NULL)"
    )
    db.execute("CREATE INDEX summaries_by_conversation ON summaries (conversation_id, covers)")


def m005_plain_text(db: sqlite3.Connection) -> None:
    """What is searched: the texts of a turn, folded as `fold` does."""
    db.execute("ALTER TABLE turns ADD COLUMN plain TEXT NOT NULL DEFAULT ''")
    for turn_id, parts in db.execute("SELECT id, parts FROM turns").fetchall():
        texts = (part["text"] for part in json.loads(parts) if part["type"] == "text")
        db.execute("UPDATE turns SET plain = ? WHERE id = ?", (fold("\n".join(texts)), turn_id))


MIGRATIONS: tuple[Migration, ...] = (
    m001_conversations_and_turns,
    m002_media,
    m003_usage,
    m004_summaries,
    m005_plain_text,
)


def fold(text: str) -> str:
    """Upper and lower case, full and half width are the same to a search."""
    return unicodedata.normalize("NFKC", text).casefold()


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of what is written inside, or nothing; others that write wait."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def migrate(db: sqlite3.Connection) -> None:
    """Bring the file to the newest schema, one transaction per step; another process may do the same at once.

    Raises `ConfigError` for a file that a newer qvl wrote.
    """
    while True:
        with transaction(db):
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version < len(MIGRATIONS):
                MIGRATIONS[version](db)
                db.execute(f"PRAGMA user_version = {version + 1}")
        if version > len(MIGRATIONS):
            raise ConfigError(
                f"a newer qvl wrote this store of conversations: it has schema {version}, {len(MIGRATIONS)} is known"
            )
        if version >= len(MIGRATIONS) - 1:
            return


def ensure_search(db: sqlite3.Connection) -> bool:
    """Whether there is a full-text index; it is made when this SQLite can (three characters and more, any script).

    Triggers keep it in step. Raises `ConfigError` where a file has one that this SQLite cannot keep up.
    """
    found = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'turns_fts'").fetchone()
    if not _has_trigrams(db):
        if found:
            raise ConfigError("this Python's SQLite lacks FTS5, with which the store of conversations was made")
        return False
    if not found:
        with transaction(db):
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'turns_fts'").fetchone():
                _make_index(db)
    return True


def _make_index(db: sqlite3.Connection) -> None:
    db.execute(
        "CREATE VIRTUAL TABLE turns_fts USING fts5(plain, content='turns', content_rowid='id',"
        " tokenize='trigram case_sensitive 1')"
    )
    db.execute("INSERT INTO turns_fts(turns_fts) VALUES ('rebuild')")
    db.execute(
        "CREATE TRIGGER turns_fts_insert AFTER INSERT ON turns BEGIN"
        " INSERT INTO turns_fts(rowid, plain) VALUES (new.id, new.plain); END"
    )
    db.execute(
        "CREATE TRIGGER turns_fts_delete AFTER DELETE ON turns BEGIN"
        " INSERT INTO turns_fts(turns_fts, rowid, plain) VALUES ('delete', old.id, old.plain); END"
    )


def _has_trigrams(db: sqlite3.Connection) -> bool:
    try:
        db.execute("CREATE VIRTUAL TABLE temp.probe_fts USING fts5(x, tokenize='trigram')")
    except sqlite3.OperationalError:
        return False
    db.execute("DROP TABLE temp.probe_fts")
    return True
