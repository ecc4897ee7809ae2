"""RMSNorm, SwiGLU and cross entropy: C++ kernels and composed references against float64 NumPy, in value and
gradient.

Planted faults it was seen to catch:
RMSNorm: the gradient of the sum dropped, inverse^2 for inverse^3 in dx, the tail of a row left out of its
mean, chunks left out of dweight, eps dropped, dweight chunked by the number of threads. SwiGLU: a wrong
derivative, a sigmoid without the case of negative gates. Cross entropy: the gradient of ignored tokens kept,
log-sum-exp formed before the label's logit is taken off, a running maximum that starts at 0, a running sum
that is not rescaled, dw of the last chunk only, a label's logit looked up in the wrong tile, labels not
checked, a NaN turned into 0. A shape check taken out.
"""
from __future__ import annotations

import hashlib
import os
import subprocess
import sys

os.environ.setdefault("MS_DEV_JIT_PIPELINE", "0")

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from mindspore import Tensor, ops  # noqa: E402

from dsv3.kernels import cross_entropy as ce  # noqa: E402
from dsv3.kernels import native  # noqa: E402
from dsv3.kernels import rms_norm as norm  # noqa: E402
from dsv3.kernels import swiglu as glu  # noqa: E402

EPS = 1e-6


# Float64 oracles: values and hand-derived gradients of sum(value * cotangent).

def oracle_rms_norm(x, weight, dy):
    inverse = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    g = dy * weight
    dx = inverse * (g - x * inverse**2 * (g * x).mean(-1, keepdims=True))
    return x * inverse * weight, dx, (dy * x * inverse).reshape(-1, x.shape[-1]).sum(0)


def oracle_add_rms_norm(x, residual, weight, dtotal, dy):
    total = x + residual
    y, dx, dweight = oracle_rms_norm(total, weight, dy)
    return total, y, dtotal + dx, dtotal + dx, dweight


def oracle_swiglu(gate, up, dout):
    s = np.where(gate < 0, np.exp(np.minimum(gate, 0)), 1) / (1 + np.exp(-np.abs(gate)))
    return gate * s * up, dout * up * s * (1 + gate * (1 - s)), dout * gate * s


def oracle_cross_entropy(logits, labels, dloss):
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    kept, rows = labels >= 0, np.arange(len(labels))
    safe = np.where(kept, labels, 0)
    dlogits = np.exp(log_p)
    dlogits[rows, safe] -= 1
    return np.where(kept, -log_p[rows, safe], 0), dlogits * (dloss * kept)[:, None]


# Compiled functions, with gradients of all float arguments through ms.jit and ms.value_and_grad.

def compile_grad(fn, arguments, n_outputs):
    """A compiled function of arguments and cotangents: the outputs of ``fn``, then the gradients of
    sum(output * cotangent) for each float argument."""
    n, floats = len(arguments), tuple(i for i, a in enumerate(arguments) if a.dtype == np.float32)
    position = floats if len(floats) > 1 else floats[0]

    def loss(*args):
        outputs = fn(*args[:n])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = 0.0
        for i in range(n_outputs):
            total = total + (outputs[i] * args[n + i]).sum()
        return (total,) + outputs

    grad = ms.value_and_grad(loss, position, has_aux=True)

    @ms.jit
    def compiled(*args):
        values, grads = grad(*args)
        return values[1:] + (grads if isinstance(grads, tuple) else (grads,))

    return compiled


def run(fn, arguments, cotangents):
    """(outputs, gradients) of ``fn`` on NumPy arguments."""
    compiled = compile_grad(fn, arguments, len(cotangents))
    results = [r.asnumpy() for r in compiled(*map(Tensor, (*arguments, *cotangents)))]
    return results[: len(cotangents)], results[len(cotangents):]


def with_eps(fn):
    def call(*arguments):
        return fn(*arguments, EPS)

    return call


def close(found, expected, tolerance):
    assert found.dtype == np.float32 and found.shape == expected.shape
    scale = np.abs(expected).max() if expected.size else 0.0
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * scale)


