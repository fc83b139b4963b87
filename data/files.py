"""Atomic writes of files, and JSON whose damage is noticed.

    replace("run/results.json", text)  # appears whole or not at all
    append("run/metrics.jsonl", [{"step": 1, "loss": 2.5}])
    rows, length = read_rows("run/metrics.jsonl")  # length in bytes, without a last line that a kill cut off

A signed JSON object carries a CRC-32 of its other members under "crc". Objects without one are accepted as they are.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
import zlib
from contextlib import ExitStack, contextmanager
from pathlib import Path

CRC, RESTORE = "crc", "restore it from a copy"


def replace(path, content):
    """Replace a file by a text or bytes. A failure leaves the old one unchanged. Devices and pipes are just written."""
    path, content = Path(path), content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    with temporary(path) as tmp:
        with open(tmp, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    sync_directory(path.parent)


@contextmanager
def temporary(target, directory=False):
    """A new hidden file or directory beside `target`, to be filled and renamed; if it is not renamed, it is removed.

    It is locked while its process lives. Unlocked ones for the same target, left by killed processes, are removed."""
    target = Path(target)
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]+\.(tmp|partial)")
    for left in list(target.parent.iterdir()):
        if pattern.fullmatch(left.name):
            with _locked(left, wait=False) as held:
                if held:
                    _remove(left)
    while True:
        path = target.with_name(f".{target.name}.{secrets.token_hex(4)}.{'partial' if directory else 'tmp'}")
        path.mkdir() if directory else path.touch(exist_ok=False)
        with _locked(path):
            if path.exists():  # otherwise another process took it for a remnant before it was locked
                try:
                    yield path
                except OSError as error:  # on a full disk it names no file
                    if error.errno and not error.filename:
                        error.filename = str(target)
                    raise
                finally:
                    _remove(path)
                return


@contextmanager
def _locked(path, wait=True):
    """Yields whether it got the lock. It does not if the path is gone, another process has the lock, or the file system
    has no locks."""
    with ExitStack() as stack:
        try:
            handle = os.open(path, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except OSError:
            held = False
        yield held


def _remove(path):
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def sync_directory(path):
    """Flush a directory, so that a rename in it survives a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _crc(members):
    return f"{zlib.crc32(json.dumps(members, sort_keys=True).encode()):08x}"


def sign(value):
    """The same JSON object with the checksum of its members."""
    members = json.loads(json.dumps(value))  # as it will be read, with strings as names
    members.pop(CRC, None)
    return {**value, CRC: _crc(members)}


def check(value, where, remedy=RESTORE):
    """The members of a JSON object without its checksum. ValueError naming `where` if it is no object or was
    changed."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: holds a {type(value).__name__}, no JSON object; {remedy}")
    members = {name: member for name, member in value.items() if name != CRC}
    try:
        damaged = CRC in value and value[CRC] != _crc(members)
    except RecursionError:
        damaged = True
    if damaged:
        raise ValueError(f"{where} is damaged: its checksum differs; {remedy}")
    return members


def parse(text, where, remedy=RESTORE):
    """The value of a JSON text; a byte-order mark is ignored. ValueError naming `where` if it is not JSON."""
    try:
        return json.loads(text.removeprefix("\ufeff") if isinstance(text, str) else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged ({error}): {remedy}") from None


def json_lines(lines, path, remedy="correct that line"):
    """("PATH:NUMBER", JSON value) of each line that is not blank."""
    for number, line in enumerate(lines, 1):
        if line.strip("\ufeff \t\r\n"):
            where = f"{path}:{number}"
            yield where, parse(line, where, remedy)


def read_text(path, remedy=RESTORE):
    """The text of a UTF-8 file. FileNotFoundError, or ValueError naming it."""
    try:
        return Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from None


def read_json(path, remedy=RESTORE):
    """The JSON object of a file, whose checksum is right if it has one. FileNotFoundError, or ValueError naming it."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} is missing: {remedy}")
    return check(parse(Path(path).read_bytes(), str(path), remedy), str(path), remedy)


def write_json(path, value, signed=True):
    """Replace a file by a JSON object, with its checksum."""
    replace(path, json.dumps(sign(value) if signed else value, indent=2) + "\n")


def append(path, rows, signed=False, sync=False):
    """Append JSON lines in one write. sync: wait for the disk."""
    lines = "".join(json.dumps(sign(row) if signed else row) + "\n" for row in rows)
    with open(path, "a") as file:
        file.write(lines)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def read_rows(path, remedy="remove that line"):
    """(rows of a JSON-lines file without their checksums, bytes of its complete lines).

    A last line without its line end was cut off by a kill and is left out. ValueError names a line damaged otherwise.
    """
    content = Path(path).read_bytes()
    whole, rows = content.rfind(b"\n") + 1, []
    for number, line in enumerate(content[:whole].split(b"\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            rows.append(check(parse(line, where, remedy), where, remedy))
    return rows, whole
