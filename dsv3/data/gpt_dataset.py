"""Fixed-length samples out of documents, in Megatron-core's order.

Documents are shuffled, run on one after the other, and cut every `seq_length` tokens; the cuts are shuffled
again. Three arrays say it all: the document index (documents in reading order, once for each epoch), the
sample index (document and offset where each sample starts) and the shuffle index (order of the samples). For
the same files, split, seed and length they equal megatron-core 0.16.1's, so a run continues on the same data
under either program. Only the last, partial sample of the data is never given.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np

from .indexed import IndexedDataset, idx_path

SPLITS = ("train", "valid", "test")
INDEX_VERSION = 1  # of the files in the cache; raised when the same inputs would give other arrays
NAMES = ("document", "sample", "shuffle")


class GPTDataset:
    """Samples of `seq_length` tokens from one `.bin`/`.idx` pair.

    indexed: the pair, or its prefix. split_range: sequences [begin, end) to use, default all. num_samples:
    samples wanted, drawn over as many epochs as that takes; None: those of one epoch. `len()` is at least
    num_samples. seed: of both shuffles. cache_dir: directory for the index arrays, which are then
    memory-mapped and shared; None: kept in memory.

    A sample is a dict of NumPy arrays [seq_length]: `tokens`, `labels` (the next token) int32, `loss_mask`
    float32, `position_ids` int32 and, with reset_attention_mask, `segment_ids` int32. With `eod_id` T the end
    token (it belongs to the document it ends): reset_position_ids counts positions anew after each T;
    reset_attention_mask numbers the documents of the sample, and attention stays inside one number;
    eod_mask_loss gives no loss where the input is T; `pad_id` P gives no loss where the label is P and shows
    P as 0, like Megatron's `_get_ltor_masks_and_position_ids` and the lines after it. Raises ValueError when
    there are too few tokens or an option lacks its token.
    """

    def __init__(
        self,
        indexed: IndexedDataset | str | os.PathLike,
        split_range: tuple[int, int] | None = None,
        num_samples: int | None = None,
        seq_length: int = 4096,
        seed: int = 1234,
        *,
        eod_id: int | None = None,
        reset_position_ids: bool = False,
        reset_attention_mask: bool = False,
        eod_mask_loss: bool = False,
        pad_id: int | None = None,
        cache_dir: str | os.PathLike | None = None,
    ):
        if not isinstance(indexed, IndexedDataset):
            indexed = IndexedDataset(indexed)
        begin, end = (0, len(indexed)) if split_range is None else split_range
        if not 0 <= begin <= end <= len(indexed):
            raise ValueError(
                f"{indexed.prefix}: split_range: expected a range within [0, {len(indexed)}), "
                f"found [{begin}, {end})"
            )
        if indexed.dtype.kind not in "iu":
            raise ValueError(f"{indexed.prefix}: expected integer tokens, found {indexed.dtype.name}")
        if eod_id is None and (reset_position_ids or reset_attention_mask or eod_mask_loss):
            raise ValueError(
                "reset_position_ids, reset_attention_mask and eod_mask_loss need eod_id, the "
                "tokenizer's end token; found None"
            )
        self.indexed, self.split_range = indexed, (begin, end)
        self.num_samples, self.seq_length, self.seed = num_samples, seq_length, seed
        self.eod_id, self.pad_id = eod_id, pad_id
        self.reset_position_ids, self.reset_attention_mask = reset_position_ids, reset_attention_mask
        self.eod_mask_loss = eod_mask_loss
        self.description = {
            "version": INDEX_VERSION,
            "prefix": os.path.abspath(indexed.prefix),
            "sequences": len(indexed),
            "tokens": len(indexed.tokens),
            "changed": idx_path(indexed.prefix).stat().st_mtime_ns,
            "split_range": [begin, end],
            "num_samples": num_samples,
            "seq_length": seq_length,
            "seed": seed,
        }
        self.document_index, self.sample_index, self.shuffle_index = cached_arrays(
            cache_dir,
            self.description,
            NAMES,
            lambda: build_indices(indexed.lengths, begin, end, num_samples, seq_length, seed, indexed.prefix),
        )

    def __len__(self) -> int:
        return len(self.sample_index) - 1

    def tokens(self, index: int) -> np.ndarray:
        """The seq_length + 1 tokens of sample `index`, [seq_length + 1] int32."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.indexed.prefix}, which has {len(self)}")
        at = int(self.shuffle_index[index])
        (first, offset), (last, stop) = self.sample_index[at].tolist(), self.sample_index[at + 1].tolist()
        get, documents = self.indexed.get, self.document_index[first : last + 1].tolist()
        if first == last:
            parts = [get(documents[0], offset, stop + 1 - offset)]
        else:
            parts = [get(documents[0], offset), *map(get, documents[1:-1]), get(documents[-1], 0, stop + 1)]
        return np.concatenate(parts).astype(np.int32, copy=False)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        text = self.tokens(index)
        tokens, labels = text[:-1].copy(), text[1:].copy()
        sample = {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": np.ones(len(tokens), np.float32),
            "position_ids": np.arange(len(tokens), dtype=np.int32),
        }
        if self.eod_id is not None:
            is_eod = tokens == self.eod_id
            if self.eod_mask_loss:
                sample["loss_mask"][is_eod] = 0.0
            if self.reset_position_ids or self.reset_attention_mask:
                # End tokens before each token: an end token itself still belongs to its document.
                segments = np.concatenate([[0], np.cumsum(is_eod[:-1])]).astype(np.int32)
                if self.reset_attention_mask:
                    sample["segment_ids"] = segments
                if self.reset_position_ids:
                    starts = np.concatenate([[0], np.flatnonzero(is_eod[:-1]) + 1]).astype(np.int32)
                    sample["position_ids"] -= starts[segments]
        if self.pad_id is not None:
            sample["loss_mask"][labels == self.pad_id] = 0.0
            tokens[tokens == self.pad_id] = 0
            labels[labels == self.pad_id] = 0
        return sample


