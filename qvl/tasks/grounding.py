"""`ground`: where things are in a picture, in pixels of the picture itself.

Knows the questions that make the Qwen-VL models answer with boxes, one kind for those that write box tokens and one for
those that write JSON. `boxes` reads the answers. Does not know files.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from qvl.errors import BadAnswer, InvalidRequest
from qvl.tasks.base import Ask, Model, Result, Sighted, Task, asked, cut_notes
from qvl.tasks.boxes import Convention, Found, Reading, Size, guess_convention, place, read_marks
from qvl.tasks.pictures import as_seen, pixels_of, size_seen
from qvl.tasks.run import one
from qvl.types import Completion, MediaPart, Message, Part, PictureRule, SamplingParams

Coordinates: TypeAlias = Literal["auto", "relative", "absolute"]
Objects: TypeAlias = tuple[Found, ...]

# The bundled checkpoint and Qwen2-VL know these words; Qwen2.5-VL and later were taught to write JSON when asked.
PROMPT = "Detect {what}."
PROMPT_ZH = "请检测图中的{what}"
PROMPT_JSON = (
    "Locate {what} in the picture. Report the bounding box of every one as JSON: "
    '[{{"bbox_2d": [x1, y1, x2, y2], "label": "..."}}], and [] if there is none.'
)
_DETERMINED = re.compile(r"(?i)(the|an?|all|every|each|any|my|this|that|these|those|text|word)\b|[\"'“]")
_SHOWN_ANSWER = 500  # characters of an answer in an error
# Every Qwen2-VL and Qwen2.5-VL server sees a picture of such a size as it is.
_USUAL = PictureRule(factor=28, min_pixels=56 * 56, max_pixels=1280 * 28 * 28)
GUESSED = (
    "it is not known how this model counts coordinates; they were taken for pixels of the picture as it sees it "
    "(--coordinates relative: for thousandths)"
)


@dataclass(frozen=True, kw_only=True)
class Ground(Task[Objects]):
    """Boxes of `what`, and of each of `also`, asked one by one.

    `coordinates` says how the model writes them: thousandths ("relative"), pixels of the picture as it sees it
    ("absolute"), or "auto": by `model_name`, else by the form of its answer. `rule` is how it sees pictures. `template`
    is a question of your own, with {what} in it.
    """

    name: ClassVar[str] = "ground"

    what: str
    also: tuple[str, ...] = ()
    coordinates: Coordinates = "auto"
    template: str | None = None
    model_name: str = ""
    rule: PictureRule | None = None
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        if not all(what.strip() for what in (self.what, *self.also)):
            raise InvalidRequest("say what to look for: qvl ground 'the dog' photo.jpg")
        if self.template is not None and "{what}" not in self.template:
            raise InvalidRequest("a question of your own needs the place of the object: --prompt 'Find {what}.'")

    @property
    def several(self) -> Literal["headings", "blank", "json"]:
        return "json"

    @property
    def suffix(self) -> str:
        return ".json"

    @property
    def prompt(self) -> str:
        return self.question(self.what)

    @property
    def sampling(self) -> SamplingParams:
        """Box tokens are special ones, which servers leave out of answers unless they are asked for."""
        return dataclasses.replace(super().sampling, skip_special_tokens=False)

    def for_model(self, model: Model) -> Ground:
        """With what the model tells about itself."""
        rule = model.picture_rule() if isinstance(model, Sighted) else None
        return dataclasses.replace(self, model_name=getattr(model, "model", ""), rule=rule)

    def question(self, what: str) -> str:
        """What is asked about one object."""
        what = what.strip().rstrip(".")
        if self.template is not None:
            return self.template.replace("{what}", what)
        if self.writes_json:
            return PROMPT_JSON.format(what=what)
        if re.search("[\u4e00-\u9fff]", what):
            return PROMPT_ZH.format(what=what)
        return PROMPT.format(what=what if _DETERMINED.match(what) else f"the {what}")

    @property
    def writes_json(self) -> bool:
        """Whether the model, by its name, was taught to answer such questions in JSON."""
        return re.search(r"(?i)qwen[-_]?(?:2[._-]?5|3)[-_]?vl", self.model_name) is not None

    def answer(self, ask: Ask, parts: Sequence[Part]) -> Result[Objects]:
        part = next(part for part in parts if isinstance(part, MediaPart))
        pixels = pixels_of(part)
        size = (pixels.shape[1], pixels.shape[0])
        if self.rule is None and self.coordinates != "relative":
            # Nobody says how large the model will see it: sent at a size that all leave alone.
            part = MediaPart("image", as_seen(pixels, _USUAL))
        seen = size_seen(pixels, self.rule or _USUAL)
        found: list[Found] = []
        notes: dict[str, None] = {}
        for what in (self.what, *self.also):
            completion = self._ask(ask, asked(self.question(what), (part,)))
            objects, remarks = self._found(completion.text, what, size, seen)
            found += objects
            notes |= dict.fromkeys((*remarks, *cut_notes(completion)))
        return self.result(tuple(found), tuple(notes))

    def _ask(self, ask: Ask, messages: tuple[Message, ...]) -> Completion:
        """With the box tokens, where a server lets itself be asked for them; boxes can be read without them too."""
        try:
            return ask(messages, self.sampling)
        except InvalidRequest as error:
            if "skip_special_tokens" not in f"{error.param} {error.message}":
                raise
            return ask(messages, super().sampling)

    def _found(self, answer: str, what: str, size: Size, seen: Size) -> tuple[list[Found], list[str]]:
        """The objects of one answer and what there is to know about it. Raises `BadAnswer`."""
        reading = read_marks(answer)
        if not reading.marks:
            if reading.unread:
                raise BadAnswer(f"no box can be read in the answer about {what}: {_shown(answer)}")
            said = "" if answer.strip().startswith(("[", "`")) else f"; the model says: {_shown(answer)}"
            return [], [f"{what}: none found{said}"]
        convention, notes = self._convention(reading)
        placed = [
            place(dataclasses.replace(mark, label=mark.label or what), convention, size, seen) for mark in reading.marks
        ]
        objects = [item for item in placed if item is not None]
        if len(objects) < len(placed):
            notes.append(f"{what}: {len(placed) - len(objects)} outside of the picture left out")
        if reading.unread:
            notes.append(f"{what}: not understood, left out: {_shown(' '.join(reading.unread))}")
        return objects, notes

    def _convention(self, reading: Reading) -> tuple[Convention, list[str]]:
        if self.coordinates != "auto":
            return self.coordinates, []
        convention, certain = guess_convention(self.model_name, reading)
        return convention, [] if certain else [GUESSED]

    def read(self, answer: str) -> Objects:
        """The objects of an answer about a picture that the model sees as it is, of 1000 x 1000 pixels."""
        return tuple(self._found(answer, self.what, (1000, 1000), (1000, 1000))[0])

    def text(self, value: Objects) -> str:
        return json.dumps(self.data(value), ensure_ascii=False)

    def data(self, value: Objects) -> list[dict[str, Any]]:
        return [item.as_dict() for item in value]


def _shown(answer: str) -> str:
    text = " ".join(answer.split())
    return text if len(text) <= _SHOWN_ANSWER else f"{text[:_SHOWN_ANSWER]}..."


def ground(
    what: str,
    source: Any,
    *also: str,
    coordinates: Coordinates = "auto",
    model: Model | None = None,
    page: int | None = None,
) -> Objects:
    """Where `what` (and each of `also`) is in a picture: boxes in its own pixels; empty when there is none.

    `source` is a path, an address, bytes, a PIL picture, an array, or a `page` of a PDF. `model` is a `qvl.Client` or a
    `qvl.LLM`; None asks the server on this machine, else the bundled checkpoint.
    """
    return one(Ground(what=what, also=also, coordinates=coordinates), source, model, page)
