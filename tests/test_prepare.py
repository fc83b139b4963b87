import glob
import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from data import prepare as module
from data import shards, tokenizer
from data.documents import ROWS, find_files, read
from data.loader import Loader
from data.prepare import Config, hashed, main

pytest.importorskip("tokenizers")

ROOT = Path(module.__file__).parents[1]

WORDS = "the a goose geese river counted seven 1987 silently, quickly. naïve 漢字 'quoted' (and) so-called\n".split(" ")
WORDS += ["".join(random.Random(i).choices("abcdefgh", k=5)) for i in range(200)]


def lines(texts, **options):
    return "\n".join(json.dumps({"text": text}, **options) for text in texts)


def expand(inputs):
    """What a shell makes of patterns."""
    return [path for given in map(str, inputs) for path in sorted(glob.glob(given)) or [given]]


def prepare(inputs, out, **options):
    return module.prepare(Config(tuple(expand(inputs)), str(out), **options))


def text(n_words, seed):
    return f"{seed} " + " ".join(random.Random(seed).choices(WORDS, k=n_words))


def documents(directory, split):
    """The texts of a split, decoded."""
    enc = tokenizer.load(directory)
    if split not in shards.read_meta(directory)["splits"]:
        return []
    ids = np.concatenate(shards.open_shards(directory, split))
    ends = np.flatnonzero(ids == enc.eot_token)
    assert ends[-1] == len(ids) - 1
    return [enc.decode(part[part != enc.eot_token].tolist()) for part in np.split(ids, ends[:-1] + 1)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """One of each kind of input, and the documents that are in it."""
    top = tmp_path_factory.mktemp("corpus")
    docs = [text(60, i) for i in range(120)]
    for i, d in enumerate(docs[:20]):
        (top / f"a{i:02}.txt").write_text(d, newline="")
    for i, d in enumerate(docs[20:40]):
        with gzip.open(top / f"b{i:02}.txt.gz", "wt", newline="") as f:
            f.write("\ufeff" + d.replace("\n", "\r\n"))
    for i, d in enumerate(docs[40:60]):
        with lzma.open(top / f"c{i:02}.txt.xz", "wt", newline="") as f:
            f.write(d)
    (top / "d.jsonl").write_text(lines(docs[60:70]) + "\n\n")
    with gzip.open(top / "e.jsonl.gz", "wt") as f:
        f.write(lines(docs[70:75]))
    with lzma.open(top / "f.jsonl.xz", "wt") as f:
        f.write(lines(docs[75:80]))
    for i, d in enumerate(docs[80:]):
        path = top / "src" / f"package{i % 3}" / f"m{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {d}")
    for name in ("__pycache__/x.py", ".hidden/y.py", "empty.py", "picture.png"):
        (top / "src" / name).parent.mkdir(exist_ok=True)
        (top / "src" / name).write_text("" if name == "empty.py" else "must not be read")
    return top, docs[:80] + [f"# {d}" for d in docs[80:]]


def test_every_kind_of_input(corpus, tmp_path, capsys):
    top, docs = corpus
    meta = prepare(
        [f"{top}/*.txt*", f"{top}/*.jsonl*", f"{top}/src"],
        tmp_path / "d",
        vocab_size=600,
        val_fraction=0.2,
    )
    train, val = documents(tmp_path / "d", "train"), documents(tmp_path / "d", "val")
    assert sorted(train + val) == sorted(docs) and 5 < len(val) < 50
    assert [d for d in val if d in docs[:80]] == [d for d in docs[:80] if d in val], "not in the order of the input"
    assert all((hashed(d, 0) < 0.2) == (d in set(val)) for d in docs)

    assert meta == shards.read_meta(tmp_path / "d")
    assert meta["vocab_size"] == 600 and len(meta["input"]) == 64
    out = capsys.readouterr().out
    for split, texts in (("train", train), ("val", val)):
        assert meta["splits"][split]["documents"] == len(texts)
        assert meta["splits"][split]["bytes"] == sum(len(t.encode()) for t in texts)
        assert f"{split}: {len(texts):,} documents" in out
    assert "vocabulary 600" in out


