"""``dsv3 generate``: continue a prompt with a checkpoint or a training run."""
from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    p = commands.add_parser("generate", help="continue a prompt with a trained model",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("checkpoint", help="a training run's folder, one of its checkpoints, or a folder of weights")
    p.add_argument("--prompt", required=True, help="the text to continue")
    p.add_argument("--tokenizer", help="a tokenizer.json, its folder, or 'byte'; default: the run's own")
    p.add_argument("--max-new-tokens", type=int, default=64, help="tokens to add at most")
    p.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time")
    p.add_argument("--seed", type=int, default=0, help="of the draws at a temperature above 0")
    p.set_defaults(run=run)


def open_checkpoint(path: str):
    """(params, cfg, folder of the tokenizer or None) of a run, one of its checkpoints, own weights or released ones."""
    from ..checkpoint import hf, own, training

    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    latest = training.latest_training(folder) if (folder / "checkpoints").is_dir() else None
    weights = latest or folder
    place = next((p for p in (folder, *weights.parents[:3]) if (p / "tokenizer.json").exists()), None)
    if (weights / "training.json").exists() or (weights / own.MANIFEST).exists():
        return *own.load(weights), place
    return *hf.from_hf(weights, mtp=False), place


def show(params, cfg, tokenizer, prompt: str, *, max_new_tokens: int, temperature: float, seed: int) -> str:
    """Print the prompt and its continuation as it grows; returns the continuation."""
    from ..generate import generate

    ids = tokenizer.encode(prompt)
    if tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]
    new: list[int] = []
    print(prompt, end="", flush=True)
    shown = ""

    def on_token(row: int, token: int) -> None:
        nonlocal shown
        if token != tokenizer.eos_id:
            new.append(token)
        text = tokenizer.decode(new)
        if not text.endswith("\ufffd"):  # half a character waits for its other half
            print(text[len(shown):], end="", flush=True)
            shown = text

    generate(params, [ids], cfg=cfg, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
             eos_token_id=tokenizer.eos_id, on_token=on_token)
    text = tokenizer.decode(new)
    print(text[len(shown):])
    return text


def run(args: argparse.Namespace) -> None:
    """Load and continue."""
    from ..data import load_tokenizer

    params, cfg, place = open_checkpoint(args.checkpoint)
    if args.tokenizer is None and place is None:
        raise ValueError(f"{args.checkpoint} has no tokenizer.json; give one with --tokenizer")
    tokenizer = load_tokenizer(args.tokenizer or place)
    show(params, cfg, tokenizer, args.prompt, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
         seed=args.seed)
