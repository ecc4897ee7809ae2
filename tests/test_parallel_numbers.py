"""The partitioned training step of every rank, run in lockstep, against the step on one device: losses, load, params.

Both ways to compile it: the loss as one operator (``program.train_step``), and ``make_train_step``'s own Python over explicit
graphs (``cli.rank``), recorded and replayed; of the latter also the bytes that it sends, against arithmetic.
Each layout's programs are compiled for simulated Ascend ranks, exported and interpreted with NumPy; nothing of MindSpore's
execution takes part on that side. Three steps of AdamW with clipping and the router-bias rule.

Planted faults this file was seen to catch: heads not summed; a load that counts the rank's own tokens only.
"""

import dataclasses

import numpy as np
import pytest

import dsv3
from dsv3.cli.plan import _number
from dsv3.cli.rank import run_steps
from dsv3.model import param_specs
from dsv3.parallel import lockstep, recorded
from dsv3.parallel.bind import METRICS
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.plan import SETTINGS, plan
from dsv3.parallel.program import STATE_AXES, batch_of, hyper
from dsv3.parallel.rules import ZERO_AXES, local_slices, make_rules
from dsv3.parallel.schedules import Pipeline
from dsv3.parallel.shard import Placement
from dsv3.parallel.simulate import simulate_ranks
from dsv3.parallel.traffic import of_program, traffic
from dsv3.spec import is_spec
from dsv3.tree import paths

CHANGES = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96,
           "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
           "num_nextn_predict_layers": 0, "aux_loss_alpha": 0.01}
ROWS, LENGTH, STEPS = 4, 12, 3
RATE = 3e-4  # a larger one magnifies rounding: AdamW divides tiny gradients by their own size
LAYOUTS = {
    "tp2": ("model=2", {}, {}),
    "ep2": ("data=2,expert=2", {}, {}),
    "dp2 tp2 ep2, experts in the MTP": ("data=2,model=2,expert=2", {}, {"num_hidden_layers": 1, "num_nextn_predict_layers": 1}),
    "dp2, ZeRO-1": ("data=2", {"zero": 1}, {"num_hidden_layers": 1, "first_k_dense_replace": 0}),
}
SLOW = ("tp2", "ep2")  # of which another is made


def on_one_device(cfg, batch=None, dtype="float32", eps=1e-8, **options):
    """Metrics of each step, and the params after the last as float32, by make_train_step (and its options) on the CPU.

    batch(tokens, seed): tokens alone. eps: of AdamW.
    """
    params, optimizer = dsv3.init(cfg, seed=0, dtype=dtype), dsv3.adamw(RATE, eps=eps)
    step, state, metrics = dsv3.make_train_step(cfg, optimizer, **options), optimizer.init(params), []
    for i in range(STEPS):
        tokens = batch_of(cfg, ROWS, LENGTH, 1 + i)
        params, state, found = step(params, state, batch(tokens, 1 + i) if batch else {"tokens": tokens})
        metrics.append({k: v.asnumpy() for k, v in found.items() if k != "learning_rate"})
    return metrics, {path: leaf.float().asnumpy() for path, leaf in paths(params)}


@pytest.mark.parametrize("layout", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYOUTS])
def test_all_ranks_together_make_the_step_of_one_device(tmp_path, layout):
    text, rules, more = LAYOUTS[layout]
    assert_lockstep(tmp_path, text, rules, CHANGES | more)


