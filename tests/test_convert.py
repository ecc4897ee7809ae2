"""Conversions between the layouts on random small models: nothing may be lost, changed or moved.

The layouts themselves are held to independent accounts of them elsewhere; here a tensor must survive every way round, and
the quantised forms to their definition in ``test_convert_fp8``.

Planted faults this file was seen to catch, one at a time: pieces of a part that start at 0, run along the wrong dimension,
or lack the last one; rows read in the order of the file; verify without the comparison of checksums, of replicas, or of the
small files; copies of MTP not compared; the type of the weights, or the number of MTP modules, not in the config.
"""
import dataclasses
import json

import numpy as np
import pytest

import dsv3
from dsv3.checkpoint import convert, formats, hf, mcore, safetensors_io, shards
from dsv3.checkpoint.layout import Chunk, Part
from dsv3.checkpoint.layout import cut as pieces
from dsv3.checkpoint.mcore import McoreStrategy
from dsv3.checkpoint.mindformers import MindformersForm
from dsv3.checkpoint.names import published
from dsv3.checkpoint.safetensors_io import DTYPES, Slot
from dsv3.config import Config

SMALL = Config(
    vocab_size=44, hidden_size=12, intermediate_size=20, moe_intermediate_size=8, num_hidden_layers=3, first_k_dense_replace=1,
    num_nextn_predict_layers=1, num_attention_heads=2, q_lora_rank=7, kv_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=4,
    v_head_dim=6, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
)
FLOAT = {"BF16": "bfloat16", "F32": "float32", "F16": "float16"}


# -- checkpoints -------------------------------------------------------------------------------------------------------
def weights(cfg, kind, rng):
    """{published name: (file type, array)}: random bits, infinities and signs of zero too; copies are copies."""
    out, by_leaf = {}, {}
    for t in published(cfg):
        stored = "F32" if t.float32 else kind
        if t.copy:
            out[t.name] = stored, by_leaf[t.path]
            continue
        bits = rng.integers(0, 256, (*t.shape, DTYPES[stored].itemsize), np.uint8).view(f"u{DTYPES[stored].itemsize}")[..., 0]
        if stored != kind or kind == "BF16":  # the bits of a NaN need not survive a wider type and back
            exponent = bits.dtype.type(0x7F80 << (16 if stored == "F32" else 0))
            bits = np.where(bits & exponent == exponent, bits & bits.dtype.type(~(exponent >> 1)), bits)
        bits[(0,) * bits.ndim] = 1 << (8 * bits.itemsize - 1)  # -0
        bits[(-1,) * bits.ndim] = 0x7F80 << (16 if stored == "F32" else 0)  # infinity
        out[t.name] = stored, bits.view(DTYPES[stored])
        by_leaf[t.path] = out[t.name][1]
    return out


def write_hf(folder, cfg, tensors, dtype="bfloat16", most="5GB", config=None):
    """A Hugging Face folder of {name: (file type, array)}, tensors in the order given."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or hf.config_json(cfg, dtype)))
    slots = [Slot(name, kind, array.shape) for name, (kind, array) in tensors.items()]
    shards.write_shards(folder, "model", slots, ((n, a) for n, (_, a) in tensors.items()), most, {}, always_index=False)
    return folder


def stored(folder):
    """{name: (file type, shape, bytes)} of every tensor of a folder of safetensors files."""
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = safetensors_io.open_file(path)
        for name, slot in file.slots.items():
            assert name not in out, f"{name} is in two files"
            out[name] = slot.dtype, slot.shape, safetensors_io.read(file, name).tobytes()
    return out


def files(folder):
    """Every file of a folder and of those in it."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


def run(source, folder, form, **options):
    """Convert an open source or a folder, verify, and return the result's folder and Source."""
    source = source if isinstance(source, formats.Source) else formats.open_checkpoint(source)
    target = formats.make_target(source, form, **options)
    convert.convert(source, target, folder, progress=False)
    extended = {"moe_tp_extend_ep": options["strategy"].moe_tp_extend_ep} if form == "mcore" else {}
    result = formats.open_checkpoint(folder, **extended)
    assert result.form == form.removesuffix("-fp8")
    count, _ = convert.verify(source, result, target, progress=False)
    assert count == len([t for t in published(result.cfg) if result.home(t.name) == t.name]) > 0
    return result


