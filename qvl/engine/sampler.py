"""From logits to token ids: the best token of every row, and for rows with rules penalties, bans, filters and noise.

Knows tensors [rows, vocab] and sampling rules. Does not know models, blocks or when an answer ends. Nothing here waits
for the device: what was chosen stays there for the next step, and a copy of it is under way to the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qvl.engine.noise import gumbel, noise_keys
from qvl.engine.penalties import TokenCounts
from qvl.engine.sequence import is_greedy, wants_penalties
from qvl.engine.transfer import Fetch, put
from qvl.types import SamplingParams, TokenLogprob

FEW_CANDIDATES = 1024
ROWS_AT_ONCE = 32  # rows with rules are computed in parts: filters take many times the memory of the logits
FAILED = -1


@dataclass(slots=True)  # not frozen, which doubles the time to make one; every step makes one per row
class SamplerRow:
    """Row `index` of the logits, which has rules of its own. `token_ids` are prompt and output as far as they are known
    here, `num_tokens` counts those that only the device knows, too.

    `owner` is whose row it is. `sampling` is resolved (no None but in `logprobs` and `seed`); `seed` is used instead of
    `sampling.seed`; `banned` ids may not be chosen this time; bit i of `allowed`, where there is one, says whether
    token i may. `line`: where its counts of tokens are kept.
    """

    index: int
    owner: object
    line: int
    sampling: SamplingParams
    seed: int
    banned: Sequence[int]
    token_ids: Sequence[int]
    num_prompt_tokens: int
    num_tokens: int
    allowed: npt.NDArray[np.int32] | None = None

    @property
    def position(self) -> int:
        """How many tokens were generated before this one."""
        return self.num_tokens - self.num_prompt_tokens


@dataclass(slots=True)
class Drawn:
    """What the rows of a step gave, on the device: `tokens` int64 [m], FAILED where logits were not numbers.

    `tables` has log-probabilities as bits, per group of rows: their indices, and int32 [k, 1 + 2 * top].
    """

    tokens: Tensor
    tables: list[tuple[Sequence[SamplerRow], Tensor]] = field(default_factory=list)

    def fetch(self) -> Drawing:
        """Begin to copy it to the host."""
        if not self.tables:
            return Drawing(self, Fetch(self.tokens))
        tables = [table.flatten() for _, table in self.tables]
        return Drawing(self, Fetch(torch.cat([self.tokens.to(torch.int32), *tables])))


@dataclass(frozen=True, slots=True)
class Drawing:
    """`Drawn` on its way to the host."""

    drawn: Drawn
    copy: Fetch

    def wait(self) -> tuple[list[int], dict[int, TokenLogprob]]:
        """The tokens of all rows, and the log-probabilities of those that asked, by index."""
        host = self.copy.wait()
        start = len(self.drawn.tokens)
        tokens: list[int] = host[:start].tolist()
        logprobs: dict[int, TokenLogprob] = {}
        for rows, table in self.drawn.tables:
            lines = host[start : start + table.numel()].reshape(table.shape)
            start += table.numel()
            for row, line in zip(rows, lines, strict=True):
                if tokens[row.index] != FAILED:
                    logprobs[row.index] = _read_logprob(tokens[row.index], line, row.sampling.logprobs or 0)
        return tokens, logprobs


class Sampler:
    """Chooses one token per row. `never_sampled` ids are banned in every row; `num_lines` bounds `SamplerRow.line`."""

    def __init__(self, vocab_size: int, num_lines: int, *, never_sampled: Iterable[int], device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.counts = TokenCounts(num_lines, vocab_size, device)
        self._never = torch.tensor(sorted(never_sampled), dtype=torch.int64, device=device)
        self._all_ids = torch.arange(vocab_size, dtype=torch.int32, device=device)[None]

    def best(self, logits: Tensor) -> Tensor:
        """The most likely token of every row, FAILED where logits are not numbers. [m, vocab] -> int64 [m]

        Fit for a graph. The logits are as they were afterwards.
        """
        # A sum is not finite as soon as one of its terms is not: one pass, no [m, vocab] mask.
        healthy = logits.sum(dim=1, dtype=torch.float32).isfinite()
        kept = logits.index_select(1, self._never)
        logits.index_fill_(1, self._never, -torch.inf)
        tokens = logits.argmax(dim=1).masked_fill_(healthy.logical_not(), FAILED)
        logits.index_copy_(1, self._never, kept)
        return tokens

    def draw(self, logits: Tensor, best: Tensor, rows: Sequence[SamplerRow]) -> Drawn:
        """`best` for all rows of logits [m, vocab], but for `rows` what their rules say."""
        if not rows:
            return Drawn(best)
        drawn = Drawn(best.clone())
        for part in parts(rows):
            self._draw_some(logits, best, part, drawn.tokens)
        self.tell_logprobs(logits, rows, drawn)
        return drawn

    def tell_logprobs(self, logits: Tensor, rows: Sequence[SamplerRow], drawn: Drawn) -> None:
        """Add the log-probabilities that `rows` want, those of `logits` before any rule, to what was drawn."""
        for part in parts([row for row in rows if row.sampling.logprobs is not None]):
            index = self._index([row.index for row in part])
            raw = torch.log_softmax(logits.index_select(0, index).float(), dim=1)
            num_top = max(row.sampling.logprobs or 0 for row in part)
            drawn.tables.append((part, _pack_logprobs(raw, drawn.tokens.index_select(0, index), num_top)))

    def _draw_some(self, logits: Tensor, best: Tensor, rows: Sequence[SamplerRow], drawn: Tensor) -> None:
        index = self._index([row.index for row in rows])
        part = logits.index_select(0, index).float()
        penalised = [i for i, row in enumerate(rows) if wants_penalties(row.sampling)]
        counted = [rows[i] for i in penalised]
        lines = self._penalise(part, penalised, counted) if penalised else None
        self._bias(part, rows)
        self._ban(part, rows)
        self._keep(part, rows)
        failed = best.index_select(0, index) == FAILED
        tokens = self._choose(part, rows).masked_fill(failed, FAILED)
        if lines is not None:
            self.counts.count(counted, lines, tokens.index_select(0, self._index(penalised)))
        drawn.index_copy_(0, index, tokens)

    def _choose(self, logits: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
        """Every row by the cheapest way that its rules allow. [m, vocab] -> [m] int64"""
        kinds = [kind_of(row.sampling, self.vocab_size) for row in rows]
        ways = {"greedy": self._take_best, "free": self._draw, "few": self._draw_filtered, "many": self._draw_filtered}
        tokens = torch.empty(len(rows), dtype=torch.int64, device=self.device)
        for kind in sorted(set(kinds)):
            members = [i for i, other in enumerate(kinds) if other == kind]
            if len(members) == len(rows):
                return ways[kind](logits, rows)
            index = self._index(members)
            tokens.index_copy_(0, index, ways[kind](logits.index_select(0, index), [rows[i] for i in members]))
        return tokens

    def _take_best(self, logits: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
        return logits.argmax(dim=1)

    def _draw(self, logits: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
        """From the whole vocabulary."""
        return self._pick(logits * self._scale(rows), self._all_ids, rows)

    def _draw_filtered(self, logits: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
        """From what top_k and top_p leave."""
        scale, top_p = self._scale(rows), self._column(rows, "top_p")
        counts = [top_k_of(row.sampling, self.vocab_size) for row in rows]
        top_k = self._index(counts)[:, None]
        if max(counts) <= FEW_CANDIDATES:
            values, ids = logits.topk(max(counts), dim=1)
            values = values * scale
            return self._pick(_filter_sorted(values, values[:, :1], top_k, top_p), ids.to(torch.int32), rows)
        scaled = logits * scale
        total = scaled.logsumexp(dim=1, keepdim=True)
        if self.device.type == "cpu" and self.vocab_size > FEW_CANDIDATES:
            # The few best are nearly always all that top_p leaves. Asking a GPU would mean to wait for it.
            values, ids = scaled.topk(FEW_CANDIDATES, dim=1)
            enough = (values - total).exp().sum(dim=1, keepdim=True) > top_p
            if bool((enough | (top_k <= FEW_CANDIDATES)).all()):
                return self._pick(_filter_sorted(values, total, top_k, top_p), ids.to(torch.int32), rows)
        values, ids = logits.sort(dim=1, descending=True, stable=True)
        return self._pick(_filter_sorted(values * scale, total, top_k, top_p), ids.to(torch.int32), rows)

    def _pick(self, values: Tensor, ids: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
        """min_p, then the Gumbel-max trick: scaled logits [m, c] of the candidates `ids` [m or 1, c] -> [m] int64"""
        if any((row.sampling.min_p or 0.0) > 0.0 for row in rows):
            floor = values.amax(dim=1, keepdim=True) + self._column(rows, "min_p").log()
            values = values.masked_fill(values < floor, -torch.inf)
        keys = put(noise_keys([row.seed for row in rows], [row.position for row in rows]), self.device)
        best = (values + gumbel(keys, ids)).argmax(dim=1, keepdim=True)
        return ids.expand(len(rows), -1).gather(1, best)[:, 0].to(torch.int64)

    def _scale(self, rows: Sequence[SamplerRow]) -> Tensor:
        return put(np.asarray([[scale_of(row.sampling)] for row in rows], dtype=np.float32), self.device)

    def _column(self, rows: Sequence[SamplerRow], name: str) -> Tensor:
        """One number of every row's rules, [m, 1]."""
        return put(np.asarray([getattr(row.sampling, name) for row in rows], dtype=np.float32), self.device)[:, None]

    def _penalise(self, logits: Tensor, places: Sequence[int], rows: Sequence[SamplerRow]) -> Tensor:
        """Penalise the rows `places` of `logits`, in place; the lines of their counts, int64 [k]."""
        for row in rows:
            self.counts.prepare(row)
        lines = self._index([row.line for row in rows])
        if len(places) == len(logits):
            logits.copy_(self.counts.apply(logits, rows, lines))
        else:
            index = self._index(places)
            logits.index_copy_(0, index, self.counts.apply(logits.index_select(0, index), rows, lines))
        return lines

    def _bias(self, logits: Tensor, rows: Sequence[SamplerRow]) -> None:
        where: list[tuple[int, int]] = []
        values: list[float] = []
        for i, row in enumerate(rows):
            for token_id, value in row.sampling.logit_bias.items():
                if 0 <= token_id < self.vocab_size:
                    where.append((i, token_id))
                    values.append(value)
        if where:
            index = self._index(where)
            rows_index, columns = index[:, 0], index[:, 1]
            biased = logits[rows_index, columns] + put(np.asarray(values, dtype=np.float32), self.device)
            logits.index_put_((rows_index, columns), biased)

    def _ban(self, logits: Tensor, rows: Sequence[SamplerRow]) -> None:
        logits.index_fill_(1, self._never, -torch.inf)
        now = [
            (i, token_id) for i, row in enumerate(rows) for token_id in row.banned if 0 <= token_id < self.vocab_size
        ]
        if now:
            index = self._index(now)
            logits.index_put_((index[:, 0], index[:, 1]), logits.new_full((), -torch.inf))

    def _keep(self, logits: Tensor, rows: Sequence[SamplerRow]) -> None:
        """-inf for what is not `allowed`, in rows that say so."""
        places = [i for i, row in enumerate(rows) if row.allowed is not None]
        if not places:
            return
        words = np.stack([row.allowed for row in rows if row.allowed is not None])
        if self.device.type == "cpu":
            bits = np.unpackbits(words.view(np.uint8), axis=1, count=self.vocab_size, bitorder="little")
            outside = torch.from_numpy(bits) == 0
        else:
            outside = ~unpack_bits(put(words, self.device), self.vocab_size)
        if len(places) == len(logits):
            logits.masked_fill_(outside, -torch.inf)
        else:
            index = self._index(places)
            logits.index_copy_(0, index, logits.index_select(0, index).masked_fill(outside, -torch.inf))

    def _index(self, numbers: Sequence[object]) -> Tensor:
        return put(np.asarray(numbers, dtype=np.int64), self.device)


