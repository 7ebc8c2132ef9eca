"""Tests of CLIP's tokenizer, which are compared with the implementation of the package tokenizers."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from model.dinotxt.bpe import END, START, Tokenizer, VocabularyError, clean, read_merges, split_words
from tests.model.dinotxt_files import CORPUS, MERGES, VOCAB_SIZE, write_vocabulary

TEXTS = [
    CORPUS,
    "A  Photo\tof\n THE DOG!!",
    "it's the dogs' he'll we've I'm they're don't she'd 'SO",
    "café naïve Ünïcödé",
    "日本語 テスト 中文",
    "😀😃 👩‍👩‍👧 🇩🇪!",
    "12345 1st ½ ² Ⅻ ٣",
    "a_b-c+d=e/f\\g #tag @user 50%",
    "!!!???...'s",
    "नमस्ते ไทย نص",
    "zero\u200bwidth",
    "x" * 200,
    "",
    "   ",
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "vocabulary.txt.gz"
    write_vocabulary(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(vocabulary: Path) -> Tokenizer:
    return Tokenizer(vocabulary, VOCAB_SIZE)


def reference(vocabulary: Path):
    """Return CLIP's tokenizer as the package transformers builds it."""
    tokenizers = pytest.importorskip("tokenizers", reason="the tokenizer is compared: pip install '.[reference]'")
    lines = gzip.decompress(vocabulary.read_bytes()).decode().split("\n")[1 : MERGES + 1]
    pairs = [tuple(line.split()) for line in lines]
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in order] + [chr(256 + i) for i in range(256 - len(order))]
    names = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in pairs), START, END]
    vocab = {name: index for index, name in enumerate(names)}
    model = tokenizers.models.BPE(vocab=vocab, merges=pairs, end_of_word_suffix="</w>", unk_token=END)
    built = tokenizers.Tokenizer(model)
    normalizers, pre = tokenizers.normalizers, tokenizers.pre_tokenizers
    spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    built.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = tokenizers.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = pre.Split(words, behavior="removed", invert=True)
    built.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False)])
    return built


def test_the_tokens_equal_those_of_another_implementation(vocabulary: Path, tokenizer: Tokenizer) -> None:
    other = reference(vocabulary)
    rng = np.random.default_rng(0)
    letters = np.array(list("aAbcdeEfghilnoOrstuvw  .,'!1äÄñßéОйд中文😀_-&"))
    random = ["".join(rng.choice(letters, rng.integers(1, 30))) for _ in range(500)]
    for text in TEXTS + random:
        assert tokenizer.encode(text) == other.encode(text).ids, text
    assert len(tokenizer.encode(CORPUS)) < len(CORPUS) / 2  # pairs are joined


def test_known_tokens(tokenizer: Tokenizer) -> None:
    """Bytes come first, in the order of CLIP's vocabulary, then bytes at the end of a word."""
    assert tokenizer.encode("!") == [256]
    assert tokenizer.encode("z") == [256 + ord("z") - ord("!")]
    assert tokenizer.encode("\u00ad") == [94 + 12 + 0xC2 - 0xAE, 512 - 1]  # C2 AD; AD is the last byte
    assert (tokenizer.start, tokenizer.end) == (VOCAB_SIZE - 2, VOCAB_SIZE - 1)


def test_a_prompt_begins_and_ends_with_the_special_tokens(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a photo")
    assert tokenizer.prompt("a photo") == [tokenizer.start, *tokens, tokenizer.end]
    assert tokenizer.prompt("") == [tokenizer.start, tokenizer.end]


def test_a_prompt_ends_at_the_first_end_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.prompt(f"a photo {END.upper()} x") == tokenizer.prompt("a photo")
    assert tokenizer.encode(f"a{START}") == [*tokenizer.encode("a"), *tokenizer.encode(START)]
    assert tokenizer.encode(START) == [tokenizer.start]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  A\tB \n c\u3000d\u00a0e ", "a b c d e"),
        ("&lt;b&gt; &amp;amp;eacute;", "<b> é"),
        ("a < b &eacute;", "a < b é"),
        ("“x” ‘y’ „z‚ &rsquo;", "\"x\" 'y' \"z' '"),
        ("ﬁre ﬅ ĳ ŉ", "fire ſt ij 'n"),
        ("ＦＵＬＬ　ｶﾞ ！", "full ガ !"),
        ("e\u0301", "é"),
        ("\x1b[31mred\x1b[0m \ufeffx\x0b\x00y\x1f", "red xy"),
        ("a\x91b\x80c\x81", "a'b€c\x81"),
        ("\ud83d\ude00 \ud800", "😀 \ufffd"),
    ],
)
def test_text_is_cleaned_as_clip_cleans_it(text: str, expected: str) -> None:
    assert clean(text) == expected


def test_words_are_divided_as_clip_divides_them() -> None:
    assert list(split_words("it's 42nd!?'s \"we'llx\"")) == [
        "it",
        "'s",
        "4",
        "2",
        "nd",
        "!?'",
        "s",
        '"',
        "we",
        "'ll",
        "x",
        '"',
    ]


def test_a_vocabulary_may_be_uncompressed(vocabulary: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_bytes(gzip.decompress(vocabulary.read_bytes()).replace(b"\n", b"\r\n"))
    assert read_merges(plain, MERGES) == read_merges(vocabulary, MERGES)


def test_only_as_many_pairs_are_read_as_the_encoder_has(vocabulary: Path) -> None:
    assert read_merges(vocabulary, 3) == read_merges(vocabulary, MERGES)[:3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"comment\na b\nc d\n", "has 2 pairs, but the text encoder needs 3|line 4 is ''"),
        (b"comment\na b\nabc\nc d\n", "line 3 is 'abc', not two symbols"),
        (b"comment\na b\na b c\nc d\n", "line 3 is 'a b c'"),
        (b"\xff\xfe\x00", "not a vocabulary of CLIP: .*utf-8"),
        (gzip.compress(b"comment\na b\n" * 100, mtime=0)[:30], "not a vocabulary of CLIP"),
        (b"x" * ((16 << 20) + 1), "more than 16 MiB"),
        (b"", "has 0 pairs"),
    ],
)
def test_a_wrong_vocabulary_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "vocabulary.txt.gz"
    path.write_bytes(content)
    with pytest.raises(VocabularyError, match=message):
        read_merges(path, 3)
