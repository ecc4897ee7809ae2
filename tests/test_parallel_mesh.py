"""The mesh and the rules: ranks, coordinates and groups; layouts, slices and ZeRO shards; every refusal with its numbers.

Planted faults this file was seen to catch, one at a time: coordinates counted from the slowest axis; replica and expert
swapped; expert beside data instead of inside it; an axis given twice; merging axes that are used apart or are no neighbours; the
index of merged axes; two dims on one axis, or sizes that do not divide, accepted; ZeRO over axes that cut the leaf; shards given
to the wrong copies; a dim 0 and a shard size that do not divide; whole experts cut; "extend" in the wrong order; the rule of
expert.ffn not looked up; sequence parallelism ignored.
"""
import itertools
import subprocess
import sys
from collections import Counter
from math import prod

import pytest

from dsv3.config import PRESETS, TINY, V3
from dsv3.model import param_specs
from dsv3.parallel.mesh import AXES, MESHES, Mesh, coarsen, expand
from dsv3.parallel.rules import EXPERTS, Rules, layout, layout_of, leaves, local_shape, local_slices, make_rules, state_shards
from dsv3.spec import ParamSpec, zeros

UNEVEN = Mesh(data=6, pipe=2, expert=3, model=5, context=7)  # every axis of another size


# -- ranks -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mesh", [*MESHES.values(), UNEVEN], ids=str)
def test_ranks_and_coordinates_are_a_bijection(mesh):
    seen = [tuple(mesh.coords(r).values()) for r in range(mesh.size)]
    assert seen == list(itertools.product(*(range(n) for n in mesh.axes.values())))  # slowest first, in the order of AXES
    assert [mesh.rank(**mesh.coords(r)) for r in range(mesh.size)] == list(range(mesh.size))
    assert mesh.size == mesh.data * mesh.pipe * mesh.model * mesh.context  # expert lies inside data
    assert tuple(mesh.axes) == AXES and tuple(mesh.coords(0)) == AXES


@pytest.mark.parametrize("name, ranks", [("1b", 8), ("4layer", 32), ("671b", 1024), ("mindspeed", 512), ("mindspeed-1node", 8),
                                         ("paper", 2048)])
def test_published_layouts_have_their_clusters_sizes(name, ranks):
    assert MESHES[name].size == ranks


def test_groups_of_the_one_node_layout_by_hand():
    mesh = MESHES["1b"]  # dp2 tp2 pp2 ep2 on 8 ranks
    assert mesh.groups("model") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert mesh.groups("expert") == mesh.groups("data") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert mesh.groups("replica") == tuple((r,) for r in range(8))
    assert mesh.groups("pipe") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert mesh.groups(("expert", "model")) == ((0, 1, 2, 3), (4, 5, 6, 7))


def test_groups_of_the_big_layout_by_hand():
    mesh = MESHES["671b"]  # stages of 64 ranks: 2 replicas of 8 expert ranks of 4 model ranks
    assert mesh.group(70, "model") == (68, 69, 70, 71)
    assert mesh.group(70, "expert") == (66, 70, 74, 78, 82, 86, 90, 94)
    assert mesh.group(70, "replica") == (70, 102)
    assert mesh.group(70, "data") == tuple(range(66, 128, 4))
    assert mesh.group(70, "pipe") == tuple(range(6, 1024, 64))
    assert mesh.coords(70) == {"pipe": 1, "replica": 0, "expert": 1, "context": 0, "model": 2}
    assert mesh.rank(pipe=1, data=9, model=3) == mesh.rank(pipe=1, replica=1, expert=1, model=3) == 64 + 32 + 4 + 3


@pytest.mark.parametrize("axes", ["model", "data", "expert", ("replica", "context"), ("pipe", "model"), AXES])
def test_every_rank_is_in_one_group(axes):
    groups = UNEVEN.groups(axes)
    assert sorted(itertools.chain(*groups)) == list(range(UNEVEN.size))
    assert {len(g) for g in groups} == {UNEVEN.extent(axes)}
    for group in groups[:20]:
        assert all(UNEVEN.group(r, axes) == group for r in group)
        assert [UNEVEN.index(UNEVEN.coords(r), axes) for r in group] == list(range(len(group)))


