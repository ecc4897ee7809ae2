"""DeepSeekMoE: shared experts for every token and dropless routed experts for the chosen (report section 2.1.2)."""
from __future__ import annotations

import mindspore as ms
from mindspore import ops

from ..kernels.native import iota
from ..kernels.topk import count_experts
from ..parallel.rows import gather_seq, scatter_seq
from ..parallel.shard import all_gather, part, parts, psum
from ..spec import ParamSpec, normal
from .dispatch import exchanged_experts, form_of, ranks_visited
from .mlp import mlp, mlp_spec
from .router import router_spec


def moe_spec(cfg) -> dict:
    """Router, routed experts stacked as [E, D, F], and the shared experts as one network of their joint width."""
    E, D, F, std = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size, normal(cfg.initializer_range)
    specs = {
        "router": router_spec(cfg),
        "experts": {
            "w_gate": ParamSpec((E, D, F), ("expert", "embed", "ffn"), std),
            "w_up": ParamSpec((E, D, F), ("expert", "embed", "ffn"), std),
            "w_down": ParamSpec((E, F, D), ("expert", "ffn", "embed"), std),
        },
    }
    if cfg.n_shared_experts:
        specs["shared"] = mlp_spec(cfg, F * cfg.n_shared_experts)
    return specs


def moe(params, x, *, cfg, route, balance, counted=None):
    """Shared plus chosen experts. params: ``router``, ``experts`` and perhaps ``shared``. x: [B, T, D].

    Returns (y [B, T, D], load [E] int32: tokens per expert, the weighted balance loss: 0-D float32). Where rows are cut, x and
    y are a rank's positions; load and balance loss are about the first ``counted`` positions of whole rows, by default all.
    """
    B = x.shape[0]
    y_BTD, idx_TK, scores_TE, logits_TE = mixture(params, x, cfg=cfg, route=route)
    idx_TK, scores_TE, logits_TE = (_joined(v, B, "residual_seq", counted) for v in (idx_TK, scores_TE, logits_TE))
    load_E = psum(count_experts(idx_TK, cfg.n_routed_experts), "batch")
    return y_BTD, load_E, balance(idx_TK, scores_TE, logits_TE, B)


def mixture(params, x, *, cfg, route):
    """``moe`` without its statistics: (y [B, T, D], and what ``route`` answered of a rank's own positions but the weights)."""
    B, t, D = x.shape
    own_TD = x.reshape(B * t, D)
    idx_TK, weights_TK, scores_TE, logits_TE = route(params["router"], own_TD, cfg=cfg)
    x_TD = _joined(own_TD, B, "residual")
    if parts("expert.ffn") == parts("ffn"):  # cut, or not, as the shared experts are
        y_TD = routed(params["experts"], x_TD, _joined(idx_TK, B, "residual"), _joined(weights_TK, B, "residual"), cfg)
        if "shared" in params:
            y_TD = y_TD + mlp(params["shared"], x_TD)
        y_BTD = _summed(y_TD, B)
    else:
        y_BTD = spread(params["experts"], own_TD, idx_TK, weights_TK, cfg).reshape(B, t, D)
        if "shared" in params:
            y_BTD = y_BTD + _summed(mlp(params["shared"], x_TD), B)
    return y_BTD, idx_TK, scores_TE, logits_TE


def _joined(x, B, name, counted=None):
    """The ranks' rows put together, and their first positions. x: [B * t, F] -> [B * T, F]."""
    x = gather_seq(x.reshape(B, x.shape[0] // B, x.shape[1]), name)
    if counted is not None and counted < x.shape[1]:
        x = x[:, :counted]
    return x.reshape(B * x.shape[1], x.shape[2])


def _summed(y_TD, B):
    """The sum over "ffn" of [B * T, D], of which a rank gets its own positions: [B, t, D]."""
    return scatter_seq(y_TD.reshape(B, y_TD.shape[0] // B, y_TD.shape[1]), "ffn")


def spread(w, x_TD, idx_TK, weights_TK, cfg):
    """``routed`` of experts that the ranks of a tensor group do not cut: each rank sees to its own part of their tokens."""
    n = parts("ffn")
    if parts("residual") == n:  # which it has already
        return routed(w, x_TD, idx_TK, weights_TK, cfg)
    T, K = idx_TK.shape
    pad = -T % n
    if pad:  # tokens of no weight
        x_TD = ops.concat((x_TD, ops.zeros((pad, x_TD.shape[1]), x_TD.dtype)))
        idx_TK = ops.concat((idx_TK, ops.zeros((pad, 1), ms.int32) + iota(K)))
        weights_TK = ops.concat((weights_TK, ops.zeros((pad, K), weights_TK.dtype)))
    size = (T + pad) // n
    i = part("ffn") * size
    y_TD = routed(w, x_TD[i : i + size], idx_TK[i : i + size], weights_TK[i : i + size], cfg)
    return all_gather(y_TD, "ffn")[:T]


def routed(w, x_TD, idx_TK, weights_TK, cfg):
    """The chosen experts' weighted sum for each token, [T, D]; of a rank's "expert.ffn", to be summed."""
    limited = cfg.topk_method != "greedy"
    visited = ranks_visited(parts("expert"), cfg.num_experts_per_tok, cfg.n_group if limited else 1,
                            cfg.topk_group if limited else 1)
    return exchanged_experts(w, x_TD, idx_TK, weights_TK, form_of(parts("expert"), visited))
