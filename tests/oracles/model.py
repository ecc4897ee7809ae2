"""The whole model and its losses: DeepSeek-V3 report, sections 2.1 and 2.2 (equations 21 to 25)."""

from dataclasses import dataclass

import numpy as np

from . import balance, rope
from .mla import mla, rms_norm, visible
from .moe import Routing, below, moe, swiglu


@dataclass(frozen=True)
class Output:
    """What a forward pass saw. mtp_* hold one entry a depth; depth k covers the first T - k positions."""

    logits_BTW: np.ndarray
    hidden_BTD: np.ndarray  # after the final norm
    prenorm_BTD: np.ndarray  # before it
    routing: tuple[Routing, ...]  # main MoE layers in order, then MTP layers
    mtp_logits: tuple[np.ndarray, ...]
    mtp_hidden: tuple[np.ndarray, ...]  # after each depth's own norm


def block(params, x_BTD, cos, sin, visible_BTS, *, cfg):
    """One pre-norm block; params: names below `model.layers.N.` -> (x, Routing or None when dense)."""
    eps = cfg["rms_norm_eps"]
    normed = rms_norm(x_BTD, params["input_layernorm.weight"], eps)
    x_BTD = x_BTD + mla(below(params, "self_attn."), normed, cos, sin, visible_BTS, cfg=cfg)
    normed = rms_norm(x_BTD, params["post_attention_layernorm.weight"], eps)
    mlp = below(params, "mlp.")
    if "gate.weight" in mlp:
        out, routing = moe(mlp, normed, cfg=cfg)
        return x_BTD + out, routing
    return x_BTD + swiglu(mlp, normed), None


def forward(
    params, tokens_BT, *, cfg, position_ids=None, segment_ids=None, mtp_depth=0, mtp_hidden="post_norm"
):
    """tokens [B, T] -> Output.

    position_ids [B, T] or [T] feed the rotary tables only (default 0, 1, ...); segment_ids [B, T] hide other
    documents. MTP depth k reads, at position t, the previous depth's hidden state at t and the embedding of
    token t + k, so it exists at the first T - k positions only, as in the paper; it keeps the positions of
    its hidden state. mtp_hidden says which state is handed on, by the main model and by each depth:
    "post_norm" (after model.norm or the depth's own norm) or "pre_norm". eh_proj reads [embedding; hidden],
    the order of the released weights (the paper prints the other). Embedding and head are those of the main
    model.
    """
    if mtp_hidden not in ("post_norm", "pre_norm"):
        raise ValueError(f"mtp_hidden is {mtp_hidden!r}; choose 'post_norm' or 'pre_norm'")
    tokens_BT = np.asarray(tokens_BT)
    B, T = tokens_BT.shape
    eps = cfg["rms_norm_eps"]
    positions = np.broadcast_to(np.arange(T) if position_ids is None else position_ids, (B, T))
    cos, sin = rope.tables(cfg, positions)
    seen = visible(T, segment_ids)
    head = params["lm_head.weight"].T

    embedded_BTD = params["model.embed_tokens.weight"][tokens_BT]
    x, routing = embedded_BTD, []
    for layer in range(cfg["num_hidden_layers"]):
        x, decisions = block(below(params, f"model.layers.{layer}."), x, cos, sin, seen, cfg=cfg)
        routing += [decisions] if decisions else []
    prenorm_BTD, hidden_BTD = x, rms_norm(x, params["model.norm.weight"], eps)

    handed_on = hidden_BTD if mtp_hidden == "post_norm" else prenorm_BTD
    mtp_logits, mtp_states = [], []
    for depth in range(1, mtp_depth + 1):
        mtp = below(params, f"model.layers.{cfg['num_hidden_layers'] + depth - 1}.")
        n = T - depth
        joined = np.concatenate(
            [
                rms_norm(embedded_BTD[:, depth:], mtp["enorm.weight"], eps),
                rms_norm(handed_on[:, :n], mtp["hnorm.weight"], eps),
            ],
            axis=-1,
        )
        x, decisions = block(
            mtp, joined @ mtp["eh_proj.weight"].T, cos[:, :n], sin[:, :n], seen[:, :n, :n], cfg=cfg
        )
        routing.append(decisions)
        normed = rms_norm(x, mtp["shared_head.norm.weight"], eps)
        mtp_logits.append(normed @ head)
        mtp_states.append(normed)
        handed_on = normed if mtp_hidden == "post_norm" else x
    return Output(
        hidden_BTD @ head, hidden_BTD, prenorm_BTD, tuple(routing), tuple(mtp_logits), tuple(mtp_states)
    )


def token_losses(logits, labels):
    """-log softmax(logits)[label] at every position, 0 where the label is -100; [..., W], [...] -> [...]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    picked = np.take_along_axis(log_probs, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return np.where(labels == -100, 0.0, -picked)


def cross_entropy(logits, labels):
    """Mean of token_losses over the labels that are not -100."""
    return token_losses(logits, labels).sum() / (labels != -100).sum()


def mtp_labels(labels_BT, depth, segment_ids=None):
    """[B, T - depth]: depth k at position t predicts labels[t + k], or nothing (-100) across documents."""
    targets = labels_BT[:, depth:]
    if segment_ids is None:
        return targets
    return np.where(segment_ids[:, depth:] == segment_ids[:, :-depth], targets, -100)


def losses(
    params,
    tokens_BT,
    labels_BT,
    *,
    cfg,
    mtp_depth=0,
    mtp_weight=0.0,
    balance_alpha=0.0,
    segment_ids=None,
    **kw,
):
    """A dict: total = main + mtp_weight * mtp + balance.

    labels[t] is the target of position t, -100 is no target.
    mtp is the mean over the depths (paper equation 25), mtp_per_depth its parts; balance is balance_alpha
    times the sum of balance_per_layer, the sequence-wise loss of every MoE layer, MTP layers included (over
    their T - k positions).
    """
    out = forward(params, tokens_BT, cfg=cfg, mtp_depth=mtp_depth, segment_ids=segment_ids, **kw)
    per_depth = np.array(
        [
            cross_entropy(logits, mtp_labels(labels_BT, k + 1, segment_ids))
            for k, logits in enumerate(out.mtp_logits)
        ]
    )
    per_layer = np.array(
        [balance.sequence_wise(r.scores_BTE, cfg["num_experts_per_tok"]) for r in out.routing]
    )
    main = cross_entropy(out.logits_BTW, labels_BT)
    mtp = per_depth.mean() if mtp_depth else 0.0
    scaled = balance_alpha * per_layer.sum()
    return {
        "total": main + mtp_weight * mtp + scaled,
        "main": main,
        "mtp": mtp,
        "balance": scaled,
        "mtp_per_depth": per_depth,
        "balance_per_layer": per_layer,
        "load": np.array([r.load_E for r in out.routing]),
    }
