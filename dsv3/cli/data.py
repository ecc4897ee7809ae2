"""`dsv3 data`: make pretraining files from text, train a tokenizer, look into a `.bin`/`.idx` pair."""

from __future__ import annotations

import argparse
from itertools import chain

import numpy as np

from ..data.fim import FORMATS
from ..data.indexed import IndexedDataset, merge
from ..data.preprocess import preprocess
from ..data.sources import expand_inputs, parse, read_raw
from ..data.tokenizer import load_tokenizer, train_bpe

Formatter = argparse.ArgumentDefaultsHelpFormatter


def add(subparsers: argparse._SubParsersAction) -> None:
    """Register the command. Each sub-command's parser sets `run`, a function of the parsed arguments."""
    parser = subparsers.add_parser(
        "data", help="prepare pretraining data", description=__doc__, formatter_class=Formatter
    )
    commands = parser.add_subparsers(
        dest="data_command", required=True, metavar="{pretrain,tokenizer,merge,info}"
    )
    _add_pretrain(commands)
    _add_tokenizer(commands)
    _add_merge(commands)
    _add_info(commands)


def _add_pretrain(commands) -> None:
    parser = commands.add_parser(
        "pretrain",
        help="tokenise text into Megatron .bin/.idx files",
        formatter_class=Formatter,
        description="Tokenise text into PREFIX_KEY_document.bin and .idx. A run that was killed continues "
        "when it is started again with the same arguments.",
    )
    a = parser.add_argument
    a(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, directories or globs: text (a document a file), .jsonl/.json lines (also .gz, .zst), "
        ".parquet, wikitext *.tokens (a document an article)",
    )
    a("--output-prefix", required=True, metavar="PREFIX", help="path of the output without _KEY_document.bin")
    a("--tokenizer", required=True, help="'byte', a tokenizer.json, or a directory holding one")
    a(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="fields to take, each into a pair of its own",
    )
    a("--append-eod", action="store_true", help="put the end token after each document")
    a("--add-bos-token", action="store_true", help="put the begin token before each document")
    a("--add-eos-token", action="store_true", help="the same as --append-eod; both together add one token")
    a("--one-per-line", action="store_true", help="each line of a text file is a document")
    a(
        "--pad-or-stitch",
        choices=["none", "pad", "stitch"],
        default="none",
        help="none: documents keep their length; pad: cut or fill each to SEQ_LENGTH + 1 tokens; stitch: "
        "run all on and cut every SEQ_LENGTH + 1, dropping the short end",
    )
    a("--seq-length", type=int, default=None, help="for --pad-or-stitch")
    a(
        "--keep-newlines",
        action="store_true",
        help="accepted for Megatron command lines: line breaks always stay",
    )
    a("--split-sentences", action="store_true", help="not offered: a GPT needs no sentence boundaries")
    a("--workers", type=int, default=1, help="processes that tokenise")
    a(
        "--partitions",
        type=int,
        default=1,
        help="make the output in so many parts, of every N-th document, joined at the end in their order",
    )
    a("--partition", type=int, default=None, help="make this part only, on this machine, and do not join")
    a("--skip-bad", action="store_true", help="count documents that cannot be read instead of stopping")
    a(
        "--fim-rate",
        type=float,
        default=0.0,
        help="share of documents rearranged to fill in the middle (DeepSeek-V3: 0.1)",
    )
    a("--fim-format", choices=FORMATS, default="psm", help="order of prefix, suffix and middle")
    a(
        "--fim-tokens",
        nargs=3,
        default=None,
        metavar=("BEGIN", "HOLE", "END"),
        help="marker tokens, when the tokenizer's are not of a known spelling",
    )
    a("--seed", type=int, default=0, help="of the draws for --fim-rate")
    a("--log-interval", type=int, default=1000, help="documents between updates of the count shown")
    a("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run_pretrain)


def run_pretrain(args: argparse.Namespace) -> None:
    """Tokenise, then say what was made."""
    if args.split_sentences:
        raise ValueError("--split-sentences is not offered: pretraining reads whole documents; leave it out")
    made = preprocess(
        args.input,
        args.output_prefix,
        args.tokenizer,
        json_keys=args.json_keys,
        append_eod=args.append_eod,
        add_bos_token=args.add_bos_token,
        add_eos_token=args.add_eos_token,
        workers=args.workers,
        partitions=args.partitions,
        partition=args.partition,
        seq_length=args.seq_length,
        pad_or_stitch=args.pad_or_stitch,
        one_per_line=args.one_per_line,
        skip_bad=args.skip_bad,
        fim_rate=args.fim_rate,
        fim_format=args.fim_format,
        fim_tokens=args.fim_tokens,
        seed=args.seed,
        log_interval=args.log_interval,
        progress=not args.quiet,
    )
    if made.continued_at:
        print(f"continued after {made.continued_at:,} documents of an earlier run")
    print(
        f"{made.documents:,} documents, {made.tokens:,} tokens in {made.seconds:.1f} s; "
        f"{made.bad:,} skipped as bad"
    )
    for prefix in made.prefixes.values():
        print(f"wrote {prefix}.bin and {prefix}.idx")


def _add_tokenizer(commands) -> None:
    parser = commands.add_parser(
        "tokenizer",
        help="train a byte-level BPE tokenizer on text",
        formatter_class=Formatter,
        description="Train a byte-level BPE with <bos> = 0 and <eos> = 1 into DIR/tokenizer.json.",
    )
    a = parser.add_argument
    a("--input", nargs="+", required=True, metavar="PATH", help="text, as for 'pretrain'")
    a("--output", required=True, metavar="DIR", help="directory for tokenizer.json")
    a("--vocab-size", type=int, default=8192, help="entries, special tokens and the 256 bytes included")
    a("--json-keys", nargs="+", default=["text"], metavar="KEY", help="fields to take")
    a("--extra-tokens", nargs="*", default=[], metavar="TOKEN", help="more special tokens, numbered from 2")
    a("--min-frequency", type=int, default=2, help="fewest times a pair must be seen to become a token")
    a("--max-bytes", type=int, default=64_000_000, help="stop reading after so much text")
    a("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run_tokenizer)


def run_tokenizer(args: argparse.Namespace) -> None:
    """Train, then say what was made."""

    def texts():
        seen = 0
        for raw in read_raw(expand_inputs(args.input), args.json_keys):
            for text in chain.from_iterable(parse(raw, args.json_keys).values()):
                if seen >= args.max_bytes:
                    return
                yield text[: args.max_bytes - seen]
                seen += len(text.encode("utf-8"))

    made = train_bpe(
        texts(),
        args.vocab_size,
        args.output,
        extra_tokens=args.extra_tokens,
        min_frequency=args.min_frequency,
        progress=not args.quiet,
    )
    print(f"wrote {made.name}: {made.vocab_size:,} entries, bos {made.bos_id}, eos {made.eos_id}")


def _add_merge(commands) -> None:
    parser = commands.add_parser(
        "merge",
        help="join .bin/.idx pairs into one",
        formatter_class=Formatter,
        description="Join pairs of one token type, in the order given.",
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help="pairs, without .bin")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="the new pair, without .bin")
    parser.set_defaults(run=run_merge)


def run_merge(args: argparse.Namespace) -> None:
    """Join, then say what was made."""
    made = merge(args.input, args.output_prefix)
    print(f"wrote {args.output_prefix}.bin and .idx: {made.documents:,} documents, {made.tokens:,} tokens")


def _add_info(commands) -> None:
    parser = commands.add_parser(
        "info",
        help="describe a .bin/.idx pair",
        formatter_class=Formatter,
        description="Check a .bin/.idx pair and describe it.",
    )
    parser.add_argument("prefix", help="the pair, with or without .bin")
    parser.add_argument(
        "--tokenizer", default=None, help="to show text: 'byte', a tokenizer.json or its directory"
    )
    parser.add_argument("--documents", type=int, default=1, help="sequences to show with --tokenizer")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to show of each")
    parser.set_defaults(run=run_info)


def run_info(args: argparse.Namespace) -> None:
    """Print counts, type and lengths, and the text of the first sequences."""
    prefix = args.prefix[:-4] if args.prefix.endswith((".bin", ".idx")) else args.prefix
    data = IndexedDataset(prefix)
    print(
        f"{prefix}: {len(data.documents) - 1:,} documents, {len(data):,} sequences, "
        f"{len(data.tokens):,} tokens, {data.dtype.name}"
    )
    if len(data):
        low, middle, high = np.percentile(data.lengths, [0, 50, 100]).astype(int)
        print(
            f"tokens in a sequence: {low:,} at least, {middle:,} median, {data.lengths.mean():,.1f} mean, "
            f"{high:,} at most"
        )
    if len(data.tokens):
        step = max(1, len(data.tokens) // 10_000_000)
        print(f"largest token id{'' if step == 1 else f' of every {step}th'}: {data.tokens[::step].max():,}")
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer)
        for number in range(min(args.documents, len(data))):
            ids = data[number][: args.tokens].tolist()
            print(f"sequence {number}: {ids}\n{tokenizer.decode(ids)!r}")
