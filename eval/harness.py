"""What the programs of eval/ share: options, prompts that fit, generated texts, records that survive a kill."""

import collections
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data import files
from data.tokenizer import Tokens
from eval.generate import check_sampling, generate
from eval.sources import Source
from eval.taskloss import context_ids
from optimoe import checkpoint, hub
from optimoe.config import make_directory, require
from optimoe.load import Loaded, ModelChoice, load

SAMPLES = 4096  # most samples of an item, which have the random streams from SAMPLES * index on
STOPPED = "stopped; the same command, without --overwrite, continues from here"


@dataclass(frozen=True)
class EvalChoice(ModelChoice):
    batch_size: int = 64  # sequences generated at a time, and items between two writes to disk
    # Items
    evaldata: str = ""  # folder of evaluation sets, see eval/sources.py; empty: $OPTIMOE_EVALDATA, else ./evaldata
    limit: int = 0  # only this many items, the first ones; 0: all
    shots: int | None = None  # examples in front of each question; none: as the task's file says
    samples: int = 1  # answers per item; metrics are means over them, and code tasks get pass@k for k up to this
    temperature: float = 0.0  # 0: greedy
    seed: int = 0  # of sampling
    top_p: float = 1.0  # sample from the smallest set of tokens with this probability
    out: str = ""  # directory of the results; empty: RUN/eval-STEP, with --hf: HF/eval
    overwrite: bool = False  # replace results that exist, also those of other settings

    def validate(self):
        super().validate()
        check_sampling(self.batch_size, self.temperature, self.top_p)
        require(self.limit >= 0, "limit", self.limit, "use 0 (all items) or more")
        require(self.shots is None or self.shots >= 0, "shots", self.shots, "use 0 or more")
        require(1 <= self.samples <= SAMPLES, "samples", self.samples, f"use 1 to {SAMPLES}")
        require(0 <= self.seed < 2**63, "seed", self.seed, "use a whole number from 0 to below 2^63")


def open_source(cfg: EvalChoice) -> Source:
    """The source of items. ValueError where there is no model, so that a wrong name is not blamed on a task."""
    if cfg.hf:
        folder = hub.folder(cfg.hf, "hf", hub.TOKENIZER)  # the weights come later, in open_model
        require((folder / "config.json").is_file(), "hf", cfg.hf, "no config.json there, so this is no model")
    elif cfg.run:
        require(checkpoint.find(cfg.run), "run", cfg.run, "no checkpoint (ckpt-*.pt) there; name a run directory")
    else:
        named = checkpoint.NAME.fullmatch(Path(cfg.checkpoint).name)
        require(named, "checkpoint", cfg.checkpoint, "no checkpoint of a run, which is called ckpt-STEP-HASH.pt")
    return Source(cfg.evaldata, cfg.data_directory())


def open_model(cfg: EvalChoice, writes=False) -> tuple[Loaded, Path]:
    """(the chosen model, the directory of its results). writes: whether the model must write answers."""
    loaded = load(cfg)
    if writes:
        check_writes(loaded.model)
    return loaded, make_directory(cfg.out or loaded.results, "out", cfg.out)


def check_writes(model) -> None:
    """ValueError unless a prompt and an answer, each of a token, fit the model."""
    remedy = "the model reads one token and can write no answer; train one with a longer seq_len"
    require(model.cfg.seq_len > 1, "seq_len", model.cfg.seq_len, remedy)


def read_items(task, source: Source, shots: int) -> list:
    """The items of a task. ValueError naming the files whose rows lack what the task needs, or share an id."""
    try:
        items = task.items(source, shots)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"rows of another form ({error!r})"
        raise ValueError(f"{task.name}: {', '.join(source.used.values())} has {what}; get the file again") from error
    for item in items:
        for name in ("prompt", "answer", "group"):
            value = getattr(item, name)
            if not isinstance(value, str):
                raise ValueError(f"{task.name}: item {item.id} has {value!r} as its {name}; get its file again")
        blank = any(not text.strip() for _, text in item.compared())
        wrong = bool(item.choices) and item.gold not in range(len(item.choices))
        if blank or wrong:
            what = f"choices {item.choices} and choice {item.gold} (of 0, 1, ...) as the right one"
            raise ValueError(f"{task.name}: item {item.id} has {what}; get its file again")
    (common, n), *_ = collections.Counter(item.id for item in items).most_common(1) or [("", 0)]
    if n > 1:  # they would share one record
        where = f"{n} items of {', '.join(source.used.values())}"
        raise ValueError(f"{task.name}: {where} have the id {common!r}; remove or rename all but one")
    return items


def settings(loaded: Loaded, items, shots: int, cfg, names=()) -> dict:
    """What records depend on. Records of other settings are not continued. names: further fields of cfg."""
    content = json.dumps([(item.prompt, item.answer, item.choices) for item in items])
    found = {"checkpoint": loaded.name, "shots": shots, "items": hashlib.sha256(content.encode()).hexdigest()[:16]}
    found |= {name: getattr(cfg, name) for name in (*names, "samples", "temperature", "top_p", "seed")}
    return found | {"dtype": str(loaded.model.dtype)}


