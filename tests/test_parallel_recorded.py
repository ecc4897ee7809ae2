"""Steps that Python drives over several graphs: recorded on simulated ranks, replayed on all of them in lockstep.

Planted faults this file was seen to catch: a graph counted once however often it is called; a rank that waits for a message taken
for one that is at a collective; the first tensor that a graph assigns to not written back.
"""
import threading

import numpy as np
import parallel_targets as targets
import pytest

from dsv3 import transform
from dsv3.parallel import recorded, simulate

STEPS = 3


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Of the two ranks of ``driven``, with their programs."""
    folder = tmp_path_factory.mktemp("driven")
    return simulate.simulate_ranks("parallel_targets:record_driven", {}, 2, export=True, keep=folder)


def test_replayed_steps_equal_those_of_numpy(reports):
    """The last step too, so what graphs assign to their arguments, and what Python adds up between them, is kept."""
    losses, w = targets.driven_numpy(STEPS)
    for found, weights, heard in recorded.replay(lambda: targets.driven(STEPS), reports):
        np.testing.assert_allclose([loss.asnumpy() for loss in found], losses, rtol=1e-5)
        np.testing.assert_allclose(weights.asnumpy(), w, rtol=1e-5)
        np.testing.assert_allclose(heard.asnumpy(), w, rtol=1e-5)
    assert transform.runner is transform.run_graph


def test_report_counts_every_call(reports):
    """Two micro-batches a step, each with the sum of a scalar and of a gradient; one message."""
    for rank, report in enumerate(reports):
        assert [(g.name, g.calls) for g in report.graphs] == [("add", 2), ("apply", 1), ("talk", 1)]
        assert report.graphs[0].outline == {"loss": 0, "parts": [0, 0]}
        found = sorted((c.kind, c.shape, c.bytes, c.group, c.count) for c in report.collectives)
        message = ("Send", "Receive")[rank], (targets.WIDTH,), 4 * targets.WIDTH, (0, 1), 1
        assert found == sorted([("AllReduce", (), 4, (0, 1), 2), ("AllReduce", (targets.WIDTH,), 24, (0, 1), 2), message])


@pytest.mark.parametrize("fault, error, words", [
    ("skip", RuntimeError, r"for ever: rank 0 in AllReduce of \[0, 1\].*; rank 1 in Receive of \[0, 1\] \(tag 0, in the mail"),
    ("raise", ValueError, "rank 1 stumbles"),
    ("other", RuntimeError, "rank 0 calls add as its graph 3, of which nothing more than 3 graphs was recorded"),
])
def test_wrong_steps_are_refused_and_leave_no_thread(reports, fault, error, words):
    before = threading.active_count()
    with pytest.raises(error, match=words):
        recorded.replay(lambda: targets.driven(STEPS, fault), reports)
    assert threading.active_count() == before and transform.runner is transform.run_graph
