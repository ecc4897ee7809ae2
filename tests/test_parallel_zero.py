"""ZeRO 1, 2 and 3, gradient accumulation, recompute and bfloat16 on a mesh, against one device.

In real processes of the CPU, whose ReduceScatter and AllGather are made of sums; and, with Ascend's own, in lockstep.
Planted faults this file was seen to catch: masters that are not updated; a norm that counts a rank's part as a whole leaf.
"""
import functools
import json

import mindspore as ms
import numpy as np
import pytest
from test_parallel_numbers import CHANGES, LENGTH, RATE, ROWS, STEPS, on_one_device
from test_parallel_processes import assert_equal, launch

import dsv3
from dsv3.cli.rank import run_steps
from dsv3.model import param_specs
from dsv3.optim import is_state
from dsv3.parallel.memory import Run, leaf_bytes
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.recorded import array_of, replay
from dsv3.parallel.rules import leaves, local_slices, make_rules
from dsv3.parallel.shard import Placement
from dsv3.parallel.simulate import simulate_ranks
from dsv3.parallel.traffic import of_program, traffic
from dsv3.parallel.update import check_state
from dsv3.spec import is_spec
from dsv3.tree import paths

# one MoE block; q_lora 33: wq_b [33, 192] and q_norm [33] do not divide by 2 and stay whole
ODD = CHANGES | {"q_lora_rank": 33, "num_hidden_layers": 1, "first_k_dense_replace": 0}


@functools.cache
def alone(changes, accumulate):
    """``on_one_device`` for changes as pairs."""
    return on_one_device(dsv3.TINY.replace(**dict(changes)), accumulate=accumulate)


def assert_bytes(folder, mesh, table, changes, dtype="float32"):
    """Every rank's params and optimiser state are as large as the plan says, leaves that are cut and whole ones."""
    held = list(leaves(param_specs(dsv3.TINY.replace(**changes)), mesh, table))
    assert len({leaf.shards for leaf in held}) > 1
    weights, _, state = (sum(column) for column in zip(*(leaf_bytes(leaf, table, Run(dtype=dtype)) for leaf in held)))
    for rank in range(mesh.size):
        assert json.loads((folder / f"bytes_{rank}.json").read_text()) == {"params": weights, "state": state}


PROCESSES = {
    "dp4 ZeRO-1 in twos, selective recompute": ("data=4", {"zero": 1, "shard_size": 2}, {"recompute": "selective"}),
    "dp2 tp2 ZeRO-3, accumulate": ("data=2,model=2", {"zero": 3}, {"accumulate": 2}),
    "dp2 ZeRO-3, accumulate, recompute": ("data=2", {"zero": 3}, {"accumulate": 2, "recompute": True}),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if "dp2 ZeRO-3" in c else pytest.mark.slow) for c in PROCESSES])
def test_processes(tmp_path, case):
    text, rules, options = PROCESSES[case]
    mesh, cfg, table = Mesh.parse(text), dsv3.TINY.replace(**ODD), make_rules(**rules)
    wanted, final = alone(tuple(ODD.items()), options.get("accumulate", 1))
    launch(tmp_path, mesh, ODD, rules, options=options)
    assert_equal(tmp_path, mesh, cfg, wanted, final, table)
    assert_bytes(tmp_path, mesh, table, ODD)


