"""Batches of token windows from data directories: shuffled, mixed, prefetched, and resumable to the sample.

A source of N tokens gives (N - 1) // L windows; window w is tokens w*L .. w*L + L inclusive, across document ends and
shard borders. Examples (data/chat.py) are packed whole into windows, which are padded with eos. An example that is
longer than a window loses its end, and is left out if no answer remains.

The stream of samples is a function of (sources, weights, split, L, seed) alone. Rank r of W takes rows r*B .. (r+1)*B
of each global batch of W*B samples, so a run can continue on any number of ranks.
"""

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch

from data import shards, tokenizer
from data.shards import MARKED, START, TRAINED
from optimoe.config import require

AHEAD = 3  # batches prepared before they are asked for


def parse_sources(text):
    """DIR or DIR:0.7,DIR:0.3 -> [(directory, weight)]. The name of a single directory may have a colon."""
    if "," not in text and Path(text).is_dir():
        return [(text, 1.0)]
    parts = [part.rpartition(":") if ":" in part else (part, ":", "1") for part in text.split(",")]
    try:
        sources = [(directory, float(weight)) for directory, _, weight in parts]
        if not all(directory and 0 < weight < math.inf for directory, weight in sources):
            raise ValueError("each needs a directory and a finite weight above 0")
        return sources
    except ValueError as error:
        raise ValueError(f"data={text!r}: {error}; write DIR or DIR:0.7,DIR2:0.3") from None


