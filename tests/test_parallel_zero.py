"""ZeRO 1, 2 and 3, gradient accumulation, recompute and bfloat16 over real processes, against one device.

Planted faults this file was seen to catch:
"""
import json

import numpy as np
import pytest
from test_parallel_numbers import CHANGES, on_one_device
from test_parallel_processes import launch

import dsv3
from dsv3.model import param_specs
from dsv3.parallel.memory import Run, leaf_bytes
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.rules import leaves, local_slices, make_rules
from dsv3.spec import is_spec
from dsv3.tree import paths

# q_lora 33: wq_b [33, 192] and q_norm [33] do not divide by 2 and stay whole
ODD = CHANGES | {"q_lora_rank": 33, "num_hidden_layers": 1, "first_k_dense_replace": 0}
DEEP = CHANGES | {"q_lora_rank": 33, "num_nextn_predict_layers": 1}  # a dense block, a MoE block, an MTP module
CASES = {
    "dp2 ZeRO-1": ("data=2", {"zero": 1}, {}),
    "dp2 ZeRO-2, accumulate": ("data=2", {"zero": 2}, {"accumulate": 2}),
    "dp2 ZeRO-3": ("data=2", {"zero": 3}, {}),
    "dp4 ZeRO-1 in twos": ("data=4", {"zero": 1, "shard_size": 2}, {}),
    "dp2 tp2 ZeRO-3, accumulate, recompute": ("data=2,model=2", {"zero": 3}, {"accumulate": 2, "recompute": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_processes_share_out_the_state_and_make_the_step_of_one_device(tmp_path, case):
    text, rules, options = CASES[case]
    changes = DEEP if "recompute" in options else ODD
    mesh, cfg, table = Mesh.parse(text), dsv3.TINY.replace(**changes), make_rules(**rules)
    wanted, final = on_one_device(cfg, accumulate=options.get("accumulate", 1))
    launch(tmp_path, mesh, changes, rules, options)
    expected = [leaf_bytes(leaf, table, Run(dtype="float32")) for leaf in leaves(param_specs(cfg), mesh, table)]
    assert 1 < len({leaf.shards for leaf in leaves(param_specs(cfg), mesh, table)}), "some leaves are cut, some not"
    for rank in range(mesh.size):
        metrics, found = json.loads((tmp_path / f"rank_{rank}.json").read_text()), np.load(tmp_path / f"rank_{rank}.npz")
        for ours, theirs in zip(metrics, wanted, strict=True):
            assert ours["load"] == theirs["load"].tolist()
            for key in ("loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm"):
                assert ours[key] == pytest.approx(float(theirs[key]), rel=1e-5, abs=1e-6)
        for path, spec in paths(param_specs(cfg), is_spec):
            part = local_slices(spec, mesh, table, mesh.coords(rank), path, state=rules["zero"] == 3)
            assert found[path].shape == final[path][part].shape and np.abs(found[path] - final[path][part]).max() < 1e-5, path
        sizes = json.loads((tmp_path / f"bytes_{rank}.json").read_text())
        assert sizes == {"params": sum(w for w, _, _ in expected), "state": sum(s for _, _, s in expected)}
