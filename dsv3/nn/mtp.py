"""Multi-token prediction: one more block per depth predicts one token further (report section 2.2, equations 21-25)."""
from __future__ import annotations

from mindspore import ops

from ..kernels.linear import linear
from ..kernels.rms_norm import rms_norm
from ..spec import ParamSpec, normal, ones
from .block import block_spec


def mtp_spec(cfg) -> dict:
    """Leaves of one MTP module: its two input norms, the projection, its own output norm, and a MoE block; with
    ``mtp_share_embeddings=False`` an embedding and a head of its own."""
    D, W, std = cfg.hidden_size, cfg.vocab_size, normal(cfg.initializer_range)
    own = {"embed": ParamSpec((W, D), ("vocab", "embed"), std), "head": ParamSpec((D, W), ("embed", "vocab"), std)}
    return {
        "enorm": ParamSpec((D,), ("embed",), ones),
        "hnorm": ParamSpec((D,), ("embed",), ones),
        "eh_proj": ParamSpec((2 * D, D), (None, "embed"), normal(cfg.initializer_range)),
        "norm": ParamSpec((D,), ("embed",), ones),
    } | block_spec(cfg, is_moe=True) | ({} if cfg.mtp_share_embeddings else own)


def mtp_input(params, embedded, hidden, *, cfg):
    """[RMSNorm(embedding of t+k); RMSNorm(previous hidden)] eh_proj, [B, T, D] each.

    The embedding comes first: the order of the released ``eh_proj``, not of equation 21.
    """
    eps = cfg.rms_norm_eps
    joined = ops.cat((rms_norm(embedded, params["enorm"], eps), rms_norm(hidden, params["hnorm"], eps)), axis=-1)
    return linear(joined, params["eh_proj"])
