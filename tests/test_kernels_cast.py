"""Host casts: the C++ loops against their NumPy definitions, bit for bit, and both against torch's goldens.

Planted faults this file was seen to catch, one at a time, in cast.cc: either rounding constant off by one; the quiet
bit left out; no clipping at 448; infinity taken for NaN; 0x7e decoded as NaN; 1.75 off by one bit; 2^-126 for 2^-127;
no scale 1 for a block that underflows, or of zeros in powers of two; a region's first row or column left out; the last
piece of a row not looked at by all_finite; all scales of a strip in its first place; the last rows of a transpose left
out; the buffer of a strip shared by threads.
"""

import mmap
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import GOLDENS, ROOT

from dsv3.kernels import cast

BFLOAT16 = np.arange(65536, dtype=np.uint16)


@pytest.fixture(params=["native", "reference"], autouse=True)
def side(request, monkeypatch):
    """Every test runs on both sides: the reference must keep the same promises of shapes, views and errors."""
    if request.param == "native" and not cast.enabled():
        pytest.skip("no native kernels here")
    monkeypatch.setattr(cast, "enabled", lambda: request.param == "native")
    return request.param


def same(a, b):
    """Equal bits, shapes and types."""
    assert a.shape == b.shape and a.dtype == b.dtype
    np.testing.assert_array_equal(*(np.ascontiguousarray(x).view(f"u{x.itemsize}") for x in (a, b)))


def edges():
    """float32 around every place where a rounding changes, of both signs, with NaN of several payloads and +-inf."""
    around = np.concatenate([BFLOAT16.astype(np.uint32) << 16, (BFLOAT16.astype(np.uint32) << 16) + 0x8000])
    e4m3 = np.abs(cast.DECODED[:127])
    middles = np.concatenate([(e4m3[1:] + e4m3[:-1]) / 2, e4m3, np.float32([464, 480, 512])]).view(np.uint32)
    u = np.concatenate([around, middles, middles | 0x80000000, np.uint32([1, 0x7FFFFF, 0x7F800001, 0x7FFFFFFF])])
    return np.concatenate([u - np.uint32(1), u, u + np.uint32(1)]).view(np.float32)


def views(x):
    """x as it may arrive: whole, rows and columns of a larger one, backwards, unaligned, read-only, Fortran order."""
    m, n = x.shape
    larger = np.zeros((2 * m + 3, n + 5), x.dtype)
    larger[1 : 2 * m + 1 : 2, 3 : n + 3] = x
    raw = mmap.mmap(-1, x.nbytes + 1)
    raw[1:] = x.tobytes()
    unaligned = np.frombuffer(raw, np.uint8)[1:].view(x.dtype).reshape(m, n)
    unaligned.flags.writeable = False
    yield from (x, larger[1 : 2 * m + 1 : 2, 3 : n + 3], x[::-1].copy()[::-1], unaligned, np.asfortranarray(x))
    swapped = np.empty((m, n, 2), x.dtype)
    swapped[..., 0] = x
    yield swapped[..., 0]


def outs(shape, dtype):
    """Arrays to write into, with what surrounds them."""
    yield None, None
    yield (whole := np.empty(shape, dtype)), whole
    larger = np.full((shape[0] + 2, shape[1] + 3), 7, dtype)
    yield larger[1:-1, 2:-1], larger


SHAPES = [(1, 1), (1, 300), (17, 1), (64, 64), (65, 131), (130, 257), (0, 5), (5, 0), (3, 1030)]


def normal(shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(rng.uniform(-6, 6, shape))).astype(np.float32)


def test_widen_of_every_pattern():
    same(cast.widen(BFLOAT16), cast.widen_reference(BFLOAT16))
    assert cast.widen(BFLOAT16).view(np.uint32).tolist() == [k << 16 for k in range(65536)]


