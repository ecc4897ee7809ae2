"""``dsv3 generate --mesh`` and ``dsv3 serve --mesh`` as real processes on CPUs: what one device answers, and how they end.

Planted faults this file was seen to catch, one at a time:
rank 0's slices on all ranks; a number used up by a request that rank 0 refuses; another rank's signal not heeded by rank 0, or
not passed on to it; the ids that end a text not told to the others.
"""
import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

openai = pytest.importorskip("openai", reason="the service is tested with the openai package")
pytest.importorskip("fastapi", reason="the service needs the extra 'serve'")

from cluster import environment, free_port, msrun  # noqa: E402
from serving import at_rest, metrics, post, raw  # noqa: E402
from test_serve_cli import CFG, WORDS, ask, checkpoint  # noqa: E402, F401 (a fixture)

import dsv3  # noqa: E402
from dsv3.checkpoint.training import save_training  # noqa: E402
from dsv3.cli.generate import continued  # noqa: E402
from dsv3.cli.main import main  # noqa: E402
from dsv3.data import load_tokenizer  # noqa: E402
from dsv3.parallel.watch import LOST  # noqa: E402
from dsv3.sampling import Sampling  # noqa: E402

PROMPT = "the quick"
SERVE = ["--port", "0", "--max-batch", "2", "--max-length", "128", "--max-choices", "2", "--lazy"]


@pytest.fixture(scope="module")
def alone(checkpoint):  # noqa: F811
    """What one device answers: a function of a text and settings."""
    params, cfg = dsv3.load(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    engine = dsv3.Engine(params, cfg, max_batch=1, max_length=128, eos_token_ids=(tokenizer.eos_id,))

    def text(prompt, **settings):
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        return continued(engine, tokenizer, ids, Sampling(max_new_tokens=24, **settings), (), lambda piece: None)

    return text


def log_of(folder, rank):
    path = folder / "logs" / f"worker_{rank}.log"
    return path.read_bytes().decode(errors="replace") if path.exists() else ""  # a text may have any line ends


def wait_for(found, process, folder, seconds=120):
    """What ``found()`` answers once it is something; fails when the process ends or the time is up."""
    deadline = time.monotonic() + seconds
    while not (answer := found()):
        assert process.poll() is None and time.monotonic() < deadline, log_of(folder, 0)[-3000:] + log_of(folder, 1)[-3000:]
        time.sleep(0.05)
    return answer


def assert_success(code, folder, said):
    """All ranks ended with 0; one that MindSpore breaks off after its last line (see ``cluster.run_ranks``) is a warning."""
    if code and re.findall(r"Error code: (-?\d+)", said) == ["-11"]:
        warnings.warn(f"a rank ended with a segmentation fault, after all that it had to do\n{said[-1000:]}", stacklevel=2)
        return
    assert code == 0, said[-1000:] + log_of(folder, 0)[-3000:] + log_of(folder, 1)[-3000:]


def pid_of(folder, rank):
    return int(re.search(r"\(process (\d+)", log_of(folder, rank))[1])


@contextlib.contextmanager
def service(folder, *command):
    """A service of two ranks under msrun: its url and process; whatever happens, none of them is left."""
    with (folder / "msrun.log").open("w") as log:
        process = subprocess.Popen(msrun(2, folder / "logs", "python", "-m", "dsv3", "serve", *command), cwd=folder,
                                   env=environment(DSV3_API_KEY=""), stdout=log, stderr=subprocess.STDOUT)
    try:
        url = wait_for(lambda: re.search(r"at (http://\S+?)[,;]", log_of(folder, 0)), process, folder)[1]
        yield SimpleNamespace(url=url, process=process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # at which it kills its ranks
            process.wait(60)


@pytest.mark.parametrize("mesh, options", [
    ("model=2", []), pytest.param("data=2,expert=2", ["--quantize", "w8a8", "--speculative"], marks=pytest.mark.slow)])
def test_generate_writes_what_one_device_writes(checkpoint, tmp_path, capsys, mesh, options):  # noqa: F811
    """Heads, ffn and vocabulary cut, or the experts; drafts and draws; of the folder of a training run."""
    params, cfg = dsv3.load(checkpoint)
    save_training(tmp_path / "run", 3, params, {"step": np.int32(3)}, {}, cfg=cfg)
    for file in checkpoint.glob("tokenizer*.json"):
        shutil.copy(file, tmp_path / "run")
    command = ["generate", str(tmp_path / "run"), "--prompt", PROMPT, "--max-new-tokens", "16", "--temperature", "0.8",
               "--seed", "3", *options]
    assert main(command) == 0
    text, drafts = capsys.readouterr()
    done = subprocess.run(msrun(2, tmp_path / "logs", "python", "-m", "dsv3", *command, "--mesh", mesh), cwd=tmp_path,
                          env=environment(), capture_output=True, text=True, timeout=300)
    assert_success(done.returncode, tmp_path, done.stdout + done.stderr)
    assert text.startswith(PROMPT) and len(text) > len(PROMPT) + 5
    assert text in log_of(tmp_path, 0) and drafts in log_of(tmp_path, 0)
    held = [int(re.search(rf"mesh {mesh}, holds ([\d,]+)", log_of(tmp_path, rank))[1].replace(",", "")) for rank in (0, 1)]
    assert held[0] == held[1] < 0.8 * dsv3.tree.size(params)
    assert PROMPT not in log_of(tmp_path, 1)


def test_clients_of_a_cut_model_get_what_one_device_answers(checkpoint, alone, tmp_path):  # noqa: F811
    """data=2, expert=2: the experts are cut. Streams at once, more than run together; refused, cancelled; SIGTERM."""
    with service(tmp_path, checkpoint, "--mesh", "data=2,expert=2", "--cache-tokens", "96", *SERVE) as server:
        asks = [(text, way) for text in WORDS[:4] for way in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 5})]
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)

        async def one(text, way):
            parts = [part async for part in await client.completions.create(**ask(text) | way, stream=True)]
            return "".join(part.choices[0].text for part in parts)

        async def leaves(text):
            stream = await client.completions.create(**ask(text) | {"max_tokens": 80}, stream=True)
            async for _ in stream:
                await stream.close()
                return

        async def crowd():
            texts = asyncio.gather(*(one(text, way) for text, way in asks))
            await asyncio.gather(*(leaves("a") for _ in range(3)))
            return await texts

        refused = post(server.url, "/v1/completions", ask(["a", "x " * 20]) | {"max_tokens": 80})
        assert refused[0] == 400 and "blocks" in refused[2]["error"]["message"], refused
        assert asyncio.run(crowd()) == [alone(text, **way) for text, way in asks]
        assert at_rest(server.url)["dsv3_engine_generated_tokens_total"] > 24 * 4
        assert raw(server.url, "GET", "/health")[0] == 200 and metrics(server.url)["dsv3_engine_up"] == 1
        unseeded = post(server.url, "/v1/completions", ask("the") | {"temperature": 1.5})
        assert unseeded[0] == 200
        os.kill(pid_of(tmp_path, 1), signal.SIGTERM)  # any rank
        assert_success(server.process.wait(60), tmp_path, (tmp_path / "msrun.log").read_text())
    assert "Traceback" not in log_of(tmp_path, 0) + log_of(tmp_path, 1)


