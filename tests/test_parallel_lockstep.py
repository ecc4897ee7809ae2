"""Partitioned programs run in lockstep: against the same steps on one device, and what must be found out about wrong ones.

What a primitive computes is held to MindSpore's own CPU kernel where it has one, else to a definition written out here.

Planted faults this file was seen to catch, one at a time: a collective's group on one rank, on all ranks; an AllReduce left
out on one rank, on all (these four are planted by the tests themselves); ReduceScatter's parts in reverse; AllToAll's dims
swapped; Broadcast's root as a place in the group; a Load that sees later assignments; values dropped while they are still
read; bfloat16 cut off instead of rounded; messages taken without looking at their tag; shapes not checked; AssignAdd that
does not stay; SiLUGrad's arguments swapped; rows of negative segments summed; a sort that is not stable; the first mesh axis
moving fastest in ``gather``, and replicas there not compared.
"""

import dataclasses
from types import MappingProxyType

import numpy as np
import parallel_targets as targets
import pytest
from mindspore import Tensor, ops

from dsv3.kernels import cast
from dsv3.parallel import lockstep, lockstep_ops, mindir, simulate
from dsv3.parallel.mindir import Graph, Node, Program, Type

DATA, MODEL = 2, 2
MESH = {"data": DATA, "model": MODEL}
LAYOUTS = {"w1": (None, "model"), "w2": ("model", None)}
F32, I32, BF16, F16 = 1, 6, 16, 10


# -- exported programs -------------------------------------------------------------------------------------------------
def export(target, kwargs, ranks, folder):
    reports = simulate.simulate_ranks(f"parallel_targets:{target}", kwargs, ranks, export=True, keep=folder)
    return [report.program for report in reports]


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """Files of the two products on 2 x 2 ranks."""
    return export("two_products", {"data": DATA, "model": MODEL}, DATA * MODEL, tmp_path_factory.mktemp("divided"))


def loaded(files):
    return [lockstep.load(file, rank) for rank, file in enumerate(files)]


def feeds(x):
    return [[targets.rows_of(x, rank, DATA, MODEL)] for rank in range(DATA * MODEL)]


