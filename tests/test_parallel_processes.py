"""Real processes: msrun starts ranks on the CPU, which train together over MindSpore's own collectives.

The CPU's have AllReduce of float32 sums only, so ``parallel.shard`` makes the others of it there.
Planted faults this file was seen to catch: gradients of copies not summed; the objective not divided by the ranks.
"""
import json

import numpy as np
import pytest
from cluster import run_ranks
from test_parallel_numbers import CHANGES, LENGTH, RATE, ROWS, STEPS, on_one_device

import dsv3
from dsv3.model import param_specs
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.rules import local_slices, make_rules
from dsv3.spec import is_spec
from dsv3.tree import paths


def launch(folder, mesh, changes, rules=None, documents=False, options=None):
    """Run the worker on every rank of a mesh; rules: arguments of ``make_rules``; documents: rows of several; options: of
    ``make_train_step``."""
    run_ranks(folder, mesh.size, "parallel_worker.py", mesh, json.dumps(changes), ROWS, LENGTH, STEPS, RATE, folder,
              json.dumps(rules or {}), json.dumps(documents), json.dumps(options or {}))


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
