"""DeepSeekMoE: shared experts for every token and dropless routed experts for the chosen (report section 2.1.2)."""
from __future__ import annotations

from mindspore import ops

from ..kernels.experts import experts, experts_reference
from ..kernels.topk import count_experts
from ..parallel.rows import gather_seq, scatter_seq
from ..parallel.shard import all_gather, part, parts, psum, reduce_scatter
from ..spec import ParamSpec, normal
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
    B, t, D = x.shape
    idx_TK, weights_TK, scores_TE, logits_TE = route(params["router"], x.reshape(B * t, D), cfg=cfg)
    x_TD = _joined(x.reshape(B * t, D), B, "residual")
    y_TD = routed(params["experts"], x_TD, _joined(idx_TK, B, "residual"), _joined(weights_TK, B, "residual"))
    if "shared" in params:
        y_TD = y_TD + mlp(params["shared"], x_TD)
    y_BTD = scatter_seq(y_TD.reshape(B, y_TD.shape[0] // B, D), "ffn")
    idx_TK, scores_TE, logits_TE = (_joined(v, B, "residual_seq", counted) for v in (idx_TK, scores_TE, logits_TE))
    load_E = psum(count_experts(idx_TK, cfg.n_routed_experts), "batch")
    return y_BTD, load_E, balance(idx_TK, scores_TE, logits_TE, B)


def _joined(x, B, name, counted=None):
    """The ranks' rows put together, and their first positions. x: [B * t, F] -> [B * T, F]."""
    x = gather_seq(x.reshape(B, x.shape[0] // B, x.shape[1]), name)
    if counted is not None and counted < x.shape[1]:
        x = x[:, :counted]
    return x.reshape(B * x.shape[1], x.shape[2])


def routed(w, x_TD, idx_TK, weights_TK):
    """The chosen experts' weighted sum for each token, [T, D]; of a rank's "ffn", to be summed.

    Where the experts are cut, the ranks that share them gather their tokens, each computes what its own experts add to all
    of them, and the sums go back: dropless, with static shapes. That moves (n - 1) T rows each way; sending every token to
    its K experts' ranks would move up to K (n - 1) / n T, which is less only where n is above K.
    """
    n = parts("expert")
    if n == 1:
        return experts(x_TD, w["w_gate"], w["w_up"], w["w_down"], idx_TK, weights_TK)
    x_TD, idx_TK, weights_TK = all_gather(x_TD, "expert"), all_gather(idx_TK, "expert"), all_gather(weights_TK, "expert")
    E = w["w_gate"].shape[0]
    own_TK = idx_TK - part("expert") * E
    own_TK = ops.select(ops.logical_and(own_TK >= 0, own_TK < E), own_TK, ops.full_like(own_TK, E))  # E: another rank's
    return reduce_scatter(experts_reference(x_TD, w["w_gate"], w["w_up"], w["w_down"], own_TK, weights_TK), "expert")
