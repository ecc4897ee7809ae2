"""Properties of the model that no golden states: who sees whom, pieces that are swapped, shapes and dtypes at
the edges.

Planted faults this file was seen to catch, one at a time: a leak from later tokens; documents that see each
other in main blocks, in MTP's; a loss mask that does not weigh; recomputed blocks that forget route=;
expert loss counted by scores; device counts summed; a device counted twice; z not squared; groups always
judged by two; greedy limited to groups; softmax ignored; a tied head without gradient; position_ids
ignored; next_logits one token early; one generator for all rows; a row that does not stop; init that
ignores the path; the bias in the model's dtype; a row too short for MTP (the process dies).
"""

import os
import re

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops
from oracles import balance as balance_oracle
from oracles import model as model_oracle

import dsv3
from dsv3.checkpoint.names import published, to_published
from dsv3.generation import generate
from dsv3.model import forward, loss_fn
from dsv3.nn import balance
from dsv3.nn.router import route
from dsv3.transform import compile_count

f32 = np.float32
TINY = dsv3.TINY.replace(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_nextn_predict_layers=0,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    initializer_range=0.3,
    aux_loss_alpha=0.0,
)
MTP = TINY.replace(num_nextn_predict_layers=1)
DENSE = TINY.replace(num_hidden_layers=1)
rng = np.random.default_rng(0)
TOKENS = (
    rng.permutation(48)[:24].reshape(2, 12).astype(np.int32)
)  # all distinct: a row of ``embed`` is one position


# -- who sees whom -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def reach():
    """reach(where, segments) -> [2, 12]: the norm of the gradient at each position's embedding of the loss
    there.

    The loss is the main one and MTP's, of the labels at the positions of the mask.
    """
    params = dsv3.init(MTP, seed=1)

    def loss(params, batch):
        return loss_fn(params, batch, cfg=MTP)

    grad = dsv3.value_and_grad(loss, has_aux=True)

    def reach(mask, segments):
        (_, metrics), grads = grad(
            params,
            {"tokens": TOKENS, "labels": (TOKENS + 1) % 48, "loss_mask": mask, "segment_ids": segments},
        )
        assert float(metrics["main_loss"]) > 0
        assert (float(metrics["mtp_loss"]) > 0) == bool(
            ((mask[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1])).any()
        )
        return np.abs(grads["embed"].asnumpy()[TOKENS]).max(-1)

    return reach


def at(row, t):
    """A mask of one position."""
    mask = np.zeros(TOKENS.shape, f32)
    mask[row, t] = 1
    return mask


@pytest.mark.parametrize("t", [0, 1, 6, 11])
def test_no_gradient_from_later_tokens(reach, t):
    """Exactly zero, through attention, experts and MTP (which reads the token at t to predict the label
    there).
    """
    found = reach(at(1, t), np.zeros(TOKENS.shape, np.int32))
    assert not found[0].any() and not found[1, t + 1 :].any()
    assert (found[1, : t + 1] > 0).all()


def test_no_gradient_across_documents(reach):
    segments = np.array([[0] * 5 + [1] * 4 + [2] * 3, [0] * 12], np.int32)
    found = reach(at(0, 7), segments)
    assert not found[0, :5].any() and not found[0, 8:].any() and not found[1].any()
    assert (found[0, 5:8] > 0).all()
    first = reach(at(0, 5), segments)  # the first of its document: MTP may not reach back
    assert first[0, 5] > 0 and not np.delete(first[0], 5).any()


def test_a_masked_loss_is_weighed(reach):
    """A fractional mask weighs: the gradient of two labels is the weighted mean of theirs."""
    segments = np.zeros(TOKENS.shape, np.int32)
    both = reach(0.25 * at(0, 0) + 0.75 * at(1, 0), segments)  # at position 0 MTP has no say
    np.testing.assert_allclose(both[0, 0], 0.25 * reach(at(0, 0), segments)[0, 0], rtol=1e-4)
    np.testing.assert_allclose(both[1, 0], 0.75 * reach(at(1, 0), segments)[1, 0], rtol=1e-4)


# -- pieces --------------------------------------------------------------------------------------------------
def all_to_the_last(params, x_TD, *, cfg):
    """A router that knows what it wants."""
    idx_TK, weights_TK, scores_TE, logits_TE = route(params, x_TD, cfg=cfg)
    K, E = cfg.num_experts_per_tok, cfg.n_routed_experts
    chosen = ops.zeros_like(idx_TK) + Tensor(np.arange(E - K, E, dtype=np.int32))
    return chosen, ops.ones_like(weights_TK), scores_TE, logits_TE


