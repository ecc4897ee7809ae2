"""Conversations to ids: goldens rendered by `transformers` (``goldens/make_chat.py``), both defaults, and what is refused.

Planted faults seen to fail: system messages left where they stand; no end token after the assistant; trim_blocks off; jinja's
own tojson; the template beside the tokenizer ignored; image parts dropped in silence; a template out of the sandbox.
"""
import json

import pytest
from conftest import GOLDENS

from dsv3.chat import ASSISTANT, BEGIN, END, USER, compile_template, load_chat, render_v3
from dsv3.data.tokenizer import byte_tokenizer, load_tokenizer, train_bpe

GOLDEN = json.loads((GOLDENS / "chat.json").read_text(encoding="utf-8"))
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Bye"}]


@pytest.fixture
def v3(tmp_path):
    """A small tokenizer with DeepSeek-V3's tokens for turns, its bos and eos."""
    train_bpe(["hello there"] * 5, 300, tmp_path, extra_tokens=[BEGIN, END, USER, ASSISTANT])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": BEGIN}, "eos_token": END}))
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize("case", GOLDEN["v3"], ids=lambda c: c["messages"][0]["content"][:12])
def test_the_default_is_deepseek_v3s_template(case, v3):
    assert render_v3(case["messages"]) == case["text"]
    ids = load_chat(v3)(case["messages"])
    assert v3.decode(ids) == case["text"] and ids[0] == v3.token_id(BEGIN) and ids.count(v3.bos_id) == 1
    assert ids.count(v3.eos_id) == sum(m["role"] == "assistant" for m in case["messages"])


@pytest.mark.parametrize("case", GOLDEN["templates"], ids=lambda c: c["source"][:20])
def test_templates_render_as_in_transformers(case):
    assert compile_template(case["source"], BEGIN, END)(case["messages"]) == case["text"]


def test_the_checkpoints_own_template_comes_first(v3, tmp_path):
    config = {"bos_token": BEGIN, "eos_token": END, "chat_template": "{{ bos_token }}{{ messages[-1].content }}{{ eos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert v3.decode(load_chat(v3)(TALK)) == f"{BEGIN}Bye{END}"
    config["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "a list"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert v3.decode(load_chat(v3)(TALK)) == "a list"
    (tmp_path / "chat_template.jinja").write_text("a file: {{ messages | length }}")
    assert v3.decode(load_chat(v3)(TALK)) == "a file: 4"


def test_a_tokenizer_without_turns_gets_readable_lines():
    tokenizer = byte_tokenizer()
    ids = load_chat(tokenizer)(TALK)
    assert tokenizer.decode(ids) == "<bos>Be brief.\n\nUser: Hi\n\nAssistant: Yes?<eos>\n\nUser: Bye\n\nAssistant:"
    assert ids.count(tokenizer.bos_id) == ids.count(tokenizer.eos_id) == 1


def test_parts_and_the_developers_role():
    tokenizer = byte_tokenizer()
    chat = load_chat(tokenizer)
    parts = [{"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]}, *TALK[1:]]
    assert chat(parts) == chat(TALK)


@pytest.mark.parametrize("messages, words", [
    ([], "messages: expected at least one"),
    (["hi"], r"messages\[0\]: expected an object"),
    ([{"role": "tool", "content": "x"}], r"messages\[0\].role: expected one of system, .* found 'tool'"),
    ([TALK[1], {"role": "user"}], r"messages\[1\].content: expected a string"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], r"messages\[0\].content: .* 'image_url'"),
    ([{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}], r"messages\[0\]: only role and content"),
])
def test_what_it_cannot_express_is_refused_by_name(messages, words):
    with pytest.raises(ValueError, match=words):
        load_chat(byte_tokenizer())(messages)


def test_a_template_refuses_in_its_own_words_and_stays_in_its_box():
    with pytest.raises(ValueError, match="refuses them: roles must alternate"):
        compile_template("{{ raise_exception('roles must alternate') }}")(TALK)
    with pytest.raises(ValueError, match="not a template that jinja can read"):
        compile_template("{% for %}")
    for source in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ ''.__class__.__base__ }}"):
        with pytest.raises(ValueError, match="refuses them"):
            compile_template(source)(TALK)