@contextlib.contextmanager
def ranks(folder, *command):
    """(rank 0, rank 1) of a service, as msrun starts them, but not killed by it when one ends; logs where msrun has them."""
    shared = environment(MS_WORKER_NUM="2", MS_SCHED_HOST="127.0.0.1", MS_SCHED_PORT=free_port(), DSV3_API_KEY="")
    roles = {"scheduler": {"MS_ROLE": "MS_SCHED"}}
    roles |= {f"worker_{i}": {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": str(i), "DEVICE_ID": str(i)} for i in range(2)}
    (folder / "logs").mkdir()
    processes = []
    for name, role in roles.items():
        with (folder / "logs" / f"{name}.log").open("w") as log:
            processes.append(subprocess.Popen(["python", "-m", "dsv3", "serve", *map(str, command)], cwd=folder,
                                              env=shared | role, stdout=log, stderr=subprocess.STDOUT))
    try:
        yield processes[1:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("lost", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_service(checkpoint, tmp_path, lost):  # noqa: F811
    with ranks(tmp_path, checkpoint, "--mesh", "data=2", *SERVE) as processes:
        wait_for(lambda: "dsv3 serve: " in log_of(tmp_path, 0), processes[0], tmp_path)
        processes[lost].kill()
        began = time.monotonic()
        assert processes[1 - lost].wait(30) == LOST and time.monotonic() - began < 15
        assert f"rank {lost} has ended, or cannot be reached any more" in log_of(tmp_path, 1 - lost)


def test_what_cannot_be_cut_is_told_in_a_line(checkpoint, capsys, monkeypatch):  # noqa: F811
    for name in ("MS_ROLE", "RANK_TABLE_FILE", "MS_WORKER_NUM", "RANK_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for command in (["generate", str(checkpoint), "--prompt", "a"], ["serve", str(checkpoint), "--port", "0"]):
        for mesh, words in (("pipe=2", "pipe=2"), ("context=4", "context=4"), ("model=two", "expected a whole number")):
            assert main([*command, "--mesh", mesh]) == 1
            told = capsys.readouterr().err
            assert words in told and told.startswith(f"dsv3 {command[0]}: ") and told.count("\n") == 1, told
        monkeypatch.setattr("sys.argv", ["dsv3", *command, "--mesh", "model=2"])
        assert main([*command, "--mesh", "model=2"]) == 1
        told = capsys.readouterr().err
        assert f"--worker_num=2 --local_worker_num=2 --join=True --log_dir=logs python -m dsv3 {command[0]} {checkpoint}" in told
