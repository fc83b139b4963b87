"""Tokenizers of Hugging Face folders, read and written. Run: python -m pytest tests/test_hf_tokens.py (CPU)"""

import json
import re
from pathlib import Path

import pytest
import tiktoken

tokenizers = pytest.importorskip("tokenizers")

from data import fast, files, prepare, shards, tokenizer  # noqa: E402
from eval.taskloss import encode_pair  # noqa: E402
from optimoe import hf  # noqa: E402


@pytest.mark.parametrize(
    "settings, template, bos",
    [
        ({}, True, [1]),
        ({}, False, []),
        ({"add_bos_token": False, "bos_token": "<s>"}, True, []),
        ({"add_bos_token": True, "bos_token": {"content": "<s>"}}, False, [1]),
    ],
)
def test_their_tokenizer(settings, template, bos, tmp_path):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{chr(c): c - 29 for c in range(32, 127)}}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>"))
    library.decoder = tokenizers.decoders.Fuse()
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    if template:
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2, "vocab_size": 128}))
    tokens = hf.load_tokens(tmp_path)
    assert (tokens.bos, tokens.eos, tokens.n_vocab) == (bos, [2], 98)
    assert tokens.encode("a b") == [68, 3, 69] and tokens.decode([68, 3, 69, 2]) == "a b"


@pytest.mark.parametrize("dummy", ["always", "never"])
def test_sentencepiece_keeps_every_space(dummy, tmp_path):
    """Llama's and Mixtral's kind of tokenizer puts a space in front of a text and drops it in decoding. A continuation
    begins with its own."""
    merges = [("▁", "▁"), ("▁▁", "▁▁"), ("▁", "x")]
    vocab = {
        word: i
        for i, word in enumerate(["<unk>", "<s>", "▁", "▁▁", "▁▁▁▁", "▁x", *"\nabcdefghijklmnopqrstuvwxyz():+1"])
    }
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token="<unk>"))
    put = [tokenizers.normalizers.Prepend("▁")] if dummy == "always" else []
    drop = [tokenizers.decoders.Strip(" ", 1, 0)] if dummy == "always" else []
    library.normalizer = tokenizers.normalizers.Sequence([*put, tokenizers.normalizers.Replace(" ", "▁")])
    library.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Fuse(), *drop]
    )
    library.enable_truncation(8)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": len(vocab), "eos_token_id": 0}))
    tokens = hf.load_tokens(tmp_path)
    prompt, body = "def f(x):\n", "    return x + 1\n    x\n"
    whole = tokens.encode(prompt + body)
    assert tokens.decode(whole[len(tokens.encode(prompt)) :]) == body  # also: not cut at 8 tokens
    for text, cut in ((prompt + body, i) for i in range(1, len(prompt + body))):
        context, answer, _ = encode_pair(tokens, text[:cut], text[cut:])
        spelled = "".join(library.id_to_token(i) for i in [*context, *answer]).replace("▁", " ")
        assert spelled == (" " if dummy == "always" else "") + text and tokens.decode(answer) == text[cut:]
    assert encode_pair(tokens, "a ", "x")[2]  # merges


def test_a_tokenizer_of_another_model(tmp_path):
    enc = tokenizer.train_bpe(["tick tock " * 9], 260)
    hf.save_tokens(enc, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 200}))
    message = r"vocab_size=200: .*tokenizer.json has token 2\d\d: it is of another model"
    with pytest.raises(ValueError, match=message):
        hf.load_tokens(tmp_path).encode("tick tock")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is damaged"):
        hf.load_tokens(tmp_path)


SPELLED = ["<|endoftext|>", "a<|endoftext|> b", "<|fim_prefix|>", "<|endoftext|><|endoftext|>", "< |endoftext|>"]
SPELLED += ["<|end"]


@pytest.mark.parametrize("special", [{}, {"<|fim_prefix|>": 1000}], ids=["end of text", "gaps and others"])
def test_text_that_spells_a_special_token_is_ordinary_as_in_the_run(special, tmp_path):
    """Item by item, the exported tokenizer gives what the run's gives, and so does transformers with that folder."""
    ranks = tokenizer.train_bpe([" ".join(SPELLED) * 20], 300)._mergeable_ranks
    end = len(ranks) + 7 * bool(special)
    enc = tiktoken.Encoding(
        "x", pat_str=tokenizer.PATTERN, mergeable_ranks=ranks, special_tokens={tokenizer.EOT: end, **special}
    )
    hf.save_tokens(enc, tmp_path)
    ours, run = hf.load_tokens(tmp_path), tokenizer.tiktoken_tokens(enc)
    assert (ours.bos, ours.n_vocab) == (run.bos, run.n_vocab) == ([end], 1 + max([end, *special.values()]))
    for text in SPELLED:
        assert ours.encode(text) == run.encode(text) and end not in ours.encode(text), text
        assert ours.decode(ours.encode(text)) == text
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["split_special_tokens"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert hf.load_tokens(tmp_path).encode(SPELLED[0]) == [end]  # other people's folders keep their rule
    hf.save_tokens(enc, tmp_path)
    transformers = pytest.importorskip("transformers", minversion="5")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs.encode(text, add_special_tokens=False) for text in SPELLED] == list(map(ours.encode, SPELLED))


