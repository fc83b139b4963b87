"""A slice of a Hugging Face hub dataset to one file for data.prepare; only what is kept is downloaded.

    python -m data.hub --dataset HuggingFaceFW/fineweb-edu --subset sample-10BT --max_bytes 2e8 --out fineweb.jsonl.gz
    python -m data.prepare --input fineweb.jsonl.gz --out data/fineweb

Needs `pip install -e '.[hub]'` and a network (HF_ENDPOINT, HF_TOKEN and proxies work as in `datasets`). A slice on
disk, rather than a stream into training, so that the split, the tokenizer and a resumed run all see the same text.
"""

import gzip
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data import files
from optimoe.config import parse, require


@dataclass(frozen=True)
class Config:
    dataset: str  # owner/name on the hub, or a local directory of Parquet or JSON-lines files
    out: str  # the file to write, NAME.jsonl.gz
    subset: str | None = None  # configuration of the dataset
    split: str = "train"
    text_field: str = "text"
    max_bytes: float = 2e8  # of text, UTF-8
    shuffle_buffer: int = 0  # documents to shuffle among; 0: in the dataset's order
    seed: int = 0  # of the shuffling

    def __post_init__(self):
        require(self.out.endswith(".jsonl.gz"), "out", self.out, "must end in .jsonl.gz")
        require(self.max_bytes > 0, "max_bytes", self.max_bytes, "must be above 0")
        require(self.shuffle_buffer >= 0, "shuffle_buffer", self.shuffle_buffer, "must be 0 or more")


def documents(cfg: Config) -> Iterator[str]:
    """Texts of the dataset until `max_bytes`; with a shuffle_buffer its files come in random order too.

    Raises ValueError when the dataset or the field does not exist, and without the package `datasets`.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError("streaming from the hub needs the package `datasets`: pip install -e '.[hub]'") from None
    try:
        stream = datasets.load_dataset(cfg.dataset, cfg.subset, split=cfg.split, streaming=True)
    except (OSError, ValueError) as error:  # unknown name, subset or split; no network
        raise ValueError(f"--dataset {cfg.dataset} --subset {cfg.subset} --split {cfg.split}: {error}") from error
    if cfg.shuffle_buffer:
        stream = stream.shuffle(seed=cfg.seed, buffer_size=cfg.shuffle_buffer)
    size = 0
    for item in stream:
        text = item.get(cfg.text_field)
        if not isinstance(text, str):
            there = ", ".join(item)
            raise ValueError(f"--text_field {cfg.text_field}: not a text in {cfg.dataset}; its fields are {there}")
        yield text
        size += len(text.encode("utf-8", "replace"))
        if size >= cfg.max_bytes:
            return


def download(cfg: Config) -> tuple[int, int]:
    """Write gzipped lines {"text": ...}; the file appears when complete. Returns the documents and characters."""
    out = Path(cfg.out)
    require(not out.exists(), "out", cfg.out, "it exists; choose another name or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    n_documents = n_characters = 0
    shown = time.perf_counter()
    with files.temporary(out) as partial:
        with open(partial, "wb") as file:
            with gzip.open(file, "wt", compresslevel=4, encoding="utf-8") as lines:
                for text in documents(cfg):
                    lines.write(json.dumps({"text": text}) + "\n")
                    n_documents, n_characters = n_documents + 1, n_characters + len(text)
                    if time.perf_counter() - shown > 5:
                        shown = time.perf_counter()
                        print(f"{n_documents:,} documents, {n_characters / 1e6:.1f} M characters", file=sys.stderr)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, out)
    return n_documents, n_characters


def main(argv: list[str] | None = None) -> None:
    try:
        n_documents, n_characters = download(parse(Config, sys.argv[1:] if argv is None else argv, __doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{n_documents:,} documents, {n_characters / 1e6:.1f} M characters")


if __name__ == "__main__":
    main()
