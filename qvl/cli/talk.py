"""The conversation of `qvl chat`: what each line does to it. Who answers is `voice`, how it looks is `screen`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from qvl.cli.screen import PlainScreen, Screen, Terminal
from qvl.cli.spoken import Order, given_medium, local_path, read_line
from qvl.cli.voice import Voice, find_voice
from qvl.errors import InvalidRequest, QvlError
from qvl.memory import Conversation, Store, Strategy, data_folder, export_json, export_markdown
from qvl.types import MediaPart, SamplingParams, TextPart

HELP = {
    "/image": "FILE or URL   add a picture to what you say next (pasting its path does the same)",
    "/video": "FILE or URL   add a video",
    "/undo": "take back your last turn and its answer",
    "/retry": "ask again for an answer that is missing",
    "/tokens": "how much of the model's context is used",
    "/save": "FILE   write the conversation as Markdown, or as JSON if FILE ends in .json",
    "/resume": "[ID]   list earlier conversations, or go on with one",
    "/search": "WORDS   find them in everything that was ever said here",
    "/forget": "ID   delete a conversation for good, with its pictures",
    "/new": "begin a new conversation",
    "/help": "this list",
    "/quit": "leave (so does Ctrl-D)",
}
LISTED = 10


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line asked for."""

    base_url: str | None = None
    model: str | None = None
    api_key: str | None = None
    system: str | None = None
    strategy: Strategy = "summary"
    budget: int | None = None
    resume: str | None = None
    sampling: SamplingParams = SamplingParams()


