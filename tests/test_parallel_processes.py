"""Real processes: msrun starts ranks on the CPU, which train together over MindSpore's own collectives.

The CPU's have AllReduce of float32 sums only, so ``parallel.shard`` makes the others of it there.
Planted faults this file was seen to catch: gradients of copies not summed; the objective not divided by the ranks.
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
from test_parallel_numbers import CHANGES, LENGTH, RATE, ROWS, STEPS, on_one_device

import dsv3
from dsv3.model import param_specs
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.rules import local_slices, make_rules
from dsv3.spec import is_spec
from dsv3.tree import paths

HERE = Path(__file__).parent


def launch(folder, mesh, changes, rules=None, documents=False, options=None):
    """Run the worker on every rank of a mesh; rules: arguments of ``make_rules``; documents: rows of several; options: of
    ``make_train_step``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    msrun = shutil.which("msrun", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    command = [msrun, f"--worker_num={mesh.size}", f"--local_worker_num={mesh.size}", f"--master_port={port}",
               f"--log_dir={folder / 'log'}", "--join=True", str(HERE / "parallel_worker.py"), str(mesh), json.dumps(changes),
               str(ROWS), str(LENGTH), str(STEPS), str(RATE), str(folder), json.dumps(rules or {}), json.dumps(documents),
               json.dumps(options or {})]
    environment = os.environ | {  # msrun starts "python" and does not set the path
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH")))),
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "MS_NODE_TIMEOUT": "600", "MS_TOPO_TIMEOUT": "600",  # one rank may compile for longer than another
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    log = folder / "log" / "worker_0.log"
    assert done.returncode == 0, (log.read_text() if log.exists() else done.stdout + done.stderr)[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data=2", "data=2,model=2,expert=2"])
def test_processes_together_make_the_step_of_one_device(tmp_path, layout):
    mesh, changes = Mesh.parse(layout), CHANGES | {"num_nextn_predict_layers": 1}
    cfg = dsv3.TINY.replace(**changes)
    wanted, final = on_one_device(cfg)
    launch(tmp_path, mesh, changes)
    assert_equal(tmp_path, mesh, cfg, wanted, final)


def assert_equal(folder, mesh, cfg, wanted, final, table=None):
    """Every rank has the metrics and its slices of the params of one device."""
    table = table or make_rules()
    for rank in range(mesh.size):
        metrics, found = json.loads((folder / f"rank_{rank}.json").read_text()), np.load(folder / f"rank_{rank}.npz")
        for ours, theirs in zip(metrics, wanted):
            assert ours["load"] == theirs["load"].tolist()
            for key in ("loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm"):
                assert ours[key] == pytest.approx(float(theirs[key]), rel=1e-5, abs=1e-6)
        for path, spec in paths(param_specs(cfg), is_spec):
            part = local_slices(spec, mesh, table, mesh.coords(rank), path, state=table.zero == 3)
            assert found[path].shape == final[path][part].shape, path
            assert np.abs(found[path] - final[path][part]).max() < 1e-5
