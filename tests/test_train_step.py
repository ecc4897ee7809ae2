"""Training steps against twelve steps of torch in float64 (tests/goldens/make_train.py), in every form we
have.

Tolerances: torch's own float32 run of the same twelve steps ends 8.5e-6 from the float64 weights
(golden.json), which move by up to 0.12, and 1e-6 from its losses; we allow 5e-5 and 1e-5. Every router
choice is clear by 2e-4, so that loads must be equal exactly.

Planted faults this file was seen to catch, one at a time: gradients that are not finite written by the
fused kernel (found, not planted), by the pure update, or with an infinite norm clipped to 0; biases moved
by such a step; recompute that does not compile (found); the load of the last part only; parts divided by
their own counts; sums not cleared after a step; bias corrections one step late; the bias moved the wrong
way, or by another layer's load; clipping dropped; decay of vectors; the MTP weight of step 0 for ever; a
loop that forgets the count, or saves nothing when it stops.
"""

import numpy as np
import pytest
from conftest import ALPHA, by_published_name, golden, golden_final
from oracles import bias as bias_oracle

import dsv3
from dsv3.schedule import Piece, Schedule
from dsv3.train import NotFinite, make_eval_step, make_train_step, mean_loss, split_rows, train
from dsv3.transform import compile_count

LR, RATE, STEPS = 3e-3, 0.01, 12
WEIGHT, LOSS = 5e-5, 1e-5


def start():
    """A fresh copy of the golden start (steps change it in place), its optimiser's state, the optimiser."""
    params, cfg, _ = golden("train/run")
    opt = dsv3.adamw(LR)
    return params, cfg, opt, opt.init(params)


def batch_of(arrays, step):
    """One golden batch."""
    return {"tokens": arrays["tokens"][step], "labels": arrays["labels"][step]}


def assert_metrics(metrics, arrays, step):
    """Every number of one step."""
    balance = ALPHA * arrays["balance_per_layer"][step].sum()
    expected = {
        "loss": arrays["total"][step],
        "main_loss": arrays["main"][step],
        "balance_loss": balance,
        "mtp_loss": arrays["mtp_per_depth"][step].mean(),
        "grad_norm": arrays["grad_norm"][step],
    }
    for name, value in expected.items():
        assert abs(float(metrics[name]) - value) <= LOSS, (
            f"step {step}: {name} {float(metrics[name])}, not {value}"
        )
    np.testing.assert_array_equal(metrics["load"].asnumpy(), arrays["load"][step])


def biases(params):
    """[MoE layers incl. MTP, E]."""
    return np.stack(
        [b["router"]["bias"].asnumpy() for b in (*params["layers"], *params["mtp"]) if "router" in b]
    )


def assert_final(params, cfg, tmp_path):
    """The weights after the twelfth step."""
    expected, found = by_published_name(golden_final(tmp_path)[0], cfg), by_published_name(params, cfg)
    worst = {name: float(np.abs(found[name] - expected[name]).max()) for name in expected}
    assert max(worst.values()) <= WEIGHT, sorted(worst.items(), key=lambda item: -item[1])[:5]


def snapshot(*trees):
    """Copies on the host, path -> array."""
    return dict(dsv3.tree.paths(dsv3.tree.to_numpy(trees)))


def run_golden(step, params, state, arrays, steps=STEPS, after=None):
    """Do golden steps; check metrics, donation, count, biases and that nothing is compiled twice."""
    leaves = [leaf for _, leaf in dsv3.tree.paths((params, state["m"], state["v"]))]
    expected = biases(params)
    for i in range(steps):
        count = compile_count()
        out, state, metrics = step(params, state, batch_of(arrays, i))
        assert i == 0 or compile_count() == count, f"step {i} compiled"
        assert out is params and int(state["step"].asnumpy()) == i + 1
        now = [leaf for _, leaf in dsv3.tree.paths((params, state["m"], state["v"]))]
        assert all(a is b for a, b in zip(leaves, now)), "donation: the same tensors, changed"
        assert metrics["learning_rate"] == pytest.approx(LR)
        assert_metrics(metrics, arrays, i)
        expected = bias_oracle.update(expected, arrays["load"][i], RATE)
        np.testing.assert_allclose(biases(params), expected, atol=1e-6)
        if after:
            after(i, params, state)
    return state


@pytest.fixture(scope="module")
def fused(run):
    """The fused step, after the golden run: (step, params, state, cfg, snapshot after 3 steps, snapshot at
    the end).
    """
    params, cfg, opt, state = start()
    step = make_train_step(cfg, opt, bias_update_rate=RATE)
    kept = {}

    def keep(i, params, state):
        if i in (2, STEPS - 1):
            kept[i + 1] = snapshot(params, state)

    state = run_golden(step, params, state, run.arrays, after=keep)
    return step, params, state, cfg, kept


