"""Text to token ids and back: a frozen record of functions, whatever stands behind it.

`load_tokenizer("byte")` needs no file; `load_tokenizer(path)` takes a Hugging Face `tokenizer.json`, or the
directory holding one; `train_bpe` makes one from the user's own text in seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

BOS, EOS = "<bos>", "<eos>"
# What published tokenizers call their first and last token, for a tokenizer.json with nothing beside it;
# compared after full-width bars and block underscores are made plain.
BOS_NAMES = (
    "<|begin_of_sentence|>",
    "<bos>",
    "<s>",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "[BOS]",
    "[CLS]",
)
EOS_NAMES = ("<|end_of_sentence|>", "<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "[SEP]")
# Pieces no token of `train_bpe` reaches across: words with one mark before them, digits in threes, runs of
# symbols, line ends. One pattern, because each further one costs a pass over the text.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Tokenizer:
    """Functions and facts of one tokenizer.

    `encode(text) -> ids` and `encode_batch(texts) -> lists of ids` add nothing of their own at the ends; the
    names of special tokens inside the text become their ids. `decode(ids) -> text` keeps special tokens, and
    gives U+FFFD for bytes that are no UTF-8, as at the end of a half-received character. `token_id(name)` is
    the id of one token or None. `name` is what `load_tokenizer` takes to make it again; `digest` changes with
    its content. `vocab_size` is the largest id + 1; `bos_id`/`eos_id` are None when the tokenizer has none.
    """

    name: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    encode_batch: Callable[[Sequence[str]], list[list[int]]]
    token_id: Callable[[str], int | None]
    digest: str


def load_tokenizer(path_or_name: str | os.PathLike | Tokenizer) -> Tokenizer:
    """A tokenizer by name ("byte"), by `tokenizer.json` file, or by the directory of one.

    The begin and end ids come from `tokenizer_config.json` beside it, else `special_tokens_map.json`, else
    the added tokens of the file itself. Raises FileNotFoundError or ValueError with the path.
    """
    if isinstance(path_or_name, Tokenizer):
        return path_or_name
    if path_or_name == "byte":
        return byte_tokenizer()
    path = Path(path_or_name)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected 'byte', a tokenizer.json, or a directory holding one"
        )
    return _from_file(path)


def byte_tokenizer() -> Tokenizer:
    """UTF-8 bytes as ids 0 to 255, bos 256, eos 257. Text never becomes a special token."""
    specials = {256: BOS, 257: EOS}

    def encode(text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(ids: Sequence[int]) -> str:
        parts, run = [], bytearray()
        for i in ids:
            if i < 256:
                run.append(int(i))
            else:
                parts += [run.decode("utf-8", errors="replace"), specials.get(int(i), "")]
                run = bytearray()
        return "".join(parts) + run.decode("utf-8", errors="replace")

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        return [encode(text) for text in texts]

    return Tokenizer(
        name="byte",
        vocab_size=258,
        bos_id=256,
        eos_id=257,
        encode=encode,
        decode=decode,
        encode_batch=encode_batch,
        token_id={BOS: 256, EOS: 257}.get,
        digest="byte",
    )


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    path: str | os.PathLike,
    *,
    extra_tokens: Sequence[str] = (),
    min_frequency: int = 2,
    progress: bool = False,
) -> Tokenizer:
    """Train a byte-level BPE and write `tokenizer.json` and `tokenizer_config.json` into directory `path`.

    `<bos>` is 0 and `<eos>` is 1; `extra_tokens` (for fill-in-the-middle or chat, say) follow. Any text can
    be encoded, for all 256 bytes are in the vocabulary. The same texts in the same order give the same file.
    The vocabulary stays smaller than asked when the text has too few pairs seen `min_frequency` times. Raises
    ValueError when `vocab_size` leaves no room for the bytes and the special tokens.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    specials = [BOS, EOS, *extra_tokens]
    if vocab_size < 256 + len(specials):
        raise ValueError(
            f"vocab_size: expected at least {256 + len(specials)} (256 bytes and {len(specials)} special "
            f"tokens), found {vocab_size}"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=specials,
            show_progress=progress,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "bos_token": BOS,
        "eos_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    # The configuration first: whoever sees the tokenizer.json then sees both.
    _replace(directory / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    _replace(directory / "tokenizer.json", backend.to_str(pretty=False))
    return load_tokenizer(directory)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _from_file(path: Path) -> Tokenizer:
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError as error:
        raise ValueError(
            f"{path} needs the package 'tokenizers': pip install tokenizers, or use 'byte'"
        ) from error
    data = path.read_bytes()
    try:
        backend = Backend.from_buffer(data)
    except Exception as error:  # the package raises a bare Exception
        raise ValueError(f"{path}: not a readable tokenizer.json: {error}") from error
    bos, eos = (
        _special(path, data, backend, "bos_token", BOS_NAMES),
        _special(path, data, backend, "eos_token", EOS_NAMES),
    )

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode(text: str) -> list[int]:
        return encode_batch([text])[0]

    def decode(ids: Sequence[int]) -> str:
        return backend.decode([int(i) for i in ids], skip_special_tokens=False)

    digest = hashlib.sha256(data + repr((bos, eos)).encode()).hexdigest()
    return Tokenizer(
        name=os.path.abspath(path),
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        bos_id=bos,
        eos_id=eos,
        encode=encode,
        decode=decode,
        encode_batch=encode_batch,
        token_id=backend.token_to_id,
        digest=digest,
    )


def _special(path: Path, data: bytes, backend, key: str, names: Sequence[str]) -> int | None:
    """The id of the bos or eos token: what the files beside say, else an added token of a known name."""
    for beside in ("tokenizer_config.json", "special_tokens_map.json"):
        file = path.with_name(beside)
        if not file.is_file():
            continue
        try:
            token = json.loads(file.read_text(encoding="utf-8")).get(key)
        except ValueError as error:
            raise ValueError(f"{file}: not readable JSON: {error}") from error
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            continue
        found = backend.token_to_id(token)
        if found is None:
            raise ValueError(
                f"{file}: {key}: expected a token of {path.name}, found {token!r}, which is not in it"
            )
        return found
    added = {
        token["content"].replace("｜", "|").replace("▁", "_"): token["id"]
        for token in json.loads(data).get("added_tokens", [])
    }
    return next((added[name] for name in names if name in added), None)
