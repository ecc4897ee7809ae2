"""Quantised params: rounding, products, experts and whole models against NumPy; what stays float; what is refused.

Products of int8 with int8 are held to integers, bit for bit; the rest to float64. A trained model's logits must be those of the
numbers that its int8 stands for, and its perplexity near that of its float params. Ascend's graphs are
compiled for a simulated device and interpreted by the documented meaning of its operators; no device has run them.

Planted faults this file was seen to catch, one at a time: the bytes of a word in another order; a row's scale, or a column's,
left out, or that of another tile, row or expert; a row with infinity let through; sums in float32; the hidden row not rounded;
gate and up exchanged; a scale over positive weights alone, or over all experts; numbers cut off, not rounded; exclusions ignored;
wkv_b quantised; an unknown pattern accepted; a gradient let through; int8 widened at the entry of a graph; wo, or the shared
w_down, with another's scale in a decoded block; in the reference one scale for all tokens; for Ascend no scale of the tokens,
or of the experts; in the measurement labels that are not shifted, and a median that is none.
"""
import json
import os

os.environ.setdefault("MS_DEV_JIT_PIPELINE", "0")

import mindspore as ms
import numpy as np
import pytest
from conftest import golden, golden_final
from mindspore import Tensor

import dsv3
from dsv3.bench import __main__ as cli
from dsv3.bench import quant as bench
from dsv3.kernels import int8, native
from dsv3.kernels.experts import experts, experts_reference
from dsv3.kernels.int8 import activations, int8_linear_reference
from dsv3.kernels.linear import linear
from dsv3.parallel import lockstep
from dsv3.parallel.simulate import Step, simulate
from dsv3.quant import MODES, nbytes, rounded
from dsv3.transform import enter_graph, jit, value_and_grad, whole_program
from dsv3.tree import paths

native_only = pytest.mark.skipif(os.environ.get("DSV3_KERNELS") == "reference", reason="a property of the native kernels")
multiply, multiply_reference, route_to = jit(linear), jit(int8_linear_reference), jit(experts)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def weight(mode, *shape, seed=0):
    """(quantised leaf, what it stands for in float64) of a random matrix whose channels differ in size."""
    q, scale = rounded(normal(*shape, seed=seed) * np.exp(normal(shape[-1], seed=seed + 1)))
    return {mode: q, "scale": scale}, q.astype(np.float64) * scale[..., None, :]


def rounded_rows(x):
    """(integers int64, scales float32): round(x / t) to nearest even, t = max |x| / 127 in float32."""
    largest = np.abs(x).max(-1, keepdims=True)
    t = np.where(largest > 0, largest / np.float32(127), np.float32(1))
    return np.rint(x / t).astype(np.int64), t


def close(found, expected, tolerance=3e-6):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# -- rounding ----------------------------------------------------------------------------------------------------------
def test_rounding_by_hand():
    w = np.array([[127, 0, -1.0, 0.5], [63.5, 0, 0.25, -254], [-0.5, 0, 0.125, 3]], np.float32)
    q, scale = rounded(w)
    assert q.dtype == np.int8 and scale.dtype == np.float32
    np.testing.assert_array_equal(scale, np.array([1, 1, 1 / 127, 2], np.float32))
    np.testing.assert_array_equal(q, [[127, 0, -127, 0], [64, 0, 32, -127], [0, 0, 16, 2]])  # 63.5, 0.25, 1.5 to even


def test_rounding_is_to_the_nearest_of_each_channel_and_expert():
    w = normal(3, 40, 30) * np.exp(normal(3, 1, 30))
    q, scale = rounded(w)
    assert scale.shape == (3, 30) and (np.abs(q).max(1) == 127).all()
    assert (np.abs(w - q * scale[:, None].astype(np.float64)) <= 0.5000001 * scale[:, None]).all()
    np.testing.assert_array_equal(rounded(w[1])[0], q[1])


# -- products ----------------------------------------------------------------------------------------------------------
SHAPES = [(1, 3), (7, 33), (130, 64), (515, 175), (1030, 1100)]
ROWS = (1, 3, 6, 32, 70)


