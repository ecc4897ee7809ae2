"""Expert parallelism: every way in which tokens meet their experts, against one device.

Real processes (msrun on the CPU) run one mixture of experts forward and backward on many meshes; programs for Ascend are
interpreted in lockstep. Planted faults this file was seen to catch: answers sent by the counts of the way there; every rank of
a tensor group seeing to the first part of their tokens.
"""
import collections
import functools
import json

import numpy as np
import pytest
from cluster import run_ranks
from experts_worker import ROUTES, inputs, run, run_all

import dsv3
from dsv3.nn.dispatch import form_of, ranks_visited
from dsv3.nn.moe import moe_spec
from dsv3.parallel import lockstep, lockstep_ops
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.recorded import replay
from dsv3.parallel.rules import local_slices, make_rules
from dsv3.parallel.shard import Placement
from dsv3.parallel.simulate import simulate_ranks
from dsv3.spec import is_spec
from dsv3.tree import paths

CHANGES = {"hidden_size": 16, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3,
           "moe_intermediate_size": 12, "n_shared_experts": 1}
EP4, TP2, SP = "data=4,expert=4", "data=2,model=2,expert=2", {"sequence_parallel": True}
JOBS = {  # mesh, rules, router, and of how many rows of how many tokens
    "chosen by bytes: alltoall": (EP4, {}, None, 4, 8),
    "two levels, all to one node": (EP4, {"dispatch": "two_level", "node": 2}, "to_the_first", 4, 8),
    "cut experts, gather, sequence parallel": (TP2, SP | {"dispatch": "gather"}, None, 4, 8),
    "extend, two levels, sequence parallel": (TP2, SP | {"experts": "extend", "node": 2}, None, 4, 8),
    "extend, tokens that do not divide": ("model=4", {"experts": "extend"}, None, 3, 7),
    "whole": (TP2, {"experts": "whole", "dispatch": "alltoall"}, None, 4, 8),
}
SLOW = ("two levels, all to one node", "cut experts, gather, sequence parallel", "whole")  # of whose parts others are made
SIMULATED = {
    "alltoall, all to one rank": ("data=2,expert=2", {"dispatch": "alltoall"}, "to_the_first", 4, 8),
    "gather": ("data=2,expert=2", {"dispatch": "gather"}, None, 4, 8),
}


def as_jobs(jobs):
    """For the worker."""
    return [dict(zip(("mesh", "rules", "route", "rows", "length"), job), name=name) for name, job in jobs.items()]


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """Where the ranks left what they found, after all jobs that are asked for ran in one start of four processes."""
    out, asked = tmp_path_factory.mktemp("experts"), [item.callspec.params.get("job") for item in request.session.items
                                                      if item.path == request.path and hasattr(item, "callspec")]
    run_ranks(out, 4, "experts_worker.py", json.dumps(as_jobs({k: v for k, v in JOBS.items() if k in asked})),
              json.dumps(CHANGES), out)
    return out


@functools.cache
def one_device(route, rows, length):
    """The same on one device."""
    cfg = dsv3.TINY.replace(**CHANGES)
    return run(cfg, ROUTES[route], *inputs(cfg, rows, length))


@pytest.mark.parametrize("job", [pytest.param(job, marks=pytest.mark.slow if job in SLOW else ()) for job in JOBS])
def test_processes_together_are_one_device(folder, job):
    assert_equal(JOBS[job], [np.load(folder / f"{job}_{rank}.npz") for rank in range(4)])


def assert_equal(job, found):
    """What every rank found is its part of what one device finds."""
    text, arguments, route, rows, length = job
    mesh, rules, wanted = Mesh.parse(text), make_rules(**arguments), one_device(route, rows, length)
    for rank, ours in enumerate(found):
        coords, n = mesh.coords(rank), rows // mesh.data
        i = mesh.index(coords, ("data",)) * n
        np.testing.assert_array_equal(ours["load"], wanted["load"])
        np.testing.assert_allclose(ours["aux"], wanted["aux"], rtol=1e-5)
        for key in ("y", "dx"):
            close(ours[key], wanted[key][i : i + n], key)
        for path, spec in paths(moe_spec(dsv3.TINY.replace(**CHANGES)), is_spec):
            close(ours[f"d {path}"], wanted[f"d {path}"][local_slices(spec, mesh, rules, coords, path)], path)


def close(found, wanted, what):
    """Within 1e-5 of the largest."""
    assert found.shape == wanted.shape and np.abs(found - wanted).max() <= 1e-5 * max(np.abs(wanted).max(), 1e-30), what


