"""Our side of ``generate``: one engine for all batches. Run as a module; argument: the settings as JSON."""
from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from .blocks import confine, take_stdout


def main(s: dict) -> None:
    """Generate a batch for each line of the input, its number of rows, until the input ends."""
    out = take_stdout()
    confine(s["threads"])
    os.environ.setdefault("DSV3_NUM_THREADS", str(s["threads"]))
    import mindspore as ms

    from ..checkpoint.own import load
    from ..decode import bytes_per_token
    from ..engine import Engine
    from ..sampling import Sampling
    from .measure import build_kernels, peak_bytes

    build_kernels()
    params, cfg = load(Path(s["folder"]) / "own")
    prompts = json.loads((Path(s["folder"]) / "prompts.json").read_text())
    engine = Engine(params, cfg, max_batch=s["most"], max_length=len(prompts[0]) + s["new"], speculative=s["speculative"])
    print(json.dumps({"name": f"dsv3, MindSpore {ms.__version__}",
                      "cache bytes a token": bytes_per_token(cfg, s["speculative"])}), file=out)
    for line in sys.stdin:
        before, began, cpu = engine.stats, time.perf_counter(), time.process_time()
        engine.blocks.forget()  # every round computes its prompts
        requests = [engine.submit(p, Sampling(max_new_tokens=s["new"], ignore_eos=True)) for p in prompts[:int(line)]]
        texts: dict[int, list[int]] = {r: [] for r in requests}
        first = None
        while not engine.idle:
            for event in engine.step():
                texts[event.request].append(event.token)
            if first is None and all(texts.values()):
                first, behind = time.perf_counter(), sum(map(len, texts.values()))
        ended = time.perf_counter()
        print(json.dumps({"first": first - began, "rate": (len(requests) * s["new"] - behind) / (ended - first),
                          "cpu": time.process_time() - cpu, "new": list(texts.values()), "peak_bytes": peak_bytes(),
                          "drafted": engine.stats.drafted - before.drafted, "accepted": engine.stats.accepted - before.accepted}),
              file=out)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
