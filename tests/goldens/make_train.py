"""Write train/: what training a micro model with multi-token prediction gives in float64, step by step.

    python make_train.py                needs torch, transformers 5.23 and safetensors; a minute on a laptop

The main model and the block of each MTP depth are transformers' own modules in float64 (see hf_model.py); the
rest of MTP, the losses and the bias rule are plain torch; clipping and AdamW are torch's.

    total = main + 0.3 / D * sum_k mtp_k + alpha * sum over MoE layers (MTP too) of the sequence-wise loss

alpha is 1e-2 so that it matters. Every cross entropy is a mean over the labels that are not -100. MTP depth k
lives on the first T - k positions (the paper's), so its load and balance loss count those only; its label is
labels[t + k]. AdamW: lr 3e-3 constant, betas 0.9 and 0.95, eps 1e-8, decay 0.1 on matrices only; clip norm 1;
the router biases have neither gradient nor decay and move by 0.01 * sign(mean load - load) after each step,
by that step's load.

    run/       one MTP layer, 12 steps of [4, 32] tokens: config.json, model.safetensors (start),
               grads.safetensors (of the total loss at the start), final.safetensors (after 12 steps),
               golden.npz, golden.json (how it was made) and grads_segments.safetensors (see below)
    depth2/    two MTP layers: config.json, model.safetensors, grads.safetensors, golden.npz, golden.json

Checkpoints are in the released layout: MTP depth k is layer num_hidden_layers + k - 1 and carries copies of
the main embedding and head, which are not parameters: gradients and updates of shared tensors are those of
the main names alone.

run/golden.npz: tokens, labels [12, 4, 32] int32; per step total, main, mtp_per_depth, balance_per_layer
(before alpha), grad_norm (before clipping), load [12, layers, E]; margins. final_*: a further batch and its
losses under final.safetensors. pre_norm_*: those of the first batch at the start when MTP reads the state
before model.norm. segment_ids [4, 32] and segments_*: the losses of the first batch at the start when
documents do not see each other and labels that lie in another document are -100 (segments_labels; MTP labels
too); grads_segments.safetensors holds the gradients of main + 0.3 * mtp there, without the balance loss.
depth2/golden.npz: tokens, labels [4, 32], the losses and load, and pre_norm_*.
"""

import contextlib
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from hf_model import build, by_published_name, capture_routing, grads_by_published_name, hf_config, min_margin
from make_hf import BASE, document_mask, draw
from safetensors.numpy import save_file
from torch.nn.functional import cross_entropy
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

HERE = Path(__file__).parent / "train"
STEPS, BATCH, LENGTH = 12, 4, 32
MTP_WEIGHT, ALPHA, BIAS_RATE, CLIP = 0.3, 1e-2, 0.01, 1.0
LEARNING_RATE, BETAS, EPS, DECAY = 3e-3, (0.9, 0.95), 1e-8, 0.1
MARGIN = 2e-4  # a float32 run of the same steps stays some hundred times closer (golden.json)

CONFIG = BASE | {
    "vocab_size": 80,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "num_nextn_predict_layers": 1,
}


def build_mtp(cfg, weights, dtype):
    """One ModuleDict a depth: enorm, hnorm, eh_proj, block, norm; loaded from published names."""
    D, depths = cfg["hidden_size"], []
    for layer in range(cfg["num_hidden_layers"], cfg["num_hidden_layers"] + cfg["num_nextn_predict_layers"]):
        mtp = torch.nn.ModuleDict(
            {
                "enorm": DeepseekV3RMSNorm(D, cfg["rms_norm_eps"]),
                "hnorm": DeepseekV3RMSNorm(D, cfg["rms_norm_eps"]),
                "eh_proj": torch.nn.Linear(2 * D, D, bias=False),
                "norm": DeepseekV3RMSNorm(D, cfg["rms_norm_eps"]),
                "block": DeepseekV3DecoderLayer(hf_config(cfg), layer),
            }
        )
        mtp.to(dtype).load_state_dict(
            stacked(weights, f"model.layers.{layer}.", MTP_NAMES, dtype), strict=True
        )
        depths.append(mtp)
    return torch.nn.ModuleList(depths)


MTP_NAMES = {
    "enorm.": "enorm.",
    "hnorm.": "hnorm.",
    "eh_proj.": "eh_proj.",
    "shared_head.norm.": "norm.",
    "input_layernorm.": "block.input_layernorm.",
    "self_attn.": "block.self_attn.",
    "mlp.": "block.mlp.",
    "post_attention_layernorm.": "block.post_attention_layernorm.",
}


