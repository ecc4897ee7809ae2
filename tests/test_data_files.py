"""`.bin`/`.idx` files, sources and preprocessing: bytes equal to megatron-core's, killed and continued,
refused.

Planted faults seen to fail here: pointers to the end of sequences, or never checked; another code for uint16;
uint16 up to 65535; merged document starts not moved; tokens cast without a check; no lock; the .idx named
before the .bin; files not cut back before going on, the journal written before the data, documents not
skipped, the carried tokens of "stitch" lost; options missing from the fingerprint; an end token on an empty
document; empty sentences kept; pads one short; an unbounded window; batches out of order; workers that
outlive a killed parent; line numbers from zero; a wikitext section taken for an article; draws of FIM by
place in the batch, its pieces swapped.
"""

import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import dsv3
from dsv3.data.encoding import BATCH_ITEMS, WINDOW, Encoding, batched, encode_all
from dsv3.data.fim import make_fim
from dsv3.data.indexed import IndexedDataset, IndexedWriter, exists, merge, token_dtype, write_documents
from dsv3.data.preprocess import preprocess
from dsv3.data.sources import expand_inputs, parse, read_raw
from dsv3.data.tokenizer import byte_tokenizer, train_bpe

FILES = Path(__file__).parent / "goldens" / "megatron" / "files"
BOS, EOS = 256, 257


def pair(prefix):
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def texts(prefix):
    data, decode = IndexedDataset(prefix), byte_tokenizer().decode
    return [decode(data[i]) for i in range(len(data))]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ---------------------------------------------------------------- indexed


@pytest.mark.parametrize("name, dtype", [("a", "int32"), ("b", "uint16"), ("c", "int32")])
def test_writer_gives_megatrons_bytes(name, dtype, tmp_path):
    source = IndexedDataset(FILES / name)
    assert source.dtype == dtype
    with IndexedWriter(tmp_path / "x", dtype) as writer:
        for tokens in source:
            writer.add_document(tokens.tolist(), [len(tokens)])  # `c` has sequences without a token
        writer.finalize()
    assert pair(tmp_path / "x") == pair(FILES / name)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_merge_gives_megatrons_bytes(tmp_path):
    counts = merge([FILES / "a", FILES / "c"], tmp_path / "m")
    assert pair(tmp_path / "m") == pair(FILES / "merged")
    assert counts.documents == len(IndexedDataset(FILES / "a")) + len(IndexedDataset(FILES / "c"))
    with pytest.raises(ValueError, match="expected int32.*found uint16"):
        merge([FILES / "a", FILES / "b"], tmp_path / "n")
    with pytest.raises(ValueError, match="also an input"):
        merge([tmp_path / "m"], tmp_path / "m")


def test_chunked_walks_agree(tmp_path, monkeypatch):
    """Files longer than one chunk go through the same arithmetic."""
    monkeypatch.setattr("dsv3.data.indexed.CHUNK", 3)
    merge([FILES / "a", FILES / "c"], tmp_path / "m")
    assert pair(tmp_path / "m") == pair(FILES / "merged")


def test_get():
    data = IndexedDataset(FILES / "a")
    assert (
        data.get(3, 2, 4).tolist() == data[3].tolist()[2:6]
        and data.get(3, 5).tolist() == data[3].tolist()[5:]
    )
    for wrong in ((len(data),), (-1,), (0, 0, len(data[0]) + 1), (0, -1)):
        with pytest.raises(IndexError):
            data.get(*wrong)


def test_token_dtype_is_megatrons():
    assert [token_dtype(size).name for size in (258, 65499, 65500, 129280)] == [
        "uint16",
        "uint16",
        "int32",
        "int32",
    ]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda b: b"MMIDIDY" + b[7:], "header: expected"),
        (lambda b: b[:9] + struct.pack("<Q", 2) + b[17:], "version: expected 1, found 2"),
        (lambda b: b[:17] + b"\x09" + b[18:], "token type: expected a code of .*found 9"),
        (lambda b: b[:17] + b"\x05" + b[18:], "pointers: expected"),
        (lambda b: b[:18] + struct.pack("<Q", 7) + b[26:], "size: expected"),
        (lambda b: b[:-1], "size: expected"),
        (lambda b: b[:20], "header: expected 34 bytes, found 20"),
        (lambda b: b"", "header: expected"),
        (
            lambda b: b[:34] + struct.pack("<i", -1) + b[38:],
            "lengths: expected none below 0, found -1 at sequence 0",
        ),
        (lambda b: b[:34] + struct.pack("<i", 1) + b[38:], "pointers: expected 4 .* at sequence 1"),
        (lambda b: b[:-8] + struct.pack("<q", 3), "documents: expected first 0 and last 40"),
        (lambda b: b[:-16] + struct.pack("<q", 99) + b[-8:], "documents: expected ascending, found 99"),
    ],
)
def test_damaged_index_is_refused(damage, message, tmp_path):
    data, index = pair(FILES / "a")
    (tmp_path / "a.bin").write_bytes(data)
    (tmp_path / "a.idx").write_bytes(damage(index))
    with pytest.raises(ValueError, match=message) as error:
        IndexedDataset(tmp_path / "a")
    assert "a.idx" in str(error.value)


