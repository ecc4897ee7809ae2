"""Expert parallelism: every way in which tokens meet their experts, against one device.

Real processes (msrun on the CPU) train two steps; losses, load, params and first moments (the gradients) are compared.
"""
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from experts_worker import ROUTES, batch_of, train

import dsv3
from dsv3.model import param_specs
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.rules import local_slices, make_rules
from dsv3.spec import is_spec
from dsv3.tree import paths

HERE = Path(__file__).parent
CHANGES = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
           "n_routed_experts": 8, "n_group": 4, "topk_group": 3, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
           "num_nextn_predict_layers": 0, "aux_loss_alpha": 0.01}
ROWS, LENGTH, STEPS, RATE = 4, 7, 2, 3e-4
JOBS = {
    "gather": ("data=4,expert=4", {"dispatch": "gather"}, None),
    "alltoall": ("data=4,expert=4", {}, None),
    "all to one rank": ("data=4,expert=4", {"dispatch": "alltoall"}, "to_the_first"),
    "two_level": ("data=4,expert=4", {"dispatch": "two_level", "node": 2}, None),
    "two_level to one rank": ("data=4,expert=4", {"dispatch": "two_level", "node": 2}, "to_the_first"),
    "extend": ("data=2,model=2,expert=2", {"experts": "extend"}, None),
    "whole": ("data=2,model=2,expert=2", {"experts": "whole", "dispatch": "alltoall"}, None),
    "tensor": ("data=2,model=2,expert=2", {"dispatch": "alltoall"}, None),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the ranks left what they found, after all jobs ran in one start of four processes."""
    out = tmp_path_factory.mktemp("experts")
    jobs = [{"name": k, "mesh": m, "rules": r, "changes": CHANGES, "route": f} for k, (m, r, f) in JOBS.items()]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    msrun = shutil.which("msrun", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    command = [msrun, "--worker_num=4", "--local_worker_num=4", f"--master_port={port}", f"--log_dir={out / 'log'}",
               "--join=True", str(HERE / "experts_worker.py"), json.dumps(jobs), *map(str, (ROWS, LENGTH, STEPS, RATE, out))]
    environment = os.environ | {  # msrun starts "python" and does not set the path
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH")))),
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
    }
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, timeout=500)
    log = out / "log" / "worker_0.log"
    assert done.returncode == 0, (log.read_text() if log.exists() else done.stdout + done.stderr)[-4000:]
    return out


@pytest.fixture(scope="module")
def one_device():
    """The same steps on one device, by router."""
    cfg = dsv3.TINY.replace(**CHANGES)
    batches = [batch_of(cfg, ROWS, LENGTH, seed) for seed in range(1, STEPS + 1)]
    return {name: train(cfg, dsv3.init(cfg, seed=0), batches, RATE, route=route) for name, route in ROUTES.items()}


@pytest.mark.parametrize("job", JOBS)
def test_processes_together_make_the_step_of_one_device(folder, one_device, job):
    text, arguments, route = JOBS[job]
    mesh, rules, (wanted, params, moments) = Mesh.parse(text), make_rules(**arguments), one_device[route]
    worst = {"p": 0.0, "m": 0.0}
    for rank in range(mesh.size):
        metrics, found = json.loads((folder / f"{job}_{rank}.json").read_text()), np.load(folder / f"{job}_{rank}.npz")
        for ours, theirs in zip(metrics, wanted, strict=True):
            assert ours["load"] == theirs["load"]
            for key in ("loss", "main_loss", "balance_loss", "grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6)
        for path, spec in paths(param_specs(dsv3.TINY.replace(**CHANGES)), is_spec):
            part = local_slices(spec, mesh, rules, mesh.coords(rank), path)
            for kind, whole in (("p", params), ("m", moments)):
                if path in whole:
                    worst[kind] = max(worst[kind], np.abs(found[f"{kind}/{path}"] - whole[path][part]).max())
    print(job, worst)
    assert worst["p"] < 1e-5 and worst["m"] < 1e-7