def stacked(weights, prefix, renames, dtype):
    """Published names below prefix -> a state dict under `renames`, experts stacked as transformers does."""
    state, experts = {}, {}
    for name, value in weights.items():
        rename = next((r for r in renames if name.startswith(prefix + r)), None)
        if rename is None:
            continue
        name, value = renames[rename] + name.removeprefix(prefix + rename), torch.from_numpy(value).to(dtype)
        if ".experts." in name:
            stem, expert, kind, _ = name.rsplit(".", 3)
            experts.setdefault(stem, {})[int(expert), kind] = value
        else:
            state[name] = value
    for stem, parts in experts.items():
        count = 1 + max(expert for expert, _ in parts)
        state[f"{stem}.down_proj"] = torch.stack([parts[e, "down_proj"] for e in range(count)])
        state[f"{stem}.gate_up_proj"] = torch.stack(
            [torch.cat([parts[e, "gate_proj"], parts[e, "up_proj"]]) for e in range(count)]
        )
    return state


def build_all(cfg, weights, dtype=torch.float64):
    """(main model, MTP modules, context to run them in)."""
    model, guard = build(cfg)
    main = {"model." + p: "model." + p for p in ("embed_tokens.", "norm.")} | {"lm_head.": "lm_head."}
    main |= {f"model.layers.{n}.": f"model.layers.{n}." for n in range(cfg["num_hidden_layers"])}
    model.load_state_dict(stacked(weights, "", main, dtype), strict=True)
    if (
        dtype != torch.float64
    ):  # the tables are kept: rounded float64 frequencies are transformers' own in float32
        model, guard = model.to(dtype), contextlib.nullcontext()
    return model, build_mtp(cfg, weights, dtype), guard


def published(model, mtp, tensors_of):
    """Published name -> float32 array, of `tensors_of(module)` (a function from a module to named arrays)."""
    found = dict(tensors_of(model))
    for layer, depth in enumerate(mtp, start=model.config.num_hidden_layers):
        for name, value in tensors_of(depth).items():
            theirs, ours = next((t, o) for t, o in MTP_NAMES.items() if name.startswith(o))
            found[f"model.layers.{layer}.{theirs}{name.removeprefix(ours)}"] = value
    return {name: value.astype(np.float32) for name, value in found.items()}


def weights_by_published_name(model, mtp):
    """A whole checkpoint, copies for MTP and router biases included."""
    found = published(model, mtp, lambda module: by_published_name(module.state_dict()))
    for layer in range(model.config.num_hidden_layers, model.config.num_hidden_layers + len(mtp)):
        found[f"model.layers.{layer}.embed_tokens.weight"] = found["model.embed_tokens.weight"].copy()
        found[f"model.layers.{layer}.shared_head.head.weight"] = found["lm_head.weight"].copy()
    return found


def sequence_balance(logits, batch, k):
    """sum_i f_i P_i of one layer, the mean over its sequences; f from the K best unbiased scores."""
    scores = torch.sigmoid(logits).unflatten(0, (batch, -1))
    best = scores.detach().topk(k, dim=-1).indices
    f = torch.zeros_like(scores).scatter_(-1, best, 1.0).mean(1) * scores.shape[-1] / k
    p = (scores / scores.sum(-1, keepdim=True)).mean(1)
    return (f * p).sum(-1).mean()


