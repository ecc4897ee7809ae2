"""Real text to train on, ready in seconds: the Python standard library, or the user's own files.

`prepare_stdlib` and `open_text` end in a Corpus: a tokenizer and one `.bin`/`.idx` pair whose last documents
are held out. Everything is made in a directory of its own that gets its name, a hash of what it was made
from, by one rename when it is complete: processes may do it at once, and a killed one leaves nothing half
done.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from .indexed import IndexedDataset, exists, token_dtype, write_documents
from .preprocess import preprocess
from .sources import JSONL, expand_inputs, parse, read_raw
from .tokenizer import Tokenizer, load_tokenizer, train_bpe

SKIPPED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "turtledemo", "__pycache__"}
VERSION = 1  # of what is cached; raised when the same inputs would give other files


@dataclass(frozen=True)
class Corpus:
    """Tokenised text. prefix: of the pair; train, valid: sequences [begin, end) of it, for GPTDataset's
    split_range; tokenizer: None only for a pair opened without one."""

    name: str
    prefix: str
    train: tuple[int, int]
    valid: tuple[int, int]
    tokenizer: Tokenizer | None


def default_cache() -> Path:
    """`$DSV3_CACHE`, else `dsv3` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("DSV3_CACHE") or os.path.join(base, "dsv3"))


def stdlib_texts(max_bytes: int | None = 12_000_000) -> Iterator[tuple[str, str]]:
    """(name, source text) of the running Python's standard library, sorted by name, the same every time.

    Tests, site-packages, idlelib, turtledemo, caches and the machine's own build settings are left out, and
    files that are not UTF-8. max_bytes: at most so much UTF-8 in all; files are then chosen by the hash of
    their name, not by the alphabet. None: everything.
    """
    root = Path(sysconfig.get_path("stdlib"))
    sizes = {}
    for directory, below, files in os.walk(root):
        below[:] = [name for name in below if name not in SKIPPED]
        for file in files:
            path = Path(directory, file)
            if file.endswith(".py") and not file.startswith("_sysconfigdata") and path.stat().st_size:
                sizes[path.relative_to(root).as_posix()] = path.stat().st_size
    total, chosen = 0, []
    for name in sorted(sizes, key=_hash):
        if max_bytes is None or total + sizes[name] <= max_bytes:
            chosen.append(name)
            total += sizes[name]
    for name in sorted(chosen):
        try:
            yield name, (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few modules declare another encoding


def prepare_stdlib(
    cache_dir: str | os.PathLike | None = None,
    vocab_size: int = 4096,
    *,
    max_bytes: int | None = 12_000_000,
    held_out: float = 0.03,
    train_bytes: int = 4_000_000,
    log: Callable[[str], None] = print,
) -> Corpus:
    """The standard library as a Corpus with a byte-level BPE of `vocab_size` trained on `train_bytes` of it.

    Held out: documents chosen by the hash of their name, about `held_out` of the bytes; the tokenizer has not
    seen them. cache_dir: default `default_cache()`. log: told what is done and how large it is.
    """
    texts = dict(stdlib_texts(max_bytes))
    content = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    key = _key("stdlib", platform.python_version(), content, vocab_size, held_out, train_bytes)
    train, valid = _hold_out(texts, held_out)
    name = f"Python {platform.python_version()} standard library"

    def make(place: Path) -> None:
        log(f"training a tokenizer of {vocab_size} entries on the {name}")
        tokenizer = train_bpe(
            _first_bytes((texts[n] for n in sorted(train, key=_hash)), train_bytes), vocab_size, place
        )
        log(f"tokenising {len(train)} files to train on and {len(valid)} held out")
        _tokenise(place, (texts[name] for name in (*train, *valid)), tokenizer)
        _write_facts(place, name, (len(train), len(texts)))

    return _open(_make_once(Path(cache_dir or default_cache()), f"stdlib-{key}", make), None, log)


def open_text(
    path: str | os.PathLike,
    tokenizer: str | os.PathLike | Tokenizer | None = None,
    cache_dir: str | os.PathLike | None = None,
    *,
    vocab_size: int = 4096,
    held_out: float = 0.03,
    train_bytes: int = 8_000_000,
    workers: int = 1,
    log: Callable[[str], None] = print,
) -> Corpus:
    """The user's own text as a Corpus: a text file, a directory, JSON lines (.gz, .zst), parquet, wikitext, a
    glob, or the prefix of a `.bin`/`.idx` pair, which is used where it is.

    tokenizer: as in `load_tokenizer`; None trains a BPE of `vocab_size` on the first `train_bytes`. Held out:
    the last documents, about `held_out` of the tokens; of a single text file its last lines.
    Raises ValueError when one document is all there is.
    """
    name = os.fspath(path)
    prefix = name[:-4] if name.endswith((".bin", ".idx")) else name
    tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)
    if exists(prefix):
        train, valid = _tail(IndexedDataset(prefix), held_out)
        return _announce(Corpus(prefix, prefix, train, valid, tokenizer), log)
    files = expand_inputs(name)
    facts = [(os.path.abspath(file), os.path.getsize(file), os.stat(file).st_mtime_ns) for file in files]
    key = _key(facts, tokenizer.digest if tokenizer else [vocab_size, train_bytes], held_out)

    def make(place: Path) -> None:
        found = tokenizer
        if found is None:
            log(f"training a tokenizer of {vocab_size} entries on {name}")
            texts = chain.from_iterable(parse(raw)["text"] for raw in read_raw(files))
            found = train_bpe(_first_bytes(texts, train_bytes), vocab_size, place)
        log(f"tokenising {name}")
        if len(files) == 1 and not files[0].lower().endswith((".tokens", ".parquet", ".gz", ".zst", *JSONL)):
            [text] = parse(next(read_raw(files)))["text"]
            cut = text.rfind("\n", 0, int(len(text) * (1 - held_out))) + 1 or int(len(text) * (1 - held_out))
            _tokenise(place, (text[:cut], text[cut:]), found)
            _write_facts(place, name, (1, 2))
        else:
            preprocess(files, place / "corpus", found, append_eod=found.eos_id is not None, workers=workers)
            for end in ("bin", "idx"):
                os.rename(place / f"corpus_text_document.{end}", place / f"corpus.{end}")
            (place / "corpus_preprocess.journal").unlink()
            train, valid = _tail(IndexedDataset(place / "corpus"), held_out)
            _write_facts(place, name, (train[1], valid[1]))

    return _open(_make_once(Path(cache_dir or default_cache()), f"text-{key}", make), tokenizer, log)


