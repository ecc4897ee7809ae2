"""GPT samples and blends against megatron-core 0.16.1 (tests/goldens/make_megatron.py), batches, the index
cache.

Planted faults seen to fail here: labels not shifted; an end token counted to the next document; loss masked
where the label, not the input, is the end token; the last epoch apart below 85 %, or never, or its samples
shuffled with the others; one epoch too few at an exact fit; a sample's document searched from the left; no
token shared between samples; splits rounded down; a blend that takes the last of equals, starts at 0 instead
of 1, normalises once or builds another surplus; seed or file time missing from the cache's key; prefetched
batches counted into the state; overlapping shards; an error of the thread swallowed; the loser of a race for
the cache raising.
"""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from dsv3.data.batching import batches
from dsv3.data.blend import (
    BlendedDataset,
    blending_indices,
    build_datasets,
    exhaustive_indices,
    normalize,
    parse_data_path,
)
from dsv3.data.gpt_dataset import GPTDataset, build_indices, parse_split, split_ranges
from dsv3.data.indexed import IndexedDataset, write_documents

GOLDENS = Path(__file__).parent / "goldens" / "megatron"
PARTS = ("train", "valid", "test")
EOD = 1

samples = np.load(GOLDENS / "samples.npz")
blends = np.load(GOLDENS / "blends.npz")
CASES = json.loads(str(samples["cases"]))
BLENDS = json.loads(str(blends["cases"]))


def build_case(case, cache_dir=None):
    return build_datasets(
        GOLDENS / "files" / case["file"],
        split=case["split"],
        num_samples=case["num_samples"],
        seq_length=case["seq_length"],
        seed=case["seed"],
        eod_id=EOD,
        cache_dir=cache_dir,
        **case["options"],
    )


@pytest.mark.parametrize("name", CASES)
def test_indices_and_samples_are_megatrons(name):
    case, checked = CASES[name], 0
    for part, data in zip(PARTS, build_case(case)):
        key = f"{name}/{part}"
        assert (data is not None) == (f"{key}/sample_index" in samples), key
        if data is None:
            continue
        for index in ("document_index", "sample_index", "shuffle_index"):
            expected, found = samples[f"{key}/{index}"], getattr(data, index)
            assert found.dtype == expected.dtype, (key, index)
            np.testing.assert_array_equal(found, expected, err_msg=f"{key} {index}")
        for row, number in enumerate(samples[f"{key}/chosen"]):
            sample = data[int(number)]
            for field in ("tokens", "labels", "loss_mask", "position_ids"):
                np.testing.assert_array_equal(
                    sample[field], samples[f"{key}/{field}"][row], err_msg=f"{key} {field}"
                )
            assert ("segment_ids" in sample) == (f"{key}/attention_mask" in samples)
            if "segment_ids" in sample:  # Megatron gives the square mask they stand for, True: blocked
                segments = sample["segment_ids"]
                allowed = np.tri(len(segments), dtype=bool) & (segments[:, None] == segments[None, :])
                np.testing.assert_array_equal(~allowed, samples[f"{key}/attention_mask"][row], err_msg=key)
            checked += 1
    assert checked


def test_sample_dtypes():
    sample = GPTDataset(GOLDENS / "files" / "b", seq_length=9, eod_id=EOD, reset_attention_mask=True)[0]
    assert {key: (value.dtype.name, value.shape) for key, value in sample.items()} == {
        "tokens": ("int32", (9,)),
        "labels": ("int32", (9,)),
        "loss_mask": ("float32", (9,)),
        "position_ids": ("int32", (9,)),
        "segment_ids": ("int32", (9,)),
    }


@pytest.mark.parametrize(
    "count, apart", [(36, True), (62, True), (63, False), (70, False), (97, True), (98, False)]
)
def test_last_epoch_apart_below_80_percent(count, apart):
    """The goldens hold both sides of the rule: apart, each document is among the last epoch's once."""
    documents = samples[f"{count}_samples/train/document_index"]
    epoch = len(IndexedDataset(GOLDENS / "files" / "b"))
    assert len(documents) > epoch and (len(set(documents[-epoch:].tolist())) == epoch) == apart


@pytest.mark.parametrize("name", BLENDS)
def test_blends_are_megatrons(name):
    case = BLENDS[name]
    path = [str(GOLDENS / "files" / item) if item in "abc" else item for item in case["data_path"]]
    made = build_datasets(
        path,
        split=case["split"],
        num_samples=case["num_samples"],
        seq_length=case["seq_length"],
        seed=case["seed"],
    )
    checked = 0
    for part, data in zip(PARTS, made):
        key = f"{name}/{part}"
        assert (data is not None) == (f"{key}/tokens" in blends), key
        if data is None:
            continue
        for index in ("dataset_index", "dataset_sample_index"):
            expected = blends[f"{key}/{index}"]
            assert getattr(data, index).dtype == expected.dtype
            np.testing.assert_array_equal(getattr(data, index), expected, err_msg=key)
        np.testing.assert_array_equal(
            np.stack([data[i]["tokens"] for i in range(len(data))]), blends[f"{key}/tokens"]
        )
        checked += 1
    assert checked


