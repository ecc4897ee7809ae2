"""TextStream against ``tokenizer.decode`` of all ids and a search of the whole text, over random text, bytes and stop strings.

Planted faults seen to fail: text that ends in the sign for missing bytes shown at once; the last such sign shown; a window of six
ids; text after an earlier-ending stop string shown; a silent id that fills the window; nothing kept back for a stop string.
"""
import dataclasses
import random

import pytest

from dsv3.data.tokenizer import byte_tokenizer, load_tokenizer, train_bpe
from dsv3.text import WINDOW, TextStream

ALPHABET = "ab ,.\n" + "éß中文字漢日本語한국" + "🙂👩‍👩‍👧🇩🇪" + "e\u0301\u0327\u0308" + "\u200d\ufeff\ufffd" + "𐍈𝔘" + "עברית"
TEXTS = ["中文字漢日本語 한국 abc été 🙂👩‍👩‍👧 " * 20, "the quick brown fox jumps over the lazy dog\n" * 20,
         "🙂🙃 中中文文 éé " * 30]


def crossing(folder):
    """A byte-level BPE whose tokens reach across characters: ends and beginnings of characters in one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())  # how byte-level BPE writes the bytes, one printable character each
    pairs = [(a, b) for a in signs[-40:] for b in signs[-40:]]
    vocab = {token: i for i, token in enumerate([*signs, *(a + b for a, b in pairs)])}
    backend = Tokenizer(models.BPE(vocab, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {"byte": byte_tokenizer(), "bpe": train_bpe(TEXTS, 500, folder / "bpe"), "crossing": crossing(folder / "crossing")}


def streamed(tokenizer, ids, stop=()):
    """(pieces, done) of a stream."""
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(i) for i in ids]
    return [*pieces, stream.finish()], stream.done


def cut(text, stop):
    """(text before the stop string that is complete first, whether there is one), by looking at every end."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[:end - max(map(len, found))], True
    return text, False


@pytest.mark.parametrize("name", ["byte", "bpe", "crossing"])
def test_equal_to_decoding_all_ids(tokenizers, name):
    tokenizer, rng = tokenizers[name], random.Random(name)
    for case in range(150):
        if case % 3 == 0:    # a text
            ids = tokenizer.encode("".join(rng.choices(ALPHABET, k=rng.randrange(80))))
        elif case % 3 == 1:  # any ids: invalid bytes, special tokens, ids that no token has
            ids = [rng.randrange(tokenizer.vocab_size + 30) for _ in range(rng.randrange(200))]
        else:                # ends and beginnings of characters only
            ids = [rng.choice([0xE4, 0xB8, 0xAD, 0xF0, 0x9F, 0x98, 0x82, 0xC3, 0xA9]) for _ in range(200)]
            ids = ids if name == "byte" else [i for i in map(tokenizer.vocab_size.__sub__, ids) if i >= 0]
        pieces, done = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids) and not done, (name, case, ids)


def test_a_character_is_never_shown_in_halves(tokenizers):
    for tokenizer in tokenizers.values():
        text = "a中🙂👩‍👩‍👧한é𐍈 b"
        pieces, _ = streamed(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_byte_fallback_shows_no_halves():
    """Such a decoder (SentencePiece models) puts one sign a byte until a character is whole."""
    from tokenizers import Tokenizer, decoders, models

    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"▁a": 256, "<unk>": 257}
    backend = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    tokenizer = dataclasses.replace(byte_tokenizer(), decode=lambda ids: backend.decode(list(ids), skip_special_tokens=False))
    ids = ([256] + list("中🙂é".encode())) * 30
    pieces, _ = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) and not any("\ufffd" in piece for piece in pieces)


def test_text_appears_as_soon_as_it_is_certain(tokenizers):
    stream = TextStream(tokenizers["byte"], ["END"])
    shown = [stream.push(b) for b in b"aEN.EEND"]
    assert shown == ["a", "", "", "EN.", "", "E", "", ""] and stream.done
    assert stream.push(65) == "" and stream.finish() == ""
    stream = TextStream(tokenizers["byte"])
    assert [stream.push(b) for b in [0x80] * 6] == ["", "", "", "\ufffd" * 3, "\ufffd", "\ufffd"] and stream.finish() == "\ufffd"


@pytest.mark.parametrize("name", ["byte", "bpe", "crossing"])
def test_stop_strings_cut_where_a_search_of_the_text_would(tokenizers, name):
    tokenizer, rng, cuts = tokenizers[name], random.Random(1), 0
    for case in range(400):
        alphabet = "ab" if case % 2 else "ab中🙂\n"
        text = "".join(rng.choices(alphabet, k=rng.randrange(60)))
        stop = ["".join(rng.choices(alphabet, k=rng.randint(1, 6))) for _ in range(rng.randint(1, 4))]
        pieces, done = streamed(tokenizer, tokenizer.encode(text), stop)
        expected, found = cut(text, stop)
        assert ("".join(pieces), done) == (expected, found), (text, stop)
        cuts += done
    assert 100 < cuts < 400


def test_of_two_stop_strings_in_one_token_the_one_that_ends_first_counts(tokenizers):
    tokenizer = tokenizers["bpe"]
    ids = tokenizer.encode("the")
    assert len(ids) == 1
    for stop, text in ((["the", "h"], "t"), (["he", "the"], ""), (["e", "he"], "t")):
        pieces, done = streamed(tokenizer, ids, stop)
        assert "".join(pieces) == text and done


def test_work_for_an_id_does_not_grow(tokenizers):
    lengths = []

    def decode(ids):
        lengths.append(len(ids))
        return tokenizers["byte"].decode(ids)

    counted = dataclasses.replace(tokenizers["byte"], decode=decode)
    ids = list("é🙂".encode()) * 500 + [0x80] * 500 + [300] * 500
    assert "".join(streamed(counted, ids)[0]) == tokenizers["byte"].decode(ids)
    assert max(lengths) <= 2 * WINDOW + 1 and len(lengths) <= 4 * len(ids)


def test_ids_without_text_do_not_hide_what_is_before_them(tokenizers):
    """A Hugging Face tokenizer skips an id that no token has, even inside a character."""
    tokenizer = tokenizers["crossing"]
    ids = tokenizer.encode("ab") * 40
    beyond = tokenizer.vocab_size + 5
    character = [tokenizer.token_id(c) for c in ("ä", "¸", "Ń")]  # how byte-level BPE writes E4 B8 AD
    assert None not in character and tokenizer.decode(character) == "中"
    ids = [*ids, character[0], *[beyond] * 100, character[1], *[beyond] * 100, character[2]]
    pieces, _ = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) and pieces[-2] == "中"
    ids = [i for one in character * 40 for i in (one, beyond)]
    assert "".join(streamed(tokenizer, ids)[0]) == "中" * 40


def test_an_empty_stop_string_is_refused(tokenizers):
    with pytest.raises(ValueError, match="stop: expected strings of at least one character"):
        TextStream(tokenizers["byte"], [""])
