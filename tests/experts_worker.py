"""One process of a cluster of CPUs, started by msrun: jobs one after another, a few training steps of each, results to files.

    msrun ... experts_worker.py JOBS(JSON) ROWS LENGTH STEPS RATE FOLDER

A job: {"name", "mesh", "rules": arguments of make_rules, "changes": of TINY, "route": a name of ROUTES or null}.
"""
import json
import sys

import mindspore as ms
import numpy as np
from mindspore import ops
from mindspore.communication import get_rank, init

import dsv3
from dsv3.kernels.native import iota
from dsv3.model import param_specs
from dsv3.nn.router import route as default_route
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.rules import make_rules
from dsv3.parallel.shard import Placement, place
from dsv3.tree import paths


def to_the_first(params, x_TD, *, cfg):
    """A router that sends every token to the first K experts."""
    idx_TK, _, scores_TE, logits_TE = default_route(params, x_TD, cfg=cfg)
    idx_TK = ops.zeros_like(idx_TK) + iota(cfg.num_experts_per_tok)
    return idx_TK, ops.gather_elements(scores_TE, 1, idx_TK), scores_TE, logits_TE


ROUTES = {None: None, "to_the_first": to_the_first}


def train(cfg, params, batches, rate, **how):
    """[metrics of a step], and the leaves of params and first moments after the last."""
    optimizer = dsv3.adamw(rate)
    step, state, metrics = dsv3.make_train_step(cfg, optimizer, **how), optimizer.init(params), []
    for tokens in batches:
        params, state, found = step(params, state, {"tokens": tokens})
        metrics.append({k: np.asarray(v.asnumpy()).tolist() for k, v in found.items() if k != "learning_rate"})
    leaves = {path: leaf.asnumpy() for path, leaf in paths(params)}
    return metrics, leaves, {path: leaf.asnumpy() for path, leaf in paths(state["m"])}


def main(jobs, rows, length, steps, rate, folder):
    """All jobs on this rank."""
    ms.set_device("CPU")
    init("mccl")
    for job in json.loads(jobs):
        mesh, rules, cfg = Mesh.parse(job["mesh"]), make_rules(**job["rules"]), dsv3.TINY.replace(**job["changes"])
        placement = Placement(mesh, rules, get_rank())
        params = place(dsv3.init(cfg, seed=0), param_specs(cfg), placement)
        n, i = int(rows) // mesh.data, placement.index("batch")
        batches = [batch_of(cfg, rows, length, seed)[i * n : (i + 1) * n] for seed in range(1, int(steps) + 1)]
        metrics, leaves, m = train(cfg, params, batches, float(rate), mesh=mesh, rules=rules, route=ROUTES[job["route"]])
        named = {f"p/{k}": v for k, v in leaves.items()} | {f"m/{k}": v for k, v in m.items()}
        np.savez(f"{folder}/{job['name']}_{get_rank()}.npz", **named)
        with open(f"{folder}/{job['name']}_{get_rank()}.json", "w") as file:
            json.dump(metrics, file)


def batch_of(cfg, rows, length, seed):
    """Random tokens, the same on every rank. [rows, length] int32."""
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, (int(rows), int(length))).astype(np.int32)


if __name__ == "__main__":
    main(*sys.argv[1:])
