"""Checkpoints that transformers and torch wrote, and what transformers made of ours (tests/goldens/make_weights.py).

Planted faults this file was seen to catch: scales of a partial block taken from its neighbour; E4M3 codes read with a bias of 8;
a weight exported transposed; the router bias left out of an export.
"""
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDENS

import dsv3
from dsv3.checkpoint import shards

HERE = GOLDENS / "weights"


@pytest.fixture(scope="module")
def golden():
    return np.load(HERE / "golden.npz")


@pytest.mark.parametrize("name", ["saved", "fp8"])
def test_logits_after_reading(golden, name):
    params, cfg = dsv3.from_hf(HERE / name, dtype="float32")
    logits = dsv3.forward(params, golden["input_ids"], cfg=cfg).asnumpy()
    assert np.abs(logits - golden[f"logits_{name}"]).max() < 2e-5
    assert np.abs(golden["logits_saved"] - golden["logits_fp8"]).max() > 1e-2  # so that one cannot pass for the other


def exported(folder):
    params, cfg = dsv3.from_hf(HERE / "saved")
    dsv3.to_hf(params, cfg, folder)
    return folder


def test_export_is_what_transformers_wrote(tmp_path):
    ours, theirs = shards.open_shards(exported(tmp_path / "out")), shards.open_shards(HERE / "saved")
    assert ours.home.keys() == theirs.home.keys()
    assert all(ours.slot(n).dtype == theirs.slot(n).dtype and np.array_equal(ours.read(n), theirs.read(n)) for n in ours.home)


def test_export_is_what_transformers_loaded(tmp_path):
    said = json.loads((HERE / "export.json").read_text())
    assert not any(said["loading_info"].values()) and said["largest_difference"] == 0
    found = hashlib.sha256((exported(tmp_path / "out") / "model.safetensors").read_bytes()).hexdigest()
    assert found == said["sha256"], "the export changed: look at it with make_weights.py --check FOLDER"


def test_transformers_loads_our_export(tmp_path):
    if subprocess.run([sys.executable, "-c", "import torch, transformers"], capture_output=True).returncode:
        pytest.skip("needs transformers")
    code = f"""
import sys; sys.path.insert(0, {str(GOLDENS)!r})
import numpy as np, make_weights
from pathlib import Path
model, info = make_weights.load(Path({str(exported(tmp_path / 'out'))!r}))
golden = np.load({str(HERE / 'golden.npz')!r})
assert not any(info.values()), info
assert np.abs(make_weights.run(model, golden['input_ids']) - golden['logits_saved']).max() < 1e-6
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
