"""A checkpoint's chat template, rendered so that nothing a user wrote can become structure.

Every text of a conversation is replaced by a random nonce of private-use characters before the template sees it.
Control tokens are parsed in what the template itself wrote; then the nonces are put back as plain text. The price: a
template that looks into texts (to cut reasoning out of old turns, say) sees nonces there. Does not know ids.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qvl.errors import CheckpointError, InvalidRequest
from qvl.specs.section import read_section
from qvl.types import MediaKind, Message, TextPart

# What Qwen2-VL's own template writes, for folders that carry none.
CHATML = """\
{%- set seen = namespace(image=0, video=0) %}
{%- for message in messages %}
{%- if loop.first and message.role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}{{ '<|im_start|>' ~ message.role ~ '\\n' }}
{%- if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}
{%- if part.type == 'image' %}{% set seen.image = seen.image + 1 %}
{%- if add_vision_id %}{{ 'Picture ' ~ seen.image ~ ': ' }}{% endif %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' %}{% set seen.video = seen.video + 1 %}
{%- if add_vision_id %}{{ 'Video ' ~ seen.video ~ ': ' }}{% endif %}
{{- '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- else %}{{ part.text }}
{%- endif %}{% endfor %}
{%- endif %}{{ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

_ROLES = ("system", "user", "assistant", "tool")
NONCE_CHARS = 10  # of 4096 each: 96 random bits of the call, then the number of the text
_PRIVATE_USE = re.compile("[\ue000-\uefff]+")
_MAX_STEPS = 1_000_000  # loop steps of one rendering
_MAX_CHARS = 4_000_000  # template text of one rendering; texts of users are not counted


@dataclass(frozen=True, slots=True)
class MediaSlot:
    """Where the next picture or video of the conversation goes."""

    kind: MediaKind


@dataclass(frozen=True, slots=True)
class Rendered:
    """The template's output with nonces in it, and the text behind each nonce."""

    text: str
    texts: Mapping[str, str]


class _Nonces(dict[str, str]):
    """Nonce -> text of one call."""

    def __init__(self) -> None:
        super().__init__()
        bits = secrets.randbits(12 * (NONCE_CHARS - 2))  # at once: each call asks the kernel and lets go of the GIL
        self._call = "".join(chr(0xE000 + (bits >> 12 * i) % 4096) for i in range(NONCE_CHARS - 2))

    def hide(self, text: str) -> str:
        """The nonce of `text`; an empty text stays empty, as templates may ask for that."""
        if not text:
            return ""
        high, low = divmod(len(self), 4096)
        nonce = f"{self._call}{chr(0xE000 + high)}{chr(0xE000 + low)}"
        self[nonce] = text
        return nonce


class _Steps:
    """What one rendering may still do; a template of a checkpoint must not hang a server."""

    def __init__(self) -> None:
        self.left = _MAX_STEPS

    def __call__(self, items: Any) -> Any:
        if not hasattr(items, "__len__"):
            items = list(islice(items, self.left + 1))
        self.left -= len(items)
        if self.left < 0:
            raise jinja2.TemplateRuntimeError("the chat template loops too long")
        return items


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012  (an instance variable to jinja2)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _compile(source: str) -> jinja2.Template:
    """The template in a sandbox, each of its loops counted."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        tree = environment.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Call(nodes.Name("_count_steps", "load"), [loop.iter], [], None, None, lineno=loop.lineno)
        return jinja2.Template.from_code(environment, environment.compile(tree), environment.make_globals(None))
    except (jinja2.TemplateError, RecursionError) as error:
        raise CheckpointError(f"the chat template cannot be read: {error}") from error


class ChatTemplate:
    """One compiled template. Safe to use from several threads: all state of a rendering is its own."""

    def __init__(self, source: str, names: Mapping[str, str]) -> None:
        """`names` are what the template may ask for by name (`eos_token` and the like)."""
        if _PRIVATE_USE.search(source):
            raise CheckpointError("the chat template holds private-use characters, which this version needs for itself")
        self._template = _compile(source)
        self._names = dict(names)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, add_vision_id: bool) -> Rendered:
        """Raises `InvalidRequest` when the template refuses the conversation or mangles a text."""
        texts = _Nonces()
        conversation = [_as_template_message(message, texts) for message in messages]
        chunks = self._run(conversation, add_generation_prompt, add_vision_id)
        rendered = "".join(chunks)
        _check_nonces(rendered, texts)
        return Rendered(rendered, texts)

    def _run(self, conversation: list[dict[str, Any]], add_generation_prompt: bool, add_vision_id: bool) -> list[str]:
        values = {
            **self._names,
            "messages": conversation,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "add_vision_id": add_vision_id,
            "_count_steps": _Steps(),
        }
        try:
            return list(_bounded(self._template.generate(values)))
        except jinja2.TemplateError as error:
            says = _PRIVATE_USE.sub("…", str(error.message or ""))[:300]
            raise InvalidRequest(f"the checkpoint's chat template refuses: {says}", param="messages") from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InvalidRequest(
                "the checkpoint's chat template cannot render these messages", param="messages"
            ) from error


def _check_nonces(rendered: str, texts: Mapping[str, str]) -> None:
    """Private-use characters must be whole nonces, none of them twice (but a template may drop one)."""
    unseen = set(texts)
    for run in _PRIVATE_USE.findall(rendered):
        for place in range(0, len(run), NONCE_CHARS):
            nonce = run[place : place + NONCE_CHARS]
            if nonce not in texts:
                raise InvalidRequest("the checkpoint's chat template cuts a message", param="messages")
            if nonce not in unseen:
                raise InvalidRequest("the checkpoint's chat template repeats a message", param="messages")
            unseen.remove(nonce)


def _bounded(chunks: Iterable[str]) -> Iterator[str]:
    left = _MAX_CHARS
    for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            raise jinja2.TemplateRuntimeError("the chat template writes too much")
        yield chunk


def _as_template_message(message: Message, texts: _Nonces) -> dict[str, Any]:
    """The shape that templates expect: one text as a string, anything else as a list of parts."""
    if message.role not in _ROLES:
        raise InvalidRequest(f"'role' must be one of {', '.join(_ROLES)}", param="messages")
    parts: list[dict[str, str]] = []
    for part in message.parts:
        if isinstance(part, TextPart):
            parts.append({"type": "text", "text": texts.hide(part.text)})
        else:
            parts.append({"type": part.kind})
    if not parts:
        return {"role": message.role, "content": ""}
    if len(parts) == 1 and parts[0]["type"] == "text":
        return {"role": message.role, "content": parts[0]["text"]}
    return {"role": message.role, "content": parts}


def find_template(folder: Path) -> tuple[str, dict[str, str]]:
    """The folder's template (else Qwen2-VL's own) and the token names for it. Raises `CheckpointError`."""
    config = read_section(folder, "tokenizer_config.json").values
    names = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[key] = value
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8"), names
    for template in (
        read_section(folder, "chat_template.json").values.get("chat_template"),
        config.get("chat_template"),
    ):
        if isinstance(template, list):  # several named ones
            template = next((t.get("template") for t in template if t.get("name") == "default"), None)
        if isinstance(template, str):
            return template, names
    return CHATML, names
