"""What the tests of the service share: a server as a process, looked at from outside."""
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

STANDIN = Path(__file__).with_name("serve_standin.py")


@contextlib.contextmanager
def server(command, cwd, patience=120, code=0):
    """Run a server and yield url, process and log; afterwards SIGTERM, and the exit code must be ``code``."""
    log = Path(cwd) / f"server-{time.monotonic_ns()}.log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, stdout=file, stderr=subprocess.STDOUT,
                                   env={**os.environ, "DSV3_API_KEY": ""})
    try:
        deadline = time.time() + patience
        while not (found := re.search(r"at (http://\S+?)[,;]?\s", log.read_text())):
            assert process.poll() is None and time.time() < deadline, log.read_text()[-3000:]
            time.sleep(0.02)
        yield SimpleNamespace(url=found[1], process=process, log=log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == code, log.read_text()[-3000:]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def standin(cwd, code=0, **settings):
    """A server over the stand-in engine."""
    return server([STANDIN, json.dumps(settings)], cwd, code=code)


def raw(url, method, path, body=None, headers=None):
    """(status, headers, body) of one request on a connection of its own."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def post(url, path, fields, key=None):
    """(status, headers, JSON) of a request with a JSON body."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    status, given, body = raw(url, "POST", path, json.dumps(fields), headers)
    return status, given, json.loads(body)


def metrics(url):
    """Name (with its labels) -> value."""
    status, _, body = raw(url, "GET", "/metrics")
    assert status == 200
    pairs = [line.rsplit(" ", 1) for line in body.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def at_rest(url, seconds=10):
    """Wait until nothing runs or waits and every block is free; fails after ``seconds``."""
    deadline = time.time() + seconds
    while True:
        m = metrics(url)
        if m["dsv3_engine_running"] == m["dsv3_engine_waiting"] == m["dsv3_requests_live"] == 0 \
                and m["dsv3_engine_free_blocks"] == m["dsv3_engine_blocks"]:
            return m
        assert time.time() < deadline, {k: v for k, v in m.items() if "engine" in k or "live" in k}
        time.sleep(0.02)


def at_work(url, count, seconds=20):
    """Wait until so many sequences run or wait; fails after ``seconds``."""
    deadline = time.time() + seconds
    while (m := metrics(url))["dsv3_engine_running"] + m["dsv3_engine_waiting"] < count:
        assert time.time() < deadline, f"never {count} at work"
        time.sleep(0.01)


def resident(process):
    """Bytes of a process's memory."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
