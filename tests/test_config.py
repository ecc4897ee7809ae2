"""The configuration: the released file lossless, every refusal with its numbers and its remedy, the presets'
sizes.

Planted faults this file was seen to catch, one at a time: unknown keys lost; unchanged keys rewritten;
rope_parameters ignored; the softmax scale not squared; YaRN's low end rounded up; moe_layer_freq ignored;
checks of groups, of experts per token and of NaN left out; true taken for 1; active parameters counted over
dense layers; an import of mindspore.
"""

import copy
import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from oracles import rope as rope_oracle

import dsv3
from dsv3.cli.main import main
from dsv3.config import PRESETS, Config, Yarn
from dsv3.counts import counts

RELEASED = {  # DeepSeek-V3's config.json, and three keys that no one knows
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "unknown_number": 3.5,
    "unknown_tree": {"a": [1, None, {"b": "ü"}]},
    "unknown_null": None,
}
TINY_FILE = {"vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 4}


# -- the released file ---------------------------------------------------------------------------------------
def test_released_file_is_the_preset():
    cfg = Config.from_hf(RELEASED)
    assert cfg == dsv3.V3
    assert isinstance(cfg.rms_norm_eps, float) and isinstance(cfg.rope_theta, float)  # the file says 10000


@pytest.mark.parametrize("kind", ["dict", "file", "folder"])
def test_round_trip_is_lossless(kind, tmp_path):
    source = copy.deepcopy(RELEASED)
    if kind != "dict":
        (tmp_path / "config.json").write_text(json.dumps(RELEASED), encoding="utf-8")
        source = tmp_path / "config.json" if kind == "file" else str(tmp_path)
    out = Config.from_hf(source).to_hf()
    assert out == RELEASED and list(out) == list(RELEASED)
    assert json.dumps(out) == json.dumps(RELEASED)  # 10000 stays an int, 0.0 a float
    if kind == "dict":
        assert source == RELEASED


def test_changes_and_only_they_reach_the_file():
    cfg = Config.from_hf(RELEASED).replace(num_hidden_layers=4, num_attention_heads=16)
    changed = {"num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 16}
    assert cfg.to_hf() == RELEASED | changed
    longer = Config.from_hf(RELEASED).replace(rope_scaling=Yarn(8, 4096, mscale_all_dim=0.5)).to_hf()
    assert longer["rope_scaling"] == {
        "type": "yarn",
        "factor": 8,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    }
    assert Config.from_hf(longer).rope_scaling == Yarn(8, 4096, mscale_all_dim=0.5)
    assert Config.from_hf(RELEASED).replace(rope_scaling=None).to_hf()["rope_scaling"] is None


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_file(name):
    cfg = PRESETS[name]
    again = Config.from_hf(json.loads(json.dumps(cfg.to_hf())))
    assert again == cfg and cfg.to_hf()["model_type"] == "deepseek_v3"


def test_rope_parameters_of_transformers_5():
    raw = {k: v for k, v in RELEASED.items() if k not in ("rope_scaling", "rope_theta")}
    raw["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 500.0} | {
        k: v for k, v in RELEASED["rope_scaling"].items() if k != "type"
    }
    cfg = Config.from_hf(raw)
    assert cfg == dsv3.V3.replace(rope_theta=500.0) and cfg.to_hf() == raw
    out = cfg.replace(rope_theta=100.0).to_hf()
    assert "rope_parameters" not in out and out["rope_theta"] == 100.0 and out["rope_scaling"]["factor"] == 40
    plain = Config.from_hf(raw | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}})
    assert plain.rope_scaling is None and plain.rope_theta == 500.0


def test_what_a_file_may_leave_out():
    cfg = Config.from_hf(TINY_FILE | {"first_k_dense_replace": 1, "n_shared_experts": None, "n_group": None})
    assert (cfg.n_shared_experts, cfg.n_group, cfg.topk_group, cfg.num_nextn_predict_layers) == (0, 1, 1, 0)
    assert Config.from_hf(TINY_FILE | {"eos_token_id": [5, 6]}).eos_token_id == 5
    assert Config.from_hf(TINY_FILE | {"num_attention_heads": 6}).num_key_value_heads == 6