def test_same_input_same_bytes(corpus, tmp_path, monkeypatch):
    top, _ = corpus
    for name, workers, block in (("a", 1, 2**20), ("b", 4, 500)):
        monkeypatch.setattr(module.os, "sched_getaffinity", lambda _, n=workers: range(n), raising=False)
        monkeypatch.setattr(module, "BLOCK", block)
        prepare([f"{top}/*.xz", f"{top}/src"], tmp_path / name, vocab_size=400)
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab")
    assert a == b and len(a) == 4


def test_documents_stay_on_their_side(corpus, tmp_path):
    top, docs = corpus
    (tmp_path / "once.jsonl").write_text(lines(docs[:20]))
    (tmp_path / "twice.jsonl").write_text(lines(docs[:20] + docs[:20]))
    options = dict(vocab_size=300, val_fraction=0.25)
    prepare([tmp_path / "once.jsonl"], tmp_path / "one", **options)
    prepare([tmp_path / "once.jsonl", tmp_path / "twice.jsonl", f"{top}/*.xz"], tmp_path / "more", **options)
    prepare([tmp_path / "once.jsonl"], tmp_path / "seed", **options, seed=1)
    one, more, seed = (set(documents(tmp_path / name, "val")) for name in ("one", "more", "seed"))
    assert one and one == more & set(docs[:20]) and one != seed
    assert not more & set(documents(tmp_path / "more", "train"))


def test_one_long_file_is_split_at_lines(tmp_path):
    content = "\n".join(text(20, i).replace("\n", " ") for i in range(600))
    (tmp_path / "book.txt").write_text(content)
    meta = prepare([str(tmp_path / "book.txt")], tmp_path / "d", vocab_size=500, val_fraction=0.05)
    train, val = documents(tmp_path / "d", "train"), documents(tmp_path / "d", "val")
    assert len(train) > 10 and len(val) >= 1 and meta["splits"]["val"]["bytes"] < 0.3 * len(content.encode())
    assert all(piece.endswith("\n") or content.endswith(piece) for piece in train + val)
    assert sum(map(len, train + val)) == len(content) and all(piece in content for piece in train + val)


def test_something_is_always_held_out(tmp_path):
    (tmp_path / "x.jsonl").write_text(lines(["one", "two", "three"]))
    splits = prepare([tmp_path / "x.jsonl"], tmp_path / "d", vocab_size=260, val_fraction=1e-9)["splits"]
    assert splits["val"]["documents"] == 1
    assert "val" not in prepare([tmp_path / "x.jsonl"], tmp_path / "e", vocab_size=260, val_fraction=0)["splits"]
    with pytest.raises(ValueError, match="nothing to train on"):
        prepare([tmp_path / "x.jsonl"], tmp_path / "f", vocab_size=260, val_fraction=0.999999)
    for name in ("y.txt", "z.txt"):
        (tmp_path / name).write_text("only one")
    with pytest.raises(ValueError, match="val_fraction=0.01: the input is one document"):
        prepare([str(tmp_path / "y.txt")], tmp_path / "f", vocab_size=260)
    with pytest.raises(ValueError, match="val_fraction=0.01: all documents are equal"):
        prepare([tmp_path / "y.txt", tmp_path / "z.txt"], tmp_path / "f", vocab_size=260)
    (tmp_path / "z.txt").unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "e", "x.jsonl", "y.txt"]


def test_long_texts_are_cut_at_line_ends_and_rows_are_not(tmp_path):
    content = "".join(f"line {i}, naïve\n" for i in range(500)) + "x" * 1000
    (tmp_path / "a.txt").write_text(content)
    pieces = list(read([tmp_path / "a.txt"], 100))
    assert "".join(pieces) == content and all(100 < len(piece) <= 200 for piece in pieces[:-1])
    assert all(piece.endswith("\n") for piece in pieces[:-10]) and len(pieces) > 70
    (tmp_path / "b.jsonl").write_text(lines([content]))
    assert list(read([tmp_path / "b.jsonl"], 100)) == [content]


def test_a_few_nuls_are_text(tmp_path):
    """As in scanned books, also in the short piece at the end of a file."""
    content = ("x" * 150 + "\0" + "y" * 149 + "\n") * 3 + "the \0 end\n"
    (tmp_path / "a.txt").write_text(content)
    assert "".join(read([tmp_path / "a.txt"], 200)) == content
    prepare([str(tmp_path / "a.txt")], tmp_path / "d", vocab_size=270, val_fraction=0)
    assert documents(tmp_path / "d", "train") == [content]


