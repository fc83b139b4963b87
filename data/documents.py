"""Documents out of files: which files an input names, how each kind is read, and how long documents are cut.

sources = find_sources(["books/*.txt.xz", "notes.jsonl", "src/"])
for index, text in Reader(sources, max_document=2**20): ...       # text of sources[index], streaming
"""

import glob
import gzip
import importlib
import io
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data import files

SEPARATOR = "\n\0\n"
# Usual bytes of English text per byte on the disk, for estimates only.
EXPANSION = {".xz": 4.3, ".gz": 3.3, ".zst": 3.3, ".parquet": 2.0}
COMPRESSED = (".xz", ".gz", ".zst")
KINDS = (".txt", ".jsonl", ".py", ".parquet", ".arrow")
BLOCK = 2**20  # characters read at once, and about as many encoded as one task
MARK = "\ufeff"  # a byte-order mark


# ---- what to read


@dataclass
class Source:
    """A file, or the Python files of one directory or pattern: one line of meta.json and of the closing table."""

    name: str
    files: list[Path] = field(default_factory=list)
    skipped: set[Path] = field(default_factory=set)  # Python files in other encodings than UTF-8
    counts: dict[str, Counter] = field(default_factory=lambda: {"train": Counter(), "val": Counter()})


def find_sources(inputs: Iterable[str]) -> list[Source]:
    """Expands files, directories and glob patterns (** too), sorted. Raises ValueError for one that matches nothing."""
    sources, seen = [], set()
    for given in inputs:
        code = Source(given)  # thousands of Python files are one source
        found = False
        for top in _matches(given) or [Path(given)]:
            if not os.path.lexists(top):
                raise ValueError(f"--input {given}: no such file or directory (quote a pattern against the shell)")
            for path in sorted(_walk(top)) if top.is_dir() else [top]:
                found = True
                if not path.is_file():
                    raise ValueError(f"--input {given}: {path} is a link that leads nowhere, a pipe or a device")
                if (real := os.path.realpath(path)) in seen:
                    continue
                seen.add(real)
                if path.suffix.lower() == ".py":
                    code.files.append(path)
                else:
                    sources.append(Source(str(path), [path]))
        if not found:
            kinds = ", ".join(KINDS[:-1])
            raise ValueError(f"--input {given}: no {kinds} or {KINDS[-1]} file (or .gz, .xz or .zst of them) in it")
        if code.files:
            sources.append(code)
    return sources


def _matches(pattern: str) -> list[Path]:
    """What a pattern names. Unlike in `glob.glob`, "**" follows no links, whose loops might never end."""
    parts = Path(pattern).parts
    magic = next((i for i, part in enumerate(parts) if glob.has_magic(part)), None)
    if magic is None or os.path.lexists(pattern):
        return [Path(pattern)]
    base, hidden = Path(*parts[:magic]), any(part.startswith(".") for part in parts[magic:])
    found = base.glob("/".join(parts[magic:]))
    if not hidden:
        found = (path for path in found if not any(part.startswith(".") for part in path.relative_to(base).parts))
    return sorted(found, key=str)


def _walk(top: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(top):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        for name in names:
            if _kind(Path(name)) in KINDS and not name.startswith("."):
                yield Path(folder, name)


def _kind(path: Path) -> str:  # "a.TXT.xz" -> ".txt"
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower()


# ---- documents


@dataclass
class Reader:
    """Iterates over (source index, document) of all sources and knows how far it is."""

    sources: list[Source]
    max_document: int
    text_field: str = "text"
    encoding_errors: str = "strict"

    def __post_init__(self):
        self.done, self.file, self.total = 0, None, sum(f.stat().st_size for s in self.sources for f in s.files)

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
                        for text in self._documents(path):
                            if text and not text.isspace():
                                yield index, text
                except UnicodeDecodeError as error:
                    if path.suffix.lower() == ".py":  # test suites of tools that read Python have such files on purpose
                        source.skipped.add(path)
                        continue
                    raise _not_utf8(path, error) from error
                except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
                    if getattr(error, "filename", None):  # the file itself could not be opened
                        raise
                    what = "it is truncated or not what its name says"
                    raise ValueError(f"{path} cannot be decompressed ({error}); {what}") from error
                finally:
                    self.file = None
                    self.done += path.stat().st_size

    def _documents(self, path: Path) -> Iterator[str]:
        kind, errors = _kind(path), self.encoding_errors
        if kind in (".parquet", ".arrow", ".jsonl"):
            if kind == ".jsonl":
                items = files.json_lines(_lines(path, _decompressed(path, self.file), errors), path)
            else:
                items = _rows(path, self.file, self.text_field)
            for where, item in items:
                yield from split_documents([_field(item, self.text_field, where)], self.max_document, None)
        else:
            text = io.TextIOWrapper(_decompressed(path, self.file), encoding="utf-8", errors=errors, newline=None)
            separator = None if kind == ".py" else SEPARATOR
            blocks = iter(lambda: text.read(BLOCK if separator else -1), "")
            yield from split_documents(blocks, self.max_document, separator)


def _decompressed(path: Path, file) -> io.BufferedIOBase:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        pyarrow = _arrow(path)
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd"))
    return {".gz": gzip.open, ".xz": lzma.open}.get(suffix, lambda f: f)(file)


def _lines(path: Path, stream, errors: str) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        try:
            yield line.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{path}:{number}", error) from error


def _not_utf8(where: str | Path, error: UnicodeDecodeError) -> ValueError:
    what = f"{error.reason}, byte 0x{error.object[error.start]:02x}"
    return ValueError(f"{where} is not UTF-8 ({what}); convert it, or pass --encoding_errors replace")


def _field(item: object, name: str, where: str) -> str:
    """The text of a row, with the line ends of a text file. A name with dots leads into objects inside the row."""
    value = item
    for part in [name] if isinstance(item, dict) and name in item else name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, str):
        there = ", ".join(item) if isinstance(item, dict) else type(item).__name__
        raise ValueError(f"{where} has no text in field {name!r} (it has: {there}); pass --text_field")
    value = value.encode("utf-8", "replace").decode()  # "\ud800" alone is no character
    return value.replace("\r\n", "\n").replace("\r", "\n")


