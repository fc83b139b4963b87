"""Atomic writes and JSON with checksums. Run: python -m pytest tests/test_files.py (CPU, no torch)"""

import json
import os

import pytest

from data import files


def test_a_failed_replace_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.replace(path, "old")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        files.replace(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


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
