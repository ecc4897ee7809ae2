"""Multi-head latent attention (DeepSeek-V3 report, section 2.1.1, equations 1-11): in its training form, and over a cache."""
from __future__ import annotations

import mindspore as ms
from mindspore import ops

from ..kernels.attention import mla_attention
from ..kernels.latent import latent_attention, write_latents
from ..kernels.linear import linear
from ..kernels.rms_norm import rms_norm
from ..parallel.rows import gather_seq, own_positions, scatter_seq
from ..parallel.shard import psum
from ..spec import ParamSpec, normal, ones


def mla_spec(cfg) -> dict:
    """Leaves of one attention block. Without ``q_lora_rank`` a single ``wq`` stands for ``wq_a q_norm wq_b``."""
    D, H, Q, C = cfg.hidden_size, cfg.num_attention_heads, cfg.q_lora_rank, cfg.kv_lora_rank
    N, R, V, std = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim, normal(cfg.initializer_range)
    if Q is None:
        query = {"wq": ParamSpec((D, H * (N + R)), ("embed", "heads"), std)}
    else:
        query = {
            "wq_a": ParamSpec((D, Q), ("embed", "q_lora"), std),
            "q_norm": ParamSpec((Q,), ("q_lora",), ones),
            "wq_b": ParamSpec((Q, H * (N + R)), ("q_lora", "heads"), std),
        }
    return query | {
        "wkv_a": ParamSpec((D, C + R), ("embed", None), std),
        "kv_norm": ParamSpec((C,), ("kv_lora",), ones),
        "wkv_b": ParamSpec((C, H * (N + V)), ("kv_lora", "heads"), std),
        "wo": ParamSpec((H * V, D), ("heads", "embed"), std),
    }


def mla(params, x, rope, segment_ids, *, cfg, selective=False):
    """Causal self-attention through a latent of ``kv_lora_rank``. x: [B, T, D] -> [B, T, D].

    With a mesh the heads are cut: each rank computes those whose columns of wq_b and wkv_b it has. Where rows are cut too, x
    and the result are a rank's positions. The latents are made of those and gathered, not x: Q and C + R values a token in
    place of D. Over "seq" only C + R are, so that each rank makes the keys and values of the whole row for the queries of its
    part: for V3 576 values a token, where ring attention hands round H (N + V) + R of a rank's heads, 32832 when it has all
    of them. The price is the product with wkv_b, 2 C H (N + V) FLOPs a token, on every rank that shares the row.

    rope: (cos, sin) of ``rope_tables``; segment_ids: [B, T] int32 or None, tokens see their own segment only; both of whole
    rows. Only the latent is normalised; the rotary key ``k_pe`` is not, and is one for all heads. Softmax in float32.

    selective: make queries, keys and values again from the latents in the backward pass (report section 3.2.3); where the
    queries' latent is gathered on the way, it is gathered again.
    """
    C, R, eps = cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.rms_norm_eps
    if cfg.q_lora_rank is None:
        q = linear(gather_seq(x, "residual"), params["wq"])
    else:
        q = again(_queries, selective, linear(x, params["wq_a"]), params["q_norm"], params["wq_b"], eps)
    latent_BTC, k_pe_BTR = ops.split(gather_seq(linear(x, params["wkv_a"]), "residual_seq"), (C, R), axis=-1)
    heads = params["wkv_b"].shape[1] // (cfg.qk_nope_head_dim + cfg.v_head_dim)
    kv = again(_keys_and_values, selective, latent_BTC, params["kv_norm"], params["wkv_b"], eps)
    out = mla_attention(q, kv, k_pe_BTR, rope[0], rope[1], segment_ids, num_heads=heads,
                        qk_nope_head_dim=cfg.qk_nope_head_dim, qk_rope_head_dim=R, v_head_dim=cfg.v_head_dim,
                        scale=cfg.softmax_scale, query_positions=own_positions(kv.shape[1]))
    return scatter_seq(linear(out, params["wo"]), "heads")


def cached_mla(params, x, at, pool, *, cfg, block_size):
    """Attention of n new tokens of some sequences, which it adds to a layer's cache. x: [n, D] -> [n, D].

    at: {"cos", "sin" [L, R/2], "positions", "slots" [n]} and one of "segments" [n] and "tables" [B, M]. Segments: the tokens of a
    segment are a sequence from its first on, and keys and values are made in full, cheaper than the absorbed form where
    queries are as many as keys. Tables: they go on from what ``kernels.latent`` finds in the pool, in the absorbed form.
    """
    C, R, eps = cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.rms_norm_eps
    if cfg.q_lora_rank is None:
        q = linear(x, params["wq"])
    else:
        q = linear(rms_norm(linear(x, params["wq_a"]), params["q_norm"], eps), params["wq_b"])
    latent, heads = linear(x, params["wkv_a"]), params["wkv_b"].shape[1] // (cfg.qk_nope_head_dim + cfg.v_head_dim)
    cos, sin, positions = at["cos"], at["sin"], at["positions"]
    rows = write_latents(latent, params["kv_norm"], cos, sin, positions, at["slots"], pool, eps=eps)
    if "tables" in at:
        out = latent_attention(q, params["wkv_b"], cos, sin, positions, at["tables"], pool, rows, num_heads=heads,
                               scale=cfg.softmax_scale, block_size=block_size)
    else:
        kv, k_pe = linear(rows[:, :C], params["wkv_b"]), latent[:, C:]
        angles = ops.gather(cos, positions, 0).expand_dims(0), ops.gather(sin, positions, 0).expand_dims(0)
        out = mla_attention(q.expand_dims(0), kv.expand_dims(0), k_pe.expand_dims(0), angles[0], angles[1],
                            at["segments"].expand_dims(0), num_heads=heads, qk_nope_head_dim=cfg.qk_nope_head_dim,
                            qk_rope_head_dim=R, v_head_dim=cfg.v_head_dim, scale=cfg.softmax_scale)
        out = out.reshape(x.shape[0], -1)  # not out[0], which the CPU copies number by number
    return psum(linear(out, params["wo"]), "heads")


def _queries(latent, norm, w, eps):
    return linear(gather_seq(rms_norm(latent, norm, eps), "residual"), w)


def _keys_and_values(latent, norm, w, eps):
    return linear(rms_norm(latent, norm, eps), w)


def again(fn, on, *args):
    """``fn(*args)``, with ``on`` computed again in the backward pass instead of kept; fn: of a module, not a closure."""
    if on:
        return ms.recompute(fn, *args)
    return fn(*args)