class Loader:
    """Endless batches: `tokens_BL, targets_BL = loader.next()`, int64, on `device`; targets are tokens one step later.

    In examples, targets outside answers are -1. With `documents` a third tensor follows: the number of each token's
    document in its row (B, L), int32. A document of plain text begins as a prompt does: with the eos before it, which
    is also the last target of the document that it ends. Where prompts begin in another way (data/tokenizer.py) it
    ends with its eos; the eos itself has then no target, nor has the last token of an example.

    sources: data directories with weights, [("data/books", 0.7), ("data/facts", 0.3)]: their shares of the samples,
    kept to within two samples at any moment. Each source has its own epochs: every window once, in a new order.
    batch_size is per rank. ValueError for damaged data, different tokenizers, or a source shorter than one window."""

    def __init__(self, sources, split, batch_size, seq_len, seed=0, rank=0, world=1, device="cpu", documents=False):
        self.split, self.batch_size, self.seq_len, self.seed = split, batch_size, seq_len, seed
        self.rank, self.world, self.device, self.documents = rank, world, torch.device(device), documents
        total = sum(weight for _, weight in sources)
        self.weights = [weight / total for _, weight in sources]
        self.sources = [_Source(path, split, seq_len, seed + i, documents) for i, (path, _) in enumerate(sources)]
        first = self.sources[0]
        for source in self.sources:
            remedy = f"its tokenizer is not that of {first.directory}; prepare one with --tokenizer of the other"
            require(source.tokenizer == first.tokenizer, "data", str(source.directory), remedy)
        self._drawn = [0] * len(sources)  # samples of each source in the batches handed out: the cursor
        self._planned = [0] * len(sources)  # and in those being prepared too; used by the thread alone
        self._ahead = deque()  # futures of (batch, its cursor), oldest first
        self._thread = ThreadPoolExecutor(1, "loader")

    def next(self):
        """The next batch of this rank. An error in the background is raised here, again at each call."""
        while len(self._ahead) < AHEAD:
            self._ahead.append(self._thread.submit(self._prepare))
        batch, self._drawn = self._ahead[0].result()
        self._ahead.popleft()
        return tuple(t.to(self.device, non_blocking=True) for t in batch)

    def _prepare(self):
        rows = [self._plan() for _ in range(self.batch_size * self.world)]
        rows = rows[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        shape, pinned = (self.batch_size, self.seq_len), self.device.type == "cuda"
        types = (torch.int64, torch.int64, torch.int32)[: 3 if self.documents else 2]
        batch = [torch.empty(shape, dtype=dtype, pin_memory=pinned) for dtype in types]
        for b, (source, number) in enumerate(rows):
            for tensor_BL, row in zip(batch, source.sample(number), strict=False):
                tensor_BL[b] = torch.from_numpy(row)
        return batch, list(self._planned)

    def _plan(self):
        """(source, number of its next sample), of the source that is farthest behind its share."""
        samples = sum(self._planned) + 1
        i = max(range(len(self.sources)), key=lambda i: self.weights[i] * samples - self._planned[i])
        self._planned[i] += 1
        return self.sources[i], self._planned[i] - 1

    @property
    def epochs(self):
        """How many epochs of each source have been handed out."""
        return [n / source.n_windows for n, source in zip(self._drawn, self.sources, strict=True)]

    @property
    def n_windows(self):
        """Windows in one epoch of each source."""
        return [source.n_windows for source in self.sources]

    def state_dict(self):
        """The cursor after the last batch handed out; plain JSON types."""
        return {"drawn": list(self._drawn)} | self._identity()

    def load_state_dict(self, state):
        """Continue from `state`, on any rank and world; ValueError for another stream."""
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

    def __init__(self, directory, split, seq_len, seed, documents):
        meta, self.shards = shards.read_meta(directory), shards.open_shards(directory, split)
        self.directory, self.seq_len, self.seed, self.eos = Path(directory), seq_len, seed, meta["eos"]
        self.tokenizer, listed = meta["tokenizer_sha256"], meta["splits"][split]["shards"]
        self.checksum = "".join(shard["sha256"][:8] + shard.get("marks", "")[:8] for shard in listed)
        self.ends = np.cumsum([len(shard) for shard in self.shards], dtype=np.int64)
        n_tokens = int(self.ends[-1]) if self.shards else 0
        self.n_windows, self.marks = (n_tokens - 1) // seq_len, None
        if meta["version"] == MARKED:
            self.marks = shards.open_shards(directory, split, marks=True)
            marks = np.concatenate(self.marks)
            self.starts = np.flatnonzero(marks & START)
            self.lengths = np.minimum(np.diff(self.starts, append=n_tokens), seq_len + 1)
            before = np.concatenate([[0], np.cumsum(marks & TRAINED > 0)])  # answer tokens before each position
            taught = before[self.starts + self.lengths] > before[self.starts + 1]  # not cut off before its answer
            self.starts, self.lengths = self.starts[taught], self.lengths[taught]
            self.rows = packed(self.lengths.tolist(), seq_len + 1)
            self.n_windows = len(self.rows)
        self.documents = documents
        if documents and self.marks is None:
            self.eos_first = tokenizer.tiktoken_tokens(tokenizer.load(directory)).bos == [self.eos]
        where = f"split {split!r} of {directory}"
        remedy = f"a window needs {seq_len + 1} tokens, {where} has {n_tokens}; use a smaller one"
        if self.marks:
            remedy = f"no answer in {where} begins so early; use a larger seq_len"
        require(self.n_windows >= 1, "seq_len", seq_len, remedy)
        self.epoch, self.order = -1, None

    def sample(self, number):
        """Tokens, targets and documents of a row, each (L,); the documents only if asked for or needed."""
        epoch, at = divmod(number, self.n_windows)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, shuffled(self.n_windows, self.seed, epoch)
        at = int(self.order[at])
        if self.marks is None:
            ids = self._read(self.shards, at * self.seq_len, self.seq_len + 1).astype(np.int64)
            if not self.documents:
                return [ids[:-1], ids[1:]]
            if self.eos_first:
                numbers = np.cumsum(ids[:-1] == self.eos)
                return [ids[:-1], ids[1:], numbers - numbers[0]]
            marks = np.full(len(ids), TRAINED, np.uint8)
            marks[1:][ids[:-1] == self.eos] |= START
        else:
            ids, marks = (np.full(self.seq_len + 1, fill) for fill in (self.eos, 0))
            end = 0
            for document in self.rows[at]:
                begin, end = end, end + self.lengths[document]
                for row, column in ((ids, self.shards), (marks, self.marks)):
                    row[begin:end] = self._read(column, int(self.starts[document]), int(self.lengths[document]))
            marks[end : end + 1] = START  # the padding is a document without targets
        numbers = np.cumsum(marks & START > 0)
        aimed = (marks[1:] & TRAINED > 0) & (numbers[1:] == numbers[:-1])
        return [ids[:-1], np.where(aimed, ids[1:], -1), numbers[:-1] - numbers[0]]

    def _read(self, column, start, n):
        """n values of a column (all shards, or all marks) from position `start` on."""
        parts, shard = [], int(np.searchsorted(self.ends, start, "right"))
        while n:
            offset = start - (int(self.ends[shard]) - len(column[shard]))
            parts.append(column[shard][offset : offset + n])
            start, n, shard = start + len(parts[-1]), n - len(parts[-1]), shard + 1
        return np.concatenate(parts)


def packed(lengths, room):
    """Rows of document numbers, each of `room` tokens at most. A document goes to the fullest row that has room for it,
    among the 16 emptiest."""
    rows, open_ = [], []  # open_: [tokens left, row]
    for i, n in enumerate(lengths):
        row = min((row for row in open_ if row[0] >= n), default=None)
        if row is None:
            row = [room, []]
            rows.append(row[1])
            open_ = sorted([row, *open_])[-16:]
        row[0] -= n
        row[1].append(i)
    return rows


def shuffled(n, seed, epoch):
    """A permutation of range(n), int64: the order of a hash (splitmix64), the same in all versions of NumPy."""
    key = _mix(_mix(np.array([seed], np.uint64)) + np.uint64(epoch))
    return np.argsort(_mix(_mix(np.arange(n, dtype=np.uint64)) ^ key), kind="stable")


def _mix(x):  # arrays, not scalars: their overflow is silent
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
