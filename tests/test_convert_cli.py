"""``dsv3 convert`` as a command: killed and started again, two at once, on a full disk, within its memory.

Planted faults this file was seen to catch, one at a time. Killed: another plan's files kept; the fingerprint without the
parts of tensors (moe_tp_extend_ep has the same shapes); finished files written again; files under their final name from the
start; a killed run's manifest listed in the next one's; a complete result not recognised; no lock. Disk: an error that
names no file; the space not checked. Memory: chunks not cut.
"""
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from test_convert import SMALL, files, weights, write_hf

from dsv3.checkpoint import safetensors_io
from dsv3.checkpoint.names import published
from dsv3.cli.main import main

BIG = SMALL.replace(hidden_size=128, intermediate_size=256, moe_intermediate_size=64, vocab_size=512, n_routed_experts=8)
COMMANDS = '''
import json, os, resource, signal, sys
import dsv3.checkpoint.formats, dsv3.cli.main
from dsv3.checkpoint import convert, folder, safetensors_io, torch_file

def dying(fn, left):
    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return fn(*args, **kwargs)
    return call

print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(job["log"], os.O_WRONLY | os.O_CREAT), 2)
    convert.PIECE, convert.THREADS = job.get("piece", convert.PIECE), job.get("threads", convert.THREADS)
    if "die" in job:
        left = [job["die"]]
        os.rename, os.fsync = dying(os.rename, left), dying(os.fsync, left)
        for module in safetensors_io, torch_file, folder:
            module.write_bytes = dying(module.write_bytes, left)
    if "largest" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest"], job["largest"]))
    os._exit(dsv3.cli.main.main(["convert", *job["argv"], "--quiet"]))
'''


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """start(argv, ...) -> pid and finish(pid) -> (exit code, lines on stderr) of commands in processes of their own.

    They are forked from one that has imported everything already, which takes seconds.
    """
    log = tmp_path_factory.mktemp("commands")
    server = subprocess.Popen([sys.executable, "-c", COMMANDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == "ready\n"

    def ask(**job):
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    def start(*argv, **options):
        name = str(log / f"{random.random()}")
        open(name, "w").close()  # it may be killed before it could do that
        pid = ask(argv=[str(x) for x in argv], log=name, **options)
        logs[pid] = name
        return pid

    def finish(pid):
        code = ask(wait=pid)
        with open(logs[pid]) as f:
            return code, f.read().splitlines()

    logs = {}
    yield SimpleNamespace(start=start, finish=finish, pid=server.pid,
                          run=lambda *argv, **options: finish(start(*argv, **options)))
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A Hugging Face folder of 2 MB in many files, with a tokenizer."""
    folder = write_hf(tmp_path_factory.mktemp("big") / "hf", BIG, weights(BIG, "BF16", np.random.default_rng(1)), most=60_000)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"a": 1}')
    (folder / "README.md").write_text("not carried along")
    return folder


def contents(folder):
    """{relative path: bytes} of every file under a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in files(folder)}


def finished(folder):
    """{file: (inode, time of the last change)} of the weights in a folder, or in one under way, that have their names."""
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns)
            for p in files(folder) if p.suffix in (".safetensors", ".pt")}


TO = {"own": ("--to", "own", "--max-shard-size", "60KB"),
      "mcore": ("--to", "mcore", "--target-tensor-parallel-size", "2", "--target-expert-parallel-size", "8")}


# -- killed and started again ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["after some time", "before some operation"])
@pytest.mark.parametrize("form", TO)
def test_a_killed_conversion_goes_on(tmp_path, commands, big, form, how):
    seed = random.randrange(1 << 30)
    print(f"{seed=}")  # shown on a failure
    rng, argv = random.Random(seed), TO[form]
    begin = time.perf_counter()
    assert commands.run(big, tmp_path / "undisturbed", *argv) == (0, [])
    took = time.perf_counter() - begin
    out, work = tmp_path / "out", tmp_path / ".convert-out"
    kills = resumed = rounds = 0
    while kills < 8 or resumed < 3:
        rounds, before, killed = rounds + 1, {}, 0
        assert rounds < 30
        while True:
            die = {}
            if how == "before some operation":
                die["die"] = 4 * killed + (rng.randrange(20, 30) if form == "own" else rng.randrange(200, 400))
            pid = commands.start(big, out, *argv, **die)
            if not die:
                time.sleep(rng.random() * took * (0.1 + killed / 20))  # longer and longer: there is an end
                os.kill(pid, signal.SIGKILL)
            code, lines = commands.finish(pid)
            resumed += any("resuming" in line for line in lines)
            if code == 0 or out.exists():  # it was killed after it had finished
                break
            assert code == -signal.SIGKILL
            now = finished(work)
            assert before.items() <= now.items()  # what was whole was not written again
            kills, killed, before = kills + 1, killed + 1, now
        if code:
            assert commands.run(big, out, *argv)[0] == 0
        assert contents(out) == contents(tmp_path / "undisturbed")
        now = finished(out)
        assert before.items() <= now.items() and sorted(os.listdir(tmp_path)) == ["out", "undisturbed"]
        assert commands.run(big, out, *argv) == (0, [f"{out} is complete"]) and finished(out) == now
        shutil.rmtree(out)


