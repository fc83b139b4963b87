"""Tokenizers: a byte-level BPE trained here in seconds, fixed word lists, and named tiktoken encodings.

All of them are a `tiktoken.Encoding` with the special token "<|endoftext|>" after the ordinary tokens, and are kept beside
the data as one JSON file, so that nothing is downloaded to read a data directory.

    enc = train_bpe(texts, vocab_size=16384)      # iterable of str
    save(enc, "data/books"); enc = load("data/books")
    enc.encode_ordinary("48/2"), enc.eot_token
"""

import base64
import hashlib
import heapq
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex  # comes with tiktoken, and reads the same patterns
import tiktoken

EOT = "<|endoftext|>"
FILE = "tokenizer.json"

# Pieces that BPE never merges across: contractions; words with the one character before them (a space, "(", "_"); single
# digits, so that arithmetic sees place values; punctuation with the line end after it; line ends; indentation, which leaves its
# last space to the word that follows. White space is bounded because the engine backtracks over it; bounding letters
# too would halve the speed.
PATTERN = "|".join(
    [
        r"'(?i:s|t|d|m|ll|ve|re)(?!\p{L})",
        r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        r"[^\S\r\n]{0,64}[\r\n]+",
        r"[^\S\r\n]{1,64}(?=[^\S\r\n])",
        r"\s",
    ]
)


def encoding(ranks: dict[bytes, int], pattern: str = PATTERN, name: str = "optimoe") -> tiktoken.Encoding:
    """Wraps token bytes -> id (ids 0..n-1, lower id = earlier merge); "<|endoftext|>" becomes id n."""
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


# ---- training


def count_pieces(texts: Iterable[str], counts: Counter | None = None) -> Counter:
    """Occurrences of each pre-token of PATTERN; adds to `counts` if given."""
    counts = Counter() if counts is None else counts
    split = regex.compile(PATTERN).findall
    for text in texts:
        counts.update(split(text, concurrent=True))  # concurrent: releases the GIL
    return counts


def train_bpe(texts: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    """Byte-pair encoding trained on `texts`, with `vocab_size` tokens: 256 bytes, the merges and "<|endoftext|>".

    The vocabulary is smaller when the text has too few different pairs. Deterministic, whatever the order of the texts.
    Raises ValueError when vocab_size < 257.
    """
    return bpe_from_counts(count_pieces(texts), vocab_size)


def bpe_from_counts(counts: Counter, vocab_size: int) -> tiktoken.Encoding:
    """`train_bpe` from piece -> occurrences. Time grows with the number of different pieces, not with the text."""
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size}: must be at least 257 (256 bytes and {EOT})")
    tokens = [bytes([b]) for b in range(256)]
    for a, b in _merges(counts, vocab_size - 257):
        tokens.append(tokens[a] + tokens[b])
    return encoding({token: rank for rank, token in enumerate(dict.fromkeys(tokens))})


def _merges(counts: Counter, n_merges: int):
    """Yields the merges (left id, right id) in order; the i-th makes token 256 + i.

    All different pieces lie in one array of token ids, doubly linked over the places that merges vacate. A merge
    handles all its places at once in numpy. Its cost is kept low by one fact: after a pair of tokens first appears (when
    the later of the two is made) it only ever disappears, so places and counts are recorded once and only decrease.
    """
    words = sorted((word.encode(), n) for word, n in counts.items() if len(word.encode()) > 1)
    if not words or n_merges <= 0:
        return
    lengths = np.array([len(word) + 1 for word, _ in words])  # each word is followed by one end mark, id -1
    ids = np.full(lengths.sum() + 1, -1, np.int64)  # and a mark at the very front
    is_mark = np.zeros(len(ids), bool)
    is_mark[0] = is_mark[np.cumsum(lengths)] = True
    ids[~is_mark] = np.frombuffer(b"".join(word for word, _ in words), np.uint8)
    weight = np.concatenate([[0], np.repeat([n for _, n in words], lengths)])
    before, after = np.arange(-1, len(ids) - 1), np.arange(1, len(ids) + 1)
    base = 256 + n_merges  # a pair (a, b) is the number a * base + b

    places, total, heap = {}, {}, []

    def tally(
        at,
    ):  # -> the places sorted by the pair that starts there, where each pair begins among them, pairs, counts
        at = at[(ids[at] >= 0) & (ids[after[at]] >= 0)]
        pairs = ids[at] * base + ids[after[at]]
        order = np.argsort(pairs, kind="stable")
        at, pairs = at[order], pairs[order]
        begin = np.flatnonzero(np.append(True, pairs[1:] != pairs[:-1])) if len(at) else order
        counts = np.add.reduceat(weight[at], begin) if len(at) else order
        return at, begin.tolist(), pairs[begin].tolist(), counts.tolist()

    def appear(at):
        at, begin, pairs, counts = tally(at)
        for i, j, pair, n in zip(begin, begin[1:] + [len(at)], pairs, counts):
            places[pair], total[pair] = at[i:j], n
            heapq.heappush(heap, (-n, pair))

    appear(np.flatnonzero(~is_mark))
    for new in range(256, base):
        while heap and -heap[0][0] != (
            n := total.get(heap[0][1], 0)
        ):  # the heap's counts may be out of date, never too low
            pair = heapq.heappop(heap)[1]
            if n:
                heapq.heappush(heap, (-n, pair))
        if not heap:
            return
        pair = heapq.heappop(heap)[1]
        a, b = divmod(pair, base)
        yield a, b

        left = places.pop(pair)
        left = left[(ids[left] == a) & (ids[after[left]] == b)]  # ascending, as all lists of places here
        if (
            a == b
        ):  # in a run "aaaa" merge 1st+2nd, 3rd+4th: keep the places at even distance from the start of their run
            is_start = np.append(True, after[left[:-1]] != left[1:])
            run_start = np.flatnonzero(is_start)[np.cumsum(is_start) - 1]
            left = left[(np.arange(len(left)) - run_start) % 2 == 0]
        right = after[left]
        alone = np.append(True, before[left[1:]] != right[:-1])  # not directly after another of these places
        _, _, others, counts = tally(
            np.concatenate([before[left[alone]], right])
        )  # the neighbouring pairs that end here
        for other, n in zip(others, counts):
            total[other] -= n
        del total[pair]
        ids[left], ids[right] = new, -1
        after[left] = after[right]
        before[after[left]] = left
        appear(np.concatenate([before[left[alone]], left]))


