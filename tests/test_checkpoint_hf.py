"""Hugging Face checkpoints: names and shapes of the released model, byte identity both ways, FP8, and
refusals.

Planted faults this file was seen to catch. Names: not transposed; the embedding transposed; gate misnamed; q
and kv norms swapped; MTP index off by one; MTP norm misnamed; no copies for MTP; experts in reverse. Reading:
copies not compared; the router bias in the weights' type; quantization_config kept; stray tensors ignored;
shapes not compared; MTP dropped without a word; a mixture kept as its first type; the layers asked for
ignored. Writing: the router bias in the weights' type, or narrowed and widened; old shards left. FP8: block
size ignored; scales not looked at; scales transposed; scales of 1; the product rounded to bfloat16.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path

os.environ.setdefault("MS_DEV_JIT_PIPELINE", "0")

import numpy as np
import pytest

from dsv3.checkpoint import fp8, from_hf, leaves, load, names, safetensors_io, save, shards, to_hf
from dsv3.config import V3, Config
from dsv3.model import init, param_specs
from dsv3.spec import is_spec
from dsv3.tree import paths

GOLDENS = Path(__file__).parent / "goldens"
FOLDERS = sorted(p.parent for room in ("hf", "train") for p in (GOLDENS / room).glob("*/model.safetensors"))
CFG = Config(
    vocab_size=30,
    hidden_size=10,
    intermediate_size=12,
    moe_intermediate_size=6,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=6,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
)


def bits(tree) -> dict:
    """{path: (type, shape, bytes)}: equal exactly when the trees are equal bit for bit."""
    return {path: (leaves.dtype_of(x), tuple(x.shape), leaves.host(x).tobytes()) for path, x in paths(tree)}


def tensors(folder) -> dict:
    """{name: (type, values)} of a Hugging Face folder."""
    opened = shards.open_shards(folder)
    return {n: (opened.slot(n).dtype, opened.read(n)) for n in opened.home}


def same(a: dict, b: dict) -> bool:
    return {n: (d, x.shape, x.tobytes()) for n, (d, x) in a.items()} == {
        n: (d, x.shape, x.tobytes()) for n, (d, x) in b.items()
    }


def hf_folder(path: Path, config: dict, content: dict) -> Path:
    """A folder written tensor by tensor, without the code under test for names and layout."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    safetensors_io.write_file(path / "model.safetensors", content, {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, params): CFG written in float32."""
    folder, params = tmp_path_factory.mktemp("hf") / "m", init(CFG, seed=3)
    return to_hf(params, CFG, folder, dtype="float32"), params


# ---- names ---------------------------------------------------------------------------------------------
def test_names_types_and_shapes_are_those_of_the_released_checkpoint():
    # Digest and counts of the tensors of deepseek-ai/DeepSeek-V3 (163 files): sorted lines "name type 1x2".
    lines = []
    for t in names.published(V3):
        lines.append((t.name, "F8_E4M3" if t.quantised else "F32" if t.float32 else "BF16", t.shape))
        if t.quantised:
            lines.append((t.name + names.SCALE, "F32", fp8.scale_shape(t.shape)))
    assert Counter(dtype for _, dtype, _ in lines) == {"F8_E4M3": 45808, "BF16": 316, "F32": 45867}
    assert len({name for name, _, _ in lines}) == 91991
    text = "\n".join(sorted(f"{name} {dtype} {'x'.join(map(str, shape))}" for name, dtype, shape in lines))
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "a811da550659bdd831d7401d5071ca77cca89034bf6fb8c21d5a49d7aa1241f8"
    )


