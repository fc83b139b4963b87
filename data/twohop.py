"""Facts as keys and values, and questions that join two facts: what a model can store, and what it can work out.

    build("data/keys", HopConfig(entities=131_072, relations=0, names=1024, tokens=2**26))  # values of 20 bits
    build("data/hops", HopConfig(entities=200, relations=10, names=32, composed=8_000))

An entity is two words. With relations = 0 a key has one random value: "key value". Otherwise each relation leads from
an entity to another, "head relation tail", and a two-hop question is "head relation relation tail". A question that was
never trained needs reasoning, because only its two facts were. The number of trained questions per fact decides whether
models learn to join facts (arXiv 2405.15071).
"""

from dataclasses import dataclass
from itertools import islice, product

import numpy as np

from data import tokenizer
from data.facts import require_ranges
from data.procedural import PIECES
from data.shards import read_note, write_generated

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class HopConfig:
    """The facts and questions of a data directory, all of them functions of the seed."""

    entities: int = 200  # or keys
    relations: int = 10  # 0: every key has one value
    names: int = 32  # words; two of them name an entity or are a value
    composed: int = 8_000  # different two-hop questions in training; evaluation takes others
    tokens: int = 2**22  # of the training split at least: it has whole passes over facts and questions
    window: int = 256  # tokens; no document crosses the border of a window
    seed: int = 0

    def validate(self):
        most = {"entities": (1, self.names**2), "composed": (0, int(0.9 * self.questions))}
        limits = {"relations": (0, len(LETTERS)), "names": (2, 4096), "tokens": (1, 2**40), "window": (8, 2**20)}
        require_ranges(self, limits | most)

    @property
    def questions(self):
        """All two-hop questions there are."""
        return self.entities * self.relations**2

    @property
    def length(self):
        """Tokens that a document takes in a window, its eos included."""
        return 7 if self.relations else 5


def words(cfg):
    """The vocabulary: relations, then names of three letters."""
    names = islice(product(LETTERS, repeat=3), cfg.names)
    return [f" {letter.upper()}" for letter in LETTERS[: cfg.relations]] + [f" {''.join(name)}" for name in names]


def encoder(cfg):
    """The tokenizer: every word a token."""
    return tokenizer.word_tokenizer(words(cfg), PIECES)


def world(cfg):
    """(names_N2: the two words of each entity, target_NR: the entity that each relation leads to). With relations = 0,
    a target is the number of a value, whose two words are its digits in base `names`."""
    rng = np.random.default_rng([cfg.seed, 1])
    chosen = rng.permutation(cfg.names**2)[: cfg.entities]
    most = cfg.entities if cfg.relations else cfg.names**2
    return _digits(chosen, cfg), rng.integers(0, most, (cfg.entities, max(1, cfg.relations)))


def _digits(numbers, cfg):
    return np.stack(np.divmod(numbers, cfg.names), -1)


def asked(cfg):
    """The numbers of all questions in a random order. The first `composed` are trained, the others never."""
    return np.random.default_rng([cfg.seed, 2]).permutation(cfg.questions)


def rows(cfg, kind, numbers):
    """(questions, answers) of kind "fact" or "composed" with these numbers, as (n, words) indices into `words`."""
    names, target = world(cfg)
    names = names + cfg.relations
    if not cfg.relations:
        return names[numbers], _digits(target[numbers, 0], cfg)
    if kind == "fact":
        head, first = np.divmod(numbers, cfg.relations)
        return np.column_stack([names[head], first]), names[target[head, first]]
    head, pair = np.divmod(numbers, cfg.relations**2)
    first, second = np.divmod(pair, cfg.relations)
    return np.column_stack([names[head], first, second]), names[target[target[head, first], second]]


def texts(cfg, kind, numbers):
    """(question, answer) of each number."""
    known = np.array(words(cfg), object)
    questions, answers = (known[ids].sum(1).tolist() for ids in rows(cfg, kind, numbers))
    return list(zip(questions, answers, strict=True))


def build(out_dir, cfg):
    """Write the data directory. Returns meta.json's contents."""
    cfg.validate()
    enc, rng, order = encoder(cfg), np.random.default_rng([cfg.seed, 3]), asked(cfg)
    facts = _documents(cfg, enc, "fact", np.arange(cfg.entities * max(1, cfg.relations)))
    trained = np.concatenate([facts, _documents(cfg, enc, "composed", order[: cfg.composed])])
    unseen = _documents(cfg, enc, "composed", order[cfg.composed :][:2000])
    passes = -(-cfg.tokens // len(_packed(trained, enc.eot_token, cfg)))

    def chunks():
        for _ in range(passes):
            yield "train", _packed(rng.permutation(trained), enc.eot_token, cfg)
        yield "val", _packed(np.concatenate([facts[:2000], unseen]), enc.eot_token, cfg)

    return write_generated(out_dir, enc, chunks(), "hops", cfg)


def read_config(data_dir):
    """The HopConfig of a directory that `build` wrote; ValueError for any other."""
    return HopConfig(**read_note(data_dir, "hops"))


def _documents(cfg, enc, kind, numbers):
    """(n, length) ids: question, answer, eos to the end."""
    first = enc.encode_ordinary(words(cfg)[0])[0]  # the ids of the words are consecutive
    ids = np.column_stack(rows(cfg, kind, numbers)) + first
    return np.pad(ids, ((0, 0), (0, cfg.length - ids.shape[1])), constant_values=enc.eot_token)


def _packed(documents, eos, cfg):
    """Ids in windows that each begin and end with eos; the last is filled up with eos."""
    per_window = (cfg.window - 1) // cfg.length
    n, used = -(-len(documents) // per_window), per_window * cfg.length
    filled = np.full(n * used, eos, np.int64)
    filled[: documents.size] = documents.reshape(-1)
    return np.pad(filled.reshape(n, used), ((0, 0), (1, cfg.window - 1 - used)), constant_values=eos).reshape(-1)