def test_damaged_bin_is_refused(tmp_path):
    data, index = pair(FILES / "a")
    (tmp_path / "a.idx").write_bytes(index)
    with pytest.raises(FileNotFoundError, match="a.bin"):
        IndexedDataset(tmp_path / "a")
    (tmp_path / "a.bin").write_bytes(data[:-4])
    with pytest.raises(ValueError, match=f"a.bin: expected {len(data)} bytes .* found {len(data) - 4}"):
        IndexedDataset(tmp_path / "a")


def test_multimodal_modes_are_passed_over(tmp_path):
    data, index = pair(FILES / "a")
    (tmp_path / "a.bin").write_bytes(data)
    (tmp_path / "a.idx").write_bytes(index + bytes(40))
    assert len(IndexedDataset(tmp_path / "a").documents) == 41


def test_writer_refuses_what_does_not_fit(tmp_path):
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        for tokens in ([65536], [-1], [1.5], [[1, 2]]):
            with pytest.raises(ValueError, match="tokens: expected"):
                writer.add_document(tokens)
        with pytest.raises(ValueError, match="expected 3 tokens"):
            writer.add_document([1, 2], [3])
        with pytest.raises(ValueError, match="another process"):
            IndexedWriter(tmp_path / "x", np.uint16)
    with pytest.raises(ValueError, match="token type"):
        IndexedWriter(tmp_path / "y", np.uint32)


def test_empty_pair(tmp_path):
    write_documents(tmp_path / "x", [], np.int32)
    data = IndexedDataset(tmp_path / "x")
    assert len(data) == 0 and data.documents.tolist() == [0] and len(data.tokens) == 0


# ---------------------------------------------------------------- preprocessing


def test_preprocess_gives_megatrons_bytes(tmp_path):
    """Two keys, empty texts, lists of sentences."""
    made = preprocess(
        FILES / "texts.jsonl", tmp_path / "x", "byte", json_keys=["text", "title"], append_eod=True
    )
    for key in ("text", "title"):
        assert made.prefixes[key] == f"{tmp_path}/x_{key}_document"
        assert pair(made.prefixes[key]) == pair(FILES / f"texts_{key}_document")
    assert made.documents == 10 and made.bad == 0
    assert not list(tmp_path.glob("*.partial"))


