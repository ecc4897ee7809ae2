"""Sharded checkpoints: written by the ranks of one mesh, read by those of any other, or on one device, bit for bit.

Placement is data, so one process plays all ranks, one after the other; nothing is compiled.
Planted faults this file was seen to catch: pieces put one place off; one writer for all nodes without a shared file system;
checksums not compared. One that was not planted: a stage without a router took its masters for a tree.
"""
import json
import shutil
import threading
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from test_parallel_numbers import CHANGES

import dsv3
from dsv3.checkpoint import convert, formats, own, sharded, training
from dsv3.checkpoint.leaves import dtype_of, host, tensor
from dsv3.model import param_specs
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.rules import make_rules
from dsv3.parallel.schedules import Pipeline
from dsv3.parallel.shard import Placement
from dsv3.parallel.stages import held
from dsv3.spec import ParamSpec, draw, is_spec, normal
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
    "dp2 tp2 ZeRO-3": ("data=2,model=2", {"zero": 3}, Pipeline()),
    "pp2": ("pipe=2", {}, Pipeline()),
    "tp2 pp2, uneven": ("model=2,pipe=2", {}, Pipeline(layers=(1, 3))),
    "dp2 pp2 vpp2 ZeRO-1": ("data=2,pipe=2", {"zero": 1}, Pipeline("interleaved", 2)),
}


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
    """A rank's slices of the whole, by NumPy's indexing."""
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
    mine = {"step": state["step"]}
    mine |= {key: tree_map_with_path(lambda path, _, key=key: state_of[key](path), specs) for key in "mv"}
    mine["masters"] = {path: master(path) for path, p in parts.items() if p.spec.dtype is None}
    return tree_map_with_path(lambda path, _: slices(params, "box")(path), specs), mine


def bits(tree):
    return {path: (str(leaf.dtype), host(leaf).tobytes(), tuple(leaf.shape)) for path, leaf in paths(tree)}


def together(size, work):
    """work(rank, gather) of all ranks at once, a thread each; what they return, or the exceptions that ended them."""
    barrier, numbers = threading.Barrier(size, timeout=60), np.zeros(size)

    def rank(i):
        def gather(number):
            numbers[i] = number
            barrier.wait()
            found = numbers.copy()
            barrier.wait()
            return found

        try:
            return work(i, gather)
        except Exception as error:  # returned
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


def save(run, step, name, params, state, node=None):
    """A checkpoint of a layout, all its ranks played by this process; node: as many ranks share a folder of their own."""
    if LAYOUTS[name] is None:
        return training.save_training(run, step, params, state, META, cfg=CFG)
    ranks = placements(name)
    node = node or len(ranks)

    def work(i, gather):
        home = run if node == len(ranks) else run / f"node{i // node}"
        return sharded.save_sharded(home, step, *cut(params, state, ranks[i]), META, cfg=CFG, placement=ranks[i], gather=gather,
                                    node=node, leads=i % node == 0, keep=2)

    found = together(len(ranks), work)
    for error in found:
        if isinstance(error, Exception):
            raise error
    return found[0]


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


def test_any_reader_of_weights_takes_a_sharded_checkpoint(saved, tmp_path):
    params, _, folders = saved
    for name in ("one device", "dp2 tp2 ep2 ZeRO-1", "tp2 pp2, uneven"):
        path = folders[name]
        assert formats.detect(path) == "own" and bits(own.load(path)[0]) == bits(params)
        source = formats.open_checkpoint(path)
        assert dict(formats.describe(source))["layout"] == "own"
        convert.convert(source, formats.make_target(source, "hf"), tmp_path / name, progress=False)
    one, *others = [{file.name: file.read_bytes() for file in place.glob("model*")} for place in sorted(tmp_path.iterdir())]
    assert one and len(others) == 2 and all(other == one for other in others)


def test_a_rank_reads_only_the_files_that_hold_its_slices(saved, tmp_path):
    params, state, folders = saved
    path, ranks = tmp_path / "step_00000012", placements("tp2 pp2, uneven")
    shutil.copytree(folders["tp2 pp2, uneven"], path)
    for rank in (2, 3):  # the last stage
        for stem in training.STEMS:
            (path / sharded.file_name(stem, rank)).unlink()
    for place in ranks[:2]:
        found, wanted = sharded.load_sharded(path, place)[:2], cut(params, state, place)
        assert list(map(bits, found)) == list(map(bits, wanted))
    for place in ranks[2:]:
        with pytest.raises(FileNotFoundError, match="rank-0000[23].*copy the nodes' step_00000012 folders together"):
            sharded.load_sharded(path, place)


