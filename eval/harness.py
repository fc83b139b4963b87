"""What the programs of eval/ share: options, prompts that fit, generated texts, records that survive a kill."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data import files
from data.tokenizer import Tokens
from eval.generate import generate
from eval.sources import Source
from eval.taskloss import context_ids
from optimoe.config import make_directory, require
from optimoe.load import Loaded, ModelChoice, load


@dataclass(frozen=True)
class EvalChoice(ModelChoice):
    batch_size: int = 64  # sequences generated at a time, and items between two writes to disk
    # Items
    evaldata: str = ""  # folder of evaluation sets, see eval/sources.py; empty: $OPTIMOE_EVALDATA, else ./evaldata
    limit: int = 0  # only the first so many items; 0: all
    seed: int = 0  # of sampling
    top_p: float = 1.0  # sample from the smallest set of tokens with this probability
    out: str = ""  # directory of the results; empty: RUN/eval-STEP, with --hf: HF/eval
    overwrite: bool = False  # start anew where there are results, of other settings or the same

    def validate(self):
        super().validate()
        require(self.batch_size >= 1, "batch_size", self.batch_size, "use 1 or more")
        require(self.limit >= 0, "limit", self.limit, "use 0 (all items) or more")
        require(0 <= self.seed < 2**63, "seed", self.seed, "use a whole number from 0 to below 2^63")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "use a number above 0, at most 1")


def open_source(cfg: EvalChoice) -> Source:
    return Source(cfg.evaldata, cfg.data_directory())


def open_model(cfg: EvalChoice) -> tuple[Loaded, Path]:
    """(the chosen model, the directory of its results, which is made)."""
    loaded = load(cfg)
    return loaded, make_directory(cfg.out or loaded.results, "out", cfg.out)


def read_items(task, source: Source, shots: int) -> list:
    """The items of a task. ValueError naming the files whose rows lack what the task needs."""
    try:
        items = task.items(source, shots)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        where = ", ".join(source.used.values())
        raise ValueError(f"{task.name}: {where} has rows of another form ({error!r}); get the file again") from error
    for item in items:
        if not isinstance(item.prompt, str) or not isinstance(item.answer, str):
            raise ValueError(f"{task.name}: item {item.id} has {item.answer!r} as its answer; get its file again")
    return items


def fingerprint(items) -> str:
    """Of prompts and answers: records of other items are not continued."""
    content = json.dumps([(item.prompt, item.answer, item.choices) for item in items])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def answer_length(loaded: Loaded, task, items) -> int:
    """Tokens to generate: the task's max_new_tokens, or less where the model's seq_len is short. Then it is what the
    longest prompt leaves, at least half."""
    longest, seq_len = max(len(context_ids(loaded.tokens, item.prompt)) for item in items), loaded.model.cfg.seq_len
    return min(task.max_new_tokens, max(seq_len // 2, seq_len - longest))


def prompt_ids(model, tokens: Tokens, prompt: str, max_new_tokens: int) -> tuple[list[int], bool]:
    """(ids of bos + prompt, whether its beginning was cut off to leave room for max_new_tokens)."""
    ids, first = context_ids(tokens, prompt), tokens.bos
    room = model.cfg.seq_len - max_new_tokens - len(first)
    cut = len(ids) - len(first) > room
    return first + ids[len(ids) - room :] if cut else ids, cut


def texts(loaded: Loaded, task, prompts: list[str], streams: list[int], max_new_tokens: int, cfg):
    """(continuations of the prompts up to the task's stop strings, which prompts were cut).

    cfg: temperature, top_p, seed, batch_size. The text drawn for a prompt depends on (seed, its stream) alone."""
    model, tokens = loaded.model, loaded.tokens
    ids, cut = zip(*(prompt_ids(model, tokens, prompt, max_new_tokens) for prompt in prompts), strict=True)
    new = generate(
        model,
        list(ids),
        max_new_tokens,
        stop_ids=tokens.eos,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        seed=cfg.seed,
        batch_size=cfg.batch_size,
        n_vocab=tokens.n_vocab,
        stop_strings=task.stops,
        decode=tokens.decode,
        streams=streams,
    )
    return [cut_at(tokens.decode(row), task.stops) for row in new], list(cut)


def cut_at(text: str, stops) -> str:
    """The text before the first stop string."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


class Records:
    """Signed JSON lines, one per finished item; the first line holds the settings they were made with.

    Opening a file of the same settings continues it: a line torn by a kill is dropped. Other settings raise ValueError,
    or with overwrite start anew. Files from before lines were signed are continued too.
    """

    def __init__(self, path: Path, settings: dict, metrics: dict[str, set], fields: Iterable[str], overwrite=False):
        """metrics: the names of each item's metrics by its id; fields: what a record may hold."""
        self.path, self.items = path, {}
        if path.exists() and not overwrite:
            remedy = "remove that line to compute its item again, or use --overwrite for all"
            rows, whole = files.read_rows(path, remedy)
            if rows:
                self._compare(rows[0], settings)
                for number, record in enumerate(rows[1:], 2):
                    known = metrics.get(record.get("id")) == set(record.get("metrics", ())) and set(record) <= {*fields}
                    if not known:  # a damaged name is not always a damaged signature: it may be the signature's own
                        raise ValueError(f"{path}:{number} is damaged (not a record of this task): {remedy}")
                    self.items[record["id"]] = record
                os.truncate(path, whole)
                return
        files.replace(path, json.dumps(files.sign(settings)) + "\n")

    def _compare(self, old: dict, settings: dict) -> None:
        if unknown := set(old) - set(settings):
            raise ValueError(f"{self.path}:1 is damaged (it has {min(unknown)!r}): use --overwrite to start anew")
        for name, value in settings.items():
            if old.get(name) != value:
                raise ValueError(
                    f"{self.path} was made with {name}={old.get(name)!r}, not {value!r}: "
                    "give the same, use --overwrite to replace it, or write elsewhere with --out"
                )

    def add(self, records: list[dict]) -> None:
        files.append(self.path, records, signed=True)
        self.items |= {record["id"]: record for record in records}


class Progress:
    """A line on stderr, rewritten in place on a terminal, else every 10 seconds."""

    def __init__(self, name: str, total: int, done: int = 0):
        self.name, self.total, self.first, self.start, self.shown = name, total, done, time.perf_counter(), 0.0

    def __call__(self, done: int) -> None:
        now, terminal, last = time.perf_counter(), sys.stderr.isatty(), done >= self.total
        if not (terminal or last or now - self.shown >= 10):
            return
        self.shown = now
        rate = (done - self.first) / max(1e-9, now - self.start)
        left = "" if last else f", {(self.total - done) / max(1e-9, rate):,.0f} s left"
        line = f"{self.name}: {done:,}/{self.total:,} items, {rate:.3g}/s{left}"
        print(
            f"\r{line:<70}" if terminal else line, end="\n" if last or not terminal else "", file=sys.stderr, flush=True
        )
