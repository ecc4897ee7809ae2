"""Continue prompts with a plain loop over the model: no cache, one compiled graph per length bucket."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import ops
from mindspore.ops.primitive import constexpr

from .config import Config
from .kernels.rms_norm import rms_norm
from .model import computable, layers, make_block
from .nn.vocab import embed, head
from .transform import compiled


@compiled
def next_logits(params, tokens, lengths, *, cfg, route=None):
    """Logits after the last real token of each row. tokens: [B, T] int, padded right; lengths: [B] -> [B, W] float32.

    A causal model does not see the padding, so any filler will do.
    """
    params = computable(params)
    B, T = tokens.shape
    one_block = make_block(cfg, route, None)
    x = layers(params["layers"], embed(params["embed"], tokens), {"tokens": tokens}, one_block, False, cfg)[0]
    x = x.reshape(B * T, cfg.hidden_size)
    last = ops.gather(x, first_rows(B, T) + lengths - 1, 0)
    return head(params, rms_norm(last, params["norm"], cfg.rms_norm_eps))


@constexpr
def first_rows(B: int, T: int):
    """Index of the first token of each row in the flattened batch: [B] int32."""
    return ms.Tensor(np.arange(B, dtype=np.int32) * T)


def sample(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    """One id from logits [W]: the best at temperature 0, else drawn from softmax(logits / temperature)."""
    if temperature == 0.0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    return int(rng.choice(len(p), p=p / p.sum()))


def generate(params: Any, prompts: Sequence[Sequence[int]], *, cfg: Config, max_new_tokens: int = 32,
             temperature: float = 0.0, seed: int = 0, eos_token_id: int | None = None,
             on_token: Callable[[int, int], None] | None = None) -> list[list[int]]:
    """Continue each prompt (a list of ids) by at most ``max_new_tokens`` ids; returns only the new ones.

    temperature 0 is greedy. A row draws from its own generator, seeded by (seed, row), so that its text does not depend
    on the rows around it. Stops a row after ``eos_token_id``. on_token(row, id) is called as ids appear.
    Raises ValueError for an empty prompt, an id outside the vocabulary or a negative setting.
    """
    prompts = [list(map(int, p)) for p in prompts]
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; give at least one token (the bos token, say)")
        bad = [t for t in prompt if not 0 <= t < cfg.vocab_size]
        if bad:
            raise ValueError(f"prompt {i} has the id {bad[0]}; expected 0 to {cfg.vocab_size - 1} (vocab_size)")
    if max_new_tokens < 0 or not temperature >= 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}, temperature={temperature}; expected at least 0")
    if not prompts:
        return []
    rows, rngs = [list(p) for p in prompts], [np.random.default_rng([seed, i]) for i in range(len(prompts))]
    alive = [True] * len(rows)
    for _ in range(max_new_tokens):
        if not any(alive):
            break
        width = bucket(max(len(r) for r in rows))
        tokens = np.zeros((len(rows), width), np.int32)
        for i, row in enumerate(rows):
            tokens[i, :len(row)] = row
        logits = next_logits(params, tokens, np.array([len(r) for r in rows], np.int32), cfg=cfg).asnumpy()
        for i, row in enumerate(rows):
            if alive[i]:
                row.append(sample(logits[i], temperature, rngs[i]))
                alive[i] = row[-1] != eos_token_id
                if on_token:
                    on_token(i, row[-1])
    return [row[len(prompt):] for row, prompt in zip(rows, prompts)]


def bucket(length: int) -> int:
    """The least power of two, from 64 on, that holds ``length`` tokens: one graph serves a whole bucket."""
    return max(64, 1 << (length - 1).bit_length())