def test_the_vocabulary_ends_at_the_highest_id(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 40}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert hf.load_tokens(tmp_path).n_vocab == 41  # of two entries
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0, "vocab_size": 30}))
    assert hf.load_tokens(tmp_path).n_vocab == 30
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a"}))
    for eos in ("a", 30, -1, [], [0, 1.0]):
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": eos, "vocab_size": 30}))
        with pytest.raises(ValueError, match=re.escape(f"eos_token_id={eos!r}: ")):
            hf.load_tokens(tmp_path)


def test_an_exported_tokenizer_is_the_same(tmp_path):
    text = (Path(__file__).read_text() + "Größe 東京 1234.5  \n\n\t x\u00a0y 'LL we'll") * 2
    enc = tokenizer.train_bpe([text], 700)
    hf.save_tokens(enc, tmp_path)
    tokens = hf.load_tokens(tmp_path)
    assert tokens.encode(text) == enc.encode_ordinary(text) and tokens.decode(tokens.encode(text)) == text
    assert tokens.bos == [enc.eot_token] and tokens.n_vocab == enc.n_vocab


def test_a_tokenizer_of_another_model_is_exported_too(tmp_path):
    """A run on data prepared with one: the same ids and texts, the same begin and end."""
    vocab = {"<s>": 0, "</s>": 1, **{chr(c): c - 30 for c in range(32, 127)}}
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    theirs.decoder = tokenizers.decoders.Fuse()
    theirs.add_special_tokens(["<s>", "</s>"])
    for begin in ([0], []):
        enc = fast.Fast(theirs.to_str(), begin, 1, "theirs")
        hf.save_tokens(enc, tmp_path)
        tokens, run = hf.load_tokens(tmp_path), tokenizer.tiktoken_tokens(enc)
        assert (tokens.bos, tokens.eos, tokens.n_vocab) == (begin, [1], run.n_vocab)
        text = "a </s> b"
        assert tokens.encode(text) == run.encode(text) and tokens.decode(tokens.encode(text)) == text


def test_all_ends_of_an_answer_are_kept_with_the_data(tmp_path):
    """A list in generation_config.json: the same ends for the model, for data in its tokens, and for data after it."""
    vocab = {"<s>": 0, "</s>": 1, "<turn>": 2, "<call>": 3, **{chr(c): c - 28 for c in range(32, 127)}}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    library.decoder = tokenizers.decoders.Fuse()
    library.add_special_tokens(["<s>", "</s>", "<turn>", "<call>"])
    (model := tmp_path / "model").mkdir()
    library.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (model / "config.json").write_text(json.dumps({"eos_token_id": 1, "vocab_size": 128}))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 2, 1]}))
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": f"a {i}"}) + "\n" for i in range(9)))
    flags = [str(tmp_path / "x.jsonl"), "--val_fraction=0"]
    prepare.main([*flags, f"--tokenizer={model}", f"--out={tmp_path / 'first'}"])
    prepare.main([*flags, f"--tokenizer={tmp_path / 'first'}", f"--out={tmp_path / 'second'}"])
    found = [tokenizer.tiktoken_tokens(tokenizer.load(tmp_path / name)).eos for name in ("model", "first", "second")]
    assert [hf.load_tokens(model).eos[0], *(ends[0] for ends in found)] == [1] * 4
    assert [set(ends) for ends in (*found, hf.load_tokens(model).eos)] == [{1, 2, 3}] * 4
    digests = {shards.read_meta(tmp_path / name)["tokenizer_sha256"] for name in ("first", "second")}
    meta = shards.read_meta(tmp_path / "first")
    del meta["ends"]  # as in old directories
    files.write_json(tmp_path / "first/meta.json", meta)
    assert tokenizer.tiktoken_tokens(tokenizer.load(tmp_path / "first")).eos == [1] and len(digests) == 1
