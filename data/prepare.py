"""Turns text files into a data directory.

    python -m data.prepare books/*.txt.xz --out datasets/mine --vocab_size 16384
    python -m data.prepare notes.jsonl src/ fineweb/ --out datasets/mine --tokenizer datasets/books

The input is read twice. The first pass finds what to hold out and, unless --tokenizer names a tokenizer, a sample on
which a BPE is trained (by the package `tokenizers`). The second pass encodes in threads.

What a document is (--sft: see data/chat.py):
    .jsonl, .parquet, .arrow: the field --text_field of each row
    .txt, source code, or any other named file: the file, or its pieces of 2^20 characters (fewer if the input is below
    64 MB), which end at line ends
Text and .jsonl may be compressed as .gz, .xz or .zst. A directory is searched for the endings in data/documents.py
(--sft: for rows only), and how many files that leaves out is printed; links to directories are not followed. Byte-order
marks are removed and line ends become "\\n". Parquet, Arrow and .zst need pyarrow.

A document is held out for validation if the hash of its text and --seed is below --val_fraction, or the lowest of all.
So equal documents fall on the same side.
"""

import hashlib
import os
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from data import chat, shards, tokenizer
from data.documents import EXPANSION, KINDS, ROWS, find_files, read
from optimoe import hub
from optimoe.config import command_line, make_directory, parse, require

SAMPLE = 32e6  # approximate bytes of text that the tokenizer is trained on
BLOCK = 2**20  # approximate characters that a thread encodes at once


@dataclass(frozen=True)
class Config:
    POSITIONAL: ClassVar = ("input",)
    input: tuple[str, ...]  # files and directories
    out: str  # the data directory to write

    # Tokenizer
    tokenizer: str = ""  # use that of a data directory, Hugging Face folder or ORG/NAME; empty: train a new one
    vocab_size: int = 16384  # tokens of the BPE trained on the input

    # Documents
    sft: bool = False  # rows are chats or pairs of prompt and answer (data/chat.py); only answers are trained
    text_field: str = "text"  # field of a row that holds the text; a.b is the field b of the object a
    encoding_errors: Literal["strict", "replace"] = "strict"  # what to do about bytes that are not UTF-8
    val_fraction: float = 0.01  # share of documents held out; 0: no validation data
    seed: int = 0  # changes what is held out

    def __post_init__(self):
        require(self.input, "input", self.input, "name files or directories")
        shards.require_readable(self.out)
        require(0 <= self.val_fraction < 1, "val_fraction", self.val_fraction, "must be at least 0 and below 1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "must be from 0 to 2^63 - 1")
        require(self.tokenizer or not self.sft, "sft", True, "name the model's --tokenizer")
        remedy = "must be from 257 (256 bytes and <|endoftext|>) to 2^24"
        require(self.tokenizer or 257 <= self.vocab_size <= 2**24, "vocab_size", self.vocab_size, remedy)


def hashed(text, seed):
    """A number in [0, 1) that depends on the text and the seed only."""
    digest = hashlib.blake2b(text.encode(), digest_size=16, key=str(seed).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def scan(texts, cfg, sample_rate):
    """The first pass: (sample for the tokenizer, number of documents, hash below which a document is held out)."""
    sample, documents, lowest, share = [], 0, [], cfg.val_fraction
    for text in texts:
        documents += 1
        key = hashed(text, cfg.seed)
        lowest = sorted({key, *lowest})[:2]
        if share <= key < share + sample_rate:
            sample.append(text)
    if not documents:
        raise ValueError("no text in the input")
    same = "the input is one document" if documents == 1 else "all documents are equal"
    require(len(lowest) > 1 or not share, "val_fraction", share, f"{same}: nothing can be held out; pass 0")
    return sample, documents, max(share, lowest[1]) if share else 0


def prepare(cfg):
    """Write the data directory cfg.out and return its meta.json."""
    out, started = Path(os.path.abspath(cfg.out)), time.perf_counter()
    shards.refuse_existing(out)  # before the work
    make_directory(out.parent, "out", cfg.out)
    named = hub.folder(cfg.tokenizer, "tokenizer", hub.TOKENIZER) if cfg.tokenizer else None
    enc = tokenizer.load(named) if named else None
    paths = find_files(cfg.input, ROWS if cfg.sft else KINDS)
    estimate = sum(path.stat().st_size * EXPANSION.get(path.suffix.lower(), 1) for path in paths)
    length = int(min(2**20, max(2**10, estimate / 64)))  # so that even small inputs have documents to hold out
    rows = partial(chat.example, template=chat.chat_template(named)) if cfg.sft else None
    texts = partial(read, paths, length, cfg.text_field, cfg.encoding_errors, rows)
    sample, documents, threshold = scan(texts("reading"), cfg, 0 if enc else SAMPLE / max(1, estimate))
    if not enc:
        enc = tokenizer.train_bpe(sample, cfg.vocab_size)
        if enc.n_vocab < cfg.vocab_size:
            print(f"the input has too little variety: the tokenizer has only {enc.n_vocab} tokens", file=sys.stderr)
    with shards.ShardWriter(out, enc) as writer:
        if encode(texts("encoding"), writer, threshold, cfg) != documents:
            raise ValueError("the input changed while it was being read; run again")
        nothing = "it leaves nothing to train on; pass a smaller one"
        require("train" in writer.splits, "val_fraction", cfg.val_fraction, nothing)
        writer.notes |= {"input": cfg.input, "length": length, "seed": cfg.seed, "val_fraction": cfg.val_fraction}
    meta = shards.read_meta(out)
    for split, n in meta["splits"].items():
        sizes = f"{n['bytes'] / 1e6:.2f} MB, {n['tokens']:,} tokens, {n['bytes'] / n['tokens']:.2f} bytes per token"
        print(f"{split}: {n['documents']:,} documents, {sizes}")
    print(f"{cfg.out}: vocabulary {meta['vocab_size']:,}; {time.perf_counter() - started:.0f} s")
    return meta


def encode(texts, writer, threshold, cfg):
    """The second pass: encode in threads, write in order. Returns the number of texts."""
    waiting, n_texts = deque(), 0

    def work(batch):
        enc, parts = writer.enc, {}
        encoded = (chat.encode(enc, text) for text in batch) if cfg.sft else tokenizer.documents(enc, batch)
        for text, document in zip(batch, encoded, strict=True):
            parts.setdefault("val" if hashed(text, cfg.seed) < threshold else "train", []).append(document)
        return parts

    def write():
        for split, part in waiting.popleft().result().items():
            ids, sizes, *marks = zip(*part, strict=True)
            writer.add(split, np.concatenate(ids), sum(sizes), *map(np.concatenate, marks))

    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(workers) as pool:
        batch, size = [], 0
        for text in texts:
            n_texts += 1
            if batch and size + len(text) > BLOCK:
                waiting.append(pool.submit(work, batch))
                batch, size = [], 0
            batch.append(text)
            size += len(text)
            if len(waiting) >= 2 * workers:
                write()
        waiting.append(pool.submit(work, batch))
        while waiting:
            write()
    return n_texts


def main(argv=None):
    command_line(lambda: prepare(parse(Config, argv, __doc__)), "stopped; nothing was written")


if __name__ == "__main__":
    main()