@pytest.mark.parametrize("D, F", SHAPES)
def test_weight_only_product(D, F):
    w, stands_for = weight("w8a16", D, F)
    x = normal(max(ROWS), D)
    whole = None
    for rows in ROWS if D < 1000 else (1, 6):
        found = multiply(x[:rows], w).asnumpy()
        assert found.dtype == np.float32
        error, size = np.abs(found - x[:rows] @ stands_for), np.abs(x[:rows]) @ np.abs(stands_for)
        assert (error <= 5e-7 * size + 1e-12).all()
        if whole is not None and native.why_reference() is None:  # bit for bit, whatever stands beside it
            assert np.array_equal(found[: len(whole)], whole)
        whole = found
    close(multiply_reference(x[:6], w).asnumpy(), x[:6] @ stands_for)


@pytest.mark.parametrize("D, F", SHAPES)
def test_product_of_rounded_tokens_is_of_integers(D, F):
    w, stands_for = weight("w8a8", D, F)
    x = normal(max(ROWS), D) * np.exp(normal(max(ROWS), 1))
    x[2] = 0
    integers, t = rounded_rows(x)
    exact = (integers @ w["w8a8"].astype(np.int64)).astype(np.float32) * w["scale"] * t
    for rows in ROWS if D < 1000 else (1, 6):
        found = multiply(x[:rows], w).asnumpy()
        if native.why_reference() is None:
            np.testing.assert_array_equal(found, exact[:rows])
    close(multiply_reference(x, w).asnumpy(), exact)
    close(exact, (integers * t.astype(np.float64)) @ stands_for)


@native_only
def test_the_largest_sums_are_exact():
    q = np.random.default_rng(0).integers(125, 128, (3000, 70)).astype(np.int8)
    x, t = np.full((5, 3000), -2.0, np.float32), np.float32(2) / np.float32(127)
    found = multiply(x, {"w8a8": q, "scale": np.ones(70, np.float32)}).asnumpy()
    np.testing.assert_array_equal(found, [(-127 * q.astype(np.int64).sum(0)).astype(np.float32) * t] * 5)


@native_only
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_a_number_stays_in_its_row(mode):
    w, _ = weight(mode, 40, 70)
    for wrong in (np.inf, -np.inf, np.nan):
        x = normal(6, 40)
        x[1, 3] = wrong
        found = multiply(x, w).asnumpy()
        assert not np.isfinite(found[1]).any() and np.isfinite(np.delete(found, 1, 0)).all()


def test_activations_of_the_reference():
    x = normal(5, 33)
    x[3] = 0

    def round_tokens(x, w):
        return activations(x, w)

    w, _ = weight("w8a8", 33, 4)
    integers, t = rounded_rows(x)
    np.testing.assert_array_equal(jit(round_tokens)(x, w).asnumpy(), (integers * t).astype(np.float32))


def test_linear_refuses():
    w, _ = weight("w8a16", 8, 5)
    with pytest.raises(ValueError, match=r"x \[\.\.\., 8\] for a quantised weight \[8, 5\], found \[3, 7\]"):
        multiply(normal(3, 7), w)

    def loss(x, w):
        return linear(x, w).sum()

    with pytest.raises(ValueError, match="no gradient: train the float params"):
        value_and_grad(loss)(normal(3, 8), w)


# -- experts -----------------------------------------------------------------------------------------------------------
def arrays_of_experts(mode, T, quantised, D=40, F=72, E=6, K=3):
    """The arguments of ``experts`` and, in float64, what the three matrices stand for."""
    idx = np.argsort(normal(T, E, seed=1) + np.linspace(0, 2, E), 1)[:, :K].astype(np.int32)
    pairs = [weight(mode, *s, seed=9 + i) for i, s in enumerate(((E, D, F), (E, D, F), (E, F, D)))]
    leaves = [leaf if quantised[i] else wide.astype(np.float32) for i, (leaf, wide) in enumerate(pairs)]
    return (normal(T, D), *leaves, idx, normal(T, K, seed=3)), [wide for _, wide in pairs]


