"""Their side of ``generate``: model.generate of Hugging Face transformers with the fastest of its own implementations. Run as a
script, possibly by an interpreter without this package; argument: the settings as JSON.
"""

import json
import os
import resource
import sys
import time

from blocks import confine, take_stdout  # beside this file

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
    confine(s["threads"])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise SystemExit(f"{sys.executable}: {error}; the peer needs torch and transformers: give the path of a Python that "
                         f"has them") from None
    torch.set_num_threads(s["threads"])
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(os.path.join(s["folder"], "hf"), dtype=torch.float32).eval()
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

    tried = {}
    for variant in VARIANTS * 2:  # the first time loads libraries
        experts, attention = variant.split(" + ")
        try:
            model.set_experts_implementation(experts)
            model.set_attn_implementation(attention)
            tried[variant] = max(generate(1, 8)["rate"], tried.get(variant, 0))
        # A variant that this torch cannot run is no candidate.
        except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
            print(variant, error, file=sys.stderr)
    best = max(tried, key=tried.get)
    experts, attention = best.split(" + ")
    model.set_experts_implementation(experts)
    model.set_attn_implementation(attention)
    print(json.dumps({"name": f"transformers {transformers.__version__}, torch {torch.__version__}", "variant": best,
                      "tried": {k: round(v, 1) for k, v in tried.items()}}), file=out)
    for line in sys.stdin:
        print(json.dumps(generate(int(line), s["new"])), file=out)


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != here]  # its neighbours' names are common ones
    main(json.loads(sys.argv[1]))
