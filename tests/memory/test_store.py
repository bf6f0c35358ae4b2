"""The file: what is written stays, what is forgotten is gone, and several processes share it."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qvl.errors import BadMedia, ConfigError, InvalidRequest, PayloadTooLarge, Unavailable
from qvl.memory import Keep, Store, data_folder, database, export_json, export_markdown, schema
from qvl.memory.media import StoredMedia, media_key
from qvl.memory.schema import MIGRATIONS
from qvl.types import MediaPart, Message, PixelLimits, TextPart, Usage
from tests.memory.scripted import said, text_of, user

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path):  # type: ignore[no-untyped-def]
    with Store(tmp_path / "talk.db") as opened:
        yield opened


def write_png(path: Path, value: int = 0) -> Path:
    Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(path)
    return path


def test_turns_come_back_as_they_were(store: Store, tmp_path: Path) -> None:
    png = write_png(tmp_path / "a.png")
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    sources = ["https://example.org/cat.png", png.read_bytes(), png, str(png), f"file://{png}", Image.fromarray(pixels)]
    limits = PixelLimits(max_pixels=5000)
    frames = (png, "https://example.org/2.png")
    message = Message(
        "user",
        (TextPart("héllo 世界 👩‍👩‍👧"), *(MediaPart("image", s, limits) for s in sources), MediaPart("video", frames)),
    )
    turn = store.append("c", message)
    answer = store.append("c", said("yes"), model="m", finish_reason="stop", usage=Usage(10, 2, 3))
    assert store.turns("c") == [turn, answer]
    assert answer.usage == Usage(10, 2, 3)
    back = store.resolve(store.turns("c")[0].message)
    assert back.parts[0] == message.parts[0]
    got = [part.source for part in back.parts if isinstance(part, MediaPart)]
    assert got[0] == sources[0]
    assert got[1:5] == [png.read_bytes()] * 4
    assert np.array_equal(np.asarray(Image.open(__import__("io").BytesIO(got[5]))), pixels)
    assert got[6] == (png.read_bytes(), "https://example.org/2.png")
    assert back.parts[1].limits == limits  # type: ignore[union-attr]
    (rows,) = store._read("SELECT count(*) FROM media")
    assert rows[0] == 4, "the same bytes are kept once"


def test_pictures_survive_their_files(store: Store, tmp_path: Path) -> None:
    png = write_png(tmp_path / "a.png")
    data = png.read_bytes()
    turn = store.append("c", user(MediaPart("image", png)))
    png.unlink()
    assert store.resolve(turn.message).parts[0].source == data  # type: ignore[union-attr]


def test_the_caps(tmp_path: Path) -> None:
    png = write_png(tmp_path / "a.png")
    size = png.stat().st_size
    with Store(tmp_path / "talk.db", keep=Keep(one=size - 1)) as store:
        turn = store.append("c", user(MediaPart("image", png)))
        assert store.resolve(turn.message).parts[0].source == png  # type: ignore[union-attr]
        with pytest.raises(PayloadTooLarge, match="above what the store keeps"):
            store.append("c", user(MediaPart("image", png.read_bytes())))
        assert len(store.turns("c")) == 1
    with Store(tmp_path / "talk.db", keep=Keep(all=size)) as store:
        turn = store.append("c", user(MediaPart("image", png.read_bytes())))
        assert store.resolve(turn.message).parts[0].source == png.read_bytes(), "bytes replace the path"  # type: ignore[union-attr]
        other = write_png(tmp_path / "b.png", 9)
        turn = store.append("c", user(MediaPart("image", other)))
        assert store.resolve(turn.message).parts[0].source == other  # type: ignore[union-attr]


def test_a_turn_with_a_bad_picture_is_not_written_at_all(store: Store, tmp_path: Path) -> None:
    png = write_png(tmp_path / "a.png")
    for bad, error in (
        (tmp_path / "gone.png", InvalidRequest),
        ("data:image/png;base64,???", BadMedia),
        ("data:nothing", BadMedia),
        (object(), BadMedia),
        (np.zeros((2, 2, 7), np.float64), BadMedia),
    ):
        with pytest.raises(error):
            store.append("c", user(MediaPart("image", png), MediaPart("image", bad)))
    assert store.conversations() == []
    assert store._read("SELECT * FROM media") == []


def test_names_ids_and_lists(store: Store) -> None:
    for name, id in (("", "abc1"), ("cats", "abd2"), ("cats", "bcd3")):
        store.append(id, user(f"What about {id}, and so on and on and on and on and on and on?"), name=name)
        store.append(id, said("well"))
    listed = store.conversations()
    assert [info.id for info in listed] == ["bcd3", "abd2", "abc1"]
    assert [info.title for info in listed][:2] == ["cats", "cats"]
    assert listed[2].title.startswith("What about abc1")
    assert listed[2].title.endswith("…")
    assert len(listed[2].title) == 60
    assert listed[0].num_turns == 2
    assert listed[0].updated >= listed[0].created
    assert (store.find("abc"), store.find("last"), store.find("bcd3")) == ("abc1", "bcd3", "bcd3")
    for word, says in (("ab", "names 2"), ("cats", "names 2"), ("zebra", "no conversation"), ("", "no conversation")):
        with pytest.raises(InvalidRequest, match=says):
            store.find(word)
    store.rename("abd2", "dogs")
    assert store.find("dogs") == "abd2"
    with pytest.raises(InvalidRequest):
        store.rename("nobody", "x")
    store.append("abc1", user("again"))
    assert store.find("last") == "abc1"


SAYINGS = (
    "The quick brown fox jumps over the lazy dog",
    "我们明天去北京大学参观，下午三点出发",
    'ＦＵＬＬ　ｗｉｄｔｈ and Größe and 100% "quoted" under_score',
    "この写真は京都で撮りました",
)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("fox", [0]),
        ("FOX lazy", [0]),
        ("fox 北京", []),
        ("北京", [1]),
        ("大学", [1]),
        ("北京大学", [1]),
        ("三点", [1]),
        ("full WIDTH", [2]),
        ("grösse", [2]),
        ('"quoted"', [2]),
        ("100%", [2]),
        ("r_s", [2]),
        ("r%s", []),
        ("京", [1, 3]),
        ("the", [0]),
        ("nothing", []),
        ("AND OR NOT", []),
        ("", []),
    ],
)
def test_search(tmp_path: Path, query: str, found: list[int], indexed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not indexed:
        monkeypatch.setattr(schema, "_has_trigrams", lambda db: False)
    with Store(tmp_path / "talk.db") as store:
        assert store.has_index == indexed
        for number, saying in enumerate(SAYINGS):
            store.append(f"c{number}", user(saying))
        hits = store.search(query)
        assert sorted(int(hit.conversation_id[1:]) for hit in hits) == found
        assert all(len(hit.snippet) > 0 for hit in hits)


def test_a_snippet_shows_the_find(store: Store) -> None:
    store.append("c", user("a " * 200 + "needle" + " b" * 200), name="hay")
    (hit,) = store.search("needle")
    assert "needle" in hit.snippet
    assert len(hit.snippet) < 100
    assert (hit.title, hit.number, hit.role) == ("hay", 0, "user")


def test_an_index_is_made_later_where_there_was_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(schema, "_has_trigrams", lambda db: False)
        with Store(tmp_path / "talk.db") as store:
            store.append("c", user("needle"))
    with Store(tmp_path / "talk.db") as store:
        assert store.has_index
        assert len(store.search("needle")) == 1
    monkeypatch.setattr(schema, "_has_trigrams", lambda db: False)
    with pytest.raises(ConfigError, match="lacks FTS5"):
        Store(tmp_path / "talk.db")


def test_summaries_and_cuts(store: Store) -> None:
    for i in range(6):
        store.append("c", user(f"q{i}") if i % 2 == 0 else said(f"a{i}"))
    store.add_summary("c", 2, "First.", 3)
    store.add_summary("c", 4, "Second.", 3)
    assert [summary.text for summary in store.summaries("c")] == ["First.", "Second."]
    assert len(store.turns("c")) == 6, "what is summarised stays"
    assert store.cut("c", 3) == 3
    assert [summary.text for summary in store.summaries("c")] == ["First."]
    assert [text_of(turn.message) for turn in store.turns("c")] == ["q0", "a1", "q2"]
    assert store.append("c", said("new")).number == 3


def test_forgetting_leaves_no_trace_in_the_files(store: Store, tmp_path: Path) -> None:
    secret, other = "xylophone-secret-7391", "marzipan-kept-2846"
    shared = os.urandom(5000)
    private = os.urandom(5000)
    store.append("gone", user(secret * 50, MediaPart("image", private), MediaPart("image", shared)), name="n" + secret)
    store.append("gone", said(secret))
    store.add_summary("gone", 1, secret, 5)
    store.append("kept", user(other, MediaPart("image", shared)))

    def on_disk() -> bytes:
        return b"".join(path.read_bytes() for path in sorted(tmp_path.glob("talk.db*")))

    assert secret.encode() in on_disk()
    assert private[100:200] in on_disk()
    forgotten = store.forget("gone")
    assert (forgotten.turns, forgotten.media, forgotten.compacted) == (2, 1, True)
    disk = on_disk()
    assert secret.encode() not in disk
    assert b"xylophone" not in disk
    assert private[100:200] not in disk
    assert other.encode() in disk
    assert shared[100:200] in disk
    assert store.search("xylophone") == []
    assert len(store.search("marzipan")) == 1
    index = b"".join(row[0] for row in store._read("SELECT block FROM turns_fts_data"))
    assert b"xyl" not in index
    assert b"zip" in index
    assert (store.turns("gone"), store.summaries("gone")) == ([], [])
    with pytest.raises(InvalidRequest):
        store.forget("gone")


def test_forgetting_shrinks_the_file(store: Store) -> None:
    store.append("c", user(MediaPart("image", os.urandom(500_000))))
    store.append("d", user("y"))
    store.forget("c")
    assert store.path.stat().st_size < 200_000


def test_forgetting_while_others_read_says_that_the_file_did_not_shrink(store: Store) -> None:
    """What was said is overwritten all the same."""
    secret = "xylophone-secret-7391"
    store.append("c", user(secret * 500))
    store.append("d", user("y"))
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    reader = sqlite3.connect(store.path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM turns").fetchone()
    store._db.execute("PRAGMA busy_timeout = 100")
    assert not store.forget("c").compacted
    assert store.turns("c") == []
    reader.close()
    assert secret.encode() in store.path.read_bytes()
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert secret.encode() not in store.path.read_bytes()


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    with Store(tmp_path / "new" / "talk.db") as store:
        store.append("c", user("private"))
        for path in (tmp_path / "new").iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_the_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVL_HOME", str(tmp_path / "home"))
    with Store() as store:
        assert store.path == tmp_path / "home" / "conversations.db"
    monkeypatch.delenv("QVL_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert data_folder() == tmp_path / "data" / "qvl"


def test_files_that_are_no_store(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("These are my notes, and not a database. " * 50)
    with pytest.raises(ConfigError, match="no store of conversations"):
        Store(other)
    assert other.read_text().startswith("These are my notes")
    with pytest.raises(ConfigError, match=f"cannot open .*{tmp_path}: Is a directory$"):
        Store(tmp_path)
    newer = tmp_path / "newer.db"
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 999")
    with pytest.raises(ConfigError, match="a newer qvl"):
        Store(newer)


def test_a_store_held_by_others_for_too_long(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store._db.execute("PRAGMA busy_timeout = 50")
    with pytest.raises(Unavailable, match="cannot be used now"):
        store.append("c", user("x"))
    other.execute("ROLLBACK")
    other.close()
    store.append("c", user("x"))


# Migrations


def old_store(path: Path, version: int) -> None:
    """A file as the qvl of schema `version` left it, with one conversation in it."""
    db = sqlite3.connect(path, isolation_level=None)
    for migration in MIGRATIONS[:version]:
        migration(db)
    db.execute(f"PRAGMA user_version = {version}")
    parts = json.dumps([{"type": "text", "text": "老的对话 from before"}], ensure_ascii=False)
    if version >= 1:
        db.execute("INSERT INTO conversations VALUES ('old', 'past', '2025-01-01T00:00:00+00:00')")
        db.execute(
            "INSERT INTO turns (conversation_id, number, role, parts, created)"
            " VALUES ('old', 0, 'user', ?, '2025-01-01T00:00:00+00:00')",
            (parts,),
        )
    if version >= 2:
        db.execute("INSERT INTO media VALUES ('d1', 3, x'010203', NULL, NULL)")
        db.execute("INSERT INTO turn_media VALUES (1, 'd1')")
        parts = json.dumps([*json.loads(parts), {"type": "image", "media": "d1"}])
        db.execute("UPDATE turns SET parts = ?", (parts,))
    if version >= 3:
        db.execute("UPDATE turns SET prompt_tokens = 5, completion_tokens = 6, cached_tokens = 0, model = 'm'")
    if version >= 4:
        db.execute("INSERT INTO summaries VALUES (1, 'old', 1, 'Sum.', 4, '2025-01-01T00:00:00+00:00')")
    if version >= 5:
        db.execute("UPDATE turns SET plain = '老的对话 from before'")
    db.close()


def schema_of(path: Path) -> list[tuple[object, ...]]:
    with sqlite3.connect(path) as db:
        return db.execute("SELECT type, name, sql FROM sqlite_master ORDER BY type, name").fetchall()


@pytest.mark.parametrize("version", range(len(MIGRATIONS) + 1))
def test_every_older_schema_is_brought_up_with_its_turns(tmp_path: Path, version: int) -> None:
    path = tmp_path / "old.db"
    old_store(path, version)
    with Store(path) as store:
        if version:
            (turn,) = store.turns("old")
            assert text_of(turn.message) == "老的对话 from before"
            assert [hit.conversation_id for hit in store.search("老的 BEFORE")] == ["old"]
            assert [hit.conversation_id for hit in store.search("from before")] == ["old"]
            assert turn.usage == (Usage(5, 6) if version >= 3 else None)
        if version >= 2:
            part = store.resolve(turn.message).parts[1]
            assert isinstance(part, MediaPart)
            assert part.source == b"\x01\x02\x03"
        assert len(store.summaries("old")) == (version >= 4)
        store.append("old", said("news"))
    with Store(tmp_path / "new.db"):
        pass
    assert schema_of(path) == schema_of(tmp_path / "new.db")


def test_a_migration_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "old.db"
    old_store(path, 2)
    before = schema_of(path)

    def broken(db: sqlite3.Connection) -> None:
        db.execute("ALTER TABLE turns ADD COLUMN model TEXT")
        raise OSError("disk gone")

    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", (*MIGRATIONS[:2], broken, *MIGRATIONS[3:]))
        with pytest.raises(OSError, match="disk gone"):
            Store(path)
    assert schema_of(path) == before
    with Store(path) as store:
        assert len(store.turns("old")) == 1


# Several at once

WRITER = """
import sys
from qvl.memory import Store
from qvl.types import Message, TextPart
with Store(sys.argv[1]) as store:
    for i in range(int(sys.argv[3])):
        store.append("shared", Message("user", (TextPart(f"{sys.argv[2]}:{i}"),)))
        store.search("shared")
