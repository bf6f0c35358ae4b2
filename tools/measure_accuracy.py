"""What rounding to 8 or 4 bits costs in accuracy: `python tools/measure_accuracy.py qvl/demo --sets text table follow`.

Two measures, both of rounded against unrounded (bfloat16) weights of one checkpoint, through `qvl.LLM`:

- On any checkpoint: the unrounded model answers some questions; how likely does each precision find these answers,
  token by token (perplexity, as a ratio), and how often is its own next token the same?
- On the bundled one (`--sets`): the held-out scores of tools/demo_model/score.py, which draws what is asked. Needs the
  fonts that docs/demo-model.md names.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qvl import LLM, SamplingParams

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = {"bf16": "none", "int8": "int8", "int4": "int4"}
QUESTIONS = ("Read the text.", "Describe this picture.", "Which colours are in the picture?")
TEXTS = ("What is the largest planet?", "Count from one to twenty.", "Write a sentence about rain.")
ANSWER_TOKENS = 48
FORCED = 100.0  # the bias that makes a token the choice; log-probabilities are those before it


class Reader:
    """What score.py asks: conversations of texts, pictures and videos (lists of pictures)."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def answer(self, *turns: list[Any] | str) -> str:
        """The last answer, control tokens included; odd turns are ours, even ones the model's."""
        messages = []
        for number, turn in enumerate(turns):
            parts = [_part(part) for part in ([turn] if isinstance(turn, str) else turn)]
            messages.append({"role": "assistant" if number % 2 else "user", "content": parts})
        sampling = SamplingParams(max_tokens=300, temperature=0.0, skip_special_tokens=False)
        text = self._llm.chat(messages, sampling, use_tqdm=False).text
        return text.replace("<|im_end|>", "").replace("<|endoftext|>", "")


def _part(part: Any) -> dict[str, Any]:
    kind = "text" if isinstance(part, str) else "video" if isinstance(part, list) else "image"
    return {"type": kind, kind: part}


def prompts(pictures: Sequence[Path]) -> list[tuple[str, dict[str, Any]]]:
    """Raw prompts in Qwen2-VL's own format, and the pictures in them."""
    head, tail = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    seen = [
        (f"{head}<|vision_start|><|image_pad|><|vision_end|>{question}{tail}", {"image": str(picture)})
        for picture in pictures
        for question in QUESTIONS
    ]
    return seen + [(head + text + tail, {}) for text in TEXTS]


def raw(llm: LLM, prompt: tuple[str, dict[str, Any]], answer: Sequence[int] = ()) -> dict[str, Any]:
    """The prompt and the beginning of its answer, as `LLM.generate` takes them."""
    ids = [*llm.tokenizer.encode_control(prompt[0]), *answer]
    return {"prompt_token_ids": ids, "multi_modal_data": prompt[1]} if prompt[1] else {"prompt_token_ids": ids}


def answers(llm: LLM, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[tuple[int, ...]]:
    greedy = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, repetition_penalty=1.0)
    found = llm.generate([raw(llm, prompt) for prompt in asked], greedy, use_tqdm=False)
    return [completion.answers[0].token_ids for completion in found]


def compare(
    llm: LLM, asked: Sequence[tuple[str, dict[str, Any]]], told: Sequence[Sequence[int]]
) -> tuple[list[float], list[bool]]:
    """For each token of each answer: its log-probability here, and whether it is the most likely one here, too."""
    requests, rules = [], []
    for prompt, answer in zip(asked, told, strict=True):
        for place, token in enumerate(answer):
            requests.append(raw(llm, prompt, answer[:place]))
            rules.append(SamplingParams(max_tokens=1, temperature=0.0, logprobs=1, logit_bias={token: FORCED}))
    logprobs, same = [], []
    for completion, rule in zip(llm.generate(requests, rules, use_tqdm=False), rules, strict=True):
        (found,) = completion.answers[0].logprobs or ()
        assert found.token_id in rule.logit_bias, "another token was stronger than the bias"
        logprobs.append(found.logprob)
        same.append(found.top[0][0] == found.token_id)
    return logprobs, same


def scores(llm: LLM, sets: Sequence[str], count: int, fonts: Path) -> dict[str, float]:
    if not sets:
        return {}
    from tools.demo_model import score
    from tools.demo_model.fonts import FontBook

    book = FontBook(fonts, "held_out")
    reader: Any = Reader(llm)  # score.py's own is transformers; it asks for `answer` alone
    return {name: score.run(reader, name, count, book, seed=2026) for name in sets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--pictures", type=Path, nargs="*", default=sorted((ROOT / "samples").glob("*.png")))
    parser.add_argument(
        "--sets", nargs="*", default=[], help="of tools/demo_model/score.py, for the bundled checkpoint"
    )
    parser.add_argument("--count", type=int, default=25, help="pictures or conversations per set")
    parser.add_argument("--fonts", type=Path, default=ROOT / ".fonts")
    given = parser.parse_args()
    asked = prompts(given.pictures)
    told: list[tuple[int, ...]] = []
    unrounded = 0.0
    head = ["perplexity", "against bf16", "same next token", *given.sets]
    print(f"| | {' | '.join(head)} |\n|{'---|' * (len(head) + 1)}")
    for name, quantization in PRECISIONS.items():
        llm = LLM(given.checkpoint, device="cpu", dtype="bfloat16", quantization=quantization)
        told = told or answers(llm, asked)
        logprobs, same = compare(llm, asked, told)
        perplexity = math.exp(-statistics.fmean(logprobs))
        unrounded = unrounded or perplexity
        cells = [f"{perplexity:.4f}", f"{perplexity / unrounded:.4f}", f"{100 * statistics.fmean(same):.1f} %"]
        cells += [f"{value:.2f}" for value in scores(llm, given.sets, given.count, given.fonts).values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        del llm
    print(f"\n{len(logprobs)} tokens of {len(told)} answers; {given.count} items a set")


if __name__ == "__main__":
    main()
