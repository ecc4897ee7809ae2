"""The compile boundary: what crosses it and in what shape, what is refused and with which words, what
compiles
again.

Planted faults this file was seen to catch, one at a time: lists accepted; Python numbers as constants;
64-bit integers cut off unseen; float64 kept; keyword arguments dropped; results as lists; one container too
many allowed; a partial accepted; static keywords missing from the key; a structure missing from the key; a
graph for each call; a failed compilation that is never over.
"""

import functools
import re

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

import dsv3
from dsv3.transform import compile_count, compiled, jit, value_and_grad

f32 = np.float32


def compiles(call, *args, **kwargs):
    """Graphs compiled by one call."""
    before = compile_count()
    call(*args, **kwargs)
    return compile_count() - before


def identity(tree):
    return tree


SCALE = 3.0


@jit
def scaled(tree, by):
    """Module-level, shared by the tests that need some graph."""
    return {"out": tree["x"] * by, "both": (tree["x"], {"again": tree["x"] + SCALE})}


class Thing:
    """Something with a method."""

    def method(self, x):
        return x


def test_structure_of_results():
    x = np.arange(6, dtype=f32).reshape(2, 3)
    out = scaled({"x": x}, np.float32(2))
    assert list(out) == ["out", "both"] and type(out["both"]) is tuple and type(out["both"][1]) is dict
    np.testing.assert_array_equal(out["out"].asnumpy(), 2 * x)
    np.testing.assert_array_equal(out["both"][1]["again"].asnumpy(), x + 3)


def test_structures_pass_through():
    """Nested, empty and one-element containers; keys that sort otherwise; a single tensor."""

    def make():
        return Tensor(np.ones(2, f32))

    passed = jit(identity)
    for tree in (
        {"b": make(), "a": (make(),), "c": {}, "d": ()},
        (make(), ({"z": (make(), make())},)),
        make(),
        {"one": {"two": ({"three": (make(),)},)}},
    ):
        out = passed(tree)
        assert dsv3.tree.same_structure(out, tree), (tree, out)
        if isinstance(tree, dict):
            assert list(out) == list(tree)


def test_second_call_compiles_nothing():
    x = np.ones((2, 3), f32)
    scaled({"x": x}, np.float32(2))
    assert compiles(scaled, {"x": x}, np.float32(7)) == 0
    assert (
        compiles(scaled, {"x": Tensor(x + 1)}, Tensor(5.0, ms.float32)) == 0
    )  # a 0-D tensor is a new value too
    assert compiles(scaled, {"x": 2 * x}, np.array(3, f32)) == 0
    assert compiles(scaled, {"x": x.astype(np.float64)}, np.float64(0.5)) == 0  # narrowed to the same float32
    assert compiles(scaled, {"x": np.ones((4, 3), f32)}, np.float32(2)) == 1  # another shape


def test_new_scalars_are_new_values():
    x = np.ones((2, 3), f32)
    for value in (2, 7, -1):
        assert float(scaled({"x": x}, np.float32(value))["out"].asnumpy()[0, 0]) == value


def test_keyword_arguments():
    x = {"x": np.ones((2, 3), f32)}
    by_position = scaled(x, np.float32(2))["out"].asnumpy()
    np.testing.assert_array_equal(scaled(x, by=np.float32(2))["out"].asnumpy(), by_position)
    np.testing.assert_array_equal(scaled(by=np.float32(2), tree=x)["out"].asnumpy(), by_position)
    assert compiles(scaled, by=np.float32(4), tree=x) == 0
    with pytest.raises(TypeError, match="missing a required argument: 'by'"):
        scaled(tree=x)
    with pytest.raises(TypeError, match="unexpected keyword argument 'wrong'"):
        scaled(x, np.float32(1), wrong=x)

    def keyword_only(x, *, flag):
        return x

    with pytest.raises(
        TypeError, match=r"keyword-only arguments \('flag',\) cannot cross .* close over them"
    ):
        jit(keyword_only)(x, flag=True)


