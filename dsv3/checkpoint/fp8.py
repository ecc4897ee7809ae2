"""FP8 as DeepSeek publishes it: E4M3 codes (as uint8) and one float32 scale per 128 x 128 block.

E4M3FN: 1 sign, 4 exponent bits of bias 7, 3 mantissa bits; no infinities; 0x7f and 0xff are NaN; the largest
is 448.
"""

from __future__ import annotations

import numpy as np

BLOCK = (128, 128)
LARGEST = np.float32(448.0)


def _table() -> np.ndarray:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), np.ldexp(1 + mantissa / 8, exponent - 7))
    value = np.where((code & 127) == 127, np.nan, value)
    return np.where(code > 127, -value, value).astype(np.float32)


DECODED = _table()  # [256] float32: the value of every code


def encode(x: np.ndarray) -> np.ndarray:
    """float32 -> E4M3 codes, rounded to nearest even; what lies beyond +-448 becomes +-448, NaN NaN."""
    u = np.asarray(x, np.float32, order="C").view(np.uint32)
    magnitude = u & np.uint32(0x7FFFFFFF)
    clipped = np.where(
        magnitude > np.uint32(0x7F800000),
        np.uint32(0x43F00000),  # NaN: as 480, whose code is NaN
        np.minimum(magnitude, LARGEST.view(np.uint32)),
    )
    # 20 mantissa bits fall away; the exponent's bias goes from 127 to 7.
    normal = (
        (clipped + np.uint32(0x7FFFF) + ((clipped >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
    ).astype(np.int32) - (120 << 3)
    subnormal = np.rint(clipped.view(np.float32) * np.float32(512)).astype(np.int32)  # steps of 2^-9
    code = np.where(clipped < np.uint32(0x3C800000), subnormal, normal)  # below 2^-6
    return (code | ((u >> np.uint32(31)) << np.uint32(7)).astype(np.int32)).astype(np.uint8)


def scale_shape(shape: tuple[int, int], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """One scale per block; the last block of a row or column may be partial."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def dequantise(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int] = BLOCK) -> np.ndarray:
    """decoded[i, j] * scales[i // 128, j // 128] in float32. codes: [m, n] uint8 -> [m, n] float32."""
    out = DECODED[codes]
    for i in range(scales.shape[0]):
        rows = out[i * block[0] : (i + 1) * block[0]]
        rows *= np.repeat(scales[i], block[1])[: codes.shape[1]]
    return out


def quantise(x: np.ndarray, block: tuple[int, int] = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a matrix: scale = amax / 448 of each block, 1 for a block of zeros.

    x: [m, n] float32, finite -> ([m, n] uint8, [m/128, n/128 rounded up] float32).
    """
    codes = np.empty(x.shape, np.uint8)
    scales = np.ones(scale_shape(x.shape, block), np.float32)
    for i, j in np.ndindex(scales.shape):
        at = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
        part = x[at]
        scale = np.abs(part).max() / LARGEST
        # A block of zeros, or so small that its scale would underflow, keeps the scale 1 and becomes zeros.
        if scale > 0:
            scales[i, j] = scale
        codes[at] = encode(part / scales[i, j])
    return codes, scales
