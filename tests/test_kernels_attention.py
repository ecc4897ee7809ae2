"""The attention kernel, native and composed, against a float64 NumPy oracle.

Planted faults these tests were seen to catch. In the C++: a token sees its successor; segments ignored; an
id that comes back starts at its last run; dq's rotary part turned forward instead of back; the last head
left out of dk_pe; the scale left out of dq; every sequence given the angles of the first; a term of the
exponential's polynomial dropped; no maximum subtracted; a NaN score read as zero probability; the row mean
left out of the softmax gradient; vectors reading past the last key; dv or dk not cleared first; heads added
to dk_pe in the order their threads finish (only test_native_is_bit_reproducible sees this one). In the
Python: half-split rotary pairs; a token blind to itself; segments ignored; float16 handed to the float32
kernel; the wrong kernel as gradient.
"""
from __future__ import annotations

import functools
import os

os.environ.setdefault("MS_DEV_JIT_PIPELINE", "0")

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from dsv3.kernels import native
from dsv3.kernels.attention import mla_attention, mla_attention_reference
from dsv3.kernels.rotary import apply_rotary

# B, T, H, N, R, V: odd sizes; one token; two blocks of queries and a part of a third
ODD, ONE, LONG = (2, 37, 3, 10, 6, 14), (1, 1, 3, 10, 6, 14), (2, 150, 3, 12, 4, 6)
SCALE = 0.37
IMPLEMENTATIONS = ("native", "reference")