# ---- given vocabularies


def word_tokenizer(words: Iterable[str], pattern: str = PATTERN) -> tiktoken.Encoding:
    """256 bytes and the given pieces, each encoded as one token; any other text falls back to pieces and bytes.

    A piece includes its leading space (" Alice") and must be what `pattern` splits off: otherwise ValueError.
    """
    ranks = {bytes([b]): b for b in range(256)}
    for word in dict.fromkeys(words):
        if word and regex.findall(pattern, word) != [word]:
            raise ValueError(
                f"words: {word!r} is split by the pattern into {regex.findall(pattern, word)}; give one piece a word"
            )
        if word:
            ranks.setdefault(word.encode(), len(ranks))
    return encoding(ranks, pattern, "words")


def named(name: str) -> tiktoken.Encoding:
    """A tiktoken encoding ("cl100k_base", "o200k_base", "r50k_base", "p50k_base") whose file is on this machine.

    Never downloads: tiktoken's cache is looked at first, ValueError says how to fill it.
    """
    known = ("r50k_base", "p50k_base", "cl100k_base", "o200k_base")
    if name not in known:
        raise ValueError(f"tokenizer={name!r}: neither a directory with {FILE} nor one of {', '.join(known)}")
    cache = Path(
        os.environ.get("TIKTOKEN_CACHE_DIR")
        or os.environ.get("DATA_GYM_CACHE_DIR")
        or Path(tempfile.gettempdir()) / "data-gym-cache"
    )
    url = f"https://openaipublic.blob.core.windows.net/encodings/{name}.tiktoken"
    path = cache / hashlib.sha1(url.encode()).hexdigest()  # tiktoken's own name for it
    if not path.exists():
        raise ValueError(
            f"tokenizer={name!r}: its file {path} is missing. With a network, run once: "
            f"TIKTOKEN_CACHE_DIR={cache} python -c \"import tiktoken; tiktoken.get_encoding('{name}')\""
        )
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(cache))
    return tiktoken.get_encoding(name)


# ---- files


def save(enc: tiktoken.Encoding, directory: str | Path) -> Path:
    """Writes directory/tokenizer.json: everything `load` needs, named encodings too."""
    tokens = sorted(enc._mergeable_ranks, key=enc._mergeable_ranks.get)
    assert [enc._mergeable_ranks[t] for t in tokens] == list(range(len(tokens))), "ids of ordinary tokens have gaps"
    path = Path(directory) / FILE
    path.write_text(
        json.dumps(
            {
                "name": enc.name,
                "pattern": enc._pat_str,
                "special_tokens": enc._special_tokens,
                "tokens": [base64.b64encode(t).decode() for t in tokens],  # in order of id
            },
            indent=0,
        )
    )
    return path


def load(directory: str | Path) -> tiktoken.Encoding:
    """Reads directory/tokenizer.json. Raises ValueError naming the file when it is missing or damaged."""
    path = Path(directory) / FILE
    if not path.exists():
        raise ValueError(
            f"{path} does not exist; a tokenizer directory is one that data.prepare or tokenizer.save wrote"
        )
    try:
        d = json.loads(path.read_text())
        ranks = {base64.b64decode(t): i for i, t in enumerate(d["tokens"])}
        enc = tiktoken.Encoding(
            d["name"], pat_str=d["pattern"], mergeable_ranks=ranks, special_tokens=d["special_tokens"]
        )
        if len(ranks) != len(d["tokens"]) or EOT not in d["special_tokens"]:
            raise ValueError("repeated tokens, or no " + EOT)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); write it again") from error
    return enc


def token_bytes(enc: tiktoken.Encoding) -> np.ndarray:
    """(n_vocab,) int64: UTF-8 bytes of each token, 0 for special tokens. Sum over the ids of a text = bytes of the text."""
    sizes = np.zeros(enc.n_vocab, np.int64)
    for token, rank in enc._mergeable_ranks.items():
        sizes[rank] = len(token)
    return sizes


class Tokens(NamedTuple):
    """What evaluation needs of a tokenizer."""

    encode: Callable[[str], list[int]]  # without special tokens
    decode: Callable[[list[int]], str]  # of what follows other tokens: leading spaces stay
    bos: list[int]  # starts every prompt
    eos: list[int]  # any of these ends a generation
    n_vocab: int  # ids from here on are padding rows of the model's head


def tiktoken_tokens(enc) -> Tokens:
    """Of a data directory (data.tokenizer): documents follow an end-of-text token there, so prompts do too."""
    return Tokens(enc.encode_ordinary, enc.decode, [enc.eot_token], [enc.eot_token], enc.n_vocab)
