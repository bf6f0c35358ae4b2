"""The one error tree. Every class carries its HTTP status, OpenAI type and code, and the exit code of the command line.

    QvlError                      500 server_error
    |-- InvalidRequest            400 invalid_request_error     what a caller sent and can mend
    |   |-- PromptTooLong         400 context_length_exceeded
    |   |-- TooManyMedia          400 too_many_media
    |   |-- BadMedia              400 invalid_media
    |   |-- MediaRefused          400 media_refused             an address or a path that policy forbids
    |   |-- PayloadTooLarge       413 payload_too_large
    |   |-- ModelNotFound         404 model_not_found
    |   |-- Unauthorized          401 invalid_api_key
    |   `-- HostRefused           403 host_refused
    |-- ConfigError               exit 2                        options and checkpoints, before anything runs
    |   `-- CheckpointError       exit 2
    |-- Overloaded                429 server_overloaded
    |-- Unavailable               503 engine_unavailable
    `-- RequestFailed             500 request_failed            one request went wrong inside the engine
        `-- BadAnswer             500 bad_answer                a model's answer that is not what a task asked for

Knows how an error is told to others. Does not know HTTP libraries, and never puts addresses, paths of the server,
prompts or stack traces into a message that goes over the wire.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class QvlError(Exception):
    """Base of every error that qvl raises on purpose; `message` is written for the person who can act on it."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = "internal_error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def about(self, what: str) -> QvlError:
        """The same error, with what it is about in front of its message where that does not name it."""
        if what not in self.message:
            self.message = f"{what}: {self.message}"
            self.args = (self.message,)
        return self

    def body(self) -> dict[str, dict[str, str | None]]:
        """The OpenAI error body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class InvalidRequest(QvlError):
    """The request cannot be served as it stands; `param` names the field."""

    status = 400
    kind = "invalid_request_error"
    code = "invalid_value"
    exit_code = 2


class PromptTooLong(InvalidRequest):
    """The prompt (with room for at least one answer token) does not fit into `limit` tokens.

    `is_counted` is False where counting ended early: there are more than `num_tokens`.
    """

    code = "context_length_exceeded"

    def __init__(self, num_tokens: int, limit: int, hint: str = "", *, is_counted: bool = True) -> None:
        has = f"has {num_tokens}" if is_counted else f"has more than {num_tokens}"
        # litellm and CrewAI know this error by the words in the middle, not by its code.
        text = f"the prompt {has} tokens, but this model's maximum context length is {limit} including the answer"
        super().__init__(f"{text}. {hint}" if hint else text, param="messages")
        self.num_tokens = num_tokens
        self.limit = limit


class TooManyMedia(InvalidRequest):
    """More pictures or videos than `--limit-mm-per-prompt` allows."""

    code = "too_many_media"
    excess = 1  # how many must go; at least, where only a server's words are known

    def __init__(self, kind: str, count: int, limit: int) -> None:
        self.excess = count - limit
        super().__init__(
            f"the request has {count} {kind}s, the limit is {limit}; start the server with "
            f"--limit-mm-per-prompt {kind}={count} to allow it",
            param="messages",
        )


class BadMedia(InvalidRequest):
    """A picture or video that cannot be decoded, or whose shape the model cannot take."""

    code = "invalid_media"


class MediaRefused(InvalidRequest):
    """An address or a local path that the server's policy does not let it read."""

    code = "media_refused"


class PayloadTooLarge(InvalidRequest):
    """A body, header or picture above the server's byte cap."""

    status = 413
    code = "payload_too_large"


class ModelNotFound(InvalidRequest):
    """The request names a model that is not served here."""

    status = 404
    code = "model_not_found"

    def __init__(self, name: str, served: Iterable[str]) -> None:
        super().__init__(f"the model '{name}' is not served here; served: {', '.join(served)}", param="model")


class Unauthorized(InvalidRequest):
    """The API key is missing or wrong."""

    status = 401
    code = "invalid_api_key"


class HostRefused(InvalidRequest):
    """A server of this machine, called by a name that anybody may own."""

    status = 403
    code = "host_refused"

    def __init__(self) -> None:
        super().__init__(
            "this server is not called by this name; start it with --allowed-host NAME to allow it, or with --api-key"
        )


class ConfigError(QvlError):
    """An option or a combination of options that cannot work."""

    code = "bad_configuration"
    exit_code = 2


class CheckpointError(ConfigError):
    """A checkpoint folder that is incomplete or not understood."""

    code = "bad_checkpoint"


class Overloaded(QvlError):
    """The queue is full; the same request may be sent again after `retry_after` seconds."""

    status = 429
    kind = "rate_limit_error"
    code = "server_overloaded"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(QvlError):
    """The engine is starting, restarting or draining."""

    status = 503
    code = "engine_unavailable"


class RequestFailed(QvlError):
    """One request failed inside the engine (not-a-number logits, for example); the engine lives on."""

    code = "request_failed"


class BadAnswer(RequestFailed):
    """What the model said is not what was asked for: no table, no such fields."""

    code = "bad_answer"


def suggest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
