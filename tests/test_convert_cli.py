"""``dsv3 convert`` as a command: killed and started again, two at once, on a full disk, on damaged input, within its memory.

Planted faults this file was seen to catch, one at a time. Killed: another plan's files kept; the fingerprint without the
parts of tensors (moe_tp_extend_ep has the same shapes); finished files written again; files under their final name from the
start; a killed run's manifest listed in the next one's; a complete result not recognised; no lock. Disk: an error that
names no file; the space not checked. Memory: chunks not cut. Input: NaN scales let through; a config.json that is a number;
a tensor beside param_name_map.json; a target inside the source. Dry run: it writes; sizes one byte a tensor off; the
tokenizer left behind.
"""
import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from test_convert import SMALL, files, stored, weights, write_hf
from test_convert_fp8 import fp8_weights

from dsv3.checkpoint import folder as folders
from dsv3.checkpoint import formats, hf, mcore, safetensors_io
from dsv3.checkpoint.names import SCALE, published
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


# -- damaged input -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A small folder of every layout, to be copied before it is damaged."""
    home = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(4)
    finite = {n: (k, a if k == "F32" else a & 0xBFFF) for n, (k, a) in weights(SMALL, "BF16", rng).items()}
    out = {"hf": write_hf(home / "hf", SMALL, finite, most=6000)}
    out["hf-fp8"] = write_hf(home / "hf-fp8", SMALL, fp8_weights(SMALL, "F32", rng), config=hf.config_json(SMALL, hf.FP8_DTYPE))
    for form in ("own", "mcore", "mindformers"):
        out[form] = home / form
        assert main(["convert", str(out["hf"]), str(home / form), "--to", form, "--max-shard-size", "6KB", "--quiet"]) == 0
    return out


def truncated(folder):
    path = sorted([*folder.rglob("*.pt"), *folder.glob("*.safetensors")])[-1]
    os.truncate(path, path.stat().st_size - 3)
    return path.name


def flipped(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[8] ^= 1  # the brace that the header starts with
    path.write_bytes(data)
    return path.name


def rewritten(change):
    """Damage that changes the tensors {name: (file type, array)} of the file that holds the name which it returns."""

    def damage(folder):
        for path in sorted(folder.glob("*.safetensors")):
            file = safetensors_io.open_file(path)
            tensors = {n: (s.dtype, np.array(safetensors_io.read(file, n))) for n, s in file.slots.items()}
            if word := change(tensors):
                path.unlink()
                safetensors_io.write_file(path, tensors, file.metadata)
                return word
        raise AssertionError("nothing to damage")

    return damage


NORM = ("model.layers.1.input_layernorm.weight", "layers.1.attn_norm", "model.layers.1.attention_norm.weight")


@rewritten
def wrong_shape(tensors):
    for name in NORM:
        if name in tensors:
            tensors[name] = tensors[name][0], tensors[name][1][:-1]
            return name


@rewritten
def missing(tensors):
    return next((name for name in NORM if tensors.pop(name, None)), None)


@rewritten
def unexpected(tensors):
    tensors["model.layers.0.extra.weight"] = "F32", np.zeros(2, np.float32)
    return "model.layers.0.extra.weight"


@rewritten
def nan_scale(tensors):
    name = f"model.layers.1.mlp.experts.2.up_proj.weight{SCALE}"
    tensors[name][1][0, 0] = np.nan
    return name


def reindexed(change):
    """Damage to the index."""

    def damage(folder):
        path = next(folder.glob("*index.json"), folder / "param_name_map.json")
        index = json.loads(path.read_text())
        places = index.get("weight_map", index)
        places[list(places)[3]] = change
        path.write_text(json.dumps(index))
        return path.name if "/" in change else change

    return damage


def without_config(folder):
    (folder / "config.json").unlink()
    return "config.json"


def odd_config(folder):
    (folder / "config.json").write_text("[" * 100_000)
    return "config.json"


def number_for_config(folder):
    (folder / "config.json").write_text("5")
    return "config.json"


def hostile(folder):
    """A pickle that would run a command."""
    path = next(folder.rglob("*.pt"))
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}

    class Command:
        def __reduce__(self):
            return os.system, (f"touch {folder}/ran",)

    records["archive/data.pkl"] = pickle.dumps({"model": Command()}, 2)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return path.name


DAMAGES = [
    *((form, truncated) for form in ("hf", "own", "mindformers", "mcore")),
    *((form, damage) for form in ("hf", "own", "mindformers") for damage in (flipped, wrong_shape, missing, unexpected)),
    *((form, reindexed(name)) for form in ("hf", "own", "mindformers") for name in ("no.safetensors", "../other.safetensors")),
    *((form, damage) for form in ("hf", "own", "mindformers", "mcore")
      for damage in (without_config, odd_config, number_for_config)),
    ("hf-fp8", nan_scale), ("mcore", hostile),
]


