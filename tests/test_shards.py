import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import procedural, shards, tokenizer
from data.facts import FactsConfig
from data.reasoning import ReasoningConfig

ROOT = Path(__file__).parents[1]

ENC = tokenizer.word_tokenizer([" Alice", " Bob"])
EOS = ENC.eot_token


def document(rng):
    return rng.integers(0, EOS, rng.integers(0, 50)).tolist() + [EOS]


def write(directory, n=40, seed=0, **options):
    rng = np.random.default_rng(seed)
    documents = {"train": [document(rng) for _ in range(n)], "val": [document(rng) for _ in range(3)]}
    with shards.ShardWriter(directory, ENC, **options) as writer:
        for split, docs in documents.items():
            for ids in docs:
                writer.add(split, ids)
        writer.notes["licence"] = "CC0"
    return {split: np.concatenate(docs) for split, docs in documents.items()}


@pytest.mark.parametrize("shard_tokens", [7, 100, 10**6])
def test_what_is_written_is_read(tmp_path, shard_tokens):
    written = write(tmp_path / "d", n=20, shard_tokens=shard_tokens)
    meta = shards.read_meta(tmp_path / "d")
    assert meta["licence"] == "CC0" and meta["vocab_size"] == ENC.n_vocab and meta["eos"] == EOS
    for split, ids in written.items():
        maps = shards.open_shards(tmp_path / "d", split)
        np.testing.assert_array_equal(np.concatenate(maps), ids)
        assert [len(m) for m in maps[:-1]] == [shard_tokens] * (len(maps) - 1)
        totals = meta["splits"][split]
        assert (totals["tokens"], totals["documents"]) == (len(ids), (ids == EOS).sum())
        assert totals["bytes"] == len(ENC.decode_bytes([i for i in ids if i != EOS]))
    again = tokenizer.load(tmp_path / "d")
    assert again.encode_ordinary(" Bob") == ENC.encode_ordinary(" Bob")
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_large_vocabulary_is_stored_in_four_bytes(tmp_path):
    small, large = (
        tokenizer.encoding({bytes([b]): b for b in range(256)} | {b"\0%d" % i: i for i in range(256, n)})
        for n in (65535, 65536)
    )
    for name, enc in (("small", small), ("large", large)):
        with shards.ShardWriter(tmp_path / name, enc) as writer:
            writer.add("train", [0, 65534, enc.eot_token])
    for name, eos, dtype in (("small", 65535, "uint16"), ("large", 65536, "uint32")):
        assert shards.read_meta(tmp_path / name)["dtype"] == dtype
        assert shards.open_shards(tmp_path / name, "train")[0].tolist() == [0, 65534, eos]


def test_bad_ids_are_refused(tmp_path):
    with shards.ShardWriter(tmp_path / "d", ENC) as writer:
        with pytest.raises(ValueError, match="end with eos"):
            writer.add("train", [1, 2, 3])
        with pytest.raises(ValueError, match="ids must be below"):
            writer.add("train", [1, ENC.n_vocab, EOS])
        with pytest.raises(ValueError, match="ids must be below"):
            writer.add("train", [-1, EOS])
        writer.add("train", [])
        writer.add("train", [1, EOS])
    assert np.concatenate(shards.open_shards(tmp_path / "d", "train")).tolist() == [1, EOS]


def test_damage_is_found_and_named(tmp_path):
    write(tmp_path / "d", shard_tokens=100)
    path = tmp_path / "d" / "train-00001.bin"
    good = path.read_bytes()

    path.write_bytes(good[:-2])
    with pytest.raises(ValueError, match="train-00001.bin has 198 bytes instead of 200"):
        shards.open_shards(tmp_path / "d", "train")
    path.write_bytes(good[:50] + bytes([good[50] ^ 1]) + good[51:])
    with pytest.raises(ValueError, match="train-00001.bin is corrupt"):
        shards.open_shards(tmp_path / "d", "train")
    path.unlink()
    with pytest.raises(ValueError, match="train-00001.bin is missing"):
        shards.open_shards(tmp_path / "d", "train")
    shards.open_shards(tmp_path / "d", "val")
    path.write_bytes(good)
    shards.open_shards(tmp_path / "d", "train")
    path = tmp_path / "d" / tokenizer.FILE
    path.write_text(path.read_text().replace("AA==", "/wAA"))  # another token, and still a tokenizer
    with pytest.raises(ValueError, match=f"{tokenizer.FILE} is corrupt"):
        tokenizer.load(tmp_path / "d")


def test_bad_directories_are_named(tmp_path):
    with pytest.raises(ValueError, match="meta.json does not exist.*data.prepare"):
        shards.open_shards(tmp_path / "nowhere", "train")
    write(tmp_path / "d")
    with pytest.raises(ValueError, match="no split 'test'; it has train, val"):
        shards.open_shards(tmp_path / "d", "test")
    path = tmp_path / "d" / "meta.json"
    meta = shards.read_meta(tmp_path / "d")
    for content in (
        json.dumps(meta | {"version": 99}),
        path.read_text()[:-40],
        "[]",
        json.dumps({"version": 1}),
        json.dumps(meta | {"splits": []}),
        json.dumps(meta | {"dtype": "object"}),
        json.dumps(meta).replace('"tokens": ', '"tokens": 1', 1),
        path.read_text().replace('"shards"', '"shords"'),
        path.read_text().replace('"file"', '"fale"'),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match="meta.json(: holds a list| cannot be used| is damaged)"):
            shards.open_shards(tmp_path / "d", "train")


