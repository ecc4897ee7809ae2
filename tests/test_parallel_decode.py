"""Decoding with the model cut over ranks: real processes on the CPU write what one device writes, and the same graphs compile
for simulated Ascend ranks.

Planted faults this file was seen to catch, one at a time:
what the ranks of "heads" compute not summed; what their experts say not summed; a rank's wkv_b that of the other rank's heads;
rows of the embedding looked up as if every rank had the first.
"""

import json

import pytest
from cluster import run_ranks
from decode_worker import texts

import dsv3
from dsv3.checkpoint import sharded
from dsv3.checkpoint.shards import extents
from dsv3.engine import Engine
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.rules import make_rules
from dsv3.parallel.shard import Placement
from dsv3.parallel.simulate import simulate
from dsv3.parallel.stages import own
from dsv3.tree import paths, to_numpy

CHANGES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
           "num_attention_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
           "v_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2,
           "initializer_range": 0.3}
PROMPTS, NEW = [[5, 9, 2, 40], list(range(3, 50)), [7]], 6


def test_processes_together_write_what_one_device_writes(tmp_path):
    """data=2, model=2, expert=2: heads, ffn, vocabulary and experts cut; a prompt in two chunks, drafts, drawn and greedy."""
    wanted = texts(None, CHANGES, PROMPTS, NEW, speculative=False)
    run_ranks(tmp_path, 4, "decode_worker.py", "data=2,model=2,expert=2", json.dumps(CHANGES), json.dumps(PROMPTS), NEW, tmp_path)
    for rank in range(4):
        assert json.loads((tmp_path / f"rank_{rank}.json").read_text()) == wanted


def test_slices_are_quantised_as_the_whole_is():
    """Bit for bit where no sum is cut; else with scales of their own, which are never larger."""
    cfg = dsv3.TINY.replace(**CHANGES)
    params, cut = dsv3.init(cfg, seed=0), 0
    whole = dict(paths(to_numpy(dsv3.quantize(params, cfg, "w8a8"))))
    for rank in range(8):
        placement = Placement(Mesh(data=4, model=2, expert=4), make_rules(), rank)
        parts = {part.leaf: part for part in sharded.parts(cfg, placement)}
        mine = own(params, cfg, placement)
        with pytest.raises(ValueError, match="embed is"):
            dsv3.quantize(mine, cfg, "w8a8")
        shapes = {path: extents(part.box) for path, part in parts.items()}
        found = dict(paths(to_numpy(dsv3.quantize(mine, cfg, "w8a8", shapes=shapes))))
        assert found.keys() == whole.keys()
        for path in (path for path in whole if path.endswith(".w8a8")):
            part, scale = parts[path.removesuffix(".w8a8")], path.replace(".w8a8", ".scale")
            where = tuple(slice(*dim) for dim in part.box)
            columns = where[:-2] + where[-1:]
            if extents(part.box)[-2] == part.spec.shape[-2]:
                assert (found[path] == whole[path][where]).all() and (found[scale] == whole[scale][columns]).all(), path
                continue
            cut += 1
            assert path.split(".")[-2] in ("wo", "w_down") and (found[scale] <= whole[scale][columns]).all(), path
            exact = to_numpy(dict(paths(mine))[path.removesuffix(".w8a8")])
            assert (abs(found[path] * found[scale][..., None, :] - exact) <= 0.5001 * found[scale][..., None, :]).all(), path
    assert cut == 8 * (3 + 5)  # on each rank: three blocks' wo; w_down of one dense block, and of two with shared and own experts


def test_graphs_compile_for_ascend():
    """Prefill, a chunk and a drafted step of a rank of data=2, model=2, expert=2, with what they send."""
    report = simulate("parallel_targets:decode_graphs", {"changes": CHANGES, "mesh": "data=2,model=2,expert=2"}, 4, 1)
    graphs = {graph.name: graph for graph in report.graphs}
    assert set(graphs) == {"prefill", "extend", "speculate"}
    for name, blocks in (("prefill", 3), ("extend", 3), ("speculate", 3)):
        kinds = {(c.kind, c.group) for c in graphs[name].collectives}
        assert ("AllReduce", (0, 1)) in kinds and ("AllReduce", (1, 3)) in kinds, (name, kinds)  # heads and ffn; experts
        sums = sum(c.count for c in graphs[name].collectives if c.group == (1, 3) and c.kind == "AllReduce")
        assert sums == blocks - 1, (name, sums)  # one a mixture: the first block is dense


def test_refused_meshes():
    with pytest.raises(ValueError, match="not rows or layers over \\('pipe',\\)"):
        texts(Mesh(pipe=2), CHANGES, PROMPTS, NEW, rank=0, speculative=False)
    with pytest.raises(ValueError, match="not rows or layers over \\('context',\\)"):
        texts(Mesh(context=2), CHANGES, PROMPTS, NEW, rank=0, speculative=False)
    cfg = dsv3.TINY.replace(**CHANGES)
    with pytest.raises(ValueError, match="experts over expert alone, not over model too"):
        Engine(dsv3.init(cfg), cfg, mesh=Mesh(model=2), rules=make_rules(experts="extend"))
