"""Text files to a data directory: `python -m data.prepare --input 'books/*.txt.xz' notes.jsonl src/ --out data/mine`.

Two passes over the input, both streaming. The first counts, samples text for the tokenizer (a BPE of --vocab_size unless
--tokenizer names one) and finds out what to hold out; the second encodes, in threads, and writes the shards in input order.

What a document is:
    .txt, or any other file named explicitly: the parts between lines that hold one NUL character ("\\n\\0\\n"), else the file
    .jsonl: the field --text_field of each line            .py: the file
    and .gz or .xz of these. A directory is searched for them. Byte-order marks are removed, line ends become "\\n".
A document longer than --max_document characters is cut at paragraph or line ends into pieces of 64 Ki characters (or a
quarter of --max_document if that is less), which count as documents from then on. So one long file without separators
still gives a training and a validation part.

Held out for validation are the documents whose hash (of the text and --seed) is among the lowest --val_fraction, so equal
documents fall on the same side, and adding files moves no document (at equal --max_document); but at least the one
lowest of all.
"""

import argparse
import difflib
import glob
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import sys
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data import shards, tokenizer
from optimoe.config import make_directory

SEPARATOR = "\n\0\n"
EXPANSION = {".xz": 4.3, ".gz": 3.3}  # usual bytes of English text per compressed byte, for estimates only
BLOCK = 2**20  # characters read at once, and about as many encoded as one task


# ---- what to read


@dataclass
class Source:
    """A file, or the Python files of one directory or pattern; the line that meta.json and the closing table give to it."""

    name: str
    files: list[Path] = field(default_factory=list)
    skipped: set[Path] = field(default_factory=set)  # Python files in other encodings than UTF-8
    counts: dict[str, Counter] = field(default_factory=lambda: {"train": Counter(), "val": Counter()})


def find_sources(inputs: Iterable[str]) -> list[Source]:
    """Expands files, directories and glob patterns (** too), sorted. Raises ValueError for one that matches nothing."""
    sources, seen = [], set()
    for given in inputs:
        paths = [Path(p) for p in sorted(glob.glob(given, recursive=True))] or [Path(given)]
        code = Source(given)  # thousands of Python files are one source
        found = False
        for top in paths:
            if not top.exists():
                raise ValueError(
                    f"--input {given}: no such file or directory (quote a pattern so that the shell leaves it alone)"
                )
            for path in sorted(_walk(top)) if top.is_dir() else [top]:
                found = True
                if path.resolve() in seen:
                    continue
                seen.add(path.resolve())
                if path.suffix == ".py":
                    code.files.append(path)
                else:
                    sources.append(Source(str(path), [path]))
        if not found:
            raise ValueError(f"--input {given}: no .py, .txt or .jsonl file (or .gz or .xz of them) in it")
        if code.files:
            sources.append(code)
    return sources


