"""One transformer block: norm, attention, norm, feed-forward or mixture of experts, each with its residual."""
from __future__ import annotations

from ..kernels.rms_norm import rms_norm
from ..kernels.step import attention_step, fits, mlp_step, moe_step
from ..parallel.rows import gather_seq, scatter_seq
from ..parallel.shard import psum
from ..spec import ParamSpec, ones
from .mla import again, cached_mla, mla, mla_spec
from .mlp import mlp, mlp_spec
from .moe import mixture, moe, moe_spec


def block_spec(cfg, is_moe: bool) -> dict:
    """Leaves of one block. A dense one has ``mlp``; a MoE block has ``router``, ``experts`` and ``shared`` beside its
    norms (not a level deeper: MindSpore allows six levels, and an optimiser's state in a returned tuple needs them)."""
    D = cfg.hidden_size
    ffn = moe_spec(cfg) if is_moe else {"mlp": mlp_spec(cfg, cfg.intermediate_size)}
    return {"attn_norm": ParamSpec((D,), ("embed",), ones), "attn": mla_spec(cfg),
            "ffn_norm": ParamSpec((D,), ("embed",), ones)} | ffn


def block(params, x, rope, segment_ids, *, cfg, route, balance, counted=None, selective=False):
    """x: [B, T, D] -> (x, load, balance loss); for a dense block the last two are empty tuples.

    Where rows are cut, x is a rank's positions of them ("residual_seq"); rope and segment_ids are of whole rows. counted: how
    many positions of a row, from its first, load and balance loss are about; all by default.
    selective: norms and up-projections of the latents are computed again in the backward pass.
    """
    h = again(rms_norm, selective, x, params["attn_norm"], cfg.rms_norm_eps)
    x = x + mla(params["attn"], h, rope, segment_ids, cfg=cfg, selective=selective)
    h = again(rms_norm, selective, x, params["ffn_norm"], cfg.rms_norm_eps)
    if "router" in params:
        y, load, aux = moe(params, h, cfg=cfg, route=route, balance=balance, counted=counted)
        return x + y, (load,), (aux,)
    return x + scatter_seq(mlp(params["mlp"], gather_seq(h, "residual")), "ffn"), (), ()


def cached_block(params, x, at, pool, *, cfg, route, block_size, fused=False):
    """``block`` of new tokens of some sequences over a layer's cache (``cached_mla``). x: [n, D] -> [n, D].

    fused: in the CPU's own operators where there are few tokens, for whole float32 params and the default router.
    """
    eps = cfg.rms_norm_eps
    if fused and "tables" in at and fits(x.shape[0]):
        x = attention_step(x, params["attn_norm"], params["attn"], at, pool, num_heads=cfg.num_attention_heads,
                           scale=cfg.softmax_scale, block_size=block_size, eps=eps)
        if "router" in params:
            return moe_step(x, params["ffn_norm"], params, cfg=cfg)
        return mlp_step(x, params["ffn_norm"], params["mlp"], eps=eps)
    x = x + cached_mla(params["attn"], rms_norm(x, params["attn_norm"], eps), at, pool, cfg=cfg, block_size=block_size)
    h = rms_norm(x, params["ffn_norm"], eps)
    if "router" in params:
        return x + mixture(params, h.expand_dims(0), cfg=cfg, route=route)[0].reshape(x.shape)
    return x + psum(mlp(params["mlp"], h), "ffn")