def test_workers_and_batches_change_nothing(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": f"document {i} " * (i % 7)} for i in range(1500)])
    one = preprocess(source, tmp_path / "one", "byte", append_eod=True)
    two = preprocess(source, tmp_path / "two", "byte", append_eod=True, workers=2)
    monkeypatch.setattr("dsv3.data.encoding.BATCH_ITEMS", 7)
    three = preprocess(source, tmp_path / "three", "byte", append_eod=True)
    assert pair(one.prefixes["text"]) == pair(two.prefixes["text"]) == pair(three.prefixes["text"])
    assert one.documents == 1500


def test_every_kind_of_source(tmp_path):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in ("é one", "two")) + b"\n"
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines) + zstandard.compress(lines))
    pyarrow.parquet.write_table(
        pyarrow.table({"id": [1, 2], "text": ["row 1", "row 2"]}), tmp_path / "d.parquet"
    )
    (tmp_path / "e.txt").write_text("a line\n\nanother\n")
    (tmp_path / "f.tokens").write_text(
        " \n = First = \n \n Text one . \n \n = = Section = = \n \n More . \n"
        " \n = Second = \n \n Text two . \n"
    )
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    expected = {
        "a.jsonl": ["é one", "two"],
        "b.jsonl.gz": ["é one", "two"],
        "c.jsonl.zst": ["é one", "two"] * 2,
        "d.parquet": ["row 1", "row 2"],
        "e.txt": ["a line\n\nanother\n"],
        "f.tokens": [
            " \n = First = \n \n Text one . \n \n = = Section = = \n \n More . \n \n",
            " = Second = \n \n Text two . \n",
        ],
    }
    for name, found in expected.items():
        made = preprocess(tmp_path / name, tmp_path / "out" / name, "byte")
        assert texts(made.prefixes["text"]) == found, name
    everything = sum(expected.values(), [])
    assert texts(preprocess(tmp_path, tmp_path / "out2" / "x", "byte").prefixes["text"]) == everything
    assert (
        texts(preprocess(f"{tmp_path}/[a-f].*", tmp_path / "out2" / "y", "byte").prefixes["text"])
        == everything
    )
    lines = preprocess(tmp_path / "e.txt", tmp_path / "out2" / "z", "byte", one_per_line=True)
    assert texts(lines.prefixes["text"]) == ["a line", "another"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"text": "a"}\n{"text": \n', r"bad.jsonl:2: not a line of JSON"),
        (b'{"text": "a"}\n\n{"body": "b"}\n', r"bad.jsonl:3: no key 'text'; found 'body'"),
        (
            b'{"text": "a"}\n{"text": 5}\n',
            r"bad.jsonl:2: 'text': expected a string or a list of strings, found int",
        ),
        (b'{"text": "a"}\n["b"]\n', r"bad.jsonl:2: expected a JSON object a line, found list"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"bad.jsonl:2: not UTF-8: byte 0xff"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', r"bad.jsonl:2: 'text': half of a surrogate pair"),
        (b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", r"bad.jsonl:2: "),
    ],
)
def test_bad_documents(content, message, tmp_path):
    workers = 2 if "surrogate" in message else 1  # one kind is enough to show that a worker's error arrives
    (tmp_path / "bad.jsonl").write_bytes(content + b'{"text": "last"}\n')
    with pytest.raises(ValueError, match=message):
        preprocess(tmp_path / "bad.jsonl", tmp_path / "x", "byte", workers=workers)
    assert not exists(tmp_path / "x_text_document")
    made = preprocess(tmp_path / "bad.jsonl", tmp_path / "x", "byte", skip_bad=True, workers=workers)
    assert made.bad == 1 and texts(made.prefixes["text"]) == ["a", "last"]


def test_bad_text_and_archives_are_named(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"one\ntwo\n\xfe\n")
    with pytest.raises(ValueError, match=r"t.txt:3: not UTF-8: byte 0xfe"):
        preprocess(tmp_path / "t.txt", tmp_path / "x", "byte")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-9])
    (tmp_path / "not.jsonl.gz").write_bytes(b"plain")
    (tmp_path / "not.parquet").write_bytes(b"plain")
    for name, message in (
        ("cut.jsonl.gz", "cut off gzip"),
        ("not.jsonl.gz", "damaged"),
        ("not.parquet", "parquet"),
    ):
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            preprocess(tmp_path / name, tmp_path / "x", "byte")
    with pytest.raises(FileNotFoundError, match="missing"):
        preprocess(tmp_path / "missing", tmp_path / "x", "byte")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found none"):
        expand_inputs(tmp_path / "empty")


def test_bos_eos_pad_and_stitch(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in ("abcdef", "", "gh", "ijklmnop")])
    a, b, c = (list(text.encode()) for text in ("abcdef", "gh", "ijklmnop"))

    def make(name, **options):
        data = IndexedDataset(preprocess(source, tmp_path / name, "byte", **options).prefixes["text"])
        return [data[i].tolist() for i in range(len(data))], data.documents.tolist()

    assert make("plain") == ([a, b, c], [0, 1, 1, 2, 3])
    ends = ([[BOS, *x, EOS] for x in (a, b, c)], [0, 1, 1, 2, 3])
    assert make("ends", append_eod=True, add_bos_token=True, add_eos_token=True) == ends
    assert make("pad", append_eod=True, seq_length=3, pad_or_stitch="pad") == (
        [a[:4], [*b, EOS, EOS], c[:4]],
        [0, 1, 1, 2, 3],
    )
    run = [*a, EOS, *b, EOS, *c, EOS]
    pieces = [run[i : i + 4] for i in range(0, 16, 4)]
    assert make("stitch", append_eod=True, seq_length=3, pad_or_stitch="stitch") == (pieces, [0, 1, 2, 3, 4])
    with pytest.raises(ValueError, match="seq_length"):
        make("wrong", pad_or_stitch="pad")


