"""Documents to token ids, in this process or in several, in order and with a bounded number under way.

Workers are forked from a clean server process ("forkserver"), which is safe beside running threads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np

from .fim import Fim, apply_fim
from .indexed import token_dtype
from .sources import BadDocument, Raw, parse
from .tokenizer import Tokenizer, load_tokenizer

BATCH_BYTES, BATCH_ITEMS = 1 << 19, 256
WINDOW = 3  # batches in flight for each worker


@dataclass(frozen=True)
class Encoding:
    """What is done to each document; everything here changes the output and is part of the fingerprint.

    Tokens of a document: bos when `add_bos`, the text, eos when `add_eos` (never twice); an empty text gives
    an empty document. `layout` "none": a document keeps its length. "pad": cut or filled with eos to `length`
    tokens. "stitch": all documents run on and are cut into pieces of `length`, the last short one is dropped.
    """

    keys: tuple[str, ...] = ("text",)
    add_bos: bool = False
    add_eos: bool = False
    layout: str = "none"
    length: int | None = None
    one_per_line: bool = False
    skip_bad: bool = False
    fim: Fim | None = None


@dataclass(frozen=True)
class Encoded:
    """A batch done. arrays, by key: tokens [n], lengths of sequences, sequences of documents."""

    arrays: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    items: int
    bad: int
    size: int


def batched(raws: Iterator[tuple[int, Raw]]) -> Iterator[list[tuple[int, Raw]]]:
    """Numbered documents in lists of up to BATCH_ITEMS, or of about BATCH_BYTES."""
    batch, size = [], 0
    for item in raws:
        batch.append(item)
        payload = item[1].payload
        size += (
            len(payload) if isinstance(payload, bytes) else sum(len(str(text)) for text in payload.values())
        )
        if size >= BATCH_BYTES or len(batch) >= BATCH_ITEMS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(
    batches: Iterator[list[tuple[int, Raw]]], tokenizer: Tokenizer, encoding: Encoding, workers: int
) -> Iterator[Encoded]:
    """Batches encoded, in order; at most WINDOW batches a worker exist at any time."""
    if workers == 1:
        for batch in batches:
            yield encode_documents(batch, tokenizer, encoding)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, not by each worker
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.name, encoding))
    try:
        window: deque = deque()
        for batch in batches:
            window.append(pool.submit(_work, batch))
            if len(window) >= WINDOW * workers:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def encode_documents(batch: Sequence[tuple[int, Raw]], tokenizer: Tokenizer, encoding: Encoding) -> Encoded:
    """Parse and tokenise a batch of (number, document). Raises BadDocument unless `encoding.skip_bad`."""
    documents, numbers, bad = [], [], 0
    for number, raw in batch:
        try:
            documents.append(parse(raw, encoding.keys))
            numbers.append(number)
        except BadDocument:
            if not encoding.skip_bad:
                raise
            bad += 1
    arrays = {}
    for key in encoding.keys:
        texts = [text for document in documents for text in document[key]]
        if encoding.fim:
            owners = [number for number, document in zip(numbers, documents) for _ in document[key]]
            ids = [
                apply_fim(text, number, encoding.fim, tokenizer.encode_batch)
                for text, number in zip(texts, owners)
            ]
        else:
            ids = tokenizer.encode_batch(texts)
        arrays[key] = _pack(iter(ids), [len(document[key]) for document in documents], tokenizer, encoding)
    return Encoded(arrays, len(batch), bad, sum(raw.size for _, raw in batch))


def _pack(
    ids: Iterator[list[int]], counts: list[int], tokenizer: Tokenizer, encoding: Encoding
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens, lengths, sequences = [], [], []
    for count in counts:
        texts = [found for found in islice(ids, count) if found]
        if texts and encoding.add_bos:
            texts[0] = [tokenizer.bos_id, *texts[0]]
        if texts and encoding.add_eos:
            texts[-1] = [*texts[-1], tokenizer.eos_id]
        if texts and encoding.layout == "pad":
            whole = [token for text in texts for token in text][: encoding.length]
            texts = [whole + [tokenizer.eos_id] * (encoding.length - len(whole))]
        for text in texts:
            tokens += text
            lengths.append(len(text))
        sequences.append(len(texts))
    return (
        np.asarray(tokens, token_dtype(tokenizer.vocab_size)),
        np.asarray(lengths, np.int64),
        np.asarray(sequences, np.int64),
    )


_worker: tuple[Tokenizer, Encoding] | None = None  # of a worker process, set once when it starts


def _start_worker(tokenizer_name: str, encoding: Encoding) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt ends the parent, which ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = load_tokenizer(tokenizer_name), encoding


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # a killed parent cannot tell its workers
    os._exit(1)


def _work(batch: list[tuple[int, Raw]]) -> Encoded:
    return encode_documents(batch, *_worker)