def oracle(arrays, wide, rounds):
    """One pair of token and slot at a time. rounds: whether what enters gate, up and down is rounded."""
    x, *_, idx, weights = arrays

    def entering(row, on):
        integers, t = rounded_rows(row[None].astype(np.float32))
        return (integers * t.astype(np.float64))[0] if on else row.astype(np.float64)

    y = np.zeros(x.shape)
    for t, k in np.ndindex(*idx.shape):
        e = idx[t, k]
        gate, up = entering(x[t], rounds[0]) @ wide[0][e], entering(x[t], rounds[1]) @ wide[1][e]
        y[t] += entering(weights[t, k] * gate / (1 + np.exp(-gate)) * up, rounds[2]) @ wide[2][e]
    return y


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("quantised", [(1, 1, 1), (1, 1, 0), (0, 0, 1), (1, 0, 0)], ids="all gate-up down gate".split())
def test_experts(mode, quantised):
    tokens = mode == "w8a8"
    for T in (1, 5, 50):
        arrays, wide = arrays_of_experts(mode, T, quantised)
        found = route_to(*arrays).asnumpy()
        # a hidden value half way between two integers may go to the other one
        tolerance = 3e-3 if tokens and quantised[2] else 3e-6
        close(found, oracle(arrays, wide, [tokens and on for on in quantised]), tolerance)
        if tokens:
            assert np.abs(found - oracle(arrays, wide, (0, 0, 0))).max() > tolerance * np.abs(found).max()


@pytest.mark.parametrize("mode", MODES)
def test_reference_of_experts(mode):
    arrays, _ = arrays_of_experts(mode, 21, (1, 1, 1))

    def reference(x, gate, up, down, idx, weights):
        return experts_reference(x, gate, up, down, idx, weights)

    close(jit(reference)(*arrays).asnumpy(), route_to(*arrays).asnumpy(), 3e-3)


@native_only
@pytest.mark.parametrize("mode", MODES)
def test_an_experts_row_is_independent_of_the_batch(mode):
    arrays, _ = arrays_of_experts(mode, 60, (1, 1, 1))
    whole = route_to(*arrays).asnumpy()
    for part in (slice(0, 1), slice(7, 20), slice(20, 60)):
        found = route_to(*[a[part] if isinstance(a, np.ndarray) else a for a in arrays]).asnumpy()
        assert np.array_equal(found, whole[part])


# -- params ------------------------------------------------------------------------------------------------------------
def test_what_is_quantised_and_what_stays():
    cfg = dsv3.TINY.replace(num_hidden_layers=2, vocab_size=64)
    params = dsv3.init(cfg)
    q, before, after = dsv3.quantize(params, cfg), dict(paths(params)), {}
    after = dict(paths(q))
    changed = {p.rpartition(".")[0] for p in after if p.endswith(".w8a16")}
    block = [f"attn.{w}" for w in ("wq_a", "wq_b", "wkv_a", "wo")]
    moe = [f"{part}.{w}" for part in ("experts", "shared") for w in ("w_gate", "w_up", "w_down")]
    expected = {f"layers.{i}.{w}" for i in (0, 1) for w in block} | {f"layers.0.mlp.{w}" for w in ("w_gate", "w_up", "w_down")}
    expected |= {f"layers.1.{w}" for w in moe} | {f"mtp.0.{w}" for w in (*block, *moe, "eh_proj")}
    assert changed == expected
    assert all(after[p] is before[p] for p in before if p not in expected)
    leaf, w = q["layers"][1]["experts"]["w_up"], before["layers.1.experts.w_up"].asnumpy()
    np.testing.assert_array_equal(leaf["w8a16"].asnumpy(), rounded(w)[0])
    assert list(leaf) == ["w8a16", "scale"] and leaf["scale"].shape == (16, 64) and leaf["scale"].dtype == ms.float32
    assert nbytes(params) == 4 * sum(int(np.prod(a.shape)) for a in before.values())
    saved = sum(3 * before[p].size - 4 * after[p + ".scale"].size for p in expected)
    assert nbytes(params) - nbytes(q) == saved

    some = {p for p, _ in paths(dsv3.quantize(params, cfg, "w8a8", exclude=("*.w_down", "mtp.*", "layers.0.*")))
            if p.endswith(".w8a8")}
    assert some == {f"{p}.w8a8" for p in expected | {"head"} if p.startswith(("layers.1", "head")) and not p.endswith("w_down")}


def test_half_precision_is_quantised_as_what_it_holds():
    cfg = dsv3.TINY.replace(num_hidden_layers=1, vocab_size=64, num_nextn_predict_layers=0)
    half = dsv3.init(cfg, dtype="bfloat16")
    leaf = dsv3.quantize(half, cfg)["layers"][0]["attn"]["wo"]
    q, scale = rounded(half["layers"][0]["attn"]["wo"].float().asnumpy())
    np.testing.assert_array_equal(leaf["w8a16"].asnumpy(), q)
    np.testing.assert_array_equal(leaf["scale"].asnumpy(), scale)


