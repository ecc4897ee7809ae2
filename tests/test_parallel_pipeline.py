"""Pipelines: the order of work as a table, and stages as real processes on the CPU that train together.

Planted faults this file was seen to catch: the gradients of the embedding's two copies not summed; balance losses left out of
all chunks but the last; DualPipeV's forwards before its backwards; a stage's sends of a tick before its receives, and receives a
tick later than their sends (stages wait for ever); 1F1B one forward further ahead; interleaved stages too few ahead, and their
backwards in the order of the forwards. In an evaluation: micro-batches that do not add up, no MTP loss in the loss, losses of
the own stage alone.
"""
import itertools
import json
from collections import Counter

import numpy as np
import pytest
from cluster import run_ranks

import dsv3
from dsv3.checkpoint.leaves import host
from dsv3.cli.rank import run_steps
from dsv3.model import param_specs
from dsv3.parallel import groups, recorded
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.rules import local_slices, make_rules
from dsv3.parallel.schedules import Pipeline, bubble, chunks_of, in_flight, tasks, timeline
from dsv3.parallel.shard import Placement
from dsv3.parallel.simulate import simulate_ranks
from dsv3.parallel.stages import chunks, held, moe_rows, part_of
from dsv3.parallel.traffic import of_program, traffic
from dsv3.spec import is_spec
from dsv3.tree import paths, tree_map_with_path

TINY = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96,
        "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "num_nextn_predict_layers": 1, "aux_loss_alpha": 0.01}
RUN = {"rows": 4, "length": 12, "steps": 3, "rate": 3e-4}  # a larger rate magnifies rounding: AdamW divides by tiny gradients
INTERLEAVED = {"mesh": "pipe=2", "pipeline": {"schedule": "interleaved", "virtual": 2, "layers": (1, 1, 1, 0)},
               "changes": {"num_hidden_layers": 3}, "accumulate": 2}
PROCESSES = {  # the last stage of one and a middle chunk of the other hold no layer
    "dualpipev": {"mesh": "pipe=2", "pipeline": {"schedule": "dualpipev", "virtual": 2, "layers": [1, 1, 0, 0]},
                  "changes": {}, "accumulate": 4},
    "dp2 pp2": {"mesh": "data=2,pipe=2", "pipeline": {"layers": [2, 0]}, "changes": {}, "accumulate": 2},
    "dp2 ep2 pp2, ZeRO-2": {"mesh": "data=2,pipe=2,expert=2", "pipeline": {"layers": [2, 1]}, "changes": {"num_hidden_layers": 3},
                            "accumulate": 2, "rules": {"zero": 2}},
}


# -- schedules ---------------------------------------------------------------------------------------------------------
def tables():
    """Every schedule for up to 8 stages, 4 chunks a stage and 24 micro-batches."""
    for schedule, pipe, micro in itertools.product(("gpipe", "1f1b", "interleaved", "dualpipev"), range(1, 9), (1, 3, 8, 24)):
        for virtual in {"interleaved": (2, 3, 4), "dualpipev": (2,)}.get(schedule, (1,)):
            if schedule != "interleaved" or micro % pipe == 0:
                yield schedule, pipe, virtual, micro


def peaks(actions, chunks):
    """Micro-batches in flight on a stage with these chunks: the states that no other state exceeds everywhere."""
    now, states = Counter(), set()
    for a in actions:
        now[a.chunk] += 1 if a.kind == "forward" else -1
        states.add(tuple(now[c] for c in chunks))
    return tuple(sorted(s for s in states if not any(o != s and all(x >= y for x, y in zip(o, s)) for o in states)))


def test_timelines_have_the_published_bubble_and_no_more_in_flight():
    for schedule, pipe, virtual, micro in tables():
        actions, case = timeline(schedule, pipe, virtual, micro), (schedule, pipe, virtual, micro)
        assert len({(a.tick, a.stage) for a in actions}) == len(actions) == 2 * micro * pipe * virtual
        assert len({(a.kind, a.chunk, a.micro) for a in actions}) == len(actions)
        idle = actions[-1].tick + 1 - 2 * micro * virtual
        if schedule != "dualpipev" or micro % pipe == 0:
            assert idle / (2 * micro * virtual) == pytest.approx(bubble(pipe, virtual, micro, schedule)), case
        for stage in range(pipe):
            found = peaks(actions, chunks_of(stage, pipe, virtual, schedule))
            allowed = in_flight(stage, pipe, virtual, micro, schedule)
            if schedule == "dualpipev":  # whose pairs are not overlapped here: one less may do
                assert all(x <= y for state in found for x, y in zip(state, allowed[0])), case
            else:
                assert found == allowed, case


