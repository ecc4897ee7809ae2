"""Continuous batching: prompts join and leave between two steps of one model, over one paged cache of latents.

A step is at most one graph of prompts and one of decoding. Prompts are laid one after another into a row of up to ``chunk``
tokens, a longer one goes chunk by chunk, so that nobody who is being served waits for more than a chunk; every sequence that
has its prompt behind it gets its next token (two, where a draft is right) in the same step. Sizes go by powers of two, so
that the number of graphs is bounded by the logarithms of chunk and max_batch.
"""
from __future__ import annotations

import contextlib
import itertools
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mindspore as ms
import numpy as np

from . import decode
from .blocks import Blocks, digests
from .config import Config
from .parallel.groups import own_rank
from .parallel.mesh import Mesh
from .parallel.rules import Rules, make_rules
from .parallel.shard import Placement, placed
from .sampling import Sampling, choose, log_probabilities
from .transform import Bound, bind, jit, rebind
from .tree import tree_map

LEAST_PREFILL, LEAST_CHUNK = 32, 16  # tokens of the smallest graphs
GREEDY = Sampling()


@dataclass(frozen=True)
class Event:
    """A token of a request. finish: None while it goes on, "stop" after an id that ends it (the one reported), "length".

    logprob: of the token, and top: of the likeliest, as ``Sampling.logprobs`` asks.
    """

    request: int
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None


@dataclass(frozen=True)
class Stats:
    """Requests now waiting and running; blocks of the cache, free ones, and those of the free that keep a prompt's beginning;
    and since the start: prompt tokens, those of them found in the cache, tokens generated, decoding steps (a sequence and step
    each), drafts made and drafts that were right."""

    waiting: int
    running: int
    blocks: int
    free_blocks: int
    cached_blocks: int
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    steps: int
    drafted: int
    accepted: int


@dataclass
class _Sequence:
    number: int
    tokens: list[int]  # prompt and continuation
    prompt: int  # length of the prompt
    room: int  # tokens that may be added
    sampling: Sampling
    seed: int
    blocks: list[int] = field(default_factory=list)
    table: np.ndarray | None = None
    row: int = -1  # among those that run
    cached: int = 0  # positions whose latents are in the cache
    behind: int = 0  # last tokens that the MTP module has not seen
    known: list[bytes] = field(default_factory=list)  # digests of full blocks
    told: int = 0  # of them, those of which the pool knows
    seen: set[int] = field(default_factory=set)


