"""Rotary tables, plain and YaRN, and the two YaRN corrections.

Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071, section 3), DeepSeek-V3 report section 4.3.
"""

import math

import numpy as np


def mscale(factor, weight):
    """YaRN's temperature term 0.1 * weight * ln(factor) + 1, which is 1 when nothing is stretched."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def correction_range(cfg):
    """(low, high): the frequency bins between which YaRN ramps from unchanged to interpolated."""
    scaling, rope_dim, theta = cfg["rope_scaling"], cfg["qk_rope_head_dim"], cfg["rope_theta"]

    def bin_of(rotations):
        """The bin (a real number) that turns `rotations` times over the original context."""
        wavelength_ratio = scaling["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return rope_dim * math.log(wavelength_ratio) / (2 * math.log(theta))

    low = math.floor(bin_of(scaling.get("beta_fast", 32)))
    high = math.ceil(bin_of(scaling.get("beta_slow", 1)))
    return max(low, 0), min(high, rope_dim - 1)


def inverse_frequencies(cfg):
    """[R/2] radians per position."""
    rope_dim = cfg["qk_rope_head_dim"]
    plain = cfg["rope_theta"] ** (-np.arange(0, rope_dim, 2, dtype=np.float64) / rope_dim)
    if not cfg.get("rope_scaling"):
        return plain
    low, high = correction_range(cfg)
    ramp = (np.arange(rope_dim // 2) - low) / (high - low if high != low else 1e-3)
    keep = 1.0 - np.clip(ramp, 0.0, 1.0)  # 1: fast bins stay as they are; 0: slow bins are interpolated
    return plain * keep + plain / cfg["rope_scaling"]["factor"] * (1.0 - keep)


def tables(cfg, position_ids):
    """cos and sin, each position_ids.shape + [R/2]."""
    scaling = cfg.get("rope_scaling")
    gain = 1.0
    if scaling:
        gain = mscale(scaling["factor"], scaling.get("mscale", 1.0))
        gain /= mscale(scaling["factor"], scaling.get("mscale_all_dim", 0.0))
    angle = np.asarray(position_ids, np.float64)[..., None] * inverse_frequencies(cfg)
    return np.cos(angle) * gain, np.sin(angle) * gain


def softmax_scale(cfg):
    """(N + R)^-1/2, times mscale_all_dim's term squared under YaRN: 0.1352338 for the released model."""
    scaling = cfg.get("rope_scaling")
    scale = (cfg["qk_nope_head_dim"] + cfg["qk_rope_head_dim"]) ** -0.5
    if scaling and scaling.get("mscale_all_dim"):
        scale *= mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2
    return scale


def rotate(x, cos, sin):
    """Turn the interleaved pairs (x0, x1), (x2, x3), ... of x [..., R] by tables [..., R/2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)