def test_stages_that_wait_for_one_another_come_to_the_end():
    """A send and its receive happen together, when both stages have come to them; what a chunk needs is there in time."""
    for schedule, pipe, virtual, micro in tables():
        actions, last = timeline(schedule, pipe, virtual, micro), pipe * virtual - 1
        left, kept = [list(tasks(stage, actions))[::-1] for stage in range(pipe)], [{} for _ in range(pipe)]
        most = 0
        while any(left):
            before = sum(map(len, left))
            for stage, todo in enumerate(left):
                while todo and not todo[-1].what:
                    task, mine = todo.pop(), kept[stage]
                    c, m = task.chunk, task.micro
                    assert c == 0 or ("x", c, m) in mine
                    if task.kind == "forward" and c < last:
                        mine["x", c + 1, m] = stage
                    if task.kind == "backward":
                        assert mine.pop(("x", c, m), c == 0) is not False and (c == last or mine.pop(("dy", c, m)) >= 0)
                        mine["dy", c - 1, m] = stage
                if todo and todo[-1].kind == "send":
                    task, there = todo[-1], left[todo[-1].peer]
                    if there and (there[-1].kind, there[-1].peer) == ("receive", stage):
                        assert (there[-1].what, there[-1].chunk, there[-1].micro) == (task.what, task.chunk, task.micro)
                        kept[task.peer][task.what, task.chunk, task.micro] = kept[stage].pop((task.what, task.chunk, task.micro))
                        todo.pop(), there.pop()
            assert sum(map(len, left)) < before, (schedule, pipe, virtual, micro)
            most = max(most, *(sum(what == "x" for what, *_ in mine) for mine in kept))
        assert not [key for mine in kept for key in mine if key[1] >= 0]
        assert most <= max(sum(s) for stage in range(pipe) for s in in_flight(stage, pipe, virtual, micro, schedule)) + virtual


@pytest.mark.parametrize("settings, message", [
    ({"pipeline": Pipeline("dualpipe"), "accumulate": 2}, "two stages .* take 'dualpipev' with virtual=2"),
    ({"pipeline": Pipeline("interleaved", 2), "accumulate": 3}, "micro_batches=3 is not divisible by pipe=2"),
    ({"pipeline": Pipeline("1f1b", 2)}, "virtual=2 chunks a stage"),
    ({"pipeline": Pipeline(layers=(3, 2))}, "2 numbers .* add up to num_hidden_layers=2"),
    ({"pipeline": Pipeline("dualpipev", 2, layers=(1, 0, 0, 1))}, "stage 1 would hold nothing at all"),
    ({"mesh": None, "pipeline": Pipeline()}, "without a mesh"),
], ids=["dualpipe", "micro-batches", "virtual", "layers", "empty", "no mesh"])
def test_pipelines_that_cannot_run_are_refused(settings, message):
    groups.stand_for(0)
    with pytest.raises(ValueError, match=message):
        dsv3.make_train_step(dsv3.TINY.replace(**TINY), dsv3.adamw(), **{"mesh": Mesh(pipe=2)} | settings)


def test_stages_hold_every_leaf_once_and_the_embedding_where_it_is_read():
    cfg = dsv3.TINY.replace(**TINY | {"num_hidden_layers": 7})
    whole = dict(paths(param_specs(cfg), is_spec))
    for line, layers in ((Pipeline(), [(0, 1), (2, 3), (4, 5), (6,)]),
                         (Pipeline(noop=(0, 7, 9, 10, 11)), [(0, 1), (2, 3, 4), (5, 6), ()]),
                         (Pipeline("dualpipev", 2, noop=(7,)), [(0,), (1, 6), (2, 5), (3, 4)])):
        seen, rows = Counter(), []
        for stage in range(4):
            placement = Placement(Mesh(pipe=4), make_rules(), stage, line)
            mine = chunks(cfg, placement)
            assert tuple(i for chunk in mine for i in chunk.layers) == layers[stage]
            specs, names = held(cfg, placement)
            assert [whole[name] for name in names] == [spec for _, spec in paths(specs, is_spec)]
            name = iter(names)
            named = tree_map_with_path(lambda path, spec: next(name), specs)
            parts = [name for chunk in mine for _, name in paths(part_of(named, chunk, mine, cfg))]
            ends = mine[0].first and mine[-1].last  # both read the one embedding
            assert sorted(parts) == sorted(names + ("embed",) * ends)
            seen.update(names)
            rows += [row for chunk in mine for row in moe_rows(chunk, cfg)]
            assert {"norm", "head"} <= set(names) if mine[-1].last else not {"norm", "head"} & set(names)
        assert {name for name, n in seen.items() if n > 1} == ({"embed"} if line.schedule == "1f1b" else set())
        assert set(seen) == set(whole) and sorted(rows) == list(range(7)) and cfg.num_moe_layers == 6


# -- real processes ----------------------------------------------------------------------------------------------------
def launch(folder, cases, size):
    """Run the worker on so many ranks."""
    (folder / "cases.json").write_text(json.dumps(cases))
    run_ranks(folder, size, "pipeline_worker.py", folder)


