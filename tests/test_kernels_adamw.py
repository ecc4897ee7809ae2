"""AdamW in place on flat tuples of leaves: against float64 NumPy, against torch, and against its composed
reference.

Planted faults it was seen to catch:
weight decay dropped, or applied to every leaf; eps inside the bias
correction; the correction of v without its root; grad_scale dropped; bfloat16 ties rounded away from zero;
bfloat16 moments not written back; the norm accumulated in float32; a leaf's last elements left out of the
norm; the reference not assigning v; Ascend's operator decaying without the rate.
"""
from __future__ import annotations

import os

os.environ.setdefault("MS_DEV_JIT_PIPELINE", "0")

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from mindspore import Tensor, ops  # noqa: E402
from mindspore.graph.api import ms_compile_cache  # noqa: E402

from dsv3.kernels import adamw, native  # noqa: E402
from dsv3.parallel.lockstep_fused import adamw as operator  # noqa: E402

LR, BETA1, BETA2, EPS, DECAY = 1e-2, 0.9, 0.95, 1e-8, 0.1

# torch 2.13 on the CPU, float32: AdamW(lr=1e-2, betas=(0.9, 0.95), eps=1e-8), weight decay 0.1 on the first
# leaf and 0 on the second, 10 steps from START with GRADIENT: param, exp_avg, exp_avg_sq.
TORCH = (
    ([0.965577006, 0.522554398, -0.408393741, -0.948224783, -0.618577182, 0.299810857],
     [-0.0124616278, 0.0287103821, 0.0563794449, 0.0575323813, 0.0316269323, -0.00915315375],
     [0.197368264, 0.209564909, 0.206931546, 0.193839729, 0.192022741, 0.204496875]),
    ([0.871994197, 0.0795595497, -0.76928395, -0.911237061, -0.197426453],
     [0.0864354298, 0.120944127, 0.0985708982, 0.0298382547, -0.052927807],
     [0.842977464, 0.805304229, 0.763019145, 0.786318183, 0.836523414]),
)
START = (np.cos(np.arange(6)).astype(np.float32).reshape(2, 3), np.cos(np.arange(5) + 0.5).astype(np.float32))


def GRADIENT(step, leaf):
    shape = START[leaf].shape
    angle = 0.7 * np.arange(START[leaf].size) + 1.3 * step + leaf
    return (np.sin(angle) * (1 + leaf)).astype(np.float32).reshape(shape)


@pytest.fixture(autouse=True)
def native_is_available():
    assert native.why_reference() is None, "these tests compare the C++ kernels: install g++ or clang++"


def scalars(step, grad_scale=1.0):
    """With the corrections of the float32 betas, as adamw_update asks for."""
    beta1, beta2 = float(np.float32(BETA1)), float(np.float32(BETA2))
    return np.array([LR, BETA1, BETA2, EPS, DECAY, 1 - beta1**step, 1 - beta2**step, grad_scale], np.float32)


def compile_update(update, n, decay):
    """A compiled update of leaves that are given flat: scalars, n params, n grads, n m, n v, masters."""

    @ms.jit
    def compiled(s, *leaves):
        params, grads, m, v = leaves[:n], leaves[n:2 * n], leaves[2 * n:3 * n], leaves[3 * n:4 * n]
        return update(s, params, grads, m, v, decay, leaves[4 * n:])

    return compiled


def oracle(param, grad, m, v, s, decay):
    """One step in float64 on NumPy arrays; returns new param, m, v."""
    lr, beta1, beta2, eps, weight_decay, correction1, correction2, grad_scale = s.astype(np.float64)
    g = grad.astype(np.float64) * grad_scale
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    param = param * (1 - lr * weight_decay) if decay else param
    return param - lr * (m / correction1) / (np.sqrt(v / correction2) + eps), m, v


