"""Products of a few rows, native, against float64 NumPy; what a row gives owes nothing to the rows beside it.

Planted faults this file was seen to catch, one at a time: the columns after the last full vector left out; the rows of the
matrix after the last four left out; every chunk written over the one before; the third row of three read from the second; a
sum whose order depends on the number of rows, or of threads; the last tile wider than what is left; a wrong dx; the check of
D taken out; an expert's rows multiplied by sgemm whatever the tokens.
"""
import hashlib
import os
import subprocess
import sys

os.environ.setdefault("MS_DEV_JIT_PIPELINE", "0")

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from dsv3.kernels import native
from dsv3.kernels.experts import experts
from dsv3.kernels.linear import FEW_ROWS, linear
from dsv3.transform import jit, value_and_grad

pytestmark = pytest.mark.skipif(os.environ.get("DSV3_KERNELS") == "reference", reason="about the native kernels")

SHAPES = [(1, 1), (3, 5), (4, 16), (7, 33), (515, 47), (1030, 1100), (130, 4112)]  # D, F; the last two in several tiles
ROWS = [1, 2, 3, 4, 7, 16, 31, 32, 33]
compiled = jit(linear)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


@pytest.mark.parametrize("D, F", SHAPES)
def test_products_match_float64_and_rows_are_independent(D, F):
    assert native.why_reference() is None and FEW_ROWS == 32
    x, w = normal(max(ROWS), D), normal(D, F)
    exact, size = x.astype(np.float64) @ w, np.abs(x).astype(np.float64) @ np.abs(w)
    whole = compiled(x[:FEW_ROWS], w).asnumpy()
    for rows in ROWS if D < 1000 else (1, 3, 16, 33):
        found = compiled(x[-rows:], w).asnumpy()
        assert found.shape == (rows, F) and (np.abs(found - exact[-rows:]) <= 5e-7 * size[-rows:] + 1e-12).all(), rows
        if rows <= FEW_ROWS:  # bit for bit, whatever stands beside it and wherever it stands
            assert np.array_equal(compiled(x[:rows], w).asnumpy(), whole[:rows]), rows
            assert np.array_equal(compiled(x[FEW_ROWS - rows : FEW_ROWS], w).asnumpy(), whole[FEW_ROWS - rows :]), rows


def test_leading_dims_stay():
    x, w = normal(2, 3, 10), normal(10, 6)
    found = compiled(x, w).asnumpy()
    np.testing.assert_allclose(found, x @ w, atol=1e-5)
    assert np.array_equal(found.reshape(6, 6), compiled(x.reshape(6, 10), w).asnumpy())


def test_what_is_not_a_number_stays_in_its_row_and_column():
    x, w = normal(6, 21), normal(21, 40)
    x[1, 3], w[5, 37] = np.inf, np.nan
    found = np.isfinite(compiled(x, w).asnumpy())
    assert not found[1].any() and not found[:, 37].any() and found.sum() == 5 * 39


def test_gradients():
    x, w, dy = normal(9, 37), normal(37, 21), normal(9, 21)

    def loss(p):
        return (linear(p[0], p[1]) * dy_tensor).sum()

    dy_tensor = Tensor(dy)
    dx, dw = (g.asnumpy() for g in value_and_grad(loss)((x, w))[1])
    np.testing.assert_allclose(dx, dy.astype(np.float64) @ w.T, atol=2e-5)
    np.testing.assert_allclose(dw, x.T.astype(np.float64) @ dy, atol=2e-5)


def test_other_dtypes_go_another_way_and_sizes_must_fit():
    x, w = normal(3, 8), normal(8, 5)
    half = compiled(Tensor(x, ms.float16), Tensor(w, ms.float16))
    assert half.dtype == ms.float16
    np.testing.assert_allclose(half.asnumpy(), x @ w, atol=2e-2)
    with pytest.raises(ValueError, match=r"expected x \[\.\.\., 8\] for w \[8, 5\], found \[3, 7\]"):
        compiled(x[:, :7], w)


def arrays_of_experts(T, D=40, F=600, E=6, K=3):
    idx = np.argsort(normal(T, E, seed=1) + np.linspace(0, 2, E), 1)[:, :K].astype(np.int32)
    scale = np.float32(D**-0.5)
    return normal(T, D), normal(E, D, F) * scale, normal(E, D, F, seed=2) * scale, normal(E, F, D) * scale, idx, normal(T, K)


def test_an_experts_row_is_independent_of_the_batch():
    routed = jit(experts)
    x, w_gate, w_up, w_down, idx, weights = arrays_of_experts(FEW_ROWS)
    whole = routed(x, w_gate, w_up, w_down, idx, weights).asnumpy()
    for rows in (1, 2, 7, 16):
        for part in (slice(0, rows), slice(FEW_ROWS - rows, FEW_ROWS)):
            found = routed(x[part], w_gate, w_up, w_down, idx[part], weights[part]).asnumpy()
            assert np.array_equal(found, whole[part]), rows
    many = routed(*(np.concatenate((a, a)) if len(a) == FEW_ROWS else a for a in (x, w_gate, w_up, w_down, idx, weights)))
    np.testing.assert_allclose(many.asnumpy()[:FEW_ROWS], whole, atol=2e-5 * np.abs(whole).max())


def digest():
    """Of products in several tiles."""
    out = [compiled(normal(rows, 700), normal(700, 3000)).asnumpy() for rows in (1, 6, 32)]
    return hashlib.sha256(b"".join(a.tobytes() for a in out)).hexdigest()


def test_the_number_of_threads_changes_nothing():
    code = "import test_kernels_rows as t; print('digest', t.digest())"
    found = set()
    for threads in ("1", "5"):
        environment = os.environ | {"DSV3_NUM_THREADS": threads}
        environment["PYTHONPATH"] = os.pathsep.join((os.path.dirname(__file__), *sys.path))
        out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
        found.add(out.split("digest ")[1].strip())
    assert len(found) == 1