def test_the_command_itself_is_killed_and_goes_on(tmp_path, commands, big):
    out, work, argv = tmp_path / "out", tmp_path / ".convert-out", TO["own"]
    assert commands.run(big, tmp_path / "undisturbed", *argv)[0] == 0
    command = [sys.executable, "-m", "dsv3", "convert", str(big), str(out), *argv, "--quiet", "--verify"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while child.poll() is None and len(list(work.glob("*.safetensors"))) < 3:
        time.sleep(0.001)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL and not out.exists()
    before = finished(work)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("verified ") and done.stdout.endswith(f"{out}\n")
    assert done.stderr == f"resuming: {len(before)} of {len(finished(out))} files are there\n"
    assert contents(out) == contents(tmp_path / "undisturbed") and before.items() <= finished(out).items()


def test_another_target_after_a_kill_starts_anew(tmp_path, commands, big):
    argv = ["--to", "mcore", "--moe-grouped-gemm", "--target-tensor-parallel-size", "2", "--target-expert-parallel-size", "2"]
    extended = [*argv, "--moe-tp-extend-ep"]  # the same names and shapes, other experts
    for i, (old, new) in enumerate([(argv, extended), (argv, [*argv, "--dtype", "float32"]), (argv, TO["own"])]):
        out, work = tmp_path / f"out{i}", tmp_path / f".convert-out{i}"
        assert commands.run(big, out, *old, die=200)[0] == -signal.SIGKILL and finished(work)
        assert commands.run(big, out, *new) == (0, [f"{work}: left by a conversion of another source or target; starting anew"])
        assert commands.run(big, tmp_path / f"fresh{i}", *new)[0] == 0
        assert contents(out) == contents(tmp_path / f"fresh{i}")
        code, lines = commands.run(big, out, *old)
        assert code == 1 and lines == [f"dsv3 convert: {out} exists and is not empty; choose another path or remove it"]


def test_two_at_once(tmp_path, commands, big):
    out, work = tmp_path / "out", tmp_path / ".convert-out"
    first = commands.start(big, out, *TO["own"])
    while not list(work.glob("*.safetensors")):
        time.sleep(0.001)
    os.kill(first, signal.SIGSTOP)
    code, lines = commands.run(big, out, *TO["own"])
    assert code == 1 and lines == [f"dsv3 convert: {out} is being written by another process; wait for it or choose another path"]
    os.kill(first, signal.SIGCONT)
    assert commands.finish(first) == (0, []) and not work.exists()


# -- the disk ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", TO)
def test_a_file_that_cannot_be_written(tmp_path, commands, big, form):
    before = contents(big)
    code, lines = commands.run(big, tmp_path / "out", *TO[form], largest=40_000)
    assert code == 1 and len(lines) == 1 and "File too large" in lines[0] and ".half" in lines[0]
    assert not (tmp_path / "out").exists() and contents(big) == before
    assert commands.run(big, tmp_path / "out", *TO[form])[0] == 0


def test_a_full_disk(tmp_path, capsys, monkeypatch, big):
    left = 300_000

    def write(file, data):
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(data)

    monkeypatch.setattr(safetensors_io, "write_bytes", write)
    assert main(["convert", str(big), str(tmp_path / "out"), *TO["own"], "--quiet"]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "No space left on device" in line and ".safetensors.half" in line
    assert len(finished(tmp_path / ".convert-out")) > 2 and not (tmp_path / "out").exists()
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    assert main(["convert", str(big), str(tmp_path / "out"), *TO["own"], "--quiet"]) == 1
    assert "bytes are needed and 1,000,000 are free" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


# -- memory ------------------------------------------------------------------------------------------------------------
def test_memory_stays_within_a_few_pieces(tmp_path, commands):
    """At most THREADS + 1 pieces wait and THREADS are being made, each as stored, as float32 and in the new type and order:
    with 128 Ki elements a piece and 2 threads that is 5 x 3 x 0.5 MB, and as much again for the allocator and the threads. A
    large tensor is 16 MB in bfloat16 and 32 MB in float32, and a joined one 32 MB, so one that is held whole would show."""
    cfg = SMALL.replace(vocab_size=8192, hidden_size=1024, intermediate_size=8192,
                        num_nextn_predict_layers=0, num_hidden_layers=1)
    rng = np.random.default_rng(3)
    tensors = {t.name: ("F32" if t.float32 else "BF16", rng.integers(0, 0x3F80, t.shape, np.uint16)) for t in published(cfg)}
    tensors = {n: (k, a.astype(np.float32) if k == "F32" else a) for n, (k, a) in tensors.items()}
    source = write_hf(tmp_path / "hf", cfg, tensors)
    assert sum(p.stat().st_size for p in files(source)) > 64e6

    def held(pid):
        with open(f"/proc/{pid}/status") as f:
            return next((int(line.split()[1]) / 1024 for line in f if line.startswith("RssAnon")), 0)

    for form in (("--to", "own", "--dtype", "float32"), ("--to", "mcore", "--target-tensor-parallel-size", "2")):
        start, peak, samples = held(commands.pid), 0, 0
        pid = commands.start(source, tmp_path / form[1], *form, piece=1 << 17, threads=2)
        while now := held(pid):
            peak, samples = max(peak, now), samples + 1
            time.sleep(0.001)
        assert commands.finish(pid) == (0, []) and samples > 50
        assert peak - start < 20, (form, start, peak)
