"""Checkpoints of a run: bit-exact resumption, writers killed at random moments, damage, and which ones are
kept.

Planted faults this file was seen to catch. Written under the final name (by the kills); deleted in place;
deleted before the new one is written; one too many kept; the oldest kept; kept by number alone; damaged ones
counted as whole; leftovers not removed; the latest not checked, or by size only; keys with dots split; two
leaves of one path; NumPy leaves back as Tensors; optimiser tensors that nobody uses accepted; integers of
meta as floats; integer keys of meta accepted.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("MS_DEV_JIT_PIPELINE", "0")

import numpy as np
import pytest

from dsv3.checkpoint import (
    folder,
    latest_training,
    leaves,
    load,
    load_training,
    own,
    safetensors_io,
    save_training,
    training,
)
from dsv3.config import Config
from dsv3.model import init
from dsv3.tree import paths, tree_map

CFG = Config(
    vocab_size=20,
    hidden_size=8,
    intermediate_size=12,
    moe_intermediate_size=6,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_nextn_predict_layers=0,
    num_attention_heads=2,
    q_lora_rank=None,
    kv_lora_rank=6,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
)


def bits(tree) -> dict:
    """{path: (kind, type, shape, bytes)}: equal exactly when the trees are equal bit for bit."""
    return {
        path: (type(x).__name__, leaves.dtype_of(x), tuple(x.shape), leaves.host(x).tobytes())
        for path, x in paths(tree)
    }


def run(step: int, dtype: str = "float32"):
    """(params, opt_state) of a step, all of it a function of the step; every value that bits can express may
    occur.
    """
    rng = np.random.default_rng(step)

    def noise(kind):
        def leaf(x):
            n = int(np.prod(x.shape)) * safetensors_io.DTYPES[kind].itemsize
            return leaves.tensor(
                rng.integers(0, 256, n, np.uint8).view(safetensors_io.DTYPES[kind]).reshape(x.shape), kind
            )

        return leaf

    params = init(CFG, seed=step, dtype=dtype)
    state = {
        "step": leaves.tensor(np.array(step, np.int32), "I32"),
        "m": tree_map(noise("BF16"), params),
        "v": tree_map(noise("F32"), params),
    }
    if dtype != "float32":
        state["masters"] = {path: noise("F32")(x) for path, x in paths(params)}  # keys with dots
    return params, state


def save(run_dir, step, **changes):
    params, state = run(step)
    return save_training(run_dir, step, params, state, {"seen": step}, cfg=CFG, **changes)


def assert_is(path, step):
    params, state, meta, cfg = load_training(path)
    want, want_state = run(step)
    assert (
        bits(params) == bits(want)
        and bits(state) == bits(want_state)
        and meta == {"seen": step, "step": step}
    )
    assert cfg == CFG


def steps(run_dir) -> list[int]:
    return sorted(int(p.name.removeprefix("step_")) for p in (run_dir / "checkpoints").iterdir())


# ---- round trips ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", ["5GB", 1000])
def test_a_run_comes_back_bit_for_bit(tmp_path, dtype, size):
    params, state = run(7, dtype)
    state |= {"host": (np.float64(1.5), np.arange(3), None, True, 3, "text"), "empty": {}, "none": ()}
    path = save_training(tmp_path, 7, params, state, {}, cfg=CFG, max_shard_size=size)
    assert path == tmp_path / "checkpoints" / "step_00000007"
    loaded, opt_state, meta, cfg = load_training(path)
    assert cfg == CFG and meta == {"step": 7}
    assert list(bits(loaded)) == list(bits(params)) and bits(loaded) == bits(params)
    host, kept = opt_state.pop("host"), state.pop("host")
    assert list(opt_state) == list(state) and bits(opt_state) == bits(state)
    assert host[0].dtype == np.float64 and host[0] == 1.5 and host[0].shape == ()
    np.testing.assert_array_equal(host[1], kept[1])
    assert host[2:] == kept[2:]
    assert bits(load(path)[0]) == bits(params)  # the same folder is a checkpoint of the model alone
    assert latest_training(tmp_path) == path


def test_meta_is_exact(tmp_path):
    params, state = run(1)
    random_state = np.random.default_rng(3).bit_generator.state
    meta = {
        "data": {"epoch": 2, "sample": 2**60 + 1},
        "float": [0.1, 1e-320, 1.7976931348623157e308, -0.0, float("inf")],
        "nan": float("nan"),
        "rng": random_state,
        "text": '\u00e4\n"',
        "none": None,
        "yes": True,
        "one": 1,
        "onef": 1.0,
    }
    path = save_training(tmp_path, 1, params, state, meta, cfg=CFG)
    assert repr(load_training(path)[2]) == repr(meta | {"step": 1})
    generator = np.random.default_rng(9)
    generator.bit_generator.state = load_training(path)[2]["rng"]
    assert generator.integers(2**62) == np.random.default_rng(3).integers(2**62)
    saved = save_training(
        tmp_path, 2, params, state, {"a": np.float64(0.1), "b": np.int64(2**62), "c": (1, 2)}, cfg=CFG
    )
    assert repr(load_training(saved)[2]) == repr({"a": 0.1, "b": 2**62, "c": [1, 2], "step": 2})
    versions = json.loads((path / "training.json").read_text())["versions"]
    assert versions["numpy"] == np.__version__ and set(versions) == {"mindspore", "numpy", "python"}


@pytest.mark.parametrize(
    "meta, words",
    [
        ({"a": {"b": [np.zeros(2)]}}, r"meta\['a'\]\['b'\]\[0\] is a ndarray"),
        ({"a": {1: 2}}, r"meta\['a'\]: the key 1"),
        ({"step": 5}, "meta.'step'. is 5 but step is 4"),
        ({"a": {1, 2}}, r"meta\['a'\] is a set"),
    ],
)
def test_meta_that_would_not_come_back_is_refused(tmp_path, meta, words):
    with pytest.raises(ValueError, match=words):
        save_training(tmp_path, 4, *run(4), meta, cfg=CFG)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "state, words",
    [
        ({"a": [np.zeros(1)]}, "opt_state.a: cannot store a list"),
        ({1: np.zeros(1)}, "the key 1 is not a string"),
        ({"a.b": np.zeros(1), "a": {"b": np.zeros(1)}}, "two leaves have the path 'a.b'"),
        ({"a": np.array("text")}, "opt_state.a: cannot store a ndarray of type <U4"),
    ],
)
def test_state_that_would_not_come_back_is_refused(tmp_path, state, words):
    with pytest.raises(ValueError, match=words):
        save_training(tmp_path, 4, run(4)[0], state, {}, cfg=CFG)
    assert not (tmp_path / "checkpoints").exists()


def test_wrong_numbers_are_refused(tmp_path):
    for changes, words in (({"keep": 0}, "keep=0"), ({"max_shard_size": "x"}, "max_shard_size")):
        with pytest.raises(ValueError, match=words):
            save(tmp_path, 1, **changes)
    with pytest.raises(ValueError, match="step=-1"):
        save_training(tmp_path, -1, *run(1), {}, cfg=CFG)
    assert latest_training(tmp_path) is None and latest_training(tmp_path / "absent") is None


# ---- killed writers ------------------------------------------------------------------------------------
WRITER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import test_checkpoint_training as t
from pathlib import Path
print("ready", flush=True)
for line in sys.stdin:  # "<folder> <first step>": a child saves from there on until it is killed
    run_dir, step = line.split()
    child = os.fork()
    if child == 0:
        try:
            for step in range(int(step), 10**6):
                os.write(1, f"begin {step}\\n".encode())
                t.save(Path(run_dir), step, keep=2)
                os.write(1, f"done {step}\\n".encode())
        finally:
            os._exit(1)
    os.write(1, f"child {child}\\n".encode())
    os.waitpid(child, 0)
    os.write(1, b"dead\\n")
"""


