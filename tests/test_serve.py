"""The service from outside, over a stand-in engine whose answers a rule gives: real processes, sockets and `openai` client.

Planted faults seen to fail: a client that leaves not noticed; every fortieth request fed to another; a choice that goes on
after its stop string; no answer to those who wait when the engine fails; the queue without end; the process killed by its own
SIGTERM; no cut after the grace time; a key compared by its first letter; requests never taken off
the list; unsupported fields ignored; a client that leaves within its body taken for a fault of the server.
"""
import argparse
import asyncio
import http.client
import json
import random
import signal
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest

openai = pytest.importorskip("openai", reason="the service is tested with the openai package")
pytest.importorskip("fastapi", reason="the service needs the extra 'serve'")

from serve_standin import BYTE, rule  # noqa: E402
from serving import at_rest, metrics, post, raw, resident, standin  # noqa: E402

SLOW = {"prompt": "slow", "max_tokens": 400, "ignore_eos": True}  # about a second of the stand-in


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server that all tests with ordinary requests share; at their end nothing is left in it."""
    with standin(tmp_path_factory.mktemp("serve"), limits={"queue": 100, "choices": 8}) as found:
        yield found.url
        at_rest(found.url)
        assert "Traceback" not in found.log.read_text()


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


def expected(text, count, seed=None):
    """What the stand-in answers to a text prompt."""
    return BYTE.decode(rule([BYTE.bos_id, *BYTE.encode(text)], seed, count))


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


# -- many at once ------------------------------------------------------------------------------------------------------
async def crowd(url, clients, rounds, rng):
    """Clients that stream, wait, hang up midway or never listen; returns how many answers were right."""
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60)
    right = 0

    async def one(number):
        nonlocal right
        for i in range(rounds):
            prompt, count, way = f"{number}:{i} {rng.random()}", rng.randint(20, 60), rng.randrange(4)
            ask = {"model": "standin", "prompt": prompt, "max_tokens": count, "temperature": 0}
            if way == 0:
                text = (await client.completions.create(**ask)).choices[0].text
            elif way == 1:  # a client that hangs up without waiting for anything
                task = asyncio.create_task(client.completions.create(**ask))
                await asyncio.sleep(rng.random() * 0.05)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                continue
            else:
                stream = await client.completions.create(**ask, stream=True)
                text, leave = "", rng.randint(1, 15) if way == 2 else 10**9
                async for part in stream:
                    text += part.choices[0].text
                    if len(text) > leave:
                        break
                if way == 2:
                    await stream.close()
                    assert expected(prompt, count).startswith(text), (prompt, text)
                    continue
            assert text == expected(prompt, count), (prompt, text)
            right += 1

    await asyncio.gather(*(one(n) for n in range(clients)))
    await client.close()
    return right


def test_many_clients_some_hang_up_nobody_gets_anothers_text_and_nothing_leaks(tmp_path):
    with standin(tmp_path, engine={"delay": 0.0005, "max_batch": 8}) as found:
        asyncio.run(crowd(found.url, 8, 8, random.Random(1)))
        before = resident(found.process)
        at_rest(found.url)
        right = asyncio.run(crowd(found.url, 24, 10, random.Random(2)))
        m = at_rest(found.url)
        assert right > 60 and m['dsv3_choices_finished_total{reason="cut"}'] > 10
        assert resident(found.process) - before < 12 << 20


def test_a_client_that_has_gone_frees_its_place_at_once(tmp_path):
    with standin(tmp_path, engine={"max_batch": 1, "delay": 0.01}) as found:
        def hang_up(fields):
            connection = http.client.HTTPConnection(urlsplit(found.url).netloc)
            connection.request("POST", "/v1/completions", json.dumps(SLOW | fields), {"Content-Type": "application/json"})
            return connection

        for fields in ({"stream": True}, {}):
            running, waiting = hang_up(fields), hang_up(fields)  # four seconds of work each
            deadline = time.time() + 5
            while (m := metrics(found.url))["dsv3_engine_running"] + m["dsv3_engine_waiting"] < 2:
                assert time.time() < deadline
                time.sleep(0.01)
            start = time.time()
            waiting.close()
            running.close()
            at_rest(found.url, 2)
            assert time.time() - start < 2
        assert metrics(found.url)["dsv3_engine_steps_total"] < 200  # of the 1600 asked for


# -- limits ------------------------------------------------------------------------------------------------------------
def test_a_key_a_queue_sizes_and_a_time(tmp_path):
    limits = {"queue": 1, "seconds": 1.0, "body_bytes": 2000, "prompt_tokens": 100, "new_tokens": 450}
    with standin(tmp_path, engine={"max_batch": 1, "delay": 0.005}, limits=limits, api_key="sésame") as found:
        url = found.url
        for key in (None, "", "sesame", "sésame2"):
            headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
            for method, path in (("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"),
                                 ("GET", "/metrics")):
                status, answer, body = raw(url, method, path, b"{}", headers)
                assert status == 401 and answer["www-authenticate"] == "Bearer"
                assert json.loads(body)["error"]["code"] == "invalid_api_key"
        assert raw(url, "GET", "/health")[0] == raw(url, "GET", "/")[0] == 200
        key = {"Authorization": "Bearer sésame".encode()}

        def ask(**fields):
            body = json.dumps({"prompt": "x", "max_tokens": 2} | fields)
            status, headers, body = raw(url, "POST", "/v1/completions", body, key)
            return status, headers, json.loads(body) if not fields.get("stream") else body.decode()

        assert ask()[0] == 200
        assert ask(prompt="x" * 101)[2]["error"]["code"] == "context_length_exceeded"
        assert ask(max_tokens=451)[2]["error"]["param"] == "max_tokens"
        for size in (3000, 10**6):
            status, _, answer = ask(prompt="x" * size)
            assert status == 413 and answer["error"]["code"] == "body_too_large"
        start = time.time()
        status, _, answer = ask(max_tokens=450, ignore_eos=True)  # would take over two seconds
        assert status == 504 and answer["error"]["code"] == "timeout" and time.time() - start < 2
        status, _, text = ask(max_tokens=450, ignore_eos=True, stream=True)
        assert status == 200 and json.loads(text.split("data: ")[-1])["error"]["code"] == "timeout" and "[DONE]" not in text
        statuses = []
        threads = [threading.Thread(target=lambda: statuses.append(ask(max_tokens=60, ignore_eos=True))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(s for s, *_ in statuses).count(429) >= 3 and {s for s, *_ in statuses} == {200, 429}
        status, headers, answer = next(s for s in statuses if s[0] == 429)
        assert int(headers["retry-after"]) >= 1 and answer["error"]["type"] == "rate_limit_error"
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


# -- failure and end ---------------------------------------------------------------------------------------------------
def test_a_failing_engine_answers_everyone_and_says_so(tmp_path):
    with standin(tmp_path, engine={"explode": 30}) as found:
        results = []
        threads = [threading.Thread(target=lambda: results.append(post(found.url, "/v1/completions", SLOW))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert [status for status, *_ in results] == [500] * 6
        assert all("planted failure" in answer["error"]["message"] for *_, answer in results)
        assert raw(found.url, "GET", "/health")[0] == 500 and post(found.url, "/v1/completions", {"prompt": "x"})[0] == 500
        assert metrics(found.url)["dsv3_engine_up"] == 0
        assert "RuntimeError: planted failure" in found.log.read_text()


def test_sigterm_lets_running_requests_finish(tmp_path):
    with standin(tmp_path, engine={"delay": 0.005}, limits={"grace": 20}) as found:
        results = []
        threads = [threading.Thread(target=lambda: results.append(post(found.url, "/v1/completions", SLOW | {"max_tokens": 200})))
                   for _ in range(3)]
        for thread in threads:
            thread.start()
        while metrics(found.url)["dsv3_engine_running"] < 3:
            time.sleep(0.01)
        found.process.send_signal(signal.SIGTERM)
        time.sleep(0.4)
        with pytest.raises(OSError):
            raw(found.url, "GET", "/health")
        for thread in threads:
            thread.join()
        assert [status for status, *_ in results] == [200] * 3
        assert all(answer["usage"]["completion_tokens"] == 200 for *_, answer in results)
        start = time.time()
        found.process.wait(5)
        assert time.time() - start < 3


def test_sigterm_cuts_what_outlasts_the_grace_time(tmp_path):
    with standin(tmp_path, engine={"delay": 0.02}, limits={"grace": 0.5}) as found:
        client = openai.OpenAI(base_url=f"{found.url}/v1", api_key="any", max_retries=0)
        stream = client.completions.create(model="standin", prompt="slow", max_tokens=400, stream=True)
        texts = [next(stream).choices[0].text]
        result = []
        thread = threading.Thread(target=lambda: result.append(post(found.url, "/v1/completions", SLOW)))
        thread.start()
        time.sleep(0.2)
        found.process.send_signal(signal.SIGTERM)
        start = time.time()
        with pytest.raises(openai.APIError, match="shutting down"):
            texts += [part.choices[0].text for part in stream]
        thread.join()
        assert result[0][0] == 503 and result[0][2]["error"]["code"] == "shutting_down"
        assert found.process.wait(10) == 0 and time.time() - start < 3
        assert 0 < len("".join(texts)) < 400


def test_the_load_driver_counts_what_is_served_and_what_is_not(tmp_path):
    from dsv3.bench import serve as bench

    with standin(tmp_path, engine={"max_batch": 2}, limits={"queue": 1}) as found:
        args = argparse.Namespace(url=found.url, clients=[1, 12], requests=24, prompt=20, tokens=20, api_key=None)
        one, many = bench.levels(found.url, args)
        assert (one["served"], one["errors"]) == (24, 0)
        assert one["latency"]["p50"] <= one["latency"]["p99"] < one["seconds"]
        assert one["first_token"]["p50"] < one["latency"]["p50"]
        assert one["tokens_per_second"] * one["seconds"] == pytest.approx(480)
        assert many["served"] + many["errors"] == 24 and many["errors"] > 0 and many["error"].startswith("429")
        assert bench.left(found.url, None) == {"requests": 0, "blocks": 0}
        table = bench.table({"levels": [one, many], "machine": {"cpu": "a processor", "cpus": 2, "load": 0.0}})
        assert "429" in table and len(table.splitlines()) == 4
        with pytest.raises(ValueError, match="--requests 0"):
            bench.run(argparse.Namespace(**vars(args) | {"requests": 0}))
