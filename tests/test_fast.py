"""Tokenizers of other models in data directories: python -m pytest tests/test_fast.py (needs the package tokenizers)"""

import json
import re
import sys

import numpy as np
import pytest

from data import fast, shards, tokenizer
from data.prepare import main

tokenizers = pytest.importorskip("tokenizers")
TEXTS = [
    "def f(x):\n    return x + 1\n",
    "  two spaces, naïve 漢字 \U0001f9ea",
    "1987 <s> and </s> are words here, <|endoftext|> too",
    "a\u00a0b ﬁne ½",
    "the goose in the river " * 30,
]


def byte_level(vocab_size=400):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    return made, {"eos_token": "<|endoftext|>", "add_bos_token": False}, []


def metaspace():
    """As Llama and Mixtral: a space in front, bytes for unknown letters, <s> before a text."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁theginsrvoad", "▁t", "he", "▁the", "in"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n")]
    vocab = {word: i for i, word in enumerate(words)}
    model = tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    put, spell = tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")
    made.normalizer = tokenizers.normalizers.Sequence([put, spell])
    d = tokenizers.decoders
    made.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made, {"eos_token": {"content": "</s>"}}, [1]


def unigram():
    """As SentencePiece's: log-probabilities, NFKC, metaspace."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁the", -3.0), ("goose", -4.0)]
    letters = sorted(set("".join(TEXTS) + "fi12⁄") - set(" \u00a0ﬁ½\n"))
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([*pieces, *((c, -6.0) for c in letters)], 0))
    made.normalizer = tokenizers.normalizers.NFKC()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.add_special_tokens(["<s>", "</s>"])
    return made, {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}, [1]


def folder(path, kind):
    made, settings, begin = kind()
    path.mkdir()
    made.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    made.encode_special_tokens = True
    return made, made.token_to_id("</s>") or made.token_to_id("<|endoftext|>"), begin


@pytest.mark.parametrize("kind", [byte_level, metaspace, unigram])
def test_documents_are_as_the_library_writes_them(tmp_path, kind):
    made, eos, begin = folder(tmp_path / "hf", kind)
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    flags = [str(tmp_path / "x.jsonl"), f"--out={tmp_path / 'd'}", "--val_fraction=0"]
    main([*flags, f"--tokenizer={tmp_path / 'hf'}"])
    encode = lambda text: made.encode(text, add_special_tokens=False).ids
    if kind is unigram:  # which knows special tokens as words of its vocabulary
        assert eos in encode("</s>")
        whole, encode = encode, lambda text: [t for part in re.split("(?<=<)(?=/?s>)", text) for t in whole(part)]
    expected = [token for text in TEXTS for token in [*begin, *encode(text), eos]]
    assert expected.count(eos) == len(TEXTS)
    assert np.concatenate(shards.open_shards(tmp_path / "d", "train")).tolist() == expected
    split = shards.read_meta(tmp_path / "d")["splits"]["train"]
    assert (split["documents"], split["bytes"]) == (5, sum(len(text.encode()) for text in TEXTS))

    enc = tokenizer.load(tmp_path / "d")  # nothing of the folder is needed any more
    tokens = tokenizer.tiktoken_tokens(enc)
    assert (tokens.bos, tokens.eos, tokens.n_vocab) == (begin, [eos], made.get_vocab_size())
    if kind is not unigram:  # which changes the letters, and the length of white space
        for text in TEXTS[::2]:
            start, whole = tokens.encode("x\n"), tokens.encode("x\n" + text)
            assert whole[: len(start)] == start and tokens.decode(whole[len(start) :]) == text
    main([flags[0], flags[2], f"--out={tmp_path / 'e'}", f"--tokenizer={tmp_path / 'd'}"])
    assert np.concatenate(shards.open_shards(tmp_path / "e", "train")).tolist() == expected
    assert shards.read_meta(tmp_path / "d")["vocab_size"] == made.get_vocab_size()


def test_large_vocabularies_take_four_bytes(tmp_path):
    vocab = {f"w{i}": i for i in range(70_000)} | {"</s>": 70_000}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": [70000, 5]}')
    (tmp_path / "x.txt").write_text("w69999 w65536 w3")
    main([str(tmp_path / "x.txt"), f"--out={tmp_path / 'd'}", f"--tokenizer={tmp_path}", "--val_fraction=0"])
    assert shards.read_meta(tmp_path / "d")["dtype"] == "uint32"
    assert shards.open_shards(tmp_path / "d", "train")[0].tolist() == [69999, 65536, 3, 70000]


def test_bad_folders_are_named(tmp_path):
    folder(tmp_path / "hf", metaspace)
    path, settings = tmp_path / "hf" / "tokenizer.json", tmp_path / "hf" / "tokenizer_config.json"
    whole = path.read_text()
    for content in ("{", "[" * 10**5, json.dumps(json.loads(whole) | {"model": {"type": "none"}})):
        path.write_text(content)
        with pytest.raises(ValueError, match="tokenizer.json is damaged"):
            tokenizer.load(tmp_path / "hf")
    path.write_text(whole)
    for content, message in (
        ("{}", "neither eos_token in tokenizer_config.json nor eos_token_id"),
        ('{"eos_token": "<eot>"}', "neither eos_token"),
        ("{", "tokenizer_config.json is damaged"),
    ):
        settings.write_text(content)
        with pytest.raises(ValueError, match=message):
            tokenizer.load(tmp_path / "hf")
    settings.unlink()
    (tmp_path / "hf" / "config.json").write_text('{"eos_token_id": 9999}')
    with pytest.raises(ValueError, match="no tokens have the ids .* and 9999"):
        tokenizer.load(tmp_path / "hf")


def test_without_the_library_the_remedy_is_named(tmp_path, monkeypatch):
    folder(tmp_path / "hf", byte_level)
    with shards.ShardWriter(tmp_path / "d", fast.from_folder(tmp_path / "hf")) as writer:
        writer.add("train", [5, 0], n_bytes=1)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for name in ("hf", "d"):
        with pytest.raises(ValueError, match=r"^the package tokenizers is not installed: pip install -e '.\[hf\]'"):
            tokenizer.load(tmp_path / name)


def test_damage_in_a_data_directory_is_found(tmp_path):
    folder(tmp_path / "hf", byte_level)
    with shards.ShardWriter(tmp_path / "d", fast.from_folder(tmp_path / "hf")) as writer:
        writer.add("train", [5, 0], n_bytes=1)
    path = tmp_path / "d" / tokenizer.FILE
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for at in rng.choice(len(content), 100, replace=False):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ValueError, match="tokenizer.json is corrupt"):
            tokenizer.load(tmp_path / "d")
    (tmp_path / "d" / tokenizer.META).unlink()  # its own checksum holds too
    with pytest.raises(ValueError, match="tokenizer.json is damaged"):
        tokenizer.load(tmp_path / "d")
