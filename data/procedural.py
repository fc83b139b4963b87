"""The default training data: one mixture of biographies to remember and problems to reason about, made from a seed.

    build("runs/x/data", seed=1)  # what `python train.py` trains on
    build("data/big", MixtureConfig(FactsConfig(n_people=50_000), ...))  # what the study trains on
    python -m data.procedural --out data/big --mixture mixture.json --workers 16  # large ones

Training has the problems, and every biography `exposures` times in changing words; validation has new wordings of the
same biographies, and problems with unseen templates. meta.json keeps the MixtureConfig for evaluation.
"""

import dataclasses
import multiprocessing
import random
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, islice

import numpy as np

from data import facts, files, reasoning, tokenizer
from data.facts import FactsConfig, require_ranges
from data.reasoning import ReasoningConfig
from data.shards import META, read_note, require_readable, write_generated
from optimoe.config import command_line, parse, require

# A word or one digit, each with the space before it; runs of other signs.
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"

PARTS = {"facts": FactsConfig, "reasoning": ReasoningConfig}
# Fields of earlier versions, with the only values that are still understood.
RETIRED = {
    "facts": dict(versions=0, permute=True, pronouns=True),
    "reasoning": dict(share=0.25, branch=0.0, distractors=0, ordered=False, plan=True),
}

CHUNK = 2**14  # documents made and shuffled at a time


@dataclass(frozen=True)
class MixtureConfig:
    """How many documents of each kind."""

    facts: FactsConfig = field(default_factory=lambda: FactsConfig(60, 40, 40, 80, 40, 40, 40, 40, years=100))
    reasoning: ReasoningConfig = field(default_factory=lambda: ReasoningConfig(max_steps=6, modulus=7, names=24))
    exposures: int = 80  # biographies of each person
    n_problems: int = 24_000  # different problems
    repeats: int = 1  # of each problem
    n_mano: int = 0  # mental arithmetic expressions
    window: int = 144  # tokens; each window starts with eos and splits no document that fits; 0: no windows
    seed: int = 0  # of the order of documents

    def validate(self):
        self.facts.validate()
        self.reasoning.validate()
        ranges = dict.fromkeys(("exposures", "n_problems", "n_mano"), (0, 10**9))
        require_ranges(self, ranges | {"repeats": (1, 10**9), "window": (0, 2**20)})


def build(out_dir, cfg=None, seed=None, workers=1):
    """Writes the data directory; `seed` replaces the seeds of people, problems and order. Returns meta.json's contents.

    A process writes about 1 M tokens per second. The bytes do not depend on `workers`."""
    cfg = cfg or MixtureConfig()
    if seed is not None:
        parts = {name: dataclasses.replace(getattr(cfg, name), seed=seed) for name in PARTS}
        cfg = dataclasses.replace(cfg, seed=seed, **parts)
    cfg.validate()
    # spawn: the caller may hold a GPU, which a forked child cannot use
    with multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else nullcontext() as pool:
        chunks = ((split, order) for split in ("train", "val") for order in _order(cfg, split))
        chunks = (pool.imap if pool else map)(partial(_chunk, cfg), chunks)
        return write_generated(out_dir, encoder(cfg), chunks, "procedural", cfg)


@lru_cache(maxsize=1)
def encoder(cfg):
    """The tokenizer of the mixture: every word a token."""
    return tokenizer.word_tokenizer(facts.vocabulary(cfg.facts) + reasoning.vocabulary(cfg.reasoning), PIECES)


def read_config(data_dir):
    """The MixtureConfig of a directory that `build` wrote; ValueError for any other."""
    return from_dict(read_note(data_dir, "procedural"), f"{data_dir}/{META}")


def from_dict(kept, where="mixture"):
    """The inverse of dataclasses.asdict; missing fields have their defaults. ValueError names `where`."""
    try:
        own, parts = {name: value for name, value in kept.items() if name not in PARTS}, {}
        for name in PARTS.keys() & kept.keys():
            parts[name] = parse(PARTS[name], [], start=dict(kept[name].items() - RETIRED[name].items()))
        return dataclasses.replace(parse(MixtureConfig, [], start=own), **parts)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: {error}") from None


