"""Reads documents from files as a stream: text, source code, JSON lines, Parquet and Arrow."""

import gzip
import importlib
import io
import lzma
import os
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

from data import files
from optimoe.config import require

EXPANSION = {".xz": 4.3, ".gz": 3.3, ".zst": 3.3, ".parquet": 2.0}  # typical bytes of text per byte on disk
UTF16 = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")  # byte-order marks, of UTF-32 too
ROWS = (".jsonl", ".parquet", ".arrow")
CODE = ".py .c .h .cc .cpp .hpp .cu .cuh .java .js .jsx .ts .tsx .rs .go .rb .php .sh .sql .html .css".split()
KINDS = (".txt", ".md", ".rst", *ROWS, *CODE)


def find_files(inputs, kinds=KINDS):
    """Paths of named files, and of files of these kinds in named directories; what these leave out is printed.
    ValueError for a name that gives none."""
    found = {}  # keys: paths after links, so that no file is read twice
    for given in map(Path, inputs):
        there = sorted(path for path in given.rglob("*") if _seen(path, given)) if given.is_dir() else [given]
        paths = [path for path in there if path == given or _kind(path) in kinds]
        if not paths:
            raise ValueError(f"--input {given}: no {', '.join(kinds)} file in it, compressed or not")
        if other := Counter(_kind(path) or path.name for path in there if path != given and _kind(path) not in kinds):
            endings = ", ".join(ending for ending, _ in other.most_common(5))
            what = f"{other.total()} left out for their endings ({endings}{', ...' * (len(other) > 5)})"
            print(f"{given}: {what}; name those to be read", file=sys.stderr)
        for path in paths:
            if not path.is_file():
                raise ValueError(f"--input {path}: missing, a link that leads nowhere, a pipe or a device")
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def _seen(path, top):
    hidden = any(part.startswith((".", "__pycache__")) for part in path.relative_to(top).parts)
    return not hidden and not path.is_dir()


def _kind(path):  # "a.TXT.xz" -> ".txt"
    return (path.with_suffix("") if path.suffix.lower() in (".xz", ".gz", ".zst") else path).suffix.lower()


def read(paths, length, text_field="text", encoding_errors="strict", example=None, doing=""):
    """Yields documents: rows of tables, and texts in pieces that end at the first line end after `length` characters.

    example(row, place): makes a document of a whole row; None: take its text_field. doing: printed every two seconds
    with the share of bytes read so far. ValueError names the file, and the row, that cannot be read."""
    done, total, shown = 0, max(1, sum(path.stat().st_size for path in paths)), time.monotonic()
    for path in paths:
        with open(path, "rb") as file:
            try:
                for text in _documents(path, file, length, text_field, encoding_errors, example):
                    if text and not text.isspace():
                        yield text
                        if doing and time.monotonic() - shown > 2:
                            shown = time.monotonic()
                            print(f"{doing} {(done + file.tell()) / total:4.0%}", file=sys.stderr)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error) from error
            except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
                raise ValueError(f"{path} cannot be decompressed ({error}): it is truncated or misnamed") from error
        done += path.stat().st_size


def _documents(path, file, length, text_field, errors, example):
    kind = _kind(path)
    if kind == ".jsonl":
        rows = files.json_lines(_lines(path, file, errors), path)
    elif kind in (".parquet", ".arrow"):
        require(path.suffix.lower() == kind, "file", str(path), f"{kind} files are read as they are; decompress it")
        rows = _rows(path, file, None if example else text_field)
    elif example:
        raise ValueError(f"{path}: examples are rows of .jsonl, .parquet or .arrow files")
    else:
        stream = io.TextIOWrapper(_decompressed(path, file), encoding="utf-8-sig", errors=errors)
        _refuse_utf16(stream.buffer.peek(4), path)
        while text := stream.read(length):
            text += stream.readline(length)
            _refuse_utf16(text, path)
            yield text
        return
    for where, row in rows:
        yield example(row, where) if example else _field(row, text_field, where)


