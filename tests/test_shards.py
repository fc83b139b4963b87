import json

import numpy as np
import pytest

from data import shards, tokenizer

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
    assert (
        shards.read_meta(tmp_path / "small")["dtype"] == "uint16"
        and shards.read_meta(tmp_path / "large")["dtype"] == "uint32"
    )
    for name, eos in (("small", 65535), ("large", 65536)):
        assert shards.open_shards(tmp_path / name, "train")[0].tolist() == [0, 65534, eos]


def test_bad_ids_are_refused(tmp_path):
    with shards.ShardWriter(tmp_path / "d", ENC) as writer:
        with pytest.raises(ValueError, match="end each document"):
            writer.add("train", [1, 2, 3])
        with pytest.raises(ValueError, match="vocabulary of"):
            writer.add("train", [1, ENC.n_vocab, EOS])
        with pytest.raises(ValueError, match="vocabulary of"):
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
        shards.open_shards(tmp_path / "d", "train", verify=False)
    path.write_bytes(good[:50] + bytes([good[50] ^ 1]) + good[51:])
    with pytest.raises(ValueError, match="train-00001.bin is corrupt"):
        shards.open_shards(tmp_path / "d", "train")
    shards.open_shards(
        tmp_path / "d", "train", verify=False
    )  # the flipped bit is found by the checksum and by nothing else
    path.unlink()
    with pytest.raises(ValueError, match="train-00001.bin is missing"):
        shards.open_shards(tmp_path / "d", "train")
    shards.open_shards(tmp_path / "d", "val")
    path.write_bytes(good)
    shards.open_shards(tmp_path / "d", "train")
    path = tmp_path / "d" / tokenizer.FILE
    path.write_text(path.read_text().replace("AA==", "/wAA"))  # another token, and still a tokenizer
    assert tokenizer.load(tmp_path / "d").n_vocab == ENC.n_vocab
    with pytest.raises(ValueError, match=f"{tokenizer.FILE} is corrupt"):
        shards.open_shards(tmp_path / "d", "train")


def test_bad_directories_are_named(tmp_path):
    with pytest.raises(ValueError, match="meta.json does not exist.*data.prepare"):
        shards.open_shards(tmp_path / "nowhere", "train")
    write(tmp_path / "d")
    with pytest.raises(ValueError, match="no split 'test'; it has train, val"):
        shards.open_shards(tmp_path / "d", "test")
    path = tmp_path / "d" / "meta.json"
    meta = json.loads(path.read_text())
    for content in (
        json.dumps(meta | {"version": 99}),
        path.read_text()[:-40],
        "[]",
        json.dumps({"version": 1}),
        json.dumps(meta | {"splits": []}),
        path.read_text().replace('"shards"', '"shords"'),
        path.read_text().replace('"file"', '"fale"'),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match="meta.json cannot be used"):
            shards.open_shards(tmp_path / "d", "train")


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_writer_leaves_nothing(tmp_path, interruption):
    with pytest.raises(interruption):
        with shards.ShardWriter(tmp_path / "d", ENC) as writer:
            writer.add("train", [1, EOS])
            raise interruption
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_nothing_that_looks_complete(tmp_path):
    writer = shards.ShardWriter(tmp_path / "d", ENC, shard_tokens=2)
    writer.add("train", [1, EOS, 2, EOS])  # and never closed
    assert not (tmp_path / "d").exists()
    for directory in tmp_path.iterdir():
        with pytest.raises(ValueError, match="not a finished data directory"):
            shards.read_meta(directory)
    writer.abandon()


def test_existing_directories_are_safe(tmp_path):
    write(tmp_path / "d")
    before = {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()}
    with pytest.raises(ValueError, match="exists and is not empty"):
        write(tmp_path / "d", seed=1)
    with pytest.raises(RuntimeError):
        with shards.ShardWriter(tmp_path / "d", ENC, overwrite=True) as writer:
            writer.add("train", [1, EOS])
            raise RuntimeError
    assert {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()} == before

    new = write(tmp_path / "d", seed=1, overwrite=True)
    np.testing.assert_array_equal(np.concatenate(shards.open_shards(tmp_path / "d", "train")), new["train"])
    assert [p.name for p in tmp_path.iterdir()] == ["d"]

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("do not delete")
    with pytest.raises(ValueError, match="not a data directory"):
        write(tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "do not delete"
