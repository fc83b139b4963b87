"""The data directory: flat token files, a tokenizer and meta.json, which is written last.

    DIR/meta.json        version, tokenizer, vocab_size, eos, dtype, splits, notes of the writer, and a checksum;
                         `ends`, where more tokens than eos end an answer
    DIR/tokenizer.json   see data/tokenizer.py
    DIR/train-00000.bin  token ids, little-endian uint16 (uint32 when the vocabulary exceeds 65,536), no header
    DIR/val-00000.bin
    DIR/train-00000.marks  only with examples (data/chat.py): a byte per token, TRAINED (target) | START (of an example)

Documents follow one another, each ended by the id `eos`. `bytes` counts their UTF-8 text.
"""

import dataclasses
import functools
import hashlib
import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from data import files, tokenizer
from data.tokenizer import AGAIN, META
from optimoe.config import require

PLAIN, MARKED = 1, 2  # versions; programs from before the marks refuse 2
TRAINED, START = 1, 2


class ShardWriter:
    """Writes a data directory.

        with ShardWriter("data/books", enc) as writer:
            writer.add("train", ids)  # whole documents, each ended by enc.eot_token
            writer.notes["licence"] = "CC0"  # any JSON; ends up in meta.json

    It fills a hidden directory, which gets its name at the end of the `with` block. An exception removes the files; the
    next writer removes those of a killed one. ValueError when the directory is not empty."""

    def __init__(self, directory, enc, shard_tokens=2**26):
        self.directory = Path(os.path.abspath(directory))
        refuse_existing(self.directory)
        self.enc, self.shard_tokens, self.notes = enc, shard_tokens, {}
        self.dtype = np.dtype("<u2" if enc.n_vocab <= 2**16 else "<u4")
        self.splits, self._stack = {}, ExitStack()
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self.partial = self._stack.enter_context(files.temporary(self.directory, directory=True))
        tokenizer.save(enc, self.partial)

    def add(self, split, ids, n_bytes=None, marks=None):
        """Appends documents to "train", "val", ... n_bytes: of their UTF-8 text; None: decode and count. marks: one for
        each token, in all calls or in none."""
        ids, eos, n_vocab = np.asarray(ids, dtype=np.int64), self.enc.eot_token, self.enc.n_vocab
        if not len(ids):
            return
        if ids[-1] != eos or ids.min() < 0 or ids.max() >= n_vocab:
            needs = f"ids must be below {n_vocab} and end with eos={eos}"
            raise ValueError(f"split {split!r}: ids from {ids.min()} to {ids.max()}, the last {ids[-1]}; {needs}")
        totals = self.splits.setdefault(split, {"tokens": 0, "bytes": 0, "documents": 0, "shards": []})
        totals["tokens"] += len(ids)
        totals["bytes"] += len(self.enc.decode_bytes(ids[ids != eos])) if n_bytes is None else n_bytes
        totals["documents"] += int(np.count_nonzero(ids == eos if marks is None else marks & START))
        columns, shards = {".bin": ids.astype(self.dtype)}, totals["shards"]
        if marks is not None:
            columns[".marks"] = np.asarray(marks, np.uint8)
        while len(ids):
            if not shards or shards[-1]["tokens"] == self.shard_tokens:
                shards.append({"file": f"{split}-{len(shards):05d}.bin", "tokens": 0, "sha256": None})
            n = min(len(ids), self.shard_tokens - shards[-1]["tokens"])
            for suffix, values in columns.items():
                with open((self.partial / shards[-1]["file"]).with_suffix(suffix), "ab") as file:
                    file.write(values[len(values) - len(ids) :][:n].data)
            shards[-1]["tokens"], ids = shards[-1]["tokens"] + n, ids[n:]

    def __enter__(self):
        return self

    def __exit__(self, kind, error=None, *_):
        with self._stack:  # removes what has not been published
            if error:
                raise error  # files.temporary names the directory in it
            if kind is None:
                self._publish()

    def _publish(self):
        marked = any(self.partial.glob("*.marks"))
        for shard in [shard for split in self.splits.values() for shard in split["shards"]]:
            for suffix, name in ((".bin", "sha256"), (".marks", "marks"))[: 1 + marked]:
                with open((self.partial / shard["file"]).with_suffix(suffix), "rb") as file:
                    os.fsync(file.fileno())
                    shard[name] = hashlib.file_digest(file, "sha256").hexdigest()
        meta = {"version": MARKED if marked else PLAIN, "tokenizer": tokenizer.FILE}
        meta |= {"tokenizer_sha256": _sha256(self.partial / tokenizer.FILE), "vocab_size": self.enc.n_vocab}
        meta |= {"eos": self.enc.eot_token, "dtype": self.dtype.name, "splits": self.splits}
        if ends := getattr(self.enc, "ends", None):
            meta["ends"] = sorted(set(ends))
        files.write_json(self.partial / META, meta | self.notes)
        refuse_existing(self.directory)
        os.rename(self.partial, self.directory)
        files.sync_directory(self.directory.parent)