def on_one_device(changes, accumulate, rows, length, steps, rate):
    """Metrics of each step and of an evaluation on the batch after the last, and the params."""
    cfg, optimizer = dsv3.TINY.replace(**changes), dsv3.adamw(rate)
    params = dsv3.init(cfg, seed=0)
    step, state, metrics = dsv3.make_train_step(cfg, optimizer, accumulate=accumulate), optimizer.init(params), []

    def batch(seed):
        return {"tokens": np.random.default_rng(seed).integers(0, cfg.vocab_size, (rows, length)).astype(np.int32)}

    for seed in range(1, steps + 1):
        params, state, found = step(params, state, batch(seed))
        metrics.append({k: v.asnumpy() for k, v in found.items() if k != "learning_rate"})
    metrics.append({k: v.asnumpy() for k, v in dsv3.make_eval_step(cfg)(params, batch(steps + 1)).items()})
    return cfg, metrics, {path: host(leaf) for path, leaf in paths(params)}


def compare(name, case, found, specs, wanted, final):
    """found: of each rank (metrics of each step and evaluation, params by their paths in the whole model), both NumPy."""
    mesh, worst, seen = Mesh.parse(case["mesh"]), 0.0, Counter()
    for rank, (metrics, params) in enumerate(found):
        for ours, theirs in zip(metrics, wanted, strict=True):
            assert ours.keys() == theirs.keys() and np.array_equal(ours["load"], theirs["load"])
            for key in theirs.keys() - {"load"}:
                assert float(ours[key]) == pytest.approx(float(theirs[key]), rel=1e-5, abs=1e-6), (name, rank, key)
        for path, leaf in params.items():
            part = local_slices(specs[path], mesh, make_rules(), mesh.coords(rank), path)
            worst, seen[path] = max(worst, float(np.abs(leaf - final[path][part]).max())), seen[path] + 1
    print(name, "largest difference of a param:", worst)
    assert worst < 1e-5 and set(seen) == set(final)
    ranks = mesh.size // mesh.pipe
    assert seen.pop("embed") == ranks * (1 if name == "dualpipev" else 2), "the last stage reads the embedding too"
    assert set(seen.values()) == {ranks}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_processes_together_make_the_step_of_one_device(tmp_path, name):
    case = RUN | PROCESSES[name] | {"changes": TINY | PROCESSES[name]["changes"]}
    size = Mesh.parse(case["mesh"]).size
    launch(tmp_path, {name: case}, size)
    cfg, wanted, final = on_one_device(**{k: v for k, v in case.items() if k not in ("mesh", "pipeline", "rules")})
    told = [json.loads((tmp_path / f"{name}_{rank}.json").read_text()) for rank in range(size)]
    assert [t["compiled again"] for t in told] == [0] * size
    found = [(t["metrics"], np.load(tmp_path / f"{name}_{rank}.npz")) for rank, t in enumerate(told)]
    compare(name, case, found, dict(paths(param_specs(cfg), is_spec)), wanted, final)


# -- in lockstep -------------------------------------------------------------------------------------------------------
def test_interleaved_stages_compiled_for_ascend_make_the_step_of_one_device(tmp_path):
    case = RUN | INTERLEAVED | {"changes": TINY | INTERLEAVED["changes"]}
    cfg, wanted, final = on_one_device(**{k: v for k, v in case.items() if k not in ("mesh", "pipeline")})
    job = {k: v for k, v in case.items() if k != "rate"} | {"model": "TINY", "learning_rate": case["rate"], "evaluate": True}
    mesh, line = Mesh.parse(case["mesh"]), Pipeline(**case["pipeline"])
    target = "dsv3.cli.rank:record_steps"
    reports = simulate_ranks(target, job | {"steps": 1}, mesh.size, keep=tmp_path, export=True, timeout=3000)
    for rank, (kind, other) in enumerate((("Send", "Receive"), ("Receive", "Send"))):
        found = Counter((c.kind, c.group) for graph in reports[rank].graphs for c in graph.collectives)
        assert found[kind, (0, 1)] == 1 and found[other, (1, 0)] == 1, "a graph a direction, called for every micro-batch"
        # an evaluation adds to the traffic: inputs of chunks 1 and 3 one way, of chunk 2 the other, and what all are told
        evaluation = of_program(reports[rank].collectives)
        evaluation.subtract(traffic(cfg, Placement(mesh, make_rules(), rank, line), 2, case["length"], 2, "float32"))
        x, told = 4 * case["rows"] * case["length"] * cfg.hidden_size, 12 + 4 * 3 * cfg.n_routed_experts
        there, back = (kind, (0, 1)), (other, (1, 0))
        assert {key: n for key, n in evaluation.items() if n} == {there: 2 * x, back: x, ("AllReduce", (0, 1)): told}
    found = []
    for rank, (params, metrics) in enumerate(recorded.replay(lambda: run_steps(**job), reports)):
        names = held(cfg, Placement(mesh, make_rules(), rank, line))[1]
        leaves = {name: host(leaf) for name, (_, leaf) in zip(names, paths(params))}
        found.append(([{k: v.asnumpy() for k, v in step.items() if k != "learning_rate"} for step in metrics], leaves))
    compare("interleaved", case, found, dict(paths(param_specs(cfg), is_spec)), wanted, final)
