"""What a request asks for: JSON to token ids and sampling settings, every field checked or refused by name."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..chat import Chat
from ..data.tokenizer import Tokenizer
from ..sampling import Sampling
from .errors import ApiError


@dataclass(frozen=True)
class Limits:
    """What one request may cost."""

    body_bytes: int = 4 << 20       # of the JSON
    prompt_tokens: int = 1 << 30    # of each prompt; the engine's own length comes on top
    new_tokens: int = 1 << 30       # of each answer
    choices: int = 16               # answers of one request: prompts times n
    seconds: float = 600.0          # from a request's arrival to its last token
    grace: float = 10.0             # that running requests get after SIGTERM


@dataclass(frozen=True)
class Ask:
    """One checked request. Choice c continues prompt c // n."""

    chat: bool
    model: str
    prompts: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]                # what echo repeats
    n: int
    samplings: tuple[Sampling, ...]       # one a choice
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    echo: bool
    logprobs: bool


Text = Annotated[str, Field(min_length=1, max_length=500)]
Id = Annotated[int, Field(ge=0)]
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(BaseModel):
    """``stream_options``."""

    model_config = STRICT
    include_usage: bool = False
    include_obfuscation: bool = False


class Fields(BaseModel):
    """What both endpoints take. Names and defaults are OpenAI's; from top_k to ignore_eos they are vLLM's."""

    model_config = STRICT
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1)] = 1
    stop: Text | Annotated[list[Text], Field(max_length=4)] = []
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    stop_token_ids: Annotated[list[Id], Field(max_length=64)] = []
    ignore_eos: bool = False


class ChatFields(Fields):
    """``/v1/chat/completions``."""

    messages: list[Any]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class TextFields(Fields):
    """``/v1/completions``."""

    prompt: str | list[str] | list[Id] | list[list[Id]]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False


# Fields that change nothing in the answer's text, whatever they hold.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
# Fields that would, with the values that ask for nothing we do not do.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False), "response_format": ({"type": "text"},), "logit_bias": ({},), "modalities": (["text"],),
    "frequency_penalty": (0,), "presence_penalty": (0,), "suffix": ("",), "best_of": (1,),
}


def parse(body: bytes, chat: Chat | None, tokenizer: Tokenizer, model: str, max_length: int, limits: Limits) -> Ask:
    """The request in ``body``; chat: for ``/v1/chat/completions``, None for ``/v1/completions``.

    Raises ApiError 400, naming the field, for what is malformed, out of range, too long or not supported; 404 for another model.
    """
    try:
        given = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ApiError(400, f"the body: expected a JSON object, found {type(given).__name__}")
    given = {name: value for name, value in given.items() if value is not None and name not in IGNORED}
    for name in [name for name in NEUTRAL if name in given]:
        value = given.pop(name)
        if value not in NEUTRAL[name]:
            raise ApiError(400, f"{name}: this server does not support it; leave it out", name, "unsupported_parameter")
    try:
        fields = (ChatFields if chat else TextFields).model_validate(given)
    except ValidationError as error:
        raise refusal(error) from error
    if fields.model not in (None, model):
        raise ApiError(404, f"model: expected {model!r}, found {fields.model!r}", "model", "model_not_found")
    if fields.stream_options and not fields.stream:
        raise ApiError(400, "stream_options: only together with stream: true", "stream_options")
    return ask(fields, chat, tokenizer, model, max_length, limits)