def test_constants():
    """None, bool and str are constants of the compilation: each value is a graph of its own."""

    def choose(x, how, tree):
        if how is None:
            return x
        if how == "double":
            x = x * 2
        if tree["negate"]:
            x = -x
        return x

    choose, x = jit(choose), np.ones(3, f32)
    for how, negate, value in (
        (None, True, 1),
        ("double", True, -2),
        ("double", False, 2),
        ("other", False, 1),
    ):
        assert choose(x, how, {"negate": negate}).asnumpy().tolist() == [value] * 3
    assert compiles(choose, x, "double", {"negate": True}) == 0


@pytest.mark.parametrize(
    "given, kept",
    [
        (np.array([1, -5], np.int64), np.int32),
        (np.array([2**31 - 1, -(2**31)], np.int64), np.int32),
        (np.array([1.5], np.float64), np.float32),
        (np.array([7], np.uint32), np.int32),
        (np.array([True]), np.bool_),
        (np.array([7], np.int32), np.int32),
        (np.array([7], np.float16), np.float16),
        (np.zeros((0,), np.int64), np.int32),
    ],
)
def test_narrowing(given, kept):
    """Looked at before any graph: what ``literal`` makes of a leaf."""
    leaves = {}
    dsv3.transform.literal(given, leaves, "x")
    [(_, tensor, _)] = leaves.values()
    assert tensor.asnumpy().dtype == kept
    np.testing.assert_array_equal(tensor.asnumpy(), given)


@pytest.mark.parametrize("bad", [[2**31], [0, -(2**31) - 1]])
def test_integers_out_of_range(bad):
    message = f"tree['x'][0] holds int64 values outside int32: {min(bad)} to {max(bad)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        scaled({"x": (np.array(bad, np.int64),)}, np.float32(1))
    with pytest.raises(ValueError, match="outside int32"):
        scaled({"x": np.array([2**32 - 1], np.uint32)}, np.float32(1))


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"x": [np.ones(2)]}, "tree['x'] is a list; use a tuple"),
        ({"x": ({"y": [1]},)}, "tree['x'][0]['y'] is a list; use a tuple"),
        (
            {"x": 3},
            "tree['x'] is the Python number 3, which would recompile for every new value; pass np.float32(3)",
        ),
        ({"x": (0.5,)}, "tree['x'][0] is the Python number 0.5"),
        ({3: np.ones(2)}, "tree has the key 3; keys of a pytree must be strings"),
        ({"x": {("a", 1): np.ones(2)}}, "tree['x'] has the key ('a', 1); keys"),
        ({"x": object()}, "tree['x'] is a object; a pytree holds dicts, tuples, Tensors and NumPy arrays"),
        ({"x": {1, 2}}, "tree['x'] is a set; a pytree holds"),
        ({"x": dsv3.TINY}, "tree['x'] is a Config; a pytree holds"),
        ({"x": lambda: 0}, "tree['x'] is a function; a pytree holds"),
    ],
)
def test_refused_trees(tree, message):
    before = compile_count()
    with pytest.raises(TypeError, match=re.escape(message)):
        scaled(tree, np.float32(1))
    assert compile_count() == before


def test_named_tuples_are_refused():
    import collections

    Pair = collections.namedtuple("Pair", "a b")
    with pytest.raises(TypeError, match=re.escape("tree['x'] is a Pair; a pytree holds")):
        scaled({"x": Pair(np.ones(1), np.ones(1))}, np.float32(1))


def test_depth():
    """Six containers inside one another cross and come back; the seventh is refused with its place."""

    def nested(depth):
        return {"k": nested(depth - 1)} if depth else np.ones(2, f32)

    passed = jit(identity)
    assert dsv3.tree.same_structure(passed(nested(6)), nested(6))
    where = "tree" + "['k']" * 7
    with pytest.raises(
        TypeError, match=re.escape(f"{where} lies inside 7 containers; MindSpore allows 6: join some")
    ):
        passed(nested(7))


