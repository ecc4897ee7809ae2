"""How a server stands load: clients that stream completions over HTTP, served and refused, latencies, tokens a second."""
from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import statistics
import string
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .measure import child_environment, machine


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Register the command."""
    p = commands.add_parser("serve", help="a server under load, by number of clients",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("url", nargs="?", help="as http://127.0.0.1:8000; default: start one over random weights, and look for leaks")
    p.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="clients at the same time, one level after another")
    p.add_argument("--requests", type=int, default=64, help="requests of a level, shared out among its clients")
    p.add_argument("--prompt", type=int, default=64, help="characters of a prompt, each prompt another")
    p.add_argument("--tokens", type=int, default=32, help="tokens of an answer")
    p.add_argument("--api-key", default=os.environ.get("DSV3_API_KEY"), help="of the server")
    p.add_argument("--config", default="TINY", help="of the server that is started: a preset or a config.json")
    p.add_argument("--serve-options", default="--max-batch 8 --max-length 512", help="of the server that is started")
    return p


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure as the options say. Raises ValueError for options that cannot work, RuntimeError if a server does not start."""
    for name in ("requests", "prompt", "tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least 1")
    if min(args.clients) < 1:
        raise ValueError(f"--clients {min(args.clients)}: expected at least 1")
    if args.url:
        if urlsplit(args.url).scheme != "http":
            raise ValueError(f"{args.url}: expected http://HOST:PORT")
        return {"machine": machine(), "levels": levels(args.url, args)}
    with own_server(args) as (url, process):
        levels(url, argparse.Namespace(**vars(args) | {"requests": 8}))  # graphs that are compiled when they are first needed
        before = resident(process.pid)
        found = levels(url, args)
        time.sleep(0.5)
        return {"machine": machine(), "levels": found, "left": left(url, args.api_key),
                "server_bytes": {"before": before, "after": resident(process.pid)}}


def levels(url: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each number of clients."""
    return [level(url, clients, args) for clients in args.clients]


def level(url: str, clients: int, args: argparse.Namespace) -> dict[str, Any]:
    """Send the requests of one level; returns counts, seconds, and spreads of latencies in seconds."""
    todo, rng = list(range(args.requests)), random.Random(clients)
    prompts = ["".join(rng.choices(string.ascii_lowercase + " ", k=args.prompt)) for _ in todo]
    first, whole, tokens, errors = [], [], [], []

    def client() -> None:
        while True:
            try:
                number = todo.pop()
            except IndexError:
                return
            start = time.perf_counter()
            try:
                began, count = stream(url, prompts[number], args)
            except (OSError, http.client.HTTPException, ValueError) as error:
                errors.append(str(error))
                continue
            whole.append(time.perf_counter() - start)
            first.append(began - start)
            tokens.append(count)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    return {"clients": clients, "served": len(whole), "errors": len(errors), "error": errors[0] if errors else None,
            "seconds": seconds, "tokens_per_second": sum(tokens) / seconds, "first_token": quantiles(first),
            "latency": quantiles(whole)}


def quantiles(values: list[float]) -> dict[str, float] | None:
    """p50 and p99 of some numbers."""
    if not values:
        return None
    values = sorted(values)
    return {"p50": statistics.median(values), "p99": values[min(len(values) - 1, round(0.99 * (len(values) - 1)))]}


def stream(url: str, prompt: str, args: argparse.Namespace) -> tuple[float, int]:
    """(when the first piece came, tokens of the whole) of one streamed completion. Raises ValueError with a refusal."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=600)
    try:
        body = {"prompt": prompt, "max_tokens": args.tokens, "temperature": 0, "ignore_eos": True, "stream": True,
                "stream_options": {"include_usage": True}}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {args.api_key}"} if args.api_key else {})
        connection.request("POST", f"{parts.path.rstrip('/')}/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise ValueError(f"{answer.status}: {answer.read(300).decode(errors='replace')}")
        began, count = None, None
        for line in answer:
            if line == b"data: [DONE]\n" and count is not None:
                return began, count
            if line.startswith(b"data: {"):
                began = began or time.perf_counter()
                data = json.loads(line[6:])
                if "error" in data:
                    raise ValueError(data["error"]["message"])
                if data.get("usage"):
                    count = data["usage"]["completion_tokens"]
        raise ValueError("the stream ended before [DONE]")
    finally:
        connection.close()


@contextlib.contextmanager
def own_server(args: argparse.Namespace) -> Iterator[tuple[str, subprocess.Popen]]:
    """(URL, process) of ``dsv3 serve`` over random weights, with a tokenizer whose tokens are text: others would show nothing."""
    import dsv3

    from ..cli.info import find_config
    from ..data.tokenizer import train_bpe

    with tempfile.TemporaryDirectory(prefix="dsv3-serve-") as folder:
        cfg = find_config(args.config)
        weights, log = dsv3.save(Path(folder) / "random", dsv3.init(cfg, seed=0), cfg=cfg), Path(folder) / "log"
        sources = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
        train_bpe((path.read_text(encoding="utf-8", errors="replace") for path in sources), cfg.vocab_size, weights)
        command = [sys.executable, "-m", "dsv3", "serve", str(weights), "--port", "0"]
        if args.api_key:
            command += ["--api-key", args.api_key]
        with log.open("w") as file:
            process = subprocess.Popen([*command, *args.serve_options.split()], stdout=file, stderr=subprocess.STDOUT, cwd=folder,
                                       env=child_environment())
        try:
            while not (found := re.search(r"at (http://[^\s,;]+)", log.read_text())):
                if process.poll() is not None:
                    raise RuntimeError(f"the server did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.1)
            yield found[1], process
        finally:
            process.terminate()
            process.wait(60)


def left(url: str, api_key: str | None) -> dict[str, float]:
    """What a server at rest should not hold: requests, and blocks in use."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    try:
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    pairs = [line.split() for line in text.splitlines() if line.startswith("dsv3_") and "{" not in line]
    values = {name: float(value) for name, value in pairs}
    return {"requests": values["dsv3_requests_live"], "blocks": values["dsv3_engine_blocks"] - values["dsv3_engine_free_blocks"]}


def resident(pid: int) -> int:
    """Bytes of a process in memory (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def table(result: dict[str, Any]) -> str:
    """For people."""
    names = ("clients", "served", "errors", "tokens/s", "first p50", "first p99", "p50", "p99")
    lines = [" ".join(f"{name:>10}" for name in names)]
    for r in result["levels"]:
        times = [f"{s[q] * 1e3:,.0f} ms" if s else "-" for s in (r["first_token"], r["latency"]) for q in ("p50", "p99")]
        values = (r["clients"], r["served"], r["errors"], f"{r['tokens_per_second']:,.1f}", *times)
        lines.append(" ".join(f"{value:>10}" for value in values) + (f"  {r['error'][:80]}" if r["error"] else ""))
    if "left" in result:
        b = result["server_bytes"]
        lines.append(f"left behind: {result['left']['requests']:.0f} requests, {result['left']['blocks']:.0f} blocks; the "
                     f"server's memory {b['before'] / 2**20:,.0f} MiB before, {b['after'] / 2**20:,.0f} MiB after")
    m = result["machine"]
    return "\n".join([*lines, f"{m['cpu']}, {m['cpus']} CPUs, load {m['load']:.1f}"])
