"""Kernels of the mixture of experts, native and reference, against float64 NumPy.

Planted faults this file was seen to catch. Experts: the weight missing from the hidden gradient; no zeros
written for an expert without tokens; the second half of dx overwriting the first; a split weight gradient
reading the first columns; a pair's token taken modulo K; ln 2 in one part, or no clamp, in exp; a sum that
depends on the number of threads, or on chance; an index not checked (the process dies); dw_gate and dw_up
swapped; int64 indices read as int32; un-permuting by the order instead of its inverse; sort keys that order
equal experts backwards. Grouped matmul: ends not checked; rows past the last group not zeroed; too few blocks
and padded rows not masked in the reference. Choice: ties to the last, masked groups counting 0 (both also in
the reference), a group scored by its best alone, NaN leaving a place unset or blocking
a number, a gradient through the choice, the k of another call.
"""
import os
import subprocess
import sys

os.environ.setdefault("MS_DEV_JIT_PIPELINE", "0")

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from dsv3.kernels import native
from dsv3.kernels.experts import experts, experts_reference, permute, sort_by_expert, unpermute
from dsv3.kernels.grouped_matmul import grouped_matmul, grouped_matmul_reference
from dsv3.kernels.topk import choose_experts, choose_experts_reference, count_experts, count_experts_reference

f32, i32 = np.float32, np.int32
native_only = pytest.mark.skipif(
    os.environ.get("DSV3_KERNELS") == "reference", reason="a property of the native kernels alone"
)


# ---- float64 oracles ---------------------------------------------------------------------------------------


def oracle_experts(x, w_gate, w_up, w_down, idx, weights, dy):
    """(y, dx, dw_gate, dw_up, dw_down, d_weights), one (token, slot) pair at a time, all float64."""
    y, dx, d_weights = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(weights)
    dw_gate, dw_up, dw_down = np.zeros_like(w_gate), np.zeros_like(w_up), np.zeros_like(w_down)
    for t, k in np.ndindex(*idx.shape):
        e, weight = idx[t, k], weights[t, k]
        gate, up = x[t] @ w_gate[e], x[t] @ w_up[e]
        sigmoid = 1 / (1 + np.exp(-gate))
        hidden = gate * sigmoid * up
        out = hidden @ w_down[e]
        y[t] += weight * out
        d_weights[t, k] = out @ dy[t]
        d_hidden = weight * (w_down[e] @ dy[t])
        d_gate, d_up = d_hidden * up * (sigmoid + gate * sigmoid * (1 - sigmoid)), d_hidden * gate * sigmoid
        dx[t] += w_gate[e] @ d_gate + w_up[e] @ d_up
        dw_gate[e] += np.outer(x[t], d_gate)
        dw_up[e] += np.outer(x[t], d_up)
        dw_down[e] += np.outer(hidden, weight * dy[t])
    return y, dx, dw_gate, dw_up, dw_down, d_weights


