"""Tokenizers: a byte-level BPE trained on the data, word lists, and those of other models.

The first two are a `tiktoken.Encoding` with the special token "<|endoftext|>", the last a `data.fast.Fast`.

    enc = train_bpe(texts, vocab_size=16384)  # iterable of str
    save(enc, "data/books"); enc = load("data/books")
    enc.encode_ordinary("48/2"), enc.eot_token
"""

import base64
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

from data import fast, files
from data.fast import Fast, from_folder, package

EOT = "<|endoftext|>"
FILE, META = "tokenizer.json", "meta.json"
AGAIN = "prepare the data again"

# BPE never merges across these pieces: contractions; words with the one character before them (a space, "(", "_");
# single digits, so that arithmetic sees place values; punctuation with the line end after it; line ends; indentation,
# without its last space. White space is bounded because the engine backtracks over it.
PATTERN = (
    r"'(?i:s|t|d|m|ll|ve|re)(?!\p{L})"
    r"|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|[^\S\r\n]{0,64}[\r\n]+"
    r"|[^\S\r\n]{1,64}(?=[^\S\r\n])"
    r"|\s"
)
BYTES = [bytes([b]) for b in range(256)]


def encoding(tokens, pattern=PATTERN, name="optimoe"):
    """An encoding of n different tokens (bytes) with ids 0..n-1; a lower id merges first. "<|endoftext|>" gets id n."""
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


def train_bpe(texts, vocab_size):
    """Byte-pair encoding trained on `texts`, with `vocab_size` tokens (fewer where the text has too few pairs): 256
    bytes, the merges and "<|endoftext|>". The order of the texts does not matter. ValueError without the package
    `tokenizers`."""
    lib = package()
    splits = lib.pre_tokenizers.Split(lib.Regex(PATTERN), "isolated")
    short = lib.pre_tokenizers.Split(lib.Regex("(?m:.{1,1000})"), "isolated")  # a longer piece takes quadratic time
    spelling = lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = lib.Tokenizer(lib.models.BPE())
    bpe.pre_tokenizer = lib.pre_tokenizers.Sequence([splits, short, spelling])
    alphabet = dict(vocab_size=vocab_size - 1, initial_alphabet=spelling.alphabet())
    bpe.train_from_iterator(texts, lib.trainers.BpeTrainer(show_progress=False, **alphabet))
    byte_of, vocab = {letter: byte for byte, letter in enumerate(letters())}, bpe.get_vocab()
    return encoding(BYTES + [bytes(byte_of[letter] for letter in word) for word in sorted(vocab, key=vocab.get)])


def letters():
    """GPT-2's letter for each byte: printable bytes are themselves, the others the characters from 256 on."""
    printable, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def word_tokenizer(words, pattern=PATTERN):
    """256 bytes and the given words, each one token with its leading space (" Alice"); other text becomes bytes.
    ValueError for a word that is not one piece of `pattern`."""
    words = [word for word in words if word]
    enc = encoding(BYTES + [word.encode() for word in words], pattern, "words")
    for word in words:
        if len(ids := enc.encode_ordinary(word)) != 1:
            raise ValueError(f"words: {word!r} takes {len(ids)} tokens; give what the pattern splits off")
    return enc


def save(enc, directory):
    """Write directory/tokenizer.json: everything that `load` needs."""
    if isinstance(enc, Fast):
        kept = {"name": enc.name, "begin": enc.begin, "eos": enc.eot_token, "tokenizers": enc.definition}
    else:
        tokens = [None] * (1 + max(enc._mergeable_ranks.values()))  # None: an unused id
        for token, rank in enc._mergeable_ranks.items():
            tokens[rank] = base64.b64encode(token).decode()
        kept = {"name": enc.name, "pattern": enc._pat_str, "special_tokens": enc._special_tokens, "tokens": tokens}
    path = Path(directory) / FILE
    files.write_json(path, kept)
    return path


def digest(directory):
    """The SHA-256 of a directory's tokenizer file, as in its meta.json."""
    return hashlib.sha256(Path(directory, FILE).read_bytes()).hexdigest()