def parse_split(split: str) -> list[tuple[float, float] | None]:
    """Shares of train, valid, test: "969, 30, 1" gives (0, 0.969), (0.969, 0.999), (0.999, 1); or None."""
    numbers = [float(number) for number in re.findall(r"[.0-9]+", split)]
    if not 1 <= len(numbers) <= 3 or "-" in split or sum(numbers) <= 0:
        raise ValueError(f"split: expected one to three weights such as '969, 30, 1', found {split!r}")
    shares = np.array(numbers + [0.0] * (3 - len(numbers)))
    shares = (shares / shares.sum()).tolist()
    edges = [0.0]
    for share in shares:
        edges.append(edges[-1] + share)
    return [(low, high) if high > low else None for low, high in zip(edges, edges[1:])]


def split_ranges(split: str, count: int) -> list[tuple[int, int] | None]:
    """Sequences [begin, end) of train, valid and test among `count`, rounded as Megatron rounds."""
    return [
        None if share is None else (int(round(share[0] * float(count))), int(round(share[1] * float(count))))
        for share in parse_split(split)
    ]


# ---------------------------------------------------------------- indices


def build_indices(
    lengths: np.ndarray,
    begin: int,
    end: int,
    num_samples: int | None,
    seq_length: int,
    seed: int,
    name: str = "dataset",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Document index [epochs * (end - begin)] int32, sample index [samples + 1, 2], shuffle index [samples].

    lengths: tokens of each sequence; those in [begin, end) are used. Source: megatron-core 0.16.1,
    `GPTDataset._build_document_sample_shuffle_indices` and `build_sample_idx` of its helpers.
    """
    if seq_length < 1 or (num_samples is not None and num_samples < 1):
        raise ValueError(
            f"seq_length and num_samples: expected at least 1, found {seq_length} and {num_samples}"
        )
    epoch_tokens = int(lengths[begin:end].sum(dtype=np.int64))
    if epoch_tokens == 0:
        raise ValueError(
            f"{name}: expected tokens in sequences [{begin}, {end}), found none; "
            f"give this split a larger share or more documents"
        )
    if num_samples is None and epoch_tokens <= seq_length:
        raise ValueError(
            f"{name}: expected at least {seq_length + 1} tokens for one sample of seq_length "
            f"{seq_length}, found {epoch_tokens}; use a shorter seq_length or ask for num_samples"
        )
    # Sample i needs tokens [i * seq_length, (i + 1) * seq_length]; the last one is the next sample's first.
    epochs = 1 if num_samples is None else max(1, -(-(num_samples * seq_length + 1) // epoch_tokens))
    total = (epochs * epoch_tokens - 1) // seq_length
    apart, before_last = False, total
    if epochs > 1:
        # A last epoch that is used only in part would otherwise favour documents that happen to come first.
        before_last = ((epochs - 1) * epoch_tokens - 1) // seq_length
        per_epoch = (epoch_tokens - 1) // seq_length
        apart = num_samples - before_last < int(0.80 * per_epoch)
    rng = np.random.RandomState(seed)
    document_index = _document_index(begin, end, epochs, apart, rng)
    sample_index = _sample_index(lengths, document_index, seq_length, total)
    return document_index, sample_index, _shuffle_index(before_last if apart else total, total, rng)


def _document_index(begin: int, end: int, epochs: int, apart: bool, rng: np.random.RandomState) -> np.ndarray:
    documents = np.arange(begin, end, dtype=np.int32)
    parts = [np.tile(documents, count) for count in ((epochs - 1, 1) if apart else (epochs,))]
    for part in parts:
        rng.shuffle(part)
    return np.concatenate(parts)


def _sample_index(
    lengths: np.ndarray, document_index: np.ndarray, seq_length: int, samples: int
) -> np.ndarray:
    sizes = lengths[document_index]
    ends = np.cumsum(sizes, dtype=np.int64)
    starts = np.arange(samples + 1, dtype=np.int64) * seq_length
    documents = np.searchsorted(
        ends, starts, side="right"
    )  # the document holding the token; passes empty ones
    offsets = starts - (ends[documents] - sizes[documents])
    wide = max(len(document_index), int(lengths.max())) > np.iinfo(np.int32).max
    index = np.stack([documents, offsets], axis=1).astype(np.int64 if wide else np.int32)
    index[0] = 0  # even when the first document is empty
    return index


def _shuffle_index(first: int, total: int, rng: np.random.RandomState) -> np.ndarray:
    dtype = np.int64 if total >= np.iinfo(np.uint32).max - 1 else np.uint32
    parts = [np.arange(first, dtype=dtype)]
    rng.shuffle(parts[0])
    if first != total:
        parts.append(np.arange(first, total, dtype=dtype))
        rng.shuffle(parts[1])
    return np.concatenate(parts)


def cached_arrays(
    cache_dir: str | os.PathLike | None, description: dict, names: tuple[str, ...], build
) -> tuple[np.ndarray, ...]:
    """Arrays from `build()`, or from the directory of `cache_dir` that bears the hash of `description`.

    The directory gets its name by one rename when all is in it, so that half of an index is never found and
    processes may build at once. Loaded arrays are memory-mapped.
    """
    if cache_dir is None:
        return tuple(build())
    text = json.dumps(description, indent=1, sort_keys=True)
    place = Path(cache_dir) / hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
    if not place.is_dir():
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{place.name}.", suffix=".partial", dir=cache_dir))
        try:
            for name, array in zip(names, build(), strict=True):
                np.save(partial / f"{name}_index.npy", array)
            (partial / "description.json").write_text(text)
            os.chmod(partial, 0o755)
            os.rename(partial, place)
        except OSError:
            if not place.is_dir():  # else another process was first, and its arrays are the same
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return tuple(np.load(place / f"{name}_index.npy", mmap_mode="r") for name in names)
