"""AdamW as a pure update against torch's numbers and a float64 oracle, many steps: clipping, decay, moments,
masters.

Tolerances: float32 rounding of each of the steps; weights of order 1 agree to 2e-6 of torch's after them.

Planted faults this file was seen to catch, one at a time: v not corrected; the router bias in the norm, or
moved; the decay mask ignored; decay coupled to the gradient's rate; the rate of the next step; masters not
written; moments in float32; eps inside the root; the 1e-6 of clipping; the corrections of the step before
in ``hyper``.
"""

import re
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from oracles import optim as oracle

import dsv3
from dsv3.optim import matrices
from dsv3.schedule import Piece, Schedule

TORCH = np.load(Path(__file__).parent / "goldens" / "train" / "adamw.npz")
LR = 3e-3
SHAPES = {
    "w": (5, 3),
    "layers.0.norm": (7,),
    "layers.0.router.w": (4, 2),
    "layers.0.router.bias": (2,),
    "layers.1": (2, 3, 4),
}


def nest(flat):
    """{path: leaf} as a tree of dict and tuple."""
    block = {
        "norm": flat["layers.0.norm"],
        "router": {"w": flat["layers.0.router.w"], "bias": flat["layers.0.router.bias"]},
    }
    return {"w": flat["w"], "layers": (block, flat["layers.1"])}


def tensors(flat, dtype=ms.float32):
    """A tree of new tensors; the router bias is float32 always."""
    return nest(
        {
            k: Tensor(v.astype(np.float32)).astype(ms.float32 if k.endswith("bias") else dtype)
            for k, v in flat.items()
        }
    )


def arrays(tree):
    """{path: float32 array}."""
    return dict(dsv3.tree.paths(dsv3.tree.to_numpy(tree)))


def draw(rng, scale=1.0):
    return {k: (rng.standard_normal(s) * scale).astype(np.float32) for k, s in SHAPES.items()}


def moved(flat):
    """Without what the optimiser leaves alone."""
    return {k: v for k, v in flat.items() if not k.endswith("bias")}


def as_float64(flat):
    return {k: v.astype(np.float64) for k, v in flat.items()}


def test_torch_numbers():
    """Five steps of torch: clipped, left alone, at the size of eps, clipped, nearly at the limit."""
    opt = dsv3.adamw(LR)
    params = {"a": TORCH["start_0"], "b": TORCH["start_1"], "c": TORCH["start_2"]}
    params = {k: Tensor(v.astype(np.float32)) for k, v in params.items()}
    state = opt.init(params)
    for step in range(5):
        grads = {k: TORCH[f"grad_{step}_{n}"].astype(np.float32) for n, k in enumerate(params)}
        norm = oracle.global_norm(as_float64(grads))
        assert norm == pytest.approx(TORCH["norms"][step], rel=1e-6)
        params, state = opt.update(grads, state, params)
    for n, leaf in enumerate(params.values()):
        np.testing.assert_allclose(leaf.asnumpy(), TORCH[f"end_{n}"], atol=2e-6)


@pytest.fixture(scope="module")
def twelve():
    """Twelve steps of float32: (start, found params, found state, oracle's params, its state, compiles after
    step 1).
    """
    rng = np.random.default_rng(0)
    schedule = Schedule((Piece(0, 4, 1e-3, 5e-3), Piece(4, 12, 5e-3, 1e-4, "cosine")))
    opt = dsv3.adamw(schedule, beta1=0.8, beta2=0.97, eps=1e-5, weight_decay=0.2, clip_norm=2.0)
    start = draw(rng)
    params, expected = tensors(start), as_float64(moved(start))
    state, oracle_state, counts = opt.init(params), oracle.init(expected), []
    for step in range(12):
        grads = draw(rng, (1.0, 0.01)[step % 2])
        params, state = opt.update(tensors(grads), state, params)
        counts.append(dsv3.transform.compile_count())
        clipped, _ = oracle.clip(as_float64(moved(grads)), 2.0)
        expected, oracle_state = oracle.adamw(
            expected,
            clipped,
            oracle_state,
            learning_rate=schedule(step),
            beta1=0.8,
            beta2=0.97,
            eps=1e-5,
            weight_decay=0.2,
        )
    return start, params, state, expected, oracle_state, counts


def test_twelve_steps_of_the_oracle(twelve):
    _, params, state, expected, oracle_state, counts = twelve
    found, m, v = arrays(params), arrays(state["m"]), arrays(state["v"])
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], atol=2e-6, err_msg=path)
        np.testing.assert_allclose(m[path], oracle_state["m"][path], atol=1e-6, err_msg=path)
        np.testing.assert_allclose(v[path], oracle_state["v"][path], rtol=1e-5, err_msg=path)
    assert int(state["step"].asnumpy()) == 12 and state["step"].dtype == ms.int32
    assert counts[0] == counts[-1]


