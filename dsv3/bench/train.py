"""A training step: compile time, tokens a second, memory, and the share of the machine's matmul peak."""

from __future__ import annotations

import argparse
from typing import Any

from .measure import (
    add_shape,
    build_kernels,
    check_positive,
    machine,
    peak_bytes,
    rows_text,
    sgemm_peak,
    spread,
    spread_text,
    timed,
    tokens,
)


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Register the command."""
    p = commands.add_parser("train", help="compile time, tokens/s, memory and GFLOP/s of a training step")
    add_shape(p)
    p.add_argument("--steps", type=int, default=10, help="steps of one repeat")
    p.add_argument(
        "--repeats", type=int, default=5, help="repeats after the warm-up, each one number of the spread"
    )
    p.add_argument("--warmup", type=int, default=3, help="steps after the first that are not counted")
    p.add_argument("--no-peak", action="store_true", help="do not measure the machine's matmul peak")
    p.add_argument("--peer", metavar="PYTHON", help="also run the `peer` measurement, with this interpreter")
    return p


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure as the options say."""
    from ..cli.info import find_config
    from .peer import peer

    check_positive(args, "batch", "seq", "steps", "repeats")
    cfg = find_config(args.config)
    result = {"config": args.config} | train(
        cfg,
        args.batch,
        args.seq,
        steps=args.steps,
        repeats=args.repeats,
        warmup=args.warmup,
        with_peak=not args.no_peak,
    )
    if args.peer:
        result["peer"] = peer(cfg, args.batch, args.seq, python=args.peer)
    return result


def train(
    cfg: Any,
    batch: int,
    seq: int,
    *,
    steps: int = 10,
    repeats: int = 5,
    warmup: int = 3,
    with_peak: bool = True,
) -> dict[str, Any]:
    """Time ``make_train_step`` on [batch, seq] uniform tokens, whole process, with AdamW, clipping and all
    losses.

    Seconds are of the wall unless named cpu (of all threads). "compile" is the first call, its step included.
    Bytes are peaks of the resident set so far: after imports, after params and moments exist, after the last
    step; "bytes_floor" is 16 a parameter: float32 weight, gradient and two moments. FLOPs are those of
    ``dsv3.counts``: the products of forward and backward alone. "peak_gflops" is ``sgemm_peak``, taken before
    and after, the higher.
    """
    from ..counts import counts
    from ..model import init
    from ..optim import adamw
    from ..train import make_train_step
    from ..tree import size

    built, imported = build_kernels(), peak_bytes()
    params, optimizer, feed = init(cfg), adamw(1e-3), tokens(cfg.vocab_size, batch, seq)
    state, step = optimizer.init(params), make_train_step(cfg, optimizer)
    initialised = peak_bytes()
    losses: list[float] = []

    def advance(n: int) -> None:
        nonlocal params, state
        for _ in range(n):
            params, state, metrics = step(params, state, {"tokens": next(feed)})
            losses.append(float(metrics["loss"]))  # waits for the step

    compile_wall, compile_cpu, _ = timed(lambda: advance(1))
    advance(warmup)
    timings = [timed(lambda: advance(steps))[:2] for _ in range(repeats)]
    trained = peak_bytes()
    peak = max(sgemm_peak(), sgemm_peak()) if with_peak else None

    seconds, cpu = spread(w / steps for w, _ in timings), spread(c / steps for _, c in timings)
    n_tokens, parameters = batch * seq, size(params)
    flops = counts(cfg, seq).train_flops * n_tokens
    return {
        "batch": batch,
        "seq": seq,
        "steps": steps,
        "repeats": repeats,
        "parameters": parameters,
        "kernel_build_seconds": built,
        "compile_seconds": compile_wall,
        "compile_cpu_seconds": compile_cpu,
        "step_seconds": seconds,
        "step_cpu_seconds": cpu,
        "tokens_per_second": spread(n_tokens * steps / w for w, _ in timings),
        "flops_per_step": flops,
        "gflops": flops / seconds["median"] / 1e9,
        "peak_gflops": peak,
        "share_of_peak": flops / seconds["median"] / 1e9 / peak if peak else None,
        "bytes": {"imported": imported, "initialised": initialised, "trained": trained},
        "bytes_floor": 16 * parameters,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "machine": machine(),
    }


def table(r: dict[str, Any]) -> str:
    """The result as lines of text."""
    m, mb = r["machine"], 1e6
    rows = [
        ("model", f"{r['config']}, {r['parameters']:,} parameters, {r['batch']} x {r['seq']} tokens a step"),
        ("machine", f"{m['cpu']}, {m['cpus']} CPUs, load {m['load']:.1f}, MindSpore {m['mindspore']}"),
        ("kernels", m["kernels"] + f", built in {r['kernel_build_seconds']:.1f} s"),
        ("compile and first step", f"{r['compile_seconds']:.1f} s, {r['compile_cpu_seconds']:.1f} CPU s"),
        ("step, ms", spread_text(r["step_seconds"], 1e3)),
        ("step, CPU ms", spread_text(r["step_cpu_seconds"], 1e3)),
        ("tokens/s", spread_text(r["tokens_per_second"], digits=0)),
        (
            "peak memory",
            f"{r['bytes']['trained'] / mb:,.0f} MB; {r['bytes']['imported'] / mb:,.0f} after imports, "
            f"{r['bytes']['initialised'] / mb:,.0f} with params and moments",
        ),
        ("16 bytes a parameter", f"{r['bytes_floor'] / mb:,.0f} MB"),
        ("products", f"{r['flops_per_step'] / 1e9:.2f} GFLOP a step, {r['gflops']:.1f} GFLOP/s"),
    ]
    if r["peak_gflops"]:
        rows.append(
            (
                "share of matmul peak",
                f"{r['share_of_peak']:.1%} of {r['peak_gflops']:.0f} GFLOP/s "
                "(MindSpore matmul of 2048 x 2048)",
            )
        )
    rows.append(("loss", f"{r['first_loss']:.4f} at the first step, {r['last_loss']:.4f} at the last"))
    text = rows_text(rows)
    if "peer" in r:
        from .peer import table as peer_table

        text += "\n\n" + peer_table(r["peer"])
    return text