def test_quantize_refuses():
    cfg = dsv3.TINY.replace(num_hidden_layers=1, vocab_size=64, num_nextn_predict_layers=0)
    params = dsv3.init(cfg)
    with pytest.raises(ValueError, match="mode='int4': expected one of w8a16, w8a8"):
        dsv3.quantize(params, cfg, "int4")
    with pytest.raises(ValueError, match=r"exclude='\*.w2' fits no path; paths are such as layers.0"):
        dsv3.quantize(params, cfg, exclude=("*.w2",))
    with pytest.raises(ValueError, match=r"attn.wq_a is missing, expected \(128, 64\).*not quantised before"):
        dsv3.quantize(dsv3.quantize(params, cfg), cfg)
    with pytest.raises(ValueError, match=r"embed is \(64, 128\), expected \(32, 128\)"):
        dsv3.quantize(params, cfg.replace(vocab_size=32))
    w = params["layers"][0]["attn"]["wo"].asnumpy()
    w[3, 5] = np.nan
    params["layers"][0]["attn"]["wo"] = Tensor(w)
    with pytest.raises(ValueError, match="layers.0.attn.wo holds NaN or infinity"):
        dsv3.quantize(params, cfg)


def test_a_trained_model(tmp_path):
    """Logits of the numbers that int8 stands for; perplexity near that of the float params."""
    params, cfg = golden_final(tmp_path)
    tokens = golden("train/run")[2]["tokens"][0][:, :24]

    def loss(p):
        z = dsv3.forward(p, tokens, cfg=cfg).asnumpy().astype(np.float64)
        log_p = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
        return -np.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], -1).mean(), z

    def stands_for(node):
        if isinstance(node, dict) and "scale" in node:
            return Tensor(node["w8a16"].asnumpy().astype(np.float32) * node["scale"].asnumpy()[..., None, :])
        if isinstance(node, dict):
            return {k: stands_for(v) for k, v in node.items()}
        return tuple(map(stands_for, node)) if isinstance(node, tuple) else node

    before, _ = loss(params)
    quantised = dsv3.quantize(params, cfg, exclude=())
    after, z = loss(quantised)
    np.testing.assert_allclose(z, loss(stands_for(quantised))[1], atol=2e-5 * np.abs(z).max())
    assert "w8a16" in quantised["head"] and 0 < abs(after - before) < 0.02
    both, z8 = loss(dsv3.quantize(params, cfg, "w8a8"))
    assert 0 < abs(both - before) < 0.03 and np.abs(z8 - z).max() > 1e-4


@pytest.mark.parametrize("mode, exclude", [pytest.param("w8a16", (), marks=pytest.mark.slow),
                                           ("w8a8", ("*.wq_b", "*.experts.w_down"))])
def test_generation(mode, exclude):
    """The engine's prefill and decoding, whole operators and parts, continue as the forward pass of all tokens does."""
    cfg = dsv3.TINY.replace(vocab_size=61, hidden_size=32, intermediate_size=80, moe_intermediate_size=72, initializer_range=0.2,
                            num_hidden_layers=2, num_attention_heads=2, q_lora_rank=20, n_routed_experts=8, num_experts_per_tok=3)
    params = dsv3.quantize(dsv3.init(cfg), cfg, mode, exclude)
    prompts, new = [[5, 3, 9], [7, 1, 4, 4, 2, 60, 11]], 9
    texts = dsv3.generate(params, prompts, cfg=cfg, max_new_tokens=new)
    tokens = np.array([(p + t + [0] * 9)[:16] for p, t in zip(prompts, texts)])
    likeliest = dsv3.forward(params, tokens, cfg=cfg).asnumpy().argmax(-1)
    for row, prompt, text in zip(likeliest, prompts, texts):
        assert text == row[len(prompt) - 1 : len(prompt) - 1 + new].tolist() and len(set(text)) > 2