def test_router_bias_is_left_alone(twelve):
    """Its gradients were of order 1, and neither moved it nor entered the norm (the oracle clips without
    them).
    """
    start, params, state, _, _, _ = twelve
    path = "layers.0.router.bias"
    np.testing.assert_array_equal(arrays(params)[path], start[path])
    assert not arrays(state["m"])[path].any() and not arrays(state["v"])[path].any()


def test_structures(twelve):
    start, params, state, _, _, _ = twelve
    fresh = tensors(start)
    assert set(state) == {"step", "m", "v"}
    for tree in (params, state["m"], state["v"]):
        assert dsv3.tree.same_structure(tree, fresh)


def test_decay_masks():
    assert (
        matrices("w", (2, 3))
        and matrices("experts", (4, 2, 3))
        and not matrices("norm", (7,))
        and not matrices("x", ())
    )
    opt = dsv3.adamw(0.1, weight_decay=0.5, clip_norm=None, decay=decays_norms)
    start = {k: np.ones(s, np.float32) for k, s in SHAPES.items()}
    zero = tensors({k: np.zeros(s) for k, s in SHAPES.items()})
    params, _ = opt.update(zero, opt.init(zero), tensors(start))
    for path, leaf in arrays(params).items():  # a zero gradient shows the decay alone: 1 - 0.1 * 0.5
        np.testing.assert_allclose(leaf, 0.95 if path == "layers.0.norm" else 1.0, rtol=1e-6, err_msg=path)


def decays_norms(path, shape):
    return path.endswith("norm") and shape == (7,)


def test_bfloat16_params_moments_and_masters():
    """Ten small steps reach the masters, which a bfloat16 weight could not take; the weight is its master,
    rounded.
    """
    rng = np.random.default_rng(1)
    opt = dsv3.adamw(1e-4, moment_dtype="bfloat16", weight_decay=0.0)
    params = tensors(draw(rng), ms.bfloat16)
    start, state = arrays(params), opt.init(params)
    narrow = [p for p in SHAPES if not p.endswith("bias")]
    assert set(state["masters"]) == set(narrow)
    expected, oracle_state = as_float64(moved(start)), None
    oracle_state = oracle.init(expected)
    for _ in range(10):
        grads = draw(rng, 0.05)
        params, state = opt.update(tensors(grads), state, params)
        clipped, _ = oracle.clip(as_float64(moved(grads)), 1.0)
        expected, oracle_state = oracle.adamw(
            expected, clipped, oracle_state, learning_rate=1e-4, weight_decay=0.0
        )
        # moments are kept in bfloat16: round them here too, so that the rest is compared tightly
        for moment in ("m", "v"):
            oracle_state[moment] = {k: bfloat16(x) for k, x in oracle_state[moment].items()}
    for path in narrow:
        leaf, master = dict(dsv3.tree.paths(params))[path], state["masters"][path].asnumpy()
        assert leaf.dtype == ms.bfloat16 and master.dtype == np.float32
        np.testing.assert_array_equal(arrays(params)[path], bfloat16(master), err_msg=path)
        np.testing.assert_allclose(master, expected[path], atol=3e-6, err_msg=path)
        assert np.abs(master - start[path]).max() > 2e-4
    assert all(leaf.dtype == ms.bfloat16 for _, leaf in dsv3.tree.paths(state["m"]))
    np.testing.assert_array_equal(arrays(params)["layers.0.router.bias"], start["layers.0.router.bias"])


def bfloat16(x):
    """Rounded to the nearest bfloat16, ties to even; float32."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def test_hyper():
    """What the fused step is given: this step's rate, the betas as float32 has them, corrections."""
    opt = dsv3.adamw(Schedule((Piece(0, 10, 0.0, 1.0),)), beta1=0.9, beta2=0.95, eps=1e-7, weight_decay=0.3)
    b1, b2 = float(np.float32(0.9)), float(np.float32(0.95))
    np.testing.assert_allclose(opt.hyper(4), [0.4, b1, b2, 1e-7, 0.3, 1 - b1**5, 1 - b2**5], rtol=1e-6)
    assert opt.hyper(0).dtype == np.float32 and opt.hyper(0)[0] == 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"moment_dtype": "float16"}, "moment_dtype='float16'; expected 'float32' or 'bfloat16'"),
        ({"clip_norm": 0.0}, "clip_norm=0.0; expected a positive number, or None"),
        ({"beta1": 1.0}, "beta1=1.0"),
        ({"beta2": -0.1}, "beta2=-0.1"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"clip_norm": float("nan")}, "clip_norm=nan"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dsv3.adamw(**settings)