@pytest.mark.parametrize("name", json.loads(str(blends["weights"])))
def test_blending_indices(name):
    datasets, numbers = blending_indices(normalize(json.loads(str(blends["weights"]))[name]), 3000)
    np.testing.assert_array_equal(datasets, blends[f"indices/{name}/dataset"])
    np.testing.assert_array_equal(numbers, blends[f"indices/{name}/sample"])


def test_exhaustive_blend_gives_every_sample_once():
    datasets, numbers = exhaustive_indices([5, 1, 9])
    assert sorted(zip(datasets.tolist(), numbers.tolist())) == [
        (d, i) for d, n in enumerate([5, 1, 9]) for i in range(n)
    ]


def test_parse_data_path():
    assert parse_data_path("a b.c") == (["a b.c"], None)
    assert parse_data_path(["a", "b"]) == (["a", "b"], None)
    assert parse_data_path([0.3, "a", 7, Path("b")]) == (["a", "b"], [0.3, 7.0])
    assert parse_data_path(["1", "a", "2"]) == (["1", "a", "2"], None)  # odd: Megatron takes all for prefixes
    for wrong in ([], ["1", "a", "b", "c"], ["0", "a", "1", "b"]):
        with pytest.raises(ValueError, match="data_path"):
            parse_data_path(wrong)


def test_split():
    assert split_ranges("969, 30, 1", 1000) == [(0, 969), (969, 999), (999, 1000)]
    assert split_ranges("1", 7) == [(0, 7), None, None]
    assert parse_split("0,1,1") == [None, (0.0, 0.5), (0.5, 1.0)]
    for wrong in ("", "0,0", "1,2,3,4", "1,-1"):
        with pytest.raises(ValueError, match="split"):
            parse_split(wrong)


