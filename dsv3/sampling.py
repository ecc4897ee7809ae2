"""From logits to a token: penalty, temperature, filters, and a draw that depends on seed and place alone."""
from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How to continue one prompt. Raises ValueError naming the field that is out of range.

    temperature 0 is greedy. Penalty and filters apply in the order of the fields: repetition_penalty (arXiv 1909.05858) to
    every id of prompt and continuation, temperature, the top_k likeliest (0: all), the fewest whose probabilities reach top_p
    (arXiv 1904.09751), those of at least min_p times the highest (arXiv 2407.01082). seed None draws a fresh one. Ends after
    max_new_tokens, after an id of stop_token_ids, and after the model's end-of-sequence ids unless ignore_eos. logprobs: -1
    none, 0 of the chosen id, n also the n likeliest; natural logarithms of the model's own probabilities, before all of these.
    """

    max_new_tokens: int = 16
    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int = -1

    def __post_init__(self) -> None:
        def need(fits: bool, name: str, what: str) -> None:
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)!r}; expected {what}")

        need(self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        need(0 < self.repetition_penalty < float("inf"), "repetition_penalty", "a number above 0 (1 changes nothing)")
        need(0 <= self.temperature < float("inf"), "temperature", "at least 0 (0 is greedy)")
        need(self.top_k >= 0, "top_k", "at least 0 (0 keeps all)")
        need(0 < self.top_p <= 1, "top_p", "above 0, at most 1")
        need(0 <= self.min_p <= 1, "min_p", "from 0 to 1")
        need(self.seed is None or 0 <= self.seed < 2**128, "seed", "0 to 2**128 - 1, or None")
        need(self.logprobs >= -1, "logprobs", "-1 (none) or more")

    @property
    def plain(self) -> bool:
        """Whether the likeliest id alone decides."""
        return self.temperature == 0 and self.repetition_penalty == 1 and self.logprobs < 0


def probabilities(logits: np.ndarray, sampling: Sampling, seen: Collection[int] = ()) -> tuple[np.ndarray, np.ndarray]:
    """(ids, their probabilities, float64, ids ascending) that may follow. logits: [W]; seen: ids of prompt and continuation.

    Greedy is one id of probability 1, of several equals the lowest.
    """
    scores = np.asarray(logits, np.float64)
    if sampling.repetition_penalty != 1 and seen:
        scores, at = scores.copy(), np.fromiter(seen, np.int64, len(seen))
        scores[at] = np.where(scores[at] > 0, scores[at] / sampling.repetition_penalty, scores[at] * sampling.repetition_penalty)
    if sampling.temperature == 0:
        return np.array([scores.argmax()]), np.ones(1)
    ids = np.arange(len(scores))
    if 0 < sampling.top_k < len(scores):  # equals of the last that stays stay too
        ids = np.flatnonzero(scores >= np.partition(scores, -sampling.top_k)[-sampling.top_k])
    p = _softmax(scores[ids] / sampling.temperature)
    if sampling.top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        keep = np.sort(order[before < sampling.top_p])
        ids, p = ids[keep], p[keep] / p[keep].sum()
    if sampling.min_p > 0:
        keep = p >= sampling.min_p * p.max()
        ids, p = ids[keep], p[keep] / p[keep].sum()
    return ids, p


def _softmax(scores: np.ndarray) -> np.ndarray:
    p = np.exp(scores - scores.max())
    return p / p.sum()


def choose(logits: np.ndarray, sampling: Sampling, seed: int, index: int, seen: Collection[int] = ()) -> int:
    """The id at place ``index`` of a continuation. The draw is a function of (seed, index), whoever else is being served.

    Ids are laid out in their own order, not by probability: logits that differ by a rounding then lead to another id only
    where the draw falls within that rounding of a border.
    """
    ids, p = probabilities(logits, sampling, seen)
    if len(ids) == 1:
        return int(ids[0])
    draw = np.random.Generator(np.random.Philox(key=seed, counter=index)).random()
    return int(ids[min(np.searchsorted(np.cumsum(p), draw, "right"), len(ids) - 1)])


def log_probabilities(logits: np.ndarray, chosen: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """(that of the chosen id, the n likeliest as (id, natural logarithm), the likeliest first)."""
    scores = np.asarray(logits, np.float64)
    logs = scores - scores.max()
    logs -= np.log(np.exp(logs).sum())
    n = min(n, len(logs))
    best = np.argpartition(-logs, n - 1)[:n] if n else np.zeros(0, np.int64)
    best = best[np.lexsort((best, -logs[best]))]
    return float(logs[chosen]), tuple((int(i), float(logs[i])) for i in best)