@pytest.mark.parametrize("name, node", [("dp2 tp2 ep2 ZeRO-1", 2), ("dp2 pp2 vpp2 ZeRO-1", 2)])
def test_without_a_shared_file_system_every_node_reads_what_its_ranks_wrote(saved, tmp_path, name, node):
    params, state, folders = saved
    ranks = placements(name)
    save(tmp_path, 12, name, params, state, node)
    homes = [tmp_path / f"node{i}" for i in range(len(ranks) // node)]

    def work(i, gather):
        found = sharded.latest_sharded(homes[i // node], placement=ranks[i], gather=gather, share=(i % node, node))
        return [bits(tree) for tree in sharded.load_sharded(found, ranks[i])[:2]]

    for place, found in zip(ranks, together(len(ranks), work), strict=True):
        assert found == [bits(tree) for tree in cut(params, state, place)]
    step = homes[0] / "checkpoints" / "step_00000012"
    assert training.latest_training(homes[0]) is None  # one device needs them all
    for other in homes[1:]:
        shutil.copytree(other / "checkpoints" / "step_00000012", step, dirs_exist_ok=True)
    whole_params, whole_state, *_ = training.load_training(training.latest_training(homes[0]))
    assert (bits(whole_params), bits(whole_state)) == (bits(params), bits(state))


def test_killed_anywhere_in_a_save_the_last_checkpoint_is_whole(saved, tmp_path, monkeypatch):
    params, state, _ = saved
    name = "tp2"
    ranks = placements(name)
    save(tmp_path, 12, name, params, state)
    newer, newer_state = whole(1)
    points = []

    def dying(function, when):
        def call(*args, **kwargs):
            points.append(function.__name__)
            if len(points) == when:
                raise OSError("killed")
            return function(*args, **kwargs)

        return call

    def latest(i, gather):
        return sharded.latest_sharded(tmp_path, placement=ranks[i], gather=gather, share=(i, len(ranks)))

    for when in range(1, 80):
        points.clear()
        with monkeypatch.context() as patch:
            for module, function in ((sharded.safetensors_io, "create"), (sharded.safetensors_io, "finish"),
                                     (sharded.folder, "write_text"), (sharded.folder, "write_manifest"),
                                     (sharded.folder, "settle")):
                patch.setattr(module, function, dying(getattr(module, function), when))
            try:
                save(tmp_path, 13, name, newer, newer_state)
            except OSError as error:
                assert "killed" in str(error) or "failed on rank" in str(error)
            else:
                break
        for found in together(len(ranks), latest):
            assert found.name == "step_00000012"
        loaded = training.load_training(training.latest_training(tmp_path))
        assert bits(loaded[0]) == bits(params)
    assert 12 < when < 79
    for found in together(len(ranks), latest):
        assert found.name == "step_00000013"
    assert bits(training.load_training(found)[0]) == bits(newer)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000012", "step_00000013"]
    save(tmp_path, 14, name, params, state)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000013", "step_00000014"]


def test_a_damaged_checkpoint_is_skipped_by_all_ranks_together(saved, tmp_path):
    params, state, folders = saved
    ranks = placements("dp2")
    shutil.copytree(folders["tp2"], tmp_path / "checkpoints" / "step_00000012")
    last = tmp_path / "checkpoints" / "step_00000013"
    shutil.copytree(folders["tp2"], last)
    file = last / sharded.file_name("optimizer", 1)
    text = bytearray(file.read_bytes())
    text[-5] ^= 1
    file.write_bytes(text)

    def latest(i, gather):
        return sharded.latest_sharded(tmp_path, placement=ranks[i], gather=gather, share=(i, len(ranks)))

    with pytest.warns(UserWarning, match="CRC-32"):
        assert [found.name for found in together(2, latest)] == ["step_00000012"] * 2
    (tmp_path / "checkpoints" / "step_00000012" / "model.pieces.json").unlink()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no checkpoint that every rank can read"):
        raise together(2, latest)[0]


def test_an_index_that_leaves_a_gap_or_names_another_type_is_refused(saved, tmp_path):
    path = tmp_path / "step_00000012"
    shutil.copytree(saved[2]["tp2"], path)
    index = path / "model.pieces.json"
    good = json.loads(index.read_text())
    for change, words in (((0, 40), "do not cover its shape"), ("F32", "says")):
        content = json.loads(index.read_text())
        if change == "F32":
            content["pieces"]["head"]["dtype"] = change
        else:
            content["pieces"]["head"]["pieces"][sharded.file_name("model", 0)][1] = list(change)
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=words):
            sharded.load_sharded(path, placements("tp2")[0])
        index.write_text(json.dumps(good))


def test_slices_of_another_shape_are_refused(saved, tmp_path):
    params, state, _ = saved
    place = placements("tp2")[0]
    mine = cut(params, state, place)
    with pytest.raises(ValueError, match=r"params: head has shape \(64, 128\); this rank's slice"):
        sharded.save_sharded(tmp_path, 1, mine[0] | {"head": params["head"]}, mine[1], META, cfg=CFG, placement=place,
                             gather=lambda number: np.array([number]), node=2, leads=True)


def test_a_part_is_drawn_without_the_whole():
    """Experts of 64 MB: a rank's eighth in a quarter of that, the same numbers whatever is drawn at once."""
    spec = ParamSpec((16, 1024, 1024), ("expert", "embed", "ffn"), normal(0.02))
    whole, where = draw(spec, "layers.3.experts.w_up", 5), (slice(6, 8), slice(0, 1024), slice(0, 1024))
    tracemalloc.start()
    part = draw(spec, "layers.3.experts.w_up", 5, where)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(part, whole[where])
    assert part.flags.c_contiguous and part.nbytes == 8 << 20 and peak < 32 << 20, peak
    small = ParamSpec((50, 33), ("vocab", "embed"), normal(0.02))
    rng = np.random.default_rng([5, zlib.crc32(b"embed")])
    expected = rng.standard_normal((50, 33), np.float32) * np.float32(0.02)
    np.testing.assert_array_equal(draw(small, "embed", 5, (slice(7, 41), slice(3, 9))), expected[7:41, 3:9])


def test_drawn_slices_are_those_of_init():
    wanted = dsv3.init(CFG, 5, "bfloat16")
    for name in ("dp2 tp2 ep2 ZeRO-1", "dp2 pp2 vpp2 ZeRO-1"):
        for place in placements(name):
            assert bits(sharded.draw_part(CFG, place, 5, "bfloat16")) == bits(cut(wanted, whole(0)[1], place)[0])