def answer_length(loaded: Loaded, task, items) -> int:
    """Tokens to generate: max_new_tokens, or in a short seq_len what the longest prompt leaves, at least half of it."""
    longest, seq_len = max(len(context_ids(loaded.tokens, item.prompt)) for item in items), loaded.model.cfg.seq_len
    return min(task.max_new_tokens, max(seq_len // 2, seq_len - longest))


def prompt_ids(model, tokens: Tokens, prompt: str, max_new_tokens: int) -> tuple[list[int], bool]:
    """(ids of bos + prompt, whether its beginning was cut off to leave room for max_new_tokens)."""
    ids, first = context_ids(tokens, prompt), tokens.bos
    room = model.cfg.seq_len - max_new_tokens - len(first)
    cut = len(ids) - len(first) > room
    return first + ids[len(ids) - room :] if cut else ids, cut


def answers(loaded: Loaded, task, chunk: list, max_new_tokens: int, cfg):
    """(cfg.samples texts for each of a chunk of (index, item), up to the task's stop strings; which prompts were cut).

    A text depends on cfg.seed, the index of its item and its number, not on its batch."""
    pairs = [(item.prompt, SAMPLES * index + i) for index, item in chunk for i in range(cfg.samples)]
    return texts(loaded, task, *zip(*pairs, strict=True), max_new_tokens, cfg)


def texts(loaded: Loaded, task, prompts: list[str], streams: list[int], max_new_tokens: int, cfg):
    """(a text for each prompt, up to the task's stop strings; which prompts were cut). streams: a number for each."""
    model, tokens = loaded.model, loaded.tokens
    ids, cut = zip(*(prompt_ids(model, tokens, prompt, max_new_tokens) for prompt in prompts), strict=True)
    options = {name: getattr(cfg, name) for name in ("temperature", "top_p", "seed", "batch_size")}
    options |= dict(n_vocab=tokens.n_vocab, stop_strings=task.stops, decode=tokens.decode, streams=streams)
    new = generate(model, list(ids), max_new_tokens, tokens.eos, **options)
    return [cut_at(tokens.decode(row), task.stops) for row in new], list(cut)


def cut_at(text: str, stops) -> str:
    """The text before the first stop string."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def cut_line(cut: int, n: int, seq_len: int) -> list[str]:
    """The line of a table about prompts that were cut, if any."""
    return [f"  {cut:,} of {n:,} prompts lost their beginnings to fit the model's {seq_len} tokens"] if cut else []


class Records:
    """Signed JSON lines, one per finished item, behind a line with the settings they were made with.

    A file of the same settings is continued (a line cut off by a kill is dropped); others raise ValueError, or are
    replaced with overwrite. Old lines without signatures are accepted."""

    FIELDS = set("id group metrics nats tokens bytes merged cut choices texts reasons gold votes".split())

    def __init__(self, path: Path, settings: dict, metrics: dict[str, set], overwrite=False):
        """metrics: the names of each item's metrics, by its id."""
        self.path, self.items = path, {}
        if path.exists() and not overwrite:
            remedy = "remove that line to compute its item again, or use --overwrite to compute all"
            rows, whole = files.read_rows(path, remedy)
            if rows:
                self._compare(rows[0], settings)
                for number, record in enumerate(rows[1:], 2):
                    # A line whose signature has a damaged name looks like an old one without a signature.
                    known = metrics.get(record.get("id")) == set(record.get("metrics", ()))
                    if not known or not set(record) <= self.FIELDS:
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
                remedy = "give the same, use --overwrite to replace it, or write elsewhere with --out"
                raise ValueError(f"{self.path} was made with {name}={old.get(name)!r}, not {value!r}: {remedy}")

    def complete(self, items: list, compute: Callable, size: int, limit: int) -> list[dict]:
        """The records of the first `limit` items (0: all). compute(list of (index, item)) makes the missing ones, of
        `size` items at a time."""
        wanted = list(enumerate(items))[: limit or None]
        pending = [(i, item) for i, item in wanted if item.id not in self.items]
        pending.sort(key=lambda pair: len(pair[1].prompt), reverse=True)  # similar lengths in a batch
        begun, shown = time.perf_counter(), 0.0
        for first in range(0, len(pending), size):
            records = compute(pending[first : first + size])
            files.append(self.path, records, signed=True)
            self.items |= {record["id"]: record for record in records}
            n, now = min(first + size, len(pending)), time.perf_counter()
            left, rate = len(pending) - n, n / max(1e-9, now - begun)
            if not left or now - shown >= 10:
                shown = now
                done = f"{self.path.stem}: {len(wanted) - left:,}/{len(wanted):,} items, {rate:.3g}/s"
                print(f"{done}, {left / rate:,.0f} s left" if left else done, file=sys.stderr, flush=True)
        return [self.items[item.id] for _, item in wanted]
