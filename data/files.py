"""Files that are whole or absent, and JSON that says when it was damaged. Everything that is read back goes through here.

    replace("run/results.json", text)                      # appears whole or not at all
    append("run/metrics.jsonl", [{"step": 1, "loss": 2.5}])
    rows, torn = read_rows("run/metrics.jsonl")

A signed JSON object carries a CRC-32 of its other members under "crc". Objects written before signatures existed have none
and are accepted as they are.
"""

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

CRC = "crc"


def replace(path: str | Path, content: str | bytes) -> None:
    """Write a file through a temporary one, flush it to the disk and rename it. A failure leaves the old file as it was."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except OSError:
        tmp.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: str | Path) -> None:
    """Flush a directory, so that a rename in it survives a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _crc(value: dict) -> str:
    members = {name: member for name, member in value.items() if name != CRC}
    return f"{zlib.crc32(json.dumps(members, sort_keys=True).encode()):08x}"


def sign(value: dict) -> dict:
    """The same JSON object with the checksum of its members."""
    return {**value, CRC: _crc(value)}


def check(value: object, where: str, remedy: str = "restore it from a copy") -> dict:
    """The members of a JSON object without its checksum. ValueError naming `where` if it is no object or was changed."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: holds a {type(value).__name__} instead of a JSON object; {remedy}")
    if CRC in value and value[CRC] != _crc(value):
        raise ValueError(f"{where} is damaged: its checksum differs; {remedy}")
    return {name: member for name, member in value.items() if name != CRC}


def parse(text: str | bytes, where: str, remedy: str = "restore it from a copy") -> object:
    """A JSON value; ValueError naming `where` for broken JSON, broken UTF-8 and nesting too deep for the parser."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged ({error}): {remedy}") from None


def read_json(path: str | Path, remedy: str = "restore it from a copy") -> dict:
    """The JSON object of a file, its checksum compared where it has one. FileNotFoundError, or ValueError naming the file."""
    return check(parse(Path(path).read_bytes(), str(path), remedy), str(path), remedy)


def write_json(path: str | Path, value: dict, signed: bool = True) -> None:
    """Replace a file by a JSON object that is easy to read, with its checksum."""
    replace(path, json.dumps(sign(value) if signed else value, indent=2) + "\n")


def append(path: str | Path, rows: Iterable[dict], signed: bool = False, sync: bool = False) -> None:
    """Append JSON lines in one write. sync: return only when they are on the disk."""
    lines = "".join(json.dumps(sign(row) if signed else row) + "\n" for row in rows)
    with open(path, "a") as file:
        file.write(lines)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def read_rows(path: str | Path, remedy: str = "remove that line") -> tuple[list[dict], int]:
    """(rows of a JSON-lines file without their checksums, length in bytes of what was whole).

    A last line without its line end was torn by a kill and is left out. Any other damage is a ValueError naming file and line.
    """
    content = Path(path).read_bytes()
    whole = content.rfind(b"\n") + 1
    rows = []
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
        if line.strip():
            where = f"{path}:{number}"
            rows.append(check(parse(line, where, remedy), where, remedy))
    return rows, whole