def parts(rows: Sequence[SamplerRow]) -> list[Sequence[SamplerRow]]:
    """As many as are computed at once."""
    return [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]


def unpack_bits(words: Tensor, count: int) -> Tensor:
    """The first `count` bits of every line, on whatever device. int32 [k, n] -> bool [k, count]"""
    bit = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> bit) & 1).flatten(1)[:, :count].to(torch.bool)


def kind_of(sampling: SamplingParams, vocab_size: int) -> str:
    if is_greedy(sampling):
        return "greedy"
    top_k = top_k_of(sampling, vocab_size)
    if top_k <= FEW_CANDIDATES and top_k < vocab_size:
        return "few"
    return "free" if top_k == vocab_size and (sampling.top_p or 1.0) >= 1.0 else "many"


def scale_of(sampling: SamplingParams) -> float:
    """What scores are multiplied with, rounded to fp32, before they are compared."""
    return 1.0 / (sampling.temperature or 1.0)


def top_k_of(sampling: SamplingParams, vocab_size: int) -> int:
    top_k = sampling.top_k or 0
    return min(top_k, vocab_size) if top_k > 0 else vocab_size


def _filter_sorted(values: Tensor, total: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """-inf outside the first `top_k` and the smallest head whose probability reaches `top_p`. [m, c], best first

    `total` [m, 1] is the logarithm of the sum over the whole vocabulary; in a row with a top_k within these candidates
    the sum over what that leaves counts instead.
    """
    rank = torch.arange(values.shape[1], device=values.device)[None]
    values = values.masked_fill(rank >= top_k, -torch.inf)
    total = torch.where(top_k <= values.shape[1], values.logsumexp(dim=1, keepdim=True), total)
    probs = (values - total).exp()
    before = probs.cumsum(dim=1) - probs
    # 1.0 means "no filter", which a rounded sum may overstep; the best candidate always stays.
    outside = (before >= top_p) & (top_p < 1.0) & (rank > 0)
    return values.masked_fill(outside, -torch.inf)


def _pack_logprobs(raw: Tensor, tokens: Tensor, num_top: int) -> Tensor:
    """Log-probability of the chosen; ids and log-probabilities of the best, as bits: int32 [k, 1 + 2 * num_top]"""
    chosen = raw.gather(1, tokens.clamp(min=0)[:, None])
    top, ids = raw.topk(num_top, dim=1)
    return torch.cat((chosen.view(torch.int32), ids.to(torch.int32), top.view(torch.int32)), dim=1)


def _read_logprob(token: int, line: npt.NDArray[np.int32], keep: int) -> TokenLogprob:
    num_top = len(line) // 2
    floats = line.view(np.float32)
    top = zip(line[1 : 1 + keep].tolist(), floats[1 + num_top : 1 + num_top + keep].tolist(), strict=True)
    return TokenLogprob(token, float(floats[0]), tuple(top))
