"""Sampling against transformers' own processors, against what was asked, and against statistics.

Planted faults this file was seen to catch, one at a time:
min_p of the sum in place of the highest; top_p without the id that reaches it; a draw that forgets its place; a penalty
that makes negative logits likelier.
"""

from pathlib import Path

import numpy as np
import pytest

from dsv3.sampling import Sampling, choose, log_probabilities, probabilities

GOLDEN = np.load(Path(__file__).parent / "goldens" / "generate.npz")
CASES = sorted({int(k.split("_")[1]) for k in GOLDEN if k.startswith("filter_")})
FIELDS = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")


@pytest.mark.parametrize("i", CASES)
def test_what_transformers_leaves(i):
    settings = dict(zip(FIELDS, GOLDEN[f"filter_{i}_settings"].tolist()))
    sampling = Sampling(**settings | {"top_k": int(settings["top_k"])})
    ids, p = probabilities(GOLDEN[f"filter_{i}_logits"], sampling, GOLDEN[f"filter_{i}_seen"].tolist())
    found = np.zeros(64)
    found[ids] = p
    np.testing.assert_allclose(found, GOLDEN[f"filter_{i}_p"], rtol=1e-12, atol=1e-15)
    assert (np.diff(ids) > 0).all()


def test_greedy_takes_the_first_of_equals_after_the_penalty():
    logits = np.array([1.0, 3.0, 3.0, 2.9, -1.0])
    assert choose(logits, Sampling(), 0, 0) == 1
    assert choose(logits, Sampling(repetition_penalty=1.1), 0, 0, {1, 2}) == 3
    assert choose(-logits, Sampling(repetition_penalty=3.0), 0, 0, {4, 0}) == 4  # 1 -> 1/3, still the highest
    assert choose(np.array([-1.0, -2.0]), Sampling(repetition_penalty=3.0), 0, 0, {0}) == 1  # -1 -> -3: never likelier
    assert choose(logits, Sampling(temperature=2.0, top_k=1), 5, 0) in (1, 2)  # equals of the last that stays stay


def test_draws_follow_the_probabilities():
    """20,000 draws of a filtered distribution: chi-squared below its 99.99 % point of 5 degrees, 25.7."""
    logits, sampling = np.array([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -9.0]), Sampling(temperature=0.8, top_k=6)
    ids, p = probabilities(logits, sampling)
    drawn = np.bincount([choose(logits, sampling, 7, i) for i in range(20000)], minlength=7)
    assert drawn[6] == 0
    assert ((drawn[ids] - 20000 * p) ** 2 / (20000 * p)).sum() < 25.7


def test_a_draw_depends_on_seed_and_place_alone():
    logits, sampling = np.random.default_rng(0).standard_normal(50), Sampling(temperature=1.5)
    def texts(seed):
        return [choose(logits, sampling, seed, i) for i in range(40)]
    assert texts(1) == texts(1) != texts(2)
    assert len(set(texts(1))) > 10
    np.random.seed(0)
    nudged = logits + np.random.default_rng(1).standard_normal(50) * 1e-7
    assert [choose(nudged, sampling, 1, i) for i in range(40)] == texts(1)


def test_log_probabilities():
    logits = np.array([0.5, 2.0, -1.0, 2.0])
    logs = logits - np.log(np.exp(logits).sum())
    chosen, top = log_probabilities(logits, 2, 3)
    assert chosen == pytest.approx(logs[2], rel=1e-12)
    assert [i for i, _ in top] == [1, 3, 0] and [v for _, v in top] == pytest.approx(logs[[1, 3, 0]].tolist())
    assert log_probabilities(logits, 0, 0)[1] == () and len(log_probabilities(logits, 0, 9)[1]) == 4


@pytest.mark.parametrize("field, value", [("max_new_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")),
                                          ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("min_p", -0.1),
                                          ("repetition_penalty", 0.0),
                                          ("repetition_penalty", float("inf")), ("seed", -1), ("logprobs", -2)])
def test_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"^{field}="):
        Sampling(**{field: value})
