"""A slice of a Hugging Face hub dataset to one file for data.prepare, streamed: only the part that is kept is downloaded.

    python -m data.hub --dataset HuggingFaceFW/fineweb-edu --config sample-10BT --max_bytes 2e8 --out fineweb.jsonl.gz
    python -m data.prepare --input fineweb.jsonl.gz --out data/fineweb

Needs `pip install -e '.[hub]'` and a network (HF_ENDPOINT, HF_TOKEN and proxies work as in `datasets`). A slice on disk,
rather than a stream into training, so that the split, the tokenizer and a resumed run all see the same text.
"""

import argparse
import gzip
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path


def documents(
    dataset: str,
    config: str | None = None,
    split: str = "train",
    text_field: str = "text",
    max_bytes: float = 2e8,
    shuffle_buffer: int = 0,
    seed: int = 0,
) -> Iterator[str]:
    """Yields texts of a hub dataset (or a local directory of parquet or jsonl files) until `max_bytes` of UTF-8 text.

    shuffle_buffer > 0 draws from a buffer of so many documents, and from the dataset's files in random order, by `seed`.
    Raises ImportError without the `datasets` package, ValueError when the dataset or the field does not exist.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("streaming from the hub needs the package `datasets`: pip install -e '.[hub]'") from error
    try:
        stream = datasets.load_dataset(dataset, config, split=split, streaming=True)
    except (OSError, ValueError) as error:  # unknown name, config or split; no network
        raise ValueError(f"--dataset {dataset} --config {config} --split {split}: {error}") from error
    if shuffle_buffer:
        stream = stream.shuffle(seed=seed, buffer_size=shuffle_buffer)
    size = 0
    for item in stream:
        if not isinstance(item.get(text_field), str):
            raise ValueError(f"--text_field {text_field}: not a text in {dataset}; its fields are {', '.join(item)}")
        yield item[text_field]
        size += len(item[text_field].encode("utf-8", "replace"))
        if size >= max_bytes:
            return


def download(out: str | Path, **which) -> tuple[int, int]:
    """Writes `documents(**which)` as gzipped JSON lines {"text": ...}; the file appears when complete. -> documents, characters."""
    out = Path(out)
    if not out.name.endswith(".jsonl.gz"):
        raise ValueError(f"--out {out}: must end in .jsonl.gz")
    if out.exists():
        raise ValueError(f"--out {out} exists; choose another name or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    n_documents = n_characters = 0
    shown = time.perf_counter()
    try:
        with open(partial, "wb") as file:
            with gzip.open(file, "wt", compresslevel=4, encoding="utf-8") as lines:
                for text in documents(**which):
                    lines.write(json.dumps({"text": text}) + "\n")
                    n_documents, n_characters = n_documents + 1, n_characters + len(text)
                    if time.perf_counter() - shown > 5:
                        shown = time.perf_counter()
                        print(f"{n_documents:,} documents, {n_characters / 1e6:.1f} M characters", file=sys.stderr)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return n_documents, n_characters


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m data.hub",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset", required=True, metavar="NAME", help="owner/name on the hub, or a local directory")
    add("--config", metavar="NAME", help="configuration (subset) of the dataset")
    add("--split", default="train", metavar="NAME", help="default train")
    add("--text_field", default="text", metavar="NAME", help="default text")
    add("--max_bytes", type=float, default=2e8, metavar="N", help="of text, UTF-8 (default 2e8)")
    add(
        "--shuffle_buffer",
        type=int,
        default=0,
        metavar="N",
        help="documents to shuffle among (default 0: in the dataset's order)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the shuffling (default 0)")
    add("--out", required=True, metavar="FILE.jsonl.gz", help="the file to write")
    which = vars(parser.parse_args(argv))
    try:
        n_documents, n_characters = download(which.pop("out"), **which)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"{n_documents:,} documents, {n_characters / 1e6:.1f} M characters")


if __name__ == "__main__":
    main()
