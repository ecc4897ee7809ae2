"""One process of a pipeline on CPUs, started by msrun: a few steps of each case, then its metrics and slices to files.

    msrun ... pipeline_worker.py FOLDER, in which cases.json is {name: arguments of run}
"""
import json
import sys
from pathlib import Path

import numpy as np
from cluster import finish, start
from mindspore.communication import get_rank

import dsv3
from dsv3.parallel import Mesh, Pipeline, make_rules
from dsv3.parallel.shard import Placement
from dsv3.parallel.stages import held, own
from dsv3.parallel.update import init_state
from dsv3.transform import compile_count
from dsv3.tree import paths


def run(mesh, changes, pipeline, accumulate, rows, length, steps, rate, rules=None):
    """(metrics of each step and of an evaluation on the batch after the last, params by their paths in the whole model, graphs
    compiled after the first step and evaluation)."""
    pipeline = {k: tuple(v) if isinstance(v, list) else v for k, v in pipeline.items()}
    mesh, line, cfg, optimizer = Mesh.parse(mesh), Pipeline(**pipeline), dsv3.TINY.replace(**changes), dsv3.adamw(rate)
    table = make_rules(**rules or {})
    placement = Placement(mesh, table, get_rank(), line)
    params = own(dsv3.init(cfg, seed=0), cfg, placement)
    place = {"mesh": mesh, "rules": table, "pipeline": line, "accumulate": accumulate}
    step, evaluate = dsv3.make_train_step(cfg, optimizer, **place), dsv3.make_eval_step(cfg, **place)
    state, metrics = init_state(optimizer, params, held(cfg, placement)[0], placement), []
    n, i, compiled = rows // mesh.data, placement.index("batch"), []

    def batch(seed):
        tokens = np.random.default_rng(seed).integers(0, cfg.vocab_size, (rows, length)).astype(np.int32)
        return {"tokens": tokens[i * n : (i + 1) * n]}

    for seed in range(1, steps + 1):
        params, state, found = step(params, state, batch(seed))
        held_out = evaluate(params, batch(seed + 1))  # which must leave all as it is
        metrics.append({k: np.asarray(v.asnumpy()).tolist() for k, v in found.items() if k != "learning_rate"})
        compiled.append(compile_count())
    metrics.append({k: np.asarray(v.asnumpy()).tolist() for k, v in held_out.items()})
    names = held(cfg, placement)[1]
    return metrics, {name: leaf.asnumpy() for name, (_, leaf) in zip(names, paths(params))}, compiled[-1] - compiled[0]


def main(folder):
    """All cases, one after another."""
    start()
    folder = Path(folder)
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        metrics, params, more = run(**case)
        np.savez(folder / f"{name}_{get_rank()}.npz", **params)
        (folder / f"{name}_{get_rank()}.json").write_text(json.dumps({"metrics": metrics, "compiled again": more}))
    finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