def test_an_existing_tokenizer_is_reused_and_mixes(corpus, tmp_path):
    top, _ = corpus
    prepare([f"{top}/*.txt"], tmp_path / "a", vocab_size=400)
    prepare([f"{top}/*.jsonl"], tmp_path / "b", tokenizer=str(tmp_path / "a"))
    prepare([f"{top}/*.jsonl"], tmp_path / "c", vocab_size=300)
    assert documents(tmp_path / "b", "train")[0] in corpus[1]
    tokens, targets = Loader([(tmp_path / "a", 1.0), (tmp_path / "b", 2.0)], "train", 6, 32).next()
    assert tokens.shape == targets.shape == (6, 32)
    with pytest.raises(ValueError, match="tokenizer is not that of"):
        Loader([(tmp_path / "a", 1.0), (tmp_path / "c", 1.0)], "train", 6, 32)


def test_special_tokens_in_text_are_text(tmp_path):
    content = "before <|endoftext|> after"
    (tmp_path / "x.jsonl").write_text(
        "\n".join(json.dumps({"text": t}) for t in (content, "\ud800 half a pair", content + "2"))
    )
    prepare([str(tmp_path / "x.jsonl")], tmp_path / "d", vocab_size=270, val_fraction=0)
    assert documents(tmp_path / "d", "train") == [content, "? half a pair", content + "2"]


UTF16 = "is UTF-16 or UTF-32; convert it to UTF-8"
NULS = "has NUL characters: it is UTF-16 or no text"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.txt", "gr\xfcn\n".encode("latin-1"), r"x.txt is not UTF-8 \(.*0xfc\); convert it"),
        ("x.py", b"s = 'gr\xfcn'\n", r"x.py is not UTF-8 \(.*0xfc\); convert it"),
        ("x.jsonl", b'{"text": "fine"}\n{"text": "gr\xfcn"}', r"x.jsonl:2 is not UTF-8 \(.*0xfc\); convert it"),
        ("x.md", "grün\n".encode("utf-16"), f"x.md {UTF16}"),
        ("x.txt", "\ufeff漢字".encode("utf-16-be"), f"x.txt {UTF16}"),
        ("x.txt.gz", gzip.compress("abc".encode("utf-32"), mtime=0), f"x.txt.gz {UTF16}"),
        ("x.txt.xz", lzma.compress("abc\n".encode("utf-16-le")), f"x.txt.xz {NULS}"),
        ("x.txt", b"abc " * 9999 + ("d" * 999).encode("utf-16-le"), f"x.txt {NULS}"),
        ("x.jsonl", '{"text": "grün"}'.encode("utf-16"), f"x.jsonl:1 {UTF16}"),
        ("x.jsonl", '{"text": "grün"}'.encode("utf-16-le"), f"x.jsonl:1 {NULS}"),
        ("x.txt.xz", lzma.compress(b"abc " * 9999)[:-20], "x.txt.xz cannot be decompressed"),
        ("x.txt.gz", gzip.compress(text(9999, 0).encode(), mtime=0)[:-20], "x.txt.gz cannot be decompressed"),
        ("x.txt.gz", b"this is not gzip", "x.txt.gz cannot be decompressed"),
        ("x.jsonl", b'{"text": "fine"}\n{"text": "cut', r"x.jsonl:2 is damaged"),
        ("x.jsonl", b'{"text": "fine"}\n' + b"[" * 10**5, r"x.jsonl:2 is damaged .*recursion"),
        ("x.jsonl", b'{"text": "fine", "n": ' + b"9" * 5000 + b"}", r"x.jsonl:1 is damaged"),
        (
            "x.jsonl",
            b'{"text": "fine"}\n\n{"body": "b", "id": 3}',
            r"x.jsonl:3 has no field 'text' \(it has: body, id\); pass --text_field",
        ),
        ("x.jsonl", b'{"text": "fine"}\n{"text": null}', "x.jsonl:2: text=None: a text is needed"),
        ("x.jsonl", b'{"text": 3}', "x.jsonl:1: text=3: a text is needed"),
        ("x.jsonl", b'["text"]', r"x.jsonl:1=\['text'\]: a JSON object on one line is needed"),
        ("x.jsonl.gz", b"", "x.jsonl.gz cannot be decompressed .it has 0 bytes"),
        ("x.txt.zst", b"", "x.txt.zst cannot be decompressed .it has 0 bytes"),
        ("x.txt", b"\n  \n", "no text in the input"),
    ],
    ids=map(str, range(99)),
)
def test_bad_files_are_named_and_nothing_is_written(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.jsonl").write_text(lines(["good", "text"]))
    good = [] if "no text" in message else [str(tmp_path / "good.jsonl")]
    inputs = [*good, str(tmp_path / name)]
    for errors in ("strict",) if "not UTF-8" in message else ("strict", "replace"):
        with pytest.raises(ValueError, match=message):
            prepare(inputs, tmp_path / "d", vocab_size=260, encoding_errors=errors)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["good.jsonl", name])