def assert_lockstep(folder, text, rules, changes):
    """The programs of all ranks have the metrics and the params of one device. -> simulate's reports."""
    mesh, cfg = Mesh.parse(text), dsv3.TINY.replace(**changes)
    wanted, final = on_one_device(cfg)
    job = {"model": "TINY", "mesh": text, "rows": ROWS, "length": LENGTH, "rules": rules, "changes": changes,
           "learning_rate": RATE}
    reports = simulate_ranks("dsv3.parallel.program:train_step", job, mesh.size, keep=folder, export=True)
    programs = [lockstep.load(r.program, r.rank) for r in reports]
    n, optimizer = ROWS // mesh.data, dsv3.adamw(RATE)
    for i in range(STEPS):
        tokens = batch_of(cfg, ROWS, LENGTH, 1 + i)
        feeds = []
        for rank in range(mesh.size):
            j = mesh.index(mesh.coords(rank), ("data",))
            feeds.append([tokens[j * n : (j + 1) * n], hyper(optimizer, i)])
        for losses, load, norm in lockstep.run(programs, feeds):  # the same on every rank
            np.testing.assert_allclose(losses, [wanted[i][k] for k in METRICS], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(load, wanted[i]["load"])
            np.testing.assert_allclose(norm, wanted[i]["grad_norm"], rtol=1e-5)
    worst = 0.0
    for path, spec in paths(param_specs(cfg), is_spec):
        for rank, program in enumerate(programs):
            if path in program.params:
                part = local_slices(spec, mesh, make_rules(), mesh.coords(rank), path)
                expected = final[path][part]
                found = program.params[path]
                if rules.get("zero") and found.shape != expected.shape:
                    table = make_rules(zero_axes=STATE_AXES, **rules)
                    expected = final[path][local_slices(spec, mesh, table, mesh.coords(rank), path, state=True)]
                worst = max(worst, float(np.abs(found - expected).max()))
    print(text, rules, "largest difference of a param:", worst)
    assert worst < 1e-5
    return reports


@pytest.mark.slow
@pytest.mark.parametrize("text, more", [("data=2", {})])
def test_the_step_that_python_drives_makes_that_of_one_device(tmp_path, text, more):
    """What the recorded graphs and the Python between them compute, and what they send, exactly as the arithmetic says."""
    mesh, changes = Mesh.parse(text), CHANGES | more
    cfg = dsv3.TINY.replace(**changes)
    job = {"model": "TINY", "mesh": text, "rows": ROWS, "length": LENGTH, "changes": changes, "learning_rate": RATE}
    reports = simulate_ranks("dsv3.cli.rank:record_steps", job, mesh.size, keep=tmp_path, export=True)
    for report in reports:
        place = Placement(mesh, make_rules(), report.rank)
        assert of_program(report.collectives) == traffic(cfg, place, ROWS // mesh.data, LENGTH, 1, "float32")
    wanted, final = on_one_device(cfg)
    for rank, (params, metrics) in enumerate(recorded.replay(lambda: run_steps(steps=STEPS, **job), reports)):
        for ours, theirs in zip(metrics, wanted, strict=True):
            for key in (*METRICS, "grad_norm"):
                np.testing.assert_allclose(ours[key].asnumpy(), theirs[key], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(ours["load"].asnumpy(), theirs["load"])
        for (path, leaf), (_, spec) in zip(paths(params), paths(param_specs(cfg), is_spec), strict=True):
            part = local_slices(spec, mesh, make_rules(), mesh.coords(rank), path)
            assert np.abs(leaf.asnumpy() - final[path][part]).max() < 1e-5


def test_arithmetic_of_a_step_that_is_cut_every_way():
    """Two micro-batches with an MTP module on dp2 tp2 ep2: what was counted in the graphs that MindSpore compiled for rank 0."""
    cfg = dsv3.TINY.replace(**CHANGES | {"num_nextn_predict_layers": 1})
    found = traffic(cfg, Placement(Mesh.parse("data=2,model=2,expert=2"), make_rules(dispatch="gather"), 0), 1, LENGTH, 2,
                    "float32")
    assert found == {("AllReduce", (0, 2)): 266428, ("AllReduce", (0, 1, 2, 3)): 126596, ("AllReduce", (0, 1)): 84704,
                     ("AllGather", (0, 2)): 48576, ("ReduceScatter", (0, 2)): 47840}


# Payload of one step of three ranks of 1024, by kind and size of the group: counted in the graphs that MindSpore compiled for
# ``dsv3 plan --preset 671b --simulate --rank 0,512,1023``, with ZeRO over data ranks.
COUNTED = {
    0: {"ReduceScatter": {2: 5637144576, 4: 43687870464, 16: 5877530624},
        "AllGather": {2: 2818572288, 4: 41930457088, 8: 16384, 16: 2938765312},
        "AllReduce": {2: 3706716160, 4: 3065856000, 16: 93464, 1024: 4}, "Send": {2: 469762048}, "Receive": {2: 469762048}},
    512: {"ReduceScatter": {2: 22548578304, 4: 45969571840, 16: 1135869952},
          "AllGather": {2: 11274289152, 4: 44778389504, 8: 98304, 16: 567934976},
          "AllReduce": {4: 11291279360, 16: 191768, 1024: 4}, "Send": {2: 939524096}, "Receive": {2: 939524096}},
    1023: {"ReduceScatter": {2: 11274289152, 4: 16408117248, 16: 8392523776},
           "AllGather": {2: 5637144576, 4: 16416505856, 8: 16384, 16: 4196261888},
           "AllReduce": {2: 3706716160, 4: 6134676480, 16: 126744, 1024: 4}, "Send": {2: 469762048}, "Receive": {2: 469762048}},
}


@pytest.mark.parametrize("rank", COUNTED)
def test_arithmetic_of_the_layout_of_1024_ranks(rank):
    """Sequence and expert parallel, ZeRO-1, a pipeline with recomputed blocks and a shared embedding, to the byte."""
    setting = SETTINGS["671b"]
    made = plan(dsv3.V3, setting)
    again = tuple(_number(p.name, dsv3.V3) for stage in made.stages for p, mode in stage.blocks if mode == 2)
    rules = dataclasses.replace(setting.rules, zero_axes=ZERO_AXES)
    place = Placement(setting.mesh, rules, rank, Pipeline(setting.schedule, setting.virtual, made.layers))
    found = {}
    for (kind, group), size in traffic(dsv3.V3, place, 1, 4096, 32, "bfloat16", again).items():
        if size:
            sizes = found.setdefault(kind, {})
            sizes[len(group)] = sizes.get(len(group), 0) + size
    assert found == COUNTED[rank]
