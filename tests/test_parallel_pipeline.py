"""Pipelines: the order of work as a table, and stages as real processes on the CPU that train together.

Planted faults this file was seen to catch: TODO
"""
import json
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import dsv3
from dsv3.checkpoint.leaves import host
from dsv3.model import param_specs
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.rules import local_slices, make_rules
from dsv3.parallel.schedules import Pipeline, bubble, check_schedule, chunks_of, in_flight, tasks, timeline
from dsv3.parallel.shard import Placement
from dsv3.parallel.stages import chunks, held
from dsv3.spec import is_spec
from dsv3.tree import paths

HERE = Path(__file__).parent
TINY = {"num_hidden_layers": 4, "first_k_dense_replace": 1, "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96,
        "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "num_nextn_predict_layers": 1, "aux_loss_alpha": 0.01}
RUN = {"rows": 4, "length": 12, "steps": 3, "rate": 3e-4}  # a larger rate magnifies rounding: AdamW divides by tiny gradients
TWO = {  # of two processes
    "1f1b": {"mesh": "pipe=2", "pipeline": {"layers": [2, 0]}, "changes": {"num_hidden_layers": 2}, "accumulate": 4},
    "interleaved": {"mesh": "pipe=2", "pipeline": {"schedule": "interleaved", "virtual": 2}, "changes": {}, "accumulate": 4},
    "dualpipev": {"mesh": "pipe=2", "pipeline": {"schedule": "dualpipev", "virtual": 2, "noop": [3]},
                  "changes": {"num_hidden_layers": 3}, "accumulate": 4},
}
FOUR = {
    "dp2 pp2": {"mesh": "data=2,pipe=2", "pipeline": {}, "changes": {"num_hidden_layers": 2}, "accumulate": 2},
    "tp2 pp2": {"mesh": "model=2,pipe=2", "pipeline": {"schedule": "gpipe"}, "accumulate": 2,
                "changes": {"num_hidden_layers": 2, "num_nextn_predict_layers": 0, "tie_word_embeddings": True}},
}


# -- real processes ----------------------------------------------------------------------------------------------------
def launch(folder, cases, size):
    """Run the worker on so many ranks."""
    (folder / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = str(Path(sys.executable).parent)
    path = os.pathsep.join((here, os.environ.get("PATH", "")))
    command = [shutil.which("msrun", path=path), f"--worker_num={size}", f"--local_worker_num={size}", f"--master_port={port}",
               f"--log_dir={folder / 'log'}", "--join=True", str(HERE / "pipeline_worker.py"), str(folder)]
    sources = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": sources, "PATH": path,
                                "MS_NODE_TIMEOUT": "600", "MS_TOPO_TIMEOUT": "600"}  # a stage waits while another compiles
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    logs = "".join(log.read_text()[-3000:] for log in sorted((folder / "log").glob("worker_*.log")))
    assert done.returncode == 0, logs or done.stdout + done.stderr


def on_one_device(changes, accumulate, rows, length, steps, rate):
    """Metrics of each step, and the params after the last."""
    cfg, optimizer = dsv3.TINY.replace(**changes), dsv3.adamw(rate)
    params = dsv3.init(cfg, seed=0)
    step, state, metrics = dsv3.make_train_step(cfg, optimizer, accumulate=accumulate), optimizer.init(params), []
    for seed in range(1, steps + 1):
        tokens = np.random.default_rng(seed).integers(0, cfg.vocab_size, (rows, length)).astype(np.int32)
        params, state, found = step(params, state, {"tokens": tokens})
        metrics.append({k: v.asnumpy() for k, v in found.items() if k != "learning_rate"})
    return cfg, metrics, {path: host(leaf) for path, leaf in paths(params)}


@pytest.mark.parametrize("cases", [TWO, FOUR], ids=["two", "four"])
def test_stages_together_make_the_step_of_one_device(tmp_path, cases):
    cases = {name: RUN | case | {"changes": TINY | case["changes"]} for name, case in cases.items()}
    size = Mesh.parse(next(iter(cases.values()))["mesh"]).size
    launch(tmp_path, cases, size)
    for name, case in cases.items():
        mesh, seen = Mesh.parse(case["mesh"]), Counter()
        cfg, wanted, final = on_one_device(**{k: v for k, v in case.items() if k not in ("mesh", "pipeline")})
        specs, worst = dict(paths(param_specs(cfg), is_spec)), 0.0
        for rank in range(size):
            told = json.loads((tmp_path / f"{name}_{rank}.json").read_text())
            assert told["compiled again"] == 0
            for ours, theirs in zip(told["metrics"], wanted, strict=True):
                assert ours["load"] == theirs["load"].tolist()
                for key in ("loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm"):
                    assert ours[key] == pytest.approx(float(theirs[key]), rel=1e-5, abs=1e-6), (name, rank, key)
            for path, found in np.load(tmp_path / f"{name}_{rank}.npz").items():
                part = local_slices(specs[path], mesh, make_rules(), mesh.coords(rank), path)
                worst, seen[path] = max(worst, float(np.abs(found - final[path][part]).max())), seen[path] + 1
        print(name, "largest difference of a param:", worst)
        assert worst < 1e-5 and set(seen) == set(final)
        ranks = size // mesh.pipe
        assert seen["embed"] == ranks * (1 if name == "dualpipev" else 2), "the last stage reads the embedding too"
        assert {n for path, n in seen.items() if path != "embed"} == {ranks}
