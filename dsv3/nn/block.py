"""One transformer block: norm, attention, norm, feed-forward or mixture of experts, each with its residual."""
from __future__ import annotations

from ..kernels.rms_norm import rms_norm
from ..spec import ParamSpec, ones
from .mla import mla, mla_spec
from .mlp import mlp, mlp_spec
from .moe import moe, moe_spec


def block_spec(cfg, is_moe: bool) -> dict:
    """Leaves of one block; the key ``moe`` or ``mlp`` says which kind it is."""
    D = cfg.hidden_size
    ffn = {"moe": moe_spec(cfg)} if is_moe else {"mlp": mlp_spec(cfg, cfg.intermediate_size)}
    return {"attn_norm": ParamSpec((D,), ("embed",), ones), "attn": mla_spec(cfg),
            "ffn_norm": ParamSpec((D,), ("embed",), ones)} | ffn


def block(params, x, rope, segment_ids, *, cfg, route, balance):
    """x: [B, T, D] -> (x, load, balance loss); for a dense block the last two are empty tuples."""
    x = x + mla(params["attn"], rms_norm(x, params["attn_norm"], cfg.rms_norm_eps), rope, segment_ids, cfg=cfg)
    h = rms_norm(x, params["ffn_norm"], cfg.rms_norm_eps)
    if "moe" in params:
        y, load, aux = moe(params["moe"], h, cfg=cfg, route=route, balance=balance)
        return x + y, (load,), (aux,)
    return x + mlp(params["mlp"], h), (), ()