def test_fused_run(fused, tmp_path):
    _, params, _, cfg, _ = fused
    assert_final(params, cfg, tmp_path)


def test_accumulated_run(run, tmp_path):
    params, cfg, opt, state = start()
    step = make_train_step(cfg, opt, bias_update_rate=RATE, accumulate=2)
    state = run_golden(step, params, state, run.arrays)
    assert_final(params, cfg, tmp_path)
    with pytest.raises(ValueError, match="3 rows does not divide into accumulate=2"):
        step(params, state, {k: v[:3] for k, v in batch_of(run.arrays, 0).items()})
    assert_skips_nonfinite(step, params, state, run.arrays)


def assert_skips_nonfinite(step, params, state, arrays):
    """An infinite weight makes gradients that are not finite: such a step changes the count and nothing else.

    The next step, with the weight mended, is one of a state in which nothing went wrong.
    """
    leaf = params["layers"][0]["mlp"]["w_up"]
    good = leaf.asnumpy().copy()
    bad = good.copy()
    bad[1, 2] = np.inf
    leaf.assign_value(dsv3.transform.Tensor(bad))
    before = snapshot(params, state)
    _, after, metrics = step(params, state, batch_of(arrays, 0))
    assert not np.isfinite(float(metrics["grad_norm"]))
    found = snapshot(params, after)
    assert int(found.pop("1.step")) == int(before.pop("1.step")) + 1
    for path, value in before.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    leaf.assign_value(dsv3.transform.Tensor(good))
    _, _, metrics = step(params, after, batch_of(arrays, 1))
    assert np.isfinite(float(metrics["grad_norm"])) and float(metrics["grad_norm"]) < 20
    moved = snapshot(params, after)
    assert all(np.isfinite(value).all() for value in moved.values())
    assert np.abs(moved["0.layers.0.mlp.w_up"] - good).max() > 1e-5


def test_recompute_and_schedules(run, fused):
    """With recomputed blocks three steps give the same params, moments and biases: no load is counted twice.

    The fourth step sees the schedules move on.
    """
    params, cfg, _, _ = start()
    end = 8

    def switch(first, last):
        return Schedule((Piece(0, 3, first, first), Piece(3, end, last, last)))

    opt = dsv3.adamw(switch(LR, LR / 3))
    state = opt.init(params)
    step = make_train_step(
        cfg, opt, recompute=True, bias_update_rate=switch(RATE, 0.0), mtp_weight=switch(0.3, 0.1)
    )
    state = run_golden(step, params, state, run.arrays, steps=3)
    for path, value in snapshot(params, state).items():
        np.testing.assert_allclose(value, fused[4][3][path], rtol=1e-4, atol=2e-6, err_msg=path)
    before = biases(params)
    _, _, metrics = step(params, state, batch_of(run.arrays, 3))
    np.testing.assert_array_equal(biases(params), before)
    assert metrics["learning_rate"] == pytest.approx(LR / 3)
    assert abs(float(metrics["main_loss"]) - run.arrays["main"][3]) <= LOSS
    found = {name: float(metrics[name]) for name in ("loss", "main_loss", "mtp_loss", "balance_loss")}
    parts = found["main_loss"] + 0.1 * found["mtp_loss"] + found["balance_loss"]
    assert abs(found["loss"] - parts) <= 2e-6


def test_pure_updates(run, tmp_path):
    """The same run written out: value_and_grad, opt.update, the bias rule; nothing is changed in place."""
    params, cfg, opt, state = start()
    first, first_state = params, state
    kept = snapshot(params, state)
    for i in range(STEPS):
        count = compile_count()
        (_, metrics), grads = run.value_and_grad(params, batch_of(run.arrays, i))
        assert dsv3.tree.same_structure(grads, params)
        params, state = opt.update(grads, state, params)
        assert i == 0 or compile_count() == count, f"step {i} compiled"
        assert dsv3.tree.same_structure((params, state), (first, first_state))
        moved = bias_oracle.update(biases(params), metrics["load"].asnumpy(), RATE).astype(np.float32)
        for block, bias in zip([b for b in (*params["layers"], *params["mtp"]) if "router" in b], moved):
            block["router"]["bias"] = dsv3.transform.Tensor(bias)
        assert abs(float(metrics["loss"]) - run.arrays["total"][i]) <= LOSS
        np.testing.assert_array_equal(metrics["load"].asnumpy(), run.arrays["load"][i])
    assert_final(params, cfg, tmp_path)
    assert int(state["step"].asnumpy()) == STEPS
    for path, value in snapshot(first, first_state).items():
        np.testing.assert_array_equal(value, kept[path], err_msg=path)

    before, norm = snapshot(params, state), grads["norm"]
    count = before.pop("1.step")
    for bad in (
        float("nan"),
        float("inf"),
    ):  # a norm that is infinite would otherwise clip everything to 0 * inf
        grads["norm"] = dsv3.transform.Tensor(norm.asnumpy() * np.float32(bad))
        found = snapshot(*opt.update(grads, state, params))
        assert int(found.pop("1.step")) == int(count) + 1
        for path, value in before.items():
            np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_evaluation_changes_nothing(run, tmp_path):
    """The golden final weights score as they should; params and biases are left alone, however often."""
    params, cfg = golden_final(tmp_path)
    before = snapshot(params)
    evaluate = make_eval_step(cfg)
    batch = {"tokens": run.arrays["final_tokens"], "labels": run.arrays["final_labels"]}
    for _ in range(2):
        metrics = evaluate(params, batch)
        assert abs(float(metrics["loss"]) - run.arrays["final_total"]) <= LOSS
        assert abs(float(metrics["mtp_loss"]) - run.arrays["final_mtp_per_depth"].mean()) <= LOSS
        np.testing.assert_array_equal(metrics["load"].asnumpy(), run.arrays["final_load"])
    mean = mean_loss(evaluate, params, [batch, batch])
    assert mean["loss"] == pytest.approx(float(metrics["loss"])) and mean["balance"] > 1
    for path, value in snapshot(params).items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)
    with pytest.raises(ValueError, match="no batch to evaluate on"):
        mean_loss(evaluate, params, [])


