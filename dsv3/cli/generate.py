"""``dsv3 generate``: continue a prompt, or talk, with a checkpoint or a training run."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import cut


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    p = commands.add_parser("generate", help="continue a prompt with a trained model, or talk with it",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("checkpoint", help="a training run's folder, one of its checkpoints, or a folder of weights")
    p.add_argument("--prompt", help="the text to continue; with --chat the message to answer. Without it, --chat reads messages "
                                    "line by line until the end of input")
    p.add_argument("--chat", action="store_true", help="put messages into the model's chat template")
    p.add_argument("--system", help="the system message of a chat")
    p.add_argument("--tokenizer", help="a tokenizer.json, its folder, or 'byte'; default: the run's own")
    p.add_argument("--max-new-tokens", type=int, default=64, help="tokens to add at most")
    p.add_argument("--max-length", type=int, help="tokens of prompt and answer at most; default: the model's, up to 4096")
    p.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time")
    p.add_argument("--top-k", type=int, default=0, help="draw among so many likeliest; 0 for all")
    p.add_argument("--top-p", type=float, default=1.0, help="draw among the fewest that reach this probability")
    p.add_argument("--min-p", type=float, default=0.0, help="draw among those of at least this part of the highest probability")
    p.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 makes what has been said less likely")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given again")
    p.add_argument("--seed", type=int, default=0, help="of the draws at a temperature above 0")
    p.add_argument("--speculative", action="store_true", help="draft with the model's MTP module: the same text, sooner")
    p.add_argument("--quantize", choices=("w8a16", "w8a8"), help="round the weights, or weights and activations, to int8")
    cut.add(p)
    p.set_defaults(run=run)


def open_checkpoint(path: str, mtp: bool = False, ranks: cut.Ranks | None = None):
    """(params, cfg, folder of the tokenizer or None) of a run, one of its checkpoints, own weights or released ones.

    mtp: read the MTP module of released weights too. ranks: params are this rank's slices.
    """
    from ..checkpoint import hf, own, training

    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    place = next((p for p in (folder, *folder.parents[:3]) if (p / "tokenizer.json").exists()), None)
    if ranks is not None:
        return *cut.load(folder, ranks, mtp), place
    weights = (training.latest_training(folder) if (folder / "checkpoints").is_dir() else None) or folder
    if (weights / "training.json").exists() or (weights / own.MANIFEST).exists():
        return *own.load(weights), place
    return *hf.from_hf(weights, mtp=mtp), place


def continued(engine, tokenizer, ids: Sequence[int], sampling, stop: Sequence[str], write: Callable[[str], None]) -> str:
    """The text that follows ids; ``write`` gets its pieces as they come."""
    from ..text import TextStream

    stream, request, text = TextStream(tokenizer, stop), engine.submit(ids, sampling), ""
    while not engine.idle:
        for event in engine.step():
            piece = "" if event.finish == "stop" else stream.push(event.token)
            if stream.done:
                engine.cancel(request)
            text += piece
            write(piece)
    rest = stream.finish()
    write(rest)
    return text + rest


def say(piece: str) -> None:
    """To the terminal at once."""
    print(piece, end="", flush=True)


def show(params, cfg, tokenizer, prompt: str, *, max_new_tokens: int, temperature: float, seed: int) -> str:
    """Print the prompt and its continuation as it grows; returns the continuation."""
    from ..engine import Engine
    from ..sampling import Sampling

    ids = _with_bos(tokenizer, prompt)
    engine = Engine(params, cfg, max_batch=1, max_length=len(ids) + max_new_tokens, eos_token_ids=_eos(tokenizer))
    say(prompt)
    text = continued(engine, tokenizer, ids, Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed), (), say)
    print()
    return text


def _with_bos(tokenizer, text: str) -> list[int]:
    ids = tokenizer.encode(text)
    return ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]


def _eos(tokenizer) -> tuple[int, ...]:
    return () if tokenizer.eos_id is None else (tokenizer.eos_id,)


def run(args: argparse.Namespace) -> None:
    """Load and continue, or talk."""
    from ..data import load_tokenizer
    from ..sampling import Sampling

    if args.prompt is None and not args.chat:
        raise ValueError("nothing to continue: give --prompt TEXT, or --chat to talk")
    if args.system and not args.chat:
        raise ValueError("--system is a message of a chat: give --chat too")
    sampling = Sampling(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                        min_p=args.min_p, repetition_penalty=args.repetition_penalty, seed=args.seed)
    ranks = cut.join(args)
    params, cfg, place = open_checkpoint(args.checkpoint, args.speculative, ranks)
    params = cut.quantized(params, cfg, args.quantize, ranks)
    if ranks is not None and not ranks.leads:
        return cut.follow(params, cfg, ranks)
    if args.tokenizer is None and place is None:
        raise ValueError(f"{args.checkpoint} has no tokenizer.json; give one with --tokenizer")
    tokenizer = load_tokenizer(args.tokenizer or place)
    engine = cut.make_engine(params, cfg, ranks, max_batch=1, max_length=args.max_length, speculative=args.speculative,
                             eos_token_ids=_eos(tokenizer))
    if not args.chat:
        say(args.prompt)
        continued(engine, tokenizer, _with_bos(tokenizer, args.prompt), sampling, args.stop, say)
        print()
    else:
        talk(engine, tokenizer, sampling, args.stop, args.system, args.prompt)
    if args.speculative:
        print(f"{engine.stats.accepted} of {engine.stats.drafted} drafts were right", file=sys.stderr)
    cut.leave(engine, ranks)


def talk(engine, tokenizer, sampling, stop: Sequence[str], system: str | None, message: str | None) -> None:
    """Answer one message, or those of the standard input line by line. What was said before is not computed again."""
    from ..chat import load_chat

    chat, messages = load_chat(tokenizer), [{"role": "system", "content": system}] if system else []
    lines = [message] if message is not None else sys.stdin
    for line in lines:
        messages.append({"role": "user", "content": line.rstrip("\n")})
        answer = continued(engine, tokenizer, chat(messages), sampling, stop, say)
        print()
        messages.append({"role": "assistant", "content": answer})
