"""What goes back: the tokens of a request as text, in the shapes of OpenAI's two endpoints, whole or in pieces."""
from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from ..data.tokenizer import Tokenizer
from ..text import MISSING, TextStream
from .body import Ask
from .errors import ApiError
from .worker import Job, Worker

LEAST = -9999.0  # JSON has no minus infinity


@dataclass
class Choice:
    """One answer as it grows."""

    text: TextStream
    tokens: int = 0
    shown: int = 0              # characters
    finish: str | None = None   # "stop" or "length"


@dataclass(frozen=True)
class Piece:
    """What was added to one choice: text, the tokens as (event, where its text begins), and why it ended, if it did."""

    choice: int
    text: str
    tokens: list[tuple[Any, int]] = field(default_factory=list)
    finish: str | None = None


async def pieces(ask: Ask, job: Job, worker: Worker, tokenizer: Tokenizer, choices: list[Choice]) -> AsyncIterator[Piece]:
    """The pieces of all choices as they come; ends with the last choice. Raises ApiError for what ends the request early."""
    if ask.echo:
        for c, choice in enumerate(choices):
            choice.shown = len(ask.texts[c // ask.n])
            yield Piece(c, ask.texts[c // ask.n])
    hidden = {tokenizer.bos_id, tokenizer.eos_id}  # marks, not text, where ignore_eos lets them pass
    while any(choice.finish is None for choice in choices):
        news = await job.news.get()
        while isinstance(news, list) and not job.news.empty():  # a reader who is behind gets larger pieces
            more = job.news.get_nowait()
            news = news + more if isinstance(more, list) else more
        if isinstance(news, ApiError):
            raise news
        by_choice: dict[int, list[Any]] = {}
        for c, event in news:
            by_choice.setdefault(c, []).append(event)
        for c, events in by_choice.items():
            if choices[c].finish is None:
                piece = add(choices[c], c, events, hidden)
                if piece.finish and events[-1].finish is None:  # by a stop string: the engine would go on
                    worker.cancel(job, c)
                yield piece


def add(choice: Choice, number: int, events: list[Any], hidden: set[int | None]) -> Piece:
    """Let a choice grow by some events."""
    text, tokens = "", []
    for event in events:
        choice.tokens += 1
        if event.finish == "stop":  # the stop token itself is no text
            choice.finish = "stop"
        else:
            tokens.append((event, choice.shown + len(text)))
            text += choice.text.push(event.token) if event.token not in hidden else ""
            choice.finish = "stop" if choice.text.done else event.finish
        if choice.finish:
            text += choice.text.finish()
            if choice.text.done:
                choice.finish = "stop"
            break
    choice.shown += len(text)
    return Piece(number, text, tokens, choice.finish)


# -- shapes ------------------------------------------------------------------------------------------------------------
def envelope(ask: Ask, streamed: bool) -> dict[str, Any]:
    """What is the same in every piece of an answer."""
    if ask.chat:
        name, number = "chat.completion.chunk" if streamed else "chat.completion", f"chatcmpl-{uuid.uuid4().hex}"
    else:
        name, number = "text_completion", f"cmpl-{uuid.uuid4().hex}"
    return {"id": number, "object": name, "created": int(time.time()), "model": ask.model}


def usage(ask: Ask, choices: list[Choice]) -> dict[str, int]:
    """Tokens in and out."""
    prompt, new = sum(map(len, ask.prompts)), sum(choice.tokens for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def logprobs(ask: Ask, tokens: list[tuple[Any, int]], tokenizer: Tokenizer) -> dict[str, Any] | None:
    """``logprobs`` of a choice, each endpoint in its own shape."""
    if not ask.logprobs:
        return None

    def entry(token: int, value: float | None) -> dict[str, Any]:
        text = tokenizer.decode([token])  # of a part of a character no bytes can be told
        return {"token": text, "logprob": number(value), "bytes": None if MISSING in text else list(text.encode())}

    if ask.chat:
        return {"content": [entry(e.token, e.logprob) | {"top_logprobs": [entry(*top) for top in e.top]} for e, _ in tokens],
                "refusal": None}
    return {"tokens": [tokenizer.decode([e.token]) for e, _ in tokens], "token_logprobs": [number(e.logprob) for e, _ in tokens],
            "top_logprobs": [{tokenizer.decode([t]): number(p) for t, p in e.top} for e, _ in tokens],
            "text_offset": [at for _, at in tokens]}


def number(value: float | None) -> float:
    """A log-probability that JSON can hold."""
    return LEAST if value is None else max(float(value), LEAST)


async def whole(ask: Ask, stream: AsyncIterator[Piece], choices: list[Choice], tokenizer: Tokenizer) -> dict[str, Any]:
    """The answer in one piece."""
    texts, tokens = [""] * len(choices), [[] for _ in choices]
    async for piece in stream:
        texts[piece.choice] += piece.text
        tokens[piece.choice] += piece.tokens
    out = []
    for c, choice in enumerate(choices):
        said = {"message": {"role": "assistant", "content": texts[c], "refusal": None}} if ask.chat else {"text": texts[c]}
        out.append({"index": c, **said, "logprobs": logprobs(ask, tokens[c], tokenizer), "finish_reason": choice.finish})
    return envelope(ask, False) | {"choices": out, "usage": usage(ask, choices)}


async def chunks(ask: Ask, stream: AsyncIterator[Piece], choices: list[Choice], tokenizer: Tokenizer) -> AsyncIterator[str]:
    """The answer as server-sent events, the last of them ``[DONE]``; one that fails midway ends in an event with the error."""
    head = envelope(ask, True)

    def event(choice: dict[str, Any] | None, **more: Any) -> str:
        data = head | {"choices": [] if choice is None else [choice]} | ({"usage": None} if ask.include_usage else {}) | more
        return "data: " + json.dumps(data, separators=(",", ":")) + "\n\n"

    def delta(c: int, content: dict[str, Any], probs: Any = None, finish: str | None = None) -> str:
        return event({"index": c, "delta": content, "logprobs": probs, "finish_reason": finish})

    if ask.chat:
        for c in range(len(choices)):
            yield delta(c, {"role": "assistant", "content": ""})
    try:
        async for piece in stream:
            probs = logprobs(ask, piece.tokens, tokenizer)
            if ask.chat:
                if piece.text or probs and piece.tokens:
                    yield delta(piece.choice, {"content": piece.text}, probs)
                if piece.finish:
                    yield delta(piece.choice, {}, None, piece.finish)
            elif piece.text or probs and piece.tokens or piece.finish:
                yield event({"index": piece.choice, "text": piece.text, "logprobs": probs, "finish_reason": piece.finish})
    except ApiError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
        return
    if ask.include_usage:
        yield event(None, usage=usage(ask, choices))
    yield "data: [DONE]\n\n"