# -- the measurement ---------------------------------------------------------------------------------------------------
def test_bench(tmp_path, capsys):
    cfg = dsv3.TINY.replace(num_hidden_layers=1, num_nextn_predict_layers=0, vocab_size=300)
    params = dsv3.init(cfg, seed=3)
    dsv3.save(tmp_path / "run", params, cfg=cfg)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} bottles of beer on the wall\n" for i in range(3000)))
    (tmp_path / "run" / "run.json").write_text(json.dumps({"data": str(text), "tokenizer": "byte", "seed": 1}))
    options = ["--batches", "1", "--config", str(tmp_path / "run"), "--rows", "2", "--calls", "1", "--rounds", "2", "--json"]
    assert cli.main(["quant", str(tmp_path / "run"), *options]) == 0
    r = json.loads(capsys.readouterr().out)
    q = r["quality"]
    assert list(q) == ["float32", *MODES] and q["float32"]["largest_error"] == 0 and q["float32"]["same_choice"] == 1
    assert q["float32"]["bytes"] == nbytes(params) and q["w8a8"]["bytes"] == nbytes(dsv3.quantize(params, cfg, "w8a8"))
    assert 250 < q["float32"]["perplexity"] < 350 and 0 < q["w8a16"]["largest_error"] < 0.5  # 300 entries, not trained
    assert 0 < q["w8a16"]["median_error"] < q["w8a8"]["median_error"]
    assert list(r["products"]) == ["linear 128 x 384, 2 rows", "linear 384 x 128, 2 rows", "experts 16 x 128 x 64, 2 rows"]
    assert all(set(p["ratio"]) >= set(MODES) and p["ms"]["w8a8"]["n"] == 2 for p in r["products"].values())
    assert "perplexity" in bench.table(r) and "experts 16" in bench.table(r)
    assert cli.main(["quant", "--rows", "0"]) == 1 and "--rows 0" in capsys.readouterr().err
    z = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1, 1, 1]]]))
    assert bench.cross_entropy(z, np.array([[0, 1, 2]])) == pytest.approx(-(np.log(0.25) + np.log(0.1)) / 2)


# -- Ascend ------------------------------------------------------------------------------------------------------------
SIZES = (64, 96), (4, 64, 96), (4, 64, 96), (4, 96, 64)


def all_of(x, w, idx, weights):
    """Both products of a mode."""
    return linear(x, w[0]), experts(x, w[1], w[2], w[3], idx, weights)


def arguments(mode, dtype):
    idx = np.argsort(normal(8, 4), 1)[:, :2].astype(np.int32)
    return Tensor(normal(8, 64)).astype(getattr(ms, dtype)), tuple(weight(mode, *s)[0] for s in SIZES), idx, normal(8, 2)


def target(mode):
    """``all_of`` for a simulated device."""
    enter_graph()
    x, w, idx, weights = arguments(mode, "bfloat16")

    def program(x, q0, s0, q1, s1, q2, s2, q3, s3, idx, weights):
        leaves = {mode: q0, "scale": s0}, {mode: q1, "scale": s1}, {mode: q2, "scale": s2}, {mode: q3, "scale": s3}
        return all_of(x, leaves, idx, weights)

    return Step(whole_program(program), (x, *(Tensor(a) for leaf in w for a in leaf.values()), Tensor(idx), Tensor(weights)))


@pytest.mark.parametrize("mode, times", [("w8a16", {"WeightQuantBatchMatmul": 1, "GroupedMatmulV4": 3}),
                                         ("w8a8", {"QuantBatchMatmul": 1, "GroupedMatmulV4": 3})])
def test_ascend_has_operators_for_it(tmp_path, monkeypatch, mode, times):
    """As the operators are documented, they compute what the CPU does, up to the rounding of the dtype."""
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    report = simulate("test_quant:target", {"mode": mode}, 1, 0, keep=tmp_path, export=True)
    program = lockstep.load(report.program, 0)
    kinds = [node.op for graph in (program.graph, *program.functions.values()) for node in graph.nodes]
    assert {op: kinds.count(op) for op in times} == times and "MatMul" not in kinds
    x, w, idx, weights = arguments(mode, "float32")
    feeds = [x.asnumpy(), *(a for leaf in w for a in leaf.values()), idx, weights]
    for ours, theirs in zip(jit(all_of)(x, w, idx, weights), lockstep.run([program], [feeds])[0]):
        close(theirs, ours.asnumpy(), 0.05)


def test_ascend_refuses_float32():
    with pytest.raises(ValueError, match="Ascend multiplies quantised weights with bfloat16 or float16, found Float32"):
        int8._check_ascend(ms.float32)