def test_narrow_of_every_boundary():
    x = edges()
    same(cast.narrow(x), cast.narrow_reference(x))
    finite = ~np.isnan(cast.widen(BFLOAT16))
    same(cast.narrow(cast.widen(BFLOAT16))[finite], BFLOAT16[finite])
    u = np.random.default_rng(1).integers(0, 2**32, 10**6, np.uint32).view(np.float32)
    same(cast.narrow(u), cast.narrow_reference(u))


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3, 5), (0, 4), (4, 0), (3, 1, 0)])
def test_elementwise_casts_take_any_shape(shape):
    x = np.full(shape, 1.5, np.float32)
    assert cast.narrow(x).shape == cast.encode(x).shape == shape and (cast.widen(cast.narrow(x)) == x).all()
    assert (cast.encode(x) == 0x3C).all() and cast.all_finite(x)


def test_encode_of_every_boundary():
    x = edges()
    same(cast.encode(x), cast.encode_reference(x))
    u = np.random.default_rng(2).integers(0, 2**32, 10**6, np.uint32).view(np.float32)
    same(cast.encode(u), cast.encode_reference(u))
    codes = np.arange(256, dtype=np.uint8)
    same(cast.encode(cast.DECODED), codes)


def test_casts_are_torchs():
    golden = np.load(GOLDENS / "fp8" / "e4m3.npz")
    same(cast.encode(golden["value_bits"].view(np.float32)), golden["value_codes"])
    same(cast.narrow(golden["narrow_bits"].view(np.float32)), golden["narrow_codes"])
    for x in (golden["x_bits"], cast.widen(golden["x_bits"])):
        for ue8m0, name in ((False, ""), (True, "powers_")):
            codes, scales = cast.quantise(x, (16, 16), ue8m0=ue8m0)
            same(codes, golden[f"{name}codes"])
            same(scales, golden[f"{name}scales"])
    same(cast.dequantise(golden["codes"], golden["scales"], (16, 16), bfloat16=True), golden["bfloat16_bits"])


@pytest.mark.parametrize("scale", [1.0, 0.0, 1e-3, 3e-41, 1e-45, 2.0**-120, 3.1e36, 3.4e38])
def test_dequantise_of_every_code(scale):
    codes, scales = np.arange(256, dtype=np.uint8)[None], np.float32([[scale]])
    with np.errstate(over="ignore"):
        want = cast.DECODED[None] * np.float32(scale)
        same(cast.dequantise(codes, scales, (1, 256), bfloat16=False), want)
        same(cast.dequantise(codes, scales, (1, 256), bfloat16=True), cast.narrow_reference(want))