def test_parse_reads_what_str_writes():
    for mesh in (*MESHES.values(), UNEVEN, Mesh()):
        assert Mesh.parse(str(mesh)) == mesh
    assert Mesh.parse("671b") is MESHES["671b"]
    assert Mesh.parse(" data = 2 , model=2 ") == Mesh(data=2, model=2)


@pytest.mark.parametrize("text, says", [
    ("data=4,expert=3", "expert=3 does not divide data=4.*from 1, 2, 4, or data=6"),
    ("data=4,tensor=2", "no axis 'tensor'.*data, pipe, expert, model, context"),
    ("data=2,data=4", "data is given twice, 2 and 4"),
    ("data=two", "data='two'; expected a whole number"),
    ("data=0", "data=0; it must be an integer of at least 1"),
    ("data=-1", "data='-1'"),
    ("big", "'big' is not AXIS=NUMBER.*671b"),
    ("", "is not AXIS=NUMBER"),
])
def test_parse_refuses(text, says):
    with pytest.raises(ValueError, match=says):
        Mesh.parse(text)


def test_mesh_refuses():
    for call, says in [
        (lambda: Mesh(data=True), "data=True"), (lambda: Mesh(model=2.0), "model=2.0"),
        (lambda: UNEVEN.coords(UNEVEN.size), f"rank {UNEVEN.size} does not exist.*0 to {UNEVEN.size - 1}"),
        (lambda: UNEVEN.coords(-1), "rank -1"), (lambda: UNEVEN.rank(model=5), "model=5 does not exist.*0 to 4"),
        (lambda: UNEVEN.rank(data=1, expert=1), "give either"), (lambda: UNEVEN.rank(tensor=1), "no axis 'tensor'"),
        (lambda: expand("tensor"), "no axis 'tensor'"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()


def test_coarsen_merges_only_what_is_always_together():
    axes, E, M = UNEVEN.axes, ("replica", "expert"), ("model",)
    assert coarsen(axes, [(E, (), M), ((), E)]) == (
        {"pipe": 2, "replica_expert": 6, "context": 7, "model": 5}, ((("replica_expert",), (), M), ((), ("replica_expert",))))
    for layouts in ([(E, M), (("expert",), ())],  # expert alone elsewhere
                    [((*E, "context"),), (("context", "model"),)],  # overlapping runs
                    [(("expert", "replica"),)],  # not in the order of the matrix
                    [(("replica", "context"),)]):  # not neighbours
        assert coarsen(axes, layouts) == (axes, tuple(layouts))
    whole = coarsen(axes, [(AXES,)])
    assert whole == ({"_".join(AXES): UNEVEN.size}, ((("_".join(AXES),),),))


# -- rules -------------------------------------------------------------------------------------------------------------
def test_layouts_of_the_big_model_by_hand():
    mesh, found = MESHES["671b"], {leaf.path: leaf for leaf in leaves(param_specs(V3), MESHES["671b"], make_rules(zero=1))}
    for path, cuts, local, shards in [
        ("embed", (("model",), ()), (32320, 7168), 16),
        ("head", ((), ("model",)), (7168, 32320), 16),
        ("norm", ((),), (7168,), 16),
        ("layers.0.attn.wq_a", ((), ()), (7168, 1536), 16),
        ("layers.0.attn.wq_b", ((), ("model",)), (1536, 6144), 16),
        ("layers.0.attn.wkv_a", ((), ()), (7168, 576), 16),
        ("layers.0.attn.wkv_b", ((), ("model",)), (512, 8192), 16),
        ("layers.0.attn.wo", (("model",), ()), (4096, 7168), 16),
        ("layers.0.mlp.w_down", (("model",), ()), (4608, 7168), 16),
        ("layers.3.router.w", ((), ()), (7168, 256), 16),
        ("layers.3.experts.w_gate", (("expert",), (), ("model",)), (32, 7168, 512), 2),  # copies: replica = 16 / 8
        ("layers.3.experts.w_down", (("expert",), ("model",), ()), (32, 512, 7168), 2),
        ("layers.3.shared.w_up", ((), ("model",)), (7168, 512), 16),
        ("mtp.0.eh_proj", ((), ()), (14336, 7168), 16),
    ]:
        leaf = found[path]
        assert (leaf.layout, leaf.local, leaf.shards) == (cuts, local, shards), path
    assert len(found) == 1046 and mesh.size == 1024


@pytest.mark.parametrize("experts, cuts, local", [
    ("tensor", (("expert",), (), ("model",)), (32, 7168, 512)),
    ("extend", (("expert", "model"), (), ()), (8, 7168, 2048)),
    ("whole", (("expert",), (), ()), (32, 7168, 2048)),
])
def test_three_ways_to_lay_out_experts(experts, cuts, local):
    spec, rules = param_specs(V3)["layers"][3]["experts"]["w_gate"], make_rules(experts=experts)
    assert layout(spec, MESHES["671b"], rules) == cuts and local_shape(spec, MESHES["671b"], rules) == local
    shared = param_specs(V3)["layers"][3]["shared"]["w_gate"]  # its ffn keeps the plain rule
    assert layout(shared, MESHES["671b"], rules) == ((), ("model",))


def test_switches_of_the_table():
    plain, sp = make_rules(), make_rules(sequence_parallel=True)
    axes = ("batch", "residual_seq", "embed")
    assert layout_of((32, 4096, 7168), axes, MESHES["671b"], plain) == (("replica", "expert"), ("context",), ())
    assert layout_of((32, 4096, 7168), axes, MESHES["671b"], sp) == (("replica", "expert"), ("context", "model"), ())
    assert layout_of((8192, 7168), ("tokens", "heads"), MESHES["671b"], sp) == (("replica", "expert", "context"), ("model",))
    embed = param_specs(V3)["embed"]
    assert local_shape(embed, MESHES["671b"], make_rules(vocab_parallel=False)) == (129280, 7168)
    assert plain.replace("embed", ("model",)).axes("embed") == ("model",) and plain.axes("embed") == ()


SMALL_MESHES = [Mesh(data=4, expert=2, model=2), Mesh(data=2, pipe=2, model=4), Mesh(data=4, expert=4, context=2, model=2),
                Mesh()]


def check_cover(spec, mesh, rules, state):
    """The slices of all ranks of a stage tile the leaf, each as often as there are copies."""
    ranks = [mesh.coords(r) for r in range(mesh.size // mesh.pipe)]
    regions = Counter(tuple((s.start, s.stop) for s in local_slices(spec, mesh, rules, at, state=state)) for at in ranks)
    volume = {region: prod(b - a for a, b in region) for region in regions}
    assert sum(volume.values()) == spec.size and len(set(volume.values())) == 1
    assert set(regions.values()) == {len(ranks) // len(regions)}
    for a, b in itertools.combinations(list(regions)[:200], 2):
        assert any(p[1] <= q[0] or q[1] <= p[0] for p, q in zip(a, b)), "two regions overlap"
    assert all(0 <= a < b <= n for region in regions for (a, b), n in zip(region, spec.shape))
    parts = prod(mesh.extent(cuts) for cuts in layout(spec, mesh, rules)) * (state_shards(spec, mesh, rules) if state else 1)
    assert len(regions) == parts


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("mesh", SMALL_MESHES, ids=str)
def test_slices_of_all_ranks_tile_every_leaf(mesh, experts):
    for rules in (make_rules(experts=experts), make_rules(experts=experts, zero=1),
                  make_rules(experts=experts, zero=3, shard_size=2, zero_axes=("replica", "expert", "context", "model"))):
        for leaf in leaves(param_specs(TINY), mesh, rules):
            for state in (False, True):
                check_cover(leaf.spec, mesh, rules, state)


@pytest.mark.parametrize("name", MESHES)
def test_slices_of_the_published_layouts_tile(name):
    mesh, rules = MESHES[name], make_rules(zero=1)
    kinds = {(leaf.spec.shape, leaf.spec.axes): leaf.spec for leaf in leaves(param_specs(V3), mesh, rules)}
    for spec in kinds.values():
        check_cover(spec, mesh, rules, True)


def test_slices_by_hand():
    mesh, rules = Mesh(data=4, expert=2, model=2), make_rules(zero=1)
    spec = ParamSpec((8, 6, 10), ("expert", "embed", "ffn"), zeros)
    at = mesh.coords(7)  # replica 1, expert 1, model 1
    assert local_slices(spec, mesh, rules, at) == (slice(4, 8), slice(0, 6), slice(5, 10))
    assert local_slices(spec, mesh, rules, at, state=True) == (slice(6, 8), slice(0, 6), slice(5, 10))
    dense = ParamSpec((8, 10), ("embed", "heads"), zeros)
    assert local_slices(dense, mesh, rules, at, state=True) == (slice(6, 8), slice(5, 10))
    half = make_rules(zero=1, shard_size=2)  # the two pairs of neighbours hold the same
    assert local_slices(dense, mesh, half, at, state=True) == (slice(4, 8), slice(5, 10))
    assert local_slices(dense, mesh, half, mesh.coords(5), state=True) == (slice(0, 4), slice(5, 10))


def test_zero_shards():
    mesh, spec = MESHES["671b"], param_specs(V3)["layers"][3]["experts"]["w_gate"]
    dense = param_specs(V3)["layers"][3]["attn"]["wq_a"]
    assert state_shards(dense, mesh, make_rules()) == 1  # off
    assert state_shards(dense, mesh, make_rules(zero=2)) == 16
    assert state_shards(dense, mesh, make_rules(zero=1, shard_size=4)) == 4
    assert state_shards(spec, mesh, make_rules(zero=1, shard_size=4)) == 2  # 4 does not divide its 2 copies: all of them
    all_axes = ("replica", "expert", "context", "model")
    assert state_shards(dense, mesh, make_rules(zero=1, zero_axes=all_axes)) == 64
    assert state_shards(spec, mesh, make_rules(zero=1, experts="whole", zero_axes=all_axes)) == 8
    assert state_shards(ParamSpec((24, 2), ("embed", None), zeros), mesh, make_rules(zero=1)) == 1  # 16 does not divide 24


@pytest.mark.parametrize("shape, axes, mesh, rules, says", [
    ((8, 9), ("embed", "heads"), Mesh(model=2), make_rules(),
     r"w: dim 1 \('heads'\) of size 9 is not divisible by 2 \(model=2\).*1, 3, 9"),
    ((6, 8), ("batch", "embed"), Mesh(data=4, expert=2), make_rules(), r"size 6 is not divisible by 4 \(replica=2\*expert=2\)"),
    ((8, 8), ("heads", "ffn"), Mesh(), make_rules(),
     r"dims 0 \('heads'\) and 1 \('ffn'\) both lie on the mesh axis 'model'.*replace\('ffn'"),
    ((8, 8, 8), ("expert", "embed", "ffn"), Mesh(), make_rules(experts="extend").replace("expert.ffn", ("model",)),
     "dims 0 .* and 2 .* both lie on the mesh axis 'model'"),
    ((8, 8), ("tokens", "expert"), Mesh(), make_rules(), "both lie on the mesh axis 'expert'"),
    ((8,), ("channels",), Mesh(), make_rules(), r"no rule for the axis 'channels'.*vocab.*add \('channels', \(\)\)"),
    ((8,), ("embed", None), Mesh(), make_rules(), "has 1 dims but axes .* name 2"),
])
def test_layout_refuses(shape, axes, mesh, rules, says):
    with pytest.raises(ValueError, match=says):
        layout_of(shape, axes, mesh, rules, "w")


def test_leaves_name_the_leaf_that_does_not_divide():
    with pytest.raises(ValueError, match=r"layers\.1\.experts\.w_gate: dim 0 \('expert'\) of size 16 .* by 32 \(expert=32\)"):
        list(leaves(param_specs(TINY), Mesh(data=32, expert=32), make_rules()))


def test_rules_refuse():
    for call, says in [
        (lambda: make_rules(experts="tp"), "experts='tp'; expected one of tensor, extend, whole"),
        (lambda: make_rules(zero=4), "zero=4"), (lambda: make_rules(zero=1, shard_size=0), "shard_size=0"),
        (lambda: Rules((("embed", ("data",)), ("embed", ()))), "'embed' is given 2 times"),
        (lambda: Rules((("embed", ("data", "expert")),)), "names a mesh axis twice"),
        (lambda: Rules((("embed", ("tensor",)),)), "no axis 'tensor'"),
        (lambda: make_rules(zero_axes=("tensor",)), "no axis 'tensor'"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()


def test_every_axis_of_every_preset_has_a_rule():
    for cfg in PRESETS.values():
        assert sum(leaf.size for leaf in leaves(param_specs(cfg), Mesh(), make_rules())) > 0


def test_mesh_and_rules_never_load_mindspore():
    code = "import sys, dsv3.parallel.mesh, dsv3.parallel.rules; sys.exit('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