def test_divided_steps_equal_those_of_one_device(divided):
    x, w1, w2 = targets.arrays()
    programs = loaded(divided)
    assert programs[1].params["w1"].shape == (targets.WIDTH, targets.HIDDEN // MODEL)
    for _ in range(3):
        losses = lockstep.run(programs, feeds(x))
        expected, w1, w2 = targets.two_products_numpy(x, w1, w2)
        np.testing.assert_allclose(losses, expected, rtol=1e-6)
        whole = lockstep.gather(programs, MESH, LAYOUTS)
        np.testing.assert_allclose(whole["w1"], w1, rtol=0, atol=1e-6)
        np.testing.assert_allclose(whole["w2"], w2, rtol=0, atol=1e-6)
    again = loaded(divided)
    repeated = [lockstep.run(again, feeds(x)) for _ in range(3)][-1]
    assert repeated == losses and all((again[r].params[n] == programs[r].params[n]).all() for r in range(4) for n in LAYOUTS)


def test_pipeline_steps_equal_those_of_one_device(tmp_path):
    """1F1B: each stage's program calls its micro-step and the micro-step's gradient as functions, sends and receives."""
    programs = loaded(export("pipeline", {}, targets.STAGES, tmp_path))
    assert all(len(p.functions) >= 2 for p in programs) and [sorted(p.params) for p in programs] == [
        [f"accu_grads.w{i}", f"w{i}"] for i in range(targets.STAGES)
    ]
    x, weights = targets.pipeline_arrays()
    for _ in range(3):
        losses = lockstep.run(programs, [[x]] * targets.STAGES)
        expected, weights = targets.pipeline_numpy(x, weights)
        np.testing.assert_allclose(losses[-1], expected, atol=1e-6)
        whole = lockstep.gather(programs, {"stage": targets.STAGES}, {f"w{i}": (None, None) for i in range(targets.STAGES)})
        for i, w in enumerate(weights):
            np.testing.assert_allclose(whole[f"w{i}"], w, rtol=0, atol=1e-6)
    programs[0] = without(programs[0], "Send", 3)
    with pytest.raises(RuntimeError, match=r"(?s)for ever: .*rank 1 in Receive of \[0, 1\] \(tag 3, in the mail: nothing\)"):
        lockstep.run(programs, [[x]] * targets.STAGES)


def changed(program, change):
    """The program with ``change(node)`` in place of every node of its main graph."""
    return dataclasses.replace(program, graph=dataclasses.replace(program.graph, nodes=tuple(map(change, program.graph.nodes))))


def without(program, op, which):
    """The program with its ``which``-th ``op`` turned into a copy of its input."""
    name = [n.name for n in program.graph.nodes if n.op == op][which]
    return changed(program, lambda n: dataclasses.replace(n, op="Identity") if n.name == name else n)


def regrouped(program, which, group):
    name = [n.name for n in program.graph.nodes if n.op == "AllReduce"][which]
    return changed(
        program,
        lambda n: (
            dataclasses.replace(n, attrs=dict(n.attrs) | {"group": "other", "group_rank_ids": group}) if n.name == name else n
        ),
    )


def test_wrong_group_or_missing_collective_is_found(divided):
    x, w1, w2 = targets.arrays()
    count = sum(n.op == "AllReduce" for n in lockstep.load(divided[0], 0).graph.nodes)
    assert count == 5
    for which in range(count):
        programs = loaded(divided)
        own = next(
            a.attrs["group_rank_ids"]
            for i, a in enumerate(n for n in programs[0].graph.nodes if n.op == "AllReduce")
            if i == which
        )
        other = (0, 1) if tuple(own) == (0, 2) else (0, 2)
        with pytest.raises(RuntimeError, match=r"rank 0 in AllReduce"):  # one rank alone: it waits, or meets the wrong thing
            lockstep.run([regrouped(programs[0], which, other), *programs[1:]], feeds(x))
        programs = loaded(divided)
        with pytest.raises(RuntimeError, match="AllReduce"):
            lockstep.run([without(programs[0], "AllReduce", which), *programs[1:]], feeds(x))
        programs = [without(p, "AllReduce", which) for p in loaded(divided)]  # all ranks alike: the numbers are wrong
        losses = lockstep.run(programs, feeds(x))
        expected, v1, v2 = targets.two_products_numpy(x, w1, w2)
        try:
            whole = lockstep.gather(programs, MESH, LAYOUTS)
            np.testing.assert_allclose(losses, expected, rtol=1e-4)
            np.testing.assert_allclose(whole["w1"], v1, rtol=0, atol=1e-4)
            np.testing.assert_allclose(whole["w2"], v2, rtol=0, atol=1e-4)
        except (AssertionError, ValueError):
            continue
        pytest.fail(f"without AllReduce {which} on all ranks nothing changed")


def test_group_wrong_in_the_same_way_everywhere_is_found(divided):
    """The sums of partial products taken over ``data``: every rank finds its partners, and the numbers are wrong."""
    x, w1, w2 = targets.arrays()
    programs = [regrouped(p, 0, (r % 2, r % 2 + 2)) for r, p in enumerate(loaded(divided))]
    losses = lockstep.run(programs, feeds(x))
    assert abs(losses[0] - targets.two_products_numpy(x, w1, w2)[0]) > 1e-3


def test_inputs_and_files_that_do_not_fit(divided, monkeypatch):
    x, _, _ = targets.arrays()
    programs = loaded(divided)
    for wrong, words in (
        ([[x[:8]]] * 3, "4 programs but inputs for 3"),
        ([[x]] * 4, r"expected float32\[8, 6\], found float32\[16, 6\]"),
        ([[x[:8].astype(np.int32)]] * 4, "found int32"),
        ([[]] * 4, "takes 1 inputs, found 0"),
    ):
        with pytest.raises(ValueError, match=words):
            lockstep.run(programs, wrong)
    with pytest.raises(ValueError, match="program 0 is that of rank 1"):
        lockstep.run(programs[::-1][2:] + programs[:2], feeds(x))
    monkeypatch.delitem(lockstep_ops.PRIMITIVES, "TanhGrad")
    with pytest.raises(ValueError, match=r"rank 3: lockstep_ops has no meaning for 1 nodes: .* = TanhGrad"):
        lockstep.load(divided[3], 3)


# -- programs written by hand ------------------------------------------------------------------------------------------
def tensor(*shape, dtype=F32):
    return Type(shape, dtype)


def program(rank, nodes, inputs=(), params=None, functions=(), constants=None, dtypes=None, result=None):
    """A rank's program of nodes (name, op, inputs, attrs, type); its result is the last node's."""
    graph = Graph(
        "top", tuple(f"in{i}" for i in range(len(inputs))), last_uses(nodes, result or nodes[-1][0]), result or nodes[-1][0]
    )
    params = params or {}
    types = {str(i): t for i, t in enumerate(inputs)} | {n: Type(p.shape, (dtypes or {}).get(n, F32)) for n, p in params.items()}
    return Program(rank, graph, {f.name: f for f in functions}, constants or {}, types, dict(params), {n: n for n in params})


def last_uses(nodes, result):
    seen, out = {result}, []
    for name, op, inputs, attrs, kind in reversed(nodes):
        out.append(Node(name, op, tuple(inputs), attrs, kind, tuple(set(inputs) - seen)))
        seen.update(inputs)
    return tuple(reversed(out))


def collective(op, attrs, arrays, out, extra=None):
    """Results of one collective over all ranks."""
    n, constants = len(arrays), extra or [{}] * len(arrays)
    attrs = {"group": "g", "group_rank_ids": tuple(range(n))} | attrs
    programs = [
        program(
            r,
            [("c", op, ("in0", *constants[r]), attrs, out[r] if isinstance(out, list) else out)],
            [Type(a.shape, F32)],
            constants=constants[r],
        )
        for r, a in enumerate(arrays)
    ]
    return lockstep.run(programs, [[a] for a in arrays])


def test_collectives():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((3, 6, 4)).astype(np.float32)  # [rank, ...]
    for op, combine in (("sum", np.sum), ("max", np.max), ("min", np.min), ("prod", np.prod)):
        for got in collective("AllReduce", {"op": op}, a, tensor(6, 4)):
            np.testing.assert_allclose(got, combine(a, axis=0), rtol=1e-6)
    for got in collective("AllGather", {}, a, tensor(18, 4)):
        np.testing.assert_array_equal(got, a.reshape(18, 4))
    for r, got in enumerate(collective("ReduceScatter", {"op": "sum"}, a, tensor(2, 4))):
        np.testing.assert_allclose(got, a.sum(0)[2 * r : 2 * r + 2], rtol=1e-6)
    turned = {"group_rank_ids": (2, 0, 1)}  # the group's order, not that of the ranks; a Broadcast's root is a global rank
    for got in collective("AllGather", turned, a, tensor(18, 4)):
        np.testing.assert_array_equal(got, a[[2, 0, 1]].reshape(18, 4))
    for got in collective("Broadcast", {"root_rank": 1} | turned, a, tensor(6, 4)):
        np.testing.assert_array_equal(got, a[1])
    b = rng.standard_normal((3, 6, 5)).astype(np.float32)
    for r, got in enumerate(collective("AlltoAll", {"split_dim": 0, "concat_dim": 1}, b, tensor(2, 15))):
        np.testing.assert_array_equal(got, np.concatenate([b[s, 2 * r : 2 * r + 2] for s in range(3)], axis=1))


def test_uneven_all_to_all():
    counts = np.array([[1, 0, 2], [3, 1, 0], [0, 2, 2]])  # [from, to]
    rows = [np.arange(2 * c.sum(), dtype=np.float32) + 100 * r for r, c in enumerate(counts)]  # two elements a block
    extra = [{"sent": tuple(counts[r]), "due": tuple(counts[:, r])} for r in range(3)]
    out = [tensor(2 * int(counts[:, r].sum())) for r in range(3)]
    got = collective("AlltoAllV", {"block_size": 2}, rows, out, extra)
    starts = np.cumsum(counts, axis=1) - counts
    for r in range(3):
        expected = [rows[s][2 * starts[s, r] : 2 * (starts[s, r] + counts[s, r])] for s in range(3)]
        np.testing.assert_array_equal(got[r], np.concatenate(expected))
    extra[2] = extra[2] | {"due": (2, 1, 2)}
    with pytest.raises(
        RuntimeError, match=r"rank 2 at c expects \[4, 2, 4\] elements from the ranks \[0, 1, 2\], which send \[4, 0, 4\]"
    ):
        collective("AlltoAllV", {"block_size": 2}, rows, out, extra)


def pair(first, second, arrays=None):
    """Run two ranks' nodes on one input each."""
    arrays = arrays or [np.ones((2, 2), np.float32)] * 2
    return lockstep.run(
        [program(r, nodes, [Type(a.shape, F32)]) for r, (nodes, a) in enumerate(zip((first, second), arrays))],
        [[a] for a in arrays],
    )


BOTH = {"group": "g", "group_rank_ids": (0, 1)}
SEND = {"dst_global_rank": 1, "sr_tag": 0, "group": "s"}
TAKE = {"src_global_rank": 0, "sr_tag": 0, "group": "s"}
SQUARE = tensor(2, 2)


@pytest.mark.parametrize(
    "first, second, words",
    [
        (
            [("a", "AllReduce", ["in0"], BOTH | {"op": "sum"}, SQUARE)],
            [("b", "AllReduce", ["in0"], BOTH | {"op": "max"}, SQUARE)],
            r"\[0, 1\] meet in different collectives: rank 0 in AllReduce of \[0, 1\] \(sum .* at a; rank 1 .*\(max .* at b",
        ),
        ([("a", "AllReduce", ["in0"], BOTH, SQUARE)], [("b", "AllGather", ["in0"], BOTH, tensor(4, 2))], "different collectives"),
        (
            [("a", "AllReduce", ["in0"], BOTH, SQUARE)],
            [("b", "Identity", ["in0"], {}, SQUARE)],
            "for ever: rank 0 in AllReduce .* at a$",
        ),
        (
            [("a", "Identity", ["in0"], {}, SQUARE)],
            [("b", "Receive", ["in0"], TAKE, SQUARE)],
            r"for ever: rank 1 in Receive of \[0, 1\] \(tag 0, in the mail: nothing\) at b",
        ),
        ([("a", "Send", ["in0"], SEND | {"sr_tag": 7}, SQUARE)], [("b", "Receive", ["in0"], TAKE, SQUARE)], "in the mail: tag 7"),
        (
            [("a", "Send", ["in0"], SEND, SQUARE)],
            [("b", "Identity", ["in0"], {}, SQUARE)],
            "never received: rank 0 to 1 with tag 0",
        ),
        (
            [("a", "Send", ["in0"], SEND, SQUARE)],
            [("b", "Receive", ["in0"], TAKE, tensor(2, 3))],
            r"rank 1, node b: Receive\(float32\[2, 2\]\): gives shape \[2, 2\] where the program records \[2, 3\]",
        ),
        (
            [("a", "AllReduce", ["in0"], {"group": "g"}, SQUARE)],
            [("b", "Identity", ["in0"], {}, SQUARE)],
            "the group 'g' but not its ranks",
        ),
        (
            [("a", "AllReduce", ["in0"], {"group": "g", "group_rank_ids": (0, 2)}, SQUARE)],
            [("b", "Identity", ["in0"], {}, SQUARE)],
            r"rank 0, node a: AllReduce\(float32\[2, 2\]\): goes to ranks \[0, 2\]",
        ),
        (
            [("a", "MatMul", ["in0", "nobody"], {}, SQUARE)],
            [("b", "Identity", ["in0"], {}, SQUARE)],
            "rank 0, graph top: nobody has no value",
        ),
        (
            [("a", "Reshape", ["in0"], {}, tensor(3))],
            [("b", "Identity", ["in0"], {}, SQUARE)],
            r"rank 0, node a: Reshape\(float32\[2, 2\]\)",
        ),
    ],
)
def test_programs_that_do_not_fit_together(first, second, words):
    with pytest.raises(RuntimeError, match=words):
        pair(first, second)


def test_messages_in_two_directions():
    """Both ranks send before they receive, two messages in the order of their tags' use, not of their arrival."""

    def nodes(other, order):
        to, back = {"dst_global_rank": other, "group": "s"}, {"src_global_rank": other, "group": "s"}
        sends = [(f"s{t}", "Send", [x], to | {"sr_tag": t}, SQUARE) for t, x in ((0, "in0"), (1, "double"))]
        takes = [(f"r{t}", "Receive", ["s1"], back | {"sr_tag": t}, SQUARE) for t in order]
        return [("double", "Add", ["in0", "in0"], {}, SQUARE), *sends, *takes, ("out", "MakeTuple", ["r0", "r1"], {}, None)]

    a, b = (np.full((2, 2), v, np.float32) for v in (1, 5))
    (got0, got1), (got2, got3) = pair(nodes(1, (0, 1)), nodes(0, (1, 0)), [a, b])
    assert (got0[0, 0], got1[0, 0], got2[0, 0], got3[0, 0]) == (5, 10, 1, 2)


def test_side_effects_in_order():
    """A value loaded before an assignment keeps what it was; the parameter, and what is read later, is new; state stays."""
    nodes = [
        ("old", "Load", ["w"], {}, tensor(2)),
        ("a", "AssignAdd", ["w", "in0"], {}, tensor(2)),
        ("u", "UpdateState", ["old", "a"], {}, None),
        ("ref", "Depend", ["w", "u"], {}, tensor(2)),
        ("b", "AssignSub", ["ref", "half"], {}, tensor(2)),
        ("new", "Load", ["b"], {}, tensor(2)),
        ("c", "Assign", ["v", "old"], {}, tensor(2)),
        ("out", "MakeTuple", ["old", "new", "v"], {}, None),
    ]
    p = program(
        0, nodes, [tensor(2)], {"w": np.float32([1, 2]), "v": np.float32([0, 0])}, constants={"half": np.float32([0.5, 0.5])}
    )
    x = np.float32([10, 20])
    got = lockstep.run([p], [[x]])[0]
    np.testing.assert_array_equal(got, [[1, 2], [10.5, 21.5], [1, 2]])
    got = lockstep.run([p], [[x]])[0]
    np.testing.assert_array_equal(got, [[10.5, 21.5], [20, 41], [10.5, 21.5]])
    np.testing.assert_array_equal(p.params["w"], [20, 41])


def test_functions_closures_and_branches():
    """A call of a function by name, of a closure out of a tuple, and of what a Switch chose; parameters go in by reference."""
    scale = Graph("scale", ("p", "q"), last_uses([("m", "Mul", ["p", "q"], {}, tensor(2))], "m"), "m")
    add = Graph("add", ("p", "q"), last_uses([("s", "AssignAdd", ["p", "q"], {}, tensor(2))], "s"), "s")
    nodes = [
        ("doubled", "call", ["scale", "in0", "two"], {}, tensor(2)),
        ("half", "Partial", ["add", "w"], {}, None),
        ("both", "MakeTuple", ["doubled", "half"], {}, None),
        ("closure", "TupleGetItem", ["both", "one"], {}, None),
        ("done", "call", ["closure", "doubled"], {}, tensor(2)),
        ("positive", "Greater", ["in1", "zero"], {}, tensor(dtype=9)),
        ("chosen", "Switch", ["positive", "scale", "add"], {}, None),
        ("ref", "Depend", ["w", "done"], {}, tensor(2)),
        ("last", "call", ["chosen", "ref", "two"], {}, tensor(2)),
    ]
    constants = {"two": np.float32([2, 2]), "one": 1, "zero": 0}
    for sign, expected, w in ((1, [6, 12], [3, 6]), (-1, [5, 8], [5, 8])):
        p = program(0, nodes, [tensor(2), tensor()], {"w": np.float32([1, 2])}, (scale, add), constants)
        np.testing.assert_array_equal(lockstep.run([p], [[np.float32([1, 2]), np.float32(sign)]])[0], expected)
        np.testing.assert_array_equal(p.params["w"], w)


@pytest.mark.parametrize(
    "dtype, rounded",
    [(BF16, lambda x: cast.widen_reference(cast.narrow_reference(x))), (F16, lambda x: x.astype(np.float16).astype(np.float32))],
)
def test_narrow_types_are_rounded_after_every_primitive(dtype, rounded):
    rng = np.random.default_rng(0)
    x, w = (rounded(rng.standard_normal((64, 8)).astype(np.float32)) for _ in range(2))
    narrow = tensor(64, 8, dtype=dtype)
    nodes = [
        ("m", "Mul", ["in0", "w"], {}, narrow),
        ("e", "Exp", ["m"], {}, narrow),
        ("a", "AssignSub", ["w", "e"], {}, narrow),
        ("c", "AllReduce", ["e"], {"group": lockstep.WORLD, "op": "sum"}, narrow),
    ]
    programs = [program(r, nodes, [narrow], {"w": w}, dtypes={"w": dtype}) for r in range(2)]
    got = lockstep.run(programs, [[x], [-x]])
    exps = [rounded(np.exp(rounded(s * x * w))) for s in (1, -1)]
    np.testing.assert_array_equal(got[0], rounded(exps[0] + exps[1]))
    np.testing.assert_array_equal(programs[1].params["w"], rounded(w - exps[1]))
    assert (rounded(exps[0]) != np.exp(x * w)).mean() > 0.5, "rounding must matter here"


# -- primitives --------------------------------------------------------------------------------------------------------
R = np.random.default_rng(7)
X, Y, P = (R.standard_normal((4, 6)).astype(np.float32) for _ in range(3))
P = np.abs(P) + np.float32(0.5)
I = R.integers(0, 4, (5, 3)).astype(np.int32)
MASK = X > 0
CASES = [  # primitive, inputs, attributes for MindSpore's primitive
    ("Add", (X, Y)),
    ("Sub", (X, Y)),
    ("Mul", (X, Y)),
    ("RealDiv", (X, P)),
    ("Div", (X, P)),
    ("Neg", (X,)),
    ("Abs", (X,)),
    ("Exp", (X,)),
    ("Log", (P,)),
    ("Sqrt", (P,)),
    ("Rsqrt", (P,)),
    ("RsqrtGrad", (P, Y)),
    ("SqrtGrad", (P, Y)),
    ("Square", (X,)),
    ("Reciprocal", (P,)),
    ("Tanh", (X,)),
    ("TanhGrad", (X, Y)),
    ("Sigmoid", (X,)),
    ("SigmoidGrad", (P, Y)),
    ("SiLU", (X,)),
    ("SiLUGrad", (Y, X)),
    ("Maximum", (X, Y)),
    ("Minimum", (X, Y)),
    ("Greater", (X, Y)),
    ("LessEqual", (X, Y)),
    ("Equal", (I, I.T[:3].T)),
    ("FloorDiv", (I - 2, I + 1)),
    ("LogicalAnd", (MASK, Y > 0)),
    ("LogicalNot", (MASK,)),
    ("Select", (MASK, X, Y)),
    ("Floor", (X,)),
    ("Cos", (X,)),
    ("Sin", (X,)),
    ("Pow", (P, Y)),
    ("IsFinite", (np.float32([1, np.inf, -np.inf, np.nan]),)),
    ("Sign", (X,)),
    ("Softplus", (X,)),
    ("Erf", (X,)),
    ("FloorMod", (I - 2, I + 1)),
    ("MatMul", (X, Y.T)),
    ("MatMul", (X, Y), (False, True)),
    ("MatMul", (X, Y), (True, False)),
    ("BatchMatMul", (X.reshape(2, 2, 6), Y.reshape(2, 2, 6)), (False, True)),
    ("BatchMatMul", (X.reshape(2, 2, 6), Y.reshape(2, 2, 6)), (True, False)),
    ("ReduceSum", (X, (0,)), (True,)),
    ("ReduceMean", (X, (1,))),
    ("ReduceMax", (X, ())),
    ("ReduceMin", (X, (0, 1))),
    ("ReduceAll", (MASK, (1,))),
    ("CumSum", (X, 1)),
    ("CumSum", (X, 0), (True, False)),
    ("CumSum", (X, 1), (False, True)),
    ("CumSum", (X, 1), (True, True)),
    ("Softmax", (X,), (0,)),
    ("LogSoftmax", (X,), (1,)),
    ("ArgMaxWithValue", (X,), (1, True)),
    ("ArgMinWithValue", (X,), (0, False)),
    ("Sort", (X,)),
    ("Sort", (X,), (0, True)),
    ("TopK", (X, 3)),
    ("Transpose", (X.reshape(2, 2, 6), (2, 0, 1))),
    ("Reshape", (X, (3, 8))),
    ("Gather", (X, I, 0)),
    ("Gather", (X, I, 1)),
    ("GatherD", (X, 1, I[:4])),
    ("UnsortedSegmentSum", (X, I[:4, 0] - 1, 5)),
    ("ScatterNd", (I[:4, :1], X, (5, 6))),
    ("TensorScatterAdd", (X, I[:4, :1], Y)),
    ("OneHot", (I, 5, np.float32(2), np.float32(-1))),
    ("StridedSlice", (X, (1, 5), (4, 0), (2, -2))),
    ("StridedSlice", (X, (1, 2), (2, 5), (1, 1)), (0, 0, 0, 0, 1)),
    ("StridedSlice", (X, (1, 2), (2, 5), (1, 1)), (1, 2, 0, 0, 0)),
    ("Slice", (X, (1, 2), (2, -1))),
    ("Split", (X,), (1, 3)),
    ("Concat", ((X, Y),), (1,)),
    ("Stack", ((X, Y),), (1,)),
    ("Tile", (X, (2, 1, 3))),
    ("BroadcastTo", (X[:1],), ((3, 6),)),
    ("ExpandDims", (X, 1)),
    ("Squeeze", (X[:, None],), (1,)),
    ("AddN", ((X, Y, P),)),
    ("ZerosLike", (X,)),
    ("OnesLike", (X,)),
    ("MaskedFill", (X, MASK, np.float32(7))),
]


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_primitives_equal_mindspores_kernels(case):
    name, inputs, args = (*case, ()) if len(case) == 2 else case
    if name in ("SiLUGrad", "RsqrtGrad", "SqrtGrad", "TanhGrad", "SigmoidGrad"):
        from mindspore.ops.auto_generate.gen_ops_prim import RsqrtGrad, SigmoidGrad, SiLUGrad, SqrtGrad, TanhGrad

        made = {
            "SiLUGrad": SiLUGrad,
            "RsqrtGrad": RsqrtGrad,
            "SqrtGrad": SqrtGrad,
            "TanhGrad": TanhGrad,
            "SigmoidGrad": SigmoidGrad,
        }[name]()
    else:
        made = getattr(ops, name, None) or getattr(ops.auto_generate, name)
        made = made(*args)
    as_tensor = lambda x: Tensor(x) if isinstance(x, (np.ndarray, np.generic)) else x  # noqa: E731
    expected = made(*(tuple(map(as_tensor, x)) if isinstance(x, tuple) else as_tensor(x) for x in inputs))
    several = isinstance(expected, tuple)
    expected = [e.asnumpy() for e in (expected if several else (expected,))]
    kinds = tuple(Type(e.shape, {"float32": F32, "int32": I32, "int64": 7, "bool": 9}[e.dtype.name]) for e in expected)
    given, attrs = as_program(name, inputs, args)
    node = Node("n", name, (), MappingProxyType(attrs), kinds if several else kinds[0])
    got = mindir.conform(lockstep_ops.PRIMITIVES[name](node, *given), node.type)
    for g, e in zip(got if several else (got,), expected):
        assert g.dtype == e.dtype
        np.testing.assert_allclose(g, e, rtol=2e-5, atol=2e-6)


def as_program(name, inputs, args):
    """(inputs, attributes) as an exported program has them: what the primitive was made with follows its inputs."""
    if name == "Sort":
        return inputs, dict(zip(("axis", "descending"), args or (-1, False)))
    if name == "CumSum":
        return (*inputs, *(args or (False, False))), {}
    return (*inputs, *args), {}


def test_primitives_without_a_cpu_kernel():
    def apply(name, *x, out=None, **attrs):
        return lockstep_ops.PRIMITIVES[name](Node("n", name, (), attrs, out), *x)

    def difference(f, x, dout, at):  # derivative of sum(dout * f(x)) by x[at], in float64
        e = np.zeros_like(x, np.float64)
        e[at] = 1e-5
        return ((f(x + e) - f(x - e)) * dout).sum() / 2e-5

    x, g, dout = X.astype(np.float64), P[0].astype(np.float64), Y.astype(np.float64)
    y, inverse = apply("RmsNorm", x, g, 1e-6)
    np.testing.assert_allclose(y, x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * g, rtol=1e-6)
    dx, dg = apply("RmsNormGrad", dout, x, inverse, g)
    np.testing.assert_allclose(dx[1, 2], difference(lambda x: apply("RmsNorm", x, g, 1e-6)[0], x, dout, (1, 2)), rtol=1e-4)
    np.testing.assert_allclose(dg[3], difference(lambda g: apply("RmsNorm", x, g, 1e-6)[0], g, dout, 3), rtol=1e-4)
    half = dout[:, :3]
    np.testing.assert_allclose(apply("Swiglu", x, -1), x[:, :3] / (1 + np.exp(-x[:, :3])) * x[:, 3:], rtol=1e-12)
    np.testing.assert_allclose(
        apply("SwigluGrad", half, x, -1)[2, 4], difference(lambda x: apply("Swiglu", x, -1), x, half, (2, 4)), rtol=1e-6
    )
    s = apply("Softmax", x, (1,))
    np.testing.assert_allclose(
        apply("SoftmaxBackward", dout, s, 1)[0, 5], difference(lambda x: apply("Softmax", x, (1,)), x, dout, (0, 5)), rtol=1e-6
    )
    np.testing.assert_array_equal(apply("SplitWithSize", x, (1, 5), 1)[1], x[:, 1:])
    np.testing.assert_array_equal(apply("SumExt", x, None, False, None), x.sum())
    np.testing.assert_array_equal(apply("TopkExt", x, 2, 0, False, True)[0], np.sort(x, 0)[:2])
    index = I[:4]
    back = apply("GatherDGradV2", x, 1, index, dout[:, :3])
    np.testing.assert_allclose(back[2, index[2, 0]], dout[2, :3][index[2] == index[2, 0]].sum())
    back = apply("StridedSliceGrad", dout[:2, :3], (4, 6), (1, 0), (3, 6), (1, 2))
    np.testing.assert_array_equal(back[1:3, 0:6:2], dout[:2, :3])
    assert np.count_nonzero(back) == 6
    with pytest.raises(IndexError, match="from 0 to 4 into 4 rows"):
        apply("Gather", x, np.array([0, 4]), 0)


def test_equal_elements_keep_their_order():
    x = np.float32([1, 3, 3, 2, 3, 1])
    node = Node("n", "TopK", (), {}, None)
    np.testing.assert_array_equal(lockstep_ops.PRIMITIVES["TopK"](node, x, 4)[1], [1, 2, 4, 3])
    np.testing.assert_array_equal(lockstep_ops.PRIMITIVES["Sort"](node, x, -1, True)[1], [1, 2, 4, 3, 0, 5])


# -- gather ------------------------------------------------------------------------------------------------------------
def parts(mesh, layout, whole):
    """Programs whose only content is their part of ``whole``."""
    out = []
    for rank, at in enumerate(np.ndindex(*mesh.values())):
        at, window = dict(zip(mesh, at)), []
        for n, dim in zip(whole.shape, layout):
            axes, index, count = ((dim,) if isinstance(dim, str) else dim or ()), 0, 1
            for axis in axes:
                index, count = index * mesh[axis] + at[axis], count * mesh[axis]
            window.append(slice(index * n // count, (index + 1) * n // count))
        out.append(program(rank, [("x", "Identity", ["w"], {}, None)], params={"w": whole[tuple(window)].copy()}))
    return out


@pytest.mark.parametrize(
    "layout", [(None, None), ("a", None), (None, "c"), ("c", "a"), (("a", "c"), "b"), (("c", "a"), None), ((), ("b",))]
)
def test_gather(layout):
    mesh, whole = {"a": 2, "b": 3, "c": 2}, np.arange(24 * 6, dtype=np.float32).reshape(24, 6)
    programs = parts(mesh, layout, whole)
    np.testing.assert_array_equal(lockstep.gather(programs, mesh, {"w": layout})["w"], whole)


def test_gather_finds_ranks_that_differ():
    mesh, whole = {"a": 2, "c": 2}, np.zeros((4, 6), np.float32)
    programs = parts(mesh, ("a", None), whole)
    programs[3].params["w"][1, 1] = 1e-3
    with pytest.raises(ValueError, match="w: ranks 2 and 3 hold the same part and differ by 0.001"):
        lockstep.gather(programs, mesh, {"w": ("a", None)})
    assert lockstep.gather(programs, mesh, {"w": ("a", None)}, tolerance=0.01)["w"].shape == (4, 6)
    programs[3].params["w"][1, 1] = np.nan
    with pytest.raises(ValueError, match="differ by nan"):
        lockstep.gather(programs, mesh, {"w": ("a", None)}, tolerance=0.01)
    del programs[0].params["w"], programs[1].params["w"]
    with pytest.raises(ValueError, match="ranks hold 1 of its 2 parts"):
        lockstep.gather(programs[:2] + programs[2:3] * 2, mesh, {"w": ("a", None)})
    for layouts, words in (({"w": ("a",)}, "expected 1 dims"), ({"v": ("a",)}, "no rank that holds it")):
        with pytest.raises(ValueError, match=words):
            lockstep.gather(programs, mesh, layouts)
    with pytest.raises(ValueError, match="has 4 ranks, found 2 programs"):
        lockstep.gather(programs[:2], mesh, {"w": ("a", None)})