def range_tokens(indexed: IndexedDataset, sequences: tuple[int, int]) -> np.ndarray:
    """All tokens of sequences [begin, end), one after the other, [n], a view of the map."""
    begin, end = sequences
    if begin == end:
        return indexed.tokens[:0]
    first, last = (int(indexed.pointers[i]) // indexed.dtype.itemsize for i in (begin, end - 1))
    return indexed.tokens[first : last + int(indexed.lengths[end - 1])]


def unigram_entropy(
    tokens_train: np.ndarray, tokens_valid: np.ndarray, vocab_size: int
) -> tuple[float, float]:
    """What a model that only counts tokens reaches on the held-out text, in nats a token.

    First: cross-entropy of `tokens_valid` under the counts of `tokens_train`, each plus one. Second: entropy
    of `tokens_valid`'s own counts, the least any fixed distribution reaches. A model that has learnt anything
    about order must be below both.
    """
    if len(tokens_valid) == 0:
        raise ValueError("unigram_entropy: expected held-out tokens, found none")
    top = max(int(tokens.max()) for tokens in (tokens_train, tokens_valid) if len(tokens))
    if top >= vocab_size:
        raise ValueError(f"unigram_entropy: expected tokens below vocab_size {vocab_size}, found {top}")
    seen = np.bincount(tokens_train, minlength=vocab_size).astype(np.float64) + 1.0
    share = np.bincount(tokens_valid, minlength=vocab_size) / len(tokens_valid)
    used = share > 0
    cross = -float(share[used] @ np.log(seen[used] / seen.sum()))
    return cross, -float(share[used] @ np.log(share[used]))


# ---------------------------------------------------------------- inside


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _key(*facts) -> str:
    return hashlib.sha256(json.dumps([VERSION, *facts]).encode()).hexdigest()[:16]


def _hold_out(texts: dict[str, str], share: float) -> tuple[list[str], list[str]]:
    """Names to train on and names held out, each sorted; a file too large for what is left is passed over."""
    room = share * sum(map(len, texts.values()))
    valid = set()
    for name in sorted(texts, key=_hash):
        if len(texts[name]) <= room:
            valid.add(name)
            room -= len(texts[name])
    return sorted(texts.keys() - valid), sorted(valid)


def _tail(indexed: IndexedDataset, share: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sequences to train on and the fewest last ones that hold `share` of the tokens."""
    count = len(indexed)
    if count < 2:
        raise ValueError(
            f"{indexed.prefix}: expected at least two documents, to hold one out, found {count}; "
            f"split the text into documents"
        )
    after = np.cumsum(indexed.lengths[::-1], dtype=np.int64)
    held = min(int(np.searchsorted(after, share * after[-1])) + 1, count - 1)
    return (0, count - held), (count - held, count)


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text[:limit]
        limit -= len(text.encode("utf-8"))
        if limit <= 0:
            return


def _tokenise(place: Path, texts: Iterable[str], tokenizer: Tokenizer) -> None:
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]

    def documents() -> Iterator[list[int]]:
        batch: list[str] = []
        for text in chain(texts, [None]):
            if text is None or sum(map(len, batch)) > 1 << 20:
                for ids in tokenizer.encode_batch(batch):
                    yield ids + end
                batch = []
            batch.append(text)

    write_documents(place / "corpus", documents(), token_dtype(tokenizer.vocab_size))


def _write_facts(place: Path, name: str, ends: tuple[int, int]) -> None:
    (place / "corpus.json").write_text(json.dumps({"name": name, "train_end": ends[0], "valid_end": ends[1]}))


def _make_once(cache: Path, name: str, make: Callable[[Path], None]) -> Path:
    """`cache/name`, filled by `make` unless it is there."""
    place = cache / name
    if not place.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{name}.", suffix=".partial", dir=cache))
        try:
            make(partial)
            os.chmod(partial, 0o755)
            os.rename(partial, place)
        except OSError:
            if not place.is_dir():  # else another process was first, and its files are the same
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return place


def _open(place: Path, tokenizer: Tokenizer | None, log: Callable[[str], None]) -> Corpus:
    facts = json.loads((place / "corpus.json").read_text())
    tokenizer = tokenizer or load_tokenizer(place)
    train, valid = (0, facts["train_end"]), (facts["train_end"], facts["valid_end"])
    return _announce(Corpus(facts["name"], os.fspath(place / "corpus"), train, valid, tokenizer), log)


def _announce(corpus: Corpus, log: Callable[[str], None]) -> Corpus:
    indexed = IndexedDataset(corpus.prefix)
    counts = [
        f"{len(range_tokens(indexed, part)):,} tokens in {part[1] - part[0]:,} documents {what}"
        for part, what in ((corpus.train, "to train on"), (corpus.valid, "held out"))
    ]
    log(f"{corpus.name}: {counts[0]}, {counts[1]} ({corpus.prefix})")
    return corpus
