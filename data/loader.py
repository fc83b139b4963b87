"""Batches of token windows from data directories: shuffled, mixed, prefetched, and resumable to the sample.

A source of N tokens gives (N - 1) // L windows; window w is tokens w*L .. w*L + L inclusive, across document ends and
shard borders. The stream of samples is a function of (sources, weights, split, L, seed) alone. Rank r of W takes rows
r*B .. (r+1)*B of each global batch of W*B samples, so a run continues on another number of ranks.
"""

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch

from data import shards
from optimoe.config import require

AHEAD = 3  # batches prepared before they are asked for


def parse_sources(text):
    """DIR or DIR:0.7,DIR:0.3 -> [(directory, weight)]."""
    parts = [part.rpartition(":") if ":" in part else (part, ":", "1") for part in text.split(",")]
    try:
        sources = [(directory, float(weight)) for directory, _, weight in parts]
        if not all(0 < weight < math.inf for _, weight in sources):
            raise ValueError("weights must be above 0 and finite")
        return sources
    except ValueError as error:
        raise ValueError(f"data={text!r}: {error}; write DIR or DIR:0.7,DIR2:0.3") from None


class Loader:
    """Endless batches: `tokens_BL, targets_BL = loader.next()`, int64, on `device`; targets are tokens one step later.

    sources: data directories with weights, [("data/books", 0.7), ("data/facts", 0.3)], their shares of the samples to
    within two at any moment. Each has its own epochs: every window once, in a new order. batch_size is per rank.
    ValueError for damaged data, different tokenizers, or a source shorter than one window.
    """

    def __init__(self, sources, split: str, batch_size: int, seq_len: int, seed=0, rank=0, world=1, device="cpu"):
        weighted = sources and all(0 < weight < math.inf for _, weight in sources)
        require(weighted, "sources", sources, "at least one (directory, weight), with finite weights above 0")
        fits = batch_size >= 1 and seq_len >= 1 and 0 <= rank < world and batch_size * world * seq_len <= 2**36
        given = dict(batch_size=batch_size, seq_len=seq_len, rank=rank, world=world)
        require(fits, "batch", given, "must be positive, rank below world, and the batch at most 2^36 tokens")
        self.split, self.batch_size, self.seq_len, self.seed = split, batch_size, seq_len, seed
        self.rank, self.world, self.device = rank, world, torch.device(device)
        total = sum(weight for _, weight in sources)
        self.weights = [weight / total for _, weight in sources]
        self.sources = [_Source(directory, split, seq_len, seed + i) for i, (directory, _) in enumerate(sources)]
        first = self.sources[0]
        for source in self.sources:
            remedy = f"not the tokenizer of {first.directory}; prepare one with --tokenizer of the other"
            require(source.tokenizer == first.tokenizer, "data", str(source.directory), remedy)
        self.vocab_size = first.vocab_size
        self._drawn = [0] * len(sources)  # samples of each source in the batches handed out: the whole cursor
        self._planned = [0] * len(sources)  # the same with those being prepared; belongs to the thread
        self._ahead = deque()  # futures of (batch, its cursor), oldest first
        self._thread = ThreadPoolExecutor(1, "loader")

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch of this rank. An error in the background is raised here, again at each call."""
        while len(self._ahead) < AHEAD:
            self._ahead.append(self._thread.submit(self._prepare))
        batch, self._drawn = self._ahead[0].result()
        self._ahead.popleft()
        return tuple(t.to(self.device, non_blocking=True) for t in batch)

    def _prepare(self):
        rows = [self._plan() for _ in range(self.batch_size * self.world)]
        rows = rows[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        batch = torch.empty(2, self.batch_size, self.seq_len, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        for b, (source, number) in enumerate(rows):
            window = torch.from_numpy(source.sample(number))
            batch[0, b], batch[1, b] = window[:-1], window[1:]
        return batch.unbind(), list(self._planned)

    def _plan(self):  # -> (source, its sample number); next is the source that lags its share most
        samples = sum(self._planned) + 1
        i = max(range(len(self.sources)), key=lambda i: self.weights[i] * samples - self._planned[i])
        self._planned[i] += 1
        return self.sources[i], self._planned[i] - 1

    @property
    def epochs(self) -> list[float]:
        """Of each source, so far."""
        return [n / source.n_windows for n, source in zip(self._drawn, self.sources, strict=True)]

    @property
    def n_windows(self) -> list[int]:
        """Windows in one epoch of each source."""
        return [source.n_windows for source in self.sources]

    def state_dict(self) -> dict:
        """The cursor after the last batch handed out; plain JSON types."""
        return {"drawn": list(self._drawn)} | self._identity()

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state` was taken, on any rank and world; ValueError for another stream."""
        for key, value in self._identity().items():
            remedy = f"not {value}: resume with the data and settings of the saved run"
            require(state.get(key) == value, f"loader state: {key}", state.get(key), remedy)
        for future in self._ahead:
            future.cancel()
        wait(self._ahead)
        self._ahead.clear()
        self._drawn, self._planned = list(state["drawn"]), list(state["drawn"])

    def _identity(self):
        kept = {name: getattr(self, name) for name in ("split", "seq_len", "seed", "weights", "n_windows")}
        return kept | {"checksums": [source.checksum for source in self.sources]}


class _Source:
    """The windows of one split of one data directory."""

    def __init__(self, directory, split, seq_len, seed):
        meta, self.shards = shards.read_meta(directory), shards.open_shards(directory, split)
        self.directory, self.seq_len, self.seed = Path(directory), seq_len, seed
        self.tokenizer, self.vocab_size = meta["tokenizer_sha256"], meta["vocab_size"]
        self.checksum = "".join(shard["sha256"][:8] for shard in meta["splits"][split]["shards"])
        self.ends = np.cumsum([len(shard) for shard in self.shards], dtype=np.int64)
        n_tokens = int(self.ends[-1]) if self.shards else 0
        self.n_windows = (n_tokens - 1) // seq_len
        remedy = (
            f"one window needs {seq_len + 1} tokens, split {split!r} of {directory} has {n_tokens}; use a smaller one"
        )
        require(self.n_windows >= 1, "seq_len", seq_len, remedy)
        self.epoch, self.order = -1, None

    def sample(self, number: int) -> np.ndarray:  # (seq_len + 1,) int64
        epoch, at = divmod(number, self.n_windows)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, shuffled(self.n_windows, self.seed, epoch)
        start, n, parts = int(self.order[at]) * self.seq_len, self.seq_len + 1, []
        shard = int(np.searchsorted(self.ends, start, "right"))
        while n:
            offset = start - (int(self.ends[shard]) - len(self.shards[shard]))
            parts.append(self.shards[shard][offset : offset + n])
            start, n, shard = start + len(parts[-1]), n - len(parts[-1]), shard + 1
        return np.concatenate(parts).astype(np.int64)


def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(n), int64: the order of a hash (splitmix64), the same in all versions of NumPy."""
    key = _mix(_mix(np.array([seed], np.uint64)) + np.uint64(epoch))
    return np.argsort(_mix(_mix(np.arange(n, dtype=np.uint64)) ^ key), kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:  # arrays, not scalars: their overflow is silent
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