def test_kill_at_random_moments(tmp_path):
    """kill -9 of a process that saves in a loop: the latest whole checkpoint is the last one it finished, or
    newer.
    """
    here = Path(__file__).parent
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")]),
        "GLOG_v": "3",
    }
    chance, inside, next_step, finished = random.Random(0), 0, 1, 0
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(here)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        cwd=tmp_path,
    )
    try:
        start = time.perf_counter()
        save(tmp_path / "timed", 1)
        duration = time.perf_counter() - start
        assert writer.stdout.readline() == "ready\n"
        for _ in range(12):
            writer.stdin.write(f"{tmp_path / 'run'} {next_step}\n")
            writer.stdin.flush()
            said, wait_for = [], next_step + chance.randrange(2)
            while f"begin {wait_for}\n" not in said or not any(line.startswith("child") for line in said):
                said.append(writer.stdout.readline())
                assert said[-1] not in ("", "dead\n"), said  # the writer failed by itself
            time.sleep(chance.random() * 1.2 * duration)
            os.kill(int(next(line for line in said if line.startswith("child")).split()[1]), signal.SIGKILL)
            while said[-1] != "dead\n":
                said.append(writer.stdout.readline())
            finished = max(
                (int(line.split()[1]) for line in said if line.startswith("done")), default=finished
            )
            begun = max(int(line.split()[1]) for line in said if line.startswith("begin"))
            inside += begun > finished
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # nothing half-written may even have to be skipped
                latest = latest_training(tmp_path / "run")
            found = int(latest.name.removeprefix("step_")) if latest else 0
            assert finished <= found <= begun
            for path in (tmp_path / "run" / "checkpoints").glob("step_*"):
                assert_is(path, int(path.name.removeprefix("step_")))
            next_step = begun + 1
    finally:
        writer.stdin.close()
        writer.wait(timeout=20)
        writer.stdout.close()
    assert inside >= 8  # so many kills fell into a save
    save(tmp_path / "run", next_step, keep=2)
    names = os.listdir(tmp_path / "run" / "checkpoints")
    assert len(names) == 2 and all(name.startswith("step_") for name in names)  # leftovers are gone