@pytest.mark.parametrize("transform", [jit, value_and_grad])
@pytest.mark.parametrize(
    "fn, message",
    [
        (
            functools.partial(identity),
            "got a functools.partial, which MindSpore would run uncompiled without a word; wrap it in a def",
        ),
        (Thing().method, "got a method; it compiles plain functions: wrap it in a def"),
        (Thing, "got a type; it compiles plain functions"),
        (len, "got a builtin_function_or_method"),
        (3, "got a int"),
    ],
)
def test_refused_functions(transform, fn, message):
    with pytest.raises(TypeError, match=re.escape(f"{transform.__name__} {message}")):
        transform(fn)


# -- gradients -----------------------------------------------------------------------------------------------
def energy(params, x):
    """A loss of every leaf of a nested tree: dict, tuple, tuple in tuple."""
    h = ops.tanh(ops.matmul(x, params["layers"][0]["w"]) + params["layers"][1][0])
    h = h * params["layers"][1][1][0] + params["b"]
    return ops.sum(h * h), {"h": h, "deep": (ops.sum(h), {"more": ops.sum(x)})}


def energy_params():
    rng = np.random.default_rng(0)
    return {
        "layers": (
            {"w": rng.standard_normal((3, 4)).astype(f32)},
            (rng.standard_normal(4).astype(f32), (rng.standard_normal(4).astype(f32),)),
        ),
        "b": rng.standard_normal(4).astype(f32),
    }


def energy_by_hand(params, x):
    """(loss, gradients) in float64."""
    w, bias = params["layers"][0]["w"].astype(float), params["layers"][1][0].astype(float)
    gain, b = params["layers"][1][1][0].astype(float), params["b"].astype(float)
    t = np.tanh(x.astype(float) @ w + bias)
    h = t * gain + b
    inner = 2 * h * gain * (1 - t * t)
    return (h * h).sum(), {
        "layers": ({"w": x.T @ inner}, (inner.sum(0), ((2 * h * t).sum(0),))),
        "b": 2 * h.sum(0),
    }


@pytest.fixture(scope="module")
def energy_grad():
    return value_and_grad(energy, has_aux=True)


def test_gradients_have_the_structure_of_params(energy_grad):
    params, x = energy_params(), np.random.default_rng(1).standard_normal((5, 3)).astype(f32)
    (loss, aux), grads = energy_grad(params, x)
    expected_loss, expected = energy_by_hand(params, x)
    assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
    assert dsv3.tree.same_structure(grads, params) and list(grads) == list(params)
    for (path, found), (_, want) in zip(dsv3.tree.paths(grads), dsv3.tree.paths(expected)):
        np.testing.assert_allclose(found.asnumpy(), want, rtol=1e-4, atol=1e-5, err_msg=path)
    assert aux["h"].shape == (5, 4) and float(aux["deep"][1]["more"]) == pytest.approx(x.sum(), rel=1e-5)
    assert compiles(energy_grad, energy_params(), x + 1) == 0


def test_value_and_grad_inside_jit_is_the_same(energy_grad):
    """As part of a larger graph, with gradients used there; the loss and its aux too."""
    inner = value_and_grad(energy, has_aux=True)

    def step(params, x, rate):
        (loss, aux), grads = inner(params, x)
        return dsv3.tree.tree_map(descend, params, dsv3.tree.tree_map(identity, grads)), loss * rate, aux

    params, x = energy_params(), np.random.default_rng(1).standard_normal((5, 3)).astype(f32)
    before = compile_count()
    updated, loss, aux = jit(step)(params, x, np.float32(0.5))
    assert compile_count() == before + 1  # the gradient is no graph of its own there
    (outside, _), grads = energy_grad(params, x)
    assert float(loss) == pytest.approx(0.5 * float(outside), rel=1e-6)
    new, old = dict(dsv3.tree.paths(updated)), dict(dsv3.tree.paths(params))
    for path, grad in dsv3.tree.paths(grads):
        np.testing.assert_allclose(
            new[path].asnumpy(), old[path] - 0.1 * grad.asnumpy(), rtol=1e-5, atol=1e-6
        )


def descend(p, g):
    return p - 0.1 * g


def test_without_aux():
    def square(x, by):
        return ops.sum(x * x) * by["by"]

    loss, grad = value_and_grad(square)(np.array([1, 2, 3], f32), {"by": np.float32(2)})
    assert float(loss) == 28 and grad.asnumpy().tolist() == [4, 8, 12]


