"""The layouts of MindSpore Transformers against a second, plain NumPy account of what its scripts compute.

The account agreed, name by name and byte by byte, with the scripts of release v1.5.0 run once on the same weights (4 blocks
of which 3 dense, one MTP module), and its convert_reversed.py read our two training forms back exactly.

Planted faults this file was seen to catch, one at a time. Rope: rows of q, or of k, left in pairs; odds before evens; the
inverse permutation; a full-rank q not permuted. Pieces: k_nope taken from the end of a head; the shared key before the
latent; up before gate; gate and up joined on the wrong axis; experts not turned; w2 and w3 swapped; an expert missing; all
experts in one chunk. MTP: enorm and hnorm swapped; the final norm dropped; the module numbered as its block; hidden_first
ignored, or always on; the copy of the embedding forgotten. Types: the grouped router in float32; its bias not; norms of
the inference form in float32. Files: the head in the first; counted from zero; a tied head left out. Detection: split taken
for grouped; turned experts accepted; train2infer taken for infer, by names and by files; optimiser state kept; a path
outside the folder accepted; weight_map not unwrapped; a missing tensor accepted.
"""
import dataclasses
import json
import os
import re
import time

os.environ.setdefault("MS_DEV_JIT_PIPELINE", "0")

import mindspore as ms
import numpy as np
import pytest

from dsv3.checkpoint import layout as layouts
from dsv3.checkpoint import safetensors_io
from dsv3.checkpoint.mindformers import METADATA, NAME_MAP, MindformersForm, detect, layout, param_name_map, regroup
from dsv3.checkpoint.names import published
from dsv3.config import V3, Config

SMALL = Config(
    vocab_size=29, hidden_size=10, intermediate_size=14, moe_intermediate_size=6, num_hidden_layers=3, first_k_dense_replace=1,
    num_nextn_predict_layers=1, num_attention_heads=3, q_lora_rank=7, kv_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=8,
    v_head_dim=4, n_routed_experts=6, num_experts_per_tok=2, n_group=2, topk_group=1,
)
CONFIGS = {
    "one MTP": SMALL,
    "no MTP": SMALL.replace(num_nextn_predict_layers=0, num_hidden_layers=2),
    "two MTP, two shared, two heads": SMALL.replace(num_nextn_predict_layers=2, n_shared_experts=2, num_attention_heads=2),
    "one head, one pair": SMALL.replace(num_attention_heads=1, qk_rope_head_dim=2, qk_nope_head_dim=1, v_head_dim=1),
    "full-rank query": SMALL.replace(q_lora_rank=None),
    "every second block dense": SMALL.replace(num_hidden_layers=5, moe_layer_freq=2, n_shared_experts=0),
    "all dense": SMALL.replace(first_k_dense_replace=3, num_nextn_predict_layers=0),
    "no router bias": SMALL.replace(topk_method="group_limited_greedy", qk_rope_head_dim=6),
    "tied head": SMALL.replace(tie_word_embeddings=True, num_nextn_predict_layers=0),
    "square experts": SMALL.replace(moe_intermediate_size=10),
}
GROUPED, SPLIT = MindformersForm(), MindformersForm(use_grouped_gemm=False)
INFER, VIA_TRAIN = MindformersForm(infer=True), MindformersForm(infer=True, via_train=True)
FORMS = {"grouped": GROUPED, "split": SPLIT, "infer": INFER, "train2infer": VIA_TRAIN,
         "hidden first": MindformersForm(hidden_first=True)}
everything = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def weights(cfg):
    """Different numbers in every place of every published tensor; the copies of an MTP module are copies."""
    rng = np.random.default_rng(3)
    out = {t.name: rng.standard_normal(t.shape).astype(np.float32) for t in published(cfg) if not t.copy}
    head = out.get("lm_head.weight", out["model.embed_tokens.weight"])
    for t in published(cfg):
        if t.copy:
            out[t.name] = out["model.embed_tokens.weight"] if t.name.endswith("embed_tokens.weight") else head
    return out