def losses(model, mtp, tokens, labels, *, pre_norm=False, segments=None):
    """A dict of tensors: total, main, mtp_per_depth, balance_per_layer, load; and the smallest margin."""
    body, config = model.model, model.config
    B, T = tokens.shape
    embedded = body.embed_tokens(tokens)
    positions = torch.arange(T)[None]
    cos, sin = body.rotary_emb(embedded, positions)
    mask = document_mask(torch.zeros_like(tokens) if segments is None else segments, embedded.dtype)

    def run(layer, x):
        n = x.shape[1]
        return layer(x, attention_mask=mask[:, :, :n, :n], position_embeddings=(cos[:, :n], sin[:, :n]))

    with capture_routing(model, mtp) as routing:
        x = embedded
        for layer in body.layers:
            x = run(layer, x)
        handed_on, normed = x, body.norm(x)
        main = cross_entropy(model.lm_head(normed).flatten(0, 1), labels.flatten())
        per_depth = []
        for k, depth in enumerate(mtp, start=1):
            if not pre_norm:
                handed_on = normed
            both = [depth["enorm"](embedded[:, k:]), depth["hnorm"](handed_on[:, : T - k])]
            handed_on = run(depth["block"], depth["eh_proj"](torch.cat(both, dim=-1)))
            normed = depth["norm"](handed_on)
            targets = labels[:, k:]
            if segments is not None:
                targets = torch.where(segments[:, k:] == segments[:, :-k], targets, -100)
            per_depth.append(cross_entropy(model.lm_head(normed).flatten(0, 1), targets.flatten()))
    per_depth = torch.stack(per_depth)
    per_layer = torch.stack([sequence_balance(r[0], B, config.num_experts_per_tok) for r in routing])
    load = torch.stack([torch.bincount(r[2].flatten(), minlength=config.n_routed_experts) for r in routing])
    total = main + MTP_WEIGHT * per_depth.mean() + ALPHA * per_layer.sum()
    margin = min(min_margin(logits, bias, config) for logits, _, _, bias in routing)
    return {
        "total": total,
        "main": main,
        "mtp_per_depth": per_depth,
        "balance_per_layer": per_layer,
        "load": load,
        "margin": margin,
    }


def draw_batch(rng, vocab):
    """tokens and labels [4, 32]: a token mostly follows from the one before; one label in 20 is -100."""
    follows = np.random.default_rng(7).permutation(vocab)
    text = rng.integers(0, vocab, (BATCH, LENGTH + 1))
    for t in range(LENGTH):
        text[:, t + 1] = np.where(rng.random(BATCH) < 0.8, follows[text[:, t]], text[:, t + 1])
    labels = np.where(rng.random((BATCH, LENGTH)) < 0.05, -100, text[:, 1:])
    return torch.from_numpy(text[:, :-1].copy()), torch.from_numpy(labels)


def clear_batch(rng, model, mtp, guard, **kw):
    """A batch in which no choice of a router is closer than MARGIN, under the weights as they are now."""
    for _ in range(500):
        batch = draw_batch(rng, model.config.vocab_size)
        with guard, torch.no_grad():
            if losses(model, mtp, *batch, **kw)["margin"] >= MARGIN:
                return batch
    raise RuntimeError(f"no batch of 500 has a router margin of {MARGIN}")


def move_biases(model, mtp, load):
    """b += rate * sign(mean load - load), layer by layer."""
    routers = [m for root in (model, mtp) for n, m in root.named_modules() if n.endswith("mlp.gate")]
    for router, load_E in zip(routers, load.double(), strict=True):
        router.e_score_correction_bias += (BIAS_RATE * torch.sign(load_E.mean() - load_E)).to(
            router.e_score_correction_bias.dtype
        )


def train(model, mtp, guard, next_batch):
    """Twelve steps -> a list of records. next_batch(step) gives tokens and labels."""
    params = [*model.parameters(), *mtp.parameters()]
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": DECAY},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPS,
    )
    records = []
    for step in range(STEPS):
        tokens, labels = next_batch(step)
        optimiser.zero_grad()
        with guard:
            found = losses(model, mtp, tokens, labels)
            found["total"].backward()
        found["grad_norm"] = torch.nn.utils.clip_grad_norm_(params, CLIP)
        optimiser.step()
        move_biases(model, mtp, found["load"])
        records.append({"tokens": tokens, "labels": labels, **found})
    return records


def arrays(found, prefix=""):
    """The float64 arrays of a record."""
    return {prefix + name: np.asarray(v.detach() if torch.is_tensor(v) else v) for name, v in found.items()}


def evaluate(model, mtp, guard, batch, **kw):
    """The record of one batch, without its gradients."""
    with guard, torch.no_grad():
        return losses(model, mtp, *batch, **kw)


def gradients(model, mtp, guard, batch, loss_of=lambda found: found["total"], **kw):
    """(record, gradients under published names)."""
    model.zero_grad()
    mtp.zero_grad()
    with guard:
        found = losses(model, mtp, *batch, **kw)
        loss_of(found).backward()
    return found, published(model, mtp, grads_by_published_name)


