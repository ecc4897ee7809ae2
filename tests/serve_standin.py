"""A service over a stand-in engine with a rule instead of a model, as a process: ``python serve_standin.py '{"port": 0}'``.

The rule: after a prompt with ``say:TEXT`` come TEXT's bytes and eos, after any other letters drawn from the prompt and the seed,
so that every answer can be told from outside. Blocks are counted as an engine with a paged cache would.
"""
import dataclasses
import hashlib
import json
import sys
import time
from types import SimpleNamespace

from dsv3.chat import load_chat
from dsv3.data.tokenizer import byte_tokenizer

BLOCK, BYTE = 16, byte_tokenizer()


def rule(prompt, seed, count):
    """The ids after a prompt."""
    text = BYTE.decode(prompt)
    if "say:" in text:
        said = text.split("say:")[-1].removesuffix("\n\nAssistant:")
        return [*BYTE.encode(said), BYTE.eos_id]
    out = b""
    while len(out) < count:
        out += hashlib.sha256(repr((tuple(prompt), seed, len(out))).encode()).digest()
    return [97 + b % 26 if b % 7 else 32 for b in out[:count]]


def expected(text, count, seed=None):
    """What the stand-in answers to a text prompt."""
    return BYTE.decode(rule([BYTE.bos_id, *BYTE.encode(text)], seed, count))


@dataclasses.dataclass(frozen=True)
class Event:
    request: int
    token: int
    logprob: float | None
    top: tuple
    finish: str | None


class StandIn:
    """The engine's methods over the rule."""

    def __init__(self, max_batch=4, max_length=512, blocks=64, delay=0.002, explode=0):
        self.max_length, self.cfg = max_length, SimpleNamespace(vocab_size=258)
        self.max_batch, self.total, self.delay, self.explode = max_batch, blocks, delay, explode
        self.waiting, self.running, self.number = {}, {}, 0
        self.counts = dict.fromkeys(("prompt_tokens", "reused_tokens", "generated_tokens", "steps", "drafted", "accepted"), 0)

    def submit(self, prompt, sampling):
        if not prompt or max(prompt) >= 258:
            raise ValueError("prompt: expected ids of 0 to 257")
        self.number += 1
        ids = rule(prompt, sampling.seed, sampling.max_new_tokens)
        if sampling.ignore_eos:
            ids = (ids * sampling.max_new_tokens)
        blocks = -(-(len(prompt) + sampling.max_new_tokens) // BLOCK)
        if blocks > self.total:
            raise ValueError(f"prompt: needs {blocks} blocks of the cache's {self.total}")
        self.counts["prompt_tokens"] += len(prompt)
        self.waiting[self.number] = SimpleNamespace(ids=ids, at=0, sampling=sampling, blocks=blocks)
        return self.number

    def step(self):
        while self.waiting and len(self.running) < self.max_batch:
            number = next(iter(self.waiting))
            if self.waiting[number].blocks > self.stats.free_blocks:
                break
            self.running[number] = self.waiting.pop(number)
        if not self.running:
            return []
        time.sleep(self.delay)
        self.counts["steps"] += 1
        if self.explode and self.counts["steps"] == self.explode:
            raise RuntimeError("planted failure")
        events = []
        for number, row in list(self.running.items()):
            token, s = row.ids[row.at], row.sampling
            row.at += 1
            ends = token in (BYTE.eos_id, *s.stop_token_ids) and not (s.ignore_eos and token == BYTE.eos_id)
            finish = "stop" if ends else "length" if row.at == s.max_new_tokens else None
            top = tuple((97 + i, -1.0 - i) for i in range(max(s.logprobs, 0)))
            events.append(Event(number, token, -0.5 if s.logprobs >= 0 else None, top, finish))
            self.counts["generated_tokens"] += 1
            if finish:
                del self.running[number]
        return events

    def cancel(self, request):
        self.waiting.pop(request, None)
        self.running.pop(request, None)

    @property
    def idle(self):
        return not self.waiting and not self.running

    @property
    def stats(self):
        used = sum(row.blocks for row in self.running.values())
        return SimpleNamespace(waiting=len(self.waiting), running=len(self.running), blocks=self.total,
                               free_blocks=self.total - used, cached_blocks=0, **self.counts)


def main(settings):
    """Serve until a signal."""
    from dsv3.serve import run
    from dsv3.serve.app import Service
    from dsv3.serve.body import Limits
    from dsv3.serve.worker import Worker

    bound = run.bind("127.0.0.1", 0)
    engine = settings.get("engine", {})
    worker = Worker(lambda: StandIn(**engine), places=engine.get("max_batch", 4) + settings.get("queue", 64))
    worker.load()
    limits = Limits(**settings.get("limits", {}))
    service = Service(worker, BYTE, load_chat(BYTE), "standin", limits, settings.get("api_key"), run.is_local(bound))
    run.serve(service, bound, lambda: print(f"ready at {run.address(bound)}", flush=True))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
