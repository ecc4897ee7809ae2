"""The float64 oracles reproduce the goldens of transformers and torch, so both can be trusted.

Planted faults these tests were seen to catch, one at a time, in the oracles: rotary pairs split in halves
or turned backwards, key not rotated, position_ids ignored, the YaRN gain not divided, softmax scale from
mscale or not squared, ramp floored or inverted; norm epsilon, latent not normalised, documents without
causality; groups masked with 0, groups judged by one expert, bias in the weights, weights always normalised
or not scaled, no shared expert; eh_proj without the embedding, MTP fed before the norm (depth 1, depth 2),
normed by the main norm, wrong token at depth 2, summed, labelled across documents; cross entropy over
masked labels; balance counts from biased scores, scores not normalised, taken per batch, a device counted
twice, device counts summed, z not squared; bias moved the wrong way or by the difference; decay coupled or
on vectors, no bias correction, eps inside the root, clipping without 1e-6 or upwards; warm-up, cosine, last
phase and batch ramp. In the goldens: gate and up exchanged in a gradient, one gradient tensor of zeros,
labels not moved, load of another step.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from oracles import balance, bias, model, moe, optim, rope, schedule
from safetensors.numpy import load_file

GOLDENS = Path(__file__).parent / "goldens"
HF_CASES = ("base", "yarn", "no_q_lora", "shared2", "unnormalised", "negative_bias")
MTP_WEIGHT, ALPHA = 0.3, 1e-2


def read(folder):
    """(config, float64 parameters, golden arrays) of one golden folder."""
    return (
        json.loads((folder / "config.json").read_text()),
        tensors(folder / "model"),
        np.load(folder / "golden.npz"),
    )


def tensors(stem):
    """Name -> float64 array."""
    return {
        name: value.astype(np.float64) for name, value in load_file(stem.with_suffix(".safetensors")).items()
    }


def slope(loss_of, params, direction, step=1e-5):
    """The derivative of loss_of along direction (name -> array), by a central difference."""
    sides = [
        loss_of({n: p + sign * step * direction[n] if n in direction else p for n, p in params.items()})
        for sign in (1, -1)
    ]
    return (sides[0] - sides[1]) / (2 * step)


def assert_grads_are_slopes(loss_of, params, grads, rng, *, each=False):
    """The golden gradients, along random directions: of each tensor alone, or three of all together."""
    parts = (
        [[name] for name in grads if "experts." not in name or ".0." in name] if each else [list(grads)] * 3
    )
    for names in parts:
        direction = {name: rng.standard_normal(grads[name].shape) for name in names}
        expected = sum((grads[n] * direction[n]).sum() for n in names)
        size = math.sqrt(sum((grads[n] ** 2).sum() for n in names))
        assert slope(loss_of, params, direction) == pytest.approx(expected, abs=2e-6 * size + 1e-10), names


@pytest.mark.parametrize("case", HF_CASES)
def test_forward_matches_transformers(case):
    cfg, params, golden = read(GOLDENS / "hf" / case)
    out = model.forward(params, golden["input_ids"], cfg=cfg)
    np.testing.assert_allclose(out.logits_BTW, golden["logits"], rtol=1e-6, atol=1e-6)  # stored as float32
    np.testing.assert_allclose(out.hidden_BTD, golden["hidden"], rtol=1e-6, atol=1e-6)
    assert model.cross_entropy(out.logits_BTW, golden["labels"]) == pytest.approx(
        float(golden["loss"]), rel=1e-12
    )
    for layer, routing in enumerate(out.routing, start=cfg["first_k_dense_replace"]):
        K, E = cfg["num_experts_per_tok"], cfg["n_routed_experts"]
        np.testing.assert_array_equal(routing.indices_BTK.reshape(-1, K), golden[f"router_{layer}_indices"])
        np.testing.assert_array_equal(routing.load_E, golden[f"router_{layer}_load"])
        for ours, name in (
            (routing.logits_BTE.reshape(-1, E), "logits"),
            (routing.weights_BTK.reshape(-1, K), "weights"),
        ):
            np.testing.assert_allclose(ours, golden[f"router_{layer}_{name}"], rtol=1e-10, atol=1e-11)
        assert routing.margin > 5e-4


@pytest.mark.parametrize("case", HF_CASES)
def test_masks_and_positions_match_transformers(case):
    cfg, params, golden = read(GOLDENS / "hf" / case)
    ids = golden["input_ids"]
    readings = {
        "nll": {},
        "nll_segments": {"segment_ids": golden["segment_ids"]},
        "nll_positions": {"position_ids": golden["position_ids"]},
    }
    for name, arguments in readings.items():
        out = model.forward(params, ids, cfg=cfg, **arguments)
        losses = model.token_losses(out.logits_BTW[:, :-1], ids[:, 1:])
        np.testing.assert_allclose(losses, golden[name], rtol=1e-11, atol=1e-11, err_msg=name)
    assert np.abs(golden["nll"] - golden["nll_segments"]).max() > 0.1
    assert np.abs(golden["nll"] - golden["nll_positions"]).max() > 0.01


def test_labels_are_labels_hf_moved_by_one():
    for case in HF_CASES:
        golden = np.load(GOLDENS / "hf" / case / "golden.npz")
        np.testing.assert_array_equal(golden["labels"][:, :-1], golden["labels_hf"][:, 1:])
        assert (golden["labels"][:, -1] == -100).all() and (golden["labels"][:, :-1] == -100).any()


@pytest.mark.parametrize("case", HF_CASES)
def test_gradients_match_slopes_of_the_oracle(case):
    cfg, params, golden = read(GOLDENS / "hf" / case)
    grads = tensors(GOLDENS / "hf" / case / "grads")
    assert set(grads) == {name for name in params if not name.endswith("e_score_correction_bias")}

    def loss_of(changed):
        out = model.forward(changed, golden["input_ids"], cfg=cfg)
        return model.cross_entropy(out.logits_BTW, golden["labels"])

    assert_grads_are_slopes(loss_of, params, grads, np.random.default_rng(0), each=case == "base")


def check_losses(found, golden, step=None, prefix=""):
    """Every recorded loss and load equals the golden."""
    for name in ("total", "main", "mtp_per_depth", "balance_per_layer"):
        expected = golden[prefix + name] if step is None else golden[prefix + name][step]
        np.testing.assert_allclose(found[name], expected, rtol=1e-12, err_msg=prefix + name)
    np.testing.assert_array_equal(
        found["load"], golden[prefix + "load"] if step is None else golden["load"][step]
    )


@pytest.mark.parametrize("run,depth", [("run", 1), ("depth2", 2)])
def test_training_losses_and_gradients_at_the_start(run, depth):
    cfg, params, golden = read(GOLDENS / "train" / run)
    tokens, labels, step = golden["tokens"], golden["labels"], None
    if run == "run":
        tokens, labels, step = tokens[0], labels[0], 0
    kinds = {"cfg": cfg, "mtp_depth": depth, "mtp_weight": MTP_WEIGHT, "balance_alpha": ALPHA}
    check_losses(model.losses(params, tokens, labels, **kinds), golden, step)
    pre_norm = model.losses(params, tokens, labels, mtp_hidden="pre_norm", **kinds)
    check_losses(pre_norm, golden, prefix="pre_norm_")
    first_mtp = golden["mtp_per_depth"][step] if run == "run" else golden["mtp_per_depth"]
    assert np.abs(pre_norm["mtp_per_depth"] - first_mtp).min() > 1e-3

    grads = tensors(GOLDENS / "train" / run / "grads")
    copies = {
        n
        for n in params
        if n.startswith("model.layers.") and n.endswith((".embed_tokens.weight", ".head.weight"))
    }
    assert set(grads) == {n for n in params if not n.endswith("e_score_correction_bias")} - copies
    # The counts f of the balance loss are constants to the gradient, and no choice flips within the step.
    loss_of = lambda changed: model.losses(changed, tokens, labels, **kinds)["total"]  # noqa: E731
    assert_grads_are_slopes(loss_of, params, grads, np.random.default_rng(1), each=run == "depth2")
    if run == "run":
        norm = optim.global_norm(grads)
        assert norm == pytest.approx(float(golden["grad_norm"][0]), rel=1e-6)


def test_documents_do_not_see_each_other():
    cfg, params, golden = read(GOLDENS / "train" / "run")
    arguments = {"cfg": cfg, "mtp_depth": 1, "mtp_weight": MTP_WEIGHT, "segment_ids": golden["segment_ids"]}
    tokens, labels = golden["tokens"][0], golden["segments_labels"]
    check_losses(
        model.losses(params, tokens, labels, balance_alpha=ALPHA, **arguments), golden, prefix="segments_"
    )
    assert abs(golden["segments_main"] - golden["main"][0]) > 1e-3
    grads = tensors(GOLDENS / "train" / "run" / "grads_segments")
    loss_of = lambda changed: model.losses(changed, tokens, labels, **arguments)["total"]  # noqa: E731
    assert_grads_are_slopes(loss_of, params, grads, np.random.default_rng(2))


def test_training_ends_where_the_records_say():
    cfg, start, golden = read(GOLDENS / "train" / "run")
    final = tensors(GOLDENS / "train" / "run" / "final")
    assert set(final) == set(start)
    for name, source in (
        (".embed_tokens.weight", "model.embed_tokens.weight"),
        (".shared_head.head.weight", "lm_head.weight"),
    ):
        np.testing.assert_array_equal(final[f"model.layers.3{name}"], final[source])
    found = model.losses(
        final,
        golden["final_tokens"],
        golden["final_labels"],
        cfg=cfg,
        mtp_depth=1,
        mtp_weight=MTP_WEIGHT,
        balance_alpha=ALPHA,
    )
    check_losses(found, golden, prefix="final_")
    assert golden["total"][-1] < golden["total"][0] - 0.5 and golden["final_total"] < golden["total"][0] - 0.5

    routers = [n for n in start if n.endswith("e_score_correction_bias")]
    for n, name in enumerate(sorted(routers)):
        expected = start[name]
        for step in range(len(golden["load"])):
            expected = bias.update(expected, golden["load"][step, n], 0.01)
        np.testing.assert_allclose(final[name], expected, atol=1e-7)
    assert (
        np.abs(golden["load"].sum(axis=-1) - np.array([384, 384, 372])).max() == 0
    )  # MTP: 31 positions of 32


def test_one_whole_step_leads_to_the_second():
    """Clipping, AdamW and the bias rule: from the gradients of the first step to the losses of the second."""
    cfg, params, golden = read(GOLDENS / "train" / "run")
    grads, _ = optim.clip(tensors(GOLDENS / "train" / "run" / "grads"), 1.0)
    trained = {name: params[name] for name in grads}
    updated, _ = optim.adamw(trained, grads, optim.init(trained), learning_rate=3e-3)
    routers = sorted(n for n in params if n.endswith("e_score_correction_bias"))
    moved = {name: bias.update(params[name], golden["load"][0, n], 0.01) for n, name in enumerate(routers)}
    found = model.losses(
        params | updated | moved,
        golden["tokens"][1],
        golden["labels"][1],
        cfg=cfg,
        mtp_depth=1,
        mtp_weight=MTP_WEIGHT,
        balance_alpha=ALPHA,
    )
    for name in ("total", "main", "mtp_per_depth", "balance_per_layer"):
        np.testing.assert_allclose(
            found[name], golden[name][1], rtol=1e-7, err_msg=name
        )  # gradients are float32
    np.testing.assert_array_equal(found["load"], golden["load"][1])


def test_bias_moves_against_the_load():
    np.testing.assert_allclose(bias.update(np.zeros(4), [1, 5, 3, 3], 0.1), [0.1, -0.1, 0.0, 0.0])


def test_adamw_and_clipping_match_torch():
    golden = np.load(GOLDENS / "train" / "adamw.npz")
    params = {n: golden[f"start_{n}"] for n in range(3)}
    state = optim.init(params)
    for step in range(5):
        grads, norm = optim.clip({n: golden[f"grad_{step}_{n}"] for n in range(3)}, 1.0)
        assert norm == pytest.approx(golden["norms"][step], rel=1e-12)
        params, state = optim.adamw(params, grads, state, learning_rate=3e-3)
    for n, value in params.items():
        np.testing.assert_allclose(value, golden[f"end_{n}"], rtol=1e-12, atol=1e-14)
    assert golden["norms"].min() < 1.0 < golden["norms"].max()


RELEASED_ROPE = {
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


def test_rope_of_the_released_model():
    assert rope.softmax_scale(RELEASED_ROPE) == pytest.approx(0.1352338, abs=5e-8)
    assert rope.correction_range(RELEASED_ROPE) == (10, 23)
    stretched, plain = (rope.inverse_frequencies(RELEASED_ROPE | s) for s in ({}, {"rope_scaling": None}))
    np.testing.assert_allclose(stretched[:11], plain[:11])
    np.testing.assert_allclose(stretched[23:], plain[23:] / 40)
    np.testing.assert_allclose(stretched[13] / plain[13], (1 - 3 / 13) + 3 / 13 / 40)
    cos, sin = rope.tables(RELEASED_ROPE, [0, 5])
    np.testing.assert_allclose(cos**2 + sin**2, 1.0)


def test_rope_turns_pairs_and_keeps_relative_positions():
    rng = np.random.default_rng(3)
    cos, sin = rope.tables(RELEASED_ROPE, np.arange(50))
    np.testing.assert_allclose(
        rope.rotate(np.array([1.0, 0.0]), np.cos([0.3]), np.sin([0.3])), [np.cos(0.3), np.sin(0.3)]
    )
    q, k = rng.standard_normal((2, 64))
    scores = rope.rotate(np.tile(q, (50, 1)), cos, sin) @ rope.rotate(np.tile(k, (50, 1)), cos, sin).T
    np.testing.assert_allclose(scores[10, 3], scores[47, 40])
    assert abs(scores[10, 3] - scores[10, 4]) > 1e-3


def test_router_by_hand():
    cfg = {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.0,
    }
    scores = np.array([0.9, 0.1, 0.6, 0.5])
    logits = np.log(scores / (1 - scores))[None, None]
    routing = moe.route(
        logits, np.zeros(4), cfg=cfg
    )  # groups score 1.0 and 1.1: the best expert of all is out
    assert routing.indices_BTK.tolist() == [[[2, 3]]]
    np.testing.assert_allclose(routing.weights_BTK[0, 0], [2 * 0.6 / 1.1, 2 * 0.5 / 1.1])
    assert routing.margin == pytest.approx(0.1)
    negative = moe.route(logits, np.array([-2.0, -2.0, -1.5, -1.5]), cfg=cfg)  # every biased score is below 0
    assert negative.indices_BTK.tolist() == [[[2, 3]]]
    np.testing.assert_allclose(
        negative.weights_BTK, routing.weights_BTK
    )  # the bias chooses, it does not weigh


def test_balance_losses_by_hand():
    scores, sent = np.array([[0.4, 0.3, 0.2, 0.1], [0.6, 0.1, 0.1, 0.2]]), np.array([[0, 1], [0, 3]])
    # f = 4 / (2 * 2) * [2, 1, 0, 1], P = [0.5, 0.2, 0.15, 0.15]
    assert balance.expert_level(scores, sent) == pytest.approx(2 * 0.5 + 0.2 + 0.15)
    # devices {0, 1} and {2, 3}: f' = [1.5, 0.5], P' = [0.7, 0.3]
    assert balance.device_level(scores, sent, 2) == pytest.approx(1.5 * 0.7 + 0.5 * 0.3)
    # both tokens reach device 0, the second also device 1: f'' = 2 / (M * 2) * [2, 1]
    assert balance.communication_level(scores, sent, 2, 1) == pytest.approx(2 * 0.7 + 1 * 0.3)
    assert balance.communication_level(scores, sent, 2, 2) == pytest.approx((2 * 0.7 + 1 * 0.3) / 2)
    # sequence-wise: the two best are {0, 1} and {0, 3}; P of scores that do not sum to 1 is normalised
    assert balance.sequence_wise(scores[None] * [[[0.5], [0.25]]], 2) == pytest.approx(2 * 0.5 + 0.2 + 0.15)
    other = np.array([[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]])  # one sequence does not blur another
    expected = (2 * 0.5 + 0.2 + 0.15 + 2 * 0.3 + 2 * 0.4) / 2
    assert balance.sequence_wise(np.stack([scores, other]), 2) == pytest.approx(expected)
    assert balance.z_loss(np.log([[1.0, 1.0], [3.0, 1.0]])) == pytest.approx(
        (math.log(2) ** 2 + math.log(4) ** 2) / 2
    )


def test_paper_schedule():
    rate = schedule.paper_learning_rate
    assert [rate(0, 0), rate(1000, 1e9), rate(2000, 1e9)] == pytest.approx([0.0, 1.1e-4, 2.2e-4])
    assert rate(9999, 9.9e12) == 2.2e-4
    assert rate(9999, 12.15e12) == pytest.approx((2.2e-4 + 2.2e-5) / 2)  # half of the cosine
    assert rate(9999, 11.075e12) == pytest.approx(
        2.2e-5 + 1.98e-4 * (0.5 + math.sqrt(0.125))
    )  # a quarter of it
    assert rate(9999, 14.3e12 - 1) == pytest.approx(2.2e-5) and rate(9999, 14.3e12 + 1e9) == 2.2e-5
    assert [rate(9999, 14.632e12), rate(9999, 14.634e12)] == [2.2e-5, 7.3e-6]
    assert schedule.END == pytest.approx(14.8e12)
    batch = [schedule.paper_batch_size(t) for t in (0, 469e9 / 2, 469e9, 1e13)]
    assert batch == [3072, 9216, 15360, 15360] and schedule.paper_batch_size(1e9, multiple=64) == 3072
    assert [schedule.paper_bias_rate(t) for t in (0, 14.29e12, 14.31e12)] == [0.001, 0.001, 0.0]
    assert [schedule.paper_mtp_weight(t) for t in (0, 9.9e12, 10.1e12)] == [0.3, 0.3, 0.1]


def test_plain_schedules():
    cosine = [
        schedule.cosine(s, peak=1.0, end=0.1, total_steps=110, warmup_steps=10)
        for s in (0, 5, 10, 60, 110, 999)
    ]
    assert cosine == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1, 0.1])
    assert [schedule.constant(s, peak=2.0, warmup_steps=4) for s in (0, 1, 4, 99)] == [0.0, 0.5, 2.0, 2.0]
    assert schedule.constant(0, peak=2.0) == 2.0
