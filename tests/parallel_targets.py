"""What the simulated ranks of the tests of ``parallel`` compile: called in child processes, by name."""
import os
import signal
import time

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.communication import get_rank
from mindspore.parallel import Layout

from dsv3.config import TINY
from dsv3.engine import Engine
from dsv3.model import init
from dsv3.parallel.groups import own_rank
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.rules import make_rules
from dsv3.parallel.shard import Placement, group_of
from dsv3.parallel.simulate import Step
from dsv3.parallel.stages import own
from dsv3.sampling import Sampling
from dsv3.transform import jit, value_and_grad

BATCH, WIDTH, HIDDEN, RATE = 16, 6, 20, 0.5
STAGES, MICRO, ROWS = 2, 4, 3


def arrays():
    """x [BATCH, WIDTH], w1 [WIDTH, HIDDEN], w2 [HIDDEN, WIDTH] of the two products."""
    rng = np.random.default_rng(0)
    x, w1, w2 = rng.standard_normal((BATCH, WIDTH)), rng.standard_normal((WIDTH, HIDDEN)), rng.standard_normal((HIDDEN, WIDTH))
    return x.astype(np.float32), (0.5 * w1).astype(np.float32), (0.5 * w2).astype(np.float32)


def rows_of(x, rank, data, model):
    """The part of the batch that a rank of the mesh (data, model) is given."""
    share = len(x) // data
    return x[rank // model * share : (rank // model + 1) * share]


def two_products(data, model, hidden=HIDDEN):
    """SGD on mean(square(tanh(x w1) w2)): the batch over ``data``, the hidden dim over ``model``."""
    x, w1, w2 = arrays()
    if hidden != HIDDEN:
        w1, w2 = np.zeros((WIDTH, hidden), np.float32), np.zeros((hidden, WIDTH), np.float32)
    w1, w2 = Parameter(Tensor(w1), name="w1"), Parameter(Tensor(w2), name="w2")
    layout = Layout((data, model), ("data", "model"))
    strategy = (layout("data", "None"),)
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel", device_num=data * model, dataset_strategy=strategy)
    first = ops.MatMul().shard((layout("data", "None"), layout("None", "model")))
    tanh = ops.Tanh().shard((layout("data", "model"),))
    second = ops.MatMul().shard((layout("data", "model"), layout("model", "None")))
    square, mean = ops.Square().shard((layout("data", "None"),)), ops.ReduceMean().shard(((data, 1),))

    def loss(x):
        return mean(square(second(tanh(first(x, w1)), w2)))

    gradient = ms.value_and_grad(loss, None, weights=ParameterTuple([w1, w2]))

    @ms.jit
    def step(x):
        value, (g1, g2) = gradient(x)
        return ops.depend(value, (ops.assign_sub(w1, RATE * g1), ops.assign_sub(w2, RATE * g2)))

    return Step(step, (Tensor(rows_of(x, get_rank(), data, model)),), {"rank": get_rank()})


def two_products_numpy(x, w1, w2):
    """loss, and the weights after one step, of the same in NumPy."""
    h = np.tanh(x @ w1)
    y = h @ w2
    dy = 2 * y / y.size
    dh = dy @ w2.T * (1 - h * h)
    return np.square(y).mean(), w1 - RATE * (x.T @ dh), w2 - RATE * (h.T @ dy)


def pipeline():
    """SGD on the sum over micro-batches of mean(tanh(tanh(x w0) w1)): one product a stage, 1F1B, one shared micro-step."""
    x, weights = pipeline_arrays()
    params = [Parameter(Tensor(w), name=f"w{i}") for i, w in enumerate(weights)]
    # MindSpore finds the sums of gradients by this name, and their layouts by their being clones.
    sums = ParameterTuple(params).clone(prefix="accu_grads", init="zeros")
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel", device_num=STAGES, pipeline_stages=STAGES, full_batch=True)

    def stage(i):
        class Stage(nn.Cell):
            def construct(self, x):
                return ops.tanh(ops.matmul(x, params[i]))

        cell = Stage(auto_prefix=False)
        cell.pipeline_stage = i
        return cell.set_train()

    stages, mean = [stage(i) for i in range(STAGES)], ops.ReduceMean()

    class Last(nn.Cell):
        def construct(self, x):
            return mean(x)

    last = Last(auto_prefix=False)
    last.pipeline_stage = STAGES - 1
    last.set_train()

    class Micro(nn.Cell):
        @ms.lazy_inline
        def __init__(self):
            super().__init__(auto_prefix=False)

        def construct(self, x):
            for cell in stages:
                x = cell(x)
            return last(x)

    micro = Micro().set_train()
    slices, adds = [ops.StridedSlice() for _ in range(MICRO)], [ops.Add().add_prim_attr("pipeline_end", i) for i in range(MICRO)]

    def loss(x):
        total = None
        for i in range(MICRO):
            value = micro(ops.reshape(slices[i](x, (i, 0, 0), (i + 1, ROWS, WIDTH), (1, 1, 1)), (ROWS, WIDTH)))
            if total is None:
                total = value
            else:
                total = adds[i](total, value)
        return total

    gradient = ms.value_and_grad(loss, None, weights=ParameterTuple(params))
    mine = get_rank()

    @ms.jit
    def step(x):
        value, grads = gradient(x)
        total = ops.depend(sums[mine], grads)
        scaled = RATE * total
        zero = ops.assign(sums[mine], ops.depend(total, scaled) * 0.0)
        return ops.depend(value, ops.assign_sub(params[mine], ops.depend(scaled, zero)))

    return Step(step, (Tensor(x),))


def pipeline_arrays():
    """x [MICRO, ROWS, WIDTH] and a weight [WIDTH, WIDTH] a stage."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((MICRO, ROWS, WIDTH)).astype(np.float32)
    return x, [(0.5 * rng.standard_normal((WIDTH, WIDTH))).astype(np.float32) for _ in range(STAGES)]


def pipeline_numpy(x, weights):
    """loss, and the weights after one step, of the same in NumPy."""
    h0 = np.tanh(x @ weights[0])
    h1 = np.tanh(h0 @ weights[1])
    d1 = (1 - h1 * h1) / h1[0].size
    d0 = d1 @ weights[1].T * (1 - h0 * h0)
    grads = np.einsum("mri,mrj->ij", x, d0), np.einsum("mri,mrj->ij", h0, d1)
    return h1.mean((1, 2)).sum(), [w - RATE * g for w, g in zip(weights, grads)]


# -- targets that go wrong ---------------------------------------------------------------------------------------------
def raises(word):
    """An error with a word in it."""
    print(f"line before the {word}")
    raise ValueError(f"this is the {word}")


def dies():
    """As a process that ran out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def sleeps():
    """Longer than anybody waits."""
    time.sleep(600)


def compiles_nothing():
    """A value without a graph."""
    return 1


# -- a step that Python drives -----------------------------------------------------------------------------------------
def driven(steps=1, fault=None):
    """SGD on mean(square(x w)) over two ranks, two micro-batches a step: a graph that adds gradients up in place, one that
    applies them, and a message from rank 0 to rank 1. Returns (losses, w, what rank 1 was sent).

    fault: what to do wrong on rank 1 in the second step: "skip" a graph, "raise", or "other" arguments for it.
    """
    rank = own_rank()
    group = group_of((0, 1))
    total, send = ops.AllReduce("sum", group), ops.Send(sr_tag=0, dest_rank=1, group=group)
    receive = ops.Receive(sr_tag=0, src_rank=0, shape=[WIDTH], dtype=ms.float32, group=group)

    def loss_of(w, x):
        return ops.square(ops.matmul(x, w.reshape(WIDTH, 1))).mean() / MICRO

    gradient = value_and_grad(loss_of)

    @jit
    def add(w, sums, batch):
        loss, grad = gradient(w, batch["x"])
        added = ops.assign_add(sums["w"], total(grad))
        return {"loss": total(ops.depend(loss, added)), "parts": (loss, grad.astype(ms.bfloat16))}

    @jit
    def apply(w, sums):
        done = ops.assign_sub(w, RATE * sums["w"])
        return (ops.assign(sums["w"], ops.depend(ops.zeros_like(w), done)),)

    @jit
    def talk(w):
        if rank == 0:
            return (ops.depend(w, send(w)),)
        return (receive(w[:1]),)

    x, w, _ = arrays()
    x, w = np.tile(x, (MICRO, 1)) * np.arange(1, 1 + MICRO * BATCH, dtype=np.float32)[:, None] / 32, Tensor(w[:, 0].copy())
    sums, losses, heard = {"w": Tensor(np.zeros(WIDTH, np.float32))}, [], None
    for step in range(steps):
        loss = None
        for i in range(MICRO // 2):
            at = (i * 2 + rank) * BATCH
            if step == 1 and i == 0 and rank == 1 and fault:
                if fault == "raise":
                    raise ValueError("rank 1 stumbles")
                if fault == "skip":
                    continue
            batch = {"x" if not (fault == "other" and step == 1) else "y": x[at : at + BATCH]}
            found = add(w, sums, batch)
            loss = found["loss"] if loss is None else loss + found["loss"]
        losses.append(loss)
        apply(w, sums)
        heard = talk(w)[0]
    return losses, w, heard


def record_driven():
    """``driven``, once."""
    driven()


def driven_numpy(steps):
    """(losses, w) of the same in NumPy."""
    x, w, _ = arrays()
    x, w = np.tile(x, (MICRO, 1)) * np.arange(1, 1 + MICRO * BATCH, dtype=np.float32)[:, None] / 32, w[:, 0].copy()
    losses = []
    for _ in range(steps):
        y = x @ w
        losses.append(np.square(y).mean())
        w = w - RATE * 2 / y.size * (x.T @ y)
    return losses, w


# -- decoding ----------------------------------------------------------------------------------------------------------
def decode_graphs(changes, mesh):
    """A prompt in two chunks and one drafted step of a rank's engine."""
    cfg, mesh = TINY.replace(**changes), Mesh.parse(mesh)
    params = own(init(cfg, 0), cfg, Placement(mesh, make_rules(), own_rank()))
    engine = Engine(params, cfg, max_batch=2, max_length=64, block_size=4, chunk=32, speculative=True, mesh=mesh)
    engine.submit(list(range(3, 50)), Sampling(max_new_tokens=2))
    for _ in range(2):
        engine.step()