# -- refusals ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "raw, message",
    [
        ({"model_type": "llama"}, "model_type is 'llama'; expected 'deepseek_v3'"),
        ({"hidden_size": "7168"}, "hidden_size is '7168'; expected int"),
        ({"hidden_size": True}, "hidden_size is True; expected int"),
        ({"hidden_size": None}, "hidden_size is null; expected int"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1; expected bool"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'; expected float"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; expected null or an object"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "rope_scaling type 'linear' is not supported; expected 'yarn'",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2}},
            "original_max_position_embeddings is None; expected a number",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": True, "original_max_position_embeddings": 9}},
            "rope_scaling.factor is True; expected a number",
        ),
    ],
)
def test_refused_files(raw, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config.from_hf(TINY_FILE | raw)


def test_missing_and_malformed_files(tmp_path):
    with pytest.raises(ValueError, match="config: missing hidden_size, vocab_size"):
        Config.from_hf({"num_hidden_layers": 3})
    with pytest.raises(
        FileNotFoundError, match="config.json: no such file; expected a config.json or the folder"
    ):
        Config.from_hf(tmp_path)
    file = tmp_path / "config.json"
    for text, message in (("{", "not JSON"), ("[1]", "expected a JSON object, found list")):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"{re.escape(str(file))}: {message}"):
            Config.from_hf(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not JSON"):
        Config.from_hf(file)


@pytest.mark.parametrize(
    "changes, message",
    [
        *[
            ({name: 0}, f"{name}=0; it must be an integer of at least 1")
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "moe_intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "kv_lora_rank",
                "qk_nope_head_dim",
                "qk_rope_head_dim",
                "v_head_dim",
                "n_routed_experts",
                "num_experts_per_tok",
                "n_group",
                "topk_group",
                "moe_layer_freq",
                "max_position_embeddings",
            )
        ],
        *[
            ({name: -1}, f"{name}=-1; it must be an integer of at least 0")
            for name in ("first_k_dense_replace", "num_nextn_predict_layers", "n_shared_experts")
        ],
        *[
            ({name: 0.0}, f"{name}=0.0; it must be positive")
            for name in ("rms_norm_eps", "rope_theta", "initializer_range")
        ],
        ({"hidden_size": 12.5}, "hidden_size=12.5; it must be an integer"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan; it must be positive"),
        ({"q_lora_rank": 0}, "q_lora_rank=0; it must be at least 1, or None for a full-rank query"),
        ({"aux_loss_alpha": -0.1}, "aux_loss_alpha=-0.1; it must be at least 0"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim=63 is odd; rotary embedding turns pairs: make it even"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8 differs from num_attention_heads=128"),
        (
            {"first_k_dense_replace": 62},
            "first_k_dense_replace=62 exceeds num_hidden_layers=61; lower it to at most 61",
        ),
        ({"topk_method": "best"}, "topk_method='best'; pick one of noaux_tc, group_limited_greedy, greedy"),
        ({"scoring_func": "relu"}, "scoring_func='relu'; pick 'sigmoid' or 'softmax'"),
        (
            {"n_group": 7},
            "n_routed_experts=256 is not divisible by n_group=7; pick n_group from 1, 2, 4, 8, 16",
        ),
        ({"topk_group": 9}, "topk_group=9 exceeds n_group=8; pick topk_group from 1 to 8"),
        (
            {"num_experts_per_tok": 129},
            "num_experts_per_tok=129 exceeds the 128 experts of topk_group=4 groups of 32; "
            "lower num_experts_per_tok to at most 128 or raise topk_group",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; DeepSeek-V3 has 'silu'"),
        ({"attention_bias": True}, "attention_bias=True, attention_dropout=0.0; DeepSeek-V3 has neither"),
        ({"attention_dropout": 0.1}, "attention_bias=False, attention_dropout=0.1; DeepSeek-V3 has neither"),
        (
            {"rope_scaling": Yarn(0.5, 4096)},
            "rope_scaling.factor=0.5; YaRN extends a context: it must be at least 1",
        ),
        (
            {"rope_scaling": Yarn(4, 0)},
            "rope_scaling.original_max_position_embeddings=0; it must be at least 1",
        ),
        (
            {"bos_token_id": 129280},
            "bos_token_id=129280 is outside the vocabulary of vocab_size=129280; pick an id from 0 "
            "to 129279, or None",
        ),
        ({"eos_token_id": -1}, "eos_token_id=-1 is outside the vocabulary"),
    ],
)
def test_refused_models(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dsv3.V3.replace(**changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(**changes)


def test_limits_are_allowed():
    Config(
        first_k_dense_replace=61,
        num_experts_per_tok=128,
        topk_group=8,
        bos_token_id=129279,
        eos_token_id=None,
        aux_loss_alpha=0.0,
        q_lora_rank=None,
    )
    Config(topk_method="greedy", n_group=7, topk_group=9, num_experts_per_tok=256)  # no groups there
    with pytest.raises(TypeError, match="hiden_size"):
        dsv3.V3.replace(hiden_size=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        dsv3.V3.hidden_size = 1
    assert hash(Config()) == hash(Config()) and Config() != dsv3.V3


# -- derived numbers -----------------------------------------------------------------------------------------
def test_counts_of_the_released_model():
    c = counts(dsv3.V3)
    assert (c.main, c.mtp, c.active) == (671_026_419_200, 11_610_068_224, 37_552_297_472)
    assert c.cache_bytes == 61 * 576 * 2
    assert c.expanded_cache_bytes == 61 * 40960 * 2
    # every weight in bfloat16 but the 59 router biases of 256, in float32
    assert c.weight_bytes == 2 * (c.main + c.mtp) + 2 * 59 * 256
    specs = dsv3.param_specs(dsv3.V3)
    layer = dict(dsv3.tree.paths(specs["layers"][0]["attn"], dsv3.spec.is_spec))
    assert sum(s.size for s in layer.values()) == 187_107_328
    assert dsv3.spec.count(specs["layers"][2]) == 583_483_392
    assert dsv3.spec.count(specs["layers"][3]) == 11_507_286_272


def test_flops_of_the_released_model():
    """Twice the active matrices, and attention over half of the context, 61 times (hand count)."""
    c, vectors = counts(dsv3.V3, context=4096), 61 * (2 * 7168 + 1536 + 512) + 7168 + 58 * 256
    assert c.forward_flops == 2 * (c.active - 129280 * 7168 - vectors) + 61 * 2 * 128 * 320 * 2048
    assert counts(dsv3.V3, context=8192).forward_flops - c.forward_flops == 61 * 2 * 128 * 320 * 2048


@pytest.mark.parametrize(
    "name, main, mtp",
    [
        ("V3_1B", 1_256_849_456, None),
        ("V3_4LAYER", 25.451e9, 11.610e9),
        ("V3_16EXPERTS", 5.35e9, None),
        ("SMALL", 204e6, 0),
    ],
)
def test_counts_of_the_presets(name, main, mtp):
    c = counts(PRESETS[name])
    if isinstance(main, int):
        assert main in (c.main, c.main + c.mtp)
    else:
        assert min(abs(c.main / main - 1), abs((c.main + c.mtp) / main - 1)) < 2e-3
    assert mtp is None or c.mtp == pytest.approx(mtp, rel=1e-4)


def test_softmax_scale():
    assert dsv3.V3.softmax_scale == pytest.approx(0.1352338, abs=5e-8)
    assert dsv3.V3.softmax_scale == pytest.approx(rope_oracle.softmax_scale(RELEASED), rel=1e-12)
    assert Config().softmax_scale == pytest.approx(192**-0.5, rel=1e-12)
    partly = Yarn(40, 4096, mscale=0.7, mscale_all_dim=0.5)
    assert Config(rope_scaling=partly).softmax_scale == pytest.approx(
        rope_oracle.softmax_scale(RELEASED | {"rope_scaling": dataclasses.asdict(partly)}), rel=1e-12
    )


def test_yarn_tables():
    """The released ramp runs from pair 10 to pair 23; frequencies and gain as the oracle has them."""
    from dsv3.nn.rope import inverse_frequencies, table_scale

    assert rope_oracle.correction_range(RELEASED) == (10, 23)
    found, plain = inverse_frequencies(dsv3.V3), inverse_frequencies(Config())
    np.testing.assert_allclose(found, rope_oracle.inverse_frequencies(RELEASED), rtol=1e-12)
    np.testing.assert_array_equal(found[:11], plain[:11])
    np.testing.assert_allclose(found[23:], plain[23:] / 40, rtol=1e-12)
    assert (found[11:23] < plain[11:23]).all() and (found[11:23] > plain[11:23] / 40).all()
    assert table_scale(dsv3.V3) == 1.0
    uneven = Yarn(4, 32, mscale=0.8, mscale_all_dim=1.0)
    cos, _ = rope_oracle.tables(RELEASED | {"rope_scaling": dataclasses.asdict(uneven)}, 0)
    assert table_scale(Config(rope_scaling=uneven)) == pytest.approx(cos[0], rel=1e-12)


def test_layers_of_the_released_model():
    assert dsv3.V3.num_moe_layers == 58
    assert [i for i in range(61) if not dsv3.V3.is_moe_layer(i)] == [0, 1, 2]
    every_other = Config(num_hidden_layers=8, first_k_dense_replace=2, moe_layer_freq=2)
    assert [every_other.is_moe_layer(i) for i in range(8)] == [
        False,
        False,
        True,
        False,
        True,
        False,
        True,
        False,
    ]
    specs = dsv3.param_specs(every_other)
    assert ["router" in layer for layer in specs["layers"]] == [every_other.is_moe_layer(i) for i in range(8)]
    assert "bias" not in dsv3.param_specs(Config(topk_method="greedy"))["layers"][3]["router"]
    assert "head" not in dsv3.param_specs(Config(tie_word_embeddings=True))


# -- what an import costs ------------------------------------------------------------------------------------
def python(*lines):
    """stdout of a fresh Python."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_no_mindspore():
    """Nor does a config, the data room, or the help of the command line; the model does."""
    out = python(
        "import sys, dsv3",
        "dsv3.V3.replace(num_hidden_layers=4), dsv3.SMALL, dir(dsv3)",
        "dsv3.data",
        "import dsv3.data.indexed, dsv3.data.gpt_dataset",
        "print('mindspore' in sys.modules)",
        "from dsv3.cli.main import main",
        "try: main(['train', '--help'])",
        "except SystemExit: pass",
        "print('mindspore' in sys.modules)",
        "dsv3.param_specs",
        "print('mindspore' in sys.modules)",
    )
    lines = out.splitlines()
    assert [lines[0], *lines[-2:]] == ["False", "False", "True"]


def test_info_prints_the_numbers(capsys):
    assert main(["info", "V3"]) == 0
    out = capsys.readouterr().out
    for number in ("671,026,419,200", "11,610,068,224", "682,636,487,424", "37,552,297,472", "70,272 bytes"):
        assert number in out, out
    assert main(["info", "V4"]) == 1
    err = capsys.readouterr().err
    assert "neither a preset (V3, V3_4LAYER" in err and len(err.splitlines()) == 1


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="module 'dsv3' has no attribute 'fit'"):
        _ = dsv3.fit
    assert {
        "Config",
        "init",
        "forward",
        "loss_fn",
        "value_and_grad",
        "adamw",
        "make_train_step",
        "generate",
        "from_hf",
        "to_hf",
        "save",
        "load",
        "param_specs",
    } <= set(dir(dsv3))
