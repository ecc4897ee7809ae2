"""DeepSeekMoE: shared experts for every token and dropless routed experts for the chosen (report section 2.1.2)."""
from __future__ import annotations

from ..kernels.experts import experts
from ..kernels.topk import count_experts
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
    w = params["experts"]
    y_TD = experts(x_TD, w["w_gate"], w["w_up"], w["w_down"], idx_TK, weights_TK)
    if "shared" in params:
        y_TD = y_TD + mlp(params["shared"], x_TD)
    load_E = count_experts(idx_TK, cfg.n_routed_experts)
    return y_TD.reshape(B, T, D), load_E, balance(idx_TK, scores_TE, logits_TE, B)