# -- round trips -------------------------------------------------------------------------------------------------------
def random_config(rng):
    """A small model; its widths are odd where that leaves a way to cut it."""

    def pick(*values):
        return values[rng.integers(len(values))]

    layers, groups = int(rng.integers(1, 6)), pick(1, 2, 4)
    experts = groups * pick(1, 2, 3)
    taken = int(rng.integers(1, groups + 1))
    return Config(
        vocab_size=pick(12, 20, 37), hidden_size=pick(4, 8, 10), intermediate_size=pick(8, 12, 9), num_hidden_layers=layers,
        moe_intermediate_size=pick(4, 6, 7), first_k_dense_replace=int(rng.integers(0, layers)), moe_layer_freq=pick(1, 1, 2),
        num_nextn_predict_layers=pick(0, 1, 2), num_attention_heads=pick(1, 2, 4), q_lora_rank=pick(None, *[3, 5] * 4),
        kv_lora_rank=pick(1, 5), qk_nope_head_dim=pick(1, 3, 4), qk_rope_head_dim=pick(2, 4, 6), v_head_dim=pick(1, 3, 5),
        n_routed_experts=experts, n_shared_experts=pick(0, 1, 2), n_group=groups, topk_group=taken,
        num_experts_per_tok=int(rng.integers(1, taken * (experts // groups) + 1)),
        topk_method=pick("noaux_tc", "noaux_tc", "group_limited_greedy"), tie_word_embeddings=pick(*[False] * 7, True),
    )


def random_strategy(rng, cfg):
    """Of some random strategies that are valid for the config the one that differs most from the trivial one, or None."""

    def pick(*values):
        return values[rng.integers(len(values))]

    found = []
    for _ in range(600):
        pp, kind = pick(1, 2, 2, 3), pick("plain", "virtual", "list", "dualpipev", "noop")
        noops = int(rng.integers(1, 4)) if kind in ("noop", "virtual", "dualpipev") else 0
        layers = cfg.num_hidden_layers
        strategy = McoreStrategy(
            tensor_parallel_size=pick(1, 2, 2, 4), pipeline_parallel_size=pp, expert_parallel_size=pick(1, 2, 3),
            num_layers_per_virtual_pipeline_stage=pick(1, 2) if kind == "virtual" else None,
            noop_layers=tuple(sorted(rng.choice(layers + noops, noops, replace=False).tolist())),
            num_layer_list=tuple((rng.multinomial(layers - pp, [1 / pp] * pp) + 1).tolist()) if kind == "list" and layers >= pp
            else None,
            moe_grouped_gemm=pick(True, False, False), moe_tp_extend_ep=bool(rng.integers(2)), mla_mm_split=bool(rng.integers(2)),
            schedules_method="dualpipev" if kind == "dualpipev" else None,
        )
        try:
            mcore.check(strategy, cfg)
        except ValueError:
            continue
        found.append((len(choices(strategy)) + 2 * (strategy.tensor_parallel_size > 1) + 5 * rng.random(), strategy))
    return max(found, key=lambda item: item[0])[1] if found else None


def choices(strategy):
    """The fields of a strategy that are not the defaults."""
    plain = dataclasses.asdict(McoreStrategy())
    return {name for name, value in dataclasses.asdict(strategy).items() if value != plain[name]}


SEEDS = (0, 2, 5, 11, 13, 16, 17, 18, 24, 29, 31, 32)


def test_the_random_models_cover_what_there_is():
    drawn = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        cfg = random_config(rng)
        drawn.append((cfg, random_strategy(rng, cfg)))
    strategies = [s for _, s in drawn if s]
    fields = {f.name for f in dataclasses.fields(McoreStrategy)} - {"mtp_num_layers", "version"}
    assert set().union(*map(choices, strategies)) >= fields
    assert {s.moe_grouped_gemm + s.moe_tp_extend_ep for s in strategies if s.tensor_parallel_size > 1} == {0, 1, 2}
    assert {c.num_nextn_predict_layers for c, _ in drawn} == {c.n_shared_experts for c, _ in drawn} == {0, 1, 2}
    assert {c.tie_word_embeddings for c, _ in drawn} == {c.q_lora_rank is None for c, _ in drawn} == {False, True}


@pytest.mark.parametrize("seed", SEEDS)
def test_every_way_round(tmp_path, seed):
    rng = np.random.default_rng(seed)
    cfg, kind = random_config(rng), ("BF16", "F32")[seed % 2]
    strategy = random_strategy(rng, cfg)
    infer = bool(rng.integers(2))
    form = MindformersForm(use_grouped_gemm=bool(rng.integers(2)), infer=infer, via_train=infer and bool(rng.integers(2)))
    print(f"{seed=} {cfg=}\n{kind=} {strategy=} {form=}")  # shown on a failure
    first = weights(cfg, kind, rng)
    write_hf(tmp_path / "hf", cfg, first, FLOAT[kind], most=int(rng.integers(500, 5000)))
    here = run(tmp_path / "hf", tmp_path / "own", "own", max_shard_size=int(rng.integers(500, 5000)))
    for (path, ours), (_, theirs) in zip(*(dsv3.tree.paths(x) for x in (dsv3.load(tmp_path / "own")[0],
                                                                       dsv3.from_hf(tmp_path / "hf")[0]))):
        assert ours.dtype == theirs.dtype and ours.get_bytes() == theirs.get_bytes(), path
    if strategy:
        run(here, tmp_path / "mcore", "mcore", strategy=strategy)
        here = run(formats.open_checkpoint(tmp_path / "mcore", moe_tp_extend_ep=strategy.moe_tp_extend_ep),
                   tmp_path / "own again", "own")
        assert stored(tmp_path / "own again") == stored(tmp_path / "own")
    run(here, tmp_path / "mindformers", "mindformers", mindformers_form=form)
    run(tmp_path / "mindformers", tmp_path / "own at last", "own")
    run(tmp_path / "own at last", tmp_path / "hf again", "hf", max_shard_size=int(rng.integers(500, 5000)))
    again = stored(tmp_path / "hf again")
    assert again == {name: (k, a.shape, a.tobytes()) for name, (k, a) in first.items()}
    assert Config.from_hf(tmp_path / "hf again") == cfg
    assert json.loads((tmp_path / "hf again/config.json").read_text())["torch_dtype"] == FLOAT[kind]


def test_weights_of_several_types_remember_which_one_is_meant(tmp_path):
    first, config = weights(SMALL, "BF16", np.random.default_rng(0)), hf.config_json(SMALL, "bfloat16")
    del config["torch_dtype"]
    write_hf(tmp_path / "hf", SMALL, first, config=config)
    run(tmp_path / "hf", tmp_path / "mindformers", "mindformers")  # its norms are float32
    run(tmp_path / "mindformers", tmp_path / "again", "hf")
    assert stored(tmp_path / "again") == stored(tmp_path / "hf")


def test_fewer_mtp_modules_for_megatron(tmp_path):
    source = write_hf(tmp_path / "hf", SMALL, weights(SMALL, "BF16", np.random.default_rng(0)))
    run(source, tmp_path / "mcore", "mcore", strategy=McoreStrategy(mtp_num_layers=0))
    run(tmp_path / "mcore", tmp_path / "again", "hf")
    wanted = {name: x for name, x in stored(source).items() if not name.startswith("model.layers.3.")}
    assert stored(tmp_path / "again") == wanted
    assert Config.from_hf(tmp_path / "again") == SMALL.replace(num_nextn_predict_layers=0)


@pytest.mark.parametrize("copy", ["embed_tokens", "shared_head.head"])
def test_a_copy_that_differs_is_refused_or_kept(tmp_path, copy):
    first, name = weights(SMALL, "BF16", np.random.default_rng(0)), f"model.layers.3.{copy}.weight"
    first[name] = "BF16", first[name][1].copy()
    first[name][1][5, 2] ^= 1
    source = formats.open_checkpoint(write_hf(tmp_path / "hf", SMALL, first, most=3000))
    where = next(p.name for p in sorted((tmp_path / "hf").glob("*.safetensors")) if name in safetensors_io.open_file(p).slots)
    for to in ("own", "mcore", "mindformers"):
        with pytest.raises(ValueError, match=f"{where}: tensor '{name}' differs from .*first in row 5"):
            formats.make_target(source, to)
    run(source, tmp_path / "again", "hf")
    run(source, tmp_path / "infer", "mindformers", mindformers_form=MindformersForm(infer=True))  # which has a place for them
    run(tmp_path / "infer", tmp_path / "back", "hf")
    assert stored(tmp_path / "again") == stored(tmp_path / "back") == stored(tmp_path / "hf")


# -- pieces ------------------------------------------------------------------------------------------------------------
def test_pieces_cover_a_chunk_exactly():
    rng, cut = np.random.default_rng(7), 0
    for _ in range(600):
        chunk, arrays = random_chunk(rng)
        most = 1 + int(1.3 * chunk.size * rng.random() ** 3)
        found = list(pieces(chunk, most))
        whole = read_chunk(chunk, arrays)
        assert whole.shape == chunk.shape
        assert np.array_equal(np.concatenate([read_chunk(c, arrays).reshape(-1) for c in found]), whole.reshape(-1))
        cut += len(found) > len(chunk.parts)
        for piece in found:
            (part,) = piece.parts if piece is not chunk else (None,)
            if part and isinstance(part.rows, slice) and part.field == "values":
                assert piece.size <= max(most, int(np.prod(piece.shape[1:])))  # a row is the least
    assert cut > 200


def random_chunk(rng):
    """A chunk of random parts, and {name: array} of what they are parts of."""
    parts, arrays = [], {}
    vector, transposed, axis = rng.integers(6) == 0, bool(rng.integers(2)), 0 if rng.integers(3) else 1
    axis = 0 if vector else axis
    same = int(rng.integers(1, 20))  # of the dimension that is not joined
    for i in range(rng.integers(1, 4)):
        shape = (int(rng.integers(1, 400)),) if vector else tuple(int(n) for n in rng.integers(20, 300, 2))
        bounds = []
        for dim, n in enumerate(shape):
            fixed = not vector and (dim == 1 - axis) != transposed
            start = int(rng.integers(0, n - same + 1)) if fixed else int(rng.integers(0, n))
            bounds.append(slice(start, start + same) if fixed else slice(start, int(rng.integers(start + 1, n + 1))))
        if bounds[0] == slice(0, shape[0]) and rng.integers(2):
            bounds[0] = slice(None)
        if rng.integers(4) == 0:
            bounds[0] = rng.permutation(np.arange(shape[0])[bounds[0]])
        arrays[str(i)] = rng.integers(0, 1 << 30, shape)
        parts.append(Part(str(i), shape, *bounds, transposed=transposed and not vector))
    return Chunk(tuple(parts), axis), arrays


def read_chunk(chunk, arrays):
    """What a chunk holds, by plain indexing."""
    taken = []
    for part in chunk.parts:
        rows = arrays[part.name][part.rows]
        taken.append((rows[:, part.cols].T if part.transposed else rows[:, part.cols]) if rows.ndim > 1 else rows)
    return np.concatenate(taken, chunk.axis)


TARGETS = {
    "hf": {}, "hf-fp8": {}, "own": {"dtype": "float32"},
    "mcore": {"strategy": McoreStrategy(tensor_parallel_size=2, moe_grouped_gemm=True)},
    "mindformers": {"mindformers_form": MindformersForm()},
}


# -- verifying ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", TARGETS)
def test_a_flipped_bit_anywhere_in_the_result_is_found(tmp_path, form):
    rng = np.random.default_rng(9)
    first = {name: (k, a if k == "F32" else a & 0xBFFF) for name, (k, a) in weights(SMALL, "BF16", rng).items()}
    source = formats.open_checkpoint(write_hf(tmp_path / "hf", SMALL, first))
    options = TARGETS[form] | ({"max_shard_size": 6000} if form in ("hf", "hf-fp8", "own") else {})
    target = formats.make_target(source, form, **options)
    run(source, tmp_path / "out", form, **options)
    weighty = {tmp_path / "out" / file.path for file in target.files}
    small = {tmp_path / "out" / name for name in target.texts}
    assert len(weighty) > 1 and weighty | small == set(files(tmp_path / "out")) - {
        tmp_path / "out" / "conversion.json", tmp_path / "out" / "manifest.json"}

    def differs():
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            result = formats.open_checkpoint(tmp_path / "out", **({"moe_tp_extend_ep": False} if form == "mcore" else {}))
            convert.verify(source, result, target, progress=False)
        return str(error.value)

    for path in sorted(weighty):
        whole = path.read_bytes()
        at = len(whole) - 1 - int(rng.integers(0, 100))
        if form == "mcore":  # the archive's directory is at the end
            saved = formats.torch_file.open_file(path)
            records = [r for name, r in saved.records.items() if "/data/" in name]
            record = records[rng.integers(len(records))]
            at = record.offset + int(rng.integers(record.size))
        flipped = bytearray(whole)
        flipped[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        message = differs()
        assert path.name in message and ("tensor" in message or "differ" in message), message
        path.write_bytes(whole)
    for path in sorted(small):
        whole = bytearray(path.read_bytes())
        for at in rng.integers(0, len(whole), 10).tolist():
            flipped = bytearray(whole)
            flipped[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(flipped)
            differs()
        path.write_bytes(whole)
    convert.verify(source, formats.open_checkpoint(tmp_path / "out", **({"moe_tp_extend_ep": False} if form == "mcore" else {})),
                   target, progress=False)  # all is as it was


def test_ranks_that_disagree_are_found(tmp_path):
    first = weights(SMALL, "BF16", np.random.default_rng(10))
    source = formats.open_checkpoint(write_hf(tmp_path / "hf", SMALL, first))
    options = {"strategy": McoreStrategy(tensor_parallel_size=2, expert_parallel_size=2)}
    target = formats.make_target(source, "mcore", **options)
    run(source, tmp_path / "out", "mcore", **options)
    name = "decoder.layers.1.input_layernorm.weight"
    for rank in ("00_001", "01_000", "01_001"):  # what is read is rank 00_000
        path = tmp_path / "out" / "iter_0000001" / f"mp_rank_{rank}" / mcore.FILE
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[formats.torch_file.open_file(path).structure["model"][name].offset + 3] ^= 4
        path.write_bytes(flipped)
        result = formats.open_checkpoint(tmp_path / "out")
        with pytest.raises(ValueError, match=f"mp_rank_00_000/.*mp_rank_{rank}/.*{name}.*should hold the same part of "
                                             "'model.layers.1.input_layernorm.weight' and differ"):
            convert.verify(source, result, target, progress=False)
        path.write_bytes(whole)