def to_bfloat16(x):
    """Rounds float32 to the nearest bfloat16, ties to even; the result is float32 again."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.int64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("update", [adamw.adamw_update, adamw.adamw_update_reference])
def test_ten_steps_equal_torch(update):
    step_fn = compile_update(update, 2, (True, False))
    state = [[Tensor(x * factor) for x in START] for factor in (np.float32(1), np.float32(0), np.float32(0))]
    for step in range(1, 11):
        grads = [Tensor(GRADIENT(step, leaf)) for leaf in range(2)]
        step_fn(Tensor(scalars(step)), *state[0], *grads, *state[1], *state[2])
    for leaf, expected in enumerate(TORCH):
        for tensors, values in zip(state, expected):  # the very tensors that were passed have changed
            np.testing.assert_allclose(tensors[leaf].asnumpy().ravel(), values, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("update", [adamw.adamw_update, adamw.adamw_update_reference])
def test_ten_steps_equal_float64(update):
    rng = np.random.default_rng(0)
    shapes, decay = ((7, 13), (), (1,), (40_001,), (3, 2, 5)), (True, False, True, True, False)
    n = len(shapes)
    state = [[rng.standard_normal(shape).astype(np.float32) for shape in shapes]] + [
        [np.zeros(shape, np.float32) for shape in shapes] for _ in range(2)]
    tensors = [[Tensor(x.copy()) for x in leaves] for leaves in state]
    exact = [[x.astype(np.float64) for x in leaves] for leaves in state]
    step_fn = compile_update(update, n, decay)
    for step in range(1, 11):
        s = scalars(step, grad_scale=0.37)
        grads = [np.asarray(rng.standard_normal(shape) * 10 ** rng.uniform(-3, 1), np.float32)
                 for shape in shapes]
        learning_rate = step_fn(Tensor(s), *tensors[0], *map(Tensor, grads), *tensors[1], *tensors[2])
        for i in range(n):
            new = oracle(exact[0][i], grads[i], exact[1][i], exact[2][i], s, decay[i])
            exact[0][i], exact[1][i], exact[2][i] = new
    np.testing.assert_array_equal(learning_rate.asnumpy(), np.float32([LR]))
    for found, expected in zip(tensors, exact):
        for a, b in zip(found, expected):
            assert a.shape == b.shape
            np.testing.assert_allclose(a.asnumpy(), b, rtol=2e-5, atol=2e-6 * max(1e-3, np.abs(b).max()))


def test_bfloat16_params_with_masters_and_bfloat16_moments():
    rng = np.random.default_rng(1)
    # leaf 0: bfloat16 param; 1: float32; 2: bfloat16 param and moments
    shape, decay = (5, 401), (True, True, False)
    start = [to_bfloat16(rng.standard_normal(shape)) for _ in range(3)]

    def narrow(x):
        return Tensor(x).astype(ms.bfloat16)

    params = [narrow(start[0]), Tensor(start[1].copy()), narrow(start[2])]
    masters = [Tensor(start[0].copy()), Tensor(start[2].copy())]
    zero = np.zeros(shape, np.float32)
    m, v = ([Tensor(zero.copy()), Tensor(zero.copy()), narrow(zero)] for _ in range(2))
    exact = [[x.astype(np.float64) for x in start], [0.0] * 3, [0.0] * 3]
    step_fn = compile_update(adamw.adamw_update, 3, decay)
    for step in range(1, 5):
        s = scalars(step)
        grads = [to_bfloat16(rng.standard_normal(shape)) for _ in range(3)]
        step_fn(Tensor(s), *params, narrow(grads[0]), Tensor(grads[1]), narrow(grads[2]), *m, *v, *masters)
        for i in range(3):
            new = oracle(exact[0][i], grads[i], exact[1][i], exact[2][i], s, decay[i])
            exact[0][i], exact[1][i], exact[2][i] = new
        for rows, found in ((exact[1], m[2]), (exact[2], v[2])):
            # float64 and float32 may fall on two sides of a tie: all but a few equal to the bit, none a step
            # away
            rounded, kept = to_bfloat16(rows[2]), found.astype(ms.float32).asnumpy()
            assert (rounded != kept).mean() < 1e-3
            np.testing.assert_allclose(kept, rounded, rtol=2**-7)
            rows[2] = kept.astype(np.float64)
    assert [p.dtype for p in params] == [ms.bfloat16, ms.float32, ms.bfloat16]
    for found, expected in ((masters[0], exact[0][0]), (params[1], exact[0][1]), (masters[1], exact[0][2])):
        np.testing.assert_allclose(found.asnumpy(), expected, rtol=1e-5, atol=1e-6)
    for found, master in ((params[0], masters[0]), (params[2], masters[1])):
        np.testing.assert_array_equal(found.astype(ms.float32).asnumpy(), to_bfloat16(master.asnumpy()))


def test_rounding_of_ties_and_specials():
    exact = np.float32([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 3.3961776e38, np.inf])
    param, zero = Tensor(np.zeros(6, np.float32)).astype(ms.bfloat16), Tensor(np.zeros(6, np.float32))
    master = Tensor(exact.copy())
    s = scalars(1)
    s[4] = 0
    compile_update(adamw.adamw_update, 1, (False,))(
        Tensor(s), param, zero, Tensor(np.zeros(6, np.float32)), Tensor(np.zeros(6, np.float32)), master)
    np.testing.assert_array_equal(param.astype(ms.float32).asnumpy(),
                                  np.array([1, 1 + 2**-6, -1, 1 + 2**-7, np.inf, np.inf], np.float32))


def test_global_norm_sq_is_exact_to_float32():
    rng = np.random.default_rng(2)
    grads = [np.asarray(rng.standard_normal(shape), np.float32) for shape in ((), (1,), (70_003,), (513, 31))]
    grads.append(np.full((200_000,), 1e-4, np.float32))  # lost beside the others, in a float32 accumulator
    expected = np.float32(sum((g.astype(np.float64) ** 2).sum() for g in grads))

    @ms.jit
    def compiled(*grads):
        return adamw.global_norm_sq(*grads), adamw.global_norm_sq_reference(*grads)

    found, composed = compiled(*map(Tensor, grads))
    assert found.shape == composed.shape == () and found.dtype == composed.dtype == ms.float32
    assert abs(found.asnumpy() - expected) <= np.spacing(expected)
    np.testing.assert_allclose(composed.asnumpy(), expected, rtol=1e-5)
    narrow = [Tensor(g).astype(ms.bfloat16) for g in grads]
    expected = sum((to_bfloat16(g).astype(np.float64) ** 2).sum() for g in grads)
    np.testing.assert_allclose(compiled(*narrow)[0].asnumpy(), expected, rtol=1e-6)


def test_a_whole_step_of_300_leaves_compiles_once():
    """Loss, gradients, clipping and update in one graph: no param is written before its last gradient."""
    n = 300
    rng = np.random.default_rng(3)
    start = [rng.standard_normal((3, 4)).astype(np.float32) for _ in range(n)]

    def loss(x, *params):  # each gradient needs the neighbour's value
        return (ops.stack(params[1:] + params[:1]) * ops.stack(params) * x).sum()

    grad = ms.value_and_grad(loss, tuple(range(1, n + 1)))
    decay = tuple(i % 3 == 0 for i in range(n))

    @ms.jit
    def step_fn(s, x, *leaves):
        params, m, v = leaves[:n], leaves[n:2 * n], leaves[2 * n:]
        value, grads = grad(x, *params)
        norm_sq = adamw.global_norm_sq(*grads)
        s = s * ops.concat((ops.ones((7,), ms.float32), ops.rsqrt(norm_sq).reshape(1)))
        return value, norm_sq, adamw.adamw_update(s, params, grads, m, v, decay)

    state = [[Tensor(x.copy()) for x in start]] + [[Tensor(0 * x) for x in start] for _ in range(2)]
    exact = [[x.astype(np.float64) for x in start], [0.0] * n, [0.0] * n]
    x = np.float32(1.5)
    for step in range(1, 4):
        compiled = len(ms_compile_cache)
        value, norm_sq, _ = step_fn(Tensor(scalars(step)), Tensor(x), *state[0], *state[1], *state[2])
        if step > 1:
            assert len(ms_compile_cache) == compiled
        P = exact[0]
        grads = [x * (P[i - 1] + P[(i + 1) % n]) for i in range(n)]
        expected_sq = sum((g**2).sum() for g in grads)
        np.testing.assert_allclose(norm_sq.asnumpy(), expected_sq, rtol=1e-5)
        expected = x * sum((P[i] * P[(i + 1) % n]).sum() for i in range(n))
        np.testing.assert_allclose(value.asnumpy(), expected, rtol=1e-4)
        s = scalars(step, 1 / np.sqrt(expected_sq))
        new = [oracle(P[i], grads[i], exact[1][i], exact[2][i], s, decay[i]) for i in range(n)]
        exact = [[leaf[j] for leaf in new] for j in range(3)]
    for found, expected in zip(state[0], exact[0]):
        np.testing.assert_allclose(found.asnumpy(), expected, rtol=1e-4, atol=1e-5)


def test_misuse_is_refused_with_words():
    x, s = Tensor(np.ones(4, np.float32)), Tensor(scalars(1))
    half, narrow = x.astype(ms.float16), x.astype(ms.bfloat16)
    other = Tensor(np.ones(5, np.float32))
    native_update, composed_update = adamw.adamw_update, adamw.adamw_update_reference
    for update, words, leaves, decay in (
        (native_update, "one shape", (x, other, x, x), (True,)),
        (composed_update, "one shape", (x, other, x, x), (True,)),
        (native_update, "float32 or bfloat16", (x, half, x, x), (True,)),
        (native_update, "as many float32 masters", (narrow, x, x, x), (True,)),
        (native_update, "as many float32 masters", (x, x, x, x, x), (True,)),
        (native_update, "one shape", (narrow, x, x, x, other), (True,)),
        (native_update, "of one length", (x, x, x, x), (True, False)),
        (composed_update, "cannot assign to bfloat16", (narrow, x, x, x, x), (True,)),
        (composed_update, "cannot assign to bfloat16", (x, x, narrow, x), (True,)),
    ):
        with pytest.raises(ValueError, match=words):
            compile_update(update, 1, decay)(s, *leaves)
    with pytest.raises(ValueError, match="scalars .8. float32"):
        compile_update(native_update, 1, (True,))(x, x, x, x, x)

    @ms.jit
    def norm(*grads):
        return adamw.global_norm_sq(*grads)

    with pytest.raises(ValueError, match="found Float16"):
        norm(x, half)
    with pytest.raises(ValueError, match="at least one"):
        norm()


def test_ascends_operator_with_corrections_in_its_settings_is_adamw():
    """The numbers that ``_by_operator`` gives to aclnnApplyAdamWV2, by that operator's formula; that graphs hand it these
    numbers is proved by the programs in lockstep (test_parallel_numbers).
    """
    rng = np.random.default_rng(0)
    p, g = rng.standard_normal((2, 64)).astype(np.float32)
    m, v = np.zeros_like(p), np.zeros_like(p)
    wanted = np.float64(p), np.float64(m), np.float64(v)
    for step in range(1, 30):
        c1, c2 = 1 - BETA1**step, 1 - BETA2**step
        p, m, v = operator(p, m, v, v, g, adamw.LATE, LR * c2**0.5 / c1, BETA1, BETA2, DECAY * c1 / c2**0.5, EPS * c2**0.5,
                           False, False)
        a, b, c = wanted
        b, c = b + (1 - BETA1) * (g - b), BETA2 * c + (1 - BETA2) * g.astype(np.float64) ** 2
        wanted = a * (1 - LR * DECAY) - LR / c1 * b / (np.sqrt(c) / c2**0.5 + EPS), b, c
    for found, expected in zip((p, m, v), wanted):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)
    skipped = operator(p, m, v, v, 0 * g, adamw.LATE, 0.0, adamw.ALMOST_1, adamw.ALMOST_1, DECAY, EPS, False, False)
    np.testing.assert_array_equal(skipped[0], p)
    for found, expected in zip(skipped[1:], (m, v)):
        np.testing.assert_allclose(found, expected, rtol=2.0**-22)
