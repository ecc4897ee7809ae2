"""Auxiliary load-balance losses: functions of the routing, weighted, summed and passed as ``balance=``.

The report's sequence-wise loss is the default; the three losses of DeepSeek-V2 (arXiv 2405.04434, section 2.1.2) and
the router z-loss (arXiv 2202.08906, equation 5) are here for those who want them. With a mesh each
rank has whole sequences, some of the batch: what is counted over the batch is summed over all ranks, for one device's loss.
"""
from __future__ import annotations

import mindspore as ms
from mindspore import ops

from ..kernels.native import iota
from ..kernels.topk import choose_experts, count_experts
from ..parallel.shard import parts, psum


def sequence_loss(idx_TK, scores_TE, logits_TE, batch_size: int, *, cfg):
    """sum_i f_i P_i per sequence, averaged over sequences (DeepSeek-V3 report, equations 17-20). Unweighted, 0-D.

    f_i = E / (K T) * how often i is among the K best *unbiased* scores, a constant to the gradient;
    P_i = mean over tokens of s_i / sum_j s_j.
    """
    E, K = cfg.n_routed_experts, cfg.num_experts_per_tok
    T = scores_TE.shape[0] // batch_size
    best_TK = choose_experts(ops.stop_gradient(scores_TE), n_group=1, topk_group=1, k=K, group_score="max")
    sequence = iota(batch_size * T).reshape(-1, 1) // T
    f_BE = count_experts(best_TK + sequence * E, batch_size * E).reshape(batch_size, E).astype(ms.float32) * (E / (K * T))
    p_TE = scores_TE / ops.sum(scores_TE, -1, True)
    p_BE = ops.mean(p_TE.reshape(batch_size, T, E), 1)
    return ops.sum(ops.stop_gradient(f_BE) * p_BE) / batch_size


def _expert_f_p(idx_TK, scores_TE, cfg):
    T, E, K = scores_TE.shape[0] * parts("batch"), cfg.n_routed_experts, cfg.num_experts_per_tok
    f_E = psum(count_experts(idx_TK, E), "batch").astype(ms.float32) * (E / (K * T))
    return ops.stop_gradient(f_E), _mean_share(scores_TE)


def _mean_share(scores_TE):
    """P [E]: the mean over all tokens of s_i / sum_j s_j."""
    return _mean(scores_TE / ops.sum(scores_TE, -1, True))


def _mean(x):
    """Over the first dim, and over all ranks' sequences."""
    return psum(ops.mean(x, 0), "batch") / parts("batch")


def expert_loss(idx_TK, scores_TE, logits_TE, batch_size: int, *, cfg):
    """Expert-level balance over the whole batch: sum_i f_i P_i with f from the actual choice (V2, equations 12-14)."""
    f_E, p_E = _expert_f_p(idx_TK, scores_TE, cfg)
    return ops.sum(f_E * p_E)


def device_loss(idx_TK, scores_TE, logits_TE, batch_size: int, *, cfg, devices: int):
    """Device-level balance: f of a device is the mean over its experts, P the sum (V2, equations 15-17)."""
    f_E, p_E = _expert_f_p(idx_TK, scores_TE, cfg)
    return ops.sum(ops.mean(f_E.reshape(devices, -1), 1) * ops.sum(p_E.reshape(devices, -1), 1))


def communication_loss(idx_TK, scores_TE, logits_TE, batch_size: int, *, cfg, devices: int, limit: int):
    """Communication balance: f''_i = devices / (limit T) * tokens sent to device i (V2, equations 18-20)."""
    T, E = scores_TE.shape[0] * parts("batch"), cfg.n_routed_experts
    per_device = E // devices
    sent_TKD = ops.equal((idx_TK // per_device).expand_dims(-1), iota(devices))
    sent_D = psum(ops.sum(ops.amax(sent_TKD.astype(ms.float32), 1), 0), "batch") * (devices / (limit * T))
    return ops.sum(ops.stop_gradient(sent_D) * ops.sum(_mean_share(scores_TE).reshape(devices, per_device), 1))


def z_loss(logits_TE):
    """Router z-loss: mean over tokens of logsumexp(logits)^2; keeps router logits small. 0-D."""
    return _mean(ops.square(ops.logsumexp(logits_TE, -1)))


def make_balance(cfg, *, sequence: float | None = None, expert: float = 0.0, device: float = 0.0,
                 communication: float = 0.0, z: float = 0.0, devices: int | None = None, limit: int | None = None):
    """A ``balance=`` function with these weights; ``sequence`` defaults to ``cfg.aux_loss_alpha``, the others are off.

    ``devices`` (default ``n_group``) is the D of the device and communication losses, ``limit`` (default
    ``topk_group``) the most devices one token may visit. Raises ValueError when the experts do not divide.
    """
    sequence = cfg.aux_loss_alpha if sequence is None else sequence
    devices = cfg.n_group if devices is None else devices
    limit = cfg.topk_group if limit is None else limit
    if cfg.n_routed_experts % devices:
        raise ValueError(f"n_routed_experts={cfg.n_routed_experts} is not divisible by devices={devices}; pick a divisor")

    def balance(idx_TK, scores_TE, logits_TE, batch_size):
        total = ms.Tensor(0.0, ms.float32)
        if sequence:
            total = total + sequence * sequence_loss(idx_TK, scores_TE, logits_TE, batch_size, cfg=cfg)
        if expert:
            total = total + expert * expert_loss(idx_TK, scores_TE, logits_TE, batch_size, cfg=cfg)
        if device:
            total = total + device * device_loss(idx_TK, scores_TE, logits_TE, batch_size, cfg=cfg, devices=devices)
        if communication:
            total = total + communication * communication_loss(idx_TK, scores_TE, logits_TE, batch_size, cfg=cfg,
                                                               devices=devices, limit=limit)
        if z:
            total = total + z * z_loss(logits_TE)
        return total

    return balance
