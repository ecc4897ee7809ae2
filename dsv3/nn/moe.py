"""DeepSeekMoE: shared experts for every token and dropless routed experts for the chosen (report section 2.1.2)."""
from __future__ import annotations

from mindspore import ops

from ..kernels.experts import experts, experts_reference
from ..kernels.topk import count_experts
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


def moe(params, x, *, cfg, route, balance):
    """Shared plus chosen experts. params: ``router``, ``experts`` and perhaps ``shared``. x: [B, T, D].

    Returns (y [B, T, D], load [E] int32: tokens per expert, the weighted balance loss: 0-D float32).
    """
    B, T, D = x.shape
    x_TD = x.reshape(B * T, D)
    idx_TK, weights_TK, scores_TE, logits_TE = route(params["router"], x_TD, cfg=cfg)
    y_TD = routed(params["experts"], x_TD, idx_TK, weights_TK)
    if "shared" in params:
        y_TD = y_TD + mlp(params["shared"], x_TD)
    load_E = psum(count_experts(idx_TK, cfg.n_routed_experts), "tokens")
    return psum(y_TD, "ffn").reshape(B, T, D), load_E, balance(idx_TK, scores_TE, logits_TE, B)


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
