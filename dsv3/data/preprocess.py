"""Text files to Megatron `.bin`/`.idx`: parallel, in order, in constant memory, and able to be killed.

One process reads, N worker processes parse and tokenise, the first one writes. Every half a minute the output
so far is put on disk and a journal, `<prefix>_preprocess.journal`, says how far it reaches; a run with the
same inputs, options and tokenizer continues from there, and the result is the same to the byte. A script that
calls `preprocess(workers=2)` needs `if __name__ == "__main__":`, as always with Python's worker processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from .encoding import Encoding, batched, encode_all
from .fim import make_fim
from .indexed import IndexedWriter, WriterState, exists, merge, token_dtype
from .sources import Raw, expand_inputs, read_raw
from .tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Summary:
    """What a run made: prefix of the pair by key, counts over all keys, bad documents skipped, seconds."""

    prefixes: dict[str, str]
    documents: int
    sequences: int
    tokens: int
    bad: int
    seconds: float
    continued_at: int  # documents already there when the run began


def preprocess(
    inputs: str | os.PathLike | Sequence[str | os.PathLike],
    output_prefix: str | os.PathLike,
    tokenizer: str | os.PathLike | Tokenizer,
    *,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    add_bos_token: bool = False,
    add_eos_token: bool = False,
    workers: int = 1,
    partitions: int = 1,
    partition: int | None = None,
    seq_length: int | None = None,
    pad_or_stitch: str = "none",
    one_per_line: bool = False,
    skip_bad: bool = False,
    fim_rate: float = 0.0,
    fim_format: str = "psm",
    fim_tokens: Sequence[str] | None = None,
    seed: int = 0,
    log_interval: int = 1000,
    progress: bool = False,
    sync_seconds: float = 30.0,
) -> Summary:
    """Tokenise `inputs` into `<output_prefix>_<key>_document.bin` and `.idx`, one pair for each key.

    append_eod, add_eos_token: eos after each document. add_bos_token: bos before it. seq_length: pieces of
    seq_length + 1 tokens for pad_or_stitch "pad" and "stitch". partitions: part k takes documents k, k +
    partitions, ... and is finished on its own; the result joins the parts in order, as Megatron-LM does.
    partition: make that part only (another machine makes the others), nothing is joined. workers: processes;
    with 1 all is done in this one, where `tokenizers` uses threads of its own. skip_bad: count documents that
    cannot be read instead of stopping. fim_*: see fim.py. sync_seconds: between journal entries. Raises
    ValueError or FileNotFoundError naming option, file and line.
    """
    tokenizer = load_tokenizer(tokenizer)
    encoding = Encoding(
        keys=tuple(json_keys),
        add_bos=add_bos_token,
        add_eos=append_eod or add_eos_token,
        layout=pad_or_stitch,
        length=None if seq_length is None else seq_length + 1,
        one_per_line=one_per_line,
        skip_bad=skip_bad,
        fim=make_fim(tokenizer, fim_rate, fim_format, fim_tokens, seed) if fim_rate else None,
    )
    _check(encoding, tokenizer, workers, partitions, partition)
    files = expand_inputs(inputs)
    prefix = os.fspath(output_prefix)
    run = _Run(files, tokenizer, encoding, workers, log_interval, progress, sync_seconds)
    if partitions == 1:
        return _make(run, prefix, 0, 1)
    started = time.monotonic()
    chosen = range(partitions) if partition is None else [partition]
    parts = [_make(run, f"{prefix}_{part}", part, partitions) for part in chosen]
    if partition is not None:
        return parts[0]
    prefixes = {key: _pair(prefix, key) for key in encoding.keys}
    for key, whole in prefixes.items():
        merge([part.prefixes[key] for part in parts], whole)
    for part in range(partitions):
        for path in [
            _journal(f"{prefix}_{part}"),
            *(
                Path(f"{_pair(f'{prefix}_{part}', key)}.{end}")
                for key in encoding.keys
                for end in ("bin", "idx")
            ),
        ]:
            path.unlink()
    return Summary(
        prefixes,
        sum(p.documents for p in parts),
        sum(p.sequences for p in parts),
        sum(p.tokens for p in parts),
        sum(p.bad for p in parts),
        time.monotonic() - started,
        sum(p.continued_at for p in parts),
    )


# ---------------------------------------------------------------- one output


@dataclass(frozen=True)
class _Run:
    files: list[str]
    tokenizer: Tokenizer
    encoding: Encoding
    workers: int
    log_interval: int
    progress: bool
    sync_seconds: float


def _make(run: _Run, prefix: str, part: int, parts: int) -> Summary:
    """One part, from where an earlier run of the same thing left it."""
    started = time.monotonic()
    encoding = run.encoding
    prefixes = {key: _pair(prefix, key) for key in encoding.keys}
    fingerprint = _fingerprint(run, part, parts)
    journal = _read_journal(prefix, fingerprint)
    if journal["done"] and all(map(exists, prefixes.values())):
        return _summary(prefixes, journal, started, journal["items"])
    if journal["done"] or not all(
        _can_continue(prefixes[key], state) for key, state in journal["writers"].items()
    ):
        journal = _new_journal(
            fingerprint
        )  # an output was removed, or renamed just before the kill: make it again
    dtype = token_dtype(run.tokenizer.vocab_size)
    writers: dict[str, IndexedWriter] = {}
    begun = journal["items"]
    try:
        for key in encoding.keys:
            writers[key] = IndexedWriter(prefixes[key], dtype, WriterState(**journal["writers"].get(key, {})))
        carry = {key: np.asarray(journal["carry"].get(key, []), dtype) for key in encoding.keys}
        _write_journal(prefix, journal)
        raws = islice(enumerate(read_raw(run.files, encoding.keys, encoding.one_per_line)), part, None, parts)
        total = sum(map(os.path.getsize, run.files))
        with _progress(run.progress, total, run.log_interval) as advance:
            last = time.monotonic()
            batches = batched(_skip(raws, begun, advance))
            for encoded in encode_all(batches, run.tokenizer, encoding, run.workers):
                for key, (tokens, lengths, sequences) in encoded.arrays.items():
                    if encoding.layout == "stitch":
                        carry[key] = _stitch(
                            writers[key], np.concatenate([carry[key], tokens]), encoding.length
                        )
                    else:
                        writers[key].add_documents(tokens, lengths, sequences)
                journal["items"] += encoded.items
                journal["bad"] += encoded.bad
                advance(encoded.size, encoded.items)
                if time.monotonic() - last >= run.sync_seconds:
                    _checkpoint(prefix, journal, writers, carry)
                    last = time.monotonic()
        _checkpoint(prefix, journal, writers, carry)
        for writer in writers.values():
            writer.finalize()
        journal["done"] = True
        _write_journal(prefix, journal)
    finally:
        for writer in writers.values():
            writer.close()
    return _summary(prefixes, journal, started, begun)


def _skip(raws: Iterator[tuple[int, Raw]], count: int, advance: Callable) -> Iterator[tuple[int, Raw]]:
    for _, raw in islice(raws, count):
        advance(raw.size, 1)
    yield from raws


def _stitch(writer: IndexedWriter, tokens: np.ndarray, length: int) -> np.ndarray:
    """Write the whole pieces of `tokens`, each a document; return what is left over."""
    pieces = len(tokens) // length
    writer.add_documents(tokens[: pieces * length], np.full(pieces, length), np.ones(pieces, np.int64))
    return tokens[pieces * length :]


def _summary(prefixes: dict[str, str], journal: dict, started: float, begun: int) -> Summary:
    states = [WriterState(**state) for state in journal["writers"].values()]
    return Summary(
        prefixes,
        sum(s.documents for s in states),
        sum(s.sequences for s in states),
        sum(s.tokens for s in states),
        journal["bad"],
        time.monotonic() - started,
        begun,
    )


def _pair(prefix: str, key: str) -> str:
    return f"{prefix}_{key}_document"


def _check(
    encoding: Encoding, tokenizer: Tokenizer, workers: int, partitions: int, partition: int | None
) -> None:
    if not encoding.keys or len(set(encoding.keys)) != len(encoding.keys):
        raise ValueError(f"json_keys: expected different names, at least one, found {encoding.keys}")
    if encoding.layout not in ("none", "pad", "stitch"):
        raise ValueError(f"pad_or_stitch: expected none, pad or stitch, found {encoding.layout!r}")
    if encoding.layout != "none" and (encoding.length is None or encoding.length < 2):
        raise ValueError(
            f"pad_or_stitch {encoding.layout}: expected a seq_length of at least 1; give seq_length"
        )
    if (encoding.add_eos or encoding.layout == "pad") and tokenizer.eos_id is None:
        raise ValueError(
            f"{tokenizer.name} has no end token to append or fill with; name it as eos_token in a "
            f"tokenizer_config.json beside it"
        )
    if encoding.add_bos and tokenizer.bos_id is None:
        raise ValueError(
            f"{tokenizer.name} has no begin token; name it as bos_token in a tokenizer_config.json beside it"
        )
    if workers < 1 or partitions < 1:
        raise ValueError(f"workers and partitions: expected at least 1, found {workers} and {partitions}")
    if partition is not None and not 0 <= partition < partitions:
        raise ValueError(f"partition: expected one of 0 to {partitions - 1}, found {partition}")


# ---------------------------------------------------------------- journal


def _journal(prefix: str) -> Path:
    return Path(f"{prefix}_preprocess.journal")  # not .json: it may lie among the inputs


def _new_journal(fingerprint: str) -> dict:
    return {"fingerprint": fingerprint, "done": False, "items": 0, "bad": 0, "writers": {}, "carry": {}}


def _read_journal(prefix: str, fingerprint: str) -> dict:
    path = _journal(prefix)
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not readable JSON ({error}); remove it to start over") from error
        if found.get("fingerprint") == fingerprint:
            return found
    return _new_journal(fingerprint)


def _write_journal(prefix: str, journal: dict) -> None:
    path = _journal(prefix)
    partial = Path(f"{path}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(journal, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _checkpoint(
    prefix: str, journal: dict, writers: dict[str, IndexedWriter], carry: dict[str, np.ndarray]
) -> None:
    journal["writers"] = {key: asdict(writer.sync()) for key, writer in writers.items()}
    journal["carry"] = {key: tokens.tolist() for key, tokens in carry.items()}
    _write_journal(prefix, journal)


def _can_continue(prefix: str, state: dict) -> bool:
    return not state["documents"] or Path(f"{prefix}.bin.partial").is_file()


def _fingerprint(run: _Run, part: int, parts: int) -> str:
    """Of everything that decides the output: files (by size and time), tokenizer, treatment, part."""
    files = [(os.path.abspath(file), os.path.getsize(file), os.stat(file).st_mtime_ns) for file in run.files]
    facts = [files, run.tokenizer.digest, asdict(run.encoding), part, parts]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


# ---------------------------------------------------------------- progress


class _progress:
    """`with _progress(...) as advance: advance(bytes, documents)`: a bar with bytes/s, or nothing."""

    def __init__(self, show: bool, total: int, log_interval: int):
        self.show, self.total, self.interval, self.documents = show, total, max(log_interval, 1), 0

    def __enter__(self) -> Callable[[int, int], None]:
        self.bar = None
        if self.show:
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, unit="B", unit_scale=True, desc="tokenise")
        return self.advance

    def advance(self, size: int, documents: int) -> None:
        before, self.documents = self.documents, self.documents + documents
        if self.bar is not None:
            self.bar.update(size)
            if before // self.interval != self.documents // self.interval:
                self.bar.set_postfix(documents=self.documents)

    def __exit__(self, kind, error, trace) -> None:
        if self.bar is not None:
            self.bar.close()