def test_partitions(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": f"{i}"} for i in range(11)])
    whole = preprocess(source, tmp_path / "x", "byte", partitions=3, append_eod=True)
    expected = [str(i) + "<eos>" for part in range(3) for i in range(part, 11, 3)]
    assert texts(whole.prefixes["text"]) == expected and whole.documents == 11
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "in.jsonl",
        "x_text_document.bin",
        "x_text_document.idx",
    ]
    for part in (2, 0):  # made elsewhere, one by one; the last run makes the rest and joins
        preprocess(source, tmp_path / "y", "byte", partitions=3, partition=part, append_eod=True)
    assert exists(tmp_path / "y_2_text_document") and not exists(tmp_path / "y_text_document")
    made = preprocess(source, tmp_path / "y", "byte", partitions=3, append_eod=True)
    assert made.continued_at == 4 + 3 and pair(made.prefixes["text"]) == pair(whole.prefixes["text"])


def test_a_finished_run_is_not_repeated_and_a_changed_one_is(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "one"}])
    preprocess(source, tmp_path / "x", "byte")
    stamp = os.stat(tmp_path / "x_text_document.bin").st_mtime_ns
    assert preprocess(source, tmp_path / "x", "byte").tokens == 3
    assert os.stat(tmp_path / "x_text_document.bin").st_mtime_ns == stamp
    assert preprocess(source, tmp_path / "x", "byte", append_eod=True).tokens == 4
    write_jsonl(source, [{"text": "one"}, {"text": "two"}])
    assert preprocess(source, tmp_path / "x", "byte", append_eod=True).tokens == 8
    (tmp_path / "x_text_document.idx").unlink()
    assert preprocess(source, tmp_path / "x", "byte", append_eod=True).tokens == 8


class Kill(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("layout", ["none", "stitch"])
def test_stopped_anywhere_and_continued(layout, tmp_path, monkeypatch):
    """Stop before every call that touches the disk for good; run again; the bytes are those of one run."""
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "x" * (i % 9), "b": f"b{i}"} for i in range(40)])
    monkeypatch.setattr("dsv3.data.encoding.BATCH_ITEMS", 9)
    options = dict(
        json_keys=["text", "b"], append_eod=True, seq_length=6, pad_or_stitch=layout, sync_seconds=0.0
    )
    whole = preprocess(source, tmp_path / "whole", "byte", **options)
    expected = [pair(prefix) for prefix in whole.prefixes.values()]
    calls, stop, continued = 0, 0, set()
    real = {"fsync": lambda handle: None, "replace": os.replace}

    def count(name, *arguments):
        nonlocal calls
        calls += 1
        if calls > stop:
            raise Kill
        return real[name](*arguments)

    while True:
        calls = 0
        for key in ("text", "b"):  # of an earlier run, to be replaced
            write_documents(tmp_path / f"x{stop}_{key}_document", [[1, 2]], np.uint16)
        old = pair(tmp_path / f"x{stop}_text_document")
        for name in real:
            monkeypatch.setattr(os, name, partial(count, name))
        try:
            preprocess(source, tmp_path / f"x{stop}", "byte", **options)
            ended = True
        except Kill:
            ended = False
        for name in real:
            monkeypatch.setattr(os, name, real[name])
        for key in ("text", "b"):  # never half a pair
            prefix = tmp_path / f"x{stop}_{key}_document"
            assert not exists(prefix) or pair(prefix) in [old, *expected]
        made = preprocess(source, tmp_path / f"x{stop}", "byte", **options)
        assert [pair(prefix) for prefix in made.prefixes.values()] == expected, stop
        continued.add(made.continued_at)
        if ended:
            break
        stop += 1
    assert stop > 20 and {0, 9, 18, 27, 36, 40} <= continued


