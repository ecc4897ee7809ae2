"""Rows cut over ranks, in real processes: sequence and context parallelism make the step of one device.
"""
import pytest
from parallel_worker import cut_up
from test_parallel_numbers import CHANGES, on_one_device
from test_parallel_processes import assert_equal, launch

import dsv3
from dsv3.parallel.mesh import Mesh

SP = {"sequence_parallel": True}
LAYOUTS = {
    "tp2, sequence parallel": ("model=2", SP, False),
    "dp2 tp2 ep2, sequence parallel": ("data=2,model=2,expert=2", SP, False),
    "cp2, documents": ("context=2", {}, True),
    "cp2 tp2, sequence parallel, documents": ("context=2,model=2", SP, True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_processes_that_share_rows_make_the_step_of_one_device(tmp_path, layout):
    text, rules, documents = LAYOUTS[layout]
    mesh, changes = Mesh.parse(text), CHANGES | {"num_nextn_predict_layers": 2}
    cfg = dsv3.TINY.replace(**changes)
    wanted, final = on_one_device(cfg, cut_up if documents else None)
    launch(tmp_path, mesh, changes, rules, documents)
    assert_equal(tmp_path, mesh, cfg, wanted, final)