def talk(settings: Settings) -> None:
    """Talk until the person leaves or the pipe ends. Piped, the first error ends it; a person is only told."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    screen = Terminal(data_folder() / "chat_history", tuple(HELP)) if is_terminal else PlainScreen()
    with Store() as store:
        session = Session(store, find_voice(settings.base_url, settings.model, settings.api_key), settings, screen)
        session.run()


class Session:
    """One sitting: a conversation at a time, and what waits to be said with the next turn."""

    def __init__(self, store: Store, voice: Voice, settings: Settings, screen: Screen) -> None:
        self._store = store
        self._voice = voice
        self._settings = settings
        self._screen = screen
        self._waiting: list[MediaPart] = []
        self._orders: dict[str, Callable[[str], None]] = {
            "/image": lambda rest: self._attach(given_medium(rest, "image")),
            "/video": lambda rest: self._attach(given_medium(rest, "video")),
            "/undo": self._undo,
            "/retry": lambda _: self._answer(None),
            "/tokens": self._tokens,
            "/save": self._save,
            "/resume": self._resume,
            "/search": self._search,
            "/forget": self._forget,
            "/new": lambda _: self._begin(),
            "/help": self._help,
        }
        self._talk = self._conversation(settings.resume)

    def run(self) -> None:
        """Read lines and do what they say."""
        if self._screen.interactive:
            self._screen.say(f"{self._voice.name} ({self._voice.place}). /help lists what else you can do.")
            if self._settings.resume is not None:
                self._recall()
        while True:
            try:
                line = self._screen.line()
                if line.strip() == "/quit":
                    return
                self._take(line)
            except EOFError:
                if self._screen.interactive:
                    self._screen.say("")
                return
            except KeyboardInterrupt:
                if not self._screen.interactive:
                    raise
                self._screen.say("\n(Ctrl-D or /quit leaves)")
            except QvlError as error:
                if not self._screen.interactive:
                    raise
                self._screen.complain(error.message)

    def _take(self, line: str) -> None:
        if not line.strip():
            return
        said = read_line(line, (*self._orders, "/quit"))
        if isinstance(said, Order):
            self._orders[said.name](said.rest)
            return
        for medium in said.media:
            self._attach(medium)
        if said.text:
            self._answer(said.text)

    def _attach(self, medium: MediaPart) -> None:
        self._waiting.append(medium)
        self._screen.say(f"[{medium.kind}: {getattr(medium.source, 'name', medium.source)}]")

    def _answer(self, text: str | None) -> None:
        """Ask and show. A turn that was refused gives its pictures back, to be said again with other words."""
        media, self._waiting = (self._waiting, []) if text is not None else ([], self._waiting)
        turns = len(self._talk.turns)
        try:
            # Closed here, so that what was said is kept before anything is told of it, wherever Ctrl-C hit.
            with closing(self._pieces(text, media)) as pieces:
                self._screen.show(pieces)
        except KeyboardInterrupt:
            if not self._screen.interactive:
                raise
            stopped = "(stopped)" if not self._talk.unanswered else "(stopped; /retry asks again, /undo takes it back)"
            self._screen.say(stopped)
            return
        except QvlError:
            if len(self._talk.turns) == turns:
                self._waiting = [*media, *self._waiting]
            raise
        self._remark()

    def _pieces(self, text: str | None, media: list[MediaPart]) -> Generator[str, None, None]:
        with closing(self._talk.stream(text, *media, sampling=self._settings.sampling)) as deltas:  # type: ignore[type-var]
            for delta in deltas:
                yield delta.text

    def _remark(self) -> None:
        """What the person should know about how the answer came to be."""
        reply = self._talk.last
        if reply is None:
            return
        for notice in reply.notices:
            self._screen.say(f"({notice})")
        if reply.completion.answers[0].finish_reason == "length":
            self._screen.say("(the answer was cut at its length)")

    def _undo(self, _: str) -> None:
        if self._waiting:
            self._screen.say(f"taken back: {self._waiting.pop().kind}")
        elif not self._talk.undo():
            self._screen.say("nothing to take back")
        else:
            self._screen.say("taken back: your last turn and its answer")

    def _tokens(self, _: str) -> None:
        messages = tuple(self._store.resolve(turn.message) for turn in self._talk.turns)
        whole = self._voice.count(messages) if messages else 0
        last = f"; the last request had {self._talk.last.prompt_tokens}" if self._talk.last else ""
        self._screen.say(f"the whole conversation: {whole} tokens{last}; the budget is {self._talk.budget.tokens}")

    def _save(self, rest: str) -> None:
        if not rest:
            raise InvalidRequest("name a file: /save FILE")
        path = local_path(rest)
        if path.exists():
            raise InvalidRequest(f"{path} is there already")
        if path.suffix == ".json":
            text = json.dumps(export_json(self._store, self._talk.id), ensure_ascii=False, indent=2) + "\n"
        else:
            text = export_markdown(self._store, self._talk.id, media_folder=path.with_name(f"{path.stem}_files"))
        _write(path, text)
        self._screen.say(f"saved to {path}")

    def _resume(self, rest: str) -> None:
        if not rest:
            for info in self._store.conversations(LISTED):
                if info.num_turns:  # else all that was said in it has been taken back
                    when = info.updated[:16].replace("T", " ")
                    self._screen.say(f"{info.id}  {when}  {_counted(info.num_turns, 'turn', 'turns'):>9}  {info.title}")
            self._screen.say("/resume ID goes on with one; the beginning of its ID is enough")
            return
        self._talk = self._conversation(rest)
        self._waiting = []
        self._recall()

    def _search(self, rest: str) -> None:
        if not rest:
            raise InvalidRequest("say what to look for: /search WORDS")
        hits = self._store.search(rest, LISTED)
        for hit in hits:
            self._screen.say(f"{hit.conversation_id}  {hit.title}\n    {hit.role}: {hit.snippet}")
        if not hits:
            self._screen.say("nothing was found")

    def _forget(self, rest: str) -> None:
        if not rest:
            raise InvalidRequest("name a conversation: /forget ID (/resume lists them)")
        id = self._store.find(rest)
        gone = self._store.forget(id)
        media = _counted(gone.media, "picture or video", "pictures and videos")
        self._screen.say(f"forgotten: {_counted(gone.turns, 'turn', 'turns')}, {media}")
        if id == self._talk.id:
            self._begin()

    def _recall(self) -> None:
        """The last exchange, so that one knows where one was."""
        turns = self._talk.turns
        self._screen.say(f"{_counted(len(turns), 'turn', 'turns')}; the last were:")
        for turn in turns[-2:]:
            text = "".join(part.text for part in turn.message.parts if isinstance(part, TextPart))
            self._screen.say(f"{turn.message.role}: {text}")

    def _begin(self) -> None:
        self._talk = self._conversation(None)
        self._waiting = []
        self._screen.say("a new conversation")

    def _help(self, _: str) -> None:
        for name, what in HELP.items():
            self._screen.say(f"{name:9}{what}")

    def _conversation(self, id: str | None) -> Conversation:
        return Conversation(
            self._store,
            self._voice.ask,
            self._voice.count,
            self._settings.budget or self._voice.context,
            self._settings.strategy,
            stream=self._voice.stream,
            id=id,
            system=self._settings.system,
            model=self._voice.name,
        )


def _counted(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def _write(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}") from error
