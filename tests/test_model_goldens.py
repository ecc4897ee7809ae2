"""The model against transformers' own numbers: logits, losses, router choices and every gradient.

The goldens are of float64 runs (tests/goldens/make_hf.py, make_train.py); transformers' own float32 run
lies within 4.5e-6 of the logits and 2.3e-6 of the gradients. MTP, the sequence-wise balance loss and the
readings of MTP (documents, the state before the norm, two depths) are those of make_train.py.

Planted faults this file was seen to catch, one at a time: softmax scale not squared under YaRN; YaRN gain
1; position_ids ignored; documents dropped in the main blocks; the bias in the weights; weights always
normalised; no gradient through the router's weights; half the shared experts; eh_proj reading hidden first;
MTP fed before the norm at depth 2; MTP labels across documents; MTP losses summed; MTP's balance loss left
out; balance scores not normalised.
"""

import json

import numpy as np
import pytest
from conftest import ALPHA, GOLDENS, MTP_WEIGHT, by_published_name, golden
from safetensors.numpy import load_file

import dsv3
from dsv3.model import forward, loss_fn
from dsv3.nn.router import route

HF_CASES = ("base", "yarn", "no_q_lora", "shared2", "unnormalised", "negative_bias")
LOGITS, LOSS, GRAD = 2e-5, 1e-5, 2e-5


def nll(logits_BTW, ids_BT):
    """[B, T-1] float64: the loss of ids[t + 1] at t."""
    logits = logits_BTW[:, :-1].astype(np.float64)
    top = logits.max(-1, keepdims=True)
    log_z = top[..., 0] + np.log(np.exp(logits - top).sum(-1))
    return log_z - np.take_along_axis(logits, ids_BT[:, 1:, None], -1)[..., 0]


def assert_gradients(grads, cfg, file):
    """Each published tensor's gradient within GRAD of the golden, by its norm and by its largest element.

    A tensor that the golden loss does not reach must be exactly zero here, and so must the router biases.
    """
    expected, found = load_file(GOLDENS / file), by_published_name(grads, cfg)
    biases = {n for n in found if n.endswith("e_score_correction_bias")}
    assert set(found) == set(expected) | biases
    for name, value in found.items():
        want = expected.get(name, np.zeros_like(value)).astype(np.float64)
        assert value.shape == want.shape, name
        wrong, scale = np.abs(value - want), np.abs(want).max()
        if scale == 0:
            assert not value.any(), f"{name}: {np.abs(value).max()} where the gradient is zero"
            continue
        assert np.linalg.norm(value - want) <= GRAD * np.linalg.norm(want), f"{name}: norm"
        assert wrong.max() <= GRAD * scale, f"{name}: element off by {wrong.max()} of {scale}"


@pytest.fixture(scope="module", params=HF_CASES)
def case(request):
    """One golden case, evaluated once: loss and gradients as ``loss_fn`` has them, and logits in three
    readings.
    """
    params, cfg, arrays = golden(f"hf/{request.param}")

    def both(params, batch):
        loss, metrics = loss_fn(params, {"tokens": batch["tokens"], "labels": batch["labels"]}, cfg=cfg)
        metrics["logits"] = forward(
            params, batch["tokens"], batch["position_ids"], batch["segment_ids"], cfg=cfg
        )
        return loss, metrics

    evaluate = dsv3.value_and_grad(both, has_aux=True)
    tokens = arrays["input_ids"]
    B, T = tokens.shape
    plain = {
        "tokens": tokens,
        "labels": arrays["labels"],
        "segment_ids": np.zeros((B, T), np.int32),
        "position_ids": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy(),
    }
    (loss, metrics), grads = evaluate(params, plain)
    count = dsv3.transform.compile_count()
    logits = {"": metrics["logits"].asnumpy()}
    for name, key in (("segments", "segment_ids"), ("positions", "position_ids")):
        logits[name] = evaluate(params, plain | {key: arrays[key]})[0][1]["logits"].asnumpy()
    assert dsv3.transform.compile_count() == count
    return request.param, cfg, arrays, float(loss), metrics, grads, logits


def test_logits(case):
    _, _, arrays, _, _, _, logits = case
    assert np.abs(logits[""] - arrays["logits"]).max() <= LOGITS
    assert 0.5 < logits[""].std() < 2  # of order 1, so that the absolute tolerance means something


def test_loss_and_load(case):
    name, cfg, arrays, loss, metrics, _, _ = case
    assert abs(float(metrics["main_loss"]) - arrays["loss"]) <= LOSS
    assert (
        loss == float(metrics["loss"]) == float(metrics["main_loss"])
    )  # alpha is 0 and there is no MTP here
    assert float(metrics["mtp_loss"]) == float(metrics["balance_loss"]) == 0
    expected = [
        arrays[f"router_{layer}_load"] for layer in range(cfg.num_hidden_layers) if cfg.is_moe_layer(layer)
    ]
    np.testing.assert_array_equal(metrics["load"].asnumpy(), expected)


