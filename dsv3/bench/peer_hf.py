"""Their side of ``peer``: DeepseekV3ForCausalLM of Hugging Face transformers, in PyTorch, as fast as it goes
by its own settings. Run as a script, possibly by an interpreter without this package; argument: the settings
as JSON.
"""

import json
import os
import sys
import time

from blocks import confine, serve, take_stdout  # beside this file

EXPERTS, ATTENTION = ("eager", "grouped_mm", "batched_mm"), ("sdpa", "eager")


def load(folder, threads):
    """(torch, transformers, the model of a checkpoint), on so many CPUs; ends the process where either is missing."""
    confine(threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise SystemExit(
            f"{sys.executable}: {error}; the peer needs torch and transformers: give the path of a Python "
            f"that has them"
        ) from None
    torch.set_num_threads(threads)
    return torch, transformers, transformers.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main(s):
    out = take_stdout()
    torch, transformers, model = load(s["checkpoint"], s["threads"])
    import numpy as np

    model.train()
    default = f"{model.config._experts_implementation} + {model.config._attn_implementation}"
    rng = np.random.default_rng(0)

    def loss_of(ids):
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def batch():
        ids = rng.integers(0, model.config.vocab_size, (s["batch"], s["seq"]), dtype=np.int32)
        return torch.from_numpy(ids.astype(np.int64))

    if "variant" not in s:
        ids = torch.arange(s["batch"] * s["seq"]).reshape(s["batch"], s["seq"]) % model.config.vocab_size
        print(json.dumps({"trials": try_variants(model, ids, loss_of)}), file=out)
        return
    choose(model, s["variant"])

    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": s["weight_decay"]},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=s["learning_rate"],
        betas=s["betas"],
        eps=s["eps"],
        fused=True,
    )

    def step():
        loss = loss_of(batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, s["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    serve(
        out,
        {
            "name": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "variant": s["variant"],
            "default": default,
            "parameters": sum(p.numel() for p in params),
        },
        step,
    )


def choose(model, variant):
    """Switch a model to one "experts + attention" pair of implementations."""
    experts, attention = variant.split(" + ")
    model.set_experts_implementation(experts)
    model.set_attn_implementation(attention)


def try_variants(model, ids, loss_of):
    """Fastest seconds of a forward and backward of each variant, weights untouched; or why it did not run.

    Four rounds over the variants, so that a busy moment of the machine does not fall on one alone; those four
    times slower than the fastest leave early.
    """
    c = model.config
    copies = ids.numel() * c.num_experts_per_tok * 3 * c.moe_intermediate_size * c.hidden_size * 4
    trials = [{"variant": f"{experts} + {attention}"} for experts in EXPERTS for attention in ATTENTION]
    for trial in trials:
        if trial["variant"].startswith("batched_mm") and copies > 1e9:
            trial["skipped"] = f"it copies an expert for every pair: {copies / 1e9:.1f} GB a layer"
    for _ in range(4):
        best = min((t["seconds"] for t in trials if "seconds" in t), default=float("inf"))
        for trial in trials:
            if "skipped" in trial or trial.get("seconds", 0) > 4 * best:
                continue
            try:
                choose(model, trial["variant"])
                start = time.perf_counter()
                loss_of(ids).backward()
                trial["seconds"] = min(trial.get("seconds", float("inf")), time.perf_counter() - start)
            # A variant that this torch cannot run is no candidate; its error is kept and printed beside the others.
            except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
                trial["skipped"] = f"{type(error).__name__}: {str(error)[:200]}"
                trial.pop("seconds", None)
            model.zero_grad(set_to_none=True)
    return trials


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [
        p for p in sys.path if os.path.abspath(p or ".") != here
    ]  # its neighbours' names are common ones
    main(json.loads(sys.argv[1]))