def normal(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def f64(*arrays):
    return [a.astype(np.float64) if a.dtype == np.float32 else a for a in arrays]


@pytest.fixture(autouse=True)
def native_is_available():
    assert native.why_reference() is None, "these tests compare the C++ kernels: install g++ or clang++"


def test_dispatch_uses_the_native_kernels(monkeypatch):
    for module, reference in ((norm, "rms_norm_reference"), (glu, "swiglu_reference"),
                              (ce, "cross_entropy_reference")):
        monkeypatch.setattr(module, reference, None)
    x, labels = Tensor(normal(4, 8)), Tensor(np.array([0, 1, 2, -1], np.int32))
    assert norm.rms_norm(x, Tensor(normal(8)), EPS).shape == (4, 8)
    assert glu.swiglu(x, x).shape == (4, 8)
    assert ce.cross_entropy(x, labels).shape == (4,)


@pytest.mark.parametrize("which", ["rms_norm", "rms_norm_reference"])
@pytest.mark.parametrize("shape", [(1, 5), (3, 5, 33), (700, 129), (2, 7168)])
def test_rms_norm(which, shape):
    arguments, dy = (normal(*shape), normal(shape[-1], seed=1)), normal(*shape, seed=2)
    outputs, grads = run(with_eps(getattr(norm, which)), arguments, (dy,))
    for found, expected in zip([*outputs, *grads], oracle_rms_norm(*f64(*arguments, dy))):
        close(found, expected, 3e-6)


@pytest.mark.parametrize("which", ["add_rms_norm", "add_rms_norm_reference"])
@pytest.mark.parametrize("shape", [(3, 5, 33), (300, 256)])
def test_add_rms_norm(which, shape):
    arguments = (normal(*shape), normal(*shape, seed=1), normal(shape[-1], seed=2))
    cotangents = (normal(*shape, seed=3), normal(*shape, seed=4))
    outputs, grads = run(with_eps(getattr(norm, which)), arguments, cotangents)
    for found, expected in zip([*outputs, *grads], oracle_add_rms_norm(*f64(*arguments, *cotangents))):
        close(found, expected, 3e-6)


def test_eps_counts():
    x = np.full((2, 4), 1e-3, np.float32)
    found = norm.rms_norm(Tensor(x), Tensor(np.ones(4, np.float32)), 1e-2).asnumpy()
    np.testing.assert_allclose(found, 1e-3 / np.sqrt(1e-6 + 1e-2), rtol=1e-6)


@pytest.mark.parametrize("which", ["swiglu", "swiglu_reference"])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 33), (70001,)])
def test_swiglu(which, shape):
    arguments, dout = (normal(*shape, scale=4), normal(*shape, seed=1)), normal(*shape, seed=2)
    outputs, grads = run(getattr(glu, which), arguments, (dout,))
    for found, expected in zip([*outputs, *grads], oracle_swiglu(*f64(*arguments, dout))):
        close(found, expected, 2e-6)


def test_swiglu_far_from_zero():
    gate = np.array([-1e4, -200, -88, -87, -20, -1e-30, 0, 1e-30, 20, 88, 200, 1e4], np.float32)
    arguments, dout = (gate, np.full_like(gate, 2)), np.ones_like(gate)
    outputs, grads = run(glu.swiglu, arguments, (dout,))
    for found, expected in zip([*outputs, *grads], oracle_swiglu(*f64(*arguments, dout))):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-34)


@pytest.mark.parametrize("which", ["cross_entropy", "cross_entropy_reference"])
@pytest.mark.parametrize("tokens,W", [(1, 1), (7, 50), (33, 5003)])
def test_cross_entropy(which, tokens, W):
    logits, dloss = normal(tokens, W, scale=5), normal(tokens, seed=1)
    labels = np.random.default_rng(2).integers(0, W, tokens).astype(np.int32)
    labels[3::4], labels[-1] = -100, W - 1
    (loss,), (dlogits,) = run(getattr(ce, which), (logits, labels), (dloss,))
    expected = oracle_cross_entropy(*f64(logits), labels, *f64(dloss))
    close(loss, expected[0], 2e-6)
    close(dlogits, expected[1], 2e-6)
    assert not loss[labels < 0].any() and not dlogits[labels < 0].any()


