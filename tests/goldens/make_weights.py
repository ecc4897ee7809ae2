"""Write weights/: checkpoints by transformers itself and in FP8 by torch, with their logits, and what transformers says of ours.

    python make_weights.py                  needs torch, transformers 5.23 and safetensors; ten seconds
    python make_weights.py --check FOLDER   FOLDER: what `dsv3.to_hf` made of weights/saved; writes weights/export.json

saved/: bfloat16, by `save_pretrained`. fp8/: the same weights quantised by torch's float8_e4m3fn in blocks of 128 x 128, scale
amax / 448, in two files with scales apart from their codes, as the released checkpoint has them. golden.npz: input_ids [2, 24],
logits_saved and logits_fp8 [2, 24, W]: of the float32 model with the weights as stored and as dequantised in float32.
export.json: the SHA-256 of FOLDER's model.safetensors, the keys that transformers missed or did not expect, and the largest
difference of its logits from logits_saved.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

HERE = Path(__file__).parent / "weights"
CONFIG = dict(
    vocab_size=64, hidden_size=160, intermediate_size=200, moe_intermediate_size=48, num_hidden_layers=2, first_k_dense_replace=1,
    num_attention_heads=3, num_key_value_heads=3, q_lora_rank=144, kv_lora_rank=130, qk_nope_head_dim=24, qk_rope_head_dim=12,
    v_head_dim=20, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1, norm_topk_prob=True,
    routed_scaling_factor=2.5, rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=128, tie_word_embeddings=False,
    initializer_range=0.1, num_nextn_predict_layers=0,
)
PLAIN = ("norm", "embed_tokens", "lm_head", "mlp.gate.")  # in names of tensors that stay bfloat16


def read(folder):
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def logits(state, ids):
    """Of the float32 model with these weights, through a folder, as any user would load it."""
    with tempfile.TemporaryDirectory() as folder:
        save_file({k: v.float().contiguous() for k, v in state.items()}, f"{folder}/model.safetensors", {"format": "pt"})
        shutil.copy(HERE / "saved" / "config.json", folder)
        model, info = load(folder)
    if any(info.values()):
        raise RuntimeError(f"transformers loaded it with {info}")
    return run(model, ids)


def load(folder):
    return DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )


def run(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids).long()).logits.float().numpy()


def blocks(weight, n=128):
    """[m, n] -> padded with zeros and cut into [a, 128, b, 128]."""
    m, k = weight.shape
    padded = torch.zeros(-(-m // n) * n, -(-k // n) * n)
    padded[:m, :k] = weight.float()
    return padded.reshape(padded.shape[0] // n, n, padded.shape[1] // n, n)


def make():
    torch.manual_seed(7)
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**CONFIG))
    for name, buffer in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            buffer.data.uniform_(-0.2, 0.2)
        elif name.endswith("norm.weight"):
            buffer.data.uniform_(0.5, 1.5)
    model = model.to(torch.bfloat16)
    for name, buffer in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()
    model.save_pretrained(HERE / "saved")
    state = read(HERE / "saved")
    ids = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (2, 24))
    out = {"input_ids": ids.astype(np.int32), "logits_saved": logits(state, ids)}
    codes, scales, values = {}, {}, {}
    for name, weight in state.items():
        if any(part in name for part in PLAIN):
            codes[name] = values[name] = weight
            continue
        cut = blocks(weight)
        scale = cut.abs().amax(dim=(1, 3)) / 448
        code = (cut / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        back = code.float() * scale[:, None, :, None]
        m, k = weight.shape
        codes[name] = code.reshape(cut.shape[0] * 128, -1)[:m, :k].contiguous()
        values[name] = back.reshape(cut.shape[0] * 128, -1)[:m, :k]
        scales[name + "_scale_inv"] = scale
    out["logits_fp8"] = logits(values, ids)
    folder = HERE / "fp8"
    folder.mkdir()
    files = ("model-00001-of-000002.safetensors", codes), ("model-00002-of-000002.safetensors", scales)
    for name, tensors in files:
        save_file(tensors, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {k: name for name, tensors in files for k in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config = json.loads((HERE / "saved" / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    np.savez_compressed(HERE / "golden.npz", **out)


def check(folder):
    golden = np.load(HERE / "golden.npz")
    model, info = load(folder)
    found = run(model, golden["input_ids"])
    said = {
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "loading_info": {k: sorted(map(str, v)) for k, v in info.items()},
        "largest_difference": float(np.abs(found - golden["logits_saved"]).max()),
        "transformers": transformers.__version__,
    }
    (HERE / "export.json").write_text(json.dumps(said, indent=1))
    print(said)


if __name__ == "__main__":
    check(Path(sys.argv[2])) if sys.argv[1:2] == ["--check"] else make()