"""


def test_processes_that_open_and_write_one_new_file_at_once(tmp_path: Path) -> None:
    path, writers, each = tmp_path / "talk.db", 3, 15
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(i), str(each)], cwd=ROOT) for i in range(writers)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0] * writers
    with Store(path) as store:
        turns = store.turns("shared")
    assert [turn.number for turn in turns] == list(range(writers * each))
    said_by: dict[str, list[int]] = {}
    for turn in turns:
        who, number = text_of(turn.message).split(":")
        said_by.setdefault(who, []).append(int(number))
    assert said_by == {str(i): list(range(each)) for i in range(writers)}


def test_threads_share_one_store(store: Store) -> None:
    def write(who: int) -> None:
        for i in range(20):
            store.append("c", user(f"{who}:{i}"))
            store.turns("c")

    threads = [threading.Thread(target=write, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [turn.number for turn in store.turns("c")] == list(range(80))


# Export


def test_export(store: Store, tmp_path: Path) -> None:
    png = write_png(tmp_path / "a b.png")
    store.append("c", Message("system", (TextPart("Be brief."),)), name="Cats")
    store.append("c", user(MediaPart("image", png, PixelLimits(max_pixels=4000)), "What is **this**?"))
    store.append("c", said("A cat."), model="m", finish_reason="stop", usage=Usage(9, 3))
    store.append("c", user(MediaPart("image", "https://example.org/x.png"), MediaPart("video", (png, png))))
    store.add_summary("c", 2, "A cat was shown.", 5)
    told = json.loads(json.dumps(export_json(store, "c", with_data=True)))
    assert [turn["role"] for turn in told["turns"]] == ["system", "user", "assistant", "user"]
    assert told["turns"][2]["usage"] == {"prompt_tokens": 9, "completion_tokens": 3, "cached_tokens": 0}
    digest = told["turns"][1]["parts"][0]["media"][0]
    assert told["turns"][1]["parts"][0]["limits"] == {"max_pixels": 4000}
    assert told["turns"][3]["parts"][1]["media"] == [digest, digest]
    import base64

    assert base64.b64decode(told["media"][digest]["data"]) == png.read_bytes()
    assert told["summaries"][0]["text"] == "A cat was shown."
    assert "data" not in export_json(store, "c")["media"][digest]

    page = export_markdown(store, "c", media_folder=tmp_path / "page")
    assert page.startswith("# Cats\n")
    assert "## Assistant\n\nA cat.\n" in page
    assert f"![picture 1](<page/{digest}.png>)" in page
    assert (tmp_path / "page" / f"{digest}.png").read_bytes() == png.read_bytes()
    assert "![picture 2](<https://example.org/x.png>)" in page
    assert f"![picture 1](<{png}>)" in export_markdown(store, "c")
    for export in (export_json, export_markdown):
        with pytest.raises(InvalidRequest):
            export(store, "nobody")


def test_media_keys_tell_pictures_apart(tmp_path: Path) -> None:
    png = write_png(tmp_path / "a.png")
    pixels = np.zeros((2, 3, 3), np.uint8)
    sources = [
        *(png.read_bytes(), "https://a.example/1", "https://a.example/2", "data:,x", str(png)),
        *(pixels, pixels.reshape(3, 2, 3), Image.fromarray(pixels), (png, png), (png,)),
    ]
    keys = [media_key(source) for source in sources]
    assert len(set(keys)) == len(keys)
    assert keys == [media_key(source) for source in sources]
    assert media_key(bytearray(png.read_bytes())) == keys[0]
    write_png(png, 200)
    os.utime(png, ns=(1, 1))
    assert media_key(png) != keys[4]
    assert media_key(StoredMedia("d")) == "d"


def test_first_openers_wait_for_each_other(tmp_path: Path) -> None:
    """Switching a file to WAL does not wait by itself where another holds it."""
    path = tmp_path / "talk.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE x (y)")
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    threading.Timer(0.3, lambda: (holder.execute("ROLLBACK"), holder.close())).start()
    database.connect(path).close()
