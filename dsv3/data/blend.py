"""Several datasets mixed by weight, sample by sample, as Megatron-core mixes them.

At every step the dataset that lags its share the most gives the next sample, so any stretch of the blend
holds close to the wanted proportions and no randomness is spent on it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np

from .gpt_dataset import SPLITS, GPTDataset, cached_arrays, split_ranges
from .indexed import IndexedDataset

SURPLUS = 0.005  # more samples built for each dataset than its share, so that rounding never runs out


class BlendedDataset:
    """`size` samples drawn from `datasets` in proportion to `weights`; a sample is the dataset's own.

    size None: weights are numbers of samples, and exactly as many are drawn from each. `dataset_index` int16
    and `dataset_sample_index` int64, both [size], say which dataset and which of its samples. Raises
    ValueError when a dataset has fewer samples than the blend draws.
    """

    def __init__(
        self,
        datasets: Sequence,
        weights: Sequence[float],
        size: int | None = None,
        *,
        cache_dir: str | os.PathLike | None = None,
    ):
        if not datasets or len(datasets) != len(weights) or min(weights) <= 0:
            raise ValueError(
                f"expected datasets and as many weights above 0, found {len(datasets)} and {list(weights)}"
            )
        if len(datasets) > np.iinfo(np.int16).max:
            raise ValueError(f"expected at most {np.iinfo(np.int16).max} datasets, found {len(datasets)}")
        if size is None and any(weight != int(weight) for weight in weights):
            raise ValueError(
                f"without a size the weights are sample counts: expected whole numbers, found {list(weights)}"
            )
        self.datasets = tuple(datasets)
        self.weights = tuple(int(w) for w in weights) if size is None else tuple(normalize(weights))
        description = {
            "datasets": [getattr(d, "description", None) for d in datasets],
            "weights": self.weights,
            "size": size,
        }
        self.dataset_index, self.dataset_sample_index = cached_arrays(
            cache_dir,
            description,
            ("dataset", "dataset_sample"),
            lambda: (
                exhaustive_indices(self.weights) if size is None else blending_indices(self.weights, size)
            ),
        )
        for number, drawn in zip(*np.unique(self.dataset_index, return_counts=True), strict=True):
            if drawn > len(datasets[number]):
                raise ValueError(
                    f"dataset {number} of the blend: expected {drawn} samples, found "
                    f"{len(datasets[number])}; build it with more samples or lower its weight"
                )

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a blend of {len(self)}")
        return self.datasets[self.dataset_index[index]][int(self.dataset_sample_index[index])]


def normalize(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum, in float64."""
    found = np.asarray(weights, np.float64)
    return (found / found.sum()).tolist()