def write_generated(directory, enc, chunks, name, cfg):
    """Write chunks (split, ids) and, under `name` in meta.json, the dataclass cfg. Returns meta.json's contents."""
    with ShardWriter(directory, enc) as writer:
        for split, ids in chunks:
            writer.add(split, ids)
        source = f"data/{type(cfg).__module__.rpartition('.')[2]}.py"
        writer.notes |= {name: dataclasses.asdict(cfg), "source": source, "licence": "generated; CC0"}
    return read_meta(directory)


def refuse_existing(directory):
    """ValueError unless `directory` is absent or empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not empty; remove it, or choose another name")


def require_readable(out):
    """ValueError for a name that train.py cannot read, whose --data are names with commas between them."""
    require("," not in out, "out", out, "--data of train.py has a comma between directories; use a name without one")


def read_meta(directory):
    """The contents of meta.json. ValueError naming the file when it is missing, damaged or of another version."""
    path = Path(directory) / META
    if not path.exists():
        raise ValueError(f"{path} does not exist: no data, or unfinished; make it with data.prepare")
    meta = files.read_json(path, AGAIN)
    try:
        meta["vocab_size"], meta["tokenizer"], meta["tokenizer_sha256"]  # KeyError if missing
        for name, known in (("version", (PLAIN, MARKED)), ("dtype", ("uint16", "uint32"))):
            if meta[name] not in known:
                raise ValueError(f"{name} {meta[name]!r} is unknown")
        for split in meta["splits"].values():
            if sum(shard["tokens"] for shard in split["shards"]) != split["tokens"]:
                raise ValueError("the tokens of the shards do not add up")
            names = ("file", "sha256", "marks")[: 1 + meta["version"]]
            split["bytes"], split["documents"], [shard[name] for shard in split["shards"] for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be used ({error!r}); {AGAIN}") from error
    return meta


def read_note(directory, name):
    """What a writer noted under `name` in meta.json; ValueError for data of another writer."""
    meta = read_meta(directory)
    if name not in meta:
        raise ValueError(f"{directory}: no {name!r} in its {META}: another program made it")
    return meta[name]


def open_shards(directory, split, marks=False):
    """Read-only memory maps of a split's shards, or of their marks, in order. ValueError names a missing, truncated or
    corrupt file: sizes and SHA-256 are compared with meta.json at about 1 GB/s, once a process."""
    directory, meta = Path(directory), read_meta(directory)
    if split not in meta["splits"]:
        missing = {"val": "no validation data (--val_fraction was 0)"}.get(split, f"no split {split!r}")
        raise ValueError(f"{directory} has {missing}; it has {', '.join(meta['splits']) or 'nothing'}")
    dtype, maps = np.dtype("uint8" if marks else meta["dtype"]).newbyteorder("<"), []
    for shard in meta["splits"][split]["shards"]:
        path = (directory / shard["file"]).with_suffix(".marks" if marks else ".bin")
        size = shard["tokens"] * dtype.itemsize
        if not path.exists():
            raise ValueError(f"{path} is missing ({META} lists it); {AGAIN}")
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes instead of {size:,}; {AGAIN}")
        if _sha256(path) != shard["marks" if marks else "sha256"]:
            raise ValueError(f"{path} is corrupt (SHA-256 differs from {META}); {AGAIN}")
        maps.append(np.memmap(path, dtype, "r"))
    return maps


def _sha256(path):
    status = path.stat()
    return _hash(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.lru_cache(maxsize=4096)
def _hash(path, *_status):  # a changed file is hashed again
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
