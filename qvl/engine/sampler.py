"""From logits to token ids: penalties, bans, filters, and noise that depends on a request's seed and position alone.

Knows tensors [rows, vocab] and sampling rules. Does not know models, blocks or when an answer ends. There is no
generator state: the noise of a token is a hash of (seed, position, token id), so a seeded answer is the same whatever
else runs beside it, and however often it was preempted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qvl.engine.penalties import CountTables, apply_penalties, wants_penalties
from qvl.types import SamplingParams, TokenLogprob

MIN_TEMPERATURE = 1e-5  # below this, dividing by the temperature would overflow and the choice is the greedy one anyway
FEW_CANDIDATES = 1024
FAILED = -1


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """One row of logits: `token_ids` are prompt and output so far.

    `sampling` is resolved (no None but in `logprobs` and `seed`); `seed` is used instead of `sampling.seed`; `banned`
    ids may not be chosen this time.
    """

    owner: object
    sampling: SamplingParams
    seed: int
    banned: Sequence[int]
    token_ids: Sequence[int]
    num_prompt_tokens: int

    @property
    def position(self) -> int:
        """How many tokens were generated before this one."""
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What one row gave: a token id, or `failed` when its logits were not numbers."""

    token_id: int
    logprob: TokenLogprob | None = None

    @property
    def failed(self) -> bool:
        return self.token_id == FAILED


@dataclass(frozen=True, slots=True)
class TokenMask:
    """The tokens that some rows may choose: bit i of int32 `words` [k, ceil(vocab / 32)] for token i of row `rows[k]`.

    Every line has at least one bit that `never_sampled` leaves.
    """

    rows: Sequence[int]
    words: npt.NDArray[np.int32]