def test_the_same_tensor_at_two_leaves():
    """Tied leaves are two to the gradient: each gets its own share, and neither is lost."""

    def product(params):
        return ops.sum(params["a"] * params["a"] * params["b"])

    shared = Tensor(np.array([2.0, 3.0], f32))
    grad = value_and_grad(product)
    loss, grads = grad({"a": shared, "b": shared})
    assert float(loss) == 35
    total = {k: v.asnumpy() for k, v in grads.items()}
    np.testing.assert_allclose(total["a"] + total["b"], [12, 27])
    _, apart = grad({"a": Tensor(np.array([2.0, 3.0], f32)), "b": Tensor(np.array([2.0, 3.0], f32))})
    np.testing.assert_allclose(apart["a"].asnumpy(), [8, 18])
    np.testing.assert_allclose(apart["b"].asnumpy(), [4, 9])
    for key in "ab":
        np.testing.assert_allclose(total[key], apart[key].asnumpy(), err_msg="tied leaves share one gradient")


# -- nesting -------------------------------------------------------------------------------------------------
def test_nested_jit_inlines():
    @jit
    def inner(tree):
        return {"y": tree["x"] * 2}

    def outer(tree):
        return inner({"x": inner(tree)["y"]})["y"] + 1

    outer = jit(outer)
    assert compiles(outer, {"x": np.ones(2, f32)}) == 1
    assert outer({"x": np.array([1, 5], f32)}).asnumpy().tolist() == [5, 21]


@compiled
def pieces(params, x, extra=None, *, power, activation=None):
    """Something with static keywords."""
    y = ops.pow(x, power) * params["w"]
    if extra is not None:
        y = y + extra
    return y if activation is None else activation(y)


def negate(x):
    return -x


def test_compiled_with_static_keywords():
    """One graph for each set of static keywords; the rest may come by keyword or be left out."""
    params, x = {"w": np.array([1, 2], f32)}, np.array([3, 4], f32)
    assert pieces(params, x, power=2).asnumpy().tolist() == [9, 32]
    assert compiles(pieces, params, x, power=2) == 0
    assert pieces(params, x, power=1).asnumpy().tolist() == [3, 8]
    assert pieces(params, x, extra=np.float32(1), power=1).asnumpy().tolist() == [4, 9]
    assert pieces(x=x, params=params, power=1, activation=negate).asnumpy().tolist() == [-3, -8]
    assert compiles(pieces, params, x + 1, np.float32(2), power=1) == 0
    assert pieces.__doc__ == "Something with static keywords."


def test_compiled_inlines_inside_a_graph():
    def outer(params, x):
        return ops.sum(pieces(params, x, power=2)), {"y": pieces(params, x, power=1, activation=negate)}

    params, x = {"w": np.array([1, 2], f32)}, np.array([3, 4], f32)
    grad = value_and_grad(outer, has_aux=True)
    assert compiles(grad, params, x) == 1
    (loss, aux), grads = grad(params, x)
    assert (
        float(loss) == 41
        and aux["y"].asnumpy().tolist() == [-3, -8]
        and grads["w"].asnumpy().tolist() == [9, 16]
    )


def test_an_error_inside_leaves_the_boundary_usable():
    """A failed compilation is over when it is over: later calls know that they come from Python."""

    def wrong(x):
        raise ValueError("expected something else, found this")

    with pytest.raises(ValueError, match="expected something else, found this"):
        jit(wrong)(np.ones(2, f32))
    assert pieces({"w": np.ones(2, f32)}, np.ones(2, f32), power=3).asnumpy().tolist() == [1, 1]


def test_a_missing_argument_is_named():
    params, cfg = dsv3.init(dsv3.TINY.replace(num_hidden_layers=1, num_nextn_predict_layers=0)), dsv3.TINY
    with pytest.raises(TypeError, match="forward: the argument 'tokens' is missing"):
        dsv3.forward(params, position_ids=np.zeros((1, 4), np.int32), cfg=cfg)
