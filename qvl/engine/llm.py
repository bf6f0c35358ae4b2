"""`LLM`: the model in this process, for programs and notebooks.

Knows what a program may hand over. Does not know how the engine is kept busy; there is no asyncio here, no socket and
no other process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, overload

from qvl.engine.config import resolve
from qvl.engine.device import read_facts
from qvl.engine.driver import Driver, Reader
from qvl.engine.engine import Engine
from qvl.engine.grammar import Grammars
from qvl.engine.intake import Intake
from qvl.engine.messages import Dialogue, RawPrompt, Turn, is_one_dialogue, is_one_prompt, read_dialogue, read_prompt
from qvl.engine.options import EngineOptions
from qvl.errors import InvalidRequest
from qvl.tokenizer import Tokenizer
from qvl.types import ChatRequest, Completion, Delta, Message, PictureRule, PixelLimits, SamplingParams
from qvl.wire.content import read_limits

if TYPE_CHECKING:
    from typing_extensions import Unpack

Sampling: TypeAlias = SamplingParams | Sequence[SamplingParams] | None

# A program needs no guard against its own data: what the options say here unless it says otherwise.
_IN_PROCESS: Mapping[str, Any] = {
    "allow_any_local_path": True,
    "allow_private_hosts": True,
    "limit_mm_per_prompt": {"image": 999, "video": 99},
}


_NOTHING: Mapping[str, Any] = MappingProxyType({})


class ChatOptions(TypedDict, total=False):
    """How a conversation becomes a prompt. `mm_processor_kwargs`: the fields of `PixelLimits`."""

    add_generation_prompt: bool
    continue_final_message: bool
    add_vision_id: bool
    mm_processor_kwargs: Mapping[str, Any]


class LLM:
    """A model loaded into this process. `options` are the fields of `EngineOptions`; an unknown one is a `ConfigError`.

    Pictures may be PIL pictures, uint8 arrays [h, w, 3], bytes, paths and addresses, of any host and any folder. Safe
    to use from several threads, which then share the engine.
    """

    def __init__(self, model: str = "demo", **options: Any) -> None:
        written = EngineOptions.from_dict({**_IN_PROCESS, **options, "model": model})
        config = resolve(written, read_facts(written.device))
        self.tokenizer = Tokenizer.from_folder(config.spec.folder, config.spec.ids)
        grammars = Grammars(config.spec, self.tokenizer)
        self.engine = Engine(config, grammars)
        self._intake = Intake(self.engine.config, self.tokenizer, grammars.check)
        self._driver = Driver(self.engine, self.tokenizer)

    @overload
    def chat(
        self, messages: str, sampling_params: Sampling = ..., use_tqdm: bool = ..., **how: Unpack[ChatOptions]
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Sequence[Turn],
        sampling_params: Sampling = ...,
        use_tqdm: bool = ...,
        **how: Unpack[ChatOptions],
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Turn]],
        sampling_params: Sampling = ...,
        use_tqdm: bool = ...,
        **how: Unpack[ChatOptions],
    ) -> list[Completion]: ...
    def chat(
        self,
        messages: Dialogue | Sequence[Dialogue],
        sampling_params: Sampling = None,
        use_tqdm: bool = True,
        **how: Unpack[ChatOptions],
    ) -> Completion | list[Completion]:
        """Answer one conversation, or many at once, each with its own `SamplingParams` if a list of them is given.

        A conversation is a list of turns (dicts as OpenAI and Qwen write them, or `Message`s) or just a user's text.
        Raises `InvalidRequest` for what cannot be served, and `RequestFailed` when the one conversation fails inside
        the engine; of many, a failed one has the finish_reason "error", with a warning that says why. `use_tqdm` shows
        a progress bar for many.
        """
        if is_one_dialogue(messages):
            return self._driver.serve_one(self._chat_reader(messages, _one(sampling_params), how))
        rules = _each(sampling_params, len(messages))
        readers = [self._chat_reader(dialogue, rule, how) for dialogue, rule in zip(messages, rules, strict=True)]
        return self._driver.serve(readers, use_tqdm)

    @overload
    def generate(
        self,
        prompts: str | Sequence[int] | Mapping[str, Any],
        sampling_params: Sampling = ...,
        use_tqdm: bool = ...,
        *,
        mm_processor_kwargs: Mapping[str, Any] = ...,
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompts: list[str] | list[list[int]] | list[dict[str, Any]],
        sampling_params: Sampling = ...,
        use_tqdm: bool = ...,
        *,
        mm_processor_kwargs: Mapping[str, Any] = ...,
    ) -> list[Completion]: ...
    def generate(
        self,
        prompts: RawPrompt | Sequence[RawPrompt],
        sampling_params: Sampling = None,
        use_tqdm: bool = True,
        *,
        mm_processor_kwargs: Mapping[str, Any] = _NOTHING,
    ) -> Completion | list[Completion]:
        """Continue one raw prompt, or many: a text, token ids, or {"prompt": ..., "multi_modal_data": {"image": ...}}.

        Control tokens spelt out in a text are meant: the text is the program's own (`chat` keeps a user's apart). One
        pad token stands for each picture and video. Raises as `chat` does.
        """
        limits = read_limits(mm_processor_kwargs, "mm_processor_kwargs")
        if is_one_prompt(prompts):
            return self._driver.serve_one(self._raw_reader(prompts, _one(sampling_params), limits))
        rules = _each(sampling_params, len(prompts))
        readers = [self._raw_reader(prompt, rule, limits) for prompt, rule in zip(prompts, rules, strict=True)]
        return self._driver.serve(readers, use_tqdm)

    def stream(
        self, messages: Dialogue, sampling_params: SamplingParams | None = None, **how: Unpack[ChatOptions]
    ) -> Iterator[Delta]:
        """The answer to one conversation as it grows. Closing the iterator early aborts what still runs.

        Raises `InvalidRequest` at once, `RequestFailed` where the engine gives up.
        """
        return self._driver.deltas(self._chat_reader(messages, _one(sampling_params), how)())

    @property
    def model(self) -> str:
        """The name that the model is served by."""
        return self.engine.config.served_name

    def picture_rule(self) -> PictureRule | None:
        """How the model sees pictures; None where the options decide it otherwise for each."""
        return self.engine.config.picture_rule

    def context(self) -> int:
        """The most tokens of a request with its answer."""
        return self.engine.config.max_model_len

    def _chat_reader(self, dialogue: Any, sampling: SamplingParams, how: ChatOptions) -> Reader:
        for name in how:
            if name not in ChatOptions.__annotations__:
                hint = f"; it goes into SamplingParams({name}=...)" if name in SamplingParams.__annotations__ else ""
                raise TypeError(f"an unexpected keyword argument '{name}'{hint}")
        request = _chat_request(read_dialogue(dialogue), sampling, **how)
        return lambda: self._intake.prepare_chat(request)

    def _raw_reader(self, prompt: Any, sampling: SamplingParams, limits: PixelLimits) -> Reader:
        content, parts = read_prompt(prompt)
        ids = self.tokenizer.encode_control(content) if isinstance(content, str) else content
        return lambda: self._intake.prepare_raw(ids, parts, sampling, limits)


def _chat_request(
    messages: tuple[Message, ...],
    sampling: SamplingParams,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    add_vision_id: bool = False,
    mm_processor_kwargs: Mapping[str, Any] = _NOTHING,
) -> ChatRequest:
    limits = read_limits(mm_processor_kwargs, "mm_processor_kwargs")
    return ChatRequest(
        messages, sampling, limits, add_generation_prompt, continue_final_message, add_vision_id=add_vision_id
    )


def _one(sampling: Sampling) -> SamplingParams:
    if sampling is None or isinstance(sampling, SamplingParams):
        return sampling or SamplingParams()
    given = type(sampling).__name__
    raise InvalidRequest(f"one conversation takes one SamplingParams, not a {given}", param="sampling_params")


def _each(sampling: Sampling, count: int) -> Sequence[SamplingParams]:
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling or SamplingParams()] * count
    if not all(isinstance(one, SamplingParams) for one in sampling):
        raise InvalidRequest("'sampling_params' must be one SamplingParams, or a list of them", param="sampling_params")
    if len(sampling) != count:
        raise InvalidRequest(
            f"{count} conversations were given {len(sampling)} SamplingParams", param="sampling_params"
        )
    return sampling