@pytest.mark.parametrize("size", ["5GB", 2000])
def test_a_full_disk_leaves_the_older_ones(tmp_path, monkeypatch, size):
    save(tmp_path, 1)
    total = sum(p.stat().st_size for p in (tmp_path / "checkpoints" / "step_00000001").iterdir())
    real = safetensors_io.write_bytes
    for limit in range(0, total, total // 9):
        left = [limit]

        def write_bytes(file, data):
            real(file, data[: max(left[0], 0)])
            left[0] -= len(data)
            if left[0] < 0:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(safetensors_io, "write_bytes", write_bytes)
        monkeypatch.setattr(folder, "write_bytes", write_bytes)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2, keep=1, max_shard_size=size)
        assert os.listdir(tmp_path / "checkpoints") == ["step_00000001"]
    assert_is(latest_training(tmp_path), 1)


# ---- damage --------------------------------------------------------------------------------------------
def test_every_truncation_flip_and_absence_is_refused_by_name(tmp_path):
    save(tmp_path, 1)
    older = tmp_path / "checkpoints" / "step_00000001"
    path = save(tmp_path, 2, max_shard_size=2000)
    foreign = save(tmp_path / "other", 3, max_shard_size=2000)
    refused, rng = 0, np.random.default_rng(0)
    names = sorted(p.name for p in path.iterdir())
    for name in names:
        data = (path / name).read_bytes()
        damaged = [
            None,
            b"",
            data[:7],
            data[: len(data) // 2],
            data[:-1],
            data + b"\0",
            (foreign / name).read_bytes(),
        ]
        for i in {0, len(data) // 2, len(data) - 1, *rng.integers(0, len(data), 3).tolist()}:
            damaged.append(data[:i] + bytes([data[i] ^ 1 << int(rng.integers(8))]) + data[i + 1 :])
        for bad in damaged:
            if bad == data:  # the index and the config of another step are the same
                continue
            (path / name).unlink() if bad is None else (path / name).write_bytes(bad)
            with pytest.raises((ValueError, FileNotFoundError)) as error:
                load_training(path)
            blamed = (
                name
                if not (name == "manifest.json" and bad == (foreign / name).read_bytes())
                else "step_00000002"
            )
            assert blamed in str(error.value) and "\n" not in str(error.value), (name, error.value)
            refused += 1
        with pytest.warns(UserWarning, match="skipping an incomplete checkpoint.*step_00000002"):
            assert latest_training(tmp_path) == older
        (path / name).write_bytes(data)
    print(f"{refused} damaged checkpoints refused, {len(names)} files")
    assert len(names) > 8 and refused > 10 * len(names)
    assert_is(path, 2)
    assert latest_training(tmp_path) == path


def test_both_numbers_are_named(tmp_path):
    path = save(tmp_path, 1)
    shard = path / "optimizer-00001-of-00001.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-3])
    with pytest.raises(ValueError, match=f"{shard.name}: expected {len(data)} bytes, found {len(data) - 3}"):
        load_training(path)
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 64]))
    with pytest.raises(ValueError, match=f"{shard.name}: expected CRC-32 [0-9a-f]{{8}}, found [0-9a-f]{{8}}"):
        load_training(path)