VARIANTS = {
    "plain": {},
    "no MTP": {"num_nextn_predict_layers": 0},
    "two MTP": {"num_nextn_predict_layers": 2},
    "full-rank query": {"q_lora_rank": None},
    "no router bias": {"topk_method": "group_limited_greedy"},
    "tied": {"tie_word_embeddings": True},
    "tied without MTP": {"tie_word_embeddings": True, "num_nextn_predict_layers": 0},
    "no shared expert": {"n_shared_experts": 0},
    "three shared experts": {"n_shared_experts": 3},
    "all dense": {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0},
    "every other layer": {"moe_layer_freq": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_element_has_one_published_place(variant):
    cfg = CFG.replace(**VARIANTS[variant])
    listed = names.published(cfg)
    assert len({t.name for t in listed}) == len(listed)
    numbered, start = {}, 0
    for path, spec in paths(param_specs(cfg), is_spec):
        numbered[path] = np.arange(start, start + spec.size).reshape(spec.shape)
        start += spec.size
    seen = []
    for t in listed:
        part = names.to_published(numbered[t.path], t)
        assert part.shape == t.shape
        back = names.to_leaf(part, t)
        np.testing.assert_array_equal(
            back, numbered[t.path] if t.expert is None else numbered[t.path][t.expert]
        )
        if not t.copy:
            seen.append(part.reshape(-1))
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(start))
    assert sum(t.copy for t in listed) == 2 * cfg.num_nextn_predict_layers
    assert ("lm_head.weight" in {t.name for t in listed}) == (not cfg.tie_word_embeddings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_params_to_hf_and_back(tmp_path, variant, dtype):
    cfg = CFG.replace(**VARIANTS[variant])
    params = init(cfg, seed=4, dtype=dtype)
    to_hf(params, cfg, tmp_path / "m", dtype=dtype, max_shard_size=3000)
    back, read = from_hf(tmp_path / "m")
    assert read == cfg and list(bits(back)) == list(bits(params)) and bits(back) == bits(params)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == dtype
    shown = [p for p in (tmp_path / "m").iterdir() if p.suffix == ".safetensors"]
    assert len(shown) > 2 and (tmp_path / "m" / "model.safetensors.index.json").exists()


def test_where_values_go(written):
    folder, params = written
    found = {n: x for n, (_, x) in tensors(folder).items()}
    block, mtp = params["layers"][2], params["mtp"][0]
    for name, want in (
        ("model.layers.2.self_attn.kv_a_proj_with_mqa.weight", block["attn"]["wkv_a"].asnumpy().T),
        ("model.layers.2.mlp.experts.3.up_proj.weight", block["experts"]["w_up"].asnumpy()[3].T),
        ("model.layers.2.mlp.shared_experts.down_proj.weight", block["shared"]["w_down"].asnumpy().T),
        ("model.layers.2.mlp.gate.weight", block["router"]["w"].asnumpy().T),
        ("model.layers.3.eh_proj.weight", mtp["eh_proj"].asnumpy().T),
        ("model.layers.3.shared_head.norm.weight", mtp["norm"].asnumpy()),
        ("model.layers.3.embed_tokens.weight", params["embed"].asnumpy()),
        ("model.layers.3.shared_head.head.weight", params["head"].asnumpy().T),
        ("lm_head.weight", params["head"].asnumpy().T),
    ):
        np.testing.assert_array_equal(found[name], want)


# ---- goldens -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_goldens_come_out_byte_for_byte(tmp_path, folder):
    assert len(FOLDERS) >= 8
    params, cfg = from_hf(folder)
    to_hf(params, cfg, tmp_path / "again", dtype="float32")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    save(tmp_path / "own", params, cfg=cfg)
    to_hf(*load(tmp_path / "own"), tmp_path / "third", dtype="float32", max_shard_size=40000)
    assert same(tensors(tmp_path / "third"), tensors(folder))


def test_a_golden_in_bfloat16_comes_out_byte_for_byte(tmp_path):
    original = tensors(FOLDERS[0])
    narrow = {
        n: ("F32", x) if n.endswith("bias") else ("BF16", leaves.bf16_bits(x))
        for n, (_, x) in original.items()
    }
    hf_folder(tmp_path / "bf16", json.loads((FOLDERS[0] / "config.json").read_text()), narrow)
    params, cfg = from_hf(tmp_path / "bf16")
    assert {leaves.dtype_of(x) for p, x in paths(params) if not p.endswith("router.bias")} == {"BF16"}
    to_hf(params, cfg, tmp_path / "again", dtype="bfloat16")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "bf16" / "model.safetensors"
    ).read_bytes()
    to_hf(from_hf(FOLDERS[0])[0], cfg, tmp_path / "rounded", dtype="bfloat16")
    assert same(tensors(tmp_path / "rounded"), narrow)


# ---- types ---------------------------------------------------------------------------------------------
def test_types(tmp_path, written):
    folder, params = written
    config, content = json.loads((folder / "config.json").read_text()), tensors(folder)
    assert bits(from_hf(folder, dtype="bfloat16")[0]) == bits(init(CFG, seed=3, dtype="bfloat16"))
    mixed = content | {"model.norm.weight": ("BF16", leaves.bf16_bits(content["model.norm.weight"][1]))}
    for named, kind in (("float32", "F32"), ("bfloat16", "BF16")):
        hf_folder(tmp_path / "mixed", config | {"torch_dtype": named}, mixed)
        found = from_hf(tmp_path / "mixed")[0]
        assert {leaves.dtype_of(x) for p, x in paths(found)} == {kind, "F32"}
        assert leaves.dtype_of(found["mtp"][0]["router"]["bias"]) == "F32"
    hf_folder(tmp_path / "mixed", config | {"torch_dtype": "float8"}, mixed)
    with pytest.raises(ValueError, match="BF16, F32 and torch_dtype in config.json is 'float8'; say dtype="):
        from_hf(tmp_path / "mixed")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    hf_folder(
        tmp_path / "bias",
        config,
        content | {bias: ("BF16", np.array([0x3F80, 0xBF80, 0, 0x4000], np.uint16))},
    )
    np.testing.assert_array_equal(
        from_hf(tmp_path / "bias")[0]["layers"][1]["router"]["bias"].asnumpy(), [1, -1, 0, 2]
    )
    hf_folder(tmp_path / "int", config, content | {"model.norm.weight": ("I32", np.ones(10, np.int32))})
    with pytest.raises(ValueError, match="'model.norm.weight': is stored as I32"):
        from_hf(tmp_path / "int", dtype="float32")
    with pytest.raises(ValueError, match="expected one of float32, bfloat16, float16, float8_e4m3fn"):
        to_hf(params, CFG, tmp_path / "x", dtype="int8")


def test_router_bias_keeps_all_its_bits_in_every_type(tmp_path):
    params = init(CFG, seed=5)
    exact = np.float32([2.0200001, -1.2345678, 1e-9, 3.1415927])
    params["layers"][1]["router"]["bias"] = leaves.tensor(exact, "F32")
    for dtype in ("float32", "bfloat16", "float16", "float8_e4m3fn"):
        to_hf(params, CFG, tmp_path / dtype, dtype=dtype)
        back = from_hf(tmp_path / dtype, dtype="bfloat16")[0]
        np.testing.assert_array_equal(back["layers"][1]["router"]["bias"].asnumpy(), exact)


# ---- refusals ------------------------------------------------------------------------------------------
def test_missing_unexpected_and_wrongly_shaped_tensors(tmp_path, written):
    folder, _ = written
    config, content = json.loads((folder / "config.json").read_text()), tensors(folder)
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    for change, words in (
        (
            {n: v for n, v in content.items() if n != name},
            "missing 1 .*layers.2.mlp.experts.3.up_proj.weight",
        ),
        ({n: v for n, v in content.items() if "enorm" not in n}, "missing 1 .*layers.3.enorm.weight"),
        (
            {n: v for n, v in content.items() if not n.endswith("shared_head.head.weight")},
            "missing 1 .*shared_head.head",
        ),
        (
            content | {"model.layers.1.mlp.experts.4.up_proj.weight": content[name]},
            "unexpected 1 .*experts.4.up_proj",
        ),
        (content | {"model.layers.0.self_attn.q_proj.weight": content[name]}, "unexpected 1 .*q_proj"),
        (
            content | {name + "_scale_inv": ("F32", np.ones((1, 1), np.float32))},
            "unexpected 1 .*up_proj.weight_scale_inv",
        ),
        (
            content | {name: ("F32", content[name][1].T)},
            rf"'{name}' has shape \[10, 6\]; the config asks for \[6, 10\]",
        ),
        (
            content | {"model.layers.3.embed_tokens.weight": ("F32", np.zeros((9, 10), np.float32))},
            r"shape \[9, 10\]",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            from_hf(hf_folder(tmp_path / "m", config, change))
    content |= {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": ("F32", np.ones(1, np.float32)) for i in range(3)
    }
    assert from_hf(hf_folder(tmp_path / "m", config, content))[1] == CFG


def test_mtp_there_or_not(tmp_path, written):
    folder, params = written
    config, content = json.loads((folder / "config.json").read_text()), tensors(folder)
    main = {n: v for n, v in content.items() if not n.startswith("model.layers.3.")}
    without = CFG.replace(num_nextn_predict_layers=0)
    trunk = bits({k: v for k, v in params.items() if k != "mtp"})
    hf_folder(tmp_path / "main", config, main)
    with pytest.raises(
        ValueError, match=r"num_nextn_predict_layers=1 but the files hold no MTP tensors .*mtp=False"
    ):
        from_hf(tmp_path / "main")
    hf_folder(tmp_path / "zero", config | {"num_nextn_predict_layers": 0}, content)
    with pytest.raises(
        ValueError, match="num_nextn_predict_layers=0; .*mtp=False, or set num_nextn_predict_layers=1"
    ):
        from_hf(tmp_path / "zero")
    for name in (tmp_path / "main", tmp_path / "zero", folder):
        found, cfg = from_hf(name, mtp=False)
        assert cfg == without and bits(found) == trunk
    for copy, main_name in (
        ("embed_tokens", "model.embed_tokens.weight"),
        ("shared_head.head", "lm_head.weight"),
    ):
        changed = content[f"model.layers.3.{copy}.weight"][1].copy()
        changed[17, 3] += 1
        hf_folder(tmp_path / "copy", config, content | {f"model.layers.3.{copy}.weight": ("F32", changed)})
        with pytest.raises(
            ValueError, match=f"'model.layers.3.{copy}.weight' differs from '{main_name}' .first in row 17"
        ):
            from_hf(tmp_path / "copy")
        assert bits(from_hf(tmp_path / "copy", mtp=False)[0]) == trunk


def test_a_tied_head_may_be_repeated(tmp_path):
    cfg = CFG.replace(tie_word_embeddings=True, num_nextn_predict_layers=0)
    params = init(cfg, seed=6)
    content = tensors(to_hf(params, cfg, tmp_path / "m", dtype="float32"))
    config = cfg.to_hf()
    hf_folder(tmp_path / "r", config, content | {"lm_head.weight": content["model.embed_tokens.weight"]})
    assert bits(from_hf(tmp_path / "r")[0]) == bits(params)
    hf_folder(tmp_path / "r", config, content | {"lm_head.weight": ("F32", np.ones((30, 10), np.float32))})
    with pytest.raises(ValueError, match="'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        from_hf(tmp_path / "r")


def test_a_few_layers(written):
    folder, params = written
    for layers, mtp in ((1, True), (2, False), (3, True)):
        found, cfg = from_hf(folder, layers=layers, mtp=mtp)
        assert cfg == CFG.replace(num_hidden_layers=layers, num_nextn_predict_layers=int(mtp))
        want = params | {"layers": params["layers"][:layers]}
        assert bits(found) == bits(want if mtp else {k: v for k, v in want.items() if k != "mtp"})
    for layers in (0, 4):
        with pytest.raises(ValueError, match=f"layers={layers}; the checkpoint has 3"):
            from_hf(folder, layers=layers)


def test_folders(tmp_path, written):
    folder, params = written
    with pytest.raises(FileNotFoundError, match="absent"):
        from_hf(tmp_path / "absent")
    save(tmp_path / "own", params, cfg=CFG)
    with pytest.raises(ValueError, match="our own format; read it with load"):
        from_hf(tmp_path / "own")
    with pytest.raises(ValueError, match="holds manifest.json"):
        to_hf(params, CFG, tmp_path / "own")
    assert bits(load(tmp_path / "own")[0]) == bits(params)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps(CFG.to_hf()))
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        from_hf(tmp_path / "empty")
    (tmp_path / "empty" / "tokenizer.json").write_text("{}")
    to_hf(params, CFG, tmp_path / "empty", max_shard_size=3000)
    to_hf(
        params, CFG, tmp_path / "empty", dtype="float32"
    )  # replaces, and leaves no shard of the other behind
    assert sorted(os.listdir(tmp_path / "empty")) == ["config.json", "model.safetensors", "tokenizer.json"]
    (tmp_path / "empty" / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="holds adapter.safetensors"):
        to_hf(params, CFG, tmp_path / "empty")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=r"missing 1 \(norm\)"):
        to_hf({k: v for k, v in params.items() if k != "norm"}, CFG, tmp_path / "new")
    big = params | {"norm": leaves.tensor(np.full(10, 1e6, np.float32), "F32")}
    with pytest.raises(ValueError, match="norm'?: holds 1e.06, beyond float16's 65504"):
        to_hf(big, CFG, tmp_path / "new", dtype="float16")
    assert sorted(os.listdir(tmp_path)) == before


# ---- FP8 -----------------------------------------------------------------------------------------------
WIDE = CFG.replace(
    hidden_size=136, intermediate_size=260, moe_intermediate_size=130, num_hidden_layers=2
)  # partial blocks


def decode(code: int) -> float:
    """E4M3FN by its definition."""
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if code > 127 else size


def fp8_folder(path: Path, block: int = 128):
    """A folder with random codes and scales, and {name: float32 values} by the definition, element by
    element.
    """
    rng, content, truth = np.random.default_rng(8), {}, {}
    table = np.float32([decode(code) for code in range(256)])
    for name, (dtype, values) in tensors(to_hf(init(WIDE, seed=7), WIDE, path, dtype="bfloat16")).items():
        content[name], truth[name] = (dtype, values), leaves.convert(values, dtype, "F32", name)
        if "proj" in name and "eh_proj" not in name:
            codes = rng.integers(0, 126, values.shape).astype(np.uint8) + (
                rng.integers(0, 2, values.shape) * 128
            ).astype(np.uint8)
            scales = np.exp(rng.normal(-8, 1, [-(-n // block) for n in values.shape])).astype(np.float32)
            content[name], content[name + "_scale_inv"] = ("F8_E4M3", codes), ("F32", scales)
            at = np.ix_(np.arange(values.shape[0]) // block, np.arange(values.shape[1]) // block)
            truth[name] = table[codes] * scales[at]
    config = WIDE.to_hf() | {
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [block, block],
        }
    }
    return config, content, truth


@pytest.mark.parametrize("block", [128, 64])
def test_fp8_is_dequantised_as_defined(tmp_path, block):
    config, content, truth = fp8_folder(tmp_path / "m", block)
    hf_folder(tmp_path / "f", config, content)
    found, cfg = from_hf(tmp_path / "f", dtype="float32")
    assert cfg == WIDE and "quantization_config" not in cfg.to_hf()
    wide = tensors(to_hf(found, cfg, tmp_path / "wide", dtype="float32"))
    assert set(wide) == set(truth)
    for name, (_, values) in wide.items():
        np.testing.assert_array_equal(values, truth[name])
    narrow, _ = from_hf(tmp_path / "f")  # torch_dtype
    for name, (dtype, values) in tensors(to_hf(narrow, cfg, tmp_path / "narrow", dtype="bfloat16")).items():
        np.testing.assert_array_equal(
            values, truth[name] if dtype == "F32" else leaves.bf16_bits(truth[name])
        )


def test_fp8_scales_may_lie_in_other_files(tmp_path):
    config, content, _ = fp8_folder(tmp_path / "m")
    hf_folder(tmp_path / "f", config, content)
    one = from_hf(tmp_path / "f")[0]
    (tmp_path / "f" / "model.safetensors").unlink()
    parts = {
        "a.safetensors": {n: v for n, v in content.items() if not n.endswith("_scale_inv")},
        "b.safetensors": {n: v for n, v in content.items() if n.endswith("_scale_inv")},
    }
    for name, part in parts.items():
        safetensors_io.write_file(tmp_path / "f" / name, part)
    index = {"weight_map": {n: name for name, part in parts.items() for n in part}}
    (tmp_path / "f" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert bits(from_hf(tmp_path / "f")[0]) == bits(one)


def test_wrong_fp8_is_refused(tmp_path):
    config, content, _ = fp8_folder(tmp_path / "m")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    scales = content[name + "_scale_inv"][1]

    def with_scale(value):
        changed = scales.copy()
        changed[1, 0] = value
        return content | {name + "_scale_inv": ("F32", changed)}

    for change, words in (
        (with_scale(np.nan), rf"{name}_scale_inv' has the scale nan at \[1, 0\]"),
        (with_scale(np.inf), r"the scale inf at \[1, 0\]"),
        (with_scale(-1), r"the scale -1.0 at \[1, 0\]"),
        ({n: v for n, v in content.items() if n != name + "_scale_inv"}, f"missing 1 .{name}_scale_inv"),
        (content | {name + "_scale_inv": ("F32", scales[:1])}, r"F32 \[1, 2\]; expected F32 \[2, 2\]"),
        (content | {"model.norm.weight": ("F8_E4M3", np.zeros(136, np.uint8))}, "'model.norm.weight' is FP8"),
    ):
        with pytest.raises(ValueError, match=words):
            from_hf(hf_folder(tmp_path / "f", config, change))
    for wrong, words in (
        ({"quant_method": "awq"}, "quantization_config is .*awq"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\]"),
    ):
        with pytest.raises(ValueError, match=words):
            from_hf(hf_folder(tmp_path / "f", config | {"quantization_config": wrong}, content))


def test_fp8_is_written_with_real_scales(tmp_path):
    params = init(WIDE, seed=9)
    content = tensors(to_hf(params, WIDE, tmp_path / "f", dtype="float8_e4m3fn"))
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    plain = {n: x for n, (_, x) in tensors(to_hf(params, WIDE, tmp_path / "p", dtype="float32")).items()}
    kinds = {
        t.name: "F8_E4M3" if t.quantised else "F32" if t.float32 else "BF16" for t in names.published(WIDE)
    }
    assert {n: d for n, (d, _) in content.items() if not n.endswith("_scale_inv")} == kinds
    for name, values in plain.items():
        if kinds[name] != "F8_E4M3":
            continue
        scales = content[name + "_scale_inv"][1]
        for i, j in np.ndindex(scales.shape):
            part = values[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            assert scales[i, j] == np.abs(part).max() / np.float32(448)
    found, cfg = from_hf(tmp_path / "f", dtype="float32")
    assert cfg == WIDE
    for path, leaf in paths(params):
        near = dict(paths(found))[path].asnumpy()
        assert np.abs(near - leaf.asnumpy()).max() <= 2**-4 * np.abs(leaf.asnumpy()).max()
    # Codes at 448 give the same scale back, so a second pass changes nothing.
    assert same(tensors(to_hf(found, cfg, tmp_path / "again", dtype="float8_e4m3fn")), content)
    bad = params | {
        "layers": (
            params["layers"][0]
            | {
                "mlp": params["layers"][0]["mlp"]
                | {"w_up": leaves.tensor(np.full((136, 260), np.inf, np.float32), "F32")}
            },
            params["layers"][1],
        )
    }
    with pytest.raises(ValueError, match="layers.0.mlp.w_up'? holds values that are not finite"):
        to_hf(bad, WIDE, tmp_path / "bad", dtype="float8_e4m3fn")
    assert not (tmp_path / "bad").exists()
