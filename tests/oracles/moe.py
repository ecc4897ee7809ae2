"""SwiGLU, the grouped sigmoid router, the experts: DeepSeek-V3 report, section 2.1.2, equations 12 to 16."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Routing:
    """One layer's decisions, tokens in [B, T] order."""

    logits_BTE: np.ndarray
    scores_BTE: np.ndarray  # sigmoid, without the bias
    indices_BTK: np.ndarray  # ascending
    weights_BTK: np.ndarray  # in the order of the indices, scaled
    load_E: np.ndarray  # tokens per expert
    margin: float  # how far the closest decision was from going the other way


def swiglu(params, x):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""
    gate = x @ params["gate_proj.weight"].T
    return (gate / (1.0 + np.exp(-gate)) * (x @ params["up_proj.weight"].T)) @ params["down_proj.weight"].T


def top_k(scores, k):
    """(indices of the k largest along the last dim, the smallest gap between chosen and refused)."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    chosen, refused = order[..., :k], order[..., k:]
    if refused.shape[-1] == 0:
        return chosen, np.inf
    worst_in = np.take_along_axis(scores, chosen[..., -1:], axis=-1)
    return chosen, float((worst_in - np.take_along_axis(scores, refused[..., :1], axis=-1)).min())


def route(logits_BTE, bias_E, *, cfg):
    """Pick topk_group groups by the sum of their two best biased scores, then K experts among them.

    The bias chooses and does no more: weights are the unbiased scores of the chosen, normalised if the
    configuration says so, times routed_scaling_factor. Other groups are out of the race (-inf), whatever the
    signs.
    """
    E, G, K = cfg["n_routed_experts"], cfg["n_group"], cfg["num_experts_per_tok"]
    scores_BTE = 1.0 / (1.0 + np.exp(-logits_BTE))
    choice_BTGe = (scores_BTE + bias_E).reshape(*scores_BTE.shape[:-1], G, E // G)
    group_scores_BTG = np.sort(choice_BTGe, axis=-1)[..., -2:].sum(axis=-1)
    groups, group_margin = top_k(group_scores_BTG, cfg["topk_group"])
    kept_BTG = np.zeros(group_scores_BTG.shape, bool)
    np.put_along_axis(kept_BTG, groups, True, axis=-1)
    choice_BTE = np.where(kept_BTG[..., None], choice_BTGe, -np.inf).reshape(scores_BTE.shape)

    indices_BTK, expert_margin = top_k(choice_BTE, K)
    indices_BTK = np.sort(indices_BTK, axis=-1)
    weights_BTK = np.take_along_axis(scores_BTE, indices_BTK, axis=-1)
    if cfg["norm_topk_prob"]:
        weights_BTK = weights_BTK / weights_BTK.sum(axis=-1, keepdims=True)
    load_E = np.bincount(indices_BTK.reshape(-1), minlength=E)
    return Routing(
        logits_BTE,
        scores_BTE,
        indices_BTK,
        weights_BTK * cfg["routed_scaling_factor"],
        load_E,
        min(group_margin, expert_margin),
    )


def moe(params, x_BTD, *, cfg):
    """params: names below `mlp.`; x [B, T, D] -> ([B, T, D], Routing). No capacity, no dropped token."""
    routing = route(x_BTD @ params["gate.weight"].T, params["gate.e_score_correction_bias"], cfg=cfg)
    out_BTD = swiglu(below(params, "shared_experts."), x_BTD)
    for expert in range(cfg["n_routed_experts"]):
        weight_BT = np.where(routing.indices_BTK == expert, routing.weights_BTK, 0.0).sum(axis=-1)
        out_BTD = out_BTD + weight_BT[..., None] * swiglu(below(params, f"experts.{expert}."), x_BTD)
    return out_BTD, routing


def below(params, prefix):
    """The parameters whose names start with prefix, with the prefix cut off."""
    return {name[len(prefix) :]: value for name, value in params.items() if name.startswith(prefix)}