def load(directory):
    """The tokenizer of a data directory or a Hugging Face folder. ValueError naming a missing or damaged file."""
    path = Path(directory) / FILE
    if not path.exists():
        remedy = "name a data directory, or a model's folder with this file, which transformers' save_pretrained writes"
        raise ValueError(f"{path} does not exist; {remedy}")
    content, meta = path.read_bytes(), path.with_name(META)
    again, noted = (AGAIN, files.read_json(meta, AGAIN)) if meta.exists() else (fast.AGAIN, {})
    if meta.exists() and noted.get("tokenizer_sha256") != hashlib.sha256(content).hexdigest():
        raise ValueError(f"{path} is corrupt (SHA-256 differs from {META}); {AGAIN}")
    kept = files.check(files.parse(content, str(path), again), str(path), again)
    if "model" in kept and "tokens" not in kept:
        return from_folder(directory)
    if "tokenizers" in kept:
        package()  # if it is absent, the file is not damaged
    try:
        if "tokenizers" in kept:
            return Fast(kept["tokenizers"], kept["begin"], kept["eos"], kept["name"], noted.get("ends", ()))
        return _encoding(kept)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); {again}") from error


def _encoding(kept):
    tokens = [token if token is None else base64.b64decode(token, validate=True) for token in kept["tokens"]]
    ranks = {token: rank for rank, token in enumerate(tokens) if token is not None}
    special = kept["special_tokens"]
    ids = {*ranks.values(), *special.values()}
    if len(ranks) + tokens.count(None) != len(tokens) or len(ids) != len(ranks) + len(special):
        raise ValueError("repeated tokens")
    if EOT not in special or not ranks.keys() >= set(BYTES):
        raise ValueError(f"without {EOT}, or without a token for each byte")
    return tiktoken.Encoding(kept["name"], pat_str=kept["pattern"], mergeable_ranks=ranks, special_tokens=special)


def documents(enc, texts):
    """[(ids with eos at the end, number of bytes)] of the texts. An "<|endoftext|>" inside a text is just text."""
    if isinstance(enc, Fast):
        begin = enc.begin if enc.begin != [enc.eot_token] else []  # the last document's eos serves
        found = [np.array([*begin, *ids, enc.eot_token], np.uint32) for ids in enc.encode_ordinary_batch(texts)]
    else:
        end = np.uint32(enc.eot_token)
        found = [np.append(enc.encode_to_numpy(text, disallowed_special=()), end) for text in texts]
    return [(ids, len(text.encode())) for ids, text in zip(found, texts, strict=True)]


class Tokens(NamedTuple):
    """What evaluation needs of a tokenizer."""

    encode: Callable[[str], list[int]]  # without special tokens
    decode: Callable[[list[int]], str]  # of a continuation: leading spaces stay
    bos: list[int]  # starts every prompt
    eos: list[int]  # any of these ends a generation
    n_vocab: int  # ids from here on are padding of the model's head

    def ending(self, ends):
        """The same, where these ids end a generation too."""
        return self._replace(eos=list(dict.fromkeys([*self.eos, *ends])))


def tiktoken_tokens(enc):
    """The Tokens of a data directory. Prompts begin as documents do in training: with `begin`, or else after eos."""
    if isinstance(enc, Fast):
        return Tokens(enc.encode_ordinary, enc.decode, enc.begin, [enc.eot_token, *enc.ends], enc.n_vocab)
    known = functools.cache(lambda: {*enc._mergeable_ranks.values(), *enc._special_tokens.values()})
    # An untrained model may write an unused id (cl100k_base has 16).
    decode = lambda ids: enc.decode([*filter(known().__contains__, ids)])
    return Tokens(enc.encode_ordinary, decode, [enc.eot_token], [enc.eot_token], enc.n_vocab)


def context_ids(tokens: Tokens, prompt: str) -> list[int]:
    """bos and the ids of a prompt. An empty prompt without bos becomes an end-of-text token, as in lm-eval."""
    ids = tokens.bos + tokens.encode(prompt)
    if not ids and not tokens.eos:
        raise ValueError("a prompt is empty, and the tokenizer has no token to start it with (neither bos nor eos)")
    return ids or tokens.eos[:1]