def split_documents(blocks: Iterable[str], max_document: int, separator: str | None = SEPARATOR) -> Iterator[str]:
    """Documents of a text given in blocks, without byte-order marks. The result does not depend on where blocks end.

    Holds one block and max_document characters. Pieces of a cut document join up to the document.
    """
    piece = max(1, min(2**16, max_document // 4))
    rest, cutting = "", False  # cutting: rest continues a document that was found too long

    def pieces(text, spare=0):
        """Pieces from the front, then the remainder, of which at most twice a piece and `spare` characters are left."""
        at = 0
        while len(text) - spare - at > 2 * piece:
            end = _cut(text, at, piece)
            yield text[at:end]
            at = end
        yield text[at:]

    for block in blocks:
        *whole, rest = (rest + block).split(separator) if separator else [rest + block]
        for text in whole:
            text = text if cutting else text.lstrip(MARK)
            yield from pieces(text) if cutting or len(text) > max_document else [text]
            cutting = False
        rest = rest if cutting else rest.lstrip(MARK)
        known = len(rest) - 2  # the last two characters may be the start of a separator
        cutting = cutting or known > max_document
        if cutting:
            *cut, rest = pieces(rest, spare=2)
            yield from cut
    yield from pieces(rest) if cutting or len(rest) > max_document else [rest]


def _cut(text: str, start: int, piece: int) -> int:
    for mark in ("\n\n", "\n", " "):
        at = text.rfind(mark, start + piece // 2, start + piece)
        if at >= 0:
            return at + len(mark)
    return start + piece


# ---- tables


def _arrow(path: Path, module: str = "pyarrow"):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{path}: reading it needs the package `pyarrow`: pip install -e '.[arrow]'") from None


def _rows(path: Path, file, name: str) -> Iterator[tuple[str, dict]]:
    """("PATH: row N", row with the column of the text) of a Parquet or Arrow file; one batch is in memory at a time."""
    pyarrow, number = _arrow(path), 0
    try:
        if _kind(path) == ".parquet":
            table = _arrow(path, "pyarrow.parquet").ParquetFile(file, pre_buffer=False)
            names, batches = table.schema_arrow.names, table.iter_batches(256, columns=[name])
        else:
            try:
                batches = _arrow(path, "pyarrow.ipc").open_stream(file)  # as `datasets` saves them
                names, position = batches.schema.names, file.tell()
                file.seek(-8, os.SEEK_END)
                if file.read() != b"\xff\xff\xff\xff\0\0\0\0":  # Arrow itself takes a missing end for the end
                    raise ValueError(f"{path} cannot be read: it is truncated")
                file.seek(position)
            except pyarrow.ArrowInvalid:
                file.seek(0)
                table = _arrow(path, "pyarrow.ipc").open_file(file)
                names, batches = table.schema.names, map(table.get_batch, range(table.num_record_batches))
        column = name if name in names else name.split(".")[0]
        if column not in names:
            raise ValueError(f"{path} has no column {name!r} (it has: {', '.join(names)}); pass --text_field")
        for batch in batches:
            for value in batch.column(column):
                number += 1
                yield f"{path}: row {number}", {column: value.as_py()}
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: row {max(1, number)} cannot be read ({error}); it is damaged") from error