def refusal(error: ValidationError) -> ApiError:
    """The first complaint of the validator as 400."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = found[0]
    name = str(first["loc"][0]) if first["loc"] else None
    ways = dict.fromkeys(e["msg"] for e in found if e["loc"][:1] == first["loc"][:1])  # one for each type the field may have
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{'.'.join(map(str, first['loc']))}: unknown field; leave it out", name, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{name}: required, but not in the request", name, "missing_required_parameter")
    return ApiError(400, f"{name}: {'; or '.join(ways)}", name, "invalid_value")


def ask(fields: Any, chat: Chat | None, tokenizer: Tokenizer, model: str, max_length: int, limits: Limits) -> Ask:
    """Prompts to ids, lengths to limits, fields to one Sampling a choice."""
    texts: list[str] = []
    if chat:
        try:
            prompts = [tuple(chat(fields.messages))]
        except ValueError as error:
            raise ApiError(400, str(error), "messages", "invalid_value") from error
        wanted = fields.max_completion_tokens or fields.max_tokens
        if fields.top_logprobs is not None and not fields.logprobs:
            raise ApiError(400, "top_logprobs: only together with logprobs: true", "top_logprobs")
        logprobs = (fields.top_logprobs or 0) if fields.logprobs else -1
        echo = False
    else:
        prompts, texts = encoded(fields.prompt, tokenizer)
        wanted, echo = fields.max_tokens, fields.echo
        logprobs = -1 if fields.logprobs is None else fields.logprobs
        if echo and logprobs >= 0:
            raise ApiError(400, "echo: not together with logprobs; the prompt's own are not computed", "echo")
    where = "messages" if chat else "prompt"
    if len(prompts) * fields.n > limits.choices:
        raise ApiError(400, f"n: {len(prompts)} prompt(s) times n={fields.n}; at most {limits.choices} choices a request", "n")
    try:
        base = Sampling(temperature=fields.temperature, top_k=max(fields.top_k, 0), top_p=fields.top_p, min_p=fields.min_p,
                        repetition_penalty=fields.repetition_penalty, stop_token_ids=tuple(fields.stop_token_ids),
                        ignore_eos=fields.ignore_eos, logprobs=logprobs)
        samplings = [replace(base, max_new_tokens=room(len(p), wanted, max_length, limits, where),
                             seed=None if fields.seed is None else (fields.seed + j) % (1 << 63))
                     for p in prompts for j in range(fields.n)]
    except ValueError as error:
        raise ApiError(400, str(error)) from error
    stop = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop)
    return Ask(bool(chat), model, tuple(prompts), tuple(texts), fields.n, tuple(samplings), stop, fields.stream,
               bool(fields.stream_options and fields.stream_options.include_usage), echo, logprobs >= 0)


def encoded(given: str | list, tokenizer: Tokenizer) -> tuple[list[tuple[int, ...]], list[str]]:
    """(ids, text) of each prompt; text gets a bos in front where the tokenizer has one, ids stay as they are."""
    several = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    prompts, texts = [], []
    for one in several:
        if isinstance(one, str):
            ids = tokenizer.encode(one)
            prompts.append(tuple(ids if tokenizer.bos_id in (None, *ids[:1]) else [tokenizer.bos_id, *ids]))
            texts.append(one)
        else:
            prompts.append(tuple(one))
            texts.append(tokenizer.decode(one))
    if not all(prompts):
        raise ApiError(400, "prompt: expected at least one token", "prompt", "invalid_value")
    return prompts, texts


def room(prompt: int, wanted: int | None, max_length: int, limits: Limits, where: str) -> int:
    """How many tokens may follow ``prompt`` tokens. Raises ApiError 400 when they do not fit."""
    longest = min(limits.prompt_tokens, max_length - 1)
    if prompt > longest:
        raise ApiError(400, f"{where}: {prompt} tokens; this server takes at most {longest}", where, "context_length_exceeded")
    if wanted is None:
        return min(limits.new_tokens, max_length - prompt)
    if wanted > limits.new_tokens:
        raise ApiError(400, f"max_tokens: expected at most {limits.new_tokens}, found {wanted}", "max_tokens", "invalid_value")
    if prompt + wanted > max_length:
        raise ApiError(400, f"max_tokens: {prompt} tokens of {where} and {wanted} new ones are more than the model's "
                            f"{max_length}; ask for at most {max_length - prompt}", "max_tokens", "context_length_exceeded")
    return wanted
