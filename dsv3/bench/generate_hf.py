"""Their side of ``generate``: model.generate of Hugging Face transformers with the fastest of its own implementations. Run as a
script, possibly by an interpreter without this package; argument: the settings as JSON.
"""

import json
import os
import resource
import sys
import time

from blocks import take_stdout  # beside this file, as the next
from peer_hf import choose, load

VARIANTS = [f"{experts} + {attention}" for experts in ("eager", "grouped_mm", "batched_mm") for attention in ("sdpa", "eager")]


class Clock:
    """A streamer that notes when tokens come; the first call brings the prompt."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def main(s):
    out = take_stdout()
    torch, transformers, model = load(os.path.join(s["folder"], "hf"), s["threads"])
    model.eval()
    model.generation_config.eos_token_id = None
    with open(os.path.join(s["folder"], "prompts.json")) as file:
        prompts = torch.tensor(json.load(file))

    def generate(n, new):
        clock, ids, cpu = Clock(), prompts[:n], time.process_time()
        began = time.perf_counter()
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
                               pad_token_id=0, streamer=clock)
        first, ended = clock.times[1], clock.times[-1]
        return {"first": first - began, "rate": n * (new - 1) / (ended - first), "cpu": time.process_time() - cpu,
                "new": found[:, ids.shape[1]:].tolist(), "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}

    rates, tried = {}, {}
    for variant in VARIANTS * 2:  # the first time loads libraries
        try:
            choose(model, variant)
            rates[variant] = max(generate(1, 8)["rate"], rates.get(variant, 0))
            tried[variant] = round(rates[variant], 1)
        # A variant that this torch cannot run is no candidate; its error is kept and printed beside the others.
        except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
            tried[variant] = f"{type(error).__name__}: {str(error)[:200]}"
            rates.pop(variant, None)
    if not rates:
        raise SystemExit(f"no variant of transformers ran: {tried}")
    best = max(rates, key=rates.get)
    choose(model, best)
    print(json.dumps({"name": f"transformers {transformers.__version__}, torch {torch.__version__}", "variant": best,
                      "tried": tried}), file=out)
    for line in sys.stdin:
        print(json.dumps(generate(int(line), s["new"])), file=out)


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != here]  # its neighbours' names are common ones
    main(json.loads(sys.argv[1]))
