"""The service under load and at its end, over a stand-in engine: no mixed-up texts, nothing left behind, no one waits for ever.

Planted faults seen to fail: a client that leaves not noticed; every fortieth request fed to another; requests never taken off the
list; no answer to those who wait when the engine fails; the queue without end; a key compared by its first letter; the process
killed by its own SIGTERM; no cut after the grace time.
"""
import argparse
import asyncio
import http.client
import json
import random
import signal
import threading
import time
from urllib.parse import urlsplit

import pytest

openai = pytest.importorskip("openai", reason="the service is tested with the openai package")
pytest.importorskip("fastapi", reason="the service needs the extra 'serve'")

from serve_standin import expected  # noqa: E402
from serving import at_rest, at_work, metrics, post, raw, resident, standin  # noqa: E402

SLOW = {"prompt": "slow", "max_tokens": 400, "ignore_eos": True}  # about a second of the stand-in


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
            at_work(found.url, 2)
            waiting.close()
            running.close()
            at_rest(found.url, 5)
        assert metrics(found.url)["dsv3_engine_steps_total"] < 600  # of the 1600 asked for


# -- limits ------------------------------------------------------------------------------------------------------------
def test_a_key_a_queue_sizes_and_a_time(tmp_path):
    limits = {"seconds": 1.0, "body_bytes": 2000, "prompt_tokens": 100, "new_tokens": 450}
    with standin(tmp_path, engine={"max_batch": 1, "delay": 0.005}, queue=1, limits=limits, api_key="sésame") as found:
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
        status, _, answer = ask(max_tokens=450, ignore_eos=True)  # would take over two seconds
        assert status == 504 and answer["error"]["code"] == "timeout"
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
    with standin(tmp_path, engine={"delay": 0.01}, limits={"grace": 60}) as found:
        results = []
        threads = [threading.Thread(target=lambda: results.append(post(found.url, "/v1/completions", SLOW | {"max_tokens": 200})))
                   for _ in range(3)]
        for thread in threads:
            thread.start()
        at_work(found.url, 3)
        found.process.send_signal(signal.SIGTERM)
        with pytest.raises(OSError):  # nobody listens, though not from the first moment
            for _ in range(100):
                assert raw(found.url, "GET", "/health")[0] in (200, 503)
                time.sleep(0.05)
        for thread in threads:
            thread.join()
        assert [status for status, *_ in results] == [200] * 3
        assert all(answer["usage"]["completion_tokens"] == 200 for *_, answer in results)
        assert found.process.wait(10) == 0


def test_sigterm_cuts_what_outlasts_the_grace_time(tmp_path):
    with standin(tmp_path, engine={"delay": 0.02}, limits={"grace": 0.5}) as found:
        client = openai.OpenAI(base_url=f"{found.url}/v1", api_key="any", max_retries=0)
        stream = client.completions.create(model="standin", prompt="slow", max_tokens=400, stream=True)
        texts = [next(stream).choices[0].text]
        result = []
        thread = threading.Thread(target=lambda: result.append(post(found.url, "/v1/completions", SLOW)))
        thread.start()
        at_work(found.url, 2)
        found.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            texts += [part.choices[0].text for part in stream]
        thread.join()
        assert result[0][0] == 503 and result[0][2]["error"]["code"] == "shutting_down"
        assert found.process.wait(10) == 0
        assert 0 < len("".join(texts)) < 400


def test_the_load_driver_counts_what_is_served_and_what_is_not(tmp_path):
    from dsv3.bench import serve as bench

    with standin(tmp_path, engine={"max_batch": 2}, queue=1) as found:
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
