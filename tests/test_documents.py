"""Parquet, Arrow and Zstandard as input of data.prepare: python -m pytest tests/test_documents.py (needs pyarrow)"""

import json
import sys
import tracemalloc

import pytest

from data import documents, shards, tokenizer
from data.prepare import main

pyarrow = pytest.importorskip("pyarrow")
parquet, ipc = (pytest.importorskip(f"pyarrow.{name}") for name in ("parquet", "ipc"))
TEXTS = [f"text {i}, naïve\r\nwith two lines " * (1 + i % 5) for i in range(1000)]
CLEAN = [text.replace("\r\n", "\n") for text in TEXTS]


def read(*inputs, **options):
    return list(documents.read(documents.find_files(inputs), 10**6, **options))


def table(texts=TEXTS):
    nested = [{"body": {"text": text, "n": i}, "id": i} for i, text in enumerate(texts)]
    return pyarrow.table({"id": range(len(texts)), "text": texts, "a.b": texts, "meta": nested})


def write_arrow(path, rows, make=ipc.new_stream):
    with make(str(path), rows.schema) as writer:
        writer.write_table(rows, max_chunksize=100)


def compress(path, content):
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(content)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.mark.parametrize("field", ["text", "a.b", "meta.body.text"])
def test_all_formats_give_the_same_texts(folder, field):
    parquet.write_table(table(), folder / "a.parquet", row_group_size=150)
    write_arrow(folder / "data-00000-of-00001.arrow", table())  # as datasets.save_to_disk writes it
    write_arrow(folder / "file.ARROW", table(), ipc.new_file)
    rows = table().to_pylist()
    compress(folder / "x.jsonl.zst", "\n".join(map(json.dumps, rows)).encode())
    (folder / "state.json").write_text("{}")
    for path in folder.iterdir():
        if path.name != "state.json":
            assert read(path, text_field=field) == CLEAN, path.name
    assert read(folder, text_field=field) == CLEAN * 4
    compress(folder / "y.TXT.ZST", "".join(TEXTS).encode())
    assert read(folder / "y.TXT.ZST") == ["".join(CLEAN)]


@pytest.mark.parametrize(
    "field, there", [("meta.body.txt", "id, text, a.b, meta"), ("body.text", "id, text, a.b, meta")]
)
def test_a_field_that_is_not_there_is_named(folder, field, there):
    parquet.write_table(table(), folder / "a.parquet")
    write_arrow(folder / "b.arrow", table())
    for path in folder.iterdir():
        with pytest.raises(ValueError, match=rf"{path}.* has no (field|column) {field!r} \(it has: .*meta\); pass"):
            read(path, text_field=field)


def test_prepare_reads_them(folder, tmp_path):
    parquet.write_table(table(), folder / "a.parquet")
    (tmp_path / "tok").mkdir()
    tokenizer.save(tokenizer.word_tokenizer([" text", " with"]), tmp_path / "tok")
    main([str(folder), f"--out={tmp_path / 'd'}", f"--tokenizer={tmp_path / 'tok'}", "--val_fraction=0.1"])
    splits = shards.read_meta(tmp_path / "d")["splits"]
    assert splits["train"]["documents"] + splits["val"]["documents"] == 1000 and splits["val"]["documents"] > 50


