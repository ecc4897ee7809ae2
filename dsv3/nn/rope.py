"""Rotary position embedding: cosine and sine tables, plain or YaRN. The rotation itself is in ``kernels/rotary.py``."""
from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops.primitive import constexpr


def inverse_frequencies(cfg) -> np.ndarray:
    """Angle per position of each rotated pair, [R/2] float64. YaRN blends by wavelength (arXiv 2309.00071, section 3.2)."""
    R, theta, yarn = cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling
    freq = theta ** -(np.arange(0, R, 2, dtype=np.float64) / R)
    if yarn is None:
        return freq

    def pair_that_turns(rotations: float) -> float:
        return R * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), R - 1)
    ramp = np.clip((np.arange(R // 2) - low) / max(high - low, 0.001), 0, 1)
    return freq / yarn.factor * ramp + freq * (1 - ramp)


def table_scale(cfg) -> float:
    """Factor on cosine and sine: mscale(factor, mscale) / mscale(factor, mscale_all_dim); 1 for the released model."""
    yarn = cfg.rope_scaling
    if yarn is None or yarn.factor <= 1:
        return 1.0
    def mscale(m: float) -> float:
        return 0.1 * m * math.log(yarn.factor) + 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return mscale(yarn.mscale) / mscale(yarn.mscale_all_dim)
    return mscale(1.0)


def rope_table(cfg, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin) of positions 0 ... length - 1, each [length, R/2] float32, of angles in float64."""
    angles, scale = np.arange(length, dtype=np.float64)[:, None] * inverse_frequencies(cfg), table_scale(cfg)
    return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)


@constexpr
def _table(cfg, length: int, fn: str) -> Tensor:
    return Tensor(rope_table(cfg, length)[fn == "sin"][None])


@constexpr
def _frequencies(cfg) -> Tensor:
    return Tensor(inverse_frequencies(cfg).astype(np.float32))


def rope_tables(position_ids, length: int, *, cfg):
    """(cos, sin), each [B or 1, T, R/2] float32, for ``position_ids`` [B, T] or, when None, for 0 ... length - 1."""
    if position_ids is None:
        return _table(cfg, length, "cos"), _table(cfg, length, "sin")
    angles = position_ids.astype(ms.float32).expand_dims(-1) * _frequencies(cfg)
    scale = table_scale(cfg)
    return ops.cos(angles) * scale, ops.sin(angles) * scale