def seven(idx_TK, scores_TE, logits_TE, batch_size):
    """A balance loss that can be recognised."""
    return ops.mean(scores_TE * 0) + 7.0 + batch_size


def test_swapped_pieces():
    """route= and balance= reach every MoE block, MTP's too; recomputed blocks use them as well."""
    params = dsv3.init(MTP, seed=2)

    def several(params, batch):
        _, metrics = loss_fn(params, batch, cfg=MTP, route=all_to_the_last, balance=seven, recompute=True)
        metrics["plain"] = loss_fn(params, batch, cfg=MTP)[0]
        return metrics

    metrics = dsv3.jit(several)(params, {"tokens": TOKENS})
    load = metrics["load"].asnumpy()
    np.testing.assert_array_equal(load, [[0] * 5 + [24] * 3, [0] * 5 + [22] * 3])
    assert float(metrics["balance_loss"]) == 2 * 9.0
    assert abs(float(metrics["loss"]) - float(metrics["balance_loss"]) - float(metrics["plain"])) > 1e-3
    with pytest.raises(ValueError, match=r"n_routed_experts=8 is not divisible by devices=3; pick a divisor"):
        balance.make_balance(TINY, devices=3)


def test_balance_losses():
    """The four losses and their weighted sum against the oracle; counts come from the choice, not from the
    scores.
    """
    B, T, D = 2, 6, 4
    cfg = TINY.replace(topk_method="group_limited_greedy", aux_loss_alpha=0.5)
    logits = rng.standard_normal((B * T, 8)).astype(f32)
    scores = 1 / (1 + np.exp(-logits.astype(float)))
    idx = np.stack([rng.permutation(8)[:3] for _ in range(B * T)]).astype(np.int32)
    total = balance.make_balance(cfg, expert=2.0, device=3.0, communication=5.0, z=7.0, devices=D, limit=2)
    default = balance.make_balance(cfg)

    def losses(scores, idx, logits):
        return (
            balance.sequence_loss(idx, scores, logits, B, cfg=cfg),
            balance.expert_loss(idx, scores, logits, B, cfg=cfg),
            balance.device_loss(idx, scores, logits, B, cfg=cfg, devices=D),
            balance.communication_loss(idx, scores, logits, B, cfg=cfg, devices=D, limit=2),
            balance.z_loss(logits),
            total(idx, scores, logits, B),
            default(idx, scores, logits, B),
        )

    def summed(scores, idx, logits):
        found = losses(scores, idx, logits)
        return found[5], found

    (_, found), grad = dsv3.value_and_grad(summed, has_aux=True)(scores.astype(f32), idx, logits)
    share = scores / scores.sum(-1, keepdims=True)
    expected = [
        balance_oracle.sequence_wise(scores.reshape(B, T, 8), 3),
        balance_oracle.expert_level(share, idx),
        balance_oracle.device_level(share, idx, D),
        balance_oracle.communication_level(share, idx, D, 2),
        balance_oracle.z_loss(logits.astype(float)),
    ]
    np.testing.assert_allclose([float(x) for x in found[:5]], expected, rtol=1e-5)
    weights = np.array([0.5, 2.0, 3.0, 5.0, 7.0])
    assert float(found[5]) == pytest.approx(weights @ expected, rel=1e-5)
    assert float(found[6]) == pytest.approx(0.5 * expected[0], rel=1e-5)

    # the gradient goes through P alone, so that it is that of f . P with f held still
    def slopes(scores):
        def p(s):
            return (s / s.sum(-1, keepdims=True)).reshape(B, T, 8).mean(1)

        best = np.argsort(-scores, axis=-1)[:, :3].reshape(B, T * 3)
        f_sequence = np.stack([np.bincount(b, minlength=8) for b in best]) * 8 / (3 * T)
        f_E = np.bincount(idx.reshape(-1), minlength=8) * 8 / (3 * B * T)
        f_D = np.repeat(f_E.reshape(D, 2).mean(1), 2)
        sent = np.array([(idx // 2 == d).any(1).sum() for d in range(D)]) * D / (2 * B * T)
        held = 0.5 * f_sequence / B + (2 * f_E + 3 * f_D + 5 * np.repeat(sent, 2)) / B
        out, step = np.zeros_like(scores), 1e-6
        for i in np.ndindex(*scores.shape):
            moved = [scores.copy(), scores.copy()]
            moved[0][i] += step
            moved[1][i] -= step
            out[i] = ((held * (p(moved[0]) - p(moved[1]))).sum()) / (2 * step)
        return out

    np.testing.assert_allclose(grad.asnumpy(), slopes(scores), rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize(
    "method, scoring",
    [
        ("greedy", "softmax"),
        ("group_limited_greedy", "softmax"),
        ("group_limited_greedy", "sigmoid"),
        ("noaux_tc", "softmax"),
    ],
)
def test_routers(method, scoring):
    """Choice by one Python loop a token: groups by their best expert (by their best two with a bias), then
    experts.
    """
    cfg = TINY.replace(topk_method=method, scoring_func=scoring, norm_topk_prob=method != "greedy")
    x = np.random.default_rng(5).standard_normal((20, 16)).astype(f32)
    params = {"w": np.random.default_rng(6).standard_normal((16, 8)).astype(f32)}
    bias = np.linspace(-0.5, 0.5, 8, dtype=f32) if method == "noaux_tc" else np.zeros(8, f32)
    if method == "noaux_tc":
        params["bias"] = bias

    def run(params, x):
        return route(params, x, cfg=cfg)

    idx, weights, scores, logits = (v.asnumpy() for v in dsv3.jit(run)(params, x))
    z = x.astype(float) @ params["w"]
    want = 1 / (1 + np.exp(-z)) if scoring == "sigmoid" else np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    np.testing.assert_allclose(logits, z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores, want, rtol=1e-4, atol=1e-6)
    for t in range(20):
        choice = want[t] + bias
        groups = [sorted(choice[2 * g : 2 * g + 2])[-1 if method != "noaux_tc" else -2 :] for g in range(4)]
        best = sorted(range(4), key=lambda g: -sum(groups[g]))[:2]
        allowed = range(8) if method == "greedy" else [2 * g + i for g in best for i in (0, 1)]
        chosen = sorted(allowed, key=lambda e: -choice[e])[:3]
        assert sorted(idx[t]) == sorted(chosen), t
        share = want[t][idx[t]]
        share = share / share.sum() if cfg.norm_topk_prob else share
        np.testing.assert_allclose(weights[t], share * cfg.routed_scaling_factor, rtol=1e-4)


def test_greedy_without_shared_experts_equals_the_oracle():
    """Greedy choice is one group and no bias; a model without shared experts one whose shared weights are
    zero.
    """
    cfg = TINY.replace(topk_method="greedy", n_shared_experts=0)
    params = dsv3.init(cfg, seed=3)
    assert "shared" not in params["layers"][1] and "bias" not in params["layers"][1]["router"]
    arrays = dict(dsv3.tree.paths(dsv3.tree.to_numpy(params)))
    weights = {t.name: to_published(arrays[t.path], t).astype(float) for t in published(cfg)}
    mlp = "model.layers.1.mlp."
    weights[mlp + "gate.e_score_correction_bias"] = np.zeros(8)
    for name, shape in (("gate", (8, 16)), ("up", (8, 16)), ("down", (16, 8))):
        weights[f"{mlp}shared_experts.{name}_proj.weight"] = np.zeros(shape)
    out = model_oracle.forward(
        weights, TOKENS, cfg=cfg.to_hf() | {"n_group": 1, "topk_group": 1, "rope_scaling": None}
    )
    assert out.routing[0].margin > 1e-5
    np.testing.assert_allclose(forward(params, TOKENS, cfg=cfg).asnumpy(), out.logits_BTW, atol=2e-5)


# -- embeddings, positions, dtypes ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def dense_grad():
    """value_and_grad of the dense model."""

    def loss(params, batch):
        return loss_fn(params, batch, cfg=DENSE)

    return dsv3.value_and_grad(loss, has_aux=True)


def test_tied_embeddings_in_a_dense_model(dense_grad):
    """The tied model is the untied one whose head is the embedding turned; its gradient is the sum of both.

    All blocks are dense here, so that there is no load at all.
    """
    tied = DENSE.replace(tie_word_embeddings=True)
    params = dsv3.init(tied, seed=4)
    assert "head" not in params and dsv3.tree.size(params) == dsv3.spec.count(dsv3.param_specs(tied))
    apart = params | {"head": Tensor(params["embed"].asnumpy().T.copy())}

    def loss(params, batch):
        return loss_fn(params, batch, cfg=tied)

    (one, metrics), tied_grads = dsv3.value_and_grad(loss, has_aux=True)(params, {"tokens": TOKENS})
    (two, _), grads = dense_grad(apart, {"tokens": TOKENS})
    assert float(one) == pytest.approx(float(two), rel=1e-6)
    assert metrics["load"].shape == (0, 8) and float(metrics["balance_loss"]) == 0
    both = grads["embed"].asnumpy() + grads["head"].asnumpy().T
    np.testing.assert_allclose(tied_grads["embed"].asnumpy(), both, atol=1e-6)
    np.testing.assert_allclose(
        tied_grads["layers"][0]["attn"]["wo"].asnumpy(), grads["layers"][0]["attn"]["wo"].asnumpy(), atol=1e-6
    )


def test_positions_are_relative():
    params = dsv3.init(DENSE, seed=5)
    place = np.broadcast_to(np.arange(12, dtype=np.int32), TOKENS.shape).copy()
    plain = forward(params, TOKENS, cfg=DENSE).asnumpy()
    given = forward(params, TOKENS, position_ids=place, cfg=DENSE).asnumpy()
    np.testing.assert_allclose(given, plain, atol=1e-5)
    count = compile_count()
    np.testing.assert_allclose(
        forward(params, TOKENS, position_ids=place + 37, cfg=DENSE).asnumpy(), plain, atol=2e-4
    )
    stretched = forward(params, TOKENS, position_ids=2 * place, cfg=DENSE).asnumpy()
    assert compile_count() == count
    assert np.abs(stretched - plain)[:, 1:].max() > 1e-3 and np.abs(stretched - plain)[:, 0].max() < 1e-5


def test_bfloat16_gradients(dense_grad):
    """The forward pass widens, gradients come back in the leaf's dtype, near those of the same weights in
    float32.
    """
    params = dsv3.init(DENSE, seed=6, dtype="bfloat16")
    wide = dsv3.tree.tree_map(lambda leaf: leaf.float(), params)
    assert all(leaf.dtype == ms.bfloat16 for _, leaf in dsv3.tree.paths(params))

    (narrow, _), grads = dense_grad(params, {"tokens": TOKENS})
    (exact, _), wide_grads = dense_grad(wide, {"tokens": TOKENS})
    assert float(narrow) == float(exact)
    wide_grads = dict(dsv3.tree.paths(dsv3.tree.to_numpy(wide_grads)))
    for path, leaf in dsv3.tree.paths(grads):
        assert leaf.dtype == ms.bfloat16, path
        np.testing.assert_allclose(
            leaf.float().asnumpy(), wide_grads[path], rtol=2**-8, atol=1e-7, err_msg=path
        )


@pytest.mark.skipif(
    os.environ.get("DSV3_KERNELS") == "reference", reason="MindSpore's CPU cannot assign to bfloat16"
)
def test_bfloat16_training_step():
    """Masters move and the weights are their roundings; the router bias is float32 and moves; nothing
    recompiles.
    """
    params = dsv3.init(TINY, seed=7, dtype="bfloat16")
    bias = params["layers"][1]["router"]["bias"]
    opt = dsv3.adamw(1e-3, moment_dtype="bfloat16")
    state = opt.init(params)
    assert bias.dtype == ms.float32 and not any(path.endswith("bias") for path in state["masters"])
    start = {path: leaf.asnumpy().copy() for path, leaf in state["masters"].items()}
    step = dsv3.make_train_step(TINY, opt, bias_update_rate=1e-4)
    losses = []
    for i in range(4):
        params, state, metrics = step(params, state, {"tokens": TOKENS})
        losses.append(float(metrics["loss"]))
        if i == 0:
            count = compile_count()
    assert compile_count() == count
    assert losses == sorted(losses, reverse=True) and losses[0] - losses[-1] > 0.05, losses
    leaves, moved = dict(dsv3.tree.paths(params)), 0
    for path, master in state["masters"].items():
        assert leaves[path].dtype == ms.bfloat16
        np.testing.assert_array_equal(
            leaves[path].float().asnumpy(), master.astype(ms.bfloat16).float().asnumpy(), path
        )
        moved = max(moved, np.abs(master.asnumpy() - start[path]).max())
    assert 2e-3 < moved < 5e-3
    load = metrics["load"].asnumpy()[0]
    assert load.sum() == TOKENS.size * 3 and 1e-4 <= np.abs(bias.asnumpy()).max() <= 4.1e-4


def test_init():
    """A leaf depends on the seed and its own path; stds are those of the spec; the bias starts at zero,
    float32.
    """
    a, b, c = (
        dict(dsv3.tree.paths(dsv3.tree.to_numpy(p)))
        for p in (dsv3.init(MTP, seed=1), dsv3.init(DENSE, seed=1), dsv3.init(MTP, seed=2))
    )
    for path in ("embed", "layers.0.attn.wq_a", "head"):
        np.testing.assert_array_equal(a[path], b[path])
        assert np.abs(a[path] - c[path]).max() > 0.1
        assert a[path].std() == pytest.approx(0.3, rel=0.2)
    assert (a["norm"] == 1).all() and (a["layers.1.router.bias"] == 0).all()
    assert not np.array_equal(a["layers.0.attn.wq_a"], a["layers.1.attn.wq_a"])
    specs = dict(dsv3.tree.paths(dsv3.param_specs(MTP), dsv3.spec.is_spec))
    assert list(specs) == list(a) and all(specs[path].shape == a[path].shape for path in a)
    with pytest.raises(ValueError, match="dtype='int8'; expected one of float32, bfloat16, float16"):
        dsv3.init(MTP, dtype="int8")


def test_a_row_too_short_for_mtp():
    cfg = DENSE.replace(num_nextn_predict_layers=2)
    with pytest.raises(ValueError, match="a row of 2 tokens leaves nothing for num_nextn_predict_layers=2"):
        loss_fn(dsv3.init(cfg), {"tokens": TOKENS[:, :2]}, cfg=cfg)


# -- generation ----------------------------------------------------------------------------------------------
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6]]


@pytest.fixture(scope="module")
def writer():
    """params that write, and forward's argmax after each row."""
    params = dsv3.init(TINY, seed=8)

    def best(rows):
        tokens = np.full((len(rows), 64), 11, np.int32)  # another filler than generate's: it must not matter
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        logits = forward(params, tokens, cfg=TINY).asnumpy()
        return [int(logits[i, len(row) - 1].argmax()) for i, row in enumerate(rows)]

    return params, best


def test_greedy_is_the_argmax_of_forward(writer):
    params, best = writer
    rows, seen = [list(p) for p in PROMPTS], []
    found = generate(
        params, PROMPTS, cfg=TINY, max_new_tokens=6, on_token=lambda row, token: seen.append((row, token))
    )
    for _ in range(6):
        rows = [row + [token] for row, token in zip(rows, best(rows))]
    assert found == [row[len(p) :] for row, p in zip(rows, PROMPTS)]
    assert seen == [(row, found[row][i]) for i in range(6) for row in range(3)]
    stop = found[0][2]
    until = found[0].index(stop) + 1
    stopped = generate(params, PROMPTS, cfg=TINY, max_new_tokens=6, eos_token_id=stop)
    assert stopped[0] == found[0][:until]
    assert all(s == f[: f.index(stop) + 1 if stop in f else 6] for s, f in zip(stopped, found))


def test_sampling_depends_on_seed_and_row_alone(writer):
    params, _ = writer

    def write(prompts, **settings):
        return generate(params, prompts, cfg=TINY, max_new_tokens=8, **settings)

    hot = write(PROMPTS, temperature=1.0, seed=3)
    assert write(PROMPTS, temperature=1.0, seed=3) == hot
    assert write(PROMPTS, temperature=1.0, seed=4) != hot
    others = [PROMPTS[0], [40, 41], [8]]
    assert write(others, temperature=1.0, seed=3)[0] == hot[0]  # whatever stands beside it
    twins = write([PROMPTS[0]] * 3, temperature=1.0, seed=3)
    assert twins[0] == hot[0] and len({tuple(t) for t in twins}) == 3
    greedy = write(PROMPTS)
    alone = [write([p])[0] for p in PROMPTS]
    assert alone == greedy
    assert write([PROMPTS[0]], temperature=1.0, seed=3)[0] == hot[0]
    assert write(PROMPTS, temperature=1e-4) == greedy


@pytest.mark.parametrize(
    "prompts, settings, message",
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[48]], {}, "prompt 0 has the id 48; expected 0 to 47"),
        ([[1, -2]], {}, "prompt 0 has the id -2"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens=-1"),
        ([[1]], {"temperature": -0.5}, "temperature=-0.5"),
        ([[1]], {"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_refused_prompts(prompts, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        generate({}, prompts, cfg=TINY, **settings)


def test_nothing_to_write():
    assert generate({}, [], cfg=TINY) == [] and generate({}, [[1], [2]], cfg=TINY, max_new_tokens=0) == [
        [],
        [],
    ]
