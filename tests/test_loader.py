import gc
import itertools
import json
import threading

import numpy as np
import pytest
import torch

from data import shards, tokenizer
from data.loader import Loader, shuffled
from model import GPT, ModelConfig

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ENC = tokenizer.word_tokenizer(" " + "".join(w) for w in itertools.product(LETTERS, repeat=3))
L = 8


def write(directory, n_tokens, first=0, shard_tokens=2**26, enc=ENC):
    """Token t of the split is first + t, so that a window tells where it comes from."""
    with shards.ShardWriter(directory, enc, shard_tokens=shard_tokens) as writer:
        for split in ("train", "val"):
            writer.add(split, np.append(np.arange(first, first + n_tokens - 1), enc.eot_token))
    return str(directory)


def starts(loader, n_batches):
    """First tokens of the next n batches, flat; every window is checked to be consecutive tokens."""
    result = []
    for _ in range(n_batches):
        tokens, targets = loader.next()
        assert tokens.shape == targets.shape == (loader.batch_size, L) and tokens.dtype == targets.dtype == torch.int64
        assert tokens.is_contiguous() and targets.is_contiguous()
        assert torch.equal(tokens, tokens[:, :1] + torch.arange(L)) and torch.equal(tokens[:, 1:], targets[:, :-1])
        last = targets[:, -1]
        assert ((last == tokens[:, -1] + 1) | (last == ENC.eot_token)).all()
        result += tokens[:, 0].tolist()
    return result


def is_epoch(windows, n_windows, first=0):
    return sorted(windows) == [first + L * i for i in range(n_windows)]


@pytest.mark.parametrize("n_tokens", [9, 17, 800, 801, 802, 807])
def test_every_epoch_has_every_window_once(tmp_path, n_tokens):
    data = write(tmp_path / "d", n_tokens)
    n_windows = (n_tokens - 1) // L
    loader = Loader([(data, 1.0)], "train", 1, L)
    assert loader.n_windows == [n_windows]
    epochs = [starts(loader, n_windows) for _ in range(3)]
    assert all(is_epoch(e, n_windows) for e in epochs)
    assert loader.epochs == [3.0]
    if n_windows > 10:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and epochs[0] != sorted(epochs[0])
        assert not is_epoch(epochs[0][:-1] + epochs[0][:1], n_windows), "a repeat would not be noticed"
        assert not is_epoch(epochs[0][:-1], n_windows), "a skip would not be noticed"


def test_batches_run_across_epochs_without_loss(tmp_path):
    loader = Loader([(write(tmp_path / "d", 10 * L + 1), 1.0)], "train", 4, L)
    flat = starts(loader, 15)  # 60 windows = 6 epochs of 10, though 4 does not divide 10
    assert all(is_epoch(flat[i : i + 10], 10) for i in range(0, 60, 10))


def test_shard_borders_do_not_show(tmp_path):
    whole = starts(Loader([(write(tmp_path / "a", 60), 1.0)], "train", 4, L), 20)
    for shard_tokens in (2, 7, 8, 59):
        parts = Loader([(write(tmp_path / str(shard_tokens), 60, shard_tokens=shard_tokens), 1.0)], "train", 4, L)
        assert parts.n_windows == [7] and starts(parts, 20) == whole


def test_seed_and_split_choose_the_stream(tmp_path):
    data = write(tmp_path / "d", 800)
    a, b, c = (starts(Loader([(data, 1.0)], "train", 4, L, seed=s), 20) for s in (0, 0, 1))
    assert a == b != c
    assert is_epoch(starts(Loader([(data, 1.0)], "val", 1, L), 99), 99)


