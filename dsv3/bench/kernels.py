"""Each kernel, native against its composed reference, forward and backward, in turns."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from .measure import add_shape, build_kernels, check_positive, machine, spread, timed


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Register the command."""
    p = commands.add_parser("kernels", help="each kernel beside its reference, at a model's shapes")
    add_shape(p)
    p.add_argument("--only", nargs="+", help="names of kernels; default: all")
    p.add_argument("--calls", type=int, default=3, help="calls of one block")
    p.add_argument("--rounds", type=int, default=5, help="blocks of each side")
    return p


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure as the options say."""
    from ..cli.info import find_config

    check_positive(args, "batch", "seq", "calls", "rounds")
    return {"config": args.config} | kernels(
        find_config(args.config), args.batch, args.seq, only=args.only, calls=args.calls, rounds=args.rounds
    )


def kernels(
    cfg: Any, batch: int, seq: int, *, only: list[str] | None = None, calls: int = 3, rounds: int = 5
) -> dict[str, Any]:
    """Milliseconds a call of both implementations, per kernel, after a warm-up. "ratio": reference over
    native.

    Raises ValueError when the native kernels are not in use here, or a name in ``only`` is unknown.
    """
    from ..kernels import native

    if (why := native.why_reference()) is not None:
        raise ValueError(f"the native kernels are off: {why}; there is nothing to compare")
    build_kernels()
    made = cases(cfg, batch, seq)
    unknown = sorted(set(only or ()) - set(made))
    if unknown:
        raise ValueError(f"--only {' '.join(unknown)}: expected some of {', '.join(made)}")
    rows = {}
    for name in only or made:
        ours, reference = (make() for make in made[name])
        for fn in (ours, reference):  # compiles, then warms up
            fn(), fn()
        pairs = [(block(ours, calls), block(reference, calls)) for _ in range(rounds)]
        rows[name] = {
            "native_ms": spread(a * 1e3 for a, _ in pairs),
            "reference_ms": spread(b * 1e3 for _, b in pairs),
            "ratio": spread(b / a for a, b in pairs),
        }
    return {"batch": batch, "seq": seq, "calls": calls, "kernels": rows, "machine": machine()}


def block(call: Callable, calls: int) -> float:
    """Mean seconds of some calls in a row."""
    return timed(lambda: [call() for _ in range(calls)])[0] / calls


def cases(cfg: Any, batch: int, seq: int) -> dict[str, tuple[Callable, Callable]]:
    """name -> (makes the native call, makes the reference call), at the shapes of the model's step."""
    from mindspore import Tensor

    from ..kernels.attention import mla_attention, mla_attention_reference
    from ..kernels.cross_entropy import (
        cross_entropy,
        cross_entropy_reference,
        linear_cross_entropy,
        linear_cross_entropy_reference,
    )
    from ..kernels.experts import experts, experts_reference
    from ..kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
    from ..kernels.swiglu import swiglu, swiglu_reference
    from ..kernels.topk import (
        choose_experts,
        choose_experts_reference,
        count_experts,
        count_experts_reference,
    )

    rng = np.random.default_rng(0)
    B, T, D, H, W = batch, seq, cfg.hidden_size, cfg.num_attention_heads, cfg.vocab_size
    N, R, V = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    E, K, F = cfg.n_routed_experts, cfg.num_experts_per_tok, cfg.moe_intermediate_size
    tokens, eps = B * T, cfg.rms_norm_eps

    def normal(*shape: int) -> Tensor:
        return Tensor(rng.standard_normal(shape, np.float32))

    angles = np.arange(T)[:, None] * 10000.0 ** -(np.arange(R // 2) / (R // 2))
    cos, sin = (Tensor(f(angles).astype(np.float32)[None]) for f in (np.cos, np.sin))
    scores = rng.random((tokens, E), np.float32)
    idx = Tensor(np.argsort(-scores, 1)[:, :K].astype(np.int32))
    weights = Tensor(np.full((tokens, K), 1 / K, np.float32))
    labels = Tensor(rng.integers(0, W, tokens).astype(np.int32))

    def attention(fn):
        def loss(p):
            return fn(
                p[0],
                p[1],
                p[2],
                cos,
                sin,
                None,
                num_heads=H,
                qk_nope_head_dim=N,
                qk_rope_head_dim=R,
                v_head_dim=V,
                scale=cfg.softmax_scale,
            ).sum()

        return gradient(loss, (normal(B, T, H * (N + R)), normal(B, T, H * (N + V)), normal(B, T, R)))

    def routed(fn):
        def loss(p):
            return fn(p[0], p[1], p[2], p[3], idx, p[4]).sum()

        return gradient(loss, (normal(tokens, D), normal(E, D, F), normal(E, D, F), normal(E, F, D), weights))

    def norm(fn):
        def loss(p):
            return fn(p[0], p[1], eps).sum()

        return gradient(loss, (normal(B, T, D), normal(D)))

    def add_norm(fn):
        def loss(p):
            total, normed = fn(p[0], p[1], p[2], eps)
            return (total * normed).sum()

        return gradient(loss, (normal(B, T, D), normal(B, T, D), normal(D)))

    def gated(fn):
        def loss(p):
            return fn(p[0], p[1]).sum()

        return gradient(loss, (normal(tokens, cfg.intermediate_size), normal(tokens, cfg.intermediate_size)))

    def entropy(fn):
        def loss(p):
            return fn(p[0], labels).sum()

        return gradient(loss, (normal(tokens, W),))

    def linear_entropy(fn):
        def loss(p):
            return fn(p[0], p[1], labels).sum()

        return gradient(loss, (normal(tokens, D), normal(D, W)))

    def choice(fn):
        def choose(scores_TE):
            return fn(scores_TE, n_group=cfg.n_group, topk_group=cfg.topk_group, k=K)

        return called(choose, Tensor(scores))

    def counting(fn):
        def count(idx_TK):
            return fn(idx_TK, E)

        return called(count, idx)

    pairs = {
        "mla_attention": (attention, mla_attention, mla_attention_reference),
        "experts": (routed, experts, experts_reference),
        "choose_experts": (choice, choose_experts, choose_experts_reference),
        "count_experts": (counting, count_experts, count_experts_reference),
        "rms_norm": (norm, rms_norm, rms_norm_reference),
        "add_rms_norm": (add_norm, add_rms_norm, add_rms_norm_reference),
        "swiglu": (gated, swiglu, swiglu_reference),
        "cross_entropy": (entropy, cross_entropy, cross_entropy_reference),
        "linear_cross_entropy": (linear_entropy, linear_cross_entropy, linear_cross_entropy_reference),
        "adamw": (lambda which: optimiser(cfg, *which), *adamw_pair()),
    }
    return {
        name: (lambda make=make, a=a: make(a), lambda make=make, b=b: make(b))
        for name, (make, a, b) in pairs.items()
    }


def gradient(loss: Callable, params: tuple) -> Callable:
    """A call that computes loss and gradients and waits for them."""
    from ..transform import value_and_grad

    fn = value_and_grad(loss)

    def call() -> None:
        value, grads = fn(params)
        value.asnumpy(), grads[-1].asnumpy()

    return call


def called(fn: Callable, *args: Any) -> Callable:
    """A call of ``fn``, compiled, that waits for its result."""
    from ..transform import jit

    compiled = jit(fn)
    return lambda: compiled(*args).asnumpy()


def adamw_pair() -> tuple[tuple, tuple]:
    """(update, norm) of the optimiser's kernels, native and composed."""
    from ..kernels import adamw

    return (
        (adamw.adamw_update, adamw.global_norm_sq),
        (adamw.adamw_update_reference, adamw.global_norm_sq_reference),
    )


def optimiser(cfg: Any, update: Callable, norm: Callable) -> Callable:
    """A call that clips and updates the leaves of one MoE block."""
    from mindspore import Tensor, ops

    from ..nn.block import block_spec
    from ..spec import is_spec
    from ..transform import jit
    from ..tree import paths

    shapes = [spec.shape for _, spec in paths(block_spec(cfg, True), is_spec)]
    decay = tuple(len(shape) >= 2 for shape in shapes)

    def leaves(value: float) -> tuple:
        return tuple(Tensor(np.full(shape, value, np.float32)) for shape in shapes)

    def step(scalars_7, params, grads, m, v):
        scale = ops.minimum(1.0, 1.0 / ops.sqrt(norm(*grads)))
        return update(ops.cat((scalars_7, scale.reshape(1))), params, grads, m, v, decay)

    scalars = np.array([1e-3, 0.9, 0.95, 1e-8, 0.1, 0.1, 0.05], np.float32)
    compiled, args = jit(step), (leaves(0.02), leaves(1e-3), leaves(0.0), leaves(0.0))
    return lambda: compiled(scalars, *args).asnumpy()


def table(r: dict[str, Any]) -> str:
    """The result as lines of text."""
    lines = [
        f"{r['config']}, {r['batch']} x {r['seq']} tokens; medians of blocks of {r['calls']} calls in turns; "
        f"load {r['machine']['load']:.1f}",
        f"{'kernel':<22}{'native ms':>12}{'reference ms':>15}{'reference / native':>32}",
    ]
    for name, row in r["kernels"].items():
        q = row["ratio"]
        lines.append(
            f"{name:<22}{row['native_ms']['median']:>12.2f}{row['reference_ms']['median']:>15.2f}"
            f"{q['median']:>14.1f} ({q['min']:.1f} to {q['max']:.1f})"
        )
    return "\n".join(lines)