def test_errors_name_file_and_row(folder):
    path = folder / "a.parquet"
    parquet.write_table(table([*TEXTS[:700], None, *TEXTS[:9]]), path)
    write_arrow(folder / "a.arrow", table([*TEXTS[:700], None]))
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(ValueError, match=f"{name}: row 701: text=None: a text is needed"):
            read(folder / name)
        for field in ("txt", "txt.body"):
            with pytest.raises(ValueError, match=f"{name} has no column '{field}' .it has: id, text, a.b, meta.; pass"):
                read(folder / name, text_field=field)
        with pytest.raises(ValueError, match=f"{name}: row 1: meta.body={{'text'.*: a text is needed"):
            read(folder / name, text_field="meta.body")
    twice = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(twice, folder / "t.parquet")
    write_arrow(folder / "t.arrow", twice)
    for name in ("t.parquet", "t.arrow"):
        with pytest.raises(ValueError, match=f"{name} has several columns 'text'; rename all but one"):
            read(folder / name)
    raw = pyarrow.array([b"fine", b"gr\xfcn"], pyarrow.binary()).view(pyarrow.string())
    write_arrow(folder / "b.arrow", pyarrow.table({"text": raw}))
    with pytest.raises(ValueError, match="b.arrow: row 2 cannot be read"):
        read(folder / "b.arrow")
    compress(folder / "c.jsonl.zst", b'{"text": "x"}\n{"text"')
    with pytest.raises(ValueError, match="c.jsonl.zst:2 is damaged"):
        read(folder / "c.jsonl.zst")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.zst", "a.txt.zst"])
def test_damaged_files_are_named(folder, name):
    path = folder / name
    if name.endswith(".parquet"):
        parquet.write_table(table(), path)
    elif name.endswith(".arrow"):
        write_arrow(path, table())
    else:
        compress(path, "\n".join(json.dumps({"text": text}) for text in TEXTS).encode())
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"no such format " * 20, b"", b"abc", content[:-1]):
        path.write_bytes(damaged)
        if damaged or name in ("a.parquet", "a.arrow"):
            with pytest.raises(ValueError, match=f"{name}(: row 1)? cannot be|{name}: row [0-9]+ cannot be read") as e:
                read(path)
            assert name != "a.arrow" or "Invalid argument" not in str(e.value)


@pytest.mark.parametrize("name", ["a.parquet.zst", "a.arrow.zst"])
def test_a_table_that_was_compressed_as_a_file_is_named(folder, name):
    parquet.write_table(table(), folder / "whole")
    compress(folder / name, (folder / "whole").read_bytes())
    with pytest.raises(ValueError, match=f"{name}': {name[1:-4]} files are read as they are; decompress it"):
        read(folder)


def test_an_arrow_stream_cut_between_two_batches_is_damaged(folder):
    """To Arrow it is a shorter one."""
    write_arrow(folder / "a.arrow", table())
    content, end = (folder / "a.arrow").read_bytes(), b"\xff\xff\xff\xff"
    assert content.endswith(end + bytes(4)) and content.count(end) > 10
    (folder / "a.arrow").write_bytes(content[: content.rindex(end, 0, -8)])
    with ipc.open_stream(str(folder / "a.arrow")) as stream:
        assert stream.read_all().num_rows == 900
    with pytest.raises(ValueError, match="a.arrow cannot be read: it is truncated"):
        read(folder / "a.arrow")


def test_zstd_files_of_several_frames_are_read_to_the_end(folder):
    for i in range(3):
        compress(folder / f"{i}.zst.part", f"text {i}\n".encode())
    (folder / "x.txt.zst").write_bytes(b"".join((folder / f"{i}.zst.part").read_bytes() for i in range(3)))
    assert read(folder / "x.txt.zst") == ["text 0\ntext 1\ntext 2\n"]


def test_memory_does_not_grow_with_the_file(folder):
    long = [text * 20 for text in TEXTS] * 4
    write_arrow(folder / "a.arrow", table(long))
    parquet.write_table(table(long), folder / "a.parquet", row_group_size=100)
    for name in ("a.arrow", "a.parquet"):
        before, most = pyarrow.total_allocated_bytes(), 0
        tracemalloc.start()
        for _ in documents.read([folder / name], 10**6):
            most = max(most, pyarrow.total_allocated_bytes() - before)
        most += tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 3e6 < sum(map(len, long)) / 2


def test_without_pyarrow_the_message_names_the_remedy(folder, monkeypatch):
    parquet.write_table(table(), folder / "a.parquet")
    compress(folder / "b.txt.zst", b"text")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("a.parquet", "b.txt.zst"):
        with pytest.raises(
            ValueError, match=rf"{name}: reading it needs the package `pyarrow`: pip install -e '.\[arrow\]'"
        ):
            read(folder / name)
