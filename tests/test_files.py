"""Atomic writes and JSON with checksums. Run: python -m pytest tests/test_files.py (CPU, no torch)"""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data import files

ROOT = Path(__file__).parents[1]


def test_a_failed_replace_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.replace(path, "old")
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        files.replace(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_pipes_stay_and_directories_are_named(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.replace(pipe, "text")
    assert os.read(reader, 9) == b"text" and pipe.is_fifo()
    os.close(reader)
    with pytest.raises(IsADirectoryError, match=f"'{tmp_path}'"):
        files.replace(tmp_path, "text")


def test_every_changed_byte_of_a_signed_object_is_found(tmp_path):
    path = tmp_path / "a.json"
    value = {"loss": 2.5, "name": "gsm8k", "n": [1, 2], "none": None}
    files.write_json(path, value)
    content = path.read_bytes()
    assert files.read_json(path) == value
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        try:
            same = files.read_json(path)
        except (ValueError, UnicodeDecodeError) as error:
            assert str(path) in str(error)
        else:
            # White space between members, or the name of the checksum itself, which old files do not have.
            assert {k: v for k, v in same.items() if k in value} == value


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path / 'a.json'} is missing: download"):
        files.read_json(tmp_path / "a.json", "download it")
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=f"^{tmp_path / 'a.txt'} is damaged .*: download"):
        files.read_text(tmp_path / "a.txt", "download it")


@pytest.mark.parametrize("line", ["{", "[1]", "[" * 100_000, '{"a": 1, "crc": "00000000"}', "\udcff"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line.encode("utf-8", "surrogateescape") + b'\n{"a": 2}\n')
    with pytest.raises(ValueError, match=f"{path}:2"):
        files.read_rows(path)


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    files.append(path, [{"a": 1}, {"a": 2}], signed=True, sync=True)
    whole = path.stat().st_size
    with open(path, "a") as file:
        file.write(json.dumps({"a": 3})[:-2])
    assert files.read_rows(path) == ([{"a": 1}, {"a": 2}], whole)


def test_names_that_are_numbers_and_deep_values_are_checked_as_they_are_read(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"accuracy": {2: 0.5, 10: 0.25}, "pair": (1, 2)})
    assert files.read_json(path) == {"accuracy": {"2": 0.5, "10": 0.25}, "pair": [1, 2]}
    for depth in range(100, 1100, 50):  # beyond the parser's depth, and just below it
        path.write_text('{"crc": "00000000", "a": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(ValueError, match=f"{path} is damaged"):
            files.read_json(path)


def test_lines_of_other_people():
    lines = ['\ufeff{"a": 1}\r\n', "\n", "\ufeff\n", '{"a": 2}']
    assert list(files.json_lines(lines, "x.jsonl")) == [("x.jsonl:1", {"a": 1}), ("x.jsonl:4", {"a": 2})]
    for bad in ("{", "[" * 100_000, "9" * 5000):
        with pytest.raises(ValueError, match="x.jsonl:2 is damaged.*correct that line"):
            list(files.json_lines(['{"a": 1}', bad], "x.jsonl"))


REPLACING = """
import sys
from data import files
for i in range(150):
    files.replace(sys.argv[1], f"{sys.argv[2]} {i}")
"""


def test_processes_that_replace_one_file_do_not_take_each_others_work_for_remains(tmp_path):
    flags = [sys.executable, "-c", REPLACING, str(tmp_path / "a.json")]
    children = [subprocess.Popen([*flags, str(i)], cwd=ROOT, stderr=subprocess.PIPE) for i in range(4)]
    for child in children:
        assert not child.communicate()[1] and child.returncode == 0
    assert os.listdir(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text().endswith(" 149")


def test_remains_are_locked_while_they_are_removed(tmp_path, monkeypatch):
    """Otherwise their owner could lock one after it was found, and lose it."""
    left, remove, locked = tmp_path / ".a.json.4711.tmp", files._remove, []
    left.touch()

    def checked(path):
        if path == left:
            with open(left) as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked.append(path)
        remove(path)

    monkeypatch.setattr(files, "_remove", checked)
    files.replace(tmp_path / "a.json", "new")
    assert locked == [left] and os.listdir(tmp_path) == ["a.json"]


def test_without_locks_files_are_written_and_nothing_is_removed(tmp_path, monkeypatch):
    """On a file system that has none."""
    (tmp_path / ".a.json.4711.tmp").touch()
    refuse = lambda *_: (_ for _ in ()).throw(OSError("no locks here"))
    monkeypatch.setattr("data.files.fcntl.flock", refuse)
    files.replace(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new" and len(os.listdir(tmp_path)) == 2


KILLED = """
import os, signal, sys
from data import files
with files.temporary(sys.argv[1], directory=sys.argv[2] == "True") as path:
    print(path, flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("directory", [False, True])
def test_remains_of_killed_processes_are_removed_and_of_living_ones_kept(tmp_path, directory):
    target = tmp_path / "a.b"
    others = [".a.12345678.tmp", ".a.b.c.12345678.tmp", ".a.b.12345678.swp", ".xa.b.12345678.partial"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".a.b.4711.tmp").touch()  # of an earlier version
    command = [sys.executable, "-c", KILLED, str(target), str(directory)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    theirs = child.stdout.readline().strip()
    with files.temporary(target, directory):
        assert os.path.exists(theirs) and len(os.listdir(tmp_path)) == len(others) + 2
    child.communicate("die\n")
    assert child.returncode == -signal.SIGKILL and os.path.exists(theirs)
    files.replace(target, "new")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "a.b"]) and target.read_text() == "new"
