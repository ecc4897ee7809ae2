"""The service from outside, over a stand-in engine whose answers a rule gives: what it answers and what it refuses.

Planted faults seen to fail: a choice that goes on after its stop string; unsupported fields ignored; a client that leaves within
its body taken for a fault of the server.
"""
import json
import random
import socket
import time
from urllib.parse import urlsplit

import pytest

openai = pytest.importorskip("openai", reason="the service is tested with the openai package")
pytest.importorskip("fastapi", reason="the service needs the extra 'serve'")

from serve_standin import BYTE, expected  # noqa: E402
from serving import at_rest, metrics, post, raw, standin  # noqa: E402


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server that all tests with ordinary requests share; at their end nothing is left in it."""
    with standin(tmp_path_factory.mktemp("serve"), queue=100, limits={"choices": 8}) as found:
        yield found.url
        at_rest(found.url)
        assert "Traceback" not in found.log.read_text()


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


# -- shapes ------------------------------------------------------------------------------------------------------------
def test_chat(client):
    answer = client.chat.completions.create(model="standin", messages=[
        {"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "say:Grüße 🙂"}]}])
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == ("Grüße 🙂", "assistant", "stop")
    said = len("Grüße 🙂".encode()) + 1  # and eos
    prompt = len(BYTE.encode("x\n\nUser: say:Grüße 🙂\n\nAssistant:")) + 1
    used = answer.usage
    assert (used.completion_tokens, used.prompt_tokens, used.total_tokens) == (said, prompt, said + prompt)
    assert answer.object == "chat.completion" and answer.model == "standin" and answer.created > 1e9


def test_chat_in_pieces(client):
    messages = [{"role": "user", "content": "say:a中🙂é" * 5}]
    stream = client.chat.completions.create(model="standin", messages=messages, stream=True, max_completion_tokens=200,
                                            stream_options={"include_usage": True})
    parts = list(stream)
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices == [] and parts[-1].usage.completion_tokens == 11
    texts = [p.choices[0].delta.content or "" for p in parts[:-1]]
    assert "".join(texts) == "a中🙂é" and not any("\ufffd" in t for t in texts)
    assert [p.choices[0].finish_reason for p in parts[:-1] if p.choices[0].finish_reason] == ["stop"]
    assert len({p.id for p in parts}) == 1 and all(p.usage is None for p in parts[:-1])


def test_completions_take_every_form_of_prompt(client):
    ids = [BYTE.bos_id, *BYTE.encode("one")]
    for prompt, texts in (("one", ["one"]), (["one", "two"], ["one", "two"]), (ids, ["one"]), ([ids, ids], ["one", "one"])):
        answer = client.completions.create(model="standin", prompt=prompt, max_tokens=9, temperature=0)
        assert [c.text for c in answer.choices] == [expected(t, 9) for t in texts]
        assert [c.index for c in answer.choices] == list(range(len(texts)))
        assert all(c.finish_reason == "length" for c in answer.choices)
        assert answer.usage.prompt_tokens == sum(len(t) + 1 for t in texts) and answer.usage.completion_tokens == 9 * len(texts)


def test_n_seeds_and_echo(client):
    ask = {"model": "standin", "prompt": ["one", "two"], "n": 3, "seed": 7, "max_tokens": 12, "echo": True}
    answer = client.completions.create(**ask)
    assert [c.text for c in answer.choices] == [t + expected(t, 12, seed) for t in ("one", "two") for seed in (7, 8, 9)]
    streamed = [""] * 6
    for part in client.completions.create(**ask, stream=True):
        streamed[part.choices[0].index] += part.choices[0].text
    assert streamed == [c.text for c in answer.choices]


def test_stop_strings_and_ids(client):
    def ask(text, **more):
        return client.completions.create(model="standin", prompt=f"say:{text}", max_tokens=300, **more).choices[0]

    assert ask("one END two", stop="END").text == "one "
    assert ask("one END two", stop=["xyz", "wo", "ND"]).text == "one E"
    assert ask("a;b", extra_body={"stop_token_ids": [ord(";")]}).text == "a"
    choice = ask("ab", extra_body={"ignore_eos": True, "max_tokens": 7})
    assert (choice.text, choice.finish_reason) == ("ababa", "length")  # ids: a b eos a b eos a
    parts = client.completions.create(model="standin", prompt="say:one EN. END two", max_tokens=300, stop="END", stream=True)
    assert "".join(p.choices[0].text for p in parts) == "one EN. "


def test_a_stop_string_ends_the_engines_work_too(client, url):
    before = metrics(url)["dsv3_engine_generated_tokens_total"]
    answer = client.completions.create(model="standin", prompt=["say:aEND" + "x" * 300, "slow"], max_tokens=100, stop="END")
    assert [(c.text, c.finish_reason) for c in answer.choices] == [("a", "stop"), (expected("slow", 100), "length")]
    assert answer.usage.completion_tokens == 104 and metrics(url)["dsv3_engine_generated_tokens_total"] - before < 150


def test_logprobs(client):
    ask = {"model": "standin", "messages": [{"role": "user", "content": "say:aé"}], "logprobs": True}
    chat = client.chat.completions.create(**ask, top_logprobs=2).choices[0].logprobs.content
    assert [(e.token, e.logprob, e.bytes) for e in chat] == [("a", -0.5, [97]), ("\ufffd", -0.5, None), ("\ufffd", -0.5, None)]
    assert [(t.token, t.logprob) for t in chat[0].top_logprobs] == [("a", -1.0), ("b", -2.0)]
    text = client.completions.create(model="standin", prompt="say:a-b", logprobs=1, max_tokens=9).choices[0].logprobs
    assert (text.tokens, text.token_logprobs, text.text_offset) == (["a", "-", "b"], [-0.5] * 3, [0, 1, 2])
    assert text.top_logprobs == [{"a": -1.0}] * 3
    parts = client.chat.completions.create(**ask, stream=True)
    assert sum(len(p.choices[0].logprobs.content) for p in parts if p.choices[0].logprobs) == 3


def test_models_health_metrics_and_page(client, url):
    assert [m.id for m in client.models.list()] == ["standin"] and client.models.retrieve("standin").owned_by == "dsv3"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert raw(url, "GET", "/health")[::2] == (200, b'{"status":"ok"}')
    status, headers, page = raw(url, "GET", "/")
    assert status == 200 and "default-src 'none'" in headers["content-security-policy"] and page.startswith(b"<!doctype html>")
    before = metrics(url)
    client.completions.create(model="standin", prompt="x", max_tokens=5)
    after = metrics(url)
    for name, more in (("dsv3_engine_generated_tokens_total", 5), ("dsv3_first_token_seconds_count", 1),
                       ('dsv3_http_requests_total{path="/v1/completions",status="200"}', 1),
                       ('dsv3_choices_finished_total{reason="length"}', 1)):
        assert after[name] - before.get(name, 0) == more, name


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fields, param", [
    ({"temperature": -1}, "temperature"), ({"temperature": "hot"}, "temperature"), ({"top_p": 0}, "top_p"), ({"n": 0}, "n"),
    ({"n": 9}, "n"), ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 9999}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"),
    ({"stop": ["a"] * 5}, "stop"), ({"stop": ""}, "stop"), ({"seed": "x"}, "seed"), ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"), ({"top_k": -2}, "top_k"), ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"nonsense": 1}, "nonsense"), ({"logit_bias": {"5": 1}}, "logit_bias"), ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"presence_penalty": 1}, "presence_penalty"), ({"prompt": []}, "prompt"), ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": None}, "prompt"), ({"prompt": {}}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": "x" * 600}, "prompt"),
    ({"prompt": [400]}, None), ({"logprobs": 21}, "logprobs"), ({"echo": True, "logprobs": 1}, "echo"),
    ({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of"), ({"model": 5}, "model"),
    ({"seed": None, "user": "me", "temperature": None}, ...), ({"seed": -5}, ...), ({"prompt": ""}, ...),  # bos alone
    ({"frequency_penalty": 0, "logit_bias": {}, "presence_penalty": 0.0, "best_of": 1}, ...),
], ids=lambda v: str(v)[:40])
def test_fields_of_completions(url, fields, param):
    status, _, answer = post(url, "/v1/completions", {"prompt": "x", "max_tokens": 3} | fields)
    if param is ...:
        assert status == 200, answer
        return
    error = answer["error"]
    assert status == 400 and error["type"] == "invalid_request_error" and error["param"] == param and set(error) == {
        "message", "type", "param", "code"}
    assert param is None or param in error["message"]


@pytest.mark.parametrize("fields, param", [
    ({"tools": [{"type": "function"}]}, "tools"), ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "alien", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"top_logprobs": 3}, "top_logprobs"), ({"logprobs": 3}, "logprobs"), ({"modalities": ["audio"]}, "modalities"),
    ({"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "parallel_tool_calls": True}, ...),
], ids=lambda v: str(v)[:40])
def test_fields_of_chat(url, fields, param):
    status, _, answer = post(url, "/v1/chat/completions", {"messages": [{"role": "user", "content": "say:x"}]} | fields)
    assert status == (200 if param is ... else 400), answer
    assert param is ... or answer["error"]["param"] == param


def test_unknown_models_routes_and_methods(client, url):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-9", prompt="x")
    assert caught.value.body["code"] == "model_not_found" and caught.value.body["param"] == "model"
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("DELETE", "/", 405),
                                 ("GET", "/docs", 404), ("GET", "/openapi.json", 404)):
        found, _, body = raw(url, method, path)
        assert found == status and "error" in json.loads(body)


def test_pages_from_elsewhere_cannot_use_a_local_server(url):
    body, port = json.dumps({"prompt": "x", "max_tokens": 2}), urlsplit(url).port
    for host, status in ((f"127.0.0.1:{port}", 200), ("localhost", 200), (f"[::1]:{port}", 200), ("[::1]", 200),
                         ("evil.example", 403), (f"evil.example:{port}", 403), ("localhost.evil.example", 403), ("", 403)):
        assert raw(url, "POST", "/v1/completions", body, {"Host": host})[0] == status, host
    # what browsers send to another origin without asking first
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert raw(url, "POST", "/v1/completions", body, {"Content-Type": kind})[0] == 415
    status, headers, _ = raw(url, "OPTIONS", "/v1/completions", headers={"Origin": "http://evil.example"})
    assert status == 405 and not any(name.lower().startswith("access-control") for name in headers)


def test_bad_bodies_are_refused_and_nothing_breaks(url):
    rng = random.Random(5)
    good = json.dumps({"prompt": "say:hi", "max_tokens": 5, "stop": ["x", "y"], "stream": False}).encode()
    seen = set()
    for _ in range(250):
        body = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(body))
            change = rng.randrange(3)
            if change == 0:
                body[at] = rng.randrange(256)
            elif change == 1:
                del body[at:at + rng.randint(1, 5)]
            else:
                body[at:at] = rng.choice([b"[" * 500, b'"\\ud800"', b"NaN", b"1e999", b"9" * 5000, b"null,", b"{}", b"\x00"])
        status, _, answer = raw(url, "POST", "/v1/completions", bytes(body))
        seen.add(status)
        assert status in (200, 400, 404), (status, bytes(body))
        assert status == 200 or set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}
    assert {200, 400} <= seen
    deep = b'{"prompt":' + b"[" * 100000 + b"]" * 100000 + b"}"
    assert raw(url, "POST", "/v1/completions", deep)[0] == 400
    with socket.create_connection(urlsplit(url).netloc.split(":")) as s:  # not even HTTP
        s.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        assert b"400" in s.recv(1000)
    with socket.create_connection(urlsplit(url).netloc.split(":")) as s:  # hangs up within the body
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                  b"Content-Length: 99\r\n\r\n{")
        time.sleep(0.2)
    at_rest(url)
