"""Global-norm clipping and AdamW on dicts of arrays, with torch's conventions.

Sources: arXiv 1711.05101 (AdamW; the decay is applied first and scaled by the learning rate) and the
documentation of torch.optim.AdamW and torch.nn.utils.clip_grad_norm_ (which adds 1e-6 to the norm it divides
by).
"""

import numpy as np


def global_norm(grads):
    """Square root of the sum of all squares."""
    return float(np.sqrt(sum(np.sum(np.square(g)) for g in grads.values())))


def clip(grads, max_norm):
    """(grads scaled by min(1, max_norm / (norm + 1e-6)), norm before)."""
    norm = global_norm(grads)
    factor = min(1.0, max_norm / (norm + 1e-6))
    return {name: g * factor for name, g in grads.items()}, norm


def init(params):
    """Zero moments."""
    return {
        "step": 0,
        "m": {n: np.zeros_like(p) for n, p in params.items()},
        "v": {n: np.zeros_like(p) for n, p in params.items()},
    }


def adamw(
    params,
    grads,
    state,
    *,
    learning_rate,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    decayed=lambda name, value: value.ndim >= 2,
):
    """One step -> (params, state). decayed(name, value) says which leaves decay: matrices, by default."""
    step = state["step"] + 1
    new_params, new_m, new_v = {}, {}, {}
    for name, p in params.items():
        g = grads[name]
        m = beta1 * state["m"][name] + (1 - beta1) * g
        v = beta2 * state["v"][name] + (1 - beta2) * g * g
        if decayed(name, p):
            p = p * (1 - learning_rate * weight_decay)
        denominator = np.sqrt(v / (1 - beta2**step)) + eps
        new_params[name] = p - learning_rate * (m / (1 - beta1**step)) / denominator
        new_m[name], new_v[name] = m, v
    return new_params, {"step": step, "m": new_m, "v": new_v}
