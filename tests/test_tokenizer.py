import importlib.util
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiktoken

from data import files, shards, tokenizer

NEEDS_LIBRARY = pytest.mark.skipif(not importlib.util.find_spec("tokenizers"), reason="needs the package tokenizers")

TEXTS = [
    "It's 1987, and the 48/2 = 24 geese weren't flying; naïve façade, “quoted”."
    "\n\n    def f(x):\n\treturn x**2  # ok\r\n",
    "हिन्दी में परीक्षा, 漢字かな交じり文, \U0001f9ea emoji, tab\t\ttab, nbsp\u00a0x, \u2028 line, ſ 'S",
    "   leading and trailing   ",
    "\n",
    "",
    "a",
    " ",
    "\0\1",
    "<|endoftext|> is text here",
]


def gapped():
    """Ids 257 to 279 and 281 to 299 mean nothing, and the end of a document is in the middle."""
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256, b" a": 300}
    return tiktoken.Encoding(
        "gaps", pat_str=tokenizer.PATTERN, mergeable_ranks=ranks, special_tokens={tokenizer.EOT: 280}
    )


def plain_bpe(counts, n_merges):
    """The definition of BPE, one merge a pass: the most frequent pair, the lower pair of ids if equal."""
    words = [([bytes([b]) for b in word.encode()], n) for word, n in counts.items()]
    ids = {bytes([b]): b for b in range(256)}
    while len(ids) < 256 + n_merges:
        pairs = Counter()
        for word, n in words:
            for a, b in zip(word, word[1:], strict=False):
                pairs[ids[a], ids[b]] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        a, b = (token for i in best for token in ids if ids[token] == i)
        for word, _ in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (a, b):
                    word[i : i + 2] = [a + b]
                i += 1
        ids[a + b] = len(ids)
    return ids


@NEEDS_LIBRARY
def test_training_is_exactly_bpe():
    rng = random.Random(0)
    train = lambda counts, size: tokenizer.train_bpe("\n".join(counts.elements()).split(" "), size)
    for trial in range(60):  # two or three letters: long runs and overlapping merges, where shortcuts go wrong
        counts = Counter(
            "".join(rng.choices("abc"[: 2 + trial % 2], k=rng.randint(1, 12))) for _ in range(rng.randint(1, 30))
        )
        n_merges = rng.randint(1, 40)
        assert train(counts, 257 + n_merges)._mergeable_ranks == plain_bpe(counts, n_merges)
    counts.update({"cb": 1000})
    assert train(counts, 260)._mergeable_ranks != plain_bpe(Counter(["ab", "ab"]), 3), "the comparison compares nothing"
    enc = train(Counter({"the": 10, "then": 5, "hen": 3}), 260)  # he 18; t+he 15, he+n 8; the+n 5
    assert [enc.decode([i]) for i in (256, 257, 258)] == ["he", "the", "then"]


@NEEDS_LIBRARY
def test_any_text_comes_back():
    enc = tokenizer.train_bpe(TEXTS * 3, 400)
    rng = random.Random(1)
    noise = [
        "".join(
            chr(rng.choice([rng.randrange(32, 127), rng.randrange(0xD800), rng.randrange(0x10000, 0x110000)]))
            for _ in range(200)
        )
        for _ in range(50)
    ]
    for text in TEXTS + noise:
        ids = enc.encode_ordinary(text)
        assert enc.decode(ids) == text
        assert enc.eot_token not in ids


@NEEDS_LIBRARY
def test_vocabulary_size_and_determinism():
    texts = [" ".join(random.Random(i).choices(TEXTS[0].split(), k=200)) for i in range(5)]
    enc = tokenizer.train_bpe(texts, 300)
    assert enc.n_vocab == 300 and enc.eot_token == 299
    assert tokenizer.train_bpe(reversed(texts), 300)._mergeable_ranks == enc._mergeable_ranks
    assert tokenizer.train_bpe(["ab"], 16384).n_vocab == 258  # one pair is all there is
    assert tokenizer.train_bpe([], 300).n_vocab == 257
    program = (
        "import hashlib; from data import tokenizer; text = open(tokenizer.__file__).read();"
        "enc = tokenizer.train_bpe([text[i:] for i in range(9)], 900);"
        "print(hashlib.sha256(repr(enc._mergeable_ranks).encode()).hexdigest())"
    )
    run = lambda: subprocess.check_output([sys.executable, "-c", program], cwd=Path(__file__).parents[1])
    assert run() == run() != b""  # other hashes of strings, other threads


def test_without_the_library_training_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"package tokenizers is not installed: pip install -e '.\[hf\]'"):
        tokenizer.train_bpe(["text"], 300)


@NEEDS_LIBRARY
def test_one_digit_per_token():
    enc = tokenizer.train_bpe(["In 1987 there = 1987 and 19871987 = x. "] * 50, 400)
    assert [enc.decode([i]) for i in enc.encode_ordinary("48/2 = 1987")] == "4|8|/|2| =| |1|9|8|7".split("|")
    assert any(len(token) > 3 for token in enc._mergeable_ranks), "nothing was merged, so the digits prove nothing"