def test_remedies_work(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"gr\xfcn blau")
    prepare([str(tmp_path / "x.txt")], tmp_path / "d", vocab_size=260, val_fraction=0, encoding_errors="replace")
    assert documents(tmp_path / "d", "train") == ["gr\ufffdn blau"]
    (tmp_path / "x.jsonl").write_text('{"body": "b"}')
    prepare([str(tmp_path / "x.jsonl")], tmp_path / "e", vocab_size=260, val_fraction=0, text_field="body")
    assert documents(tmp_path / "e", "train") == ["b"]


def test_command_line_errors(tmp_path):
    (tmp_path / "x.jsonl").write_text(lines(["one", "two"]))
    good = ["--input", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "d")]
    for extra, message in (
        (["--vocabsize", "300"], "unknown field 'vocabsize': did you mean 'vocab_size'?"),
        (["--vocab_size", "100"], "vocab_size=100: must be from 257"),
        (["--vocab_size", "1e12"], "vocab_size=1000000000000: must be from 257"),
        (["--val_fraction", "1.5"], "val_fraction=1.5: must be"),
        (["--vocab_size", "abc"], "vocab_size='abc': a whole number"),
        (["--vocab_size", "inf"], "vocab_size='inf': a whole number"),
        (["--seed", "-1"], "seed=-1: must be from 0"),
        (["--out", "/proc/x/d"], "out='/proc/x/d': nothing can be written to /proc/x"),
        (["--out", str(tmp_path / "x.jsonl")], "exists and is not empty"),
        (["--out", "a,b/d"], "out='a,b/d': --data of train.py has a comma between directories; use a name without one"),
        (["--tokenizer", "gpt9"], "gpt9"),
        (["--input", str(tmp_path / "*.text")], "*.text: missing"),
        (["--input", "/dev/zero"], "/dev/zero: missing, a link that leads nowhere, a pipe or a device"),
        (["--encoding_errors", "ignore"], "use one of strict, replace"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(good + extra)
        assert str(stop.value).startswith("error: ") and message in str(stop.value)
        assert "\n" not in str(stop.value), "more than one line"
    main(good + ["--vocab_size", "2.6e2"])
    before = (tmp_path / "d" / "meta.json").read_bytes()
    with pytest.raises(SystemExit, match="exists and is not empty; remove it"):
        main(good + ["--vocab_size", "258"])
    assert (tmp_path / "d" / "meta.json").read_bytes() == before


def test_inputs_as_words_and_with_commas(tmp_path):
    names = [str(tmp_path / f"{name}.txt") for name in "abc"]
    for name in names:
        Path(name).write_text(f"text of {name}")
    options = ["--vocab_size=260", "--val_fraction=0"]
    for i, given in enumerate((names, ["--input", *names], ["--input=" + ",".join(names)], [str(tmp_path)])):
        main([*given, f"--out={tmp_path / str(i)}", *options])
        assert len(documents(tmp_path / str(i), "train")) == 3


def test_links_that_lead_in_circles_or_nowhere(tmp_path):
    top = tmp_path / "top"
    (top / "deep").mkdir(parents=True)
    (top / "deep" / "x.txt").write_text("one")
    (top / "y.txt").write_text("two")
    for name in "abc":  # a search that follows them has 3^40 paths to go
        (top / name).symlink_to("..", target_is_directory=True)
        (top / "deep" / name).symlink_to(top, target_is_directory=True)
    for i, given in enumerate(([top], [top / "y.txt", top / "a" / "top" / "y.txt", top / "deep"], [top / "b", top])):
        prepare(given, tmp_path / str(i), vocab_size=260, val_fraction=0)
        assert sorted(documents(tmp_path / str(i), "train")) == ["one", "two"]
    for name, target in (("z.txt", "z.txt"), ("w.txt", "missing")):
        (top / name).symlink_to(target)
        for given in (top, top / name):
            with pytest.raises(ValueError, match=f"{name}: missing, a link that leads nowhere"):
                prepare([given], tmp_path / "d", vocab_size=260)
        (top / name).unlink()
    os.mkfifo(top / "pipe.txt")
    with pytest.raises(ValueError, match="pipe.txt: missing, a link that leads nowhere, a pipe"):
        prepare([top], tmp_path / "d", vocab_size=260)


def test_upper_case_names_are_read_like_lower_case_ones(tmp_path):
    rows = lines(text(60, i) for i in range(3)).encode()
    plain = text(60, 3).encode()
    top = tmp_path / "top"
    top.mkdir()
    for name, content in (
        ("A.JSONL", rows),
        ("B.jsonl.GZ", gzip.compress(rows.replace(b'": "', b'": "gz '))),
        ("C.JsonL.Xz", lzma.compress(rows.replace(b'": "', b'": "xz '))),
        ("D.TXT", plain),
        ("E.TXT.GZ", gzip.compress(b"gz " + plain)),
        ("F.Py", b"print()"),
    ):
        (top / name).write_bytes(content)
    prepare([top], tmp_path / "d", vocab_size=300, val_fraction=0)
    prepare(sorted(top.iterdir()), tmp_path / "e", vocab_size=300, val_fraction=0)
    found = documents(tmp_path / "d", "train")
    assert sorted(found) == sorted(documents(tmp_path / "e", "train")) and len(found) == 3 * 3 + 3
    assert {text(60, i) for i in range(4)} < set(found) and not any('{"' in d for d in found)


def test_a_directory_of_source_files(tmp_path, capsys):
    """Common endings are read, compressed or not; how many files of others are left out is printed."""
    top = tmp_path / "top"
    (top / ".git").mkdir(parents=True)
    (top / "folder.png").mkdir()
    for name in ("a.c", "b.h", "c.CC", "d.cu", "e.java", "f.ts", "g.rs", "h.go", "i.md", "j.rst", "k.sh", "l.sql"):
        (top / name).write_text(f"text of {name}")
    (top / "m.cpp.gz").write_bytes(gzip.compress(b"text of m.cpp"))
    for name in ("n.json", "o.json.gz", "p.png", "Makefile", ".git/q.bin"):
        (top / name).write_text("must not be read")
    prepare([top, top / "a.c"], tmp_path / "d", vocab_size=260, val_fraction=0)
    assert len(documents(tmp_path / "d", "train")) == 13
    line = f"{top}: 4 left out for their endings (.json, Makefile, .png); name those to be read\n"
    assert capsys.readouterr().err == line
    prepare([top / "a.c", top / "Makefile"], tmp_path / "e", vocab_size=260, val_fraction=0)
    assert documents(tmp_path / "e", "train") == ["text of a.c", "must not be read"]
    for name in ("r.a", "s.b", "t.d", "u.e"):
        (top / name).touch()
    assert len(find_files([top])) == 13 and "8 left out for their endings (" in (said := capsys.readouterr().err)
    assert said.count(", ") == 5 and ", ...)" in said
    assert not find_files([top / "a.c"], ROWS)[1:] and not capsys.readouterr().err
    with pytest.raises(ValueError, match="no .jsonl, .parquet, .arrow file in it"):
        find_files([top], ROWS)


def test_twins_are_one_text_however_they_are_written(tmp_path):
    """Byte-order marks and line ends of another system, in text files and inside JSON strings."""
    texts = [text(120, i).replace(",", "\n") for i in range(40)]
    mark = "\ufeff"
    for i, t in enumerate(texts):
        (tmp_path / f"a{i}.txt").write_text(t, newline="")
        (tmp_path / f"b{i}.txt").write_text(mark + t, newline="\r\n")
        (tmp_path / f"{i}.py").write_text(mark + t, newline="\r")
    (tmp_path / "c.jsonl").write_text(mark + lines(t.replace("\n", "\r\n") for t in texts), newline="\r\n")
    marked = lines((mark + t.replace("\n", "\r") for t in texts), ensure_ascii=False)
    (tmp_path / "d.jsonl").write_text(mark + marked.replace("\n", "\n" + mark), newline="")
    prepare([tmp_path], tmp_path / "d", vocab_size=400, val_fraction=0.3)
    train, val = (Counter(documents(tmp_path / "d", split)) for split in ("train", "val"))
    assert not train.keys() & val.keys() and len(val) > 5
    assert set((train + val).values()) == {5} and set(train + val) == set(texts)


def test_an_existing_tokenizer_with_gaps(tmp_path):
    ranks = {bytes([b]): b for b in range(256)} | {b"th": 256, b" the": 300}
    special = {tokenizer.EOT: 280}
    enc = tiktoken.Encoding("gaps", pat_str=tokenizer.PATTERN, mergeable_ranks=ranks, special_tokens=special)
    (tmp_path / "t").mkdir()
    tokenizer.save(enc, tmp_path / "t")
    (tmp_path / "x.jsonl").write_text('{"text": "the goose"}\n{"text": "in the river"}')
    main([str(tmp_path / "x.jsonl"), f"--out={tmp_path / 'd'}", f"--tokenizer={tmp_path / 't'}", "--val_fraction=0"])
    assert documents(tmp_path / "d", "train") == ["the goose", "in the river"]
    assert 300 in shards.open_shards(tmp_path / "d", "train")[0] and shards.read_meta(tmp_path / "d")["eos"] == 280
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "t", "x.jsonl"]


def test_without_validation(tmp_path):
    (tmp_path / "x.txt").write_text("only one document " * 50)
    main([str(tmp_path / "x.txt"), f"--out={tmp_path / 'd'}", "--val_fraction", "0", "--vocab_size=260"])
    assert Loader([(tmp_path / "d", 1.0)], "train", 2, 16).next()[0].shape == (2, 16)
    with pytest.raises(ValueError, match="d has no validation data"):
        Loader([(tmp_path / "d", 1.0)], "val", 2, 16)


@pytest.mark.parametrize("dies_in", ["train_bpe", "add"])
def test_what_a_killed_run_left_is_removed_by_the_next(corpus, tmp_path, dies_in):
    """Also one that says no word before it dies."""
    flags = [*expand([f"{corpus[0]}/*.xz"]), "--out", str(tmp_path / "d"), "--vocab_size", "400"]
    owner = "shards.ShardWriter" if dies_in == "add" else "tokenizer"
    program = (
        "import os, signal, sys; from data import prepare, shards, tokenizer;"
        f"{owner}.{dies_in} = lambda *_: os.kill(os.getpid(), signal.SIGKILL); prepare.main(sys.argv[1:])"
    )
    run = subprocess.run([sys.executable, "-c", program, *flags], cwd=ROOT)
    assert run.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == (dies_in == "add")
    main(flags)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("when", ["hashed", "train_bpe", "add"])
def test_an_interrupt_leaves_nothing(corpus, tmp_path, monkeypatch, when):
    monkeypatch.setattr(module, "BLOCK", 1000)
    owner = {"hashed": module, "train_bpe": tokenizer, "add": shards.ShardWriter}[when]
    original, calls = getattr(owner, when), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == (1 if when == "train_bpe" else 5):
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(owner, when, interrupted)
    with pytest.raises(SystemExit) as stop:
        main([*expand([f"{corpus[0]}/*.txt*"]), "--out", str(tmp_path / "d"), "--vocab_size", "400"])
    assert stop.value.code == "stopped; nothing was written" and calls and list(tmp_path.iterdir()) == []


def test_as_a_program(corpus, tmp_path):
    flags = [*expand([f"{corpus[0]}/*.txt*"]), "--out", str(tmp_path / "d"), "--vocab_size", "400"]
    run = subprocess.run([sys.executable, "-m", "data.prepare", *flags], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    files = ["meta.json", "tokenizer.json", "train-00000.bin", "val-00000.bin"]
    assert "vocabulary 400" in run.stdout and sorted(p.name for p in (tmp_path / "d").iterdir()) == files