def oracle_choose(choice, n_group, topk_group, k, group_score):
    """Full sorts of (value, then lowest index) by Python's own stable sort."""
    T, E = choice.shape
    size = E // n_group
    idx = np.zeros((T, k), i32)
    for t, row in enumerate(choice):
        groups = row.reshape(n_group, size)
        summed = 2 if group_score == "top2" and size > 1 else 1
        score = [sum(sorted(group, reverse=True)[:summed], f32(0)) for group in groups]
        kept = sorted(range(n_group), key=lambda g: -score[g])[:topk_group]
        allowed = [e for e in range(E) if e // size in kept]
        idx[t] = sorted(allowed, key=lambda e: -row[e])[:k]
    return idx


# ---- the experts -------------------------------------------------------------------------------------------

SIZES = {  # T, D, F, E, K
    "one token": (1, 3, 5, 2, 1),
    "odd": (37, 10, 14, 5, 3),
    "more experts than pairs": (7, 33, 17, 40, 4),
    "several pieces a group": (300, 24, 275, 4, 2),
    "one expert for all": (400, 6, 7, 3, 1),
}


def make(case, seed=0):
    T, D, F, E, K = SIZES[case]
    rng = np.random.default_rng(seed)
    if case == "one expert for all":
        idx = np.full((T, K), 1)
    else:  # skewed, so that groups are unequal
        idx = np.argsort(rng.normal(size=(T, E)) + np.linspace(0, 2, E), 1)[:, :K]
    floats = [
        rng.normal(size=(T, D)),
        rng.normal(size=(E, D, F)) * D**-0.5,
        rng.normal(size=(E, D, F)) * D**-0.5,
        rng.normal(size=(E, F, D)) * F**-0.5,
        rng.normal(size=(T, K)),
        rng.normal(size=(T, D)),
    ]
    x, w_gate, w_up, w_down, weights, dy = [a.astype(f32) for a in floats]
    return x, w_gate, w_up, w_down, idx.astype(i32), weights, dy


def plain_experts(x, w_gate, w_up, w_down, idx, weights):
    return experts_reference(x, w_gate, w_up, w_down, idx, weights, matmul=grouped_matmul_reference)


def recomputed_experts(x, w_gate, w_up, w_down, idx, weights):
    return ms.recompute(experts, x, w_gate, w_up, w_down, idx, weights)


def compiled_experts(function):
    """The compiled arrays -> (y, dx, dw_gate, dw_up, dw_down, d_weights) of ``function``."""

    def loss(x, w_gate, w_up, w_down, idx, weights, dy):
        y = function(x, w_gate, w_up, w_down, idx, weights)
        return (y * dy).sum(), y

    grad = ms.value_and_grad(loss, (0, 1, 2, 3, 5), has_aux=True)

    def step(x, w_gate, w_up, w_down, idx, weights, dy):
        (_, y), grads = grad(x, w_gate, w_up, w_down, idx, weights, dy)
        return y, grads[0], grads[1], grads[2], grads[3], grads[4]

    compiled = ms.jit(step)
    return lambda arrays: [out.asnumpy() for out in compiled(*[Tensor(a) for a in arrays])]


def run_experts(function, arrays):
    return compiled_experts(function)(arrays)


def close(found, expected, tolerance=2e-6):
    """Within tolerance of the largest expected value, the scale of float32 rounding in such sums."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-30))


def test_native_kernels_are_on():
    wanted_off = os.environ.get("DSV3_KERNELS") == "reference"
    assert (native.why_reference() is None) != wanted_off, native.why_reference()


def test_the_oracle_is_its_own_derivative():
    arrays = [a.astype(np.float64) if a.dtype == f32 else a for a in make("odd")]
    _, *grads = oracle_experts(*arrays)
    rng = np.random.default_rng(1)
    for place, grad in zip((0, 1, 2, 3, 5), grads):
        direction = rng.normal(size=grad.shape)
        values = []
        for step in (1e-5, -1e-5):
            moved = list(arrays)
            moved[place] = arrays[place] + step * direction
            values.append((oracle_experts(*moved)[0] * arrays[6]).sum())
        np.testing.assert_allclose((values[0] - values[1]) / 2e-5, (grad * direction).sum(), rtol=1e-7)


REFERENCE_SIZES = ["odd", "more experts than pairs", "one expert for all"]  # it takes longer to compile
ON_SIZES = [(experts, case) for case in SIZES] + [(plain_experts, case) for case in REFERENCE_SIZES]


@pytest.mark.parametrize("function, case", ON_SIZES)
def test_experts_and_gradients_match_float64(function, case):
    arrays = make(case)
    expected = oracle_experts(*[a.astype(np.float64) if a.dtype == f32 else a for a in arrays])
    found = run_experts(function, arrays)
    for name, a, b in zip(("y", "dx", "dw_gate", "dw_up", "dw_down", "d_weights"), found, expected):
        assert a.shape == b.shape, name
        close(a, b)
    empty = np.setdiff1d(np.arange(arrays[1].shape[0]), arrays[4])
    assert case not in ("more experts than pairs", "one expert for all") or empty.size
    for grad in found[2:5]:
        assert not grad[empty].any(), "an expert without tokens must have a gradient of exactly zero"


@pytest.mark.parametrize("function", [experts_reference, recomputed_experts])
def test_other_ways_to_the_same_experts(function):
    arrays = make("odd", seed=2)
    for a, b in zip(run_experts(function, arrays), run_experts(experts, arrays)):
        close(a, b)


def test_experts_are_bit_reproducible():
    arrays = make("several pieces a group")
    run = compiled_experts(experts)
    first = run(arrays)
    for _ in range(5):
        for a, b in zip(first, run(arrays)):
            assert np.array_equal(a, b)


OTHER_PROCESS = """
import sys, numpy as np
from test_kernels_moe import experts, make, run_experts
np.savez(sys.argv[1], *run_experts(experts, make("several pieces a group")))
"""


def test_experts_do_not_depend_on_the_number_of_threads(tmp_path):
    alone_here = os.cpu_count() == 1 or os.environ.get("DSV3_NUM_THREADS") == "1"
    here, target = os.path.dirname(os.path.abspath(__file__)), tmp_path / "other.npz"
    path = os.pathsep.join([here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "DSV3_NUM_THREADS": "3" if alone_here else "1"}
    subprocess.run([sys.executable, "-c", OTHER_PROCESS, target], env=environment, cwd=tmp_path, check=True)
    with np.load(target) as saved:
        other = [saved[name] for name in saved.files]
    for a, b in zip(other, run_experts(experts, make("several pieces a group")), strict=True):
        assert np.array_equal(a, b)


@native_only  # the device's own sigmoid decides the accuracy of the reference
def test_silu_is_accurate_over_the_whole_range():
    x = np.concatenate([np.linspace(-87, 87, 20001), [-1e3, -200, 200, 1e3, 0]]).astype(f32)
    w, column = np.ones((1, 1, 1), f32), np.ones((x.size, 1), f32)
    arrays = (x.reshape(-1, 1), w, w, w, np.zeros(column.shape, i32), column, column)
    y = run_experts(experts, arrays)[0].ravel()
    v = x.astype(np.float64)
    with np.errstate(over="ignore"):
        expected = v * v / (1 + np.exp(-v))
    np.testing.assert_allclose(y, expected, rtol=4e-7, atol=1e-30)
    assert y[-1] == 0


def test_experts_refuse_what_does_not_fit():
    x, w_gate, w_up, w_down, idx, weights, _ = [Tensor(a) for a in make("odd")]
    with pytest.raises(ValueError, match=r"expected x \[T, D\]"):
        ms.jit(experts)(x, w_gate, w_up, w_up, idx, weights)
    with pytest.raises(ValueError, match="one dtype"):
        ms.jit(experts)(x, w_gate, Tensor(w_up.asnumpy(), ms.float16), w_down, idx, weights)
    with pytest.raises(ValueError, match="int32 keys"):
        sort_by_expert(Tensor(np.zeros((1, 8), i32)), 2**28)


@native_only
@pytest.mark.parametrize("wrong", [-1, 5])
def test_experts_refuse_an_index_that_is_no_expert(wrong):
    arrays = make("odd")
    arrays[4][3, 1] = wrong
    with pytest.raises(RuntimeError, match="experts"):
        ms.jit(experts)(*[Tensor(a) for a in arrays[:6]])


def test_layers_of_different_sizes_and_int64_indices_share_one_graph():
    first, second = make("odd"), make("odd", seed=7)
    expected = first[0].astype(np.float64)
    for _, w_gate, w_up, w_down, idx, weights, dy in (first, second):
        expected = oracle_experts(expected, w_gate, w_up, w_down, idx[:, :2], weights[:, :2], dy)[0]

    def two_layers(x, first, second):
        for w_gate, w_up, w_down, idx, weights in (first, second):
            x = experts(x, w_gate, w_up, w_down, idx, weights)
        counts = count_experts(first[3], 5), count_experts(second[3], 9)
        choices = [choose_experts(x, n_group=1, topk_group=1, k=k) for k in (2, 4)]
        return x, counts[0], counts[1], choices[0], choices[1]

    def layer(a, n_spare, dtype):
        spare = ((0, n_spare), (0, 0), (0, 0))
        weights = [np.pad(w, spare) for w in a[1:4]] + [a[4][:, :2].astype(dtype), a[5][:, :2]]
        return tuple(Tensor(np.ascontiguousarray(w)) for w in weights)

    out = ms.jit(two_layers)(Tensor(first[0]), layer(first, 0, np.int64), layer(second, 4, np.int32))
    x, few, many, two, four = [o.asnumpy() for o in out]
    close(x, expected)
    assert np.array_equal(few, np.bincount(first[4][:, :2].ravel(), minlength=5))
    assert np.array_equal(many, np.bincount(second[4][:, :2].ravel(), minlength=9))
    assert np.array_equal(four, oracle_choose(x, 1, 1, 4, "max")) and np.array_equal(two, four[:, :2])


def test_permute_and_unpermute_undo_each_other():
    x, idx, weights = [Tensor(a) for i, a in enumerate(make("odd")) if i in (0, 4, 5)]

    def there_and_back(x, idx, weights):
        order, group_end = sort_by_expert(idx, 5)
        rows = permute(x, order, 3)
        return order, group_end, rows, unpermute(rows, order, weights)

    order, group_end, rows, back = [out.asnumpy() for out in ms.jit(there_and_back)(x, idx, weights)]
    flat = idx.asnumpy().ravel()
    assert np.array_equal(order, np.argsort(flat, kind="stable"))
    assert np.array_equal(group_end, np.cumsum(np.bincount(flat, minlength=5)))
    assert np.array_equal(rows, x.asnumpy()[order // 3])
    np.testing.assert_allclose(back, x.asnumpy() * weights.asnumpy().sum(1, keepdims=True), rtol=0, atol=3e-6)


# ---- grouped matmul ----------------------------------------------------------------------------------------

GROUPS = {  # rows, ends
    "empty groups and spare rows": (31, (0, 7, 7, 19, 19, 26, 26)),
    "no rows at all": (5, (0, 0, 0)),
    "one group has it all": (600, (0, 600, 600)),
    "more groups than rows": (2, (0, 0, 1, 1, 1, 2, 2)),
    "one group": (9, (9,)),
}


@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize("function", [grouped_matmul, grouped_matmul_reference], ids=["kernel", "reference"])
def test_grouped_matmul_and_gradients_match_float64(function, case):
    M, ends = GROUPS[case]
    rng = np.random.default_rng(3)
    x, w, dy = [rng.normal(size=s).astype(f32) for s in ((M, 13), (len(ends), 13, 7), (M, 7))]
    x[ends[-1] :] = np.inf  # rows of no group must not be read, nor their gradients
    dy[ends[-1] :] = np.nan
    expected = [np.zeros((M, 7)), np.zeros((M, 13)), np.zeros(w.shape)]
    for g, (begin, end) in enumerate(zip((0, *ends), ends)):
        rows = slice(begin, end)
        expected[0][rows] = x[rows].astype(np.float64) @ w[g]
        expected[1][rows] = dy[rows].astype(np.float64) @ w[g].T
        expected[2][g] = x[rows].astype(np.float64).T @ dy[rows]

    def loss(x, w, group_end, dy):
        y = function(x, w, group_end)
        return (y * dy).sum(), y

    grad = ms.value_and_grad(loss, (0, 1), has_aux=True)

    def step(x, w, group_end, dy):
        (_, y), grads = grad(x, w, group_end, dy)
        return y, grads[0], grads[1]

    arguments = [Tensor(a) for a in (x, w, np.array(ends, i32), dy)]
    found = [out.asnumpy() for out in ms.jit(step)(*arguments)]
    for a, b in zip(found, expected):
        close(a, b)
    assert not found[0][ends[-1] :].any() and not found[1][ends[-1] :].any()
    assert not found[2][np.diff((0, *ends)) == 0].any()


def test_grouped_matmul_refuses_what_does_not_fit():
    x, w = Tensor(np.ones((4, 3), f32)), Tensor(np.ones((2, 3, 5), f32))
    end = Tensor(np.array([1, 2, 4], i32))
    with pytest.raises(ValueError, match="one dtype"):
        ms.jit(grouped_matmul)(x, Tensor(w.asnumpy(), ms.float16), Tensor(np.array([1, 4], i32)))
    with pytest.raises(ValueError, match=r"group_end \[E\]"):
        ms.jit(grouped_matmul)(x, w, end)


@native_only
@pytest.mark.parametrize("ends", [(3, 2, 4), (1, 2, 5)])
def test_grouped_matmul_refuses_ends_outside_the_rows(ends):
    x, w = Tensor(np.ones((4, 3), f32)), Tensor(np.ones((3, 3, 5), f32))
    with pytest.raises(RuntimeError, match="grouped_matmul"):
        ms.jit(grouped_matmul)(x, w, Tensor(np.array(ends, i32)))


# ---- choosing and counting ---------------------------------------------------------------------------------

BOTH = [  # E, n_group, topk_group, k, group_score
    (12, 1, 1, 3, "top2"),
    (12, 4, 2, 4, "top2"),
    (12, 4, 2, 2, "max"),
    (6, 6, 3, 2, "top2"),
]
KERNEL_ONLY = [
    (12, 4, 2, 6, "top2"),
    (256, 8, 4, 8, "top2"),
    (15, 3, 3, 15, "max"),
    (7, 7, 1, 1, "max"),
]
CHOICES = [(f, *case) for case in BOTH for f in (choose_experts, choose_experts_reference)]
CHOICES += [(choose_experts, *case) for case in KERNEL_ONLY]  # many rounds take the reference long to compile


def compiled_choice(function, n_group, topk_group, k, group_score):
    def choose(choice):
        return function(choice, n_group=n_group, topk_group=topk_group, k=k, group_score=group_score)

    return ms.jit(choose)


@pytest.mark.parametrize("function, E, n_group, topk_group, k, group_score", CHOICES)
def test_choice_matches_full_sorts_with_ties_and_negatives(function, E, n_group, topk_group, k, group_score):
    rng = np.random.default_rng(4)
    choose = compiled_choice(function, n_group, topk_group, k, group_score)
    distinct = rng.normal(size=(67, E))
    ties = np.round(rng.normal(size=(67, E)))
    for choice in (distinct, ties, distinct - 10, ties - 10, np.zeros((67, E))):
        choice = choice.astype(f32)
        found = choose(Tensor(choice)).asnumpy()
        assert found.dtype == i32
        assert np.array_equal(found, oracle_choose(choice, n_group, topk_group, k, group_score))


def test_minus_infinity_and_nan_still_give_distinct_experts():
    choice = np.full((2, 8), -np.inf, f32)
    choice[:, 3] = 1
    for function in (choose_experts, choose_experts_reference):
        found = compiled_choice(function, 4, 2, 3, "top2")(Tensor(choice)).asnumpy()
        assert found.tolist() == [[3, 0, 1]] * 2
    if native.why_reference() is None:
        nan = np.full((2, 8), np.nan, f32)
        nan[1, [2, 6]] = -1, 3
        found = compiled_choice(choose_experts, 1, 1, 4, "top2")(Tensor(nan)).asnumpy()
        assert found.tolist() == [[0, 1, 2, 3], [6, 2, 0, 1]]


def test_the_choice_passes_no_gradient_but_stands_inside_one():
    scores = np.random.default_rng(5).normal(size=(11, 8)).astype(f32)

    def loss(scores):
        idx = choose_experts(scores * 2, n_group=4, topk_group=2, k=3)
        return ops.gather_elements(scores, 1, idx).sum() + count_experts(idx, 8).astype(ms.float32).sum()

    def step(scores):
        return ms.value_and_grad(loss)(scores)

    _, grad = ms.jit(step)(Tensor(scores))
    expected = np.zeros_like(scores)
    np.put_along_axis(expected, oracle_choose(scores, 4, 2, 3, "top2"), 1, axis=1)
    assert np.array_equal(grad.asnumpy(), expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((5, 2, 3, "top2"), "pick a divisor"),
        ((4, 5, 3, "top2"), "topk_group=5"),
        ((4, 2, 7, "top2"), "k=7: expected 1 to 6"),
        ((4, 2, 3, "sum"), "group_score='sum'"),
    ],
)
def test_choice_refuses_numbers_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        compiled_choice(choose_experts, *arguments)(Tensor(np.zeros((2, 12), f32)))


@pytest.mark.parametrize("function", [count_experts, count_experts_reference], ids=["kernel", "reference"])
def test_counts(function):
    idx = np.random.default_rng(6).integers(0, 9, (41, 5)).astype(i32)
    idx[idx == 4] = 8  # an expert without tokens

    def count(idx):
        return function(idx, 11)

    counts = ms.jit(count)(Tensor(idx)).asnumpy()
    assert counts.dtype == i32 and counts.tolist() == np.bincount(idx.ravel(), minlength=11).tolist()