@pytest.mark.parametrize("text", [" " * 10**6, "\n" * 10**6, "\t \n" * 300_000, "a" * 10**6, "=" * 10**6, "7" * 10**6])
def test_long_runs_neither_fail_nor_hang(text):
    enc = tokenizer.encoding({bytes([b]): b for b in range(256)})
    assert len(enc.encode_to_numpy(text, disallowed_special=())) == len(text)
    if importlib.util.find_spec("tokenizers"):
        assert tokenizer.train_bpe([text], 270).n_vocab <= 270


def test_save_and_load(tmp_path):
    for enc in (tokenizer.word_tokenizer([" leading", "ſ"]), gapped()):
        path = tokenizer.save(enc, tmp_path)
        again = tokenizer.load(tmp_path)
        assert again.n_vocab == enc.n_vocab and again.eot_token == enc.eot_token
        assert again._mergeable_ranks == enc._mergeable_ranks
        assert all(again.encode_ordinary(t) == enc.encode_ordinary(t) for t in TEXTS)
        assert again.encode("x<|endoftext|>", allowed_special="all")[-1] == enc.eot_token

    content = json.loads(path.read_text())
    del content[files.CRC]
    path.write_text(json.dumps(content))  # as they were before checksums
    assert tokenizer.load(tmp_path)._mergeable_ranks == enc._mergeable_ranks
    tokens = content["tokens"]
    for damage in (
        {"tokens": tokens[:-1] + tokens[:1]},
        {"tokens": tokens[1:]},
        {"tokens": [tokens[0].replace("A", "*")] + tokens[1:]},
        {"tokens": "no list"},
        {"special_tokens": {}},
        {"special_tokens": {tokenizer.EOT: 300}},
        {"pattern": "("},
    ):
        path.write_text(json.dumps(content | damage))
        with pytest.raises(ValueError, match="tokenizer.json is damaged"):
            tokenizer.load(tmp_path)
    path.write_text(json.dumps(files.sign(content) | {"name": "other"}))
    with pytest.raises(ValueError, match="tokenizer.json is damaged: its checksum differs"):
        tokenizer.load(tmp_path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="tokenizer.json is damaged"):
        tokenizer.load(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="does not exist"):
        tokenizer.load(tmp_path)


def test_the_tokenizer_of_other_data_is_refused(tmp_path):
    for name, words in (("a", [" Alice"]), ("b", [" Bob"])):
        with shards.ShardWriter(tmp_path / name, tokenizer.word_tokenizer(words)) as writer:
            writer.add("train", [1, 257])
    assert tokenizer.load(tmp_path / "a").encode_ordinary(" Alice") == [256]
    (tmp_path / "b" / tokenizer.FILE).replace(tmp_path / "a" / tokenizer.FILE)
    with pytest.raises(ValueError, match=f"{tmp_path}/a/tokenizer.json is corrupt .SHA-256 differs from meta.json"):
        tokenizer.load(tmp_path / "a")


def test_ids_with_gaps_keep_their_numbers(tmp_path):
    """Also under `python -O`, which skips assertions."""
    with shards.ShardWriter(tmp_path / "d", gapped()) as writer:
        writer.add("train", gapped().encode_ordinary("ab a") + [280])
    assert shards.open_shards(tmp_path / "d", "train")[0].tolist() == [256, 300, 280]
    assert shards.read_meta(tmp_path / "d")["splits"]["train"]["bytes"] == 4
    program = f"from data import tokenizer; print(tokenizer.load({str(tmp_path / 'd')!r}).encode_ordinary('ab a'))"
    run = subprocess.run([sys.executable, "-O", "-c", program], cwd=Path(__file__).parents[1], capture_output=True)
    assert run.stdout.decode().strip() == "[256, 300]", run.stderr
    tokens = tokenizer.tiktoken_tokens(tokenizer.load(tmp_path / "d"))
    assert tokens.n_vocab == 301 and tokens.eos == [280]
    assert tokens.decode([256, 270, 300, 299]) == "ab a"  # ids that mean nothing write nothing


def test_word_tokenizer():
    words = [" Alice", " Bob", " lives", " in", " Oslo", ".", "\n", " Alice"]
    enc = tokenizer.word_tokenizer(words)
    assert enc.n_vocab == 256 + 5 + 1  # "." and "\n" are bytes already
    ids = enc.encode_ordinary(" Bob lives in Oslo.")
    assert len(ids) == 5 and enc.decode(ids) == " Bob lives in Oslo."
    for text in TEXTS:
        assert enc.decode(enc.encode_ordinary(text)) == text
    with pytest.raises(ValueError, match="New York"):
        tokenizer.word_tokenizer([" New York"])
    with pytest.raises(ValueError, match="17"):
        tokenizer.word_tokenizer([" 17"])
    assert len(tokenizer.word_tokenizer([" 17"], r" ?\d+|\s|\S").encode_ordinary(" 17")) == 1
