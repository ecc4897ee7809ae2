"""Multi-head latent attention in its training form (DeepSeek-V3 report, section 2.1.1, equations 1-11)."""
from __future__ import annotations

from mindspore import ops

from ..kernels.attention import mla_attention
from ..kernels.linear import linear
from ..kernels.rms_norm import rms_norm
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


def mla(params, x, rope, segment_ids, *, cfg):
    """Causal self-attention through a latent of ``kv_lora_rank``. x: [B, T, D] -> [B, T, D].

    With a mesh the heads are cut: each rank computes those whose columns of wq_b and wkv_b it has.

    rope: (cos, sin) of ``rope_tables``; segment_ids: [B, T] int32 or None, tokens see their own segment only. Only the
    latent is normalised; the rotary key ``k_pe`` is not, and is one for all heads. Softmax in float32.
    """
    C, R, eps = cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.rms_norm_eps
    if cfg.q_lora_rank is None:
        q = linear(x, params["wq"])
    else:
        q = linear(rms_norm(linear(x, params["wq_a"]), params["q_norm"], eps), params["wq_b"])
    latent_BTC, k_pe_BTR = ops.split(linear(x, params["wkv_a"]), (C, R), axis=-1)
    heads = params["wkv_b"].shape[1] // (cfg.qk_nope_head_dim + cfg.v_head_dim)
    kv = linear(rms_norm(latent_BTC, params["kv_norm"], eps), params["wkv_b"])
    out = mla_attention(q, kv, k_pe_BTR, rope[0], rope[1], segment_ids, num_heads=heads,
                        qk_nope_head_dim=cfg.qk_nope_head_dim, qk_rope_head_dim=R, v_head_dim=cfg.v_head_dim,
                        scale=cfg.softmax_scale)
    return psum(linear(out, params["wo"]), "heads")
