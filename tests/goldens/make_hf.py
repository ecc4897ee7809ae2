"""Write hf/<case>/: micro DeepSeek-V3 checkpoints and what transformers' own modules make of them.

    python make_hf.py [case ...]        needs torch, transformers 5.23 and safetensors; two minutes

Each case is a folder with model.safetensors and config.json in the released layout, golden.npz, golden.json
(how it was made) and grads.safetensors (gradients of `loss` under the published names, those of the float64
run, as float32). The values are those of a float64 run of transformers' modules; golden.json tells how far
its float32 run lies from them.

golden.npz: input_ids [B, T]; labels_hf (aligned with input_ids) and labels (labels[t] is the target of
position t); logits [B, T, W] and hidden [B, T, D] (after the final norm) as float32; in float64: loss, nll
[B, T-1] (of input_ids[t+1] at t), nll_segments (the same under segment_ids, which hide other documents),
nll_positions (the same with position_ids); and for each MoE layer l: router_l_logits [B*T, E],
router_l_indices [B*T, K] (ascending), router_l_weights (in that order), router_l_load [E].
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from hf_model import build, capture_routing, grads_by_published_name, load, masked_with_zero, min_margin
from safetensors.numpy import save_file

HERE = Path(__file__).parent / "hf"
BATCH, LENGTH = 2, 48
MARGIN = 5e-4  # float32 moves a score by about 1e-6, so every router choice is the same in both precisions

BASE = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "float32",
    "vocab_size": 96,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "intermediate_size": 56,
    "hidden_act": "silu",
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 128,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "pretraining_tp": 1,
    "use_cache": True,
}
# theta 100 puts a bin in the middle of YaRN's ramp; unequal mscales tell the two corrections apart.
YARN = {
    "type": "yarn",
    "factor": 4,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.8,
    "mscale_all_dim": 1.0,
}
CASES = {
    "base": {},
    "yarn": {"rope_scaling": YARN, "rope_theta": 100.0},
    "no_q_lora": {"q_lora_rank": None},
    "shared2": {"n_shared_experts": 2},
    "unnormalised": {"norm_topk_prob": False},
    "negative_bias": {},
}


def shapes(cfg, mtp_depth=0):
    """Published name -> shape of every tensor of a checkpoint, MTP layers (with their copies) included."""
    D, W, H = cfg["hidden_size"], cfg["vocab_size"], cfg["num_attention_heads"]
    Q, C, R = cfg["q_lora_rank"], cfg["kv_lora_rank"], cfg["qk_rope_head_dim"]
    N, V, F = cfg["qk_nope_head_dim"], cfg["v_head_dim"], cfg["moe_intermediate_size"]
    found = {"model.embed_tokens.weight": (W, D), "model.norm.weight": (D,), "lm_head.weight": (W, D)}

    def mlp(prefix, width):
        found.update(
            {
                f"{prefix}.gate_proj.weight": (width, D),
                f"{prefix}.up_proj.weight": (width, D),
                f"{prefix}.down_proj.weight": (D, width),
            }
        )

    for layer in range(cfg["num_hidden_layers"] + mtp_depth):
        at = f"model.layers.{layer}"
        if layer >= cfg["num_hidden_layers"]:
            found.update(
                {
                    f"{at}.embed_tokens.weight": (W, D),
                    f"{at}.enorm.weight": (D,),
                    f"{at}.hnorm.weight": (D,),
                    f"{at}.eh_proj.weight": (D, 2 * D),
                    f"{at}.shared_head.norm.weight": (D,),
                    f"{at}.shared_head.head.weight": (W, D),
                }
            )
        found.update({f"{at}.input_layernorm.weight": (D,), f"{at}.post_attention_layernorm.weight": (D,)})
        attn = f"{at}.self_attn"
        if Q is None:
            found[f"{attn}.q_proj.weight"] = (H * (N + R), D)
        else:
            found.update(
                {
                    f"{attn}.q_a_proj.weight": (Q, D),
                    f"{attn}.q_a_layernorm.weight": (Q,),
                    f"{attn}.q_b_proj.weight": (H * (N + R), Q),
                }
            )
        found.update(
            {
                f"{attn}.kv_a_proj_with_mqa.weight": (C + R, D),
                f"{attn}.kv_a_layernorm.weight": (C,),
                f"{attn}.kv_b_proj.weight": (H * (N + V), C),
                f"{attn}.o_proj.weight": (D, H * V),
            }
        )
        if layer < cfg["first_k_dense_replace"]:
            mlp(f"{at}.mlp", cfg["intermediate_size"])
            continue
        found.update(
            {
                f"{at}.mlp.gate.weight": (cfg["n_routed_experts"], D),
                f"{at}.mlp.gate.e_score_correction_bias": (cfg["n_routed_experts"],),
            }
        )
        mlp(f"{at}.mlp.shared_experts", F * cfg["n_shared_experts"])
        for expert in range(cfg["n_routed_experts"]):
            mlp(f"{at}.mlp.experts.{expert}", F)
    return found


def draw(cfg, rng, *, mtp_depth=0, negative_bias=False):
    """float32 weights under published names: every tensor matters, logits are of order 1."""
    tensors = {}
    for name, shape in shapes(cfg, mtp_depth).items():
        noise = rng.standard_normal(shape)
        if name.endswith("e_score_correction_bias"):
            value = 0.15 * noise
            if negative_bias:  # far below every score for six experts of eight
                value = np.where(rng.permutation(shape[0]) < 6, -3.0, -0.1) + value
        elif len(shape) == 1:
            value = 1.0 + 0.2 * noise
        elif "embed_tokens" in name:
            value = noise
        else:
            value = 1.1 * noise / np.sqrt(shape[1])
        tensors[name] = value.astype(np.float32)
    for name in tensors:  # the released MTP layers carry copies of the main embedding and head
        if name.startswith("model.layers.") and name.endswith("embed_tokens.weight"):
            tensors[name] = tensors["model.embed_tokens.weight"].copy()
        if name.endswith("shared_head.head.weight"):
            tensors[name] = tensors["lm_head.weight"].copy()
    return tensors


def draw_ids(rng, vocab):
    """input_ids, labels_hf (some -100), segment_ids (two or three documents) and position_ids (with gaps)."""
    ids = rng.integers(2, vocab, (BATCH, LENGTH))
    labels_hf = np.where(rng.random(ids.shape) < 0.12, -100, ids)
    cuts = [[17], [9, 30]]
    segments = np.stack([np.searchsorted(cut, np.arange(LENGTH), side="right") for cut in cuts])
    positions = np.cumsum(rng.integers(1, 4, ids.shape), axis=1)
    return ids, labels_hf, segments, positions


def nll(logits, ids):
    """[B, T-1]: the loss of ids[t + 1] at t."""
    log_probs = torch.log_softmax(logits[:, :-1], dim=-1)
    return -log_probs.gather(-1, ids[:, 1:, None])[..., 0].detach().numpy()


def document_mask(segments, dtype):
    """[B, 1, T, S] to add to scores: 0 where key s is not later and in the same document, else the lowest."""
    same = segments[:, :, None] == segments[:, None, :]
    seen = torch.tril(same)[:, None]
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def other_readings(model, ids, segments, positions):
    """The logits under segment_ids and with position_ids.

    A mask goes with position_ids too, as transformers would read their gaps as document boundaries.
    """
    dtype = model.lm_head.weight.dtype
    apart, together = document_mask(segments, dtype), document_mask(torch.zeros_like(ids), dtype)
    return (
        model(input_ids=ids, attention_mask=apart, use_cache=False).logits,
        model(input_ids=ids, attention_mask=together, position_ids=positions, use_cache=False).logits,
    )


def evaluate(model, guard, batch):
    """(what golden.npz holds, gradients, choices a zero mask would change); guard: the context to run in."""
    ids, labels_hf, segments, positions = (torch.from_numpy(np.asarray(x)) for x in batch)
    model.zero_grad()
    with guard, capture_routing(model) as routing:
        out = model(input_ids=ids, labels=labels_hf, use_cache=False, output_hidden_states=True)
        out.loss.backward()
        seen = list(routing)
    with guard, torch.no_grad():
        segmented, moved = other_readings(model, ids, segments, positions)
    values = {"logits": out.logits, "hidden": out.hidden_states[-1], "loss": out.loss}
    values = {name: value.detach().numpy() for name, value in values.items()}
    values |= {
        "nll": nll(out.logits, ids),
        "nll_segments": nll(segmented, ids),
        "nll_positions": nll(moved, ids),
    }
    first_moe = model.config.first_k_dense_replace
    for layer, (logits, weights, indices, _) in enumerate(seen, start=first_moe):
        order = indices.argsort(dim=-1)
        values |= {
            f"router_{layer}_logits": logits.detach().numpy(),
            f"router_{layer}_indices": indices.gather(1, order).numpy(),
            f"router_{layer}_weights": weights.detach().gather(1, order).numpy(),
            f"router_{layer}_load": np.bincount(indices.reshape(-1).numpy(), minlength=logits.shape[1]),
        }
    flips = sum(masked_with_zero(logits, bias, indices, model.config) for logits, _, indices, bias in seen)
    return values, grads_by_published_name(model), flips


def relative(a, b):
    """max |a - b| / max |b|; where b is all zero (an expert without tokens), a must be too."""
    if not b.any():
        return float("inf") if a.any() else 0.0
    return float(np.abs(a - b).max() / np.abs(b).max())


def make(case):
    """Write one folder."""
    folder, cfg = HERE / case, BASE | CASES[case]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(cfg, indent=2) + "\n")
    seed = 1000 + list(CASES).index(case)
    rng = np.random.default_rng(seed)
    weights = draw(cfg, rng, negative_bias=case == "negative_bias")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    single, plain = load(folder)
    double, guard = build(cfg, state=single.state_dict())
    margin, idle, tries = 0.0, True, 0
    # Draw tokens until no router choice is close in any of the three readings and every expert has work.
    while margin < MARGIN or idle:
        tries += 1
        if tries > 500:
            raise RuntimeError(f"{case}: no batch of 500 has a router margin of {MARGIN}")
        batch = draw_ids(rng, cfg["vocab_size"])
        ids, _, segments, positions = (torch.from_numpy(np.asarray(x)) for x in batch)
        with guard, torch.no_grad(), capture_routing(double) as routing:
            double(input_ids=ids, use_cache=False)
            other_readings(double, ids, segments, positions)
        margin = min(min_margin(logits, bias, double.config) for logits, _, _, bias in routing)
        used = [len(indices.unique()) for _, _, indices, _ in routing]
        idle = case != "negative_bias" and min(used) < cfg["n_routed_experts"]

    values, grads, flips = evaluate(double, guard, batch)
    values32, grads32, _ = evaluate(single, plain, batch)
    for name in values:
        if name.endswith(("_indices", "_load")) and not np.array_equal(values[name], values32[name]):
            raise RuntimeError(f"{case}: float32 and float64 disagree on {name}")
    if (case == "negative_bias") != (flips > 0):
        raise RuntimeError(f"{case}: masking groups with 0 instead of -inf changes {flips} choices")
    if set(grads) != {name for name in weights if not name.endswith("e_score_correction_bias")}:
        raise RuntimeError(f"{case}: gradients and weights do not have the same names")

    ids, labels_hf, segments, positions = batch
    labels = np.concatenate([labels_hf[:, 1:], np.full((BATCH, 1), -100)], axis=1)
    arrays = {
        "input_ids": ids,
        "labels_hf": labels_hf,
        "labels": labels,
        "segment_ids": segments,
        "position_ids": positions,
        **values,
    }
    small = {
        name: np.asarray(value, np.float32) for name, value in values.items() if name in ("logits", "hidden")
    }
    ints = {name: value.astype(np.int32) for name, value in arrays.items() if value.dtype == np.int64}
    np.savez_compressed(folder / "golden.npz", **arrays | small | ints)
    save_file({name: grad.astype(np.float32) for name, grad in grads.items()}, folder / "grads.safetensors")
    facts = {
        "seed": seed,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "batches_tried": tries,
        "min_router_margin": margin,
        "choices_changed_by_a_zero_mask": flips,
        "loss": float(values["loss"]),
        "logits_std": float(values["logits"].std()),
        "float32_logits_max_abs_difference": float(np.abs(values32["logits"] - values["logits"]).max()),
        "float32_loss_difference": float(abs(values32["loss"] - values["loss"])),
        "float32_grads_worst_relative_difference": max(relative(grads32[n], grads[n]) for n in grads),
    }
    (folder / "golden.json").write_text(json.dumps(facts, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(
        f"{case:14s} {size / 1e3:6.0f} kB  " + "  ".join(f"{k}={v}" for k, v in list(facts.items())[3:]),
        flush=True,
    )


if __name__ == "__main__":
    torch.set_num_threads(2)
    transformers.utils.logging.disable_progress_bar()
    for name in sys.argv[1:] or CASES:
        make(name)
