"""The router: which experts a token visits, and with what weights (report section 2.1.2, equations 12-16)."""
from __future__ import annotations

import mindspore as ms
from mindspore import ops

from ..kernels.linear import linear
from ..kernels.topk import choose_experts
from ..spec import ParamSpec, normal, zeros


def router_spec(cfg) -> dict:
    """``w`` and, for auxiliary-loss-free balancing, the choice bias: state updated by its own rule, never by gradient."""
    D, E = cfg.hidden_size, cfg.n_routed_experts
    specs = {"w": ParamSpec((D, E), ("embed", None), normal(cfg.initializer_range))}
    if cfg.has_router_bias:
        specs["bias"] = ParamSpec((E,), (None,), zeros, dtype="float32")
    return specs


def route(params, x_TD, *, cfg):
    """Group-limited top-k routing, all in float32.

    x_TD: [tokens, D] -> (idx [tokens, K] int32, weights [tokens, K], scores [tokens, E], logits [tokens, E]), the last
    three float32. Any function of this signature can stand in for it (``route=`` of ``loss_fn``).
    """
    logits_TE = linear(x_TD.astype(ms.float32), params["w"].astype(ms.float32))
    scores_TE = ops.sigmoid(logits_TE) if cfg.scoring_func == "sigmoid" else ops.softmax(logits_TE, -1)
    choice_TE = ops.stop_gradient(scores_TE)
    if cfg.topk_method == "noaux_tc":
        choice_TE = choice_TE + ops.stop_gradient(params["bias"])
    limited = cfg.topk_method != "greedy"
    idx_TK = choose_experts(choice_TE, n_group=cfg.n_group if limited else 1, topk_group=cfg.topk_group if limited else 1,
                            k=cfg.num_experts_per_tok,
                            group_score="top2" if cfg.topk_method == "noaux_tc" else "max")
    # the bias picks experts; the weights come from the unbiased scores
    weights_TK = ops.gather_elements(scores_TE, 1, idx_TK)
    if cfg.norm_topk_prob:
        weights_TK = weights_TK / (ops.sum(weights_TK, -1, True) + 1e-20)
    return idx_TK, weights_TK * cfg.routed_scaling_factor, scores_TE, logits_TE


def updated_bias(bias, load, rate):
    """The balancing rule: b_i + rate * sign(mean load - load_i). bias, load: [E]; rate: 0-D (report section 2.1.2).

    ``load`` counts the tokens of the whole global batch, once each.
    """
    load = load.astype(ms.float32)
    return bias + rate * ops.sign(ops.mean(load) - load)
