"""Quantised params: what they cost in perplexity and logits on real text, and save in memory and time."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .kernels import block
from .measure import build_kernels, check_positive, machine, spread


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Register the command."""
    p = commands.add_parser("quant", help="int8 weights: perplexity, logits, memory, and time of products of a few rows")
    p.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    p.add_argument("run", nargs="?", help="a run of dsv3 train: its held-out text is scored; without one products are timed only")
    p.add_argument("--exclude", nargs="*", help="patterns of paths that stay float; default: those of dsv3.quantize")
    p.add_argument("--batches", type=int, default=8, help="batches of 8 x 128 held-out tokens")
    p.add_argument("--config", default="V3_1B", help="whose products are timed: a preset, a config.json, or the folder of one")
    p.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16], help="tokens of a step")
    p.add_argument("--calls", type=int, default=5, help="calls of one block")
    p.add_argument("--rounds", type=int, default=5, help="blocks of each side, in turns")
    return p


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure as the options say."""
    from ..cli.info import find_config

    check_positive(args, "batches", "calls", "rounds")
    if min(args.rows) < 1:
        raise ValueError(f"--rows {min(args.rows)}: expected at least 1")
    build_kernels()
    quality = scores(args.run, args.batches, args.exclude) if args.run else None
    return {"config": args.config, "run": args.run, "quality": quality, "machine": machine(),
            "products": products(find_config(args.config), args.rows, calls=args.calls, rounds=args.rounds)}


def scores(run: str, batches: int, exclude: list[str] | None = None, batch: int = 8, seq: int = 128) -> dict[str, Any]:
    """Float32 and both modes on held-out text: perplexity; of the logits, beside float32's, the largest difference, the median of
    a position's largest, and the share of positions whose likeliest token is the same; bytes of the params.

    Raises ValueError when the run does not say on what data it was trained.
    """
    from .. import data
    from ..cli.generate import open_checkpoint
    from ..model import forward
    from ..quant import EXCLUDE, MODES, nbytes, quantize

    params, cfg, _ = open_checkpoint(run)
    settings = Path(run) / "run.json"
    if not settings.exists():
        raise ValueError(f"{run} has no run.json: give the folder of a run of dsv3 train")
    told = json.loads(settings.read_text())
    corpus = (data.prepare_stdlib(vocab_size=cfg.vocab_size, log=str) if told["data"] is None and told["tokenizer"] is None else
              data.open_text(told["data"], told["tokenizer"], vocab_size=cfg.vocab_size, log=str))
    held_out = data.GPTDataset(corpus.prefix, corpus.valid, None, seq, told["seed"], eod_id=cfg.eos_token_id)
    texts = [b["tokens"] for b in data.batches(held_out, batch, stop_sample=min(len(held_out), batch * batches))]
    kinds = {"float32": params} | {mode: quantize(params, cfg, mode, EXCLUDE if exclude is None else exclude) for mode in MODES}
    found: dict[str, Any] = {kind: {"bytes": nbytes(p), "losses": [], "largest": [], "same": []} for kind, p in kinds.items()}
    for tokens in texts:
        z = {kind: forward(p, tokens, cfg=cfg).asnumpy() for kind, p in kinds.items()}
        for kind, r in found.items():
            r["losses"].append(cross_entropy(z[kind], tokens))
            r["largest"].append(np.abs(z[kind] - z["float32"]).max(-1))
            r["same"].append(np.mean(z[kind].argmax(-1) == z["float32"].argmax(-1)))
    return {kind: {"bytes": r["bytes"], "perplexity": float(np.exp(np.mean(r["losses"]))), "tokens": len(texts) * batch * seq,
                   "largest_error": float(np.max(r["largest"])), "median_error": float(np.median(r["largest"])),
                   "same_choice": float(np.mean(r["same"]))} for kind, r in found.items()}


def cross_entropy(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Mean nats of the next token. logits: [B, T, W]; tokens: [B, T]."""
    z = logits[:, :-1].astype(np.float64)
    z -= z.max(-1, keepdims=True)
    return float((np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, tokens[:, 1:, None], -1)[..., 0]).mean())