def _walk(top: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(top):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        for name in names:
            if _kind(Path(name)) in (".py", ".txt", ".jsonl") and not name.startswith("."):
                yield Path(folder, name)


def _kind(path: Path) -> str:  # "a.txt.xz" -> ".txt"
    return path.with_suffix("").suffix if path.suffix in EXPANSION else path.suffix


# ---- documents


class Reader:
    """Iterates over (source index, document) of all sources and knows how far it is."""

    def __init__(
        self, sources: list[Source], max_document: int, text_field: str = "text", encoding_errors: str = "strict"
    ):
        self.sources, self.max_document = sources, max_document
        self.text_field, self.encoding_errors = text_field, encoding_errors
        self.done, self.file, self.total = 0, None, sum(f.stat().st_size for s in sources for f in s.files)

    @property
    def fraction(self) -> float:
        """Of the input files' bytes (as they are on disk), those already read."""
        return (self.done + (self.file.tell() if self.file else 0)) / max(1, self.total)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        self.done = 0
        for index, source in enumerate(self.sources):
            for path in source.files:
                try:
                    with open(path, "rb") as self.file:
                        for text in self._parts(path):
                            text = text.removeprefix("\ufeff")
                            if text and not text.isspace():
                                yield index, text
                except UnicodeDecodeError as error:
                    if path.suffix == ".py":  # test suites of tools that read Python have such files on purpose
                        source.skipped.add(path)
                        continue
                    raise ValueError(
                        f"{path} is not UTF-8 ({error.reason}, byte 0x{error.object[error.start]:02x}); convert it, "
                        "or pass --encoding_errors replace"
                    ) from error
                except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
                    raise ValueError(
                        f"{path} cannot be decompressed ({error}); it is truncated or not what its name says"
                    ) from error
                finally:
                    self.file = None
                    self.done += path.stat().st_size

    def _parts(self, path: Path) -> Iterator[str]:
        opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, lambda f: f)(self.file)
        text = io.TextIOWrapper(opened, encoding="utf-8", errors=self.encoding_errors, newline=None)
        kind = _kind(path)
        if kind == ".jsonl":
            documents = ([self._field(path, number, line)] for number, line in enumerate(text, 1) if not line.isspace())
        elif kind == ".py":
            documents = [[text.read()]]
        else:
            documents = [iter(lambda: text.read(BLOCK), "")]
        for blocks in documents:
            yield from split_documents(blocks, self.max_document, None if kind in (".jsonl", ".py") else SEPARATOR)

    def _field(self, path, number, line) -> str:
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON ({error.msg}, column {error.colno})") from error
        text = item.get(self.text_field) if isinstance(item, dict) else None
        if not isinstance(text, str):
            there = ", ".join(item) if isinstance(item, dict) else type(item).__name__
            raise ValueError(
                f"{path}:{number} has no text in field {self.text_field!r} (it has: {there}); pass --text_field"
            )
        return text.encode("utf-8", "replace").decode() if "\\u" in line else text  # "\ud800" alone is no character


