"""Expert parallelism: every way in which tokens meet their experts, against one device.

Real processes (msrun on the CPU) run one mixture of experts forward and backward on many meshes.
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
from experts_worker import ROUTES, ROWS, inputs, run

import dsv3
from dsv3.nn.moe import moe_spec
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.rules import local_slices, make_rules
from dsv3.spec import is_spec
from dsv3.tree import paths

HERE = Path(__file__).parent
CHANGES = {"hidden_size": 16, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3,
           "moe_intermediate_size": 12, "n_shared_experts": 1}
EP4, TP2, SP = "data=4,expert=4", "data=2,model=2,expert=2", {"sequence_parallel": True}
JOBS = {
    "chosen by bytes: alltoall": (EP4, {}, None),
    "alltoall, all to one rank": (EP4, {"dispatch": "alltoall"}, "to_the_first"),
    "two levels": (EP4, {"node": 2}, None),
    "two levels, all to one rank": (EP4, {"node": 2}, "to_the_first"),
    "cut experts, gather, sequence parallel": (TP2, SP | {"dispatch": "gather"}, None),
    "cut experts, alltoall": (TP2, {"dispatch": "alltoall"}, None),
    "extend": (TP2, {"experts": "extend"}, None),
    "extend, sequence parallel": (TP2, SP | {"experts": "extend", "dispatch": "two_level", "node": 2}, None),
    "whole": (TP2, {"experts": "whole", "dispatch": "alltoall"}, None),
    "context": ("data=2,context=2,expert=2", {"dispatch": "alltoall"}, None),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the ranks left what they found, after all jobs ran in one start of four processes."""
    out = tmp_path_factory.mktemp("experts")
    jobs = [{"name": k, "mesh": m, "rules": r, "route": f} for k, (m, r, f) in JOBS.items()]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    msrun = shutil.which("msrun", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    command = [msrun, "--worker_num=4", "--local_worker_num=4", f"--master_port={port}", f"--log_dir={out / 'log'}",
               "--join=True", str(HERE / "experts_worker.py"), json.dumps(jobs), json.dumps(CHANGES), str(out)]
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
    """The same on one device, by router."""
    cfg = dsv3.TINY.replace(**CHANGES)
    return {name: run(cfg, route, *inputs(cfg)) for name, route in ROUTES.items()}


@pytest.mark.parametrize("job", JOBS)
def test_processes_together_are_one_device(folder, one_device, job):
    text, arguments, route = JOBS[job]
    mesh, rules, wanted = Mesh.parse(text), make_rules(**arguments), one_device[route]
    specs = dict(paths(moe_spec(dsv3.TINY.replace(**CHANGES)), is_spec))
    for rank in range(mesh.size):
        coords, found = mesh.coords(rank), np.load(folder / f"{job}_{rank}.npz")
        n = ROWS // mesh.data
        i = mesh.index(coords, ("data",)) * n
        np.testing.assert_array_equal(found["load"], wanted["load"])
        np.testing.assert_allclose(found["aux"], wanted["aux"], rtol=1e-5)
        for key in ("y", "dx"):
            close(found[key], wanted[key][i : i + n], key)
        for path, spec in specs.items():
            close(found[f"d {path}"], wanted[f"d {path}"][local_slices(spec, mesh, rules, coords, path)], path)


def close(found, wanted, what):
    """Within 1e-5 of the largest."""
    assert found.shape == wanted.shape and np.abs(found - wanted).max() <= 1e-5 * max(np.abs(wanted).max(), 1e-30), what
