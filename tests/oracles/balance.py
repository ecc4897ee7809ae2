"""Auxiliary balance losses. Every count f is a constant to the gradient; every P carries it.

Sources: DeepSeek-V3 report section 2.1.2, equations 17 to 20 (sequence-wise); DeepSeek-V2 (arXiv 2405.04434)
section 2.1.2 (expert, device and communication level); ST-MoE (arXiv 2202.08906) equation 5 (router z-loss).
"""

import numpy as np

from .moe import top_k


def sequence_wise(scores_BTE, k):
    """sum_i f_i P_i per sequence, then the mean over sequences; multiply by alpha yourself.

    f_i = E / (K T) * the number of tokens whose K largest *unbiased* scores include i: neither the bias nor
    the groups take part, although they take part in the routing. P_i = mean over t of scores_ti / sum_j
    scores_tj.
    """
    _, T, E = scores_BTE.shape
    indices_BTK, _ = top_k(scores_BTE, k)
    chosen_BTE = np.zeros(scores_BTE.shape)
    np.put_along_axis(chosen_BTE, indices_BTK, 1.0, axis=-1)
    f_BE = E / (k * T) * chosen_BTE.sum(axis=1)
    p_BE = (scores_BTE / scores_BTE.sum(axis=-1, keepdims=True)).mean(axis=1)
    return float((f_BE * p_BE).sum(axis=-1).mean())


def fractions(scores_TE, indices_TK):
    """(f_E, P_E) of DeepSeek-V2: f_i = E / (K T) * tokens *sent* to i, P_i = mean over t of scores_ti."""
    T, E = scores_TE.shape
    sent_E = np.bincount(np.asarray(indices_TK).reshape(-1), minlength=E)
    return E / (np.shape(indices_TK)[-1] * T) * sent_E, scores_TE.mean(axis=0)


def expert_level(scores_TE, indices_TK):
    """sum_i f_i P_i (DeepSeek-V2 equations 23 to 25, without alpha_1)."""
    f_E, p_E = fractions(scores_TE, indices_TK)
    return float((f_E * p_E).sum())


def device_level(scores_TE, indices_TK, devices):
    """sum_d f'_d P'_d (equations 26 to 28, without alpha_2).

    f'_d is the mean of f over a device's experts, P'_d the sum of P.
    """
    f_E, p_E = fractions(scores_TE, indices_TK)
    return float((f_E.reshape(devices, -1).mean(axis=1) * p_E.reshape(devices, -1).sum(axis=1)).sum())


def communication_level(scores_TE, indices_TK, devices, max_devices):
    """sum_d f''_d P''_d (equations 29 to 31, without alpha_3).

    f''_d = devices / (max_devices T) * the tokens with at least one expert on d; P''_d is the sum of P over
    d's experts. max_devices is M, the most devices a token may reach.
    """
    T, E = scores_TE.shape
    device_TK = np.asarray(indices_TK) // (E // devices)
    sent_D = (device_TK[:, :, None] == np.arange(devices)).any(axis=1).sum(axis=0)
    p_D = scores_TE.mean(axis=0).reshape(devices, -1).sum(axis=1)
    return float((devices / (max_devices * T) * sent_D * p_D).sum())


def z_loss(logits_TE):
    """mean over tokens of logsumexp(logits)^2."""
    top = logits_TE.max(axis=-1)
    log_z = top + np.log(np.exp(logits_TE - top[..., None]).sum(axis=-1))
    return float((log_z**2).mean())