@pytest.mark.parametrize("block", [(128, 128), (16, 40), (1, 128), (3, 1), (200, 5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantise_of_regions(shape, block):
    rng = np.random.default_rng(3)
    whole = rng.integers(0, 256, shape, np.uint8)
    scales = np.exp(rng.uniform(-9, 9, (-(-shape[0] // block[0]), -(-shape[1] // block[1])))).astype(np.float32)
    each = np.repeat(np.repeat(scales, block[0], 0), block[1], 1)[: shape[0], : shape[1]]
    want = cast.DECODED[whole] * each
    for bfloat16 in (False, True):
        right = cast.narrow_reference(want) if bfloat16 else want
        same(cast.dequantise(whole, scales, block, bfloat16=bfloat16), right)
        same(cast.dequantise(whole, scales, block, bfloat16=bfloat16, transposed=True), right.T)
        a, b, c, d = shape[0] // 3, shape[1] // 5, shape[0] - shape[0] // 4, shape[1] - shape[1] // 7
        for transposed in (False, True):
            part = cast.dequantise(
                whole[a:c, b:d], np.asfortranarray(scales), block, bfloat16=bfloat16, row0=a, col0=b, transposed=transposed
            )
            same(part, right[a:c, b:d].T if transposed else right[a:c, b:d])


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("block", [(128, 128), (16, 40), (1, 128), (3, 1), (200, 1500)])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantise_of_blocks(shape, block, ue8m0):
    x = normal(shape)
    x[: shape[0] // 2, : shape[1] // 2] = 0
    x[-1:, -1:] = 1e-44  # a scale that underflows
    for values in (x, cast.narrow_reference(x)):
        codes, scales = cast.quantise(values, block, ue8m0=ue8m0)
        same(scales, cast.block_scales_reference(values, block, ue8m0))
        same(codes, cast.encode_blocks_reference(values, scales, block))
        same(cast.block_scales(values, block, ue8m0), scales)
        same(cast.encode_blocks(values, np.asfortranarray(scales), block), codes)
        turned = cast.quantise(np.ascontiguousarray(values.T), block[::-1], ue8m0=ue8m0)
        same(turned[0].T, codes)
        same(turned[1].T, scales)


def test_powers_of_two_are_the_least_that_fit():
    """Against exact integers: the least k with 448 * 2^k >= amax, for every exponent, around 1.75 times it."""
    exponents = np.arange(0, 255, dtype=np.uint32)[:, None] << 23
    u = (exponents + np.uint32([0, 1, 0x5FFFFF, 0x600000, 0x600001, 0x7FFFFF])).reshape(-1, 1)[1:]
    x = u.view(np.float32)
    scales = cast.block_scales(x, (1, 1), ue8m0=True).reshape(-1)
    for value, scale in zip(x.reshape(-1).tolist(), scales.tolist()):
        fraction, k = np.frexp(scale)
        assert fraction == 0.5 and scale >= 2.0**-127
        assert 448 * scale >= value and (448 * scale / 2 < value or scale == 2.0**-127)
    codes, _ = cast.quantise(x, (1, 1), ue8m0=True)
    ordinary = x.reshape(-1) > 448 * 2.0**-127
    assert set(codes.reshape(-1)[ordinary].tolist()) <= set(range(0x76, 0x7F))  # between 224 and 448
    assert cast.block_scales(np.zeros((1, 1), np.float32), (1, 1), ue8m0=True) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_views_and_outs(shape):
    x = normal(shape, 4)
    bits, codes, scales = cast.narrow_reference(x), cast.encode_reference(x), cast.block_scales_reference(x, (16, 40))
    deq = cast.dequantise_reference(codes, scales, (16, 40))
    for a, b, c in zip(views(x), views(bits), views(codes)):
        same(cast.narrow(a), bits)
        same(cast.widen(b), cast.widen_reference(bits))
        same(cast.encode(a), codes)
        same(cast.quantise(a, (16, 40))[1], scales)
        same(cast.quantise(b, (16, 40))[1], cast.block_scales_reference(bits, (16, 40)))
        same(cast.dequantise(c, scales, (16, 40), bfloat16=False), deq)
        same(cast.narrow(a, transposed=True), np.ascontiguousarray(bits.T))
        same(cast.transpose(a), x.T)
        assert cast.transpose(a).flags.c_contiguous and cast.all_finite(a) and cast.all_finite(b)
    plain = {
        (False, np.uint16): lambda out: cast.narrow(x, out),
        (True, np.uint16): lambda out: cast.narrow(x, out, transposed=True),
        (False, np.float32): lambda out: cast.dequantise(codes, scales, (16, 40), out, bfloat16=False),
        (True, np.float32): lambda out: cast.widen(bits, out, transposed=True),
        (False, np.uint8): lambda out: cast.quantise(x, (16, 40), out)[0],
        (True, np.uint8): lambda out: cast.transpose(codes, out),
    }
    for (turned, dtype), call in plain.items():
        want = call(None)
        for out, whole in outs(shape[::-1] if turned else shape, dtype):
            got = call(out)
            same(got, want)
            if out is not None:
                assert got is out
                if whole is not out:  # nothing beside it was touched
                    whole[1:-1, 2:-1] = 7
                    assert (whole == 7).all()


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "f8", "u8", "f2", "?"])
@pytest.mark.parametrize("shape", SHAPES)
def test_transpose(shape, dtype):
    x = np.random.default_rng(5).integers(0, 2, (*shape, np.dtype(dtype).itemsize), np.uint8)
    x = (x * (1 if dtype == "?" else 93)).view(dtype)[..., 0] if dtype != "?" else x[..., 0].view(dtype)
    same(cast.transpose(x), x.T)


@pytest.mark.parametrize("one", [np.float32(1), np.float16(1), np.uint16(0x3F80)], ids=["float32", "float16", "bfloat16"])
def test_all_finite(one):
    bad = {
        "f4": [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001],
        "f2": [0x7C00, 0xFC00, 0x7E00, 0x7C01],
        "u2": [0x7F80, 0xFF80, 0x7FC0, 0x7F81],
    }
    for shape in ((1,), (5000,), (3, 4097), (2, 3, 5)):
        x = np.full(shape, one)
        assert cast.all_finite(x) is True
        x.reshape(-1)[-1] = np.float32(3e38) if x.dtype == np.float32 else 60000 if x.dtype == np.float16 else 0x7F7F
        assert cast.all_finite(x)
        for pattern in bad[x.dtype.str[1:]]:
            for place in {0, x.size // 2, x.size - 1}:
                y = x.copy()
                y.reshape(-1).view(f"u{x.itemsize}")[place] = pattern
                assert cast.all_finite(y) is False
    x = np.full((8, 8), one)
    x.view(f"u{x.itemsize}")[3, 7] = bad[x.dtype.str[1:]][0]
    assert cast.all_finite(x[:, :7]) and not cast.all_finite(x[:, 7:])


def test_threads_do_not_disturb_each_other():
    x = [normal((300, 517), seed) for seed in range(4)]

    def work(k):
        codes, scales = cast.quantise(x[k], (128, 128))
        values = cast.dequantise(codes, scales, (128, 128), bfloat16=True, transposed=True)
        return codes, scales, values, cast.narrow(x[k]), cast.transpose(x[k])

    alone = [work(k) for k in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for k, made in enumerate(pool.map(work, [k % 4 for k in range(40)])):
            for a, b in zip(made, alone[k % 4]):
                same(a, b)


def test_errors():
    x, codes, scales = np.ones((4, 6), np.float32), np.zeros((4, 6), np.uint8), np.ones((2, 2), np.float32)
    with pytest.raises(ValueError, match="float64"):
        cast.narrow(x.astype(np.float64))
    with pytest.raises(ValueError, match=r"bits is float32 \[4, 6\]; expected an array of uint16"):
        cast.widen(x)
    with pytest.raises(ValueError, match="matrix"):
        cast.narrow(np.ones(3, np.float32), transposed=True)
    with pytest.raises(ValueError, match=r"at least \[2, 3\], found \[2, 2\]"):
        cast.dequantise(codes, scales, (2, 2), bfloat16=False)
    with pytest.raises(ValueError, match=r"from \(1, 0\)"):
        cast.dequantise(codes, scales, (2, 3), bfloat16=False, row0=1)
    with pytest.raises(ValueError, match="block"):
        cast.quantise(x, (0, 3))
    with pytest.raises(ValueError, match=r"expected scales \[4, 6\], found \[2, 2\]"):
        cast.encode_blocks(x, scales, (1, 1))
    read_only = np.frombuffer(bytes(48), np.uint16).reshape(4, 6)
    for out in (np.empty((6, 4), np.uint16), np.empty((4, 12), np.uint16)[:, ::2], read_only):
        with pytest.raises(ValueError, match="out"):
            cast.narrow(x, out)
    with pytest.raises(ValueError, match="1, 2, 4 or 8"):
        cast.transpose(np.ones((2, 2), np.complex128))


def test_reference_without_native_kernels(tmp_path):
    """The switch: in a process with DSV3_KERNELS=reference nothing is compiled or loaded."""
    code = (
        "import numpy as np; from dsv3.kernels import cast, native\n"
        "native.library = None\n"
        "assert not cast.enabled() and cast.encode(np.float32([448, 1.0])).tolist() == [126, 56]\n"
        "assert cast.transpose(np.eye(3)).shape == (3, 3)"
    )
    env = os.environ | {"DSV3_KERNELS": "reference", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=tmp_path)