# -- the second account ------------------------------------------------------------------------------------------------
def pairs_to_halves(x):
    """[..., rope, in]: row 2i goes to i, row 2i + 1 to rope/2 + i."""
    out = np.empty_like(x)
    for i in range(x.shape[-2] // 2):
        out[..., i, :], out[..., x.shape[-2] // 2 + i, :] = x[..., 2 * i, :], x[..., 2 * i + 1, :]
    return out


def attention(w, cfg, merged):
    """{name behind "attention.": array} of one block. w: its published tensors by the name behind "self_attn."."""
    heads, nope, rank = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.kv_lora_rank
    full = "q_proj" in w
    q = w["q_proj" if full else "q_b_proj"]
    q = q.reshape(heads, -1, q.shape[-1])
    q_nope, q_pe = q[:, :nope], pairs_to_halves(q[:, nope:])
    both = np.concatenate([q_nope, q_pe], 1).reshape(-1, q.shape[-1])
    kv = w["kv_b_proj"].reshape(heads, -1, rank)
    a = w["kv_a_proj_with_mqa"]
    latent, k_pe = a[:rank], pairs_to_halves(a[rank:])
    out = {"lkv2kv_k_nope": kv[:, :nope].reshape(-1, rank), "lkv2kv_v": kv[:, nope:].reshape(-1, rank)}
    out |= {"wo": w["o_proj"], "lkv_norm": w["kv_a_layernorm"]}
    out |= {"kv2l": np.concatenate([latent, k_pe])} if merged else {"kv2l_latent_kv": latent, "kv2l_k_pe": k_pe}
    if full:
        return out | {"q_proj": both}
    out |= {"q2l_proj": w["q_a_proj"], "lq_norm": w["q_a_layernorm"]}
    if merged:
        return out | {"l2q_proj": both}
    return out | {"l2q_nope_proj": q_nope.reshape(-1, q.shape[-1]), "l2q_pe_proj": q_pe.reshape(-1, q.shape[-1])}


def feed_forward(w, cfg, kind):
    """{name behind "feed_forward.": array} of one block. w: its published tensors by the name behind "mlp."."""
    if "gate_proj" in w:
        return {"w1.weight": w["gate_proj"], "w2.weight": w["down_proj"], "w3.weight": w["up_proj"]}
    out = {}
    if cfg.n_shared_experts:
        for name, key in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            out[f"shared_experts.{name}.weight"] = w[f"shared_experts.{key}"]
    gate, down, up = (np.stack([w[f"experts.{e}.{k}_proj"] for e in range(cfg.n_routed_experts)]) for k in ("gate", "down", "up"))
    router, bias = {"grouped": ("router_dense.weight", "topk_bias"),
                    "split": ("router.dense.weight", "router.router.topk_bias"),
                    "train2infer": ("router.dense.weight", "router.router.topk_bias"),
                    "infer": ("router.dense.weight", "router.e_score_correction_bias")}[kind]
    out[f"routed_experts.{router}"] = w["gate"]
    if "gate.e_score_correction_bias" in w:
        out[f"routed_experts.{bias}"] = w["gate.e_score_correction_bias"]
    if kind == "grouped":
        return out | {"routed_experts.ffn.w1": np.concatenate([gate.swapaxes(1, 2), up.swapaxes(1, 2)], 2),
                      "routed_experts.ffn.w2": down.swapaxes(1, 2)}
    if kind in ("infer", "train2infer"):
        gate, down, up = gate.swapaxes(1, 2), down.swapaxes(1, 2), up.swapaxes(1, 2)
    return out | {f"routed_experts.ffn.{n}.weight": x for n, x in (("w1", gate), ("w2", down), ("w3", up))}


def account(cfg, w, form):
    """{name: (file, file type or None, array)} as their scripts write it, for sizes beyond theirs too."""
    kind = ("train2infer" if form.via_train else "infer") if form.infer else "grouped" if form.use_grouped_gemm else "split"
    L, M = cfg.num_hidden_layers, cfg.num_nextn_predict_layers
    out = {}

    def put(file, name, x):
        if kind == "infer":
            dtype = "F32" if "e_score_correction_bias" in name else None
        else:
            dtype = "F32" if re.search(r"norm|router\.dense|topk_bias", name) else None
        assert name not in out
        out[name] = file, dtype, x

    first, last, room = {"infer": ("model.safetensors",) * 2 + ("model_layer_{}.safetensors",),
                         "train2infer": ("general.safetensors",) * 2 + ("layer_{}.safetensors",)}.get(
        kind, (f"ms-model-00001-of-{L + M:05d}.safetensors", f"ms-model-{L + M:05d}-of-{L + M:05d}.safetensors", None))
    put(first, "model.tok_embeddings.embedding_weight", w["model.embed_tokens.weight"])
    put(last, "model.norm_out.weight", w["model.norm.weight"])
    put(last, "lm_head.weight", w["model.embed_tokens.weight"] if cfg.tie_word_embeddings else w["lm_head.weight"])
    for i in range(L + M):
        pre = f"model.layers.{i}."
        file = room.format(i) if room else f"ms-model-{i + 1:05d}-of-{L + M:05d}.safetensors"
        block = {k.removeprefix(pre): x for k, x in w.items() if k.startswith(pre)}
        put(file, pre + "attention_norm.weight", block["input_layernorm.weight"])
        put(file, pre + "ffn_norm.weight", block["post_attention_layernorm.weight"])
        inner = {k.removeprefix("self_attn.").removesuffix(".weight"): x for k, x in block.items() if k.startswith("self_attn.")}
        for name, x in attention(inner, cfg, form.infer).items():
            put(file, f"{pre}attention.{name}.weight", x)
        inner = {k.removeprefix("mlp.").removesuffix(".weight"): x for k, x in block.items() if k.startswith("mlp.")}
        for name, x in feed_forward(inner, cfg, kind).items():
            which = re.search(r"routed_experts\.ffn\.(w\d)", name) if kind == "infer" else None
            put(f"model_layer_{i}_routed_experts_{which[1]}.safetensors" if which else file, f"{pre}feed_forward.{name}", x)
        if i < L:
            continue
        k, joint = i - L, block["eh_proj.weight"]
        if kind == "infer":
            put(file, pre + "tok_embeddings.weight", w["model.embed_tokens.weight"])
            put(file, pre + "shared_head.head.weight", w["lm_head.weight"])
            for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm"):
                put(file, f"{pre}{name}.weight", block[f"{name}.weight"])
            continue
        file = "general.safetensors" if kind == "train2infer" else file
        if form.hidden_first:
            joint = np.concatenate([joint[:, cfg.hidden_size :], joint[:, : cfg.hidden_size]], 1)
        put(file, f"model.mtp_hidden_fusers.{k}.norm_emb.weight", block["enorm.weight"])
        put(file, f"model.mtp_hidden_fusers.{k}.norm.weight", block["hnorm.weight"])
        put(file, f"model.mtp_hidden_fusers.{k}.dense.weight", joint)
        put(file, f"model.mtp_norms.{k}.weight", block["shared_head.norm.weight"])
    return out


# -- reading and writing through a layout ------------------------------------------------------------------------------
def built(stored, w):
    """A stored tensor from published ones."""
    flat = [np.ascontiguousarray(layouts.assemble(c, lambda part: w[part.name])).reshape(-1) for c in stored.chunks]
    return np.concatenate(flat).reshape(stored.shape)


def write(folder, files, w):
    """All files of a layout, in float32, and the name map."""
    folder.mkdir(exist_ok=True)
    for file in files:
        safetensors_io.write_file(folder / file.path, {s.name: ("F32", built(s, w)) for s in file.tensors})
    (folder / NAME_MAP).write_text(json.dumps(param_name_map(files)))


def read(folder, files):
    """{published name: array} of a folder; places of one part must agree."""
    opened = {file.path: safetensors_io.open_file(folder / file.path) for file in files}
    out = {}
    for (name, field), regions in layouts.locate(files).items():
        assert field == "values"
        out[name] = np.full(regions[0][0].part.shape, np.nan, np.float32)
        for places in regions:
            found = []
            for p in places:
                stored = safetensors_io.read(opened[p.file], p.tensor).reshape(-1)
                found.append(stored[p.start : p.start + p.chunk.size].reshape(p.chunk.shape)[p.at])
                np.testing.assert_array_equal(found[0], found[-1])
            places[0].part.put(out[name], found[0])
    return out


def shared_copies(cfg, form):
    """Published tensors that a form does not store: the embedding and head of MTP modules, which the model has already."""
    return set() if form.infer and not form.via_train else {t.name for t in published(cfg) if t.copy}


@every_form
@everything
def test_every_tensor_is_what_their_scripts_compute(cfg, form):
    w = weights(cfg)
    wanted = account(cfg, w, form)
    files = layout(cfg, form)
    found = {s.name: (file.path, s.dtype, built(s, w)) for file in files for s in file.tensors}
    assert sum(len(file.tensors) for file in files) == len(found)
    assert set(found) == set(wanted)
    for name, (file, dtype, x) in wanted.items():
        assert found[name][:2] == (file, dtype), name
        assert found[name][2].shape == x.shape and found[name][2].tobytes() == np.ascontiguousarray(x).tobytes(), name
    assert param_name_map(files) == {name: file for name, (file, _, _) in wanted.items()}


@every_form
@everything
def test_a_folder_comes_back_byte_for_byte(cfg, form, tmp_path):
    w = weights(cfg)
    files = layout(cfg, form)
    write(tmp_path, files, w)
    found, home = detect(tmp_path)
    has_experts = cfg.num_moe_layers + cfg.num_nextn_predict_layers > 0
    expected = dataclasses.replace(form, hidden_first=False)
    if form.infer or not has_experts:  # where nothing is stored otherwise, the default is what is told
        expected = dataclasses.replace(expected, use_grouped_gemm=True)
    assert found == expected
    files = regroup(layout(cfg, dataclasses.replace(found, hidden_first=form.hidden_first)), home)
    back = read(tmp_path, files)
    assert set(back) == {t.name for t in published(cfg)} - shared_copies(cfg, form)
    for name, x in back.items():
        assert x.tobytes() == w[name].tobytes(), name


def test_an_expert_is_a_chunk():
    for form in FORMS.values():
        stacks = [s for file in layout(SMALL, form) for s in file.tensors if ".ffn.w" in s.name]
        assert stacks and all(len(s.chunks) == SMALL.n_routed_experts == s.shape[0] for s in stacks)


# -- whether the permutation is right ----------------------------------------------------------------------------------
@pytest.mark.parametrize("form", [GROUPED, INFER], ids=["grouped", "infer"])
def test_scores_by_halves_on_their_rows_are_scores_by_pairs_on_ours(form):
    cfg, rng = SMALL, np.random.default_rng(0)
    w = {name: x.astype(np.float64) for name, x in weights(cfg).items()}
    stored = {s.name: built(s, w) for file in layout(cfg, form) for s in file.tensors}
    heads, nope, rope, rank = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.kv_lora_rank
    T = 7
    x_q, x = rng.standard_normal((T, cfg.q_lora_rank)), rng.standard_normal((T, cfg.hidden_size))
    angle = (np.arange(T)[:, None] + 5) * 10000.0 ** (-np.arange(rope // 2) / (rope // 2))  # no position is 0
    cos, sin = np.cos(angle), np.sin(angle)

    def by_pairs(v):  # [T, rope] or [heads, T, rope]
        z = (v[..., 0::2] + 1j * v[..., 1::2]) * (cos + 1j * sin)
        return np.stack([z.real, z.imag], -1).reshape(v.shape)

    def by_halves(v):
        a, b = np.split(v, 2, -1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    pre = "model.layers.1."
    q = (x_q @ w[pre + "self_attn.q_b_proj.weight"].T).reshape(T, heads, nope + rope).transpose(1, 0, 2)
    k = x @ w[pre + "self_attn.kv_a_proj_with_mqa.weight"][rank:].T
    wanted = by_pairs(q[..., nope:]) @ by_pairs(k).T
    if form.infer:
        q_pe = (x_q @ stored[pre + "attention.l2q_proj.weight"].T).reshape(T, heads, nope + rope)[..., nope:]
        k_pe = x @ stored[pre + "attention.kv2l.weight"][rank:].T
    else:
        q_pe = (x_q @ stored[pre + "attention.l2q_pe_proj.weight"].T).reshape(T, heads, rope)
        k_pe = x @ stored[pre + "attention.kv2l_k_pe.weight"].T
    q_pe = q_pe.transpose(1, 0, 2)
    np.testing.assert_allclose(by_halves(q_pe) @ by_halves(k_pe).T, wanted, rtol=1e-12, atol=1e-12)
    # the comparison can fail: neither rotation alone, nor rows as published, gives these scores
    assert np.abs(by_pairs(q_pe) @ by_pairs(k_pe).T - wanted).max() > 0.1
    assert np.abs(by_halves(q[..., nope:]) @ by_halves(k).T - wanted).max() > 0.1


# -- the released size -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", [GROUPED, SPLIT, INFER, VIA_TRAIN], ids=["grouped", "split", "infer", "train2infer"])
def test_the_released_model(form):
    start = time.perf_counter()
    files = layout(V3, form)
    assert time.perf_counter() - start < 20
    blocks, moe = 62, 59
    names = param_name_map(files)
    assert sum(len(file.tensors) for file in files) == len(names)
    attention = 10 if form.infer else 12  # with the two norms of the block
    experts = 2 if form == GROUPED else 3
    of_mtp = 6 if form == INFER else 4
    assert len(names) == 3 + blocks * attention + 3 * 3 + moe * (2 + 3 + experts) + of_mtp
    assert len(files) == {INFER: 1 + blocks + 3 * moe, VIA_TRAIN: 1 + blocks}.get(form, blocks)
    covered = {name for name, _ in layouts.locate(files)}
    assert covered == {t.name for t in published(V3)} - shared_copies(V3, form)
    elements = sum(int(np.prod(s.shape, dtype=np.int64)) for file in files for s in file.tensors)
    assert elements == sum(int(np.prod(t.shape, dtype=np.int64)) for t in published(V3) if t.name in covered)
    pre = "model.layers.60.feed_forward.routed_experts.ffn."
    stacked = {s.name: s.shape for file in files for s in file.tensors if s.name.startswith(pre)}
    assert stacked == (
        {pre + "w1": (256, 7168, 4096), pre + "w2": (256, 2048, 7168)} if experts == 2 else
        {pre + "w1.weight": (256, 2048, 7168), pre + "w2.weight": (256, 7168, 2048), pre + "w3.weight": (256, 2048, 7168)}
        if form == SPLIT else
        {pre + "w1.weight": (256, 7168, 2048), pre + "w2.weight": (256, 2048, 7168), pre + "w3.weight": (256, 7168, 2048)})


# -- folders -----------------------------------------------------------------------------------------------------------
def test_mindspore_reads_the_files(tmp_path):
    w = weights(SMALL)
    write(tmp_path, layout(SMALL), w)
    loaded = {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        loaded |= ms.load_checkpoint(str(path), format="safetensors")
    wanted = account(SMALL, w, GROUPED)
    assert set(loaded) == set(wanted)
    for name, (_, _, x) in wanted.items():
        np.testing.assert_array_equal(loaded[name].asnumpy(), x)


def test_a_ckpt_file_there_and_back(tmp_path):
    """Through MindSpore's own conversions, which the docstring recommends, and its error where they were forgotten."""
    w = weights(SMALL)
    wanted = account(SMALL, w, SPLIT)
    path = tmp_path / "checkpoints.ckpt"
    ms.save_checkpoint([{"name": name, "data": ms.Tensor(x)} for name, (_, _, x) in wanted.items()], str(path), format="ckpt")
    with pytest.raises(FileNotFoundError, match="mindspore.ckpt_to_safetensors"):
        detect(tmp_path)
    ms.ckpt_to_safetensors(str(path), str(tmp_path / "converted"))
    form, home = detect(tmp_path / "converted")
    assert form == SPLIT and set(home) == set(wanted)
    assert safetensors_io.open_file(tmp_path / "converted" / home["lm_head.weight"]).metadata == METADATA
    back = read(tmp_path / "converted", regroup(layout(SMALL, form), home))
    assert all(back[t.name].tobytes() == w[t.name].tobytes() for t in published(SMALL) if not t.copy)


@pytest.mark.parametrize("index", ["none", "flat", "weight_map"])
def test_a_folder_without_the_map_and_in_other_files(index, tmp_path):
    """One file for all, with optimiser state beside the weights, as a merged training run leaves it."""
    w = weights(SMALL)
    tensors = {s.name: ("F32", built(s, w)) for file in layout(SMALL, SPLIT) for s in file.tensors}
    state = {f"adam_m.{name}": ("F32", np.zeros((2,), np.float32)) for name in list(tensors)[:3]}
    safetensors_io.write_file(tmp_path / "part0.safetensors", tensors | state)
    if index != "none":
        home = dict.fromkeys(tensors, "part0.safetensors")
        (tmp_path / "ms-model.safetensors.index.json").write_text(json.dumps(home if index == "flat" else {"weight_map": home}))
    form, home = detect(tmp_path)
    assert form == SPLIT
    back = read(tmp_path, regroup(layout(SMALL, form), home))
    assert all(back[t.name].tobytes() == w[t.name].tobytes() for t in published(SMALL) if not t.copy)


def test_regroup_names_what_does_not_fit():
    files = layout(SMALL)
    home = param_name_map(files)
    del home["model.mtp_norms.0.weight"]
    with pytest.raises(ValueError, match=r"missing 1 \(model.mtp_norms.0.weight\)"):
        regroup(files, home)
    with pytest.raises(ValueError, match="here: .*unexpected .*model.layers.3.attention"):
        regroup(layout(SMALL.replace(num_nextn_predict_layers=0)), param_name_map(files), "here")


def test_folders_that_are_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="unified_safetensors"):
        detect(tmp_path)
    (tmp_path / NAME_MAP).write_text(json.dumps({"model.norm_out.weight": "../x.safetensors"}))
    with pytest.raises(ValueError, match="plain name"):
        detect(tmp_path)
    (tmp_path / NAME_MAP).write_text(json.dumps({"model.layers.0.self_attn.o_proj.weight": "x.safetensors"}))
    with pytest.raises(ValueError, match="not a DeepSeek-V3 of MindSpore Transformers; found model.layers.0.self_attn"):
        detect(tmp_path)


@pytest.mark.parametrize("form", [SPLIT, INFER, VIA_TRAIN], ids=["split", "infer", "train2infer"])
def test_experts_turned_the_wrong_way_are_refused(form, tmp_path):
    w = weights(SMALL)
    files = layout(SMALL, form)
    write(tmp_path, files, w)
    file = next(file for file in files if any(s.name.endswith("ffn.w1.weight") for s in file.tensors))
    turned = {s.name: ("F32", built(s, w).swapaxes(1, 2) if ".ffn.w" in s.name else built(s, w)) for s in file.tensors}
    safetensors_io.write_file(tmp_path / file.path, turned)
    with pytest.raises(ValueError, match=rf"{file.path}: tensor .*ffn.w1.weight' has shape \[6, \d+, \d+\]; expected \[experts"):
        detect(tmp_path)


def test_via_train_is_an_inference_form():
    with pytest.raises(ValueError, match="set infer=True"):
        MindformersForm(via_train=True)