def test_labels_continue_across_samples_of_one_epoch(tmp_path):
    """Put back in order, the samples are the shuffled documents run on, each sharing one token with the
    next."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(2, 99, size=n) for n in (4, 0, 17, 1, 1, 30, 8)]
    write_documents(tmp_path / "d", documents, np.int32)
    data = GPTDataset(tmp_path / "d", seq_length=6, seed=3)
    order = np.argsort(data.shuffle_index)
    text = np.concatenate([IndexedDataset(tmp_path / "d")[d] for d in data.document_index])
    for at, number in enumerate(order):
        np.testing.assert_array_equal(data.tokens(int(number)), text[at * 6 : at * 6 + 7])
        np.testing.assert_array_equal(data[int(number)]["labels"], text[at * 6 + 1 : at * 6 + 7])
    assert len(data) == (len(text) - 1) // 6


@pytest.mark.parametrize("tokens, epochs", [(41, 1), (40, 2)])
def test_a_sample_needs_one_token_more_than_its_length(tokens, epochs):
    documents, sample_index, _ = build_indices(np.array([tokens], np.int32), 0, 1, 4, 10, 0)
    assert len(documents) == epochs and len(sample_index) - 1 >= 4


def test_pad_is_masked(tmp_path):
    write_documents(tmp_path / "d", [[5, 6, 9, 9, 9, 9]], np.int32)
    sample = GPTDataset(tmp_path / "d", seq_length=5, pad_id=9)[0]
    assert sample["tokens"].tolist() == [5, 6, 0, 0, 0]
    assert sample["labels"].tolist() == [6, 0, 0, 0, 0]
    assert sample["loss_mask"].tolist() == [1, 0, 0, 0, 0]


def test_wrong_use_is_explained(tmp_path):
    write_documents(tmp_path / "d", [[2, 3, 4]], np.int32)
    for arguments, message in (
        (dict(seq_length=3), "expected at least 4 tokens"),
        (dict(seq_length=0), "seq_length"),
        (dict(seq_length=2, split_range=(1, 1)), "expected tokens in sequences"),
        (dict(seq_length=2, split_range=(0, 2)), "split_range"),
        (dict(seq_length=2, num_samples=0), "num_samples"),
        (dict(seq_length=2, eod_mask_loss=True), "need eod_id"),
    ):
        with pytest.raises(ValueError, match=message):
            GPTDataset(tmp_path / "d", **arguments)
    data = GPTDataset(tmp_path / "d", seq_length=2)
    for number in (-1, 1):
        with pytest.raises(IndexError):
            data[number]
    with pytest.raises(ValueError, match="expected 30 samples, found 1"):
        BlendedDataset([data, data], [1.0, 1.0], 60)
    with pytest.raises(ValueError, match="num_samples for train"):
        build_datasets([1, str(tmp_path / "d")], seq_length=2)


def test_cache_is_used_and_follows_the_data(tmp_path):
    documents = [list(range(2, 40)), list(range(50, 90))]
    write_documents(tmp_path / "d", documents, np.int32)
    arguments = dict(seq_length=4, num_samples=50, cache_dir=tmp_path / "cache")
    fresh, cached = GPTDataset(tmp_path / "d", **arguments), GPTDataset(tmp_path / "d", **arguments)
    plain = GPTDataset(tmp_path / "d", seq_length=4, num_samples=50)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for i in range(len(plain)):
        assert np.array_equal(plain[i]["tokens"], cached[i]["tokens"]) and np.array_equal(
            plain[i]["tokens"], fresh[i]["tokens"]
        )
    assert isinstance(cached.sample_index, np.memmap)
    for change in (dict(seed=5), dict(num_samples=51), dict(split_range=(0, 1)), dict(seq_length=5)):
        GPTDataset(tmp_path / "d", **{**arguments, **change})
    assert len(list((tmp_path / "cache").iterdir())) == 5
    before = GPTDataset(tmp_path / "d", **arguments).sample_index.copy()
    write_documents(tmp_path / "d", [documents[0] + documents[1][:9], documents[1][9:]], np.int32)  # as many
    changed = GPTDataset(tmp_path / "d", **arguments)
    assert not np.array_equal(changed.sample_index, before)
    assert np.array_equal(
        changed.sample_index, GPTDataset(tmp_path / "d", seq_length=4, num_samples=50).sample_index
    )


def test_cache_built_at_once(tmp_path):
    write_documents(tmp_path / "d", [list(range(2, 90))] * 4, np.int32)
    made, barrier = [], threading.Barrier(6)

    def make():
        barrier.wait()
        made.append(GPTDataset(tmp_path / "d", seq_length=4, num_samples=99, cache_dir=tmp_path / "cache"))

    threads = [threading.Thread(target=make) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(made) == 6 and len(list((tmp_path / "cache").iterdir())) == 1
    assert all(np.array_equal(one.shuffle_index, made[0].shuffle_index) for one in made)


def test_a_million_documents_in_seconds():
    """A loop over documents in Python would not end in time."""
    import time

    lengths = np.random.RandomState(0).randint(0, 900, size=1_000_000).astype(np.int32)
    started = time.process_time()
    documents, sample_index, _ = build_indices(lengths, 0, len(lengths), 200_000, 4096, 1)
    assert time.process_time() - started < 5
    ends = np.cumsum(lengths[documents], dtype=np.int64)
    at = sample_index[1:, 0]
    np.testing.assert_array_equal(
        ends[at] - lengths[documents[at]] + sample_index[1:, 1], 4096 * np.arange(1, len(sample_index))
    )


# ---------------------------------------------------------------- batches


@pytest.fixture
def numbers():
    return [{"x": np.array([i, -i])} for i in range(23)]


def rows(iterator):
    return [batch["x"][:, 0].tolist() for batch in iterator]


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_batches_resume_anywhere(numbers, prefetch):
    whole = rows(batches(numbers, 4, prefetch=prefetch))
    assert whole == [list(range(i, i + 4)) for i in range(0, 20, 4)]
    for stop in range(5):
        with batches(numbers, 4, prefetch=prefetch) as first:
            begun = [next(first)["x"][:, 0].tolist() for _ in range(stop)]
            state, step = first.state, first.step
        assert (state, step) == (4 * stop, stop)  # what was made ahead does not count
        with batches(numbers, 4, state, prefetch=prefetch) as second:
            assert begun + rows(second) == whole


def test_batch_size_ramp(numbers):
    def ramp(step):
        return min(2 * (step + 1), 6)

    whole = rows(batches(numbers, ramp))
    assert [len(batch) for batch in whole] == [2, 4, 6, 6] and sum(whole, []) == list(range(18))
    second = batches(numbers, ramp, 6)
    assert second.step == 2 and rows(second) == whole[2:]
    with pytest.raises(ValueError, match="boundary, found 7"):
        batches(numbers, ramp, 7)


def test_shards_make_up_the_batch(numbers):
    whole = rows(batches(numbers, 6, stop_sample=12))
    parts = [rows(batches(numbers, 6, stop_sample=12, shard=(rank, 3))) for rank in range(3)]
    assert [sum(part, []) for part in zip(*parts)] == whole == [list(range(6)), list(range(6, 12))]
    with pytest.raises(ValueError, match="multiple of 4"):
        next(batches(numbers, 6, shard=(0, 4)))
    with pytest.raises(ValueError, match="shard"):
        batches(numbers, 6, shard=(3, 3))


def test_prefetch_hands_on_errors_and_ends():
    class Broken:
        def __len__(self):
            return 9

        def __getitem__(self, i):
            if i == 4:
                raise OSError("disk gone")
            return {"x": np.array([i])}

    before = threading.active_count()
    iterator = batches(Broken(), 2, prefetch=3)
    assert rows([next(iterator), next(iterator)]) == [[0, 1], [2, 3]]
    with pytest.raises(OSError, match="disk gone"):
        next(iterator)
    iterator.close()
    abandoned = batches([{"x": np.zeros(1)}] * 1000, 1, prefetch=2)
    next(abandoned)
    thread = abandoned._thread
    del abandoned
    thread.join(timeout=5)
    assert not thread.is_alive() and threading.active_count() == before
