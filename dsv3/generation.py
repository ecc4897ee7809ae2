"""Continue prompts: the engine behind one function, for notebooks."""
from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from .config import Config
from .data.tokenizer import Tokenizer
from .engine import Engine
from .sampling import Sampling
from .tree import flatten

MAX_BATCH = 16  # rows that run together

_engines: dict[tuple, Engine] = {}  # the last one, for its graphs


def generate(params: Any, prompts: Sequence[Sequence[int]] | Sequence[str], *, cfg: Config, max_new_tokens: int = 32,
             temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0,
             seed: int = 0, eos_token_id: int | Sequence[int] | None = None, stop_token_ids: Sequence[int] = (),
             speculative: bool = False, tokenizer: Tokenizer | None = None,
             on_token: Callable[[int, int], bool | None] | None = None) -> list[list[int]] | list[str]:
    """Continue each prompt (a list of ids) by at most ``max_new_tokens`` ids; returns only the new ones.

    With a tokenizer the prompts are texts, begun with its bos and ended by its eos, and so are the results.

    temperature 0 is greedy; the filters are those of ``sampling.Sampling``. Row i draws by (seed, i), so that its text does not
    depend on the rows around it. A row ends after an id of eos_token_id or stop_token_ids. speculative: draft with the model's
    MTP module; the text is the same. on_token(row, id) is called as ids appear, and ends the row by answering True.
    The graphs of the last call serve the next with the same params, settings and sizes.
    Raises ValueError for an empty prompt, an id outside the vocabulary or a setting out of range.
    """
    if tokenizer is not None:
        begin = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
        eos_token_id = tokenizer.eos_id if eos_token_id is None else eos_token_id
        prompts = [[*begin, *tokenizer.encode(text)] for text in prompts]
    eos = () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    rows = [[int(t) for t in prompt] for prompt in prompts]
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {i} is empty; give at least one token (the bos token, say)")
        bad = next((t for t in row if not 0 <= t < cfg.vocab_size), None)
        if bad is not None:
            raise ValueError(f"prompt {i} has the id {bad}; expected 0 to {cfg.vocab_size - 1} (vocab_size)")
    if max_new_tokens < 0 or not temperature >= 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}, temperature={temperature}; expected at least 0")
    if not rows or not max_new_tokens:
        return [[] for _ in rows]
    longest = max(map(len, rows)) + max_new_tokens
    engine = _engine(params, cfg, 1 << max(longest - 1, 255).bit_length(), speculative)
    new: list[list[int]] = [[] for _ in rows]
    row_of = {}
    for i, row in enumerate(rows):
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                            repetition_penalty=repetition_penalty, seed=(seed << 32) + i, stop_token_ids=(*stop_token_ids, *eos))
        row_of[engine.submit(row, sampling)] = i
    ended: set[int] = set()
    try:
        while not engine.idle:
            for event in engine.step():
                i = row_of[event.request]
                if i in ended:
                    continue
                new[i].append(event.token)
                if on_token and on_token(i, event.token):
                    ended.add(i)
                    engine.cancel(event.request)
    finally:
        for request in row_of:
            engine.cancel(request)
    if tokenizer is None:
        return new
    return [tokenizer.decode(row[:-1] if row and row[-1] in eos else row) for row in new]


def _engine(params: Any, cfg: Config, max_length: int, speculative: bool) -> Engine:
    """An engine for these very tensors. Only the last is kept, and not beyond the life of the params."""
    leaves = flatten(params)
    key = (cfg, max_length, speculative, tuple(map(id, leaves)))
    if key not in _engines:
        _engines.clear()
        _engines[key] = Engine(params, cfg, max_batch=MAX_BATCH, max_length=max_length, speculative=speculative)
        weakref.finalize(next(leaf for leaf in leaves if hasattr(leaf, "shape")), _engines.pop, key, None)
    else:
        _engines[key].renew(params)  # a training step may have changed what the tensors hold
    return _engines[key]