def products(cfg: Any, rows: list[int], *, calls: int = 5, rounds: int = 5) -> dict[str, Any]:
    """Milliseconds of a graph of one product, for each number of rows, after a warm-up: by MatMul (experts: by the kernel), by
    ``linear`` and ``experts`` in float32, and in both modes. "ratio": float32's over a mode's, block by block."""
    from mindspore import Tensor, ops

    from ..kernels.experts import experts
    from ..kernels.linear import linear
    from ..quant import MODES, rounded
    from ..transform import jit

    rng = np.random.default_rng(0)
    D, F, E, K = cfg.hidden_size, cfg.intermediate_size, cfg.n_routed_experts, cfg.num_experts_per_tok
    M = cfg.moe_intermediate_size

    def forms(*shape: int) -> dict[str, Any]:
        w = rng.standard_normal(shape, np.float32) * np.float32(shape[-2] ** -0.5)
        q, scale = map(Tensor, rounded(w))
        return {"float32": Tensor(w)} | {mode: {mode: q, "scale": scale} for mode in MODES}

    def matmul(x, w):
        return ops.MatMul()(x, w)

    def dense(x, w):
        return linear(x, w)

    def routed(x, gate, up, down, idx, weights):
        return experts(x, gate, up, down, idx, weights)

    compiled = {fn: jit(fn) for fn in (matmul, dense, routed)}
    matrices = {f"linear {D} x {F}": (forms(D, F),), f"linear {F} x {D}": (forms(F, D),),
                f"experts {E} x {D} x {M}": (forms(E, D, M), forms(E, D, M), forms(E, M, D))}
    out: dict[str, Any] = {}
    for name, made in matrices.items():
        for n in rows:
            x = Tensor(rng.standard_normal((n, next(iter(made[0].values())).shape[-2]), np.float32))
            idx = Tensor(np.argsort(rng.random((n, E)), 1)[:, :K].astype(np.int32))
            rest = () if len(made) == 1 else (idx, Tensor(rng.random((n, K), np.float32)))

            def call(fn: Callable, form: str, x=x, made=made, rest=rest) -> Callable:
                return lambda: compiled[fn](x, *(w[form] for w in made), *rest).asnumpy()

            sides = {form: call(routed if rest else dense, form) for form in made[0]}
            if not rest:
                sides = {"MatMul": call(matmul, "float32")} | sides
            for side in sides.values():  # compiles, then warms up
                side(), side()
            blocks = [{k: block(side, calls) for k, side in sides.items()} for _ in range(rounds)]
            out[f"{name}, {n} rows"] = {
                "ms": {k: spread(b[k] * 1e3 for b in blocks) for k in sides},
                "ratio": {k: spread(b["float32"] / b[k] for b in blocks) for k in sides if k != "float32"},
            }
    return out


def table(r: dict[str, Any]) -> str:
    """The result as lines of text."""
    lines = []
    if r["quality"]:
        q = r["quality"]
        lines += [f"{r['run']}: {q['float32']['tokens']} held-out tokens; errors of logits beside float32's",
                  f"{'params':<10}{'MiB':>9}{'perplexity':>13}{'largest error':>16}{'median error':>15}{'same choice':>14}"]
        lines += [f"{kind:<10}{v['bytes'] / 2**20:>9.2f}{v['perplexity']:>13.3f}{v['largest_error']:>16.3f}"
                  f"{v['median_error']:>15.4f}{v['same_choice']:>14.3f}" for kind, v in q.items()]
        lines.append("")
    lines += [f"{r['config']}: ms of a graph of one product, medians in turns; (float32 / it); load {r['machine']['load']:.1f}",
              f"{'product':<34}{'MatMul':>17}{'float32':>10}{'w8a16':>17}{'w8a8':>17}"]
    for name, row in r["products"].items():
        ms = {k: f"{v['median']:.2f}" for k, v in row["ms"].items()}
        cells = {k: ms[k] + (f" ({row['ratio'][k]['median']:.2f})" if k in row["ratio"] else "") for k in ms}
        lines.append(f"{name:<34}{cells.get('MatMul', '-'):>17}{cells['float32']:>10}{cells['w8a16']:>17}{cells['w8a8']:>17}")
    return "\n".join(lines)
