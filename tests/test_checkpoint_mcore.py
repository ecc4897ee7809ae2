"""The Megatron-core layout against an oracle that walks MindSpeed-LLM's rules tensor by tensor, for many strategies.

The oracle shares nothing with the layout: it places each layer by the converter's own index formulas and cuts NumPy arrays.
Planted faults this file was seen to catch, one at a time: gate and up swapped; gate and up cut across the ranks; weight1
joined along the wrong axis; weight2 not transposed; linear_qkv with kv first; rope rows from the head's start; rows of the
first rank's heads on every rank; eh_proj whole on every rank; virtual stages dealt stage by stage; dualpipev's second half
in order instead of mirrored; MTP on the last stage under dualpipev; no-op layers closing their gap; moe_tp_extend_ep counting
expert ranks first; the final norm under one name with and without MTP; the embedding's copy on a single stage; the router's
bias in the model's type; expert ranks before stages in folder names; an empty virtual stage left out; dualpipev taken for
virtual stages and expert ranks for stages when the strategy is found.
"""

import dataclasses
import itertools
import time

import numpy as np
import pytest

from dsv3.checkpoint import mcore, torch_file
from dsv3.checkpoint.layout import assemble, locate
from dsv3.checkpoint.mcore import McoreStrategy
from dsv3.checkpoint.mcore_detect import detect
from dsv3.checkpoint.names import published
from dsv3.config import V3, Config

CFG = Config(
    vocab_size=24, hidden_size=12, intermediate_size=20, moe_intermediate_size=8, num_hidden_layers=5, first_k_dense_replace=2,
    num_nextn_predict_layers=2, num_attention_heads=4, q_lora_rank=10, kv_lora_rank=7, qk_nope_head_dim=5, qk_rope_head_dim=2,
    v_head_dim=3, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
)  # fmt: skip


def weights(cfg):
    """{published name: values}, every element different; MTP's copies are told apart from the tensors that they copy."""
    out, at = {}, 0
    for t in published(cfg):
        n = int(np.prod(t.shape))
        out[t.name] = np.arange(at, at + n, dtype=np.uint32).reshape(t.shape).view("<f4")
        at += n
    return out


# -- the oracle ------------------------------------------------------------------------------------------
def position(slot, num_layers, s):
    """(stage, virtual stage, number there) of slot ``slot``, by the converter's formulas."""
    pp, vpp = s.pipeline_parallel_size, s.num_layers_per_virtual_pipeline_stage
    if s.num_layer_list:
        ends = np.cumsum(s.num_layer_list)
        p = int(np.searchsorted(ends, slot, side="right"))
        return p, 0, slot - int(ends[p]) + s.num_layer_list[p]
    if s.schedules_method:
        half = num_layers // 2 // pp
        if slot < num_layers // 2:
            return slot // half, 0, slot % half
        mirrored = num_layers - 1 - slot
        return mirrored // half, 1, half - 1 - mirrored % half
    if vpp:
        return slot % (pp * vpp) // vpp, slot // vpp // pp, slot % vpp
    return slot // (num_layers // pp), 0, slot % (num_layers // pp)