def test_the_global_stream_does_not_depend_on_world(tmp_path):
    sources = [(write(tmp_path / "a", 400), 2.0), (write(tmp_path / "b", 300, first=1000), 1.0)]
    one = Loader(sources, "train", 12, L)
    batches = [starts(one, 1) for _ in range(30)]
    for world in (2, 3, 4):
        ranks = [Loader(sources, "train", 12 // world, L, rank=r, world=world) for r in range(world)]
        assert [sum((starts(rank, 1) for rank in ranks), []) for _ in range(30)] == batches


@pytest.mark.parametrize("stop", [0, 1, 7, 40])
@pytest.mark.parametrize("world", [1, 2])
def test_resume_continues_exactly(tmp_path, stop, world):
    sources = [(write(tmp_path / "a", 400), 3.0), (write(tmp_path / "b", 100, first=1000), 1.0)]
    loader = Loader(sources, "train", 6, L)
    starts(loader, stop)
    state = json.loads(json.dumps(loader.state_dict()))
    rest = [starts(loader, 1) for _ in range(25)]

    ranks = [Loader(sources, "train", 6 // world, L, rank=r, world=world) for r in range(world)]
    for rank in ranks:
        starts(rank, 3)  # whatever it did before, and prefetched, is forgotten
        rank.load_state_dict(state)
        assert rank.state_dict() == state
    assert [sum((starts(rank, 1) for rank in ranks), []) for _ in range(25)] == rest
    assert ranks[0].state_dict() == loader.state_dict() != state


def test_a_state_of_another_stream_is_refused(tmp_path):
    data = write(tmp_path / "a", 400)
    state = Loader([(data, 1.0)], "train", 2, L).state_dict()
    other = write(tmp_path / "b", 400, first=5)
    for loader, key in (
        (Loader([(data, 1.0)], "train", 2, L, seed=1), "seed"),
        (Loader([(data, 1.0)], "val", 2, L), "split"),
        (Loader([(data, 1.0)], "train", 2, L + 1), "seq_len"),
        (Loader([(other, 1.0)], "train", 2, L), "checksums"),
        (Loader([(data, 1.0), (other, 1.0)], "train", 2, L), "weights"),
    ):
        with pytest.raises(ValueError, match=f"loader state: {key}"):
            loader.load_state_dict(state)


def test_mixture_follows_the_weights_at_any_moment(tmp_path):
    weights = [5.0, 1.0, 0.25, 3.0]
    sources = [(write(tmp_path / str(i), 300, first=4000 * i), w) for i, w in enumerate(weights)]
    flat = np.array(starts(Loader(sources, "train", 4, L), 500)) // 4000
    counts = np.stack([np.cumsum(flat == i) for i in range(4)])
    shares = np.array(weights)[:, None] / sum(weights) * np.arange(1, len(flat) + 1)
    assert np.abs(counts - shares).max() <= 1
    flat = np.array(starts(Loader(sources, "train", 4, L), 500))
    for i, weight in enumerate(weights):  # each source goes through its own epochs
        mine = flat[flat // 4000 == i][: len(flat[flat // 4000 == i]) // 37 * 37].reshape(-1, 37)
        assert all(is_epoch(epoch.tolist(), 37, 4000 * i) for epoch in mine) and (len(mine) or weight < 1)


def test_bad_input_is_named(tmp_path):
    data = write(tmp_path / "a", 400, shard_tokens=100)
    with pytest.raises(ValueError, match="seq_len=400: a window needs 401 tokens, .* has 400"):
        Loader([(data, 1.0)], "train", 2, 400)
    other = write(tmp_path / "b", 100, enc=tokenizer.word_tokenizer([" x"]))
    with pytest.raises(ValueError, match="tokenizer is not that of .*--tokenizer"):
        Loader([(data, 1.0), (other, 1.0)], "train", 2, L)
    path = tmp_path / "a" / "train-00003.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="train-00003.bin has 199 bytes instead of 200"):
        Loader([(data, 1.0)], "train", 2, L)


def test_errors_in_the_background_surface_and_stay(tmp_path):
    loader = Loader([(write(tmp_path / "a", 400), 1.0)], "train", 2, L)
    source, sample = loader.sources[0], loader.sources[0].sample
    expected = starts(Loader([(tmp_path / "a", 1.0)], "train", 2, L), 6)

    def broken(number):
        if number == 11:
            raise OSError("the disk is gone")
        return sample(number)

    source.sample = broken
    got = starts(loader, 5)  # samples 0..9; the error is in the batch of 10 and 11
    state = loader.state_dict()
    for _ in range(3):
        with pytest.raises(OSError, match="the disk is gone"):
            loader.next()
    source.sample = sample
    loader.load_state_dict(state)
    assert got + starts(loader, 1) == expected


def test_the_thread_ends_with_the_loader(tmp_path):
    before = threading.enumerate()  # those of other tests may still run
    loader = Loader([(write(tmp_path / "a", 400), 1.0)], "train", 2, L)
    loader.next()
    threads = [t for t in threading.enumerate() if t.name.startswith("loader") and t not in before]
    assert threads
    del loader
    gc.collect()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_shuffle_is_a_permutation_that_never_changes():
    assert shuffled(10, 0, 0).tolist() == shuffled(10, 0, 0).tolist()
    first = shuffled(100_000, 3, 0)
    assert np.array_equal(np.sort(first), np.arange(100_000))
    assert np.corrcoef(first, np.arange(100_000))[0, 1] ** 2 < 1e-3
    assert np.corrcoef(first, shuffled(100_000, 3, 1))[0, 1] ** 2 < 1e-3
    assert shuffled(8, 1, 2).tolist() == [0, 3, 6, 4, 7, 5, 1, 2]  # resumed runs rely on it


def test_a_document_in_a_window_is_what_it_is_alone(tmp_path):
    """As a prompt begins: with the eos. So is its loss, and the eos is the last target of the document before it."""
    texts = [(np.arange(n) * 37 + n).tolist() for n in (5, 1, 9, 14)]
    with shards.ShardWriter(tmp_path / "d", ENC) as writer:
        for ids in texts:
            writer.add("train", [*ids, ENC.eot_token])
    tokens, targets, documents = Loader([(tmp_path / "d", 1.0)], "train", 1, 32, documents=True).next()
    sizes = dict(d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, n_experts=4, d_expert=32, init_std=0.1)
    model, bos = GPT(ModelConfig(vocab_size=ENC.n_vocab, seq_len=32, **sizes)), tokenizer.tiktoken_tokens(ENC).bos
    loss = lambda *batch: model(*batch).loss.item() * int((batch[1] >= 0).sum())
    alone = [[*bos, *ids, ENC.eot_token] for ids in texts]
    alone[0] = alone[0][1:]  # nothing is in front of the first window
    assert sum(len(ids) - 1 for ids in alone) == 32
    losses = [loss(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])) for ids in alone]
    for number, expected in enumerate(losses):
        part = loss(tokens, targets.where(documents == number, -1), documents)
        assert part == pytest.approx(expected, rel=1e-5)
    assert loss(tokens, targets, documents) == pytest.approx(sum(losses), rel=1e-5)
    assert abs(loss(tokens, targets) - sum(losses)) > 1e-2  # without the mask


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_arrive_on_the_gpu(tmp_path):
    data = write(tmp_path / "a", 400)
    cpu, gpu = (Loader([(data, 1.0)], "train", 2, L, device=d) for d in ("cpu", "cuda"))
    for _ in range(50):
        for a, b in zip(cpu.next(), gpu.next(), strict=True):
            assert b.device.type == "cuda" and torch.equal(a, b.cpu())
