"""From a `Constraint` to a matcher that says which tokens may come next, through llguidance.

    Constraint --as_grammar--> llguidance's grammar --compile--> pristine matcher, cached --copy--> one per answer

Knows the vocabulary's bytes, the limits of a grammar, and how much stack a compiler in Rust may need: a chain of a
thousand references overflows a usual one, and the process dies of it. Does not know logits, sequences or torch.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from typing import TypeVar

import llguidance
import msgspec
import numpy as np
import numpy.typing as npt

from qvl.errors import InvalidRequest
from qvl.specs import ModelSpec
from qvl.tokenizer import Tokenizer
from qvl.types import Constraint

T = TypeVar("T")
Words = npt.NDArray[np.int32]

# Between two parts of a JSON text: nothing, one space, or a new line and its indentation. A model that cannot stop
# writing blanks gets no further than this.
JSON_BLANKS = r"( |\n {0,32}|\n\t{0,8})"
STACK_BYTES = 256 * 1024 * 1024  # of address space: what is not touched costs nothing
KEPT_GRAMMARS = 64
KEPT_CHARS = 1024 * 1024
REHEARSED_STEPS = 12
SLOW_SECONDS = 0.2  # everybody in the batch waits; usual grammars take a thousandth of it
MOST_SAID = 300  # characters of a complaint

_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=20_000,  # an object of 5,000 optional properties
    initial_lexer_fuel=300_000,
    step_lexer_fuel=200_000,  # some 15 ms of a step
    step_max_items=50_000,
    max_lexer_states=30_000,  # some 50 MB for one answer at most
    max_grammar_size=200_000,
    verbose_errors=False,
)


class Matcher:
    """How far one answer has come in its grammar. Not to be used from two threads at once."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> Matcher:
        return Matcher(self._matcher.deep_copy())

    def accept(self, token_id: int) -> None:
        """Go on by one token. One that was not allowed is told by `error` from then on."""
        self._matcher.consume_token(token_id)

    def fill(self, words: Words) -> None:
        """Write which tokens may come next: bit i of int32 `words` [ceil(vocab_size / 32)] is token i."""
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)

    def fill_checked(self, words: Words, end_words: Words) -> str | None:
        """`fill`, with the bits of `end_words` only where the answer may end. What went wrong, None if nothing did."""
        self.fill(words)
        if not self._matcher.is_accepting():
            # A grammar that names the end token itself, in its middle, does not end there.
            np.bitwise_and(words, ~end_words, out=words)
        return self.error

    @property
    def error(self) -> str | None:
        """Why no further token can be judged; None while all is well. The matched end of a grammar is no error."""
        complaint = self._matcher.get_error()
        return _gist(complaint) if complaint else None


class AnswerGrammar:
    """How far one answer has come, in a grammar that may still be under way. Lives with its sequence."""

    def __init__(self, compiled: Future[Matcher]) -> None:
        self._compiled = compiled
        self._own: Matcher | None = None

    @property
    def is_ready(self) -> bool:
        return self._compiled.done()

    def wait(self, seconds: float) -> None:
        """Until it is ready, or for so long."""
        wait((self._compiled,), seconds)

    def accept(self, token_id: int) -> None:
        """The answer went on by this token: to be told exactly once, however often the answer is recomputed."""
        if self._own is not None:
            self._own.accept(token_id)

    def fill(self, words: Words, end_words: Words) -> str | None:
        """What may come next, as bits of `words`; bits of `end_words` only where the answer may end.

        Returns what went wrong, None when nothing did.
        """
        refusal = self._compiled.exception()
        if refusal is not None:
            return str(refusal)
        if self._own is None:
            self._own = self._compiled.result().copy()
        return self._own.fill_checked(words, end_words)


class Grammars:
    """Compiles constraints for one checkpoint and keeps the latest; safe to use from several threads."""

    def __init__(self, spec: ModelSpec, tokenizer: Tokenizer | None = None, *, rehearsed: bool = True) -> None:
        """The tokenizer is read from the checkpoint's folder, and its vocabulary prepared, when first needed.

        `rehearsed` goes the first steps of an answer before a constraint counts as compiled: not needed where another
        process has done so.
        """
        self._spec = spec
        self._tokenizer = tokenizer
        self._rehearsed = rehearsed
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._preparing = threading.Lock()
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], Future[Matcher]] = OrderedDict()
        self._num_chars = 0

    def prepare(self) -> llguidance.LLTokenizer:
        """The vocabulary as llguidance wants it; the first call takes a second for 150,000 tokens."""
        with self._preparing:
            if self._vocabulary is None:
                tokenizer = self._tokenizer or Tokenizer.from_folder(self._spec.folder, self._spec.ids)
                self._vocabulary = read_vocabulary(tokenizer, self._spec)
            return self._vocabulary

    def start(self, constraint: Constraint) -> AnswerGrammar:
        """For one answer; does not wait. Equal constraints are compiled once."""
        return AnswerGrammar(self._compiled(constraint))

    def check(self, constraint: Constraint) -> None:
        """Raises `InvalidRequest` naming the field when no answer can be held to this. May take seconds, or minutes."""
        self._compiled(constraint).result()

    def _compiled(self, constraint: Constraint) -> Future[Matcher]:
        key = (constraint.kind, constraint.text)
        with self._lock:
            known = self._kept.get(key)
            if known is not None and not (known.done() and known.exception() is not None):
                self._kept.move_to_end(key)
                return known
            if known is None:
                self._num_chars += len(constraint.text)
            self._kept[key] = new = in_deep_thread(lambda: self._compile(constraint))
            while len(self._kept) > KEPT_GRAMMARS or self._num_chars > KEPT_CHARS:
                (_, text), _ = self._kept.popitem(last=False)
                self._num_chars -= len(text)
            return new

    def _compile(self, constraint: Constraint) -> Matcher:
        matcher = compile_constraint(constraint, self.prepare())
        if self._rehearsed and (reason := rehearse(matcher.copy(), self._spec)) is not None:
            raise _refusal(constraint, reason)
        return matcher