class Sampler:
    """Chooses one token per row. `never_sampled` ids are banned in every row."""

    def __init__(self, vocab_size: int, *, never_sampled: Iterable[int], device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._never = torch.tensor(sorted(never_sampled), dtype=torch.int64, device=device)
        self._all_ids = torch.arange(vocab_size, dtype=torch.int32, device=device)[None]
        self._counts = CountTables()

    def sample(self, logits: Tensor, rows: Sequence[SamplerRow], mask: TokenMask | None = None) -> list[SampledToken]:
        """Tokens for float32 logits [m, vocab], which are overwritten. Waits for the device once, at the end."""
        # A sum is not finite as soon as one of its terms is not: one pass, no [m, vocab] mask.
        healthy = logits.sum(dim=1).isfinite()
        wanted = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
        raw = torch.log_softmax(logits[self._index(wanted)], dim=1) if wanted else None
        self._penalise(logits, rows)
        self._bias(logits, rows)
        self._ban(logits, rows)
        if mask is not None:
            self._keep(logits, mask)
        tokens = torch.where(healthy, self._choose(logits, rows), FAILED)
        parts = [tokens.to(torch.int32)]
        if raw is not None:
            num_top = max(rows[i].sampling.logprobs or 0 for i in wanted)
            parts += _pack_logprobs(raw, tokens[self._index(wanted)], num_top)
        host = torch.cat(parts).cpu().numpy()
        return _unpack(host, rows, wanted)

    def _choose(self, logits: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
        """Every row by the cheapest way that its rules allow. [m, vocab] -> [m] int64"""
        kinds = [_kind(row.sampling, self.vocab_size) for row in rows]
        ways = {"greedy": self._take_best, "free": self._draw, "filtered": self._draw_filtered}
        tokens = torch.empty(len(rows), dtype=torch.int64, device=self.device)
        for kind in set(kinds):
            members = [i for i, other in enumerate(kinds) if other == kind]
            if len(members) == len(rows):
                return ways[kind](logits, rows)
            index = self._index(members)
            tokens[index] = ways[kind](logits[index], [rows[i] for i in members])
        return tokens

    def _take_best(self, logits: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
        return logits.argmax(dim=1)

    def _draw(self, logits: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
        """From the whole vocabulary."""
        return self._pick(logits / self._column(rows, "temperature"), self._all_ids, rows)

    def _draw_filtered(self, logits: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
        """From what top_k and top_p leave."""
        temperature, top_p = self._column(rows, "temperature"), self._column(rows, "top_p")
        counts = [_top_k(row.sampling, self.vocab_size) for row in rows]
        top_k = self._put(np.asarray(counts, dtype=np.int64))[:, None]
        if max(counts) <= FEW_CANDIDATES:
            values, ids = logits.topk(max(counts), dim=1)
            values = values / temperature
            return self._pick(_filter_sorted(values, values[:, :1], top_k, top_p), ids.to(torch.int32), rows)
        scaled = logits / temperature
        total = scaled.logsumexp(dim=1, keepdim=True)
        if self.device.type == "cpu" and self.vocab_size > FEW_CANDIDATES:
            # The few best are nearly always all that top_p leaves. Asking costs a GPU more than sorting.
            values, ids = scaled.topk(FEW_CANDIDATES, dim=1)
            enough = (values - total).exp().sum(dim=1, keepdim=True) > top_p
            if bool((enough | (top_k <= FEW_CANDIDATES)).all()):
                return self._pick(_filter_sorted(values, total, top_k, top_p), ids.to(torch.int32), rows)
        values, ids = scaled.sort(dim=1, descending=True, stable=True)
        return self._pick(_filter_sorted(values, total, top_k, top_p), ids.to(torch.int32), rows)

    def _pick(self, values: Tensor, ids: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
        """min_p, then the Gumbel-max trick: scaled logits [m, c] of the candidates `ids` [m or 1, c] -> [m] int64"""
        if any((row.sampling.min_p or 0.0) > 0.0 for row in rows):
            floor = values.amax(dim=1, keepdim=True) + self._column(rows, "min_p").log()
            values = values.masked_fill(values < floor, -torch.inf)
        keys = self._put(noise_keys([row.seed for row in rows], [row.position for row in rows]))
        best = (values + gumbel(keys, ids)).argmax(dim=1, keepdim=True)
        return ids.expand(len(rows), -1).gather(1, best)[:, 0].to(torch.int64)

    def _column(self, rows: Sequence[SamplerRow], name: str) -> Tensor:
        """One number of every row's rules, [m, 1]."""
        return self._put(np.asarray([getattr(row.sampling, name) for row in rows], dtype=np.float32))[:, None]

    def _penalise(self, logits: Tensor, rows: Sequence[SamplerRow]) -> None:
        chosen = [i for i, row in enumerate(rows) if wants_penalties(row.sampling)]
        if chosen:
            tables = self._counts.of([rows[i] for i in chosen])
            apply_penalties(logits, chosen, tables, [rows[i].sampling for i in chosen])

    def _bias(self, logits: Tensor, rows: Sequence[SamplerRow]) -> None:
        where: list[tuple[int, int]] = []
        values: list[float] = []
        for i, row in enumerate(rows):
            for token_id, value in row.sampling.logit_bias.items():
                if 0 <= token_id < self.vocab_size:
                    where.append((i, token_id))
                    values.append(value)
        if where:
            index = self._put(np.asarray(where, dtype=np.int64).T)
            logits.index_put_((index[0], index[1]), self._put(np.asarray(values, dtype=np.float32)), accumulate=True)

    def _ban(self, logits: Tensor, rows: Sequence[SamplerRow]) -> None:
        logits.index_fill_(1, self._never, -torch.inf)
        now = [
            (i, token_id) for i, row in enumerate(rows) for token_id in row.banned if 0 <= token_id < self.vocab_size
        ]
        if now:
            index = self._put(np.asarray(now, dtype=np.int64).T)
            logits.index_put_((index[0], index[1]), torch.full((), -torch.inf, device=self.device))

    def _keep(self, logits: Tensor, mask: TokenMask) -> None:
        """-inf for what `mask` leaves out, in its rows."""
        if self.device.type == "cpu":
            bits = np.unpackbits(mask.words.view(np.uint8), axis=1, count=self.vocab_size, bitorder="little")
            outside = torch.from_numpy(bits) == 0
        else:
            outside = ~unpack_bits(self._put(mask.words), self.vocab_size)
        if len(mask.rows) == len(logits):
            logits.masked_fill_(outside, -torch.inf)
        else:
            index = self._index(mask.rows)
            logits[index] = logits[index].masked_fill(outside, -torch.inf)

    def _index(self, numbers: Sequence[int]) -> Tensor:
        return self._put(np.asarray(numbers, dtype=np.int64))

    def _put(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


def unpack_bits(words: Tensor, count: int) -> Tensor:
    """The first `count` bits of every line, on whatever device. int32 [k, n] -> bool [k, count]"""
    bit = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> bit) & 1).flatten(1)[:, :count].to(torch.bool)


def is_greedy(sampling: SamplingParams) -> bool:
    """Whether the most likely token is always the one."""
    return (sampling.temperature or 0.0) < MIN_TEMPERATURE or sampling.top_k == 1


def _kind(sampling: SamplingParams, vocab_size: int) -> str:
    if is_greedy(sampling):
        return "greedy"
    is_free = _top_k(sampling, vocab_size) == vocab_size and (sampling.top_p or 1.0) >= 1.0
    return "free" if is_free else "filtered"


def _top_k(sampling: SamplingParams, vocab_size: int) -> int:
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


def noise_keys(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.int32]:
    """Two 32-bit words per row from its 64-bit seed and its position (splitmix64, twice). -> [m, 2]"""
    state = np.asarray(seeds, dtype=np.int64).view(np.uint64)
    state = _mix64(_mix64(state) + np.asarray(positions, dtype=np.uint64))
    return state.view(np.int32).reshape(-1, 2)


def _mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Gumbel noise by hashing. int32 keys [m, 2], int32 ids [m or 1, c] -> float32 [m, c]"""
    bits = _mix32(_mix32(ids ^ keys[:, :1]) ^ keys[:, 1:])
    # Small uniforms decide whether an unlikely token wins, so they keep full precision: 31 bits, and never 0 or 1.
    uniform = ((bits & 0x7FFFFFFF).to(torch.float32) + 0.5).mul_(2.0**-31).clamp_(max=1.0 - 2.0**-24)
    exponential = uniform.neg_().log1p_().neg_()
    return exponential.log_().neg_()


def _mix32(x: Tensor) -> Tensor:
    """A bijective 32-bit hash (two rounds of xor-shift and multiply); int32 products wrap on purpose."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def _pack_logprobs(raw: Tensor, tokens: Tensor, num_top: int) -> list[Tensor]:
    """Chosen log-probability, and ids and log-probabilities of the best `num_top`, as int32 bits for the one copy."""
    chosen = raw.gather(1, tokens.clamp(min=0)[:, None])
    top, ids = raw.topk(num_top, dim=1)
    columns = (chosen.view(torch.int32), ids.to(torch.int32), top.view(torch.int32))
    return [torch.cat(columns, dim=1).flatten()]


def _unpack(host: npt.NDArray[np.int32], rows: Sequence[SamplerRow], wanted: Sequence[int]) -> list[SampledToken]:
    tokens = host[: len(rows)].tolist()
    if not wanted:
        return [SampledToken(token) for token in tokens]
    table = host[len(rows) :].reshape(len(wanted), -1)
    num_top = table.shape[1] // 2
    logprobs: dict[int, TokenLogprob] = {}
    for line, i in zip(table, wanted, strict=True):
        if tokens[i] == FAILED:
            continue
        keep = rows[i].sampling.logprobs or 0
        floats = line.view(np.float32)
        top = zip(line[1 : 1 + keep].tolist(), floats[1 + num_top : 1 + num_top + keep].tolist(), strict=True)
        logprobs[i] = TokenLogprob(tokens[i], float(floats[0]), tuple(top))
    return [SampledToken(token, logprobs.get(i)) for i, token in enumerate(tokens)]