def test_bfloat16_params_have_float32_masters_of_a_rank_s_parts(tmp_path):
    """Gradients are rounded to bfloat16 on each rank, before they are summed: hence the tolerance."""
    rules = {"zero": 1}
    mesh, cfg, table = Mesh.parse("data=2"), dsv3.TINY.replace(**ODD), make_rules(**rules)
    wanted, final = on_one_device(cfg, dtype="bfloat16")
    launch(tmp_path, mesh, ODD, rules, options={"dtype": "bfloat16"})
    assert_bytes(tmp_path, mesh, table, ODD, "bfloat16")
    for rank in range(mesh.size):
        metrics, found = json.loads((tmp_path / f"rank_{rank}.json").read_text()), np.load(tmp_path / f"rank_{rank}.npz")
        for ours, theirs in zip(metrics, wanted, strict=True):
            assert ours["load"] == theirs["load"].tolist()
            assert ours["loss"] == pytest.approx(float(theirs["loss"]), rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(float(theirs["grad_norm"]), rel=1e-4)
        for path, spec in paths(param_specs(cfg), is_spec):
            assert np.abs(found[path] - final[path]).mean() < 3e-6, path  # of steps of 3e-4
            if not is_state(path):
                part = found[path][local_slices(spec, mesh, table, mesh.coords(rank), path, state=True)]
                np.testing.assert_array_equal(part, ms.Tensor(found[f"master.{path}"]).bfloat16().float().asnumpy())
        # 1 in bfloat16 is too coarse to move by the rate; the masters do, some there and back
        assert (found["norm"] == 1).all() and (found["master.norm"] != 1).all()
        assert np.abs(found["master.norm"] - 1).max() > RATE


LOCKSTEP = {
    "dp2 ZeRO-2, accumulate": ({"zero": 2}, {"accumulate": 2}, ODD),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LOCKSTEP)
def test_lockstep(tmp_path, case):
    rules, options, changes = LOCKSTEP[case]
    mesh, cfg, table = Mesh.parse("data=2"), dsv3.TINY.replace(**changes), make_rules(**rules)
    wanted, final = alone(tuple(changes.items()), options.get("accumulate", 1))
    job = {"model": "TINY", "mesh": "data=2", "rows": ROWS, "length": LENGTH, "rules": rules, "changes": changes,
           "learning_rate": RATE} | options
    reports = simulate_ranks("dsv3.cli.rank:record_steps", job, mesh.size, keep=tmp_path, export=True)
    for report in reports:
        place = Placement(mesh, table, report.rank)
        assert of_program(report.collectives) == traffic(cfg, place, ROWS // mesh.data, LENGTH, options["accumulate"], "float32")
    for rank, (params, metrics) in enumerate(replay(lambda: run_steps(**job, steps=STEPS), reports)):
        for ours, theirs in zip(metrics, wanted, strict=True):
            np.testing.assert_array_equal(array_of(ours["load"]), theirs["load"])
            for key in ("loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm"):
                np.testing.assert_allclose(array_of(ours[key]), theirs[key], rtol=1e-5, atol=1e-6)
        held = dict(paths(params))
        for path, spec in paths(param_specs(cfg), is_spec):
            part = local_slices(spec, mesh, table, mesh.coords(rank), path, state=table.zero == 3)
            assert np.abs(array_of(held[path]) - final[path][part]).max() < 1e-5, path
    cut = [leaf for leaf in leaves(param_specs(cfg), mesh, table) if leaf.shards > 1 and not is_state(leaf.path)]
    whole = 4 * sum(leaf.size for leaf in cut)
    # payloads of one call: ReduceScatter of gradients and AllGather of params move what their AllReduce would
    expected = {"backward": (0, whole), "apply": (whole, 0)}
    for graph in reports[0].graphs:
        found = tuple(sum(c.count * c.bytes for c in graph.collectives if c.kind == kind)
                      for kind in ("AllGather", "ReduceScatter"))
        assert found == expected.get(graph.name, (0, 0)), graph.name


def test_what_does_not_fit_is_refused():
    cfg, mesh, optimizer = dsv3.TINY.replace(**ODD), Mesh.parse("data=2"), dsv3.adamw(RATE)
    specs, params = param_specs(cfg), dsv3.init(cfg)
    with pytest.raises(ValueError, match=r"m embed: shape \(128, 64\), but a rank of mesh data=2 with zero=1 has \(64, 64\)"):
        check_state(params, optimizer.init(params), specs, Placement(mesh, make_rules(zero=1)))
    with pytest.raises(ValueError, match=r"params embed: shape \(128, 64\).* zero=3 has \(64, 64\); make it with "
                                         r"parallel.stages.own"):
        check_state(params, optimizer.init(params), specs, Placement(mesh, make_rules(zero=3)))
    with pytest.raises(ValueError, match="without a mesh"):
        dsv3.make_train_step(cfg, optimizer, rules=make_rules(zero=1))
    with pytest.raises(ValueError, match="recompute='norms'"):
        dsv3.make_train_step(cfg, optimizer, recompute="norms")
