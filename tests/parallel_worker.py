"""One process of a real cluster of CPUs, started by msrun: a few steps on its part, then its metrics and slices to a file.

    msrun ... parallel_worker.py MESH CHANGES(JSON) ROWS LENGTH STEPS RATE FOLDER RULES(JSON) DOCUMENTS(JSON) OPTIONS(JSON)

RULES are keywords of make_rules, OPTIONS of make_train_step, with the "dtype" of params beside them.
"""
import json
import sys

import numpy as np
from cluster import finish, start
from mindspore.communication import get_rank

import dsv3
from dsv3.model import param_specs
from dsv3.optim import is_state
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.rules import make_rules
from dsv3.parallel.shard import Placement, place
from dsv3.parallel.update import init_state
from dsv3.tree import paths

EPSILON = 1e-6  # AdamW's for ``cut_up`` batches: masks leave gradients that cancel, and 1e-8 would magnify their rounding


def cut_up(tokens, seed):
    """A batch whose rows are two documents each, cut at random places, with positions of their own and a fractional mask."""
    rng, (rows, length) = np.random.default_rng(seed), tokens.shape
    places, column = rng.integers(1, length, (rows, 1)), np.arange(length)[None]
    second = column >= places
    return {"tokens": tokens, "segment_ids": second.astype(np.int32), "position_ids": np.where(second, column - places, column),
            "loss_mask": rng.choice([0.0, 0.5, 1.0], tokens.shape).astype(np.float32)}


def main(mesh, changes, rows, length, steps, rate, folder, rules="{}", documents="false", options="{}"):
    """Train on batches drawn from the seeds 1, 2, ...; rules: arguments of ``make_rules``; documents: ``cut_up`` the rows."""
    start()
    mesh, cfg, documents = Mesh.parse(mesh), dsv3.TINY.replace(**json.loads(changes)), json.loads(documents)
    optimizer = dsv3.adamw(float(rate), eps=EPSILON) if documents else dsv3.adamw(float(rate))
    options, specs = json.loads(options), param_specs(cfg)
    placement = Placement(mesh, make_rules(**json.loads(rules)), get_rank())
    params = place(dsv3.init(cfg, seed=0, dtype=options.pop("dtype", "float32")), specs, placement)
    state, metrics = init_state(optimizer, params, specs, placement), []
    step = dsv3.make_train_step(cfg, optimizer, mesh=mesh, rules=placement.rules, **options)
    n, i = int(rows) // mesh.data, placement.index("batch")
    for seed in range(1, int(steps) + 1):
        tokens = np.random.default_rng(seed).integers(0, cfg.vocab_size, (int(rows), int(length))).astype(np.int32)
        batch = cut_up(tokens, seed) if documents else {"tokens": tokens}
        params, state, found = step(params, state, {key: value[i * n : (i + 1) * n] for key, value in batch.items()})
        metrics.append({k: np.asarray(v.asnumpy()).tolist() for k, v in found.items() if k != "learning_rate"})
    out = {"params": params, "state": {k: v for k, v in state.items() if k != "step"}}
    sizes = {kind: sum(leaf.nbytes for path, leaf in paths(tree) if kind == "params" or not is_state(path))
             for kind, tree in out.items()}  # the router bias has moments too, which nothing uses
    np.savez(f"{folder}/rank_{get_rank()}.npz", **{path: leaf.float().asnumpy() for path, leaf in paths(params)},
             **{f"master.{path}": leaf.asnumpy() for path, leaf in state.get("masters", {}).items()})
    with open(f"{folder}/rank_{get_rank()}.json", "w") as file:
        json.dump(metrics, file)
    with open(f"{folder}/bytes_{get_rank()}.json", "w") as file:
        json.dump(sizes, file)
    finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