def blending_indices(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which dataset, int16 [size], and which of its samples, int64 [size], each step takes.

    Step i takes the dataset with the largest weight * max(i, 1) - drawn, the first of equals. weights: sum to
    1. Source: megatron-core's `build_blending_indices`.
    """
    datasets, samples = np.empty(size, np.int16), np.empty(size, np.int64)
    drawn, each = [0.0] * len(weights), range(len(weights))
    for i in range(size):
        scale = float(i) if i else 1.0
        best, most = 0, weights[0] * scale - drawn[0]
        for d in each:
            error = weights[d] * scale - drawn[d]
            if error > most:
                best, most = d, error
        datasets[i] = best
        samples[i] = drawn[best]
        drawn[best] += 1.0
    return datasets, samples


def exhaustive_indices(sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The same rule with sizes as weights, each dataset leaving when it is spent. [sum(sizes)] twice.

    Source: megatron-core's `build_exhaustive_blending_indices`.
    """
    total = sum(sizes)
    datasets, samples = np.empty(total, np.int16), np.empty(total, np.int64)
    weights, drawn, left = [size / total for size in sizes], [0] * len(sizes), list(range(len(sizes)))
    for i in range(total):
        scale = float(max(i, 1))
        best = max(left, key=lambda d: weights[d] * scale - drawn[d])
        datasets[i], samples[i] = best, drawn[best]
        drawn[best] += 1
        if drawn[best] == sizes[best]:
            left.remove(best)
    return datasets, samples


def parse_data_path(data_path: str | os.PathLike | Sequence) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of `prefix`, `[prefix, ...]` or `[weight, prefix, weight, prefix, ...]`."""
    if isinstance(data_path, (str, os.PathLike)):
        return [os.fspath(data_path)], None
    items = [os.fspath(item) if isinstance(item, os.PathLike) else str(item).strip() for item in data_path]
    if not items:
        raise ValueError("data_path: expected at least one prefix, found none")
    weights = [_number(item) for item in items[::2]]
    if len(items) % 2 or all(weight is None for weight in weights):
        return items, None
    if None in weights or min(weights) <= 0:
        raise ValueError(
            f"data_path: expected weight, prefix, weight, prefix, ... with weights above 0, found {items}"
        )
    return items[1::2], weights


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def build_datasets(
    data_path: str | os.PathLike | Sequence,
    *,
    split: str = "969, 30, 1",
    num_samples: Sequence[int | None] = (None, None, None),
    seq_length: int = 4096,
    seed: int = 1234,
    cache_dir: str | os.PathLike | None = None,
    **options,
) -> tuple[GPTDataset | BlendedDataset | None, ...]:
    """Train, valid and test from one distribution, as Megatron's BlendedMegatronDatasetBuilder makes them.

    data_path: a prefix, prefixes, or weights and prefixes. num_samples: wanted for train, valid, test; 0
    gives None, and so does an empty share of the split, or, without a number, one too small for a sample.
    Without weights each dataset is read once and mixed by its length; with them each is repeated as needed,
    and num_samples is required. options: GPTDataset's.
    """
    prefixes, weights = parse_data_path(data_path)
    if len(num_samples) != 3:
        raise ValueError(
            f"num_samples: expected three numbers (train, valid, test), found {list(num_samples)}"
        )
    shares = None if weights is None else normalize(weights)
    indexed = [IndexedDataset(prefix) for prefix in prefixes]
    ranges = [split_ranges(split, len(data)) for data in indexed]
    return tuple(
        _build_split(
            at,
            indexed,
            [found[at] for found in ranges],
            shares,
            num_samples[at],
            seq_length,
            seed,
            cache_dir,
            options,
        )
        for at in range(3)
    )


def _build_split(
    at: int,
    indexed: list[IndexedDataset],
    ranges: list,
    shares: list[float] | None,
    size: int | None,
    seq_length: int,
    seed: int,
    cache_dir,
    options: dict,
) -> GPTDataset | BlendedDataset | None:
    if ranges[0] is None or size == 0:
        return None
    if size is None and shares is not None:
        raise ValueError(f"data_path has weights: expected num_samples for {SPLITS[at]}, found None")
    if len(indexed) == 1 and shares is None:
        counts = [size]
    elif shares is None:
        counts = [None] * len(indexed)
    else:
        counts = [math.ceil(math.ceil(size * share) * (1 + SURPLUS)) for share in shares]
    if (
        size is None
        and at > 0
        and any(_tokens(data, where) <= seq_length for data, where in zip(indexed, ranges))
    ):
        return None
    datasets = [
        GPTDataset(data, where, count, seq_length, seed, cache_dir=cache_dir, **options)
        for data, where, count in zip(indexed, ranges, counts)
    ]
    if len(indexed) == 1 and shares is None:
        return datasets[0]
    if shares is None:
        lengths = [len(dataset) for dataset in datasets]
        return BlendedDataset(
            datasets, lengths, None if size is None else min(size, sum(lengths)), cache_dir=cache_dir
        )
    return BlendedDataset(
        datasets, shares, sum(math.ceil(size * share) for share in shares), cache_dir=cache_dir
    )


def _tokens(indexed: IndexedDataset, sequences: tuple[int, int]) -> int:
    return int(indexed.lengths[slice(*sequences)].sum(dtype=np.int64))
