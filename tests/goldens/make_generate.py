"""Write generate.npz: what transformers' own greedy generation writes, and what its sampling filters leave.

    python make_generate.py             needs torch and transformers 5.23; a minute

For each of three checkpoints of make_hf.py, <case>_prompts [5, 40] (right-padded with -1; the first stands alone, the others
are generated as one left-padded batch of four) and <case>_new [5, 64]: greedy ids of model.generate in float32. Prompts are
drawn again until float64 chooses the same ids and no choice was closer than MARGIN, so that rounding decides nothing.

filter_<i>_logits [W], _seen [n], _settings (repetition_penalty, temperature, top_k, top_p, min_p) and _p [W] float64: the
probabilities after transformers' own processors, in its own order.
"""

from pathlib import Path

import numpy as np
import torch
from hf_model import build, load
from transformers.generation import logits_process as process

HERE = Path(__file__).parent
CASES, NEW, MARGIN = ("base", "yarn", "no_q_lora"), 64, 2e-3
LENGTHS = (13, 5, 40, 1, 22)


def greedy(model, rows):
    """(ids [n, NEW], the least distance between the best and the next logit) of a left-padded batch."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, eos_token_id=None,
                         pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    top = torch.stack(out.logits).topk(2, dim=-1).values
    return out.sequences[:, width:].numpy(), float((top[..., 0] - top[..., 1]).min())


def texts(case, rng):
    """Prompts and continuations on which both precisions agree with room to spare."""
    single, _ = load(HERE / "hf" / case)
    single.generation_config.eos_token_id = None
    config = single.config.to_dict()
    double, guard = build(config, state=single.state_dict())
    double.generation_config.eos_token_id = None
    for tries in range(400):
        rows = [rng.integers(2, config["vocab_size"], n).tolist() for n in LENGTHS]
        found, margins = zip(greedy(single, rows[:1]), greedy(single, rows[1:]))
        if min(margins) < MARGIN:
            continue
        with guard, torch.no_grad():
            sure = greedy(double, rows[:1])[0], greedy(double, rows[1:])[0]
        if all(np.array_equal(a, b) for a, b in zip(found, sure)):
            print(case, "after", tries + 1, "tries, least margin", min(margins))
            prompts = np.full((len(rows), max(LENGTHS)), -1)
            for row, prompt in zip(prompts, rows):
                row[:len(prompt)] = prompt
            return prompts.astype(np.int32), np.concatenate(found).astype(np.int32)
    raise RuntimeError(f"{case}: no prompts of 400 draws keep a margin of {MARGIN}")


SETTINGS = [(1.0, 0.7, 0, 1.0, 0.0), (1.0, 1.0, 5, 1.0, 0.0), (1.0, 1.3, 0, 0.8, 0.0), (1.0, 1.0, 0, 1.0, 0.2),
            (1.4, 0.9, 20, 0.9, 0.05), (0.8, 1.0, 0, 0.35, 0.0)]


def filters(rng):
    """{name: array} of every setting."""
    arrays = {}
    for i, (penalty, temperature, top_k, top_p, min_p) in enumerate(SETTINGS):
        logits = rng.standard_normal(64) * 2
        seen = np.unique(rng.integers(0, 64, 9))
        scores, ids = torch.from_numpy(logits)[None], torch.from_numpy(seen)[None]
        chain = [process.RepetitionPenaltyLogitsProcessor(penalty), process.TemperatureLogitsWarper(temperature)]
        chain += [process.TopKLogitsWarper(top_k)] if top_k else []
        chain += [process.TopPLogitsWarper(top_p)] if top_p < 1 else []
        chain += [process.MinPLogitsWarper(min_p)] if min_p else []
        for step in chain:
            scores = step(ids, scores)
        arrays |= {f"filter_{i}_logits": logits, f"filter_{i}_seen": seen, f"filter_{i}_settings": np.array(SETTINGS[i]),
                   f"filter_{i}_p": torch.softmax(scores, -1)[0].numpy()}
    return arrays


def main():
    rng = np.random.default_rng(5)
    arrays = filters(rng)
    for case in CASES:
        arrays[f"{case}_prompts"], arrays[f"{case}_new"] = texts(case, rng)
    np.savez_compressed(HERE / "generate.npz", **arrays)


if __name__ == "__main__":
    main()