def test_optimiser_tensors_must_be_those_of_the_outline(tmp_path):
    path = save(tmp_path, 1)
    described = json.loads((path / "training.json").read_text())
    for change, words in (
        (lambda tree: tree["dict"]["m"]["dict"].pop("norm"), r"unexpected 1 \(m.norm\)"),
        (lambda tree: tree["dict"].update(extra="tensor"), "'extra' is missing"),
    ):
        outline = json.loads(json.dumps(described))
        change(outline["opt_state"])
        (path / "training.json").write_text(json.dumps(outline))
        (path / "manifest.json").unlink()
        folder.write_manifest(path)
        with pytest.raises(ValueError, match=words):
            load_training(path)


def test_a_model_alone_is_not_a_training_checkpoint(tmp_path):
    own.save(tmp_path / "checkpoints" / "step_00000001", run(1)[0], cfg=CFG)
    with pytest.raises(ValueError, match="training.json: not a file of this checkpoint"):
        load_training(tmp_path / "checkpoints" / "step_00000001")
    with pytest.warns(UserWarning, match="skipping"):
        assert latest_training(tmp_path) is None


# ---- which ones are kept -------------------------------------------------------------------------------
def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10, 100):
        save(tmp_path, step, keep=3)
    assert steps(tmp_path) == [3, 10, 100]
    save(tmp_path, 101, keep=1)
    assert steps(tmp_path) == [101]
    assert_is(latest_training(tmp_path), 101)


def test_the_one_just_written_and_whole_ones_are_preferred(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    shard = tmp_path / "checkpoints" / "step_00000003" / "model-00001-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])  # damaged, though the newest number
    save(
        tmp_path, 2, keep=2
    )  # a run that went back: the one just written, and the newest whole one beside it
    assert steps(tmp_path) == [1, 2]
    assert_is(latest_training(tmp_path), 2)


def test_nothing_is_deleted_before_the_new_one_is_there(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)
    remove = training.remove_folder

    def watched(path):
        assert path.name == "step_00000001"
        assert_is(tmp_path / "checkpoints" / "step_00000002", 2)
        remove(path)

    monkeypatch.setattr(training, "remove_folder", watched)
    save(tmp_path, 2, keep=1)
    assert steps(tmp_path) == [2]


def test_what_is_deleted_loses_its_name_first(tmp_path, monkeypatch):
    save(tmp_path, 1)
    deleted, rmtree = [], folder.shutil.rmtree
    monkeypatch.setattr(
        folder.shutil, "rmtree", lambda path, **kw: (deleted.append(path.name), rmtree(path, **kw))
    )
    save(tmp_path, 2, keep=1)
    save(tmp_path, 2, keep=1)
    assert len(deleted) == 2 and all(name.startswith(".tmp-") for name in deleted)


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    params, state = run(5)
    save_training(tmp_path, 1, params, state, {"again": True}, cfg=CFG)
    loaded, _, meta, _ = load_training(latest_training(tmp_path))
    assert bits(loaded) == bits(params) and meta == {"again": True, "step": 1} and steps(tmp_path) == [1]


def test_leftovers_and_other_folders(tmp_path):
    save(tmp_path, 1)
    home = tmp_path / "checkpoints"
    (home / ".tmp-step_00000009-abcd").mkdir()
    (home / ".tmp-step_00000009-abcd" / "half").write_bytes(b"x")
    for name in ("step_final", "best"):
        (home / name).mkdir()
    save(tmp_path, 2, keep=1)
    assert sorted(os.listdir(home)) == ["best", "step_00000002", "step_final"]
    assert_is(latest_training(tmp_path), 2)