def _kinds(cfg, split, rng):
    """Yields (kind, number) of each document of a split, the kinds interleaved at random in their proportion.

    In a kind, everything comes once before anything is repeated. So a split begins with a mixture like the whole."""
    n = cfg.facts.n_people
    counts = {"facts": n * cfg.exposures, "problem": cfg.n_problems * cfg.repeats, "mano": cfg.n_mano}
    if split == "val":  # about a fiftieth of the training split
        counts = {kind: min(2000, -(-count // 50)) for kind, count in counts.items()}
        counts["facts"] = min(n, 2000) if cfg.exposures else 0
    left = dict(counts)
    while total := sum(left.values()):
        pick = rng.random() * total
        for kind in left:
            pick -= left[kind]
            if pick < 0:
                break
        yield kind, counts[kind] - left[kind]
        left[kind] -= 1


def _order(cfg, split):
    """Yields the _kinds in lists of CHUNK, shuffled if they will be packed into windows."""
    rng = random.Random(f"{cfg.seed} {split}")
    kinds = _kinds(cfg, split, rng)
    while order := list(islice(kinds, CHUNK)):
        if cfg.window:
            rng.shuffle(order)
        yield order


def _chunk(cfg, chunk):
    """The split and the token ids of one chunk, packed."""
    split, order = chunk
    return split, _pack(encoder(cfg), [_text(cfg, split, kind, number) for kind, number in order], cfg.window)


def _text(cfg, split, kind, i):
    training, n = split == "train", cfg.facts.n_people
    if kind == "facts":  # validation: an exposure that training does not reach
        exposure = i // n + (0 if training else cfg.exposures)
        return "".join(facts.segments(cfg.facts, facts.people(cfg.facts)[i % n], exposure))
    if kind == "problem" and training:
        i %= cfg.n_problems
    make = reasoning.problem if kind == "problem" else reasoning.mano
    p = make(cfg.reasoning, i, "train" if training else "test")
    return p.question + p.solution


def _pack(enc, texts, window):
    """Token ids of the texts, each ended by eos. With a window: in blocks of that length that begin with eos and are
    filled up with eos, because the model does not see earlier windows. A longer document takes several blocks."""
    eos = enc.eot_token
    documents = [ids + [eos] for ids in enc.encode_ordinary_batch(texts, num_threads=2)]
    if not window:
        return np.fromiter(chain(*documents), np.uint32)
    full, open_ = [], []  # complete blocks; at most 32 with room left
    for ids in documents:
        if fitting := [block for block in open_ if len(block) + len(ids) <= window]:
            max(fitting, key=len).extend(ids)
            continue
        block = [eos, *ids]
        block += [eos] * (-len(block) % window if len(block) > window else 0)
        (full if len(block) >= window else open_).append(block)
        if len(open_) > 32:
            open_.sort(key=len)
            full.append(open_.pop())
    return np.fromiter(chain(*(block + [eos] * (-len(block) % window) for block in full + open_)), np.uint32)


def prompt(enc, text):
    """The ids of a prompt, which begins as documents do: after eos."""
    return [enc.eot_token, *enc.encode_ordinary(text)]


@dataclass(frozen=True)
class Config:
    out: str  # the data directory to write
    mixture: str = ""  # JSON file of a MixtureConfig; empty: that of train.py's default job
    workers: int = 1  # processes

    def __post_init__(self):
        require_readable(self.out)
        require(1 <= self.workers <= 1024, "workers", self.workers, "must be from 1 to 1024")


def main(argv=None):
    def run():
        args = parse(Config, argv, __doc__)
        cfg = from_dict(files.read_json(args.mixture), args.mixture) if args.mixture else None
        print(f"{build(args.out, cfg, workers=args.workers)['splits']['train']['tokens']:,} training tokens")

    command_line(run, "stopped; nothing was written")


if __name__ == "__main__":
    main()