def _decompressed(path, file):
    suffix = path.suffix.lower()
    if suffix in (".gz", ".zst") and not path.stat().st_size:  # the libraries would read an empty text
        raise EOFError("it has 0 bytes")
    if suffix == ".zst":
        pyarrow = _arrow(path)
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd"))
    return {".gz": gzip.open, ".xz": lzma.open}.get(suffix, lambda f: f)(file)


def _lines(path, file, errors):
    for number, line in enumerate(_decompressed(path, file), 1):
        _refuse_utf16(line, f"{path}:{number}")
        try:
            yield line.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{path}:{number}", error) from error


def _refuse_utf16(text, where):
    """ValueError for bytes that begin with another byte-order mark, or a text with the NULs of UTF-16 in it. Real books
    have a few: a piece may have one NUL, a long piece one in a hundred characters."""
    if isinstance(text, bytes) and text.startswith(UTF16):
        raise ValueError(f"{where} is UTF-16 or UTF-32; convert it to UTF-8")
    if text.count(b"\0" if isinstance(text, bytes) else "\0") > max(1, len(text) / 100):
        raise ValueError(f"{where} has NUL characters: it is UTF-16 or no text; convert it to UTF-8 or leave it out")


def _not_utf8(where, error):
    what = f"{error.reason}, byte 0x{error.object[error.start]:02x}"
    return ValueError(f"{where} is not UTF-8 ({what}); convert it, or pass --encoding_errors replace")


def _field(row, name, where):
    """The text in the field `name` of a row; a.b is the field b of the object a."""
    require(isinstance(row, dict), where, row, "a JSON object on one line is needed; correct the file")
    value = row
    for part in [name] if name in row else name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"{where} has no field {name!r} (it has: {', '.join(row)}); pass --text_field")
        value = value[part]
    require(isinstance(value, str), f"{where}: {name}", value, "a text is needed; correct or remove this row")
    value = value.encode("utf-8", "replace").decode()  # "\ud800" alone is no character
    return value.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _arrow(path, module="pyarrow"):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{path}: reading it needs the package `pyarrow`: pip install -e '.[arrow]'") from None


def _rows(path, file, name):
    """Yields ("PATH: row N", {column: value}) of a Parquet or Arrow file, a batch in memory at a time: only the column
    of the field `name`, or all columns if it is None."""
    pyarrow, number = _arrow(path), 0
    try:
        if _kind(path) == ".parquet":
            table = _arrow(path, "pyarrow.parquet").ParquetFile(file, pre_buffer=False)
            names, leaves = table.schema_arrow.names, [table.schema.column(i).path for i in range(len(table.schema))]
            there = name and any(f"{leaf}.".startswith(f"{name}.") for leaf in leaves)  # else read the whole column
            batches = table.iter_batches(256, columns=name and [name if there else name.split(".")[0]])
        elif file.read(6) == b"ARROW1":
            table = _arrow(path, "pyarrow.ipc").open_file(file)
            names, batches = table.schema.names, map(table.get_batch, range(table.num_record_batches))
        else:  # a stream, as `datasets` saves it; Arrow itself does not notice a missing end
            file.seek(max(0, path.stat().st_size - 8))
            if file.read() != b"\xff\xff\xff\xff\0\0\0\0":
                raise ValueError(f"{path} cannot be read: it is truncated")
            file.seek(0)
            batches = _arrow(path, "pyarrow.ipc").open_stream(file)
            names = batches.schema.names
        columns = names if name is None else [name if name in names else name.split(".")[0]]
        for column in (column for column in columns if names.count(column) > 1):
            raise ValueError(f"{path} has several columns {column!r}; rename all but one")
        if not set(columns) <= set(names):
            raise ValueError(f"{path} has no column {name!r} (it has: {', '.join(names)}); pass --text_field")
        for batch in batches:
            for i in range(batch.num_rows):
                number += 1
                yield f"{path}: row {number}", {column: batch.column(column)[i].as_py() for column in columns}
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: row {max(1, number)} cannot be read ({error}); it is damaged") from error
