"""Our side of ``peer``: ``make_train_step`` from the same checkpoint. Run as a module; argument: the settings
as JSON.
"""

from __future__ import annotations

import json
import os
import sys

from .blocks import confine, serve, take_stdout


def main(s: dict) -> None:
    """Serve blocks of steps until the input ends."""
    out = take_stdout()
    confine(s["threads"])
    os.environ.setdefault("DSV3_NUM_THREADS", str(s["threads"]))
    import mindspore as ms

    from ..checkpoint.hf import from_hf
    from ..kernels import native
    from ..optim import adamw
    from ..train import make_train_step
    from ..tree import size
    from .measure import build_kernels, timed, tokens

    build_kernels()
    params, cfg = from_hf(s["checkpoint"], dtype="float32")
    optimizer = adamw(
        s["learning_rate"],
        beta1=s["betas"][0],
        beta2=s["betas"][1],
        eps=s["eps"],
        weight_decay=s["weight_decay"],
        clip_norm=s["clip_norm"],
    )
    state, train_step = optimizer.init(params), make_train_step(cfg, optimizer, bias_update_rate=0.0)
    feed = tokens(cfg.vocab_size, s["batch"], s["seq"])

    def step() -> float:
        nonlocal params, state
        params, state, metrics = train_step(params, state, {"tokens": next(feed)})
        return float(metrics["loss"])

    first: list[float] = []
    compile_wall, compile_cpu, _ = timed(lambda: first.append(step()))

    def step_after_first() -> float:
        return first.pop() if first else step()

    why = native.why_reference()
    serve(
        out,
        {
            "name": f"dsv3, MindSpore {ms.__version__}",
            "variant": "native" if why is None else f"reference ({why})",
            "parameters": size(params),
            "compile_seconds": compile_wall,
            "compile_cpu_seconds": compile_cpu,
        },
        step_after_first,
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
