"""Sizes of a model from its specs and its config alone: parameters, operations, bytes. Nothing is allocated."""
from __future__ import annotations

from dataclasses import dataclass

from .config import Config
from .model import param_specs
from .spec import count, is_spec
from .tree import paths


@dataclass(frozen=True)
class Counts:
    """Numbers of one model; FLOPs count a multiply-add as two, bytes are of bfloat16 weights and cache."""

    main: int  # parameters of the main model
    mtp: int  # parameters of the MTP modules that are not shared with it
    active: int  # parameters of the main model that one token uses, both embeddings included
    forward_flops: int  # per token of the main model at the given context
    train_flops: int  # per token, forward and backward, MTP included
    weight_bytes: int
    cache_bytes: int  # of the latent cache, per token
    expanded_cache_bytes: int  # of the keys and values that the latent stands for, per token


def counts(cfg: Config, context: int = 4096) -> Counts:
    """Count a model. context: tokens of a row; a token attends to half of them on average."""
    specs = param_specs(cfg)
    sizes = {part: count(specs[part]) for part in specs}
    mtp = sizes.pop("mtp", 0)
    main = sum(sizes.values())
    experts = count(next((layer["experts"] for layer in specs["layers"] if "experts" in layer), {}))
    idle = experts // cfg.n_routed_experts * (cfg.n_routed_experts - cfg.num_experts_per_tok)
    if mtp:
        experts_mtp = count(specs["mtp"][0]["experts"]) // cfg.n_routed_experts
        idle_mtp = experts_mtp * (cfg.n_routed_experts - cfg.num_experts_per_tok) * cfg.num_nextn_predict_layers
    else:
        idle_mtp = 0
    active = main - idle * cfg.num_moe_layers

    H, N, R, V = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    attention = 2 * H * (N + R + V) * context // 2
    vectors = {tree: sum(s.size for _, s in paths(specs.get(tree, {}), is_spec) if len(s.shape) == 1)
               for tree in ("layers", "mtp", "norm")}
    embedding = 0 if cfg.tie_word_embeddings else sizes["embed"]  # a look-up, not a product
    forward = 2 * (active - embedding - vectors["layers"] - vectors["norm"]) + cfg.num_hidden_layers * attention
    head = cfg.vocab_size * cfg.hidden_size * cfg.num_nextn_predict_layers
    forward_mtp = 2 * (mtp - idle_mtp - vectors["mtp"] + head) + cfg.num_nextn_predict_layers * attention
    latent = 2 * cfg.num_hidden_layers * (cfg.kv_lora_rank + R)
    return Counts(main, mtp, active, forward, 3 * (forward + forward_mtp),
                  sum(s.nbytes("bfloat16") for _, s in paths(specs, is_spec)), latent,
                  2 * cfg.num_hidden_layers * H * (N + R + V))
