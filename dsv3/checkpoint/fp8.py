"""FP8 as DeepSeek publishes it: E4M3 codes (as uint8) and one float32 scale per 128 x 128 block.

E4M3FN: 1 sign, 4 exponent bits of bias 7, 3 mantissa bits; no infinities; 0x7f and 0xff are NaN; the largest
is 448. The arithmetic, and its definition in NumPy, is in ``kernels/cast.py``.
"""

from __future__ import annotations

import numpy as np

from ..kernels import cast

BLOCK = (128, 128)
LARGEST = cast.LARGEST
DECODED = cast.DECODED  # [256] float32: the value of every code


def encode(x: np.ndarray) -> np.ndarray:
    """float32 -> E4M3 codes, rounded to nearest even; what lies beyond +-448 becomes +-448, NaN NaN."""
    return cast.encode(np.asarray(x, np.float32))


def scale_shape(shape: tuple[int, int], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """One scale per block; the last block of a row or column may be partial."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def dequantise(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int] = BLOCK) -> np.ndarray:
    """decoded[i, j] * scales[i // 128, j // 128] in float32. codes: [m, n] uint8 -> [m, n] float32."""
    return cast.dequantise(codes, scales, block, bfloat16=False)


def from_e8m0(codes: np.ndarray) -> np.ndarray:
    """E8M0 scales (uint8) as float32: 2^(code - 127), NaN for 255."""
    return np.where(codes == 255, np.float32(np.nan), np.ldexp(np.float32(1), codes.astype(np.int32) - 127))


def are_e8m0(scales: np.ndarray) -> bool:
    """Whether all scales are powers of two."""
    return bool(np.all(np.frexp(scales)[0] == 0.5))


def quantise(
    x: np.ndarray, block: tuple[int, int] = BLOCK, ue8m0: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a matrix: scale = amax / 448 of each block, 1 for a block of zeros.

    A block so small that its scale would underflow has the scale 1 too, and becomes zeros. ue8m0: scales rounded up
    to powers of two. x: [m, n] float32, finite -> ([m, n] uint8, [m/128, n/128 rounded up] float32).
    """
    return cast.quantise(x, block, ue8m0=ue8m0)
