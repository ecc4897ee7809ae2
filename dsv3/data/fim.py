"""Fill in the middle: some documents are cut in three and the middle is moved to the end.

DeepSeek-V3 (report, section 4.1) does this to a tenth of its documents, before they are packed, in the
prefix-suffix-middle form:  begin prefix hole suffix end middle  and the end-of-document token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .tokenizer import Tokenizer

FORMATS = ("psm", "spm")
# begin, hole, end as published tokenizers spell them: DeepSeek-V3, StarCoder, Qwen, CodeLlama
KNOWN = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


@dataclass(frozen=True)
class Fim:
    """Rate of documents rearranged, the order of the pieces, the ids of the three markers, and the seed."""

    rate: float
    format: str
    begin: int
    hole: int
    end: int
    seed: int = 0


def make_fim(
    tokenizer: Tokenizer, rate: float, format: str = "psm", tokens: Sequence[str] | None = None, seed: int = 0
) -> Fim:
    """Check the settings against a tokenizer. tokens: names of begin, hole, end; None: known spellings."""
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"fim rate: expected a share in [0, 1], found {rate}")
    if format not in FORMATS:
        raise ValueError(f"fim format: expected one of {FORMATS}, found {format!r}")
    if tokens is not None and len(tokens) != 3:
        raise ValueError(f"fim tokens: expected three names (begin, hole, end), found {len(tokens)}")
    for names in [tuple(tokens)] if tokens else KNOWN:
        ids = [tokenizer.token_id(name) for name in names]
        if None not in ids:
            return Fim(rate, format, *ids, seed)
    raise ValueError(
        f"{tokenizer.name} has no tokens for fill-in-the-middle (looked for {tokens or 'known names'}); "
        f"name them, or train a tokenizer with them as extra tokens"
    )


def apply_fim(
    text: str, number: int, fim: Fim, encode_batch: Callable[[Sequence[str]], list[list[int]]]
) -> list[int]:
    """Tokens of document `number`, rearranged with probability `fim.rate`.

    The draw depends on the seed and the document's number alone, not on workers or batches. The two cuts fall
    anywhere between characters. psm: begin prefix hole suffix end middle. spm: begin hole suffix end prefix
    middle.
    """
    rng = np.random.default_rng([fim.seed, number])
    if not text or rng.random() >= fim.rate:
        return encode_batch([text])[0]
    low, high = sorted(int(cut) for cut in rng.integers(0, len(text) + 1, size=2))
    prefix, middle, suffix = encode_batch([text[:low], text[low:high], text[high:]])
    if fim.format == "psm":
        return [fim.begin, *prefix, fim.hole, *suffix, fim.end, *middle]
    return [fim.begin, fim.hole, *suffix, fim.end, *prefix, *middle]