@pytest.mark.parametrize("interruption", [RuntimeError(), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_writer_leaves_nothing(tmp_path, interruption):
    with pytest.raises(type(interruption)) as raised:
        with shards.ShardWriter(tmp_path / "d", ENC) as writer:
            writer.add("train", [1, EOS])
            raise interruption
    assert list(tmp_path.iterdir()) == []
    assert not isinstance(interruption, OSError) or str(raised.value).endswith(f"device: '{tmp_path / 'd'}'")


def test_a_killed_writer_leaves_nothing_that_looks_complete(tmp_path):
    writer = shards.ShardWriter(tmp_path / "d", ENC, shard_tokens=2)
    writer.add("train", [1, EOS, 2, EOS])  # and never closed
    assert not (tmp_path / "d").exists()
    for directory in tmp_path.iterdir():
        with pytest.raises(ValueError, match="no data, or unfinished"):
            shards.read_meta(directory)
    writer.__exit__(KeyboardInterrupt)
    assert list(tmp_path.iterdir()) == []


def test_existing_directories_are_safe(tmp_path):
    write(tmp_path / "d")
    before = {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()}
    with pytest.raises(ValueError, match="exists and is not empty"):
        write(tmp_path / "d", seed=1)
    assert {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()} == before
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", seed=1)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="exists and is not empty"):
        write(tmp_path / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "empty", "file"]


def everything(directory):
    """All that a reader can get out of a data directory, or the error of the first thing that cannot be got."""
    shards._hash.cache_clear()
    try:
        enc = tokenizer.load(directory)
        meta = {name: value for name, value in shards.read_meta(directory).items() if name in META}
        ids = [np.concatenate(shards.open_shards(directory, split)).tolist() for split in ("train", "val")]
        return procedural.read_config(directory), meta, ids, enc._mergeable_ranks, enc._special_tokens, enc._pat_str
    except ValueError as error:
        return str(error)


META = "version tokenizer tokenizer_sha256 vocab_size eos dtype splits procedural source licence".split()


@pytest.mark.parametrize("name", ["meta.json", "tokenizer.json", "train-00000.bin", "val-00000.bin"])
def test_every_damaged_byte_is_found_or_changes_nothing(tmp_path, name):
    small = dict(first_names=4, middle_names=4, last_names=4, cities=2, universities=2, majors=2, employers=2, years=2)
    reasoning = ReasoningConfig(max_steps=1, names=3, modulus=3)
    cfg = procedural.MixtureConfig(FactsConfig(n_people=2, **small), reasoning, exposures=1, n_problems=2, window=0)
    procedural.build(tmp_path / "d", cfg)
    whole, path = everything(tmp_path / "d"), tmp_path / "d" / name
    content, rng, found = path.read_bytes(), np.random.default_rng(0), 0
    assert whole[0] == cfg and len(whole[1]) == len(META)
    places = rng.choice(len(content), min(len(content), 200), replace=False)
    for at in places:
        for byte in {content[at] ^ 1, content[at] ^ 1 << int(rng.integers(1, 8))}:
            path.write_bytes(content[:at] + bytes([byte]) + content[at + 1 :])
            damaged = everything(tmp_path / "d")
            assert damaged == whole or isinstance(damaged, str) and name in damaged, (at, byte)
            found += isinstance(damaged, str)
    assert found > len(places)
    path.write_bytes(content)
    assert everything(tmp_path / "d") == whole


def test_data_without_validation_says_so(tmp_path):
    with shards.ShardWriter(tmp_path / "d", ENC) as writer:
        writer.add("train", [1, EOS])
    assert list(shards.read_meta(tmp_path / "d")["splits"]) == ["train"]
    with pytest.raises(ValueError, match="d has no validation data .--val_fraction was 0.; it has train"):
        shards.open_shards(tmp_path / "d", "val")


WRITER = """
import os, signal, sys
from data import shards, tokenizer
enc = tokenizer.word_tokenizer([])
if sys.argv[2] == "publishing":
    os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with shards.ShardWriter(sys.argv[1], enc) as writer:
    writer.add("train", [7, enc.eot_token])
    if sys.argv[2] == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("dies", ["writing", "publishing"])
def test_the_next_writer_removes_what_a_killed_one_left(tmp_path, dies):
    run = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path / "d"), dies], cwd=ROOT)
    (left,) = tmp_path.iterdir()
    assert run.returncode == -signal.SIGKILL and left.suffix == ".partial"
    write(tmp_path / "d", seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_living_writer_of_the_same_directory_is_left_alone(tmp_path):
    with pytest.raises(ValueError, match="exists and is not empty"):
        with shards.ShardWriter(tmp_path / "d", ENC) as first:
            first.add("train", [1, EOS])
            with shards.ShardWriter(tmp_path / "d", ENC) as second:
                second.add("train", [2, EOS])
                assert first.partial.exists() and second.partial.exists()
    assert shards.open_shards(tmp_path / "d", "train")[0].tolist() == [2, EOS]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
