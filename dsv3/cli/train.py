"""``dsv3 train``: pretrain on text, log, evaluate, save, resume, and continue a prompt at the end."""
from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from pathlib import Path

from . import cluster

PROMPT = "def main(argv=None):\n    "


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    p = commands.add_parser("train", help="pretrain a model on text",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--config", default="TINY", help="a preset, a config.json, or the folder of one")
    p.add_argument("--data", help="a text file, JSON lines, parquet, a folder of these, or a .bin prefix; "
                                  "default: the source of this Python's standard library")
    p.add_argument("--tokenizer", help="a tokenizer.json, its folder, or 'byte'; default: a BPE trained on the data")
    p.add_argument("--out", default="runs/tiny", help="the run's folder: checkpoints, metrics.jsonl, loss.png")
    p.add_argument("--steps", type=int, default=400, help="optimiser steps in all")
    p.add_argument("--batch-size", type=int, default=16, help="rows of a step")
    p.add_argument("--seq-length", type=int, default=128, help="tokens of a row")
    p.add_argument("--accumulate", type=int, default=1, help="parts into which a step's rows are split")
    p.add_argument("--learning-rate", type=float, default=3e-3, help="peak learning rate")
    p.add_argument("--min-learning-rate", type=float, default=3e-4, help="learning rate at the last step")
    p.add_argument("--warmup", type=int, default=50, help="steps of linear warm-up")
    p.add_argument("--schedule", choices=("cosine", "constant", "paper"), default="cosine",
                   help="learning rate after the warm-up; 'paper' is the report's recipe, for its batch sizes")
    p.add_argument("--weight-decay", type=float, default=0.1, help="decoupled decay of matrices")
    p.add_argument("--clip-norm", type=float, default=1.0, help="global norm to which gradients are clipped")
    p.add_argument("--mtp-weight", type=float, default=0.3, help="weight of the multi-token-prediction loss")
    p.add_argument("--balance-weight", type=float, help="weight of the sequence-wise balance loss; default: the config's")
    p.add_argument("--bias-update-rate", type=float, default=1e-2,
                   help="step of the router bias towards even load (the report's 0.001 suits runs of many thousand steps)")
    p.add_argument("--moment-dtype", choices=("float32", "bfloat16"), default="float32", help="of AdamW's moments")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the params")
    p.add_argument("--recompute", nargs="?", const="full", choices=("full", "selective"),
                   help="in the backward pass: every block, or norms and MLA up-projections alone")
    p.add_argument("--reset-position-ids", action="store_true", help="count positions anew in each document")
    p.add_argument("--reset-attention-mask", action="store_true", help="attend within a document only")
    p.add_argument("--eod-mask-loss", action="store_true", help="no loss where the input ends a document")
    p.add_argument("--eval-every", type=int, default=100, help="steps between evaluations on the held-out split; 0: end only")
    p.add_argument("--eval-batches", type=int, default=8, help="batches of an evaluation")
    p.add_argument("--save-every", type=int, default=200, help="steps between checkpoints; 0: end only")
    p.add_argument("--keep", type=int, default=3, help="checkpoints to keep")
    p.add_argument("--on-nonfinite", choices=("stop", "skip"), default="stop", help="what a NaN loss or gradient does")
    p.add_argument("--seed", type=int, default=1234, help="of the params and of the order of the data")
    p.add_argument("--restart", action="store_true", help="delete the run's folder and begin again instead of resuming")
    p.add_argument("--prompt", default=PROMPT, help="text to continue at the end; empty for none")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    cluster.add(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Assemble the pieces and train."""
    from .. import data
    from ..model import param_specs
    from ..nn.balance import make_balance
    from ..optim import adamw
    from ..report import Report
    from ..schedule import constant, cosine, paper_bias_update_rate, paper_learning_rate, paper_mtp_weight
    from ..spec import count
    from ..train import NotFinite, make_eval_step, make_train_step, mean_loss, train
    from .generate import show
    from .info import find_config

    check(args)
    cfg, out = find_config(args.config), Path(args.out)
    world, placement = cluster.join(args, cfg)
    if args.restart:
        cluster.once(world, lambda: clear(out), f"deleting {out}")

    def open_corpus():
        log = say if world.rank == 0 else str
        return (data.prepare_stdlib(vocab_size=cfg.vocab_size, log=log) if args.data is None and args.tokenizer is None else
                data.open_text(args.data, args.tokenizer, vocab_size=cfg.vocab_size, log=log))

    cluster.once(world, open_corpus, "reading the data")  # which fills the cache for the others
    corpus = open_corpus()
    tokenizer = corpus.tokenizer
    if tokenizer is not None:
        if tokenizer.vocab_size > cfg.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} entries but {args.config} has vocab_size="
                             f"{cfg.vocab_size}; use a config with vocab_size of at least {tokenizer.vocab_size}")
        cfg = cfg.replace(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    options = dict(eod_id=cfg.eos_token_id, reset_position_ids=args.reset_position_ids,
                   reset_attention_mask=args.reset_attention_mask, eod_mask_loss=args.eod_mask_loss)
    samples = data.GPTDataset(corpus.prefix, corpus.train, args.steps * args.batch_size, args.seq_length, args.seed, **options)
    held_out = data.GPTDataset(corpus.prefix, corpus.valid, None, args.seq_length, args.seed, **options)

    part, parts = cluster.rows(placement)
    fewest = parts * args.accumulate
    if len(held_out) < fewest:
        raise ValueError(f"the held-out split has {len(held_out)} rows of --seq-length {args.seq_length}, an evaluation needs "
                         f"{fewest} ({parts} data ranks times --accumulate {args.accumulate}); give more text or shorter rows")

    entropies = None
    if tokenizer is not None and world.rank == 0:
        pair = data.IndexedDataset(corpus.prefix)
        entropies = data.unigram_entropy(data.range_tokens(pair, corpus.train), data.range_tokens(pair, corpus.valid),
                                         cfg.vocab_size)
    rates = {"cosine": lambda: cosine(args.learning_rate, args.steps, args.warmup, args.min_learning_rate),
             "constant": lambda: constant(args.learning_rate, args.warmup),
             "paper": lambda: paper_learning_rate(args.seq_length)}
    is_paper = args.schedule == "paper"
    optimizer = adamw(rates[args.schedule](), weight_decay=args.weight_decay, clip_norm=args.clip_norm,
                      moment_dtype=args.moment_dtype)
    step = make_train_step(
        cfg, optimizer, **cluster.partition(placement), balance=make_balance(cfg, sequence=args.balance_weight),
        accumulate=args.accumulate, recompute={None: False, "full": True}.get(args.recompute, args.recompute),
        mtp_weight=paper_mtp_weight(args.seq_length) if is_paper else args.mtp_weight,
        bias_update_rate=paper_bias_update_rate(args.seq_length) if is_paper else args.bias_update_rate)
    evaluate_batch = make_eval_step(cfg, **cluster.partition(placement), accumulate=args.accumulate,
                                    balance=make_balance(cfg, sequence=args.balance_weight))

    def evaluate(params):
        rows = min(args.batch_size, len(held_out) // fewest * fewest)
        stop = max(rows, min(len(held_out), rows * args.eval_batches))
        batches = data.batches(held_out, rows, stop_sample=stop, shard=(part, parts))
        return mean_loss(evaluate_batch, params, cluster.announced(world, batches, "evaluating"))

    settings = recipe(args, corpus)
    out.mkdir(parents=True, exist_ok=True)
    cluster.check_shared(world, out)
    latest = cluster.latest(world, placement, out)
    if latest is not None:
        params, opt_state, meta, saved_cfg = cluster.load(placement, latest)
        compare(settings, meta["settings"], latest)
        if saved_cfg != cfg:
            raise ValueError(f"{latest}: its config differs from {args.config}; use another --out, or --restart")
        position, elapsed = meta["data_position"], meta["elapsed"]
        say(f"resuming {latest} at step {meta['step']}")
    else:
        (params, opt_state), position, elapsed = cluster.fresh(placement, cfg, optimizer, args.seed, args.dtype), 0, 0.0
    done = int(opt_state["step"].asnumpy())
    if world.leads:
        (out / "run.json").write_text(json.dumps(settings, indent=1))
        keep_tokenizer(tokenizer, out)
    say(f"{count(param_specs(cfg)):,} parameters; {args.steps} steps of {args.batch_size} x {args.seq_length} tokens; run folder "
        f"{out}" + cluster.describe(world, placement, params))
    feed = data.batches(samples, args.batch_size, position, prefetch=4, shard=(part, parts))
    report = Report(out, args.steps, done, show=not args.quiet and placement is None) if world.rank == 0 else None
    began = time.time()

    def save(number, params, opt_state):
        meta = {"data_position": number * args.batch_size, "settings": settings,
                "elapsed": elapsed + time.time() - began, "seed": args.seed}
        world.watch.at(f"saving step {number}")
        cluster.save(world, placement, out, number, params, opt_state, meta, cfg, args.keep)

    def watched_step(params, opt_state, batch):
        world.watch.at(f"step {int(opt_state['step'].asnumpy()) + 1}")
        return step(params, opt_state, batch)

    stopped: list[int] = []
    previous = {s: signal.signal(s, lambda number, frame: stopped.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    signals: list[int] = []  # as all ranks have agreed

    def should_stop():
        number = int(world.gather(stopped[0] if stopped else 0).max())
        signals.extend([number] * bool(number))
        return bool(signals)

    try:
        params, opt_state = train(
            watched_step, params, opt_state, cluster.announced(world, feed), steps=args.steps,
            log=cluster.logger(world, placement, report), evaluate=evaluate,
            eval_every=args.eval_every or args.steps, save=save, save_every=args.save_every, should_stop=should_stop,
            on_nonfinite=args.on_nonfinite)
    except NotFinite as error:
        if report:
            report.close()
        raise ValueError(str(error)) from None
    finally:
        feed.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    marks = {} if entropies is None else {"held-out unigram entropy": entropies[0]}
    picture = report.close(marks) if report else None
    finished = int(opt_state["step"].asnumpy())
    world.gather(0.0)  # the last file is written: from here a rank may go
    world.watch.close()
    if signals:
        say(f"stopped by {signal.Signals(signals[0]).name} at step {finished}; saved; the same command resumes")
        return 128 + signals[0] if placement is None else 0  # to msrun another code is a failure: it would kill the others
    if report:
        summarise(report.records, entropies, picture, out, elapsed + time.time() - began)
    if args.prompt and tokenizer is not None and placement is None:
        say("\nthe model continues:")
        show(params, cfg, tokenizer, args.prompt, max_new_tokens=64, temperature=0.0, seed=args.seed)
    return 0


def clear(out: Path) -> None:
    """Delete a run's folder. Raises ValueError if it is anything else."""
    if out.exists():
        if not (out / "run.json").exists():
            raise ValueError(f"{out} does not look like a run of dsv3 train (no run.json); refusing to delete it")
        shutil.rmtree(out)


def say(text: str) -> None:
    """One line to standard error, where the progress bar is too."""
    print(text, file=sys.stderr, flush=True)


def check(args: argparse.Namespace) -> None:
    """Refuse settings that cannot work, by name."""
    for name in ("steps", "batch_size", "seq_length", "accumulate", "eval_batches", "keep"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    if args.schedule == "cosine" and args.warmup >= args.steps:
        args.warmup = args.steps // 10
    if args.batch_size % args.accumulate:
        raise ValueError(f"--batch-size {args.batch_size} does not divide into --accumulate {args.accumulate} parts")


RESUMABLE = ("data", "tokenizer", "batch_size", "seq_length", "seed", "dtype", "moment_dtype", "steps", "learning_rate",
             "min_learning_rate", "warmup", "schedule", "weight_decay", "clip_norm", "mtp_weight", "balance_weight",
             "bias_update_rate", "reset_position_ids", "reset_attention_mask", "eod_mask_loss", "config")


def recipe(args: argparse.Namespace, corpus) -> dict:
    """What a resumed run must share with the one before for its steps to be the same."""
    return {name: getattr(args, name) for name in RESUMABLE} | {"corpus": corpus.prefix}


def compare(now: dict, before: dict, path: Path) -> None:
    """Refuse to resume under other settings, naming them."""
    differ = [f"{k} was {before.get(k)!r}, is {now[k]!r}" for k in now if now[k] != before.get(k)]
    if differ:
        raise ValueError(f"{path} was trained with other settings ({'; '.join(differ)}); give the same, another --out, or "
                         f"--restart")


def keep_tokenizer(tokenizer, out: Path) -> None:
    """Copy a file-based tokenizer into the run's folder, so that ``dsv3 generate`` finds it."""
    if tokenizer is None:
        return
    source = Path(tokenizer.name)
    folder = source if source.is_dir() else source.parent
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists() and not (out / name).exists():
            shutil.copyfile(folder / name, out / name)


def summarise(records: list[dict], entropies, picture: Path | None, out: Path, seconds: float) -> None:
    """The last lines of a run: loss beside the unigram entropy, balance, speed, files."""
    last = [r for r in records if "loss" in r][-1]
    held = next((r for r in reversed(records) if "eval_main_loss" in r), None)
    say("")
    if held:
        say(f"held-out loss            {held['eval_main_loss']:.3f} nats per token (MTP {held['eval_mtp_loss']:.3f})")
    if entropies:
        say(f"unigram cross-entropy    {entropies[0]:.3f} of the held-out tokens under the training counts")
        say(f"unigram entropy          {entropies[1]:.3f} of the held-out tokens under their own counts")
    if "balance" in last:
        say(f"expert balance           {last['balance']:.2f} max/mean load in the worst layer at the last step")
    say(f"time                     {seconds:,.0f} s in all, the first step's compilation included")
    if picture:
        say(f"loss curve               {picture}")
    say(f"checkpoint               {out / 'checkpoints'}")