def oracle(q, kv, k_pe, cos, sin, segments, sizes, dout, scale=SCALE):
    """Attention and its gradients (out, dq, dkv, dk_pe) in float64, one head and one sequence at a time."""
    B, T, H, N, R, V = sizes
    q, kv, k_pe, cos, sin, dout = (np.asarray(x, np.float64) for x in (q, kv, k_pe, cos, sin, dout))
    turn = np.broadcast_to(cos + 1j * sin, (B, T, R // 2))
    q, kv, dout = q.reshape(B, T, H, N + R), kv.reshape(B, T, H, N + V), dout.reshape(B, T, H, V)
    out, dq, dkv, dk_pe = np.zeros(dout.shape), np.zeros(q.shape), np.zeros(kv.shape), np.zeros(k_pe.shape)

    def pairs(x):
        return x[..., 0::2] + 1j * x[..., 1::2]

    def channels(z):
        return np.stack((z.real, z.imag), -1).reshape(*z.shape[:-1], R)

    for b in range(B):
        sees = np.tril(np.ones((T, T), bool))
        if segments is not None:
            sees &= segments[b][:, None] == segments[b][None, :]
        k_turned = pairs(k_pe[b]) * turn[b]
        for h in range(H):
            q_turned = pairs(q[b, :, h, N:]) * turn[b]
            scores = q[b, :, h, :N] @ kv[b, :, h, :N].T + (q_turned @ k_turned.conj().T).real
            scores = np.where(sees, scores * scale, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            out[b, :, h] = p @ kv[b, :, h, N:]
            dp = dout[b, :, h] @ kv[b, :, h, N:].T
            ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
            dkv[b, :, h, N:] = p.T @ dout[b, :, h]
            dq[b, :, h, :N] = ds @ kv[b, :, h, :N]
            dkv[b, :, h, :N] = ds.T @ q[b, :, h, :N]
            dq[b, :, h, N:] = channels(ds @ k_turned * turn[b].conj())
            dk_pe[b] += channels(ds.T @ q_turned * turn[b].conj())
    return [x.reshape(B, T, -1) for x in (out, dq, dkv, dk_pe)]


def example(sizes, kind=None):
    """q, kv, k_pe, cos, sin, dout in float32; with documents, every sequence has its own positions."""
    B, T, H, N, R, V = sizes
    rng = np.random.default_rng(0)
    angle = rng.uniform(-9, 9, (B if kind else 1, T, R // 2))
    shapes = (B, T, H * (N + R)), (B, T, H * (N + V)), (B, T, R), (B, T, H * V)
    q, kv, k_pe, dout = (rng.standard_normal(s).astype(np.float32) for s in shapes)
    return q, kv, k_pe, np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32), dout


def documents(sizes, kind):
    """Segment ids [B, T]: None, "packed" (rising ids, own cuts a row) or "mixed" (ids that come back)."""
    if kind is None:
        return None
    B, T = sizes[:2]
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 4, (B, T))
    return (np.sort(ids, 1) if kind == "packed" else ids).astype(np.int32)


def options(sizes, scale=SCALE):
    H, N, R, V = sizes[2:]
    return dict(num_heads=H, qk_nope_head_dim=N, qk_rope_head_dim=R, v_head_dim=V, scale=scale)


def function(implementation):
    """The implementation by name; fails where the native kernels are missing, unless switched off."""
    if implementation == "reference":
        return mla_attention_reference
    if os.environ.get("DSV3_KERNELS") == "reference":
        pytest.skip("DSV3_KERNELS=reference")
    assert native.why_reference() is None, native.why_reference()
    return mla_attention


@functools.cache
def step(implementation, sizes, segmented, recompute=False, scale=SCALE):
    """A compiled (q, kv, k_pe, cos, sin, dout, segments) -> (out, dq, dkv, dk_pe)."""
    attention, keywords = function(implementation), options(sizes, scale)

    def block(q, kv, k_pe, cos, sin, segments):
        return attention(q, kv, k_pe, cos, sin, segments if segmented else None, **keywords)

    def loss(q, kv, k_pe, cos, sin, dout, segments):
        if recompute:
            out = ms.recompute(block, q, kv, k_pe, cos, sin, segments)
        else:
            out = block(q, kv, k_pe, cos, sin, segments)
        return (out * dout).sum(), out

    grad = ms.value_and_grad(loss, (0, 1, 2), has_aux=True)

    @ms.jit
    def run(q, kv, k_pe, cos, sin, dout, segments):
        (_, out), grads = grad(q, kv, k_pe, cos, sin, dout, segments)
        return out, grads[0], grads[1], grads[2]

    return run


def results(implementation, sizes, kind, arrays, **keywords):
    """out, dq, dkv, dk_pe of the compiled step as NumPy arrays."""
    segments = documents(sizes, kind) if kind else np.zeros(sizes[:2], np.int32)
    run = step(implementation, sizes, kind is not None, **keywords)
    return [x.asnumpy() for x in run(*(Tensor(a) for a in (*arrays, segments)))]


def relative_error(found, expected):
    return np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-3)


@pytest.mark.parametrize("kind", (None, "packed", "mixed"))
def test_oracle_gradients(kind):
    """The oracle's gradients are the slopes of its own value, by central differences in float64."""
    *inputs, cos, sin, dout = example(ODD, kind)
    segments, rng = documents(ODD, kind), np.random.default_rng(2)
    inputs = [x.astype(np.float64) for x in inputs]
    _, *grads = oracle(*inputs, cos, sin, segments, ODD, dout)
    for i, grad in enumerate(grads):
        direction, values = rng.standard_normal(inputs[i].shape), []
        for sign in (1, -1):
            moved = [x + sign * 1e-5 * direction if j == i else x for j, x in enumerate(inputs)]
            values.append((oracle(*moved, cos, sin, segments, ODD, dout)[0] * dout).sum())
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx((grad * direction).sum(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes, kind", [
    (ODD, "mixed"), (ONE, None), (LONG, None), (LONG, "packed"), (LONG, "mixed")])
def test_value_and_gradients(implementation, sizes, kind):
    *inputs, dout = example(sizes, kind)
    expected = oracle(*inputs, documents(sizes, kind), sizes, dout)
    found = results(implementation, sizes, kind, (*inputs, dout))
    for name, x, y in zip(("out", "dq", "dkv", "dk_pe"), found, expected):
        # float32 sums of up to 150 terms; measured 2e-7 to 9e-7
        assert relative_error(x, y) < 4e-6, name


@pytest.mark.parametrize("implementation, tolerance", [
    ("native", 4e-7),     # exp, sum, inverse and product, each < 1.2e-7
    ("reference", 3e-5),  # MindSpore's exp on the CPU; measured 1.6e-5
])
def test_probabilities(implementation, tolerance):
    """One value channel a token shows the probabilities; scores exact in float32 leave exp and sum."""
    T = 96
    sizes = (1, T, 1, 2, 2, T)
    q, kv, k_pe = (np.zeros((1, T, n), np.float32) for n in (4, 2 + T, 2))
    q[..., 0] = 1
    kv[0, :, 0] = np.random.default_rng(3).integers(-60 * 64, 1, T) / 64
    kv[0, :, 2:] = np.eye(T)
    cos, sin = np.ones((1, T, 1), np.float32), np.zeros((1, T, 1), np.float32)
    dout = np.zeros((1, T, T), np.float32)
    found = results(implementation, sizes, None, (q, kv, k_pe, cos, sin, dout), scale=1.0)[0]
    expected = oracle(q, kv, k_pe, cos, sin, None, sizes, dout, scale=1.0)[0]
    seen = expected > 0
    assert np.array_equal(found > 0, seen)
    assert np.abs(found[seen] / expected[seen] - 1).max() < tolerance


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_never_reach_the_future(implementation):
    """A loss on token t alone: exactly zero gradient after t, some before."""
    arrays = example(LONG)
    for t in (0, 63, 64, 100, 149):
        dout = np.zeros_like(arrays[-1])
        dout[:, t] = arrays[-1][:, t]
        _, dq, dkv, dk_pe = results(implementation, LONG, None, (*arrays[:-1], dout))
        assert not dq[:, :t].any() and not dq[:, t + 1:].any()
        assert not dkv[:, t + 1:].any() and not dk_pe[:, t + 1:].any()
        assert np.abs(dkv[:, : t + 1]).max(-1).all()
        assert t == 0 or np.abs(dk_pe[:, : t + 1]).max(-1).all()  # one key alone has probability 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ("packed", "mixed"))
def test_documents_do_not_mix(implementation, kind):
    """A loss on one document leaves the others exactly zero gradients; they cannot change its output."""
    arrays = example(LONG, kind)
    mine = documents(LONG, kind) == 2
    dout = arrays[-1] * mine[..., None]
    out, *grads = results(implementation, LONG, kind, (*arrays[:-1], dout))
    for grad in grads:
        assert not grad[~mine].any() and grad[mine].any()
    loud = [np.where(mine[..., None], x, 1e4 * x) for x in arrays[:3]]
    changed = results(implementation, LONG, kind, (*loud, *arrays[3:-1], dout))[0]
    assert np.array_equal(changed[mine], out[mine])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_stay_finite(implementation):
    q, kv, *others = example(LONG)
    found = results(implementation, LONG, None, (q * 300, kv * 30, *others))
    *inputs, dout = q * 300, kv * 30, *others
    expected = oracle(*inputs, None, LONG, dout)[0]
    assert all(np.isfinite(x).all() for x in found)
    # scores near 1e4 carry rounding of 1e-3, so probabilities of close rivals differ by as much
    assert np.abs(found[0] - expected).max() < 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_nan_is_not_hidden(implementation):
    """A key of head 0 that is not a number spoils exactly the tokens that see it."""
    q, kv, *others = example(LONG)
    kv = kv.copy()
    kv[0, 70, 3] = np.nan
    out = results(implementation, LONG, None, (q, kv, *others))[0].reshape(2, 150, 3, 6)
    assert np.isnan(out[0, 70:, 0]).all()
    assert np.isnan(out).sum() == 80 * 6


def test_native_matches_reference():
    arrays = example(LONG, "packed")
    native_all, reference_all = (results(name, LONG, "packed", arrays) for name in IMPLEMENTATIONS)
    for x, y in zip(native_all, reference_all):
        assert relative_error(x, y) < 4e-6
    assert not np.array_equal(native_all[0], reference_all[0])  # not one compared with itself


def test_native_is_bit_reproducible():
    arrays = example(LONG, "packed")
    first = results("native", LONG, "packed", arrays)
    for _ in range(20):
        assert all(np.array_equal(x, y) for x, y in zip(results("native", LONG, "packed", arrays), first))


def test_native_under_recompute():
    arrays = example(ODD, "mixed")
    plain, again = (results("native", ODD, "mixed", arrays, recompute=r) for r in (False, True))
    assert all(np.array_equal(x, y) for x, y in zip(plain, again))


def test_eager_equals_compiled():
    function("native")
    *inputs, dout = example(ODD, "mixed")
    out = mla_attention(*(Tensor(x) for x in inputs), Tensor(documents(ODD, "mixed")), **options(ODD))
    assert np.array_equal(out.asnumpy(), results("native", ODD, "mixed", (*inputs, dout))[0])


def test_half_precision_takes_the_reference():
    q, kv, k_pe, cos, sin, dout = example(ODD)
    half = [Tensor(x.astype(np.float16)) for x in (q, kv, k_pe)]
    keywords = options(ODD)

    @ms.jit
    def run(q, kv, k_pe, cos, sin):
        return mla_attention(q, kv, k_pe, cos, sin, None, **keywords)

    out = run(*half, Tensor(cos), Tensor(sin))
    assert out.dtype == ms.float16
    expected = oracle(*(x.asnumpy() for x in half), cos, sin, None, ODD, dout)[0]
    assert relative_error(out.asnumpy(), expected) < 4e-3  # 4 units of float16's last place


def test_rotary_turns_interleaved_pairs():
    rng = np.random.default_rng(4)
    x = rng.standard_normal((2, 5, 3, 8)).astype(np.float32)
    angle = rng.uniform(-9, 9, (1, 5, 4)).astype(np.float32)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle.astype(np.float64))[:, :, None]
    found = ms.jit(apply_rotary)(Tensor(x), Tensor(np.cos(angle)), Tensor(np.sin(angle))).asnumpy()
    np.testing.assert_allclose(found, np.concatenate((turned.real, turned.imag), -1), atol=1e-6)


def test_wrong_arguments_are_refused():
    arrays = [Tensor(x) for x in example(ODD)[:-1]]
    names = ("q", "kv", "k_pe", "cos", "sin")

    def call(segments=None, **changed):
        keywords = options(ODD) | {k: v for k, v in changed.items() if k not in names}
        return mla_attention(*(changed.get(n, a) for n, a in zip(names, arrays)), segments, **keywords)

    with pytest.raises(ValueError, match="even qk_rope_head_dim, found 5"):
        call(qk_rope_head_dim=5)
    with pytest.raises(ValueError, match=r"q: expected \[B, T, 80\]"):
        call(num_heads=5)
    with pytest.raises(ValueError, match=r"kv: expected \(2, 37, 75\)"):
        call(v_head_dim=15)
    with pytest.raises(ValueError, match=r"k_pe: expected \(2, 37, 6\)"):
        call(k_pe=arrays[2][:, :, :4])
    with pytest.raises(ValueError, match="slice the rotary tables to the 37 positions"):
        call(cos=arrays[3][:, :36])
    with pytest.raises(ValueError, match="segment_ids: expected"):
        call(segments=Tensor(np.zeros((2, 36), np.int32)))
    with pytest.raises(ValueError, match="expected the dtype of q"):
        call(kv=arrays[1].astype(ms.float16))
    with pytest.raises(ValueError, match="keep the tables in float32"):
        call(cos=arrays[3].astype(ms.float16))
    with pytest.raises(ValueError, match="even last dimension, found 3"):
        apply_rotary(Tensor(np.zeros((1, 1, 1, 3), np.float32)), arrays[3], arrays[4])

    @ms.jit
    def compiled(q, kv, k_pe, cos, sin):
        return mla_attention(q, kv, k_pe, cos, sin, None, num_heads=5, qk_nope_head_dim=10,
                             qk_rope_head_dim=6, v_head_dim=14, scale=1.0)

    with pytest.raises(ValueError, match=r"q: expected \[B, T, 80\]"):
        compiled(*arrays)