def oracle(cfg, s, W):
    """{file: {model key: {name: values}}} of every rank."""
    tp, pp, ep = s.tensor_parallel_size, s.pipeline_parallel_size, s.expert_parallel_size
    L, mtp = cfg.num_hidden_layers, cfg.num_nextn_predict_layers if s.mtp_num_layers is None else s.mtp_num_layers
    num_layers, dual = L + len(s.noop_layers), bool(s.schedules_method)
    vpp = s.num_layers_per_virtual_pipeline_stage
    virtual = 2 if dual else num_layers // pp // vpp if vpp else 1
    last = (0, 1) if dual else (pp - 1, virtual - 1)
    places = [position(slot, num_layers, s) for slot in range(num_layers) if slot not in s.noop_layers]
    names = dict(zip(("q", "kv", "norm"), ("linear_q_up_proj", "linear_kv_up_proj", "kv_layernorm")))
    if s.version != "2.2":
        names = dict(zip(("q", "kv", "norm"), ("linear_qb", "linear_kvb", "k_layernorm")))
    layers = "mtp_layers" if s.version == "2.0" else "mtp.layers"

    def rows(x, t):
        return np.split(x, tp, axis=0)[t]

    def columns(x, t):
        return np.split(x, tp, axis=1)[t]

    def mlp(source, t):
        gate, up, down = (W[f"{source}{x}_proj.weight"] for x in ("gate", "up", "down"))
        return np.concatenate([rows(gate, t), rows(up, t)]), columns(down, t)

    def attention(source, t):
        a = f"{source}self_attn."
        out = {
            "linear_qkv.weight": np.concatenate([W[f"{a}q_a_proj.weight"], W[f"{a}kv_a_proj_with_mqa.weight"]]),
            "linear_proj.weight": columns(W[f"{a}o_proj.weight"], t),
            "q_layernorm.weight": W[f"{a}q_a_layernorm.weight"],
            f"{names['norm']}.weight": W[f"{a}kv_a_layernorm.weight"],
        }
        q, kv, H = W[f"{a}q_b_proj.weight"], W[f"{a}kv_b_proj.weight"], cfg.num_attention_heads
        if s.mla_mm_split:
            q, kv = q.reshape(H, -1, q.shape[1]), kv.reshape(H, -1, kv.shape[1])
            N = cfg.qk_nope_head_dim
            for ours, x in (("qk_nope", q[:, :N]), ("qk_rope", q[:, N:]), ("kv_nope", kv[:, :N]), ("v", kv[:, N:])):
                out[f"linear_{ours}.weight"] = rows(x.reshape(-1, x.shape[2]), t)
        else:
            out |= {f"{names['q']}.weight": rows(q, t), f"{names['kv']}.weight": rows(kv, t)}
        return {f"self_attention.{k}": v for k, v in out.items()}

    def experts(source, t, e):
        E, F, D = cfg.n_routed_experts, cfg.moe_intermediate_size, cfg.hidden_size
        every = [[W[f"{source}mlp.experts.{i}.{x}_proj.weight"] for i in range(E)] for x in ("gate", "up", "down")]
        gate, up, down = map(np.stack, every)
        shards = 1 if s.moe_tp_extend_ep else tp
        gate, up = gate.reshape(E, shards, F // shards, D), up.reshape(E, shards, F // shards, D)
        fc1 = np.concatenate([gate, up], 2)  # expert, shard, gate then up, hidden
        fc2 = down.reshape(E, D, shards, F // shards).transpose(0, 2, 1, 3)  # expert, shard, hidden, ffn
        if s.moe_tp_extend_ep:
            mine, shard = np.arange(E).reshape(ep, tp, -1)[e, t], 0
        else:
            mine, shard = np.arange(E).reshape(ep, -1)[e], t
        fc1, fc2 = fc1[mine, shard], fc2[mine, shard]
        if s.moe_grouped_gemm:
            return {"weight1": fc1.transpose(0, 2, 1).reshape(D, -1), "weight2": fc2.transpose(0, 2, 1).reshape(-1, D)}
        pairs = [(f"local_experts.{i}.linear_fc{j}.weight", x[i]) for i in range(len(mine)) for j, x in ((1, fc1), (2, fc2))]
        return dict(pairs)

    def block(layer, t, e):
        source = f"model.layers.{layer}."
        out = {"input_layernorm.weight": W[f"{source}input_layernorm.weight"],
               "pre_mlp_layernorm.weight": W[f"{source}post_attention_layernorm.weight"]} | attention(source, t)  # fmt: skip
        if layer < cfg.first_k_dense_replace:
            out["mlp.linear_fc1.weight"], out["mlp.linear_fc2.weight"] = mlp(f"{source}mlp.", t)
            return out
        out["mlp.router.weight"] = W[f"{source}mlp.gate.weight"]
        out["mlp.router.expert_bias"] = W[f"{source}mlp.gate.e_score_correction_bias"]
        shared = mlp(f"{source}mlp.shared_experts.", t)
        out["mlp.shared_experts.linear_fc1.weight"], out["mlp.shared_experts.linear_fc2.weight"] = shared
        return out | {f"mlp.experts.{k}": v for k, v in experts(source, t, e).items()}

    def model(p, v, t, e):
        out = {}
        if (p, v) == (0, 0):
            out["embedding.word_embeddings.weight"] = rows(W["model.embed_tokens.weight"], t)
        for layer, (stage, virtual_stage, local) in enumerate(places):
            if (stage, virtual_stage) == (p, v):
                out |= {f"decoder.layers.{local}.{k}": x for k, x in block(layer, t, e).items()}
        if (p, v) != last:
            return out
        out["final_layernorm.weight" if mtp else "decoder.final_layernorm.weight"] = W["model.norm.weight"]
        out["output_layer.weight"] = rows(W["lm_head.weight"], t)
        for k in range(mtp):
            source, own = f"model.layers.{L + k}.", f"{layers}.{k}."
            out |= {f"{own}transformer_layer.{x}": y for x, y in block(L + k, t, e).items()}
            out |= {f"{own}{x}": W[source + x] for x in ("enorm.weight", "hnorm.weight")}
            out[f"{own}eh_proj.weight"] = rows(W[f"{source}eh_proj.weight"], t)
            norm = f"{own}final_layernorm.weight" if s.version == "2.0" else f"mtp.final_layernorms.{k}.weight"
            out[norm] = W[f"{source}shared_head.norm.weight"]
            if pp > 1 and (s.version == "2.0" or k == 0):
                key = f"{own}embedding.word_embeddings.weight" if s.version == "2.0" else "embedding.word_embeddings.weight"
                out[key] = rows(W[f"{source}embed_tokens.weight"], t)
        return out

    files = {}
    for p, t, e in itertools.product(range(pp), range(tp), range(ep)):
        name = f"mp_rank_{t:02d}"
        if ep == 1 and pp > 1:
            name += f"_{p:03d}"
        elif ep > 1:
            name += f"_{e:03d}" if pp == 1 else f"_{p:03d}_{e:03d}"
        keys = ["model"] if virtual == 1 else [f"model{v}" for v in range(virtual)]
        files[f"iter_0000001/{name}/model_optim_rng.pt"] = {key: model(p, v, t, e) for v, key in enumerate(keys)}
    return files


# -- the cases -------------------------------------------------------------------------------------------
STAGES = [
    dict(),
    dict(noop_layers=(0,)),
    dict(noop_layers=(3, 7, 5)),
    dict(pipeline_parallel_size=2, noop_layers=(2,)),
    dict(pipeline_parallel_size=3, noop_layers=(5,)),
    dict(pipeline_parallel_size=4, noop_layers=(7, 2, 4)),
    dict(pipeline_parallel_size=5),
    dict(pipeline_parallel_size=2, num_layer_list=(2, 3)),
    dict(pipeline_parallel_size=3, num_layer_list=(1, 3, 1)),
    dict(pipeline_parallel_size=2, num_layers_per_virtual_pipeline_stage=1, noop_layers=(5, 2, 1)),
    dict(pipeline_parallel_size=2, num_layers_per_virtual_pipeline_stage=2, noop_layers=(4, 5, 6)),
    dict(pipeline_parallel_size=3, num_layers_per_virtual_pipeline_stage=1, noop_layers=(2,)),
    dict(pipeline_parallel_size=2, schedules_method="dualpipev", noop_layers=(7, 2, 4)),
    dict(pipeline_parallel_size=2, schedules_method="dualpipev", noop_layers=(0, 6, 7)),
    dict(pipeline_parallel_size=3, schedules_method="dualpipev", noop_layers=(4,)),
]
EXPERTS = [dict(), dict(moe_grouped_gemm=True), dict(moe_grouped_gemm=True, moe_tp_extend_ep=True)]


def cases():
    """Every way of staging with every tensor-parallel size and way of keeping experts; the rest takes turns."""
    turn = 0
    for stage, tp, experts in itertools.product(STAGES, (1, 2, 4), EXPERTS):
        if stage.get("schedules_method") and tp > 1 and not experts.get("moe_tp_extend_ep"):
            continue
        turn += 1
        mtp, ep, version = (None, 1, 0)[turn % 3], (1, 2, 4, 8)[turn % 4], ("2.2", "2.1", "2.2", "2.0", "2.2")[turn % 5]
        if experts.get("moe_tp_extend_ep") and ep * tp > 8:
            ep = 8 // tp
        rest = dict(mtp_num_layers=mtp, expert_parallel_size=ep, version=version, mla_mm_split=turn % 7 in (1, 2, 4))
        yield McoreStrategy(tensor_parallel_size=tp, **stage, **experts, **rest)


CASES = list(cases())


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def stored(x, W):
    """Values of a stored tensor."""
    return np.concatenate([assemble(c, lambda part: W[part.name]).reshape(-1) for c in x.chunks]).reshape(x.shape)


def test_the_cases_differ():
    assert len(set(CASES)) == len(CASES) > 100
    for field in dataclasses.fields(McoreStrategy):
        assert len({getattr(s, field.name) for s in CASES}) > 1, f"{field.name} is never varied"


def test_layout_equals_the_oracle():
    W, n = weights(CFG), 0
    for s in CASES:
        files, want = mcore.layout(CFG, s), oracle(CFG, s, W)
        assert sorted(f.path for f in files) == sorted(want), s
        for file in files:
            found = {x.name: x for x in file.tensors}
            assert len(found) == len(file.tensors), "two tensors of one name"
            expected = {f"{key}.{name}": x for key, model in want[file.path].items() for name, x in model.items()}
            assert found.keys() == expected.keys(), (s, file.path, sorted(found.keys() ^ expected.keys())[:4])
            for name, x in found.items():
                assert same(stored(x, W), expected[name]), (s, file.path, name)
                assert x.dtype == ("F32" if name.endswith("expert_bias") else None)
                n += 1
            saved = mcore.structure(file, CFG, s, "BF16")
            assert list(saved) == [*want[file.path], "checkpoint_version", "iteration"], s
            for name, tensor in mcore.tensors(saved).items():
                assert tensor.dtype == ("F32" if name.endswith("expert_bias") else "BF16")
    assert n > 30000


def wanted(cfg, s):
    """Names that a layout has to hold: the model's, with as many MTP blocks; and the copies it may hold."""
    most = cfg.num_hidden_layers + (cfg.num_nextn_predict_layers if s.mtp_num_layers is None else s.mtp_num_layers)
    tensors = [t for t in published(cfg) if not t.name.startswith("model.layers.") or int(t.name.split(".")[2]) < most]
    return {t.name for t in tensors if not t.copy}, {t.name for t in tensors if t.name.endswith("embed_tokens.weight")}


def test_every_tensor_is_there_exactly():
    for s in CASES:
        places = locate(mcore.layout(CFG, s))  # raises where parts overlap or leave a gap
        names, copies = wanted(CFG, s)
        found = {name for name, field in places if field == "values"}
        assert names <= found <= names | copies, s
        ranks = s.tensor_parallel_size * s.expert_parallel_size
        (norm,) = places["model.norm.weight", "values"]
        assert len(norm) == ranks, "a norm is on every rank of its stage"
        expert = places["model.layers.3.mlp.experts.5.up_proj.weight", "values"]
        assert all(len(part) == 1 for part in expert), "an expert lies in one place"


def write(root, cfg, s, W, dtype="F32"):
    """A checkpoint by the layout and torch_file."""
    for file in mcore.layout(cfg, s):
        path = root / file.path
        path.parent.mkdir(parents=True)
        writer = torch_file.create(path, mcore.structure(file, cfg, s, dtype))
        for x in file.tensors:
            torch_file.write(writer, x.name, (assemble(c, lambda part: W[part.name]) for c in x.chunks))
        torch_file.finish(writer)
    (root / mcore.TRACKER).write_text("1")


@pytest.mark.parametrize("i", range(0, len(CASES), 7))
def test_round_trip_through_files(tmp_path, i):
    """Files, then the strategy from them alone, then every tensor again, from each of its replicas."""
    W, s = weights(CFG), CASES[i]
    write(tmp_path, CFG, s, W)
    ambiguous = s.moe_grouped_gemm and s.tensor_parallel_size > 1
    found, iteration = detect(tmp_path, CFG, moe_tp_extend_ep=s.moe_tp_extend_ep if ambiguous else None)
    assert iteration == "iter_0000001"
    files = mcore.layout(CFG, found, iteration)
    shapes = {(f.path, x.name): x.shape for f in files for x in f.tensors}
    assert shapes == {(f.path, x.name): x.shape for f in mcore.layout(CFG, s) for x in f.tensors}
    opened = {f.path: torch_file.open_file(tmp_path / f.path) for f in files}
    tensors = {path: mcore.tensors(file.structure) for path, file in opened.items()}
    assert {(path, name) for path, named in tensors.items() for name in named} == shapes.keys()
    seen = set()
    for (name, _), parts in locate(files).items():
        for replica in range(max(map(len, parts))):
            out = np.zeros_like(W[name])
            for places in parts:
                place = places[replica % len(places)]
                flat = torch_file.read(opened[place.file], tensors[place.file][place.tensor]).reshape(-1)
                chunk = flat[place.start : place.start + place.chunk.size].reshape(place.chunk.shape)
                place.part.put(out, chunk[place.at])
            assert same(out, W[name]), (s, name, replica)
        seen.add(name)
    assert seen >= wanted(CFG, s)[0]


def test_other_configs():
    """No MTP, no shared experts, no router bias, only dense or only MoE blocks, MoE blocks at intervals."""
    for change in (
        dict(num_nextn_predict_layers=0),
        dict(n_shared_experts=0),
        dict(n_shared_experts=3),
        dict(topk_method="greedy"),
        dict(first_k_dense_replace=5, num_nextn_predict_layers=0),
        dict(first_k_dense_replace=0),
        dict(moe_layer_freq=2),
    ):
        cfg = CFG.replace(**change)
        W = weights(cfg)
        s = McoreStrategy(2, 2, 2, num_layer_list=(3, 2), moe_grouped_gemm=True, mla_mm_split=True)
        places = locate(mcore.layout(cfg, s))
        names, copies = wanted(cfg, s)
        assert names <= {name for name, _ in places} <= names | copies, change
        for file in mcore.layout(cfg, s):
            for x in file.tensors:
                assert stored(x, W).shape == x.shape


# -- DeepSeek-V3 itself ----------------------------------------------------------------------------------
PAPER = dict(num_layers_per_virtual_pipeline_stage=2, noop_layers=(47, 62, 63), moe_grouped_gemm=True)


@pytest.mark.parametrize(
    "s, files",
    [(McoreStrategy(2, 8, 32, **PAPER), 512), (McoreStrategy(1, 4, 8, num_layer_list=(16, 15, 15, 15)), 32),
     (McoreStrategy(2, 8, 32, mla_mm_split=True, moe_tp_extend_ep=True, **PAPER), 512)],
    ids=["vpp", "list", "extended"],
)  # fmt: skip
def test_deepseek_v3(s, files):
    start = time.perf_counter()
    layout = mcore.layout(V3, s)
    assert time.perf_counter() - start < 60, "building it took minutes"
    assert len(layout) == files
    tp, ep = s.tensor_parallel_size, s.expert_parallel_size
    D, H, W = 7168, 128, 129280
    latent, qkv = 1536 + 512, (1536 + 576) * D
    split = 61 + 1  # blocks; the MTP block is one more
    up = H * 192 * 1536 + H * 256 * 512 + H * 128 * D
    shared = 3 * D * 2048
    once = 59 * 256 * 3 * D * 2048  # routed experts
    every_ep = split * up + 3 * 3 * D * 18432 + 59 * shared + W * D * 3 + 2 * D * D  # embedding, its copy, head, eh_proj
    every_rank = split * (qkv + latent + 2 * D) + 59 * (256 * D + 256) + D + 3 * D
    elements = sum(int(np.prod(x.shape, dtype=np.int64)) for f in layout for x in f.tensors)
    assert elements == once + ep * every_ep + tp * ep * every_rank
    float32 = sum(int(np.prod(x.shape)) for f in layout for x in f.tensors if x.dtype == "F32")
    assert float32 == tp * ep * 59 * 256, "the router's bias alone is kept in float32"
    attention = 8 if s.mla_mm_split else 6  # and two norms
    experts = 2 if s.moe_grouped_gemm else 2 * 256 // ep
    per_rank = split * (attention + 2) + 3 * 2 + 59 * (4 + experts) + 1 + 1 + 1 + 5
    assert sum(len(f.tensors) for f in layout) == tp * ep * per_rank
    by_stage = mcore.stages(V3, s)
    if s.num_layer_list is None:
        assert by_stage[7, 2] == {0: 46} and by_stage[7, 3] == {} and by_stage[0, 1] == {0: 16, 1: 17}
        last = next(f for f in layout if "mp_rank_00_007_000" in f.path)
        assert any(x.name == "model3.mtp.layers.0.eh_proj.weight" and x.shape == (D // 2, 2 * D) for x in last.tensors)
    else:
        assert [len(v) for v in by_stage.values()] == [16, 15, 15, 15]


# -- refusals --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "change, config, pattern",
    [
        (dict(tensor_parallel_size=0), {}, "tensor_parallel_size=0; it must be an integer of at least 1"),
        (dict(expert_parallel_size=True), {}, "expert_parallel_size=True"),
        (dict(version="1.0"), {}, "version='1.0'; pick one of 2.0"),
        (dict(schedules_method="zb"), {}, "schedules_method='zb'; pick 'dualpipev'"),
        ({}, dict(q_lora_rank=None), "q_lora_rank=None"),
        ({}, dict(tie_word_embeddings=True), "untie the head"),
        (dict(mtp_num_layers=3), {}, "mtp_num_layers=3; the config has num_nextn_predict_layers=2"),
        (dict(pipeline_parallel_size=2), {}, r"num_layers=5 \(5 and 0 no-op\) is not divisible by the 2 stages.*add no-op"),
        (dict(pipeline_parallel_size=2, schedules_method="dualpipev", noop_layers=(5,)), {}, "divisible by the 4 stages"),
        (dict(pipeline_parallel_size=2, num_layer_list=(5,)), {}, "has 1 stages but pipeline_parallel_size=2"),
        (dict(pipeline_parallel_size=2, num_layer_list=(3, 3)), {}, "adds up to 6 layers; the config has 5"),
        (dict(pipeline_parallel_size=2, num_layer_list=(5, 0)), {}, "every stage needs a layer"),
        (dict(num_layer_list=(6,), noop_layers=(5,)), {}, "num_layer_list and noop_layers are both given"),
        (dict(num_layer_list=(5,), num_layers_per_virtual_pipeline_stage=1), {}, "are both given; a list of stages"),
        (dict(num_layer_list=(5,), schedules_method="dualpipev"), {}, "'dualpipev' and num_layer_list are both given"),
        (dict(num_layers_per_virtual_pipeline_stage=1, schedules_method="dualpipev"), {}, "it sets the stages itself"),
        (dict(num_layers_per_virtual_pipeline_stage=1), {}, "virtual stages with pipeline_parallel_size=1"),
        (dict(schedules_method="dualpipev", noop_layers=(5,)), {}, "virtual stages with pipeline_parallel_size=1"),
        (dict(pipeline_parallel_size=2, noop_layers=(1, 2, 3), num_layers_per_virtual_pipeline_stage=3), {}, "has 4 layers"),
        (dict(pipeline_parallel_size=2, noop_layers=(1, 2, 3), num_layers_per_virtual_pipeline_stage=4), {}, "a smaller divisor"),
        (dict(pipeline_parallel_size=2, noop_layers=(6,)), {}, "different numbers below num_layers=6"),
        (dict(noop_layers=(1, 1)), {}, "different numbers"),
        (dict(tensor_parallel_size=2, moe_tp_extend_ep=True), {}, "moe_tp_extend_ep without moe_grouped_gemm"),
        (dict(tensor_parallel_size=2, pipeline_parallel_size=3, noop_layers=(5,), schedules_method="dualpipev"), {}, "it needs"),
        (dict(tensor_parallel_size=4), dict(vocab_size=22), "vocab_size=22 is not divisible by tensor_parallel_size=4"),
        (dict(tensor_parallel_size=3), dict(vocab_size=27), "num_attention_heads=4 is not divisible by tensor_parallel_size=3"),
        (dict(tensor_parallel_size=4), dict(hidden_size=14), "hidden_size=14"),
        (dict(tensor_parallel_size=4), dict(intermediate_size=18), "intermediate_size=18"),
        (dict(tensor_parallel_size=4), dict(moe_intermediate_size=6), r"n_shared_experts \* moe_intermediate_size=6"),
        (dict(tensor_parallel_size=4), dict(moe_intermediate_size=6, n_shared_experts=2), "moe_intermediate_size=6"),
        (dict(expert_parallel_size=3), {}, "n_routed_experts=8 is not divisible by expert_parallel_size=3"),
        (dict(tensor_parallel_size=4, expert_parallel_size=4, moe_tp_extend_ep=True, moe_grouped_gemm=True), {}, "=8 .*size=16"),
    ],
)  # fmt: skip
def test_refusals(change, config, pattern):
    with pytest.raises(ValueError, match=pattern):
        mcore.layout(CFG.replace(**config), McoreStrategy(**change))


# -- finding the strategy --------------------------------------------------------------------------------
def test_detect_refuses(tmp_path):
    W, s = weights(CFG), McoreStrategy(2, 2, 2, num_layer_list=(2, 3), moe_grouped_gemm=True, moe_tp_extend_ep=True)
    with pytest.raises(FileNotFoundError, match="latest_checkpointed_iteration.txt or one folder"):
        detect(tmp_path, CFG)
    write(tmp_path, CFG, s, W)
    with pytest.raises(ValueError, match="2 tensor-parallel ranks hold grouped experts.*say which it is"):
        detect(tmp_path, CFG)
    assert detect(tmp_path, CFG, moe_tp_extend_ep=True)[0] == dataclasses.replace(s, mtp_num_layers=2)
    with pytest.raises(ValueError, match="hold 5 layers but the config has num_hidden_layers=6"):
        detect(tmp_path, CFG.replace(num_hidden_layers=6), moe_tp_extend_ep=True)
    with pytest.raises(ValueError, match="mtp_num_layers=2; the config has num_nextn_predict_layers=1"):
        detect(tmp_path, CFG.replace(num_nextn_predict_layers=1), moe_tp_extend_ep=True)
    tracker, folder = tmp_path / mcore.TRACKER, tmp_path / "iter_0000001"
    tracker.write_text("2")
    with pytest.raises(FileNotFoundError, match="iter_0000002: no such folder"):
        detect(tmp_path, CFG)
    tracker.write_text("latest")
    with pytest.raises(ValueError, match="expected the number of an iteration or 'release', found 'latest'"):
        detect(tmp_path, CFG)
    tracker.unlink()
    assert detect(tmp_path, CFG, moe_tp_extend_ep=True)[1] == "iter_0000001"
    folder.rename(tmp_path / "release")
    tracker.write_text("release\n")
    assert detect(tmp_path, CFG, moe_tp_extend_ep=True)[1] == "release"
    folder = tmp_path / "release"
    (folder / "mp_rank_01_000_001").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match="expected the 2 x 2 x 2 ranks up to mp_rank_01_001_001, found 7"):
        detect(tmp_path, CFG)
    (tmp_path / "away").rename(folder / "mp_rank_01_000_001")
    (folder / "mp_rank_01_001_000" / mcore.FILE).rename(folder / "mp_rank_01_001_000" / "x")
    with pytest.raises(FileNotFoundError, match="mp_rank_01_001_000.model_optim_rng.pt: no such file"):
        detect(tmp_path, CFG)
    (folder / "mp_rank_00_000").mkdir()
    with pytest.raises(ValueError, match="of different checkpoints"):
        detect(tmp_path, CFG)


@pytest.mark.parametrize("extended", [True, False])
def test_a_trained_checkpoint(tmp_path, extended):
    """What training adds is passed over, and its arguments say whether experts are cut."""
    s = McoreStrategy(2, 1, 2, moe_grouped_gemm=True, moe_tp_extend_ep=extended)
    write(tmp_path, CFG, s, weights(CFG))
    path = tmp_path / "iter_0000001" / "mp_rank_00_000" / mcore.FILE
    file = torch_file.open_file(path)
    before = mcore.tensors(file.structure)
    moment = torch_file.TorchTensor("F32", (2,))
    more = {"args": "NAMESPACE", "optimizer": {"state": [moment]}, "rng_state": [None], "opt_param_scheduler": {"lr": 1.0}}
    saved = mcore.structure(mcore.layout(CFG, s)[0], CFG, s, "F32") | more
    text = b"cargparse\nNamespace\n)\x81}X\x10\x00\x00\x00moe_tp_extend_ep" + (b"\x88" if extended else b"\x89") + b"sb"
    original = torch_file.torch_pickle.dump
    torch_file.torch_pickle.dump = lambda x: original(x).replace(b"X\x09\x00\x00\x00NAMESPACE", text)
    try:
        writer = torch_file.create(path.with_suffix(".new"), saved)
    finally:
        torch_file.torch_pickle.dump = original
    for name, tensor in before.items():
        torch_file.write(writer, name, torch_file.read(file, tensor))
    torch_file.write(writer, "optimizer.state.0", np.zeros(2, "f4"))
    torch_file.finish(writer)
    path.with_suffix(".new").rename(path)
    found = torch_file.open_file(path).structure
    assert found["args"].moe_tp_extend_ep is extended and mcore.tensors(found).keys() == before.keys()
    assert detect(tmp_path, CFG)[0] == dataclasses.replace(s, mtp_num_layers=2)


def test_no_model_in_the_file(tmp_path):
    folder = tmp_path / "iter_0000001" / "mp_rank_00"
    folder.mkdir(parents=True)
    for entry, pattern in (({"weights": {}}, "expected the entry 'model'"), ({"model0": {}}, "expected 'model', or 'model0'")):
        torch_file.finish(torch_file.create(folder / mcore.FILE, entry))
        with pytest.raises(ValueError, match=f"model_optim_rng.pt: {pattern}"):
            detect(tmp_path, CFG)
    (folder.parent / "mp_rank_00").rename(folder.parent / "mp_rank_00_000")
    with pytest.raises(FileNotFoundError, match="the others are missing"):
        detect(tmp_path, CFG)