def test_token_losses_under_documents_and_positions(case):
    _, _, arrays, _, _, _, logits = case
    for name, key in (("", "nll"), ("segments", "nll_segments"), ("positions", "nll_positions")):
        assert np.abs(nll(logits[name], arrays["input_ids"]) - arrays[key]).max() <= LOGITS, key
    assert np.abs(arrays["nll_segments"] - arrays["nll"]).max() > 0.1  # the readings differ
    assert np.abs(arrays["nll_positions"] - arrays["nll"]).max() > 0.1


def test_gradients(case):
    name, cfg, _, _, _, grads, _ = case
    assert_gradients(grads, cfg, f"hf/{name}/grads.safetensors")


@pytest.mark.parametrize("name", ["base", "unnormalised", "negative_bias"])
def test_router_choices(name):
    """The golden router logits pass through an identity weight, so that the choice alone is judged."""
    params, cfg, arrays = golden(f"hf/{name}")

    def choose(router, logits_TE):
        return route(router, logits_TE, cfg=cfg)

    choose = dsv3.jit(choose)
    for layer in range(cfg.first_k_dense_replace, cfg.num_hidden_layers):
        logits = arrays[f"router_{layer}_logits"].astype(np.float32)
        router = {
            "w": np.eye(cfg.n_routed_experts, dtype=np.float32),
            "bias": params["layers"][layer]["router"]["bias"],
        }
        idx, weights, scores, found = (x.asnumpy() for x in choose(router, logits))
        order = idx.argsort(1)
        np.testing.assert_array_equal(np.take_along_axis(idx, order, 1), arrays[f"router_{layer}_indices"])
        np.testing.assert_allclose(
            np.take_along_axis(weights, order, 1), arrays[f"router_{layer}_weights"], rtol=1e-5
        )
        np.testing.assert_array_equal(found, logits)
        # MindSpore's CPU sigmoid is right to some 2e-6, relatively; the least margin of a choice is 5e-4
        np.testing.assert_allclose(scores, 1 / (1 + np.exp(-arrays[f"router_{layer}_logits"])), rtol=1e-5)


# -- multi-token prediction ----------------------------------------------------------------------------------
def assert_losses(metrics, arrays, prefix="", row=()):
    """main, mtp, balance, loss and load of a record of the golden training run."""
    expected = {k: np.asarray(arrays[prefix + k])[row] for k in ("main", "total", "load")}
    mtp = arrays[prefix + "mtp_per_depth"][row].mean()
    balance = ALPHA * arrays[prefix + "balance_per_layer"][row].sum()
    assert abs(float(metrics["main_loss"]) - expected["main"]) <= LOSS
    assert abs(float(metrics["mtp_loss"]) - mtp) <= LOSS
    assert abs(float(metrics["balance_loss"]) - balance) <= LOSS * ALPHA
    assert abs(float(metrics["loss"]) - expected["total"]) <= LOSS
    assert abs(expected["total"] - (expected["main"] + MTP_WEIGHT * mtp + balance)) <= 1e-12
    np.testing.assert_array_equal(metrics["load"].asnumpy(), expected["load"])


def test_mtp_losses_and_gradients(run):
    batch = {"tokens": run.arrays["tokens"][0], "labels": run.arrays["labels"][0]}
    (_, metrics), grads = run.value_and_grad(run.params, batch)
    assert_losses(metrics, run.arrays, row=0)
    assert_gradients(grads, run.cfg, "train/run/grads.safetensors")


def test_mtp_of_documents(run):
    """Labels left out: those that lie in another document are dropped by ``segment_ids`` alone."""
    cfg = run.cfg

    def without_balance(params, batch):
        loss, metrics = loss_fn(params, batch, cfg=cfg)
        return loss - metrics["balance_loss"], metrics

    batch = {
        "tokens": run.arrays["tokens"][0],
        "labels": run.arrays["segments_labels"],
        "segment_ids": run.arrays["segment_ids"],
    }
    (_, metrics), grads = dsv3.value_and_grad(without_balance, has_aux=True)(run.params, batch)
    assert_losses(metrics, run.arrays, "segments_")
    assert_gradients(grads, cfg, "train/run/grads_segments.safetensors")


def test_two_depths():
    params, cfg, arrays = golden("train/depth2")

    def both(params, batch):
        loss, metrics = loss_fn(params, batch, cfg=cfg)
        metrics["pre_norm"] = loss_fn(params, batch, cfg=cfg, mtp_prenorm=True)[1]
        return loss, metrics

    batch = {"tokens": arrays["tokens"], "labels": arrays["labels"]}
    (_, metrics), grads = dsv3.value_and_grad(both, has_aux=True)(params, batch)
    assert_losses(metrics, arrays)
    assert_losses(metrics["pre_norm"], arrays, "pre_norm_")
    assert_gradients(grads, cfg, "train/depth2/grads.safetensors")


def test_goldens_are_tight():
    """The goldens' own float32 runs are closer than the tolerances here, by a factor of four at least."""
    for name in HF_CASES:
        facts = json.loads((GOLDENS / "hf" / name / "golden.json").read_text())
        assert facts["float32_logits_max_abs_difference"] < LOGITS / 4
        assert facts["float32_grads_worst_relative_difference"] < GRAD / 4
        assert facts["min_router_margin"] > 4e-4  # no choice hangs on rounding