@pytest.mark.parametrize("form, damage", DAMAGES)
def test_damaged_input_is_refused_in_one_line(tmp_path, capsys, sources, form, damage):
    folder = shutil.copytree(sources[form], tmp_path / form)
    word = damage(folder)
    if form == "own" and damage is not truncated:  # or else its sizes say it first
        folders.write_manifest(folder)
    before = contents(folder)
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "bf16", "--quiet"]) == 1
    out, line = capsys.readouterr()
    assert line.startswith("dsv3 convert: ") and line.count("\n") == 1 and len(line) < 1500 and not out
    assert word in line and (folder.name in line or ".safetensors" in line), line
    assert not (tmp_path / "out").exists() and contents(folder) == before


def test_targets_that_are_taken_or_inside_the_source(tmp_path, capsys, sources):
    folder = shutil.copytree(sources["hf"], tmp_path / "hf")
    (tmp_path / "file").write_text("x")
    os.symlink(folder, tmp_path / "link")
    before = contents(tmp_path)
    inside = "lies in the source"
    for out, words in ((folder, inside), (folder / "out", inside), (folder / "a/b", inside), (tmp_path / "link/out", inside),
                       (tmp_path, "is not empty"), (tmp_path / "file", "file exists"), (tmp_path / "file/o", "Not a directory")):
        assert main(["convert", str(folder), str(out), "--to", "own", "--quiet"]) == 1, out
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and words in line and str(out.name) in line, line
        assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == 3
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(folder), str(tmp_path / "empty"), "--to", "own", "--quiet", "--verify"]) == 0


def test_a_dry_run_writes_nothing_and_says_what_will_be(tmp_path, capsys, sources):
    folder = shutil.copytree(sources["hf"], tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text(f'{{"{name}": 1}}')
    before = contents(tmp_path)
    for form in ("bf16", "fp32", "hf-fp8", "own", "mcore", "mindformers"):
        argv = ["convert", str(folder), str(tmp_path / form), "--to", form, "--max-shard-size", "9KB", "--quiet"]
        assert main([*argv, "--dry-run"]) == 0
        said = capsys.readouterr().out
        assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == 1
        assert main(argv) == 0
        capsys.readouterr()
        out = tmp_path / form
        sizes = {}
        for line in said.splitlines()[2:]:
            name, *numbers = line.replace(",", "").split()
            assert (out / name).stat().st_size >= int(numbers[-2]) > 0
            sizes[name] = int(numbers[-2])
        weighty = {p for p in files(out) if p.suffix in (".safetensors", ".pt")}
        assert {str(p.relative_to(out)) for p in weighty} | {"config.json"} <= set(sizes)
        for path in weighty:
            name = str(path.relative_to(out))
            if path.suffix == ".pt":
                found = sum(t.nbytes for t in mcore.tensors(formats.torch_file.open_file(path).structure).values())
            else:
                found = sum(s.nbytes for s in safetensors_io.open_file(path).slots.values())
            assert found == sizes[name], (form, name)
        for name in set(sizes) - {str(p.relative_to(out)) for p in weighty}:
            assert (out / name).stat().st_size == sizes[name]
        assert f"{sum(sizes[str(p.relative_to(out))] for p in weighty):,} bytes" in said.splitlines()[1]
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (out / name).read_bytes() == (folder / name).read_bytes()
        shutil.rmtree(out)
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "fp32", "--dtype", "bfloat16"]) == 1
    assert main(["convert", str(folder), str(tmp_path / "bf16"), "--to", "bf16", "--quiet"]) == 0
    assert stored(tmp_path / "bf16") == stored(sources["hf"])


# -- fuzz --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["hf", "hf-fp8", "own", "mindformers"])
def test_damage_raises_nothing_but_what_is_announced(tmp_path, sources, form):
    seed = random.randrange(1 << 30)
    folder, rng = shutil.copytree(sources[form], tmp_path / form), random.Random(seed)
    whole = {p: p.read_bytes() for p in files(folder)}
    read = refused = 0
    while read + refused < 300:
        path = rng.choice(sorted(whole))
        data = bytearray(whole[path])
        end = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else len(data)
        kind, at = rng.randrange(5), rng.randrange(8) if rng.randrange(4) == 0 else rng.randrange(end)
        if kind == 0:
            del data[rng.randrange(len(data)) :]
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at : at + rng.randrange(1, 30)]
        else:
            data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            source = formats.open_checkpoint(folder)
            for t in published(source.cfg):
                kind = "F32" if source.is_fp8(t.name) else source.kind(t.name)
                formats_read(source, t, kind)
            read += 1
        except (ValueError, FileNotFoundError) as error:
            assert str(error), (seed, path)
            refused += 1
        except Exception as error:
            raise AssertionError(f"{seed=} {path.name}: {type(error).__name__}: {error}") from error
        path.write_bytes(whole[path])
    print(f"{form}: {refused} refused, {read} read")
    assert refused > 100


def formats_read(source, t, kind):
    """All values of one published tensor, taken out of the file."""
    from dsv3.checkpoint.layout import Part
    from dsv3.checkpoint.source import read

    np.array(read(source, Part(t.name, t.shape), kind))