def test_programs_for_ascend_together_are_one_device(tmp_path, monkeypatch):
    """Exchanges of as many rows as the data want and CANN's grouped products, interpreted as documented: what follows the last
    group is not a number there."""
    reports = simulate_ranks("experts_worker:record", {"jobs": as_jobs(SIMULATED), "changes": CHANGES}, 2, keep=tmp_path,
                             export=True)
    rows, exchange = collections.Counter(), lockstep.COLLECTIVE["AlltoAllV"]

    def counted(here, values):
        width = here.node.attrs["block_size"]
        rows[width, tuple(int(sent.sum()) // width for _, sent, _ in values)] += 1
        return exchange(here, values)

    monkeypatch.setitem(lockstep.COLLECTIVE, "AlltoAllV", counted)
    found = replay(functools.partial(run_all, as_jobs(SIMULATED), CHANGES), reports)
    for name, job in SIMULATED.items():
        assert_equal(job, [ours[name] for ours in found])
    # A rank's 16 tokens go to rank 0 once each, though three experts there are theirs, and a row of its own to itself; all that
    # comes goes back; then gradients do the same.
    D, choice = CHANGES["hidden_size"], 2 * CHANGES["num_experts_per_tok"]
    assert rows == {(D, (17, 17)): 2, (D, (33, 1)): 2, (choice, (17, 17)): 1, (choice, (33, 1)): 1}


def test_the_form_is_that_of_the_fewest_rows():
    """Of the 671B: 8 experts of 256 in 4 of 8 groups."""
    assert [ranks_visited(n, 8, 8, 4) for n in (2, 4, 8, 16, 32, 64)] == [2, 4, 4, 8, 8, 8]
    assert ranks_visited(64, 8, 1, 1) == 8  # a router without groups
    assert [form_of(n, ranks_visited(n, 8, 8, 4)) for n in (2, 4, 8, 64)] == ["gather", "gather", "alltoall", "alltoall"]


def test_refusals():
    with pytest.raises(ValueError, match="dispatch='ring'; expected None or one of gather, alltoall, two_level"):
        make_rules(dispatch="ring")
    with pytest.raises(ValueError, match="without node"):
        make_rules(dispatch="two_level")
    with pytest.raises(ValueError, match="node=3 does not divide the 4 ranks that share the experts; expected one of 1, 2, 4"):
        Placement(Mesh.parse(EP4), make_rules(dispatch="two_level", node=3))
    with pytest.raises(ValueError, match="experts over"):
        Placement(Mesh.parse(EP4), make_rules().replace("expert", ("replica",)))


def test_lockstep_multiplies_groups_as_documented():
    """The example of MindSpore's documentation of grouped_matmul_v4, and the gradient of its weights by finite differences."""
    def apply(x, w, groups, kind, as_counts):
        rest = [None] * 6 + [np.array(groups)] + [None] * 3 + [3, kind, as_counts, 0, None]
        return lockstep_ops.PRIMITIVES["GroupedMatmulV4"](None, (x,), (w,), *rest)[0]

    x = np.array([0, 1, 2, 2, 1, 1], np.float32)[:, None] * np.ones((1, 4), np.float32)
    w = np.arange(32, dtype=np.float32).reshape(4, 4, 2)
    out = [[0, 0], [44, 48], [88, 96], [152, 160], [108, 112], [108, 112]]
    np.testing.assert_array_equal(apply(x, w, [1, 2, 1, 2], 0, 1), out)
    np.testing.assert_array_equal(apply(x, w, [1, 3, 4, 6], 0, 0), out)
    assert np.isnan(apply(x, w, [1, 3, 4, 5], 0, 0)[5]).all()
    rng = np.random.default_rng(0)
    x, w, dout = rng.standard_normal((6, 4)), rng.standard_normal((3, 4, 2)), rng.standard_normal((6, 2)).astype(np.float32)
    step = np.zeros_like(w)
    step[2, 1, 0] = 1
    dw = apply(x.T, dout, [2, 2, 6], 2, 0)  # the second group has no rows
    slope = (dout * (apply(x, w + step, [2, 2, 6], 0, 0) - apply(x, w - step, [2, 2, 6], 0, 0)) / 2).sum()  # linear in w
    np.testing.assert_allclose(dw[2, 1, 0], slope, rtol=1e-5)
    np.testing.assert_array_equal(dw[1], np.zeros((4, 2)))
