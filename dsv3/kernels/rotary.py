"""Rotary position embedding: channel pairs turned by an angle that grows with the position."""
from __future__ import annotations

from mindspore import mint, ops


def apply_rotary(x, cos, sin):
    """Turn the interleaved channel pairs (2i, 2i+1) of ``x``, as DeepSeek's released weights have them.

    Each pair is the complex number ``x[2i] + 1j * x[2i+1]``, multiplied by ``cos[i] + 1j * sin[i]``
    (RoFormer, eq. 34). The result holds all real parts, then all imaginary parts: queries and keys turned by
    this function share that order, so their products are those of the interleaved order. Computed in float32.

    Args:
        x: [B, T, h, R], any float dtype; R must be even.
        cos, sin: [B or 1, T, R/2] float32.

    Returns:
        [B, T, h, R] in the dtype of ``x``.

    Raises:
        ValueError: R is odd, or cos does not have R/2 channels.
    """
    R = x.shape[-1]
    if R % 2:
        raise ValueError(f"rotary pairs channels: expected an even last dimension, found {R}; "
                         f"change qk_rope_head_dim")
    if cos.shape[-1] != R // 2:
        raise ValueError(f"rotary on {R} channels needs cos and sin with {R // 2}, found {cos.shape[-1]}")
    real, imag = x[..., 0::2].astype(cos.dtype), x[..., 1::2].astype(cos.dtype)
    cos, sin = ops.expand_dims(cos, 2), ops.expand_dims(sin, 2)
    return mint.cat((real * cos - imag * sin, real * sin + imag * cos), -1).astype(x.dtype)
