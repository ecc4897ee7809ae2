"""Conversations to token ids: by the checkpoint's own template, by DeepSeek-V3's, or by a plain one.

A conversation is a sequence of {"role": ..., "content": ...}; content is a string or a list of {"type": "text", "text": ...}.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .data.tokenizer import Tokenizer

BEGIN, END, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
ROLES = ("system", "developer", "user", "assistant")

Chat = Callable[[Sequence[Mapping[str, Any]]], list[int]]


def load_chat(tokenizer: Tokenizer) -> Chat:
    """chat(messages) -> ids of the conversation up to where the assistant begins to speak.

    The template is ``chat_template.jinja`` beside the tokenizer's file, else ``chat_template`` of ``tokenizer_config.json``, as
    in `transformers`; without them DeepSeek-V3's own form where the tokenizer has its four tokens, else paragraphs that begin
    with "User:" and "Assistant:". Names of special tokens inside a message become those tokens, as everywhere in this field.

    Raises ValueError for a template that is none; chat raises ValueError, naming the message, for what it cannot express.
    """
    source = template_source(tokenizer)
    if source is not None:
        render = compile_template(source, *ends(tokenizer))
    elif all(tokenizer.token_id(name) is not None for name in (BEGIN, END, USER, ASSISTANT)):
        render = render_v3
    else:
        return lambda messages: plain(tokenizer, checked(messages))
    return lambda messages: tokenizer.encode(render(checked(messages)))


def checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The messages with their contents as strings. Raises ValueError naming the first that is not one of ours."""
    if not messages:
        raise ValueError("messages: expected at least one")
    plainer = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"messages[{i}]: expected an object with role and content, found {type(message).__name__}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"messages[{i}].role: expected one of {', '.join(ROLES)}, found {role!r}")
        if any(message.get(key) for key in ("tool_calls", "function_call", "audio", "refusal")):
            raise ValueError(f"messages[{i}]: only role and content are supported; tools, audio and refusals are not")
        if isinstance(content, (list, tuple)):
            for part in content:
                if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                    found = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                    raise ValueError(f'messages[{i}].content: expected parts {{"type": "text", "text": ...}}, found {found!r}')
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise ValueError(f"messages[{i}].content: expected a string or a list of text parts, found {type(content).__name__}")
        plainer.append({"role": "system" if role == "developer" else role, "content": content})
    return plainer


def render_v3(messages: Sequence[Mapping[str, str]]) -> str:
    """DeepSeek-V3's form (``chat_template`` of its tokenizer_config.json): system messages first, wherever they stand."""
    text = BEGIN + "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    for m in messages:
        if m["role"] == "user":
            text += USER + m["content"]
        elif m["role"] == "assistant":
            text += ASSISTANT + m["content"] + END
    return text + ASSISTANT


def plain(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """For a tokenizer without tokens for turns: bos, then paragraphs; eos after what the assistant has said."""
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for m in messages:
        name = "" if m["role"] == "system" else f"{m['role'].capitalize()}: "
        ids += tokenizer.encode(f"{name}{m['content']}")
        ids += [tokenizer.eos_id] if m["role"] == "assistant" and tokenizer.eos_id is not None else []
        ids += tokenizer.encode("\n\n")
    return ids + tokenizer.encode("Assistant:")


# -- templates of checkpoints ------------------------------------------------------------------------------------------
def settings_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """``tokenizer_config.json`` beside the tokenizer's file; empty when there is none."""
    path = Path(tokenizer.name).with_name("tokenizer_config.json")
    return json.loads(path.read_text(encoding="utf-8")) if Path(tokenizer.name).is_file() and path.is_file() else {}


def ends(tokenizer: Tokenizer) -> tuple[str, str]:
    """The texts of bos and eos, "" for one the tokenizer has not."""
    said, texts = settings_of(tokenizer), []
    for key, number in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        name = said.get(key)
        name = name.get("content") if isinstance(name, dict) else name
        texts.append(name or ("" if number is None else tokenizer.decode([number])))
    return texts[0], texts[1]


def template_source(tokenizer: Tokenizer) -> str | None:
    """The text of the checkpoint's template, if it has one; of several the one named default."""
    file = Path(tokenizer.name).with_name("chat_template.jinja")
    if Path(tokenizer.name).is_file() and file.is_file():
        return file.read_text(encoding="utf-8")
    found = settings_of(tokenizer).get("chat_template")
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    return found


def compile_template(source: str, bos: str = "", eos: str = "") -> Callable[[Sequence[Mapping[str, str]]], str]:
    """render(messages) of a Hugging Face chat template, in jinja's sandbox and with the names `transformers` gives it.

    Raises ValueError if it is no template; render raises ValueError with the template's own words if it refuses the messages.
    """
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
               sort_keys: bool = False) -> str:  # jinja's own would escape < and >, which are meant literally here
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"chat_template: not a template that jinja can read: {error}") from error

    def render(messages: Sequence[Mapping[str, str]]) -> str:
        try:
            return template.render(messages=messages, tools=None, documents=None, bos_token=bos, eos_token=eos,
                                   add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"messages: the model's chat template refuses them: {error}") from error

    return render