def write(folder, cfg, weights, golden, facts, **more):
    """One folder; `more` are further safetensors files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(cfg, indent=2) + "\n")
    for name, tensors in {"model": weights, **more}.items():
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        (folder / f"{name}.safetensors").chmod(0o644)
    ints = {name: value.astype(np.int32) for name, value in golden.items() if value.dtype == np.int64}
    np.savez_compressed(folder / "golden.npz", **golden | ints)
    facts = {"torch": torch.__version__, "transformers": transformers.__version__, **facts}
    (folder / "golden.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(
        folder.name,
        f"{sum(f.stat().st_size for f in folder.iterdir()) / 1e3:.0f} kB",
        json.dumps(facts),
        flush=True,
    )


def make_run():
    """The run of twelve steps, and single evaluations at its start."""
    cfg, rng = CONFIG, np.random.default_rng(2000)
    start = draw(cfg, rng, mtp_depth=1)
    model, mtp, guard = build_all(cfg, start)

    cuts = [[11], [5, 20], [], [16]]
    segments = torch.from_numpy(np.stack([np.searchsorted(c, np.arange(LENGTH), side="right") for c in cuts]))
    crosses = torch.cat([segments[:, 1:] != segments[:, :-1], torch.zeros(BATCH, 1, dtype=torch.bool)], dim=1)
    for _ in range(100):  # one first batch that is clear in every reading of it
        first = clear_batch(rng, model, mtp, guard)
        segmented = first[0], torch.where(crosses, -100, first[1])
        pre_norm = evaluate(model, mtp, guard, first, pre_norm=True)
        if (
            min(pre_norm["margin"], evaluate(model, mtp, guard, segmented, segments=segments)["margin"])
            >= MARGIN
        ):
            break
    else:
        raise RuntimeError("no first batch is clear in every reading")
    _, grads = gradients(model, mtp, guard, first)
    documents, grads_segments = gradients(
        model,
        mtp,
        guard,
        segmented,
        lambda f: f["main"] + MTP_WEIGHT * f["mtp_per_depth"].mean(),
        segments=segments,
    )
    model.zero_grad()
    mtp.zero_grad()

    records = train(
        model, mtp, guard, lambda step: first if step == 0 else clear_batch(rng, model, mtp, guard)
    )
    golden = {name: np.stack([arrays(r)[name] for r in records]) for name in records[0]}
    final = weights_by_published_name(model, mtp)
    ended = build_all(cfg, final)
    last = clear_batch(rng, *ended)
    golden |= {"final_tokens": last[0].numpy(), "final_labels": last[1].numpy()}
    golden |= arrays(evaluate(*ended, last), "final_") | arrays(pre_norm, "pre_norm_")
    golden |= arrays(documents, "segments_")
    golden |= {"segment_ids": segments.numpy(), "segments_labels": segmented[1].numpy()}

    single = build_all(cfg, start, torch.float32)
    records32 = train(*single, lambda step: (records[step]["tokens"], records[step]["labels"]))
    final32 = weights_by_published_name(*single[:2])
    facts = {
        "seed": 2000,
        "min_router_margin": float(min(golden[n].min() for n in golden if n.endswith("margin"))),
        "float32_same_load_in_all_steps": all(
            torch.equal(a["load"], b["load"]) for a, b in zip(records, records32, strict=True)
        ),
        "float32_worst_total_difference": max(
            abs(a["total"].item() - b["total"].item()) for a, b in zip(records, records32, strict=True)
        ),
        "float32_worst_final_weight_difference": max(
            float(np.abs(final[n] - final32[n]).max()) for n in final
        ),
        "largest_weight_change": max(float(np.abs(final[n] - start[n]).max()) for n in final),
        "first_and_last_total": [float(golden["total"][0]), float(golden["total"][-1])],
    }
    write(HERE / "run", cfg, start, golden, facts, grads=grads, grads_segments=grads_segments, final=final)


def make_depth2():
    """Losses and gradients with two MTP layers."""
    cfg, rng = CONFIG | {"num_nextn_predict_layers": 2}, np.random.default_rng(2001)
    weights = draw(cfg, rng, mtp_depth=2)
    model, mtp, guard = build_all(cfg, weights)
    for _ in range(100):
        batch = clear_batch(rng, model, mtp, guard)
        pre_norm = evaluate(model, mtp, guard, batch, pre_norm=True)
        if pre_norm["margin"] >= MARGIN:
            break
    else:
        raise RuntimeError("no batch is clear in both readings")
    found, grads = gradients(model, mtp, guard, batch)
    golden = (
        arrays(found)
        | arrays(pre_norm, "pre_norm_")
        | {"tokens": batch[0].numpy(), "labels": batch[1].numpy()}
    )
    facts = {"seed": 2001, "min_router_margin": found["margin"]}
    write(HERE / "depth2", cfg, weights, golden, facts, grads=grads)


if __name__ == "__main__":
    torch.set_num_threads(2)
    make_depth2()
    make_run()
