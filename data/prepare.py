"""Text files to a data directory.

    python -m data.prepare --input 'books/*.txt.xz' --out data/mine --vocab_size 16384
    python -m data.prepare notes.jsonl src/ 'fineweb/**/*.parquet' --out data/mine --tokenizer data/books

The input is streamed twice. The first pass finds out what to hold out and, unless --tokenizer names one, trains a BPE
on a sample of the text (with the package `tokenizers`). The second encodes in threads and writes in input order.

What a document is:
    .txt, or any other file that is named: the parts between lines that hold one NUL ("\\n\\0\\n"), else the file
    .jsonl, .parquet, .arrow: the field --text_field of each row ("a.b": field b of the object a)
    .py: the file
and .gz, .xz or .zst of these, in upper or lower case. A directory is searched for them; links to directories are not
followed. Byte-order marks are removed and line ends become "\\n". Parquet, Arrow and .zst need pyarrow.
A document longer than --max_document characters is cut at paragraph or line ends into pieces of 64 Ki characters (or a
quarter of --max_document if that is less), which are documents from then on. So one long file gives both splits.

Held out for validation are the documents whose hash (of the text and --seed) is among the lowest --val_fraction, at
least the lowest of all. So equal documents fall on the same side, and adding files moves none (at one --max_document).
"""

import hashlib
import itertools
import math
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from data import shards, tokenizer
from data.documents import BLOCK, EXPANSION, Reader, Source, find_sources
from optimoe import hub
from optimoe.config import make_directory, parse, require


