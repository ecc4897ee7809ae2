"""``dsv3 serve``: an OpenAI-compatible service, and a page to chat with the model, over a checkpoint or a training run."""
from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from pathlib import Path
from typing import Any

from . import cut

KEY = "DSV3_API_KEY"


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    p = commands.add_parser("serve", help="answer OpenAI clients and browsers with a trained model",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("checkpoint", help="a training run's folder, one of its checkpoints, or a folder of weights")
    p.add_argument("--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0 lets other machines in")
    p.add_argument("--port", type=int, default=8000, help="0 takes any free one")
    p.add_argument("--api-key", help=f"the bearer token clients must send; default: the environment's {KEY}, else none")
    p.add_argument("--model-name", help="the name clients ask for; default: the checkpoint folder's")
    p.add_argument("--tokenizer", help="a tokenizer.json, its folder, or 'byte'; default: the checkpoint's own")
    g = p.add_argument_group("engine")
    g.add_argument("--max-batch", type=int, default=8, help="answers generated at the same time")
    g.add_argument("--max-length", type=int, help="tokens of prompt and answer together; default: the model's, up to 4096")
    g.add_argument("--cache-tokens", type=int, help="tokens the cache holds for all answers; default: the engine's choice")
    g.add_argument("--speculative", action="store_true", help="draft with the MTP module")
    g.add_argument("--quantize", choices=("w8a16", "w8a8"), help="int8 weights, with activations as they are or int8 too")
    g.add_argument("--lazy", action="store_true", help="be ready sooner: compile each graph when a request first needs it")
    g = p.add_argument_group("limits")
    g.add_argument("--max-queue", type=int, default=64, help="answers that may wait; then 429")
    g.add_argument("--timeout", type=float, default=600.0, help="seconds a request may take; then 504")
    g.add_argument("--grace", type=float, default=10.0, help="seconds that running requests get after SIGTERM")
    g.add_argument("--max-body", type=int, default=4 << 20, help="bytes of a request; then 413")
    g.add_argument("--max-prompt", type=int, help="tokens of a prompt; default: --max-length")
    g.add_argument("--max-tokens", type=int, help="tokens of an answer; default: --max-length")
    g.add_argument("--max-choices", type=int, default=16, help="answers of one request: prompts times n")
    p.add_argument("--access-log", action="store_true", help="print a line for each request")
    cut.add(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, listen, serve until a signal; on a mesh rank 0 does, and the others compute with it."""
    check(args)
    from ..chat import load_chat
    from ..data import load_tokenizer
    from ..serve import run as server
    from ..serve.app import Service
    from ..serve.body import Limits
    from ..serve.worker import Worker
    from .generate import open_checkpoint

    ranks, stopped = cut.join(args), []
    if ranks is not None and not ranks.leads:
        params, cfg, _ = open_checkpoint(args.checkpoint, args.speculative, ranks)
        cut.follow(cut.quantized(params, cfg, args.quantize, ranks), cfg, ranks)
        return 0
    bound = server.bind(args.host, args.port)
    for number in (signal.SIGINT, signal.SIGTERM):  # while it loads; the server has its own
        signal.signal(number, leave if ranks is None else lambda number, frame: stopped.append(number))
    params, cfg, place = open_checkpoint(args.checkpoint, args.speculative, ranks)
    if args.tokenizer is None and place is None:
        raise ValueError(f"{args.checkpoint} has no tokenizer.json; give one with --tokenizer")
    tokenizer = load_tokenizer(args.tokenizer or place)
    chat = load_chat(tokenizer)
    params = cut.quantized(params, cfg, args.quantize, ranks)
    places = args.max_batch + args.max_queue
    limits = Limits(body_bytes=args.max_body, prompt_tokens=args.max_prompt or 1 << 30, new_tokens=args.max_tokens or 1 << 30,
                    choices=min(args.max_choices, places), seconds=args.timeout, grace=args.grace)
    made: list[Any] = []

    def make() -> Any:
        eos = cfg.eos_token_id if tokenizer.eos_id is None else tokenizer.eos_id
        made.append(cut.make_engine(params, cfg, ranks, max_batch=args.max_batch, max_length=args.max_length,
                                    cache_tokens=args.cache_tokens, speculative=args.speculative,
                                    eos_token_ids=() if eos is None else (eos,)))
        if not args.lazy:
            warm(made[0], args, stopped)
        return made[0]

    worker = Worker(make, places=places)
    worker.load()
    service = Service(worker, tokenizer, chat, args.model_name or Path(args.checkpoint).resolve().name, limits,
                      args.api_key or os.environ.get(KEY) or None, server.is_local(bound))

    def ready() -> None:
        if stopped:  # while it loaded; the other ranks must be let go in order
            os.kill(os.getpid(), signal.SIGTERM)
            return
        asked = "" if service.api_key is None else ", with an API key"
        over = "" if ranks is None else f", cut over {args.mesh}"
        print(f"dsv3 serve: {service.model} at {server.address(bound)}{asked}{over}; the API is at {server.address(bound)}/v1; "
              f"Ctrl-C or SIGTERM stops it", flush=True)
        if not service.local and service.api_key is None:
            print(f"dsv3 serve: {args.host} can be reached from other machines, and no key is asked", file=sys.stderr, flush=True)

    if not server.serve(service, bound, ready, args.access_log):
        leave()
    cut.leave(made[0], ranks)
    return 0


def leave(*signal_and_frame: Any) -> None:
    """End at once, with success: Python's own way out would abort while the engine's thread compiles or computes."""
    sys.stdout.flush()
    os._exit(0)


def warm(engine: Any, args: argparse.Namespace, stopped: list[int]) -> None:
    """Compile the graphs that most requests need, so that the first clients do not wait; until something is in stopped."""
    from ..sampling import Sampling

    asked = [engine.submit([i % engine.cfg.vocab_size], Sampling(max_new_tokens=2 + i, ignore_eos=True))
             for i in range(args.max_batch)]  # they end one after another: every number of running sequences occurs
    for length in (64, 128, 256):
        if length < min(engine.max_length, (args.cache_tokens or engine.max_length) // 2):
            asked.append(engine.submit([length % engine.cfg.vocab_size] * length, Sampling(max_new_tokens=1)))
    while not (engine.idle or stopped):
        engine.step()
    for request in asked:
        engine.cancel(request)


def check(args: argparse.Namespace) -> None:
    """Refuse settings that cannot work, by name."""
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"needs {', '.join(missing)}: pip install 'dsv3[serve]'")
    for name in ("max_batch", "max_length", "cache_tokens", "max_body", "max_prompt", "max_tokens", "max_choices"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if args.max_queue < 0 or args.timeout <= 0 or args.grace < 0:
        raise ValueError(f"--max-queue {args.max_queue}, --timeout {args.timeout}, --grace {args.grace}: expected none below 0, "
                         f"and some time for a request")
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port {args.port}: expected 0 to 65535")
