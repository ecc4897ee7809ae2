"""Whether feeding starves the step: batches a second alone, and how long steps wait for them."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from .measure import add_shape, build_kernels, check_positive, machine, rows_text, spread, spread_text, timed


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Register the command."""
    p = commands.add_parser("data", help="seconds that a training step waits for its batch")
    add_shape(p)
    p.add_argument("--steps", type=int, default=50, help="training steps")
    p.add_argument("--prefetch", type=int, default=4, help="batches made ahead")
    return p


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure as the options say."""
    from ..cli.info import find_config

    check_positive(args, "batch", "seq", "steps")
    return {"config": args.config} | data(
        find_config(args.config), args.batch, args.seq, steps=args.steps, prefetch=args.prefetch
    )


def data(cfg: Any, batch: int, seq: int, *, steps: int = 50, prefetch: int = 4) -> dict[str, Any]:
    """Feed ``steps`` training steps from a GPTDataset of synthetic documents, with masks and positions.

    "batches_per_second" is of the feed alone, without prefetching; "wait_seconds" is what one ``next`` took
    during training, "step_seconds" the step itself, "wait_share" the waits' part of both together.
    """
    from ..data import GPTDataset, batches
    from ..model import init
    from ..optim import adamw
    from ..train import make_train_step

    build_kernels()
    with tempfile.TemporaryDirectory(prefix="dsv3-data-") as folder:
        prefix = write_documents(Path(folder), cfg.vocab_size, n_tokens=4 * steps * batch * seq // 3 + seq)
        dataset = GPTDataset(
            prefix,
            None,
            (steps + 1) * batch,
            seq,
            eod_id=cfg.eos_token_id,
            eod_mask_loss=True,
            reset_position_ids=True,
            reset_attention_mask=True,
        )
        alone = batches(dataset, batch)
        rates = [1 / timed(lambda: next(alone))[0] for _ in range(steps)]
        params, optimizer = init(cfg), adamw(1e-3)
        state, step = optimizer.init(params), make_train_step(cfg, optimizer)
        waits, seconds = [], []
        with batches(dataset, batch, prefetch=prefetch) as feed:
            for i in range(steps + 1):
                start = time.perf_counter()
                one = next(feed)
                got = time.perf_counter()
                params, state, metrics = step(params, state, one)
                float(metrics["loss"])
                if i:  # the first compiles
                    waits.append(got - start)
                    seconds.append(time.perf_counter() - got)
    return {
        "batch": batch,
        "seq": seq,
        "steps": steps,
        "prefetch": prefetch,
        "batches_per_second": spread(rates),
        "wait_seconds": spread(waits),
        "step_seconds": spread(seconds),
        "wait_share": sum(waits) / (sum(waits) + sum(seconds)),
        "machine": machine(),
    }


def write_documents(folder: Path, vocab_size: int, n_tokens: int) -> str:
    """A ``.bin``/``.idx`` pair of documents of 16 to 1024 random tokens ending in 1; returns its prefix."""
    from ..data import token_dtype, write_documents

    rng = np.random.default_rng(0)

    def documents():
        left = n_tokens
        while left > 0:
            length = int(rng.integers(16, 1025))
            left -= length
            yield np.append(rng.integers(2, vocab_size, length - 1), 1).astype(token_dtype(vocab_size))

    prefix = str(folder / "documents")
    write_documents(prefix, documents(), token_dtype(vocab_size))
    return prefix


def table(r: dict[str, Any]) -> str:
    """The result as lines of text."""
    return rows_text(
        [
            (
                "model",
                f"{r['config']}, {r['batch']} x {r['seq']} tokens a step; load {r['machine']['load']:.1f}",
            ),
            ("batches/s, feed alone", spread_text(r["batches_per_second"], digits=0)),
            ("steps/s", f"{1 / r['step_seconds']['median']:.1f}"),
            ("step, ms", spread_text(r["step_seconds"], 1e3)),
            ("wait for a batch, ms", spread_text(r["wait_seconds"], 1e3, 3)),
            ("waiting", f"{r['wait_share']:.2%} of the time, {r['prefetch']} batches made ahead"),
        ]
    )