def in_deep_thread(work: Callable[[], T]) -> Future[T]:
    """`work` in a thread of its own with STACK_BYTES of stack."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  (whoever waits for the future gets it)
            future.set_exception(error)

    with _STACK_LOCK:
        usual = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=run, name="qvl-grammar", daemon=True).start()
        finally:
            threading.stack_size(usual)
    return future


_STACK_LOCK = threading.Lock()


def compile_constraint(constraint: Constraint, vocabulary: llguidance.LLTokenizer) -> Matcher:
    """A pristine matcher, tried for its first token. Needs a deep stack. Raises `InvalidRequest` naming the field."""
    try:
        compiled = llguidance.LLMatcher(vocabulary, as_grammar(constraint), log_level=0, limits=_LIMITS)
    except ValueError as error:  # not JSON, nested too deeply, not Unicode
        raise _refusal(constraint, str(error)) from error
    if compiled.is_error():
        raise _refusal(constraint, compiled.get_error())
    matcher = Matcher(compiled)
    trial = matcher.copy()
    words = np.zeros(-(-vocabulary.vocab_size // 32), dtype=np.int32)
    trial.fill(words)
    if trial.error is not None or not words.any():
        raise _refusal(constraint, trial.error or "nothing matches it")
    return matcher


def rehearse(matcher: Matcher, spec: ModelSpec) -> str | None:
    """Go the first steps of some answer; what stopped it, None when nothing did."""
    num_words = -(-spec.text.vocab_size // 32)
    words, ends = np.zeros(num_words, dtype=np.int32), token_words(spec.ids.eos, num_words)
    allowed = ~token_words(spec.ids.never_sampled, num_words)
    choice = np.random.default_rng(0)
    for _ in range(REHEARSED_STEPS):
        started = time.thread_time()
        error = matcher.fill_checked(words, ends)
        if time.thread_time() - started > SLOW_SECONDS:
            return "every token of an answer would take too long"
        if error is not None:
            return error
        np.bitwise_and(words, allowed, out=words)
        if not words.any():
            return "it leads to where no token may follow"
        going_on = np.flatnonzero(np.unpackbits((words & ~ends).view(np.uint8), bitorder="little"))
        if not len(going_on):
            return None
        matcher.accept(int(choice.choice(going_on)))
    return None


def token_words(token_ids: Iterable[int], num_words: int) -> Words:
    """int32 [num_words] with the bits of these tokens set."""
    bits = np.zeros(num_words * 32, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def _refusal(constraint: Constraint, reason: str) -> InvalidRequest:
    message = f"'{constraint.param}' cannot be kept to: {_gist(reason)}"
    return InvalidRequest(message, param=constraint.param)


def _gist(complaint: str) -> str:
    """One line of what llguidance says, without its drawings of the place."""
    lines = complaint.replace("<non-verbose/>", "").strip().splitlines() or [""]
    line = next((line for line in lines if line.startswith("error: ")), lines[0])
    if line.startswith("NoExtension"):
        return "nothing matches it"
    return line if len(line) <= MOST_SAID else line[:MOST_SAID] + "…"


def as_grammar(constraint: Constraint) -> str:
    """The constraint in llguidance's own form. Raises ValueError for a schema that is not a JSON object."""
    if constraint.kind == "regex":
        return str(llguidance.LLMatcher.grammar_from_regex(constraint.text))
    if constraint.kind == "grammar":
        return str(llguidance.LLMatcher.grammar_from_lark(constraint.text))
    if constraint.kind == "choice":
        texts = msgspec.json.decode(constraint.text, type=list[str])
        return str(llguidance.LLMatcher.grammar_from_regex("|".join(map(_literal, texts))))
    schema = constraint.text if constraint.kind == "json_schema" else '{"type": "object"}'
    return str(llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": JSON_BLANKS}))


def _literal(text: str) -> str:
    """A regular expression for exactly this text."""
    return "".join(char if char.isalnum() or ord(char) > 127 else f"\\x{ord(char):02x}" for char in text)


class _Bytes:
    """The tokens as llguidance reads them. Special tokens are only ever named, never spelt."""

    bos_token_id = None

    def __init__(
        self, tokens: Sequence[bytes], special: Sequence[int], eos: int, encode: Callable[[str], list[int]]
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = eos
        self._encode = encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


def read_vocabulary(tokenizer: Tokenizer, spec: ModelSpec) -> llguidance.LLTokenizer:
    """As many tokens as the model has scores; ids without a token of their own (padding) are never allowed."""
    size, eos = spec.text.vocab_size, spec.ids.eos
    tokens = [tokenizer.token_bytes(token_id) for token_id in range(size)]
    special = sorted(id for id in {*tokenizer.special_ids, *spec.ids.never_sampled, *eos} if id < size)
    wrapped = llguidance.TokenizerWrapper(_Bytes(tokens, special, eos[0], tokenizer.encode))
    return llguidance.LLTokenizer(wrapped, eos_token=list(eos))
