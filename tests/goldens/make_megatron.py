"""Makes tests/goldens/megatron with megatron-core 0.16.1 itself: files, sample indices, samples and blends.

Needs megatron-core==0.16.1, torch and numpy (and pybind11 and a C++ compiler, to build megatron's index
helpers with `make` in megatron/core/datasets when the wheel lacks them). From an empty directory:

    python <repository>/tests/goldens/make_megatron.py

files/       what IndexedDatasetBuilder writes for `documents()` and for the texts of texts.jsonl as bytes
samples.npz  for each case of CASES: document, sample and shuffle index of every split, and some samples
blends.npz   for each case of BLENDS: dataset and sample indices, and the tokens of the blended samples
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

HERE = Path(__file__).parent / "megatron"
EOD = 1
TEXTS = [
    {"text": "Hello, world!\nTwo lines.", "title": "first"},
    {"text": "", "title": "an empty text"},
    {"text": ["Several sentences.", "", " Each a sequence."], "title": "list"},
    {"text": "naïve café – 深度求索 🙂", "title": ""},
    {"text": "\ttabs and\u0000controls\r\n", "title": "<eos> is plain text"},
]
# name: (documents file, seq_length, seed, split, samples of train, valid, test, options)
CASES = {
    "one_epoch": ("a", 16, 1234, "969, 30, 1", (None, None, None), {}),
    "one_epoch_even": ("a", 7, 1, "8,1,1", (None, None, None), {"reset_position_ids": True}),
    "part_of_epoch": ("a", 16, 5, "1,0,0", (20, 0, 0), {"eod_mask_loss": True}),
    "few_epochs_joined": ("a", 16, 42, "90,10,0", (150, 10, 0), {"reset_attention_mask": True}),
    "last_epoch_apart": ("a", 16, 42, "1", (90, 0, 0), {}),
    "many_epochs": (
        "b",
        33,
        7,
        "0.7,0.2,0.1",
        (100, 30, 20),
        {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True},
    ),
    "empty_sequences": ("c", 5, 3, "1,1,0", (40, 9, 0), {"reset_position_ids": True, "eod_mask_loss": True}),
}
# `b` gives 35 samples of 10 an epoch; the last epoch is shuffled on its own below 28 samples out of it.
for count in (35, 36, 50, 61, 62, 63, 64, 70, 71, 97, 98, 99):
    CASES[f"{count}_samples"] = ("b", 10, count, "1,0,0", (count, 0, 0), {})
# name: (data_path, seq_length, seed, split, samples)
BLENDS = {
    "weights": (["0.3", "a", "0.7", "b"], 8, 11, "9,1,0", (200, 20, 0)),
    "three_weights": (["30", "a", "1.5", "c", "7", "b"], 12, 2, "1,0,0", (333, 0, 0)),
    "no_weights": (["a", "b", "c"], 8, 4, "8,2,0", (None, None, None)),
    "no_weights_capped": (["a", "b", "c"], 8, 4, "1,0,0", (30, 0, 0)),
    "one_weight": (["1", "b"], 8, 9, "1,0,0", (25, 0, 0)),
}
WEIGHTS = {
    "even": [1, 1, 1],
    "skewed": [0.5, 0.25, 0.15, 0.07, 0.03],
    "two": [0.1, 0.9],
    "many": [float(k % 7 + 1) for k in range(40)],
}


class Bytes:
    """As much of a tokenizer as the configuration asks for."""

    vocab_size, eod, pad = 300, EOD, -1
    unique_identifiers = {"class": "Bytes"}


def documents(name):
    """Token lists by seed: `a` 40 documents, `b` 9 short ones, `c` some of them without a token."""
    seed, count, longest = {"a": (0, 40, 60), "b": (1, 9, 70), "c": (2, 25, 9)}[name]
    rng = np.random.RandomState(seed)
    for _ in range(count):
        length = rng.randint(0 if name == "c" else 1, longest)
        yield np.append(rng.randint(2, 300, size=length), EOD)[: length + (name != "c")]


def write_files():
    files = HERE / "files"
    files.mkdir(parents=True, exist_ok=True)
    for name, dtype in (("a", np.int32), ("b", np.uint16), ("c", np.int32)):
        builder = IndexedDatasetBuilder(str(files / f"{name}.bin"), dtype=dtype)
        for tokens in documents(name):
            if name == "c":
                builder.add_item(torch.from_numpy(tokens))  # also sequences of no token
                builder.end_document()
            else:
                builder.add_document(tokens.tolist(), [len(tokens)])
        builder.finalize(str(files / f"{name}.idx"))
    (files / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in TEXTS))
    # Megatron-LM's tools/preprocess_data.py: sentences without a token fall away, the end token goes on the
    # last one, and a document without any is still a document. Tokens are bytes, begin is 256, end is 257.
    for key in ("text", "title"):
        builder = IndexedDatasetBuilder(str(files / f"texts_{key}_document.bin"), dtype=np.uint16)
        for text in TEXTS:
            parts = [text[key]] if isinstance(text[key], str) else text[key]
            ids = [list(part.encode()) for part in parts if part]
            if ids:
                ids[-1].append(257)
            builder.add_document(sum(ids, []), [len(part) for part in ids])
        builder.finalize(str(files / f"texts_{key}_document.idx"))
    builder = IndexedDatasetBuilder(str(files / "merged.bin"), dtype=np.int32)
    builder.add_index(str(files / "a"))
    builder.add_index(str(files / "c"))
    builder.finalize(str(files / "merged.idx"))


def build(cache, data_path, seq_length, seed, split, samples, options):
    numbers = len(data_path) % 2 == 0 and data_path[0][0].isdigit()
    prefixes = data_path[1::2] if numbers else data_path
    weights = [float(weight) for weight in data_path[::2]] if numbers else None
    switches = {"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False}
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        split=split,
        tokenizer=Bytes(),
        blend=([str(HERE / "files" / prefix) for prefix in prefixes], weights),
        path_to_cache=cache,
        **{**switches, **options},
    )
    made = BlendedMegatronDatasetBuilder(GPTDataset, list(samples), lambda: True, config).build()
    wanted = [data is not None and size != 0 and len(data) > 0 for data, size in zip(made, samples)]
    return [(part, data) for part, data, want in zip(("train", "valid", "test"), made, wanted) if want]


def make_samples(cache):
    out = {}
    for name, (file, seq_length, seed, split, counts, options) in CASES.items():
        for part, data in build(cache, [file], seq_length, seed, split, counts, options):
            key = f"{name}/{part}"
            for index in ("document_index", "sample_index", "shuffle_index"):
                out[f"{key}/{index}"] = np.asarray(getattr(data, index))
            chosen = sorted({0, 1, len(data) // 2, len(data) - 1} & set(range(len(data))))
            out[f"{key}/chosen"] = np.array(chosen, np.int16)
            for field in ("tokens", "labels", "loss_mask", "position_ids"):
                out[f"{key}/{field}"] = np.stack([data[i][field].numpy() for i in chosen]).astype(np.int16)
            if options.get("reset_attention_mask"):
                out[f"{key}/attention_mask"] = np.stack(
                    [data[i]["attention_mask"][0].numpy() for i in chosen]
                )
    names = ("file", "seq_length", "seed", "split", "num_samples", "options")
    cases = {name: dict(zip(names, case)) for name, case in CASES.items()}
    np.savez_compressed(HERE / "samples.npz", cases=json.dumps(cases), **out)


def make_blends(cache):
    out = {}
    for name, (data_path, seq_length, seed, split, counts) in BLENDS.items():
        for part, data in build(cache, data_path, seq_length, seed, split, counts, {}):
            out[f"{name}/{part}/dataset_index"] = data.dataset_index
            out[f"{name}/{part}/dataset_sample_index"] = data.dataset_sample_index
            tokens = [data[i]["tokens"].numpy() for i in range(len(data))]
            out[f"{name}/{part}/tokens"] = np.stack(tokens).astype(np.int16)
    for name, weights in WEIGHTS.items():
        weights = np.array(weights, np.float64) / np.sum(weights)
        datasets, samples = np.zeros(3000, np.int16), np.zeros(3000, np.int64)
        helpers.build_blending_indices(datasets, samples, weights, len(weights), 3000, False)
        out[f"indices/{name}/dataset"] = datasets
        out[f"indices/{name}/sample"] = samples.astype(np.int16)
    names = ("data_path", "seq_length", "seed", "split", "num_samples")
    cases = {name: dict(zip(names, case)) for name, case in BLENDS.items()}
    np.savez_compressed(HERE / "blends.npz", cases=json.dumps(cases), weights=json.dumps(WEIGHTS), **out)


if __name__ == "__main__":
    torch.distributed.get_rank = lambda *_: 0  # asked for outside any process group
    write_files()
    with tempfile.TemporaryDirectory() as directory:
        make_samples(directory)
        make_blends(directory)