def test_fused_step_skips_nonfinite(run, fused):
    """Last of those that use ``fused``, whose state it changes."""
    step, params, state, _, _ = fused
    count = compile_count()
    assert_skips_nonfinite(step, params, state, run.arrays)
    assert compile_count() == count


# -- around the step -----------------------------------------------------------------------------------------
def test_refusals():
    cfg, opt = dsv3.TINY, dsv3.adamw()
    with pytest.raises(ValueError, match="mesh=.*expected a dsv3.parallel.Mesh"):
        make_train_step(cfg, opt, mesh=object())
    with pytest.raises(ValueError, match="accumulate=0; expected at least 1"):
        make_train_step(cfg, opt, accumulate=0)
    with pytest.raises(ValueError, match="5 rows .* accumulate=2"):
        split_rows({"tokens": np.zeros((5, 8), np.int32)}, 2, cfg)
    with pytest.raises(ValueError, match="on_nonfinite='ignore'; expected 'stop' or 'skip'"):
        train(None, {}, {}, iter(()), steps=1, log=print, on_nonfinite="ignore")


def fake_step(bad=()):
    """A step that counts and whose loss is not finite at the numbers in ``bad``."""

    def step(params, state, batch):
        count = int(state["step"].asnumpy()) + 1
        loss = float("nan") if count in bad else 1.0 / count
        metrics = {
            "loss": loss,
            "main_loss": loss,
            "grad_norm": 1.0,
            "learning_rate": 0.1,
            "load": dsv3.transform.Tensor(np.array([[3, 1], [2, 2]], np.int32)),
        }
        return params, {"step": dsv3.transform.Tensor(np.array(count, np.int32))}, metrics

    return step


def loop(steps, start=0, bad=(), **settings):
    """(records, saves) of a run of ``train`` with a fake step."""
    records, saves = [], []
    batch = {"tokens": np.zeros((2, 8), np.int32)}
    state = {"step": dsv3.transform.Tensor(np.array(start, np.int32))}
    settings.setdefault(
        "save", lambda step, params, state: saves.append((step, int(state["step"].asnumpy())))
    )
    try:
        train(fake_step(bad), {}, state, iter([batch] * 20), steps=steps, log=records.append, **settings)
    except NotFinite as error:
        records.append(str(error))
    return records, saves


def test_loop_logs_evaluates_and_saves():
    records, saves = loop(5, start=1, save_every=2, evaluate=lambda params: {"loss": 7.0}, eval_every=3)
    assert [r["step"] for r in records] == [2, 3, 3, 4, 5, 5]
    assert records[0] | {"seconds": 0} == {
        "loss": 0.5,
        "main_loss": 0.5,
        "grad_norm": 1.0,
        "learning_rate": 0.1,
        "balance": 1.5,
        "step": 2,
        "tokens": 16,
        "seconds": 0,
    }
    assert records[2] == {"step": 3, "eval_loss": 7.0}
    assert saves == [(2, 2), (4, 4), (5, 5)]
    assert loop(9, should_stop=lambda: True)[1] == [(1, 1)]


def test_loop_stops_or_skips_when_not_finite():
    records, saves = loop(6, bad=(3,))
    assert len(records) == 4 and records[2]["skipped"] and "step 3: loss nan" in records[3]
    assert saves == [(3, 3)]
    records, saves = loop(4, bad=(3,), on_nonfinite="skip")
    assert [r.get("skipped", False) for r in records] == [False, False, True, False] and saves == [(4, 4)]