def split_documents(blocks: Iterable[str], max_document: int, separator: str | None = SEPARATOR) -> Iterator[str]:
    """Documents of a text given in blocks; the result does not depend on where the blocks end.

    Holds one block and max_document characters. Pieces of a cut document join up to the document.
    """
    piece = max(1, min(2**16, max_document // 4))
    rest, cutting = "", False  # cutting: rest continues a document that was found too long

    def pieces(text):
        while len(text) > 2 * piece:
            end = _cut(text, piece)
            yield text[:end]
            text = text[end:]
        yield text

    for block in blocks:
        *whole, rest = (rest + block).split(separator) if separator else [rest + block]
        for text in whole:
            yield from pieces(text) if cutting or len(text) > max_document else [text]
            cutting = False
        known = len(rest) - 2  # the last two characters may be the start of a separator
        cutting = cutting or known > max_document
        while cutting and len(rest) - 2 > 2 * piece:
            end = _cut(rest, piece)
            yield rest[:end]
            rest = rest[end:]
    yield from pieces(rest) if cutting or len(rest) > max_document else [rest]


def _cut(text: str, piece: int) -> int:
    for mark in ("\n\n", "\n", " "):
        at = text.rfind(mark, piece // 2, piece)
        if at >= 0:
            return at + len(mark)
    return piece


def hashes(text: str, seed: int) -> tuple[float, float]:
    """Two independent numbers in [0, 1) that depend on the text and the seed only."""
    digest = hashlib.blake2b(text.encode(), digest_size=16, key=str(seed).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64, int.from_bytes(digest[8:], "big") / 2**64


# ---- running


def batches(documents: Iterable[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    """Groups the documents of one source into tasks of about BLOCK characters."""
    index, batch, size = 0, [], 0
    for i, text in documents:
        if batch and (i != index or size + len(text) > BLOCK):
            yield index, batch
            batch, size = [], 0
        index, size = i, size + len(text)
        batch.append(text)
    if batch:
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


def prepare(
    inputs: list[str],
    out: str | Path,
    vocab_size: int = 16384,
    tokenizer_name: str | None = None,
    val_fraction: float = 0.01,
    seed: int = 0,
    max_document: int | None = None,
    text_field: str = "text",
    encoding_errors: str = "strict",
    sample_bytes: float = 32e6,
    licence: str = "",
    overwrite: bool = False,
    workers: int | None = None,
) -> dict:
    """Writes the data directory `out` and returns its meta.json. Arguments as on the command line (--help)."""
    for ok, given, rule in (
        (0 <= val_fraction < 1, f"--val_fraction {val_fraction}", "at least 0 and below 1"),
        (0 <= seed < 2**63, f"--seed {seed}", "at least 0 and below 2^63"),
        (max_document is None or max_document >= 256, f"--max_document {max_document}", "at least 256 characters"),
        (
            tokenizer_name or vocab_size >= 257,
            f"--vocab_size {vocab_size}",
            f"at least 257 (256 bytes and {tokenizer.EOT})",
        ),
        (0 < sample_bytes < math.inf, f"--sample_bytes {sample_bytes}", "above 0 and finite"),
        (workers is None or workers >= 1, f"--workers {workers}", "at least 1"),
    ):
        if not ok:
            raise ValueError(f"{given}: must be {rule}")
    out, workers, progress = Path(out), workers or _cores(), Progress()
    shards.refuse_existing(out, overwrite)  # before the work, not after it
    make_directory(Path(os.path.abspath(out)).parent, "--out", str(out))
    enc = None
    if tokenizer_name:
        enc = tokenizer.load(tokenizer_name) if Path(tokenizer_name).is_dir() else tokenizer.named(tokenizer_name)
    sources = find_sources(inputs)
    estimate = sum(f.stat().st_size * EXPANSION.get(f.suffix, 1) for s in sources for f in s.files)
    if max_document is None:  # small inputs are cut finer, so that they have enough documents to hold some out
        max_document = int(min(2**20, max(2**12, estimate / 16)))
    sample_rate = 0 if enc else sample_bytes / max(1, estimate)
    reader = Reader(sources, max_document, text_field, encoding_errors)
    pool = ThreadPoolExecutor(workers)
    try:
        # Pass 1: totals, the lowest hashes, the pieces of the sampled documents.
        def scan(index, texts):
            keys = [hashes(text, seed) for text in texts]
            sample = [text for text, (a, b) in zip(texts, keys) if a >= val_fraction and b < sample_rate]
            return len(texts), {a for a, _ in keys}, tokenizer.count_pieces(sample)

        n_documents, lowest, pieces = 0, [], Counter()
        for n, keys, counts in in_order(pool, 2 * workers, scan, batches(reader)):
            n_documents += n
            lowest = sorted(keys.union(lowest))[:2]
            pieces.update(counts)
            progress("reading", reader.fraction)
        if not n_documents:
            raise ValueError(f"--input {' '.join(inputs)}: no text in it")
        if val_fraction and len(lowest) < 2:
            raise ValueError(
                "the input is one document, so nothing can be held out: pass a smaller --max_document, more input, or --val_fraction 0"
            )
        threshold = max(val_fraction, lowest[1]) if val_fraction else 0

        if enc is None:
            progress(f"training the tokenizer on {len(pieces):,} different pieces")
            enc = tokenizer.bpe_from_counts(pieces, vocab_size)
            if enc.n_vocab < vocab_size:
                print(
                    f"\nthe input has too little variety for {vocab_size} tokens; the tokenizer has {enc.n_vocab}",
                    file=sys.stderr,
                )

        # Pass 2: encode and write.
        end = np.array([enc.eot_token], np.uint32)

        def encode(index, texts):
            parts = {"train": [], "val": []}
            for text in texts:
                ids = enc.encode_to_numpy(text, disallowed_special=())  # "<|endoftext|>" inside a text is just text
                parts["val" if hashes(text, seed)[0] < threshold else "train"] += [ids, end]
            return index, {split: (len(p) // 2, np.concatenate(p)) for split, p in parts.items() if p}

        with shards.ShardWriter(out, enc, overwrite) as writer:
            for index, parts in in_order(pool, 2 * workers, encode, batches(reader)):
                for split, (documents, ids) in parts.items():
                    size = writer.add(split, ids)
                    sources[index].counts[split].update(documents=documents, tokens=len(ids), bytes=size)
                progress("encoding", reader.fraction)
            written = {split: sum(s.counts[split]["documents"] for s in sources) for split in ("train", "val")}
            if sum(written.values()) != n_documents:
                raise ValueError("the input changed while it was being read; run again")
            if not written["train"]:
                raise ValueError(
                    f"--val_fraction {val_fraction} leaves nothing to train on; pass a smaller one, or a smaller --max_document"
                )
            writer.notes.update(
                licence=licence,
                seed=seed,
                val_fraction=val_fraction,
                max_document=max_document,
                sources=[
                    {"name": s.name, "files": len(s.files), "skipped": len(s.skipped), "sha256": _digest(s.files)}
                    | s.counts
                    for s in sources
                ],
            )
        meta = shards.read_meta(out)
    finally:
        pool.shutdown(cancel_futures=True)
    _report(meta, out, progress.seconds, workers)
    return meta


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Progress:
    """One line on stderr: rewritten five times a second on a terminal, printed every ten seconds into a file."""

    def __init__(self):
        self.started = self.shown = time.perf_counter()
        self.terminal = sys.stderr.isatty()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def __call__(self, what: str, fraction: float | None = None) -> None:
        now = time.perf_counter()
        if fraction is None or now - self.shown > (0.2 if self.terminal else 10):
            self.shown = now
            bar = "" if fraction is None else f" [{'#' * int(fraction * 30):30s}] {fraction:4.0%}"
            line = f"{what}{bar} {self.seconds:.0f} s"
            print(line.ljust(79) + "\r" if self.terminal else line + "\n", end="", file=sys.stderr, flush=True)


def _report(meta: dict, out: Path, seconds: float, workers: int) -> None:
    row = "{:44s} {:>9s} {:>11s} {:>13s} {:>11s}".format
    print(row("source", "MB", "documents", "tokens", "bytes/token"))
    for s in meta["sources"][:30]:
        n = Counter(s["train"]) + Counter(s["val"])
        print(
            row(
                s["name"][-44:],
                f"{n['bytes'] / 1e6:.2f}",
                f"{n['documents']:,}",
                f"{n['tokens']:,}",
                f"{n['bytes'] / max(1, n['tokens']):.2f}",
            )
            + (f"  ({s['skipped']} files that are not UTF-8 skipped)" if s["skipped"] else "")
        )
    if len(meta["sources"]) > 30:
        print(f"... and {len(meta['sources']) - 30} more in {out / shards.META}")
    for split, s in meta["splits"].items():
        print(f"{split}: {s['tokens']:,} tokens, {s['documents']:,} documents, {s['bytes'] / 1e6:.2f} MB")
    megabytes = sum(s["bytes"] for s in meta["splits"].values()) / 1e6
    print(
        f"{out}: vocabulary {meta['vocab_size']:,}; {megabytes:.1f} MB in {seconds:.1f} s = {megabytes / seconds:.1f} MB/s with {workers} threads"
    )


def whole_number(text: str) -> int:
    """1e6 is one. The name is part of argparse's message."""
    if not float(text).is_integer():
        raise ValueError
    return int(float(text))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="GLOB", help="files, directories or quoted patterns")
    add("--out", required=True, metavar="DIR", help="the data directory to write")
    add(
        "--vocab_size",
        type=whole_number,
        default=16384,
        metavar="N",
        help="of the BPE trained on the input (default 16384)",
    )
    add("--tokenizer", metavar="NAME|DIR", help="use this instead: a tiktoken name (cl100k_base) or a data directory")
    add(
        "--val_fraction",
        type=float,
        default=0.01,
        metavar="X",
        help="share of documents held out (default 0.01; 0: none)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the split (default 0)")
    add(
        "--max_document",
        type=whole_number,
        metavar="N",
        help="characters; longer documents are cut (default 2^20, less for inputs below 16 MB)",
    )
    add("--text_field", default="text", metavar="NAME", help="of jsonl lines (default text)")
    add(
        "--encoding_errors",
        choices=("strict", "replace"),
        default="strict",
        help="what to do about bytes that are not UTF-8 (default strict)",
    )
    add(
        "--sample_bytes",
        type=float,
        default=32e6,
        metavar="N",
        help="of text, about, that the BPE is trained on (default 32e6)",
    )
    add("--licence", default="", metavar="TEXT", help="note kept in meta.json")
    add("--overwrite", action="store_true", help="replace the data directory if it exists")
    add("--workers", type=int, metavar="N", help="threads (default: all cores)")
    args, unknown = parser.parse_known_args(argv)
    for flag in unknown:
        near = difflib.get_close_matches(flag.split("=")[0], [o for a in parser._actions for o in a.option_strings], 1)
        parser.error(f"unknown argument {flag}" + (f"; did you mean {near[0]}?" if near else ""))
    fields = vars(args)
    try:
        prepare(fields.pop("input"), fields.pop("out"), tokenizer_name=fields.pop("tokenizer"), **fields)
    except (ValueError, OSError) as error:
        sys.exit(f"\nerror: {error}")
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
