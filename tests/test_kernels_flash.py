"""Attention as Ascend's graphs have it, against the C++ kernel of the CPU: values and gradients.

The graph is compiled for a simulated Ascend device, exported, and interpreted by the documented meaning of its fused operator
(``parallel.lockstep_fused``).
Planted faults this file was seen to catch: a mask that hides one diagonal more; the operator without the scale.
"""
import numpy as np
import pytest
from mindspore import Tensor, ops

import dsv3
from dsv3.kernels.attention import mla_attention
from dsv3.parallel import lockstep
from dsv3.parallel.simulate import Step, simulate
from dsv3.transform import enter_graph, whole_program

H, N, R, V, B, T = 2, 16, 16, 32, 2, 6
POSITIONS = (0, 3, 5)  # of the queries, where rows are cut


def arrays(cut):
    """q, kv, k_pe, weights of the sum that is differentiated, cos, sin, segments."""
    rng = np.random.default_rng(0)
    t = len(POSITIONS) if cut else T
    shapes = ((B, t, H * (N + R)), (B, T, H * (N + V)), (B, T, R), (B, t, H * V))
    angles = rng.random((1, T, R // 2))
    floats = [rng.standard_normal(s).astype(np.float32) for s in shapes]
    segments = np.array([[0, 0, 1, 1, 1, 1], [0] * T], np.int32)
    return *floats, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), segments


def objective(segments, cut):
    """f(q, kv, k_pe, w, cos, sin, segments) -> a sum over the result."""
    positions = Tensor(np.array(POSITIONS, np.int32)) if cut else None

    def f(q, kv, k_pe, w, cos, sin, ids):
        out = mla_attention(q, kv, k_pe, cos, sin, ids if segments else None, num_heads=H, qk_nope_head_dim=N,
                            qk_rope_head_dim=R, v_head_dim=V, scale=0.3, query_positions=positions)
        return ops.sum(out * w)

    return f


def gradients(f):
    """Of the first three arguments."""
    def loss(three, rest):
        return f(three[0], three[1], three[2], rest[0], rest[1], rest[2], rest[3])

    return dsv3.value_and_grad(loss)


def target(segments, cut):
    """A step for a simulated device."""
    enter_graph()
    both = gradients(objective(segments, cut))

    def step(q, kv, k_pe, w, cos, sin, ids):
        value, grads = both((q, kv, k_pe), (w, cos, sin, ids))
        return value, grads[0], grads[1], grads[2]

    return Step(whole_program(step), tuple(map(Tensor, arrays(cut))))


@pytest.mark.parametrize("segments, cut", [(False, False), (True, False), (True, True)])
def test_the_fused_operator_is_attention(tmp_path, monkeypatch, segments, cut):
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    report = simulate("test_kernels_flash:target", {"segments": segments, "cut": cut}, 2, 0, keep=tmp_path, export=True)
    program, data = lockstep.load(report.program, 0), arrays(cut)
    kinds = {node.op for graph in (program.graph, *program.functions.values()) for node in graph.nodes}
    assert {"FlashAttentionScore", "FlashAttentionScoreGrad"} <= kinds and not kinds & {"Softmax", "BatchMatMul"}
    found = lockstep.run([program], [data])[0]
    value, grads = gradients(objective(segments, cut))(data[:3], data[3:])
    for ours, theirs in zip(found, (value, *grads)):
        np.testing.assert_allclose(ours, theirs.asnumpy(), rtol=2e-5, atol=2e-6)
