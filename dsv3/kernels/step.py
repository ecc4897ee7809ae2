"""A block of few tokens in two operators: what decoding one token at a time spends on the CPU is the launch of kernels, not
their work. C++ only (``latent.cc``, ``moe.cc``); ``nn.block.cached_block`` is the composition that it equals.
"""
from __future__ import annotations

import functools

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.ops.primitive import constexpr

from dsv3.kernels import native
from dsv3.kernels.int8 import operands
from dsv3.kernels.latent import length, numbers, per_head
from dsv3.kernels.linear import FEW_ROWS


@constexpr
def fits(n: int) -> bool:
    """Whether so many tokens go through these operators; params must be whole, and float32 or quantised."""
    return native.why_reference() is None and n <= FEW_ROWS


def attention_step(x, norm, params, at, pool, *, num_heads, scale, block_size, eps):
    """x + attention of RMSNorm(x) over a layer's cache, which gets the rows of x. x: [n, D]; the rest as in ``cached_mla``."""
    low_rank = "wq_a" in params
    first = (params["wq_a"], params["wq_b"]) if low_rank else (norm, params["wq"])
    w, s, rounds = operands(first[0], first[1], params["wkv_a"], params["wo"])
    return _ops_of("attention")(x, norm, w[0], params["q_norm"] if low_rank else norm, w[1], w[2], params["kv_norm"],
                                params["wkv_b"], w[3], at["cos"], at["sin"], at["positions"], at["slots"], at["tables"], pool,
                                per_head(num_heads, scale), length(block_size), numbers(eps), s[0], s[1], s[2], s[3], rounds)


def mlp_step(x, norm, params, *, eps):
    """x + ``nn.mlp.mlp`` of RMSNorm(x). x: [n, D]."""
    w, s, rounds = operands(params["w_gate"], params["w_up"], params["w_down"])
    return _ops_of("mlp")(x, norm, w[0], w[1], w[2], numbers(eps), s[0], s[1], s[2], rounds)


def moe_step(x, norm, params, *, cfg):
    """x + ``nn.moe.mixture`` of RMSNorm(x), routed as ``nn.router.route`` does. x: [n, D]; params: those of the block."""
    router, experts = params["router"], params["experts"]
    bias = router["bias"] if "bias" in router else _zeros(cfg.n_routed_experts)
    none = _zeros(1)
    shared = params["shared"] if "shared" in params else {"w_gate": none, "w_up": none, "w_down": none}
    w, s, rounds = operands(experts["w_gate"], experts["w_up"], experts["w_down"], shared["w_gate"], shared["w_up"],
                            shared["w_down"])
    return _ops_of("moe")(x, norm, router["w"], bias, w[0], w[1], w[2], w[3], w[4], w[5], _options(cfg),
                          numbers(cfg.rms_norm_eps, cfg.routed_scaling_factor), s[0], s[1], s[2], s[3], s[4], s[5], rounds)


@constexpr
def _zeros(n):
    return Tensor(np.zeros(n, np.float32))


@constexpr
def _options(cfg):
    limited, biased = cfg.topk_method != "greedy", cfg.topk_method == "noaux_tc"
    groups = (cfg.n_group, cfg.topk_group) if limited else (1, 1)
    return Tensor(np.array([*groups, biased, cfg.scoring_func == "sigmoid", cfg.norm_topk_prob, cfg.num_experts_per_tok],
                           np.int32))


@functools.cache
def _ops():
    def op(stem, name):
        return native.native_op(stem, name, lambda x, *rest: x, lambda x, *rest: ms.float32)

    return {"attention": op("latent", "attention_step"), "mlp": op("moe", "mlp_step"), "moe": op("moe", "moe_step")}


@constexpr
def _ops_of(name):
    return _ops()[name]