@pytest.mark.parametrize("which", ["cross_entropy", "cross_entropy_reference"])
def test_cross_entropy_of_extreme_logits(which):
    logits = normal(6, 40, scale=3)
    logits[0] += 1e4
    logits[1] -= 1e4
    logits[2, 7], logits[3, 7], logits[4, :20] = 1e4, -1e4, -np.inf
    logits[5] = np.nan  # an ignored token may hold anything
    labels = np.array([3, 4, 8, 7, 30, -1], np.int32)
    (loss,), (dlogits,) = run(getattr(ce, which), (logits, labels), (np.ones(6, np.float32),))
    expected = oracle_cross_entropy(logits[:5].astype(np.float64), labels[:5], np.ones(5))
    np.testing.assert_allclose(loss[:5], expected[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(dlogits[:5], expected[1], rtol=2e-6, atol=1e-7)
    assert loss[5] == 0
    if which == "cross_entropy":  # in the composed one, 0 * NaN spreads
        assert not dlogits[5].any()


def test_a_nan_logit_is_not_hidden():
    logits = normal(2, 40)
    logits[1, 11] = np.nan
    loss = ce.cross_entropy(Tensor(logits), Tensor(np.zeros(2, np.int32))).asnumpy()
    assert np.isfinite(loss[0]) and np.isnan(loss[1])


@pytest.mark.parametrize("which", ["linear_cross_entropy", "linear_cross_entropy_reference"])
@pytest.mark.parametrize("tokens,D,W", [(1, 1, 1), (5, 8, 50), (700, 17, 2500)])
def test_linear_cross_entropy(which, tokens, D, W):
    h, w, dloss = normal(tokens, D), normal(D, W, seed=1), normal(tokens, seed=2)
    labels = np.random.default_rng(3).integers(0, W, tokens).astype(np.int32)
    labels[3::4], labels[-1] = -1, W - 1
    (loss,), (dh, dw) = run(getattr(ce, which), (h, w, labels), (dloss,))
    h64, w64, dloss64 = f64(h, w, dloss)
    expected, dlogits = oracle_cross_entropy(h64 @ w64, labels, dloss64)
    close(loss, expected, 3e-6)
    close(dh, dlogits @ w64.T, 3e-6)
    close(dw, h64.T @ dlogits, 3e-6)
    assert not dh[labels < 0].any()


def test_label_outside_the_vocabulary_is_refused():
    with pytest.raises(RuntimeError):
        ce.cross_entropy(Tensor(normal(2, 8)), Tensor(np.array([0, 8], np.int32))).asnumpy()


CASES = {
    "rms_norm": (with_eps(norm.rms_norm), (normal(3000, 96), normal(96)), normal(3000, 96, seed=1)),
    "linear_cross_entropy": (ce.linear_cross_entropy,
                             (normal(600, 24), normal(24, 3001), np.arange(600, dtype=np.int32)),
                             normal(600, seed=1)),
}


def fingerprints(name, repeats):
    """A digest of all outputs and gradients of a case, once a repeat."""
    fn, arguments, cotangent = CASES[name]
    tensors = [Tensor(a) for a in (*arguments, cotangent)]
    compiled = compile_grad(fn, arguments, 1)
    return [hashlib.sha256(b"".join(r.asnumpy().tobytes() for r in compiled(*tensors))).hexdigest()
            for _ in range(repeats)]


def test_results_depend_neither_on_timing_nor_on_the_number_of_threads():
    found = {name: fingerprints(name, 4) for name in CASES}
    assert [len(set(digests)) for digests in found.values()] == [1, 1]
    program = subprocess.run([sys.executable, __file__], env={**os.environ, "DSV3_NUM_THREADS": "5"},
                             capture_output=True, text=True, timeout=60)
    assert program.returncode == 0, program.stderr
    assert program.stdout.split() == [digests[0] for digests in found.values()]


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
def test_narrow_dtypes_are_computed_in_float32(dtype):
    x, y, w = normal(6, 40), normal(6, 40, seed=1), normal(40, seed=2)

    @ms.jit
    def compiled(x, y, w):
        x, y = x.astype(dtype), y.astype(dtype)
        total, normed = norm.add_rms_norm(x, y, w, EPS)
        results = (norm.rms_norm(x, w, EPS), normed, total, glu.swiglu(x, y))
        return tuple([ops.cast(r, ms.float32) for r in results]), results

    found, narrow = compiled(Tensor(x), Tensor(y), Tensor(w))
    assert [r.dtype for r in narrow] == [dtype] * 4
    expected = (oracle_rms_norm(*f64(x, w, x))[0], oracle_rms_norm(*f64(x + y, w, x))[0], x + y,
                oracle_swiglu(*f64(x, y, x))[0])
    tolerance = 4e-3 if dtype == ms.float16 else 3e-2
    for a, b in zip(found, expected):
        close(a.asnumpy(), b, tolerance)


def test_misuse_is_refused_with_words():
    x, short = Tensor(normal(4, 8)), Tensor(normal(4, 7))
    labels, few = Tensor(np.zeros(4, np.int32)), Tensor(np.zeros(3, np.int32))
    for fn, words, arguments in (
        (with_eps(norm.rms_norm), "expected weight", (x, Tensor(normal(7)))),
        (with_eps(norm.add_rms_norm), "x and residual of one shape", (x, short, Tensor(normal(8)))),
        (with_eps(norm.add_rms_norm), "cast one of them", (x, x.astype(ms.float16), Tensor(normal(8)))),
        (glu.swiglu, "gate and up of one shape", (x, short)),
        (glu.swiglu, "cast one of them", (x, x.astype(ms.float16))),
        (ce.cross_entropy, "labels .tokens.", (x, few)),
        (ce.cross_entropy, "expected int32 labels", (x, Tensor(np.zeros(4, np.int64)))),
        (ce.linear_cross_entropy, "h .tokens, D. and w .D, W.", (x, Tensor(normal(9, 5)), labels)),
        (ce.linear_cross_entropy, "labels .tokens.", (x, Tensor(normal(8, 5)), few)),
    ):

        @ms.jit
        def compiled(*args):
            return fn(*args)  # noqa: B023, called before the loop goes on

        with pytest.raises(ValueError, match=words):
            compiled(*arguments)


if __name__ == "__main__":  # in a process of its own, since a process has one pool of threads
    print(*(fingerprints(name, 1)[0] for name in CASES))