def test_killed_with_its_workers_and_continued(tmp_path):
    """SIGKILL to a run with two workers: they end too, and a second run gives the bytes of a whole one."""
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": f"{i} " + "word " * 200} for i in range(6000)])
    call = (
        f"from dsv3.data.preprocess import preprocess\n"
        f"if __name__ == '__main__':\n"
        f"    preprocess({str(source)!r}, {str(tmp_path / 'x')!r}, 'byte', workers=2, sync_seconds=0.0)\n"
    )
    (tmp_path / "run.py").write_text(call)
    environment = {**os.environ, "PYTHONPATH": str(Path(dsv3.__path__[0]).parent)}
    process = subprocess.Popen([sys.executable, tmp_path / "run.py"], env=environment, cwd=tmp_path)
    journal, deadline = tmp_path / "x_preprocess.journal", time.monotonic() + 40
    while (
        not (journal.is_file() and json.loads(journal.read_text())["items"]) and time.monotonic() < deadline
    ):
        assert process.poll() is None
        time.sleep(0.01)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(children) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not exists(tmp_path / "x_text_document")
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    made = preprocess(source, tmp_path / "x", "byte")
    assert 0 < made.continued_at < 6000
    assert pair(made.prefixes["text"]) == pair(preprocess(source, tmp_path / "y", "byte").prefixes["text"])


def test_memory_does_not_grow_with_the_input(monkeypatch):
    """The reader is never more than the window ahead of the writer."""
    monkeypatch.setattr("dsv3.data.encoding.ProcessPoolExecutor", lambda count, *_: ThreadPoolExecutor(count))
    monkeypatch.setattr("dsv3.data.encoding._worker", (byte_tokenizer(), Encoding()))
    ahead = worst = 0

    def documents():
        nonlocal ahead, worst
        for number, raw in enumerate(read_raw([str(FILES / "texts.jsonl")] * 3000)):
            ahead += 1
            worst = max(worst, ahead)
            yield number, raw

    for encoded in encode_all(batched(documents()), byte_tokenizer(), Encoding(), 2):
        ahead -= encoded.items
    assert ahead == 0 and worst <= BATCH_ITEMS * (WINDOW * 2 + 1)


# ---------------------------------------------------------------- fill in the middle


def test_fim(tmp_path, monkeypatch):
    names = ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"]
    corpus = ["some text to fill in the middle of"] * 3
    tokenizer = train_bpe(corpus, 300, tmp_path / "tok", extra_tokens=names)
    originals = [f"document {i}: 早上好, {'abc' * (i % 5)}" for i in range(400)]
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in originals])
    for form in ("psm", "spm"):
        options = dict(append_eod=True, fim_rate=0.25, fim_format=form, seed=3)
        made = preprocess(source, tmp_path / form, tmp_path / "tok", **options)
        monkeypatch.setattr(
            "dsv3.data.encoding.BATCH_ITEMS", 7
        )  # the draws follow the document, not the batch
        again = preprocess(source, tmp_path / f"{form}2", tmp_path / "tok", **options)
        assert pair(made.prefixes["text"]) == pair(again.prefixes["text"])
        other = preprocess(source, tmp_path / f"{form}3", tmp_path / "tok", **{**options, "seed": 4})
        assert pair(made.prefixes["text"]) != pair(other.prefixes["text"])
        data, moved = IndexedDataset(made.prefixes["text"]), 0
        for i, original in enumerate(originals):
            text = tokenizer.decode(data[i])
            assert text.endswith("<eos>") and text.count("<eos>") == 1
            text = text.removesuffix("<eos>")
            if text.startswith(names[0]):
                moved += 1
                first, rest = text.removeprefix(names[0]).split(names[1])
                suffix, last = rest.split(names[2])
                assert form == "psm" or first == ""
                text = first + last + suffix
            assert text == original
        assert 70 <= moved <= 130  # 100 expected, standard deviation 8.7
    for wrong, message in (
        (dict(rate=1.5), "rate"),
        (dict(rate=0.1, format="x"), "format"),
        (dict(rate=0.1, tokens=["<x>", "<y>", "<z>"]), "no tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            make_fim(tokenizer, **wrong)
    with pytest.raises(ValueError, match="no tokens for fill-in-the-middle"):
        make_fim(byte_tokenizer(), 0.1)


def test_parse_gives_text_of_every_key():
    raw = next(read_raw([str(FILES / "texts.jsonl")], ["title", "text"]))
    assert parse(raw, ["title", "text"]) == {"title": ["first"], "text": ["Hello, world!\nTwo lines."]}