class Engine:
    """Many continuations at once. One thread owns it.

    params: float32 or bfloat16 (on the CPU widened once), or quantised (``dsv3.quantize``). max_batch: sequences that run
    together. max_length: tokens of prompt and continuation together, default cfg.max_position_embeddings, at most 4096.
    cache_tokens: places in the cache, by default enough for max_batch of max_length; block_size: tokens of a block. chunk: tokens
    of prompts in one step, a power of two. speculative: draft with the model's MTP module. eos_token_ids: ids that end a text.
    A request is admitted, in order of arrival, once there are blocks for all it may become, so that no one who has begun is
    ever put back.

    mesh: this process is one rank of it and params are its slices (``parallel.stages.own``); heads, ffn, vocabulary and experts
    are cut as ``rules`` say, ``parallel.make_rules()`` by default. Every rank is asked the same in the same order and answers the
    same; requests that are drawn need a seed. Raises ValueError for settings that do not fit together.
    """

    def __init__(self, params: Any, cfg: Config, *, max_batch: int = 8, max_length: int | None = None,
                 cache_tokens: int | None = None, block_size: int = 16, chunk: int = 256, speculative: bool = False,
                 eos_token_ids: Sequence[int] = (), mesh: Mesh | None = None, rules: Rules | None = None) -> None:
        max_length = min(cfg.max_position_embeddings, 4096) if max_length is None else max_length
        for name, value in (("max_batch", max_batch), ("max_length", max_length), ("block_size", block_size)):
            if value < 1:
                raise ValueError(f"{name}={value}; expected at least 1")
        if chunk < LEAST_PREFILL or chunk & (chunk - 1):
            raise ValueError(f"chunk={chunk}; expected a power of two, at least {LEAST_PREFILL}")
        if speculative and "mtp" not in params:
            raise ValueError("speculative=True needs the params of an MTP module; this tree has none (num_nextn_predict_layers="
                             f"{cfg.num_nextn_predict_layers}; released weights: load them with mtp=True)")
        self.cfg, self.max_batch, self.max_length, self.speculative = cfg, max_batch, max_length, speculative
        self._placement = None if mesh is None else _placement_on(mesh, rules or make_rules())
        self._chunk, self._eos = chunk, frozenset(eos_token_ids)
        self._width = -(-(max_length + speculative) // block_size)  # blocks of the longest sequence
        count = 1 + (max_batch * self._width if cache_tokens is None else -(-cache_tokens // block_size))
        self.blocks = Blocks(count, block_size)
        cache = decode.make_cache(cfg, blocks=count, block_size=block_size, rows=max_batch, max_length=max_length + 1,
                                  mtp=speculative, dtype=str(_ready(params["norm"]).dtype).lower())
        self._bound = bind(_ready(params), cache)
        self._prefill, self._extend, self._speculate = _graphs(self._bound, cfg, block_size, speculative, mesh is None)
        self._numbers = itertools.count()
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[int, _Sequence] = {}  # by number, in order of arrival
        self._rows = list(range(max_batch))[::-1]
        self._counts = dict.fromkeys(("prompt_tokens", "reused_tokens", "generated_tokens", "steps", "drafted", "accepted"), 0)

    # -- requests ------------------------------------------------------------------------------------------------------
    def submit(self, prompt: Sequence[int], sampling: Sampling = GREEDY) -> int:
        """The number of a new request to continue ``prompt``. The continuation ends at max_length at the latest.

        Raises ValueError for a prompt that is empty, has an id outside of the vocabulary, fills max_length, or could with its
        continuation never fit into the cache.
        """
        tokens = [int(t) for t in prompt]
        if not tokens:
            raise ValueError("the prompt is empty; give at least one token (the bos token, say)")
        bad = next((t for t in tokens if not 0 <= t < self.cfg.vocab_size), None)
        if bad is not None:
            raise ValueError(f"the prompt has the id {bad}; expected 0 to {self.cfg.vocab_size - 1} (vocab_size)")
        if len(tokens) >= self.max_length:
            raise ValueError(f"a prompt of {len(tokens)} tokens leaves no room for another; max_length is {self.max_length}")
        room = min(sampling.max_new_tokens, self.max_length - len(tokens))
        if sampling.seed is None and sampling.temperature > 0 and self._placement:
            raise ValueError("seed=None: the ranks of a mesh would draw differently; give one")
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        new = _Sequence(-1, tokens, len(tokens), room, sampling, seed, seen=set(tokens))
        if self._needs(new) > self.blocks.count - 1:
            raise ValueError(f"{len(tokens)} prompt tokens and up to {room} new ones need {self._needs(new)} blocks of "
                             f"{self.blocks.size}; the cache has {self.blocks.count - 1}: ask for fewer, or give cache_tokens")
        new.number = next(self._numbers)  # a refused request uses up none: other ranks do not hear of it
        self._waiting.append(new)
        return new.number

    def cancel(self, request: int) -> None:
        """No more events of this request; its blocks are free at once. Nothing happens to one that is unknown or done."""
        if request in self._running:
            self._leave(self._running[request])
        else:
            self._waiting = deque(s for s in self._waiting if s.number != request)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._running)

    @property
    def stats(self) -> Stats:
        """Where it stands."""
        return Stats(waiting=len(self._waiting), running=len(self._running), blocks=self.blocks.count - 1,
                     free_blocks=self.blocks.free, cached_blocks=self.blocks.kept, **self._counts)

    def renew(self, params: Any) -> None:
        """Go on with params that have changed, of the same shapes; nothing computed before is used again. Raises ValueError while
        requests are being served."""
        if not self.idle:
            raise ValueError("requests are being served with the old params; finish or cancel them first")
        rebind(self._bound, _ready(params))
        self.blocks.forget()

    # -- steps ---------------------------------------------------------------------------------------------------------
    def step(self) -> list[Event]:
        """Admit, compute one chunk of prompts and one token (or draft and token) of every sequence that is past its prompt."""
        self._admit()
        with placed(self._placement) if self._placement else contextlib.nullcontext():
            events = self._prompts()
            ready = [s for s in self._running.values() if s.cached >= s.prompt]
            return events + (self._decode(ready) if ready else [])

    def _needs(self, s: _Sequence) -> int:
        return -(-(s.prompt + s.room + self.speculative) // self.blocks.size)

    def _admit(self) -> None:
        size = self.blocks.size
        while self._waiting and self._rows:
            s = self._waiting[0]
            s.known = digests(s.tokens, size)
            held = self.blocks.match(s.known[:(s.prompt - 1) // size])  # one token at least is computed, for its logits
            if self._needs(s) - len(held) > self.blocks.free:
                self.blocks.give_back(held)
                return  # nobody overtakes
            self._waiting.popleft()
            s.blocks = held + self.blocks.take(self._needs(s) - len(held))
            s.table = np.zeros(self._width, np.int32)
            s.table[:len(s.blocks)] = s.blocks
            s.row, s.cached = self._rows.pop(), len(held) * size
            self._running[s.number] = s
            self._counts["prompt_tokens"] += s.prompt
            self._counts["reused_tokens"] += s.cached

    def _leave(self, s: _Sequence) -> None:
        del self._running[s.number]
        self.blocks.give_back(s.blocks)
        self._rows.append(s.row)

    def _prompts(self) -> list[Event]:
        """One graph of prompts: those that begin, packed, or the next chunk of one that goes on."""
        todo = [s for s in self._running.values() if s.cached < s.prompt]
        if not todo:
            return []
        if todo[0].cached:
            parts = [(todo[0], min(todo[0].prompt - todo[0].cached, self._chunk))]
        else:
            parts, room = [], self._chunk
            for s in todo:
                if s.cached or not room or (parts and s.prompt > room):
                    break
                parts.append((s, min(s.prompt, room)))
                room -= parts[-1][1]
        n = _bucket(sum(count for _, count in parts), LEAST_CHUNK if todo[0].cached else LEAST_PREFILL)
        fields = {name: np.zeros(n, np.int32) for name in ("tokens", "positions", "slots", "segments", "ahead")}
        fields["segments"][:] = -1  # padding is a segment of its own
        last, rows = np.zeros(self.max_batch, np.int32), np.full(self.max_batch, 2 * self.max_batch, np.int32)
        at = 0
        for i, (s, count) in enumerate(parts):
            here, positions = slice(at, at + count), np.arange(s.cached, s.cached + count)
            following = s.tokens[s.cached + 1:s.cached + count + 1]
            fields["tokens"][here] = s.tokens[s.cached:s.cached + count]
            fields["positions"][here], fields["slots"][here] = positions, self._slots(s, positions)
            fields["segments"][here] = i
            fields["ahead"][at:at + len(following)] = following
            at += count
            last[i], rows[i] = at - 1, 2 * s.row
        where = (fields["tokens"], fields["positions"], fields["slots"])
        more = (last, fields["ahead"], rows)
        if todo[0].cached:
            ids, logits = self._extend(*where, todo[0].table[None], *more)
        else:
            ids, logits = self._prefill(*where, fields["segments"], *more)
        for s, count in parts:
            s.behind = 1
            self._advance(s, count)
        done = [(i, s) for i, (s, _) in enumerate(parts) if s.cached == s.prompt]
        found = _Results(ids, logits)
        return [event for i, s in done for event in self._add(s, found, i)]

    def _decode(self, ready: list[_Sequence]) -> list[Event]:
        self._counts["steps"] += len(ready)
        B = _bucket(len(ready), 1)
        tables = np.zeros((B, self._width), np.int32)
        tokens, n = np.zeros(B, np.int32), 1 + self.speculative
        positions, slots = np.zeros((B, n), np.int32), np.zeros((B, n), np.int32)
        for b, s in enumerate(ready):
            tables[b], tokens[b] = s.table, s.tokens[-1]
            positions[b] = np.arange(s.cached, s.cached + n)
            slots[b] = self._slots(s, positions[b])
        if not self.speculative:
            every, nothing = np.arange(B, dtype=np.int32), np.zeros(B, np.int32)
            found = _Results(*self._extend(tokens, positions[:, 0], slots[:, 0], tables, every, nothing, nothing))
            return [event for b, s in enumerate(ready) for event in self._after(s, found, [b])]
        drafts, ids, logits = self._speculate(self._behind(ready, B), tokens, positions.reshape(-1), slots.reshape(-1), tables)
        drafts, found, events = drafts.asnumpy(), _Results(ids, logits), []
        self._counts["drafted"] += len(ready)
        for b, s in enumerate(ready):
            events += self._after(s, found, [2 * b, 2 * b + 1], int(drafts[b]))
        return events

    def _behind(self, ready: list[_Sequence], B: int) -> dict[str, np.ndarray]:
        """What the MTP module reads of each sequence: its last one or two tokens and the hidden states before them."""
        nobody = 2 * self.max_batch
        into = np.full((B, 2), nobody, np.int32)
        into[:, 1] += 1
        tokens, positions, slots, rows = (np.zeros((B, 2), np.int32) for _ in range(4))
        at = np.arange(B, dtype=np.int32) * 2
        for b, s in enumerate(ready):
            k = s.behind
            into[b] = 2 * s.row, 2 * s.row + 1
            tokens[b, :k] = s.tokens[-k:]
            positions[b, :k] = np.arange(s.cached - k, s.cached)
            slots[b, :k] = self._slots(s, positions[b, :k])
            rows[b, :k] = into[b, :k]
            at[b] += k - 1
        return {"tokens": tokens.reshape(-1), "positions": positions.reshape(-1), "slots": slots.reshape(-1),
                "rows": rows.reshape(-1), "at": at, "into": into.reshape(-1)}

    def _after(self, s: _Sequence, found: _Results, places: list[int], draft: int | None = None) -> list[Event]:
        """The tokens that follow from a pass over a sequence's last token and perhaps a draft."""
        s.behind = 1
        self._advance(s, 1)
        events = self._add(s, found, places[0])
        if draft is not None and events[0].token == draft:
            self._counts["accepted"] += 1
            if events[0].finish is None:
                s.behind = 2
                self._advance(s, 1)
                events += self._add(s, found, places[1])
        return events

    def _add(self, s: _Sequence, found: _Results, place: int) -> list[Event]:
        """Choose the next token of a sequence; it leaves when that is its last."""
        sampling, logprob, top = s.sampling, None, ()
        if sampling.plain:
            token = found.likeliest(place)
        else:
            logits = found.logits(place)
            token = choose(logits, sampling, s.seed, len(s.tokens) - s.prompt, s.seen)
            if sampling.logprobs >= 0:
                logprob, top = log_probabilities(logits, token, sampling.logprobs)
        s.tokens.append(token)
        s.seen.add(token)
        self._counts["generated_tokens"] += 1
        ends = token in sampling.stop_token_ids or (token in self._eos and not sampling.ignore_eos)
        finish = "stop" if ends else "length" if len(s.tokens) - s.prompt == s.room else None
        if finish:
            self._leave(s)
        return [Event(s.number, token, logprob, top, finish)]

    def _slots(self, s: _Sequence, positions: np.ndarray) -> np.ndarray:
        return s.table[positions // self.blocks.size] * self.blocks.size + positions % self.blocks.size

    def _advance(self, s: _Sequence, count: int) -> None:
        """So many more of its tokens are in the cache; blocks that have become full are known from now on."""
        s.cached += count
        full = s.cached // self.blocks.size
        if full > len(s.known):
            s.known = digests(s.tokens[:full * self.blocks.size], self.blocks.size, s.known)
        for i in range(s.told, full):
            self.blocks.know(s.blocks[i], s.known[i])
        s.told = full


class _Results:
    """What a graph says, fetched when it is asked for."""

    def __init__(self, ids: ms.Tensor, logits: ms.Tensor) -> None:
        self._ids, self._tensor, self._logits = ids.asnumpy(), logits, None

    def likeliest(self, i: int) -> int:
        return int(self._ids[i])

    def logits(self, i: int) -> np.ndarray:
        if self._logits is None:
            self._logits = self._tensor.asnumpy()
        return self._logits[i]


def _graphs(bound: Bound, cfg: Config, block_size: int, mtp: bool, fused: bool) -> tuple[Callable, Callable, Callable]:
    """``decode``'s functions over bound params and cache."""
    def prefill(params, cache, tokens, positions, slots, segments, last, ahead, rows):
        return decode.prefill(params, cache, tokens, positions, slots, segments, last, ahead, rows, cfg=cfg,
                              block_size=block_size, mtp=mtp, fused=fused)

    def extend(params, cache, tokens, positions, slots, tables, last, ahead, rows):
        return decode.extend(params, cache, tokens, positions, slots, tables, last, ahead, rows, cfg=cfg, block_size=block_size,
                             mtp=mtp, fused=fused)

    def speculate(params, cache, behind, tokens, positions, slots, tables):
        return decode.speculate(params, cache, behind, tokens, positions, slots, tables, cfg=cfg, block_size=block_size,
                                fused=fused)

    return jit(prefill, bound=bound), jit(extend, bound=bound), jit(speculate, bound=bound)


def _placement_on(mesh: Mesh, rules: Rules) -> Placement:
    """This rank's place. Every rank has all tokens, so no expert's tokens travel. Raises ValueError for what is not cut here."""
    placement = Placement(mesh, replace(rules, dispatch="replicated", node=None), own_rank())
    cut = placement.axes("residual_seq") or ("pipe",) * (mesh.pipe > 1)
    if cut or rules.zero == 3:
        raise ValueError(f"mesh {mesh}: decoding cuts heads, ffn, vocabulary and experts, over model and expert, not "
                         f"{'params as ZeRO level 3 does' if rules.zero == 3 else f'rows or layers over {cut}'}")
    if "model" in placement.axes("expert"):
        raise ValueError(f"mesh {mesh}: decoding spreads experts over expert alone, not over model too; make the rules with "
                         f"experts='tensor'")
    return placement


def _ready(params: Any) -> Any:
    """Params as the device computes with them: the CPU has no bfloat16, and widening at every step would cost more than it."""
    def widen(leaf):
        return leaf.astype(ms.float32) if getattr(leaf, "dtype", None) in (ms.bfloat16, ms.float16) else leaf

    return tree_map(widen, params) if ms.get_context("device_target") == "CPU" else params


def _bucket(n: int, least: int) -> int:
    """The least power of two that holds n, from ``least`` on."""
    return max(least, 1 << (n - 1).bit_length())
