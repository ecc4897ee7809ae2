"""A rank's slices for decoding, from whatever wrote the checkpoint: bit for bit those of the whole params, and nothing else read.

Placement is data: one process plays all ranks; nothing is compiled.
Planted faults this file was seen to catch, one at a time:
rank 0's slices for all ranks; the first experts for all; no file compared with its checksum; the whole read and then cut.
"""
import json
import tracemalloc

import pytest
from test_parallel_files import CFG, LAYOUTS, bits, save, whole

import dsv3
from dsv3.checkpoint.part import load_part
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.rules import make_rules
from dsv3.parallel.shard import Placement
from dsv3.parallel.stages import own

MESH = "data=2,model=2,expert=2"
# several blocks of FP8, cut inside of them
WIDE = CFG.replace(num_hidden_layers=2, hidden_size=160, intermediate_size=288, moe_intermediate_size=96)


def ranks(text):
    mesh = Mesh.parse(text)
    return [Placement(mesh, make_rules(), rank) for rank in range(mesh.size)]


def same_slices(path, params, cfg, **options):
    for placement in ranks(MESH):
        found, found_cfg = load_part(path, placement, **options)
        assert found_cfg == cfg and bits(found) == bits(own(params, cfg, placement)), (path, placement.rank)


@pytest.mark.parametrize("name", ["dp2 pp2 vpp2 ZeRO-1", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("one device", "dp2 tp2 ZeRO-3"))])
def test_checkpoints_of_training_on_any_mesh(tmp_path, name):
    assert name in LAYOUTS
    params, state = whole(0)
    same_slices(save(tmp_path, 12, name, params, state), params, CFG)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_own_weights_and_released_ones(tmp_path, dtype):
    params = dsv3.init(WIDE, seed=1)
    dsv3.to_hf(params, WIDE, tmp_path / "hf", dtype)
    mtp = dtype == "bfloat16"
    read, cfg = dsv3.from_hf(tmp_path / "hf", "float32", mtp=mtp)
    same_slices(tmp_path / "hf", read, cfg, dtype="float32", mtp=mtp)
    if mtp:
        same_slices(dsv3.save(tmp_path / "own", params, cfg=WIDE, dtype=dtype), *dsv3.load(tmp_path / "own"))


def test_only_the_slices_are_held(tmp_path):
    cfg = CFG.replace(n_routed_experts=16, hidden_size=512, moe_intermediate_size=128, num_nextn_predict_layers=0)
    path = dsv3.save(tmp_path / "own", dsv3.init(cfg, seed=1), cfg=cfg)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    placement = Placement(Mesh(data=4, model=2, expert=4), make_rules(), 5)
    load_part(path, placement)  # what is imported and kept
    tracemalloc.start()
    load_part(path, placement)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 10e6 < size and peak < 0.3 * size, (peak, size)


def test_what_is_refused(tmp_path):
    path = dsv3.save(tmp_path / "own", dsv3.init(CFG, seed=1), cfg=CFG)
    with pytest.raises(ValueError, match=r"embed: dim 0 \('vocab'\) of size \d+ is not divisible by 3"):
        load_part(path, Placement(Mesh(model=3), make_rules()))
    with pytest.raises(ValueError, match="pipe=2: the params of a pipeline stage"):
        load_part(path, Placement(Mesh(pipe=2), make_rules()))
    weights = next(path.glob("*.safetensors"))
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(ValueError, match="the file is damaged"):
        load_part(path, ranks("model=2")[0])
    load_part(path, ranks("model=2")[1], share=(1, 2))  # the other rank's to compare
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    with pytest.raises(ValueError, match="config.json: expected"):
        load_part(path, ranks("model=2")[1], share=(1, 2))