@dataclass(frozen=True)
class Config:
    POSITIONAL: ClassVar = ("input",)
    input: tuple[str, ...]  # files, directories or quoted patterns
    out: str  # the data directory to write
    overwrite: bool = False  # replace the data directory if it exists
    licence: str = ""  # note kept in meta.json
    workers: int | None = None  # threads; none: all cores

    # Tokenizer
    tokenizer: str = (
        ""  # cl100k_base, ... of tiktoken, a data directory, a Hugging Face folder or ORG/NAME; empty: train one
    )
    vocab_size: int = 16384  # of the BPE trained on the input
    sample_bytes: float = 32e6  # of text, about, that the BPE is trained on

    # Documents
    text_field: str = "text"  # of rows; a.b is the field b of the object a
    encoding_errors: Literal["strict", "replace"] = "strict"  # what to do about bytes that are not UTF-8
    max_document: int | None = None  # characters; longer documents are cut; none: 2^20, less for inputs below 16 MB
    val_fraction: float = 0.01  # share of documents held out; 0: no validation data
    seed: int = 0  # of the split

    def __post_init__(self):
        require(self.input, "input", self.input, "name files, directories or patterns")
        require(0 <= self.val_fraction < 1, "val_fraction", self.val_fraction, "must be at least 0 and below 1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "must be at least 0 and below 2^63")
        length = self.max_document
        require(length is None or 256 <= length <= 2**30, "max_document", length, "must be from 256 to 2^30 characters")
        if not self.tokenizer:
            tokenizer.require_size(self.vocab_size)
        require(0 < self.sample_bytes < math.inf, "sample_bytes", self.sample_bytes, "must be above 0 and finite")
        require(self.workers is None or 1 <= self.workers <= 1024, "workers", self.workers, "must be from 1 to 1024")


def hashes(text: str, seed: int) -> tuple[float, float]:
    """Two independent numbers in [0, 1) that depend on the text and the seed only."""
    digest = hashlib.blake2b(text.encode(), digest_size=16, key=str(seed).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64, int.from_bytes(digest[8:], "big") / 2**64


@dataclass
class Scan:
    """The first pass. Iterating gives the sample for the tokenizer; afterwards the totals are known."""

    reader: Reader
    cfg: Config
    sample_rate: float
    progress: "Progress"
    documents: int = 0
    threshold: float = 0  # documents with a hash below it are held out

    def __iter__(self) -> Iterator[str]:
        lowest, share = [], self.cfg.val_fraction
        for _, text in self.reader:
            self.documents += 1
            key, draw = hashes(text, self.cfg.seed)
            lowest = sorted({key, *lowest})[:2]
            if key >= share and draw < self.sample_rate:
                yield text
            if self.documents % 64 == 0:
                self.progress("reading", self.reader.fraction)
        if not self.documents:
            raise ValueError(f"--input {' '.join(self.cfg.input)}: no text in it")
        if share and len(lowest) < 2:
            remedy = "pass a smaller --max_document, more input, or --val_fraction 0"
            raise ValueError(f"the input is one document, so nothing can be held out: {remedy}")
        self.threshold = max(share, lowest[1]) if share else 0
        if self.sample_rate:
            self.progress("training the tokenizer")


def prepare(cfg: Config) -> dict:
    """Write the data directory cfg.out and return its meta.json."""
    out, progress = Path(cfg.out), Progress()
    shards.refuse_existing(Path(os.path.abspath(out)), cfg.overwrite)  # before the work, not after it
    make_directory(Path(os.path.abspath(out)).parent, "out", cfg.out)
    enc = None
    if cfg.tokenizer:
        if Path(cfg.tokenizer).is_dir() or "/" in cfg.tokenizer:
            enc = tokenizer.load(hub.folder(cfg.tokenizer, "tokenizer", hub.TOKENIZER))
        else:
            enc = tokenizer.named(cfg.tokenizer)
    else:
        tokenizer.library()
    sources = find_sources(cfg.input)
    estimate = sum(f.stat().st_size * EXPANSION.get(f.suffix.lower(), 1) for s in sources for f in s.files)
    # Small inputs are cut finer, so that they have enough documents to hold some out.
    max_document = cfg.max_document or int(min(2**20, max(2**12, estimate / 16)))
    reader = Reader(sources, max_document, cfg.text_field, cfg.encoding_errors)
    scan = Scan(reader, cfg, 0 if enc else cfg.sample_bytes / max(1, estimate), progress)
    if enc:
        deque(scan, maxlen=0)
    else:
        enc = tokenizer.train_bpe(scan, cfg.vocab_size)
        if enc.n_vocab < cfg.vocab_size:
            found = f"the tokenizer has {enc.n_vocab}"
            print(f"\nthe input has too little variety for {cfg.vocab_size} tokens; {found}", file=sys.stderr)
    workers = cfg.workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    with shards.ShardWriter(out, enc, cfg.overwrite) as writer:
        written = encode(scan, writer, enc, workers)
        if sum(written.values()) != scan.documents:
            raise ValueError("the input changed while it was being read; run again")
        remedy = "it leaves nothing to train on; pass a smaller one, or a smaller --max_document"
        require(written["train"], "val_fraction", cfg.val_fraction, remedy)
        writer.notes |= {"licence": cfg.licence, "seed": cfg.seed, "val_fraction": cfg.val_fraction}
        writer.notes |= {"max_document": max_document, "sources": [_note(source) for source in sources]}
    meta = shards.read_meta(out)
    _report(meta, out, time.perf_counter() - progress.started, workers)
    return meta


def encode(scan: Scan, writer: shards.ShardWriter, enc, workers: int) -> Counter:
    """The second pass: encode in threads, write in order. Returns the documents of each split."""
    reader = scan.reader

    def task(index, texts):
        parts = {"train": ([], []), "val": ([], [])}
        for text, ids in zip(texts, tokenizer.documents(enc, texts), strict=True):
            documents, sizes = parts["val" if hashes(text, scan.cfg.seed)[0] < scan.threshold else "train"]
            documents.append(ids)
            sizes.append(len(text.encode()))
        return index, {split: (len(s), np.concatenate(d), sum(s)) for split, (d, s) in parts.items() if d}

    written, pool = Counter(), ThreadPoolExecutor(workers)
    try:
        for index, parts in in_order(pool, 2 * workers, task, batches(reader)):
            for split, (documents, ids, size) in parts.items():
                writer.add(split, ids, size)
                reader.sources[index].counts[split].update(documents=documents, tokens=len(ids), bytes=size)
                written[split] += documents
            scan.progress("encoding", reader.fraction)
    finally:
        pool.shutdown(cancel_futures=True)
    return written


def batches(documents: Iterable[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    """Groups the documents of one source into tasks of about BLOCK characters."""
    for index, group in itertools.groupby(documents, key=lambda document: document[0]):
        batch, size = [], 0
        for _, text in group:
            if batch and size + len(text) > BLOCK:
                yield index, batch
                batch, size = [], 0
            batch.append(text)
            size += len(text)
        yield index, batch


def in_order(pool: ThreadPoolExecutor, ahead: int, work: Callable, tasks: Iterable) -> Iterator:
    """`map` over the pool that keeps only `ahead` tasks in memory."""
    waiting = deque()
    for task in tasks:
        waiting.append(pool.submit(work, *task))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _note(source: Source) -> dict:
    digest = hashlib.sha256()
    for path in source.files:
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    counts = {"files": len(source.files), "skipped": len(source.skipped), "sha256": digest.hexdigest()}
    return {"name": source.name} | counts | source.counts


class Progress:
    """One line on stderr: rewritten five times a second on a terminal, printed every ten seconds into a file."""

    def __init__(self):
        self.started = self.shown = time.perf_counter()
        self.terminal = sys.stderr.isatty()

    def __call__(self, what: str, fraction: float | None = None) -> None:
        now = time.perf_counter()
        if fraction is None or now - self.shown > (0.2 if self.terminal else 10):
            self.shown = now
            bar = "" if fraction is None else f" [{'#' * int(fraction * 30):30s}] {fraction:4.0%}"
            line = f"{what}{bar} {now - self.started:.0f} s"
            print(line.ljust(79) + "\r" if self.terminal else line + "\n", end="", file=sys.stderr, flush=True)


def _report(meta: dict, out: Path, seconds: float, workers: int) -> None:
    print(f"{'source':44s} {'MB':>9s} {'documents':>11s} {'tokens':>13s} {'bytes/token':>11s}")
    for s in meta["sources"][:30]:
        n = Counter(s["train"]) + Counter(s["val"])
        ratio = n["bytes"] / max(1, n["tokens"])
        row = f"{s['name'][-44:]:44s} {n['bytes'] / 1e6:9.2f} {n['documents']:11,} {n['tokens']:13,} {ratio:11.2f}"
        print(row + (f"  ({s['skipped']} files that are not UTF-8 skipped)" if s["skipped"] else ""))
    if len(meta["sources"]) > 30:
        print(f"... and {len(meta['sources']) - 30} more in {out / shards.META}")
    for split, s in meta["splits"].items():
        print(f"{split}: {s['tokens']:,} tokens, {s['documents']:,} documents, {s['bytes'] / 1e6:.2f} MB")
    size = sum(s["bytes"] for s in meta["splits"].values()) / 1e6
    speed = f"{size:.1f} MB in {seconds:.1f} s = {size / seconds:.1f} MB/s with {workers} threads"
    print(f"{out}: vocabulary {meta['vocab_size']:,}; {speed}")


def main(argv: list[str] | None = None) -> None:
    try:
        prepare(parse(Config, sys.argv[1:] if argv is None else argv, __doc__))
    except (ValueError, OSError, MemoryError) as error:
        sys.exit(f"error: {error or 'not enough memory'}")
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
