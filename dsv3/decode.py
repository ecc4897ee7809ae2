"""The model one step at a time, over a paged cache of latents: prefill, decode, and decode with a draft of the MTP module.

Each of them is one graph over n tokens of any sequences, flat. The host says where every token is: ``positions`` [n] in its
sequence and ``slots`` [n], the row of the pool that is to hold it. Row 0 to block_size - 1 of a pool belong to nobody: tokens
that only fill up a bucket go there, at position 0.
"""
from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from .config import Config
from .kernels.rms_norm import rms_norm
from .nn.block import cached_block
from .nn.mtp import mtp_input
from .nn.rope import rope_table
from .nn.router import route
from .nn.vocab import embed, whole_head
from .spec import DTYPES


def make_cache(cfg: Config, *, blocks: int, block_size: int, rows: int, max_length: int, mtp: bool = False,
               dtype: str = "float32") -> dict[str, Any]:
    """An empty cache: a pytree that the graphs below change in place.

    "layers": a pool [blocks * block_size, C + R] a main layer, and with ``mtp`` one more for the first MTP module;
    "hidden": [2 * (rows + 1), D], the last two hidden states of up to ``rows`` sequences and of nobody, for drafts;
    "cos", "sin": [max_length, R/2] float32. C + R = kv_lora_rank + qk_rope_head_dim values a token and layer are all that is
    kept (report section 2.1.1). Raises ValueError for a dtype that params cannot have and for mtp without a module.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; expected one of {', '.join(DTYPES)}")
    if mtp and not cfg.num_nextn_predict_layers:
        raise ValueError("drafts need an MTP module; this model has num_nextn_predict_layers=0")
    width, n = cfg.kv_lora_rank + cfg.qk_rope_head_dim, cfg.num_hidden_layers + bool(mtp)

    def zeros(*shape: int) -> Tensor:
        return Tensor(np.zeros(shape, np.float32), dtype=getattr(ms, dtype))

    cos, sin = rope_table(cfg, max_length)
    return {"layers": tuple(zeros(blocks * block_size, width) for _ in range(n)),
            "hidden": zeros(2 * (rows + 1), cfg.hidden_size), "cos": Tensor(cos), "sin": Tensor(sin)}


def bytes_per_token(cfg: Config, mtp: bool = False, dtype_bytes: int = 4) -> int:
    """Bytes of cache a token takes in all layers."""
    return (cfg.num_hidden_layers + bool(mtp)) * (cfg.kv_lora_rank + cfg.qk_rope_head_dim) * dtype_bytes


def prefill(params, cache, tokens, positions, slots, segments, last, ahead, rows, *, cfg, block_size, mtp, fused=False):
    """Whole prompts, one after another, each a segment; nothing of them is in the cache yet.

    tokens, positions, slots, segments: [n] int32; last: [m] int32, which of the n tokens' logits are wanted. With ``mtp`` the
    MTP module's cache is filled too: ahead [n] int32 is the token after each (anything where it is not known yet), and the
    hidden states of ``last`` are kept in rows [m] of cache["hidden"].
    Returns (the likeliest next ids [m] int32, logits [m, W] float32).
    """
    at = {"cos": cache["cos"], "sin": cache["sin"], "positions": positions, "slots": slots, "segments": segments}
    return _filled(params, cache, tokens, at, last, ahead, rows, cfg, block_size, mtp, fused)


def extend(params, cache, tokens, positions, slots, tables, last, ahead, rows, *, cfg, block_size, mtp, fused=False):
    """``prefill`` of tokens that go on from what is cached of B sequences, n / B tokens of each. tables: [B, M] int32, the
    blocks of each; a token sees what they hold up to its own position."""
    at = {"cos": cache["cos"], "sin": cache["sin"], "positions": positions, "slots": slots, "tables": tables}
    return _filled(params, cache, tokens, at, last, ahead, rows, cfg, block_size, mtp, fused)


def speculate(params, cache, behind, tokens, positions, slots, tables, *, cfg, block_size, fused=False):
    """One step of B sequences that drafts a token of each with the MTP module and verifies it in the same pass of the model.

    behind: what the MTP module has not seen, two tokens a sequence: {"tokens", "positions", "slots", "rows" [2B] int32, "at"
    [B] int32, "into" [2B]: rows for the hidden states of this step}. Token j of a sequence is the one that follows the position
    of its hidden state, which lies in rows[j] of cache["hidden"]; ``at`` is the last that is real, from which the draft follows.
    tokens: [B], the last of each sequence; positions, slots: [2B] int32, of it and of the draft; tables: [B, M].
    Returns (drafts [B] int32, the likeliest ids [2B] int32 after the token and after its draft, logits [2B, W] float32). The
    draft counts when it is the token chosen in its place (arXiv 2211.17192 with a draft that is certain).
    """
    B, module = tokens.shape[0], params["mtp"][0]
    at = {"cos": cache["cos"], "sin": cache["sin"], "positions": behind["positions"], "slots": behind["slots"], "tables": tables}
    hidden = ops.gather(cache["hidden"], behind["rows"], 0)
    x = _draft(params, cache, behind["tokens"], hidden, at, cfg, block_size, fused)
    chosen = rms_norm(ops.gather(x, behind["at"], 0), module["norm"], cfg.rms_norm_eps)
    drafts = ops.argmax(whole_head(module if "head" in module else params, chosen), -1).astype(ms.int32)
    at = {"cos": cache["cos"], "sin": cache["sin"], "positions": positions, "slots": slots, "tables": tables}
    hidden = _hidden(params, cache, ops.stack((tokens, drafts), 1).reshape(2 * B), at, cfg, block_size, fused)
    kept = ops.scatter_update(cache["hidden"], behind["into"], hidden)
    ids, logits = _logits(params, hidden)
    return drafts, ops.depend(ids, kept), logits


def _filled(params, cache, tokens, at, last, ahead, rows, cfg, block_size, mtp, fused):
    hidden = _hidden(params, cache, tokens, at, cfg, block_size, fused)
    last_hidden = ops.gather(hidden, last, 0)
    ids, logits = _logits(params, last_hidden)
    if mtp:
        drafted = _draft(params, cache, ahead, hidden, at, cfg, block_size, fused)
        ids = ops.depend(ids, (drafted, ops.scatter_update(cache["hidden"], rows, last_hidden)))
    return ids, logits


def _hidden(params, cache, tokens, at, cfg, block_size, fused):
    """Of the last main block, normalised. [n] -> [n, D]."""
    x = embed(params["embed"], tokens.expand_dims(0)).reshape(tokens.shape[0], -1)
    for i in range(len(params["layers"])):
        x = cached_block(params["layers"][i], x, at, cache["layers"][i], cfg=cfg, route=route, block_size=block_size, fused=fused)
    return rms_norm(x, params["norm"], cfg.rms_norm_eps)


def _draft(params, cache, ahead, hidden, at, cfg, block_size, fused):
    """Of the MTP block, for tokens ``ahead`` [n] of the hidden states [n, D] (``nn.mtp``), at the positions of these."""
    module = params["mtp"][0]
    embedded = embed(module["embed"] if "embed" in module else params["embed"], ahead.expand_dims(0)).reshape(ahead.shape[0], -1)
    return cached_block(module, mtp_input(module, embedded, hidden, cfg=cfg), at, cache["layers"][len(params["layers"])], cfg=cfg,
                        route=route, block_size=block_size, fused=fused)


def _logits(params, hidden):
    logits = whole_head(params, hidden)
    return ops.argmax(logits, -1).astype(ms.int32), logits
