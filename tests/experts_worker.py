"""One process of a cluster of CPUs, started by msrun: mixtures of experts on many meshes, results and gradients to files.

    msrun ... experts_worker.py JOBS(JSON) CHANGES(JSON) FOLDER

A job: {"name", "mesh", "rules": arguments of make_rules, "route": a name of ROUTES or null,
"rows", "length": of the tokens of all ranks}.
"""
import json
import sys

import numpy as np
from cluster import finish, start
from mindspore import Tensor, ops
from mindspore.communication import get_rank

import dsv3
from dsv3.kernels.native import iota
from dsv3.nn.balance import make_balance
from dsv3.nn.moe import moe, moe_spec
from dsv3.nn.router import route as default_route
from dsv3.parallel.groups import own_rank
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.rows import gather_seq, own_seq
from dsv3.parallel.rules import make_rules
from dsv3.parallel.shard import Placement, parts, place, placed, psum
from dsv3.parallel.zero import groups_of
from dsv3.spec import draw, is_spec
from dsv3.transform import jit, value_and_grad
from dsv3.tree import flatten, paths, tree_map_with_path

_map = ops.Map()


def to_the_first(params, x_TD, *, cfg):
    """A router that sends every token to the first K experts."""
    idx_TK, _, scores_TE, logits_TE = default_route(params, x_TD, cfg=cfg)
    idx_TK = ops.zeros_like(idx_TK) + iota(cfg.num_experts_per_tok)
    return idx_TK, ops.gather_elements(scores_TE, 1, idx_TK), scores_TE, logits_TE


ROUTES = {None: default_route, "to_the_first": to_the_first}


def inputs(cfg, rows, length):
    """(params, x [rows, length, D], the gradient of y): the same everywhere."""
    params = tree_map_with_path(lambda path, spec: Tensor(draw(spec, path, 0) * (1 if "bias" in path else 8)), moe_spec(cfg))
    rng = np.random.default_rng(0)
    return params, *(rng.standard_normal((2, rows, length, cfg.hidden_size)).astype(np.float32))


def run(cfg, route, params, x, dy, placement=None):
    """y of whole rows, load, balance loss, gradients of sum(y dy) + balance loss to all leaves and to x, of this rank."""
    named = [(path, spec) for path, spec in paths(moe_spec(cfg), is_spec)]
    names = tuple(groups_of(spec, path, placement)[2] for path, spec in named) if placement else ("@",) * len(named)
    balance, share = make_balance(cfg, sequence=0.5, expert=0.3, device=0.2, communication=0.1, z=0.1), 1.0
    if placement:
        share = 1 / len(placement.group("all"))

    def objective(tree, dy):
        y, load, aux = moe(tree["p"], own_seq(tree["x"], "residual_seq"), cfg=cfg, route=route, balance=balance)
        y, aux = gather_seq(y, "residual_seq"), psum(aux, "tokens") / parts("tokens")
        return (ops.sum(y * dy) * parts("batch") + aux) * share, (y, load, aux)

    grad = value_and_grad(objective, has_aux=True)

    def step(params, x, dy):
        (_, out), grads = grad({"p": params, "x": x}, dy)
        return out, _map(psum, flatten(grads["p"]), names), psum(grads["x"], "@context+model")

    (y, load, aux), grads, dx = jit(step)(params, x, dy)
    found = {f"d {path}": g.asnumpy() for (path, _), g in zip(named, grads)}
    return found | {"y": y.asnumpy(), "load": load.asnumpy(), "aux": aux.asnumpy(), "dx": dx.asnumpy()}


def run_all(jobs, changes):
    """{name of a job: what ``run`` found} of this rank."""
    cfg, found = dsv3.TINY.replace(**changes), {}
    for job in jobs:
        params, x, dy = inputs(cfg, job["rows"], job["length"])
        placement = Placement(Mesh.parse(job["mesh"]), make_rules(**job["rules"]), own_rank())
        n = job["rows"] // placement.mesh.data
        own = slice(placement.index("batch") * n, (placement.index("batch") + 1) * n)
        with placed(placement):
            own_params = place(params, moe_spec(cfg), placement)
            found[job["name"]] = run(cfg, ROUTES[job["route"]], own_params, x[own], dy[own], placement)
    return found


def record(jobs, changes):
    """A target of ``simulate``: the graphs of all jobs on this rank."""
    run_all(jobs, changes)


def main(jobs, changes, folder):
    """All jobs on this rank."""
    start()
    for name, found in run_all(json.loads(jobs), json.loads(changes)).items():
        np.savez(f"{folder}/{name}_{get_rank()}.npz", **found)
    finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
