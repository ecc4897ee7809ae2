"""Casts between float32, bfloat16 and FP8 E4M3, block scales, transposes: NumPy arrays on the host, bit for bit.

bfloat16 is uint16 bits, E4M3 uint8 codes. Each function is a loop of ``cast.cc``, called by ctypes, which releases
the GIL: several Python threads may cast at once. The ``_reference`` of each is its definition in NumPy, and what runs
where the native kernels are off. Inputs may be read-only, unaligned (a memory-mapped file), or rows and columns cut
from a larger matrix; ``out``, where a function takes it, is an array to write into that overlaps no input: C-contiguous,
or a matrix whose rows are.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np

from . import native

LARGEST = np.float32(448.0)


def _table() -> np.ndarray:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), np.ldexp(1 + mantissa / 8, exponent - 7))
    value = np.where((code & 127) == 127, np.nan, value)
    return np.where(code > 127, -value, value).astype(np.float32)


DECODED = _table()  # [256] float32: the value of every E4M3 code


# -- definitions -----------------------------------------------------------------------------------------
def widen_reference(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits -> float32, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow_reference(x: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits, rounded to nearest, ties to even; NaN stays NaN, made quiet."""
    u = np.asarray(x, np.float32, order="C").view(np.uint32)
    rounded = ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    quiet_nan = ((u >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16)
    return np.where((u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000), quiet_nan, rounded)


def encode_reference(x: np.ndarray) -> np.ndarray:
    """float32 -> E4M3 codes, rounded to nearest even; what lies beyond +-448 becomes +-448, NaN NaN."""
    u = np.asarray(x, np.float32, order="C").view(np.uint32)
    magnitude = u & np.uint32(0x7FFFFFFF)
    clipped = np.where(
        magnitude > np.uint32(0x7F800000),
        np.uint32(0x43F00000),  # NaN: as 480, whose code is NaN
        np.minimum(magnitude, LARGEST.view(np.uint32)),
    )
    # 20 mantissa bits fall away; the exponent's bias goes from 127 to 7.
    normal = ((clipped + np.uint32(0x7FFFF) + ((clipped >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)).astype(
        np.int32
    ) - (120 << 3)
    subnormal = np.rint(clipped.view(np.float32) * np.float32(512)).astype(np.int32)  # steps of 2^-9
    code = np.where(clipped < np.uint32(0x3C800000), subnormal, normal)  # below 2^-6
    return (code | ((u >> np.uint32(31)) << np.uint32(7)).astype(np.int32)).astype(np.uint8)


def dequantise_reference(
    codes: np.ndarray, scales: np.ndarray, block: tuple[int, int], *, row0: int = 0, col0: int = 0
) -> np.ndarray:
    """``dequantise`` to float32."""
    out = DECODED[codes]
    columns = (col0 + np.arange(codes.shape[1])) // block[1]
    for i in range(row0 // block[0], -(-(row0 + codes.shape[0]) // block[0])):
        out[max(i * block[0] - row0, 0) : (i + 1) * block[0] - row0] *= scales[i, columns]
    return out


def block_scales_reference(x: np.ndarray, block: tuple[int, int], ue8m0: bool = False) -> np.ndarray:
    """``block_scales``."""
    x = _as_float32(x)
    amax = np.zeros(_blocks(x.shape, block), np.float32)
    for i, j in np.ndindex(amax.shape):
        amax[i, j] = np.abs(x[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]).max()
    if ue8m0:
        u = amax.view(np.uint32)  # 448 is 1.75 * 2^8
        exponent = (u >> np.uint32(23)).astype(np.int32) - 8 + ((u & np.uint32(0x7FFFFF)) > np.uint32(0x600000))
        power = np.where(exponent > 0, exponent << 23, 0x00400000).astype(np.uint32).view(np.float32)
        return np.where(amax == 0, np.float32(1), power)
    scales = amax / LARGEST
    return np.where(scales > 0, scales, np.float32(1))


def encode_blocks_reference(x: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """``encode_blocks``."""
    x = _as_float32(x)
    codes = np.empty(x.shape, np.uint8)
    for i, j in np.ndindex(_blocks(x.shape, block)):
        at = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
        codes[at] = encode_reference(x[at] / scales[i, j])
    return codes


def all_finite_reference(x: np.ndarray) -> bool:
    """``all_finite``."""
    return bool(np.isfinite(widen_reference(x) if x.dtype == np.uint16 else x).all())


# -- casts -----------------------------------------------------------------------------------------------
def widen(bits: np.ndarray, out: np.ndarray | None = None, *, transposed: bool = False) -> np.ndarray:
    """bfloat16 bits of any shape -> float32, exact. transposed: [m, n] -> [n, m], C-contiguous."""
    _check("bits", bits, (np.uint16,), matrix=transposed)
    out = _result("out", out, bits.shape[::-1] if transposed else bits.shape, np.float32)
    if not enabled():
        reference = widen_reference(bits)
        np.copyto(out, reference.T if transposed else reference)
    else:
        _call("cast_widen", bits, out, int(transposed), flat=not transposed)
    return out


def narrow(x: np.ndarray, out: np.ndarray | None = None, *, transposed: bool = False) -> np.ndarray:
    """float32 of any shape -> bfloat16 bits, to nearest even; NaN stays NaN. transposed: [m, n] -> [n, m]."""
    _check("x", x, (np.float32,), matrix=transposed)
    out = _result("out", out, x.shape[::-1] if transposed else x.shape, np.uint16)
    if not enabled():
        reference = narrow_reference(x)
        np.copyto(out, reference.T if transposed else reference)
    else:
        _call("cast_narrow", x, out, int(transposed), flat=not transposed)
    return out


def dequantise(
    codes: np.ndarray,
    scales: np.ndarray,
    block: tuple[int, int],
    out: np.ndarray | None = None,
    *,
    bfloat16: bool,
    row0: int = 0,
    col0: int = 0,
    transposed: bool = False,
) -> np.ndarray:
    """E4M3 codes times the scales of their blocks: one float32 product, rounded once more if ``bfloat16``.

    codes: [m, n] uint8, the region of a tensor that starts at its element (row0, col0); scales: float32, one a block
    of the whole tensor -> [m, n] float32 or bfloat16 bits; transposed: [n, m]. Raises ValueError when the region lies
    outside of the scales' blocks.
    """
    _check("codes", codes, (np.uint8,), matrix=True)
    _check("scales", scales, (np.float32,), matrix=True)
    _check_block(block)
    end = row0 + codes.shape[0], col0 + codes.shape[1]
    if row0 < 0 or col0 < 0 or any(n > s * b for n, s, b in zip(end, scales.shape, block)):
        raise ValueError(
            f"codes {list(codes.shape)} from ({row0}, {col0}) need scales for {list(end)} in blocks of {list(block)}: "
            f"expected at least {list(_blocks(end, block))}, found {list(scales.shape)}"
        )
    out = _result("out", out, codes.shape[::-1] if transposed else codes.shape, np.uint16 if bfloat16 else np.float32)
    if not enabled():
        values = dequantise_reference(codes, scales, block, row0=row0, col0=col0)
        values = narrow_reference(values) if bfloat16 else values
        np.copyto(out, values.T if transposed else values)
        return out
    scales = np.require(scales, requirements="CA")
    # What the loop walks along is the result: transposed, rows and columns of blocks change places.
    sides = [(block[0], row0, scales.shape[1]), (block[1], col0, 1)]
    (b0, row, row_step), (b1, column, column_step) = reversed(sides) if transposed else sides
    steps = b0, b1, row, column, scales.ctypes.data, row_step, column_step
    _call("cast_dequantise", codes, out, int(transposed), *steps, int(bfloat16))
    return out


def encode(x: np.ndarray) -> np.ndarray:
    """float32 of any shape -> E4M3 codes, to nearest even; what lies beyond +-448 becomes +-448, NaN NaN."""
    _check("x", x, (np.float32,))
    if not enabled():
        return encode_reference(x)
    rows = x if x.ndim == 2 else x.reshape(1, -1)
    codes = np.empty(rows.shape, np.uint8)
    _quantise(rows, codes, np.ones(1, np.float32), tuple(max(n, 1) for n in rows.shape), False, 2)  # one block, scale 1
    return codes.reshape(x.shape)


def quantise(
    x: np.ndarray, block: tuple[int, int], out: np.ndarray | None = None, *, ue8m0: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 codes of a matrix and the scales of its blocks, as ``encode_blocks`` and ``block_scales`` give them.

    x: [m, n] float32 or bfloat16 bits, finite (see ``all_finite``) -> ([m, n] uint8, float32 [m/b0, n/b1] rounded up).
    For the codes and scales of x.T: those of x in blocks (b1, b0), each transposed.
    """
    scales = np.empty(_check_quantise(x, block), np.float32)
    out = _result("out", out, x.shape, np.uint8)
    if enabled():
        _quantise(x, out, scales, block, ue8m0, 3)
    else:
        scales = block_scales_reference(x, block, ue8m0)
        np.copyto(out, encode_blocks_reference(x, scales, block))
    return out, scales


def block_scales(x: np.ndarray, block: tuple[int, int], ue8m0: bool = False) -> np.ndarray:
    """amax / 448 of each block, 1 for a block of zeros or one so small that this underflows; float32.

    ue8m0: the least power of two that is not below amax / 448, nor below 2^-127, where the 8-bit format ends
    (DeepSeek-V3.1's scale_fmt "ue8m0"); 1 for zeros. x: [m, n] float32 or bfloat16 bits -> [m/b0, n/b1] rounded up.
    """
    scales = np.empty(_check_quantise(x, block), np.float32)
    if not enabled():
        return block_scales_reference(x, block, ue8m0)
    _quantise(x, None, scales, block, ue8m0, 1)
    return scales


def encode_blocks(
    x: np.ndarray, scales: np.ndarray, block: tuple[int, int], out: np.ndarray | None = None
) -> np.ndarray:
    """E4M3 codes of each block divided, in float32, by its scale. x: [m, n] float32 or bfloat16 bits -> uint8.

    Raises ValueError when ``scales`` has not one float32 for each block.
    """
    expected = _check_quantise(x, block)
    _check("scales", scales, (np.float32,), matrix=True)
    if scales.shape != expected:
        raise ValueError(
            f"x {list(x.shape)} in blocks of {list(block)}: expected scales {list(expected)}, found {list(scales.shape)}"
        )
    out = _result("out", out, x.shape, np.uint8)
    if enabled():
        _quantise(x, out, np.require(scales, requirements="CA"), block, False, 2)
    else:
        np.copyto(out, encode_blocks_reference(x, scales, block))
    return out


def all_finite(x: np.ndarray) -> bool:
    """Whether x, float32, float16 or bfloat16 bits of any shape, holds neither NaN nor infinity."""
    _check("x", x, (np.float32, np.float16, np.uint16))
    if not enabled():
        return all_finite_reference(x)
    rows = _rows(x if x.ndim == 2 else x.reshape(1, -1))
    infinity = {"f2": 0x7C00, "u2": 0x7F80, "f4": 0x7F800000}[x.dtype.str[1:]]
    return bool(_library().cast_all_below(*_address(rows), x.itemsize, infinity))


def transpose(x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """A C-contiguous copy of x.T. x: [m, n] of 1, 2, 4 or 8 bytes an element -> [n, m]."""
    _check("x", x, (x.dtype,), matrix=True)
    if x.itemsize not in (1, 2, 4, 8) or x.dtype.hasobject:
        raise ValueError(f"x is of {x.dtype}; expected elements of 1, 2, 4 or 8 bytes")
    out = _result("out", out, x.shape[::-1], x.dtype)
    if enabled():
        _call("cast_transpose", x, out, x.itemsize)
    else:
        np.copyto(out, x.T)
    return out


# -- calls of cast.cc ------------------------------------------------------------------------------------
def enabled() -> bool:
    """True when the native loops are in use, whatever the device; ``native.why_not_compiled`` says why not."""
    return native.why_not_compiled() is None


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(native.library("cast"))
    integer, address = ctypes.c_int64, ctypes.c_void_p
    source = [integer, integer, address, integer]
    both = [*source, address, integer]
    library.cast_widen.argtypes = library.cast_narrow.argtypes = library.cast_transpose.argtypes = [*both, integer]
    library.cast_dequantise.argtypes = [*both, *[integer] * 5, address, *[integer] * 3]
    library.cast_quantise.argtypes = [*both, *[integer] * 3, address, *[integer] * 2]
    library.cast_all_below.argtypes = [*source, *[integer] * 2]
    for name in ("widen", "narrow", "transpose", "dequantise", "quantise"):
        getattr(library, f"cast_{name}").restype = None
    library.cast_all_below.restype = integer
    return library


def _rows(x: np.ndarray) -> np.ndarray:
    """x, or a copy if elements of its rows do not lie side by side."""
    return x if x.shape[1] <= 1 or x.strides[1] == x.itemsize else np.ascontiguousarray(x)


def _address(rows: np.ndarray) -> tuple[int, int, int, int]:
    return (*rows.shape, rows.ctypes.data, rows.strides[0])


def _call(name: str, x: np.ndarray, out: np.ndarray, *rest: int, flat: bool = False) -> None:
    """Run a loop from x to out. flat: position does not matter, so that arrays without gaps are one row."""
    if flat and (x.ndim != 2 or x.flags.c_contiguous and out.flags.c_contiguous):
        x, out = x.reshape(1, -1), out.reshape(1, -1)
    x = _rows(x)
    getattr(_library(), name)(*_address(x), out.ctypes.data, out.strides[0], *rest)


def _quantise(x: np.ndarray, out: np.ndarray | None, scales: np.ndarray, block: tuple, ue8m0: bool, make: int) -> None:
    """make: 1 scales, 2 codes, 3 both."""
    x = _rows(x)
    target = (None, 0) if out is None else (out.ctypes.data, out.strides[0])
    rest = int(x.dtype == np.uint16), *block, scales.ctypes.data, int(ue8m0), make
    _library().cast_quantise(*_address(x), *target, *rest)


# -- checks ----------------------------------------------------------------------------------------------
def _blocks(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _as_float32(x: np.ndarray) -> np.ndarray:
    return widen_reference(x) if x.dtype == np.uint16 else x


def _check(name: str, x: np.ndarray, dtypes: tuple, *, matrix: bool = False) -> None:
    if x.dtype not in dtypes or matrix and x.ndim != 2:
        kinds = " or ".join(np.dtype(kind).name for kind in dtypes)
        raise ValueError(f"{name} is {x.dtype} {list(x.shape)}; expected {'a matrix' if matrix else 'an array'} of {kinds}")


def _check_block(block: tuple[int, int]) -> None:
    if len(block) != 2 or min(block) < 1:
        raise ValueError(f"block {list(block)}: expected two numbers of at least 1")


def _check_quantise(x: np.ndarray, block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales."""
    _check("x", x, (np.float32, np.uint16), matrix=True)
    _check_block(block)
    return _blocks(x.shape, block)


def _result(name: str, out: np.ndarray | None, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    if out is None:
        return np.empty(shape, dtype)
    _check(name, out, (dtype,))
    by_rows = out.ndim == 2 and (out.shape[1] <= 1 or out.strides[1] == out.itemsize)
    if out.shape != shape or not (out.flags.c_contiguous or by_rows) or not out.flags.writeable:
        raise ValueError(
            f"{name} is {list(out.shape)} with strides {list(out.strides)}; expected writable {list(shape)}, C-contiguous "
            f"or with contiguous rows"
        )
    return out
