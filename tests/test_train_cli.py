"""``dsv3 train`` from outside: real processes, killed and resumed bit for bit, stopped, refused, and its files.

Planted faults seen to fail: the data position not restored (the resumed weights differ); the optimiser's step not saved;
SIGTERM ignored; a resumed log that keeps the lines after its checkpoint (a step twice).
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dsv3.checkpoint import safetensors_io
from dsv3.config import TINY

STEPS = 24


def command(home: Path, out: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "dsv3", "train", "--config", str(home / "config.json"), "--data", str(home / "text.txt"),
            "--tokenizer", "byte", "--out", str(home / out), "--steps", str(STEPS), "--batch-size", "4", "--seq-length", "24",
            "--warmup", "3", "--save-every", "3", "--eval-every", "8", "--eval-batches", "1", "--prompt", "the ", "--quiet",
            *more]


def run(home: Path, out: str, *more: str) -> subprocess.CompletedProcess:
    env = os.environ | {"DSV3_CACHE": os.environ.get("DSV3_CACHE", ""), "XDG_CACHE_HOME": str(home / "cache")}
    if not env["DSV3_CACHE"]:
        del env["DSV3_CACHE"]
    return subprocess.run(command(home, out, *more), cwd=home, capture_output=True, text=True, timeout=300, env=env)


def write_home(folder: Path) -> None:
    """A config, its experts in the MTP module, and a text that take seconds to compile and to train on."""
    cfg = TINY.replace(vocab_size=258, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
                       moe_intermediate_size=16, q_lora_rank=16, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4,
                       v_head_dim=8, n_routed_experts=8, num_experts_per_tok=2, bos_token_id=None, eos_token_id=None)
    (folder / "config.json").write_text(json.dumps(cfg.to_hf()))
    rng = random.Random(0)
    words = "the quick brown fox jumps over a lazy dog while seven wizards quietly mix potions".split()
    (folder / "text.txt").write_text("\n".join(" ".join(rng.choices(words, k=9)) for _ in range(600)))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_home(folder)
    done = run(folder, "whole")
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "whole.log").write_text(done.stderr)
    return folder


def tensors(run_folder: Path) -> dict[str, bytes]:
    """Every tensor of the last checkpoint of a run, weights and optimiser state, as bytes."""
    last = run_folder / "checkpoints" / f"step_{STEPS:08d}"
    found = {}
    for path in sorted(last.glob("*.safetensors")):
        opened = safetensors_io.open_file(path)
        for name in opened.slots:
            found[f"{path.name.split('-')[0]} {name}"] = np.ascontiguousarray(safetensors_io.read(opened, name)).tobytes()
    assert len(found) > 100
    return found


def log_of(run_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_files_and_learns(home):
    out = home / "whole"
    log = log_of(out)
    steps = [r for r in log if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["main_loss"] < steps[0]["main_loss"] - 0.5
    assert {"main_loss", "mtp_loss", "balance_loss", "balance", "grad_norm", "learning_rate", "seconds"} <= set(steps[0])
    assert [r["step"] for r in log if "eval_main_loss" in r] == [8, 16, 24]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [f"step_{n:08d}" for n in (18, 21, 24)]
    text = (home / "whole.log").read_text()
    for words in ("held-out loss", "unigram cross-entropy", "expert balance", "loss curve"):
        assert words in text


def test_killed_at_random_moments_it_resumes_bit_for_bit(home):
    rng, kills = random.Random(os.getpid()), 0
    env = os.environ | {"XDG_CACHE_HOME": str(home / "cache")}
    log = home / "killed" / "metrics.jsonl"
    for _ in range(3):
        seen = len(log.read_text().splitlines()) if log.exists() else 0
        process = subprocess.Popen(command(home, "killed"), cwd=home, stderr=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, env=env)
        deadline, wanted = time.time() + 200, seen + rng.randint(1, 7)
        while process.poll() is None and time.time() < deadline:
            if log.exists() and len(log.read_text().splitlines()) >= wanted:
                time.sleep(rng.random() * 0.1)
                break
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    done = run(home, "killed")
    assert done.returncode == 0, done.stderr[-3000:]
    assert kills >= 2 and "resuming" in done.stderr
    ours, whole = tensors(home / "killed"), tensors(home / "whole")
    assert ours.keys() == whole.keys()
    assert [k for k in ours if ours[k] != whole[k]] == []
    same = ("step", "loss", "main_loss", "grad_norm", "balance")
    killed, unbroken = ([[r.get(k) for k in same] for r in log_of(home / name)] for name in ("killed", "whole"))
    assert killed == unbroken


def test_sigterm_saves_and_exits(home):
    env = os.environ | {"XDG_CACHE_HOME": str(home / "cache")}
    process = subprocess.Popen(command(home, "stopped", "--save-every", "0"), cwd=home, stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL, env=env)
    log = home / "stopped" / "metrics.jsonl"
    deadline = time.time() + 200
    while not (log.exists() and len(log.read_text().splitlines()) >= 2) and time.time() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, error[-2000:]
    assert "SIGTERM" in error
    (saved,) = (home / "stopped" / "checkpoints").iterdir()
    assert saved.name == f"step_{len([r for r in log_of(home / 'stopped') if 'loss' in r]):08d}"


@pytest.mark.parametrize("more, words", [
    (("--learning-rate", "1e-4"), "learning_rate was 0.003, is 0.0001"),
    (("--batch-size", "5", "--accumulate", "2"), "--batch-size 5 does not divide into --accumulate 2"),
    (("--steps", "0"), "--steps 0: expected at least 1"),
    (("--data", "/nowhere/at/all.txt"), "/nowhere/at/all.txt"),
    (("--config", "V9"), "neither a preset"),
], ids=["other settings", "accumulate", "steps", "data", "config"])
def test_mistakes_end_in_one_line(home, more, words):
    done = run(home, "whole", *more)
    assert done.returncode == 1 and words in done.stderr.splitlines()[-1], done.stderr[-2000:]
    assert "Traceback" not in done.stderr


def test_generate_continues_from_the_run(home):
    done = subprocess.run([sys.executable, "-m", "dsv3", "generate", str(home / "whole"), "--tokenizer", "byte", "--prompt",
                           "the quick ", "--max-new-tokens", "8"], capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("the quick ") and len(done.stdout) > len("the quick \n")
