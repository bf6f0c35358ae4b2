"""Where the store's file is, and how it is opened so that several processes share it. Does not know its tables."""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qvl.errors import ConfigError, Unavailable

BUSY_SECONDS = 30.0


def data_folder() -> Path:
    """Where qvl keeps what belongs to its user: QVL_HOME, else the system's place for such data."""
    home = os.environ.get("QVL_HOME")
    if home:
        return Path(os.path.expanduser(home))
    named, usual = {
        "darwin": (None, "~/Library/Application Support"),
        "win32": (os.environ.get("LOCALAPPDATA"), "~/AppData/Local"),
    }.get(sys.platform, (os.environ.get("XDG_DATA_HOME"), "~/.local/share"))
    folder = Path(named or os.path.expanduser(usual)) / "qvl"
    if not folder.is_absolute():
        raise ConfigError("there is no home folder to keep conversations in; name one with QVL_HOME=/some/folder")
    return folder


def connect(path: Path) -> sqlite3.Connection:
    """The file, made if need be for its owner's eyes only; what is deleted in it is overwritten.

    Raises `ConfigError` for a place that cannot be used or a file of another kind, `Unavailable` when others hold it.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        db = sqlite3.connect(path, BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot open the store of conversations {path}: {reason}") from error
    try:
        with sqlite_errors(path):
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("PRAGMA secure_delete = ON")
            db.execute("PRAGMA synchronous = FULL")
            _use_wal(db)
    except BaseException:
        db.close()
        raise
    return db


def _use_wal(db: sqlite3.Connection) -> None:
    """Readers beside a writer. Changing the mode waits for nobody by itself, so two first openers take turns here."""
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
        else:
            return


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """What SQLite raises, in our words."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise Unavailable(f"the store of conversations {path} cannot be used now: {error}") from error
    except sqlite3.DatabaseError as error:
        if type(error) is not sqlite3.DatabaseError:  # a broken rule of ours, not a broken file
            raise
        raise ConfigError(f"{path} is no store of conversations: {error}") from error
