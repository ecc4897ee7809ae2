"""RMSNorm and multi-head latent attention: DeepSeek-V3 report, section 2.1.1, equations 1 to 11."""

import numpy as np

from . import rope


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (arXiv 1910.07467)."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def softmax(scores):
    """Softmax over the last dim; a -inf score gets exactly 0."""
    exp = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def visible(tokens_T, segment_ids_BT=None):
    """[B or 1, T, S] bool: key s is seen by query t when s <= t and both lie in the same document."""
    causal_1TS = np.tril(np.ones((tokens_T, tokens_T), bool))[None]
    if segment_ids_BT is None:
        return causal_1TS
    return causal_1TS & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])


def mla(params, x_BTD, cos, sin, visible_BTS, *, cfg):
    """params: names below `self_attn.`; x [B, T, D] -> [B, T, D]. Keys and values are expanded per head."""
    B, T, _ = x_BTD.shape
    H, N, R = cfg["num_attention_heads"], cfg["qk_nope_head_dim"], cfg["qk_rope_head_dim"]
    C, eps = cfg["kv_lora_rank"], cfg["rms_norm_eps"]

    if cfg["q_lora_rank"] is None:
        q_BTHd = x_BTD @ params["q_proj.weight"].T
    else:
        latent_BTQ = rms_norm(x_BTD @ params["q_a_proj.weight"].T, params["q_a_layernorm.weight"], eps)
        q_BTHd = latent_BTQ @ params["q_b_proj.weight"].T
    q_BTHd = q_BTHd.reshape(B, T, H, N + R)

    compressed = x_BTD @ params["kv_a_proj_with_mqa.weight"].T
    latent_BTC = rms_norm(compressed[..., :C], params["kv_a_layernorm.weight"], eps)
    key_rope_BTR = rope.rotate(compressed[..., C:], cos, sin)  # one for all heads, not normalised
    kv_BTHd = (latent_BTC @ params["kv_b_proj.weight"].T).reshape(B, T, H, -1)
    query_rope_BTHR = rope.rotate(q_BTHd[..., N:], cos[..., None, :], sin[..., None, :])

    scores_BHTS = np.einsum("bthn,bshn->bhts", q_BTHd[..., :N], kv_BTHd[..., :N])
    scores_BHTS += np.einsum("bthr,bsr->bhts", query_rope_BTHR, key_rope_BTR)
    scores_BHTS = np.where(visible_BTS[:, None], scores_BHTS * rope.softmax_scale(cfg), -np.inf)
    out_BTHV = np.einsum("bhts,bshv->bthv", softmax(scores_BHTS), kv_BTHd[..., N:])
    return out_BTHV.reshape(B, T, -1) @ params["o_proj.weight"].T
