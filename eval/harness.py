"""What the programs of eval/ share: their model options, prompts that fit the model, generated texts, and records that survive a kill."""

import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data import tokenizer
from data.tokenizer import Tokens
from eval.generate import generate
from optimoe import checkpoint
from optimoe.config import make_directory, require
from optimoe.load import frozen, pick_device, run_tokens


@dataclass(frozen=True)
class ModelChoice:
    # Model
    run: str = ""  # run directory of train.py: its newest checkpoint
    checkpoint: str = ""  # or one checkpoint file of it
    hf: str = ""  # or a folder with a Hugging Face checkpoint: Mixtral, Qwen3-MoE, OLMoE
    tokenizer: str = (
        ""  # data directory of the run, if it was moved; with --hf: use its tokenizer instead of the checkpoint's
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA, float32 on CPU
    impl: Literal["auto", "reference", "grouped_mm", "triton"] = "auto"  # expert kernels; auto: by device
    batch_size: int = 64  # sequences generated at a time, and items between two writes to disk
    # Items
    data: str = ""  # folder of evaluation sets, see eval/sources.py; empty: $OPTIMOE_EVALDATA, else ./evaldata
    limit: int = 0  # only the first so many items; 0: all
    seed: int = 0  # of sampling
    top_p: float = 1.0  # sample from the smallest set of tokens with this probability
    out: str = ""  # directory of the results; empty: RUN/eval-STEP, with --hf: HF/eval
    overwrite: bool = False  # start anew where there are results, of other settings or the same

    def __post_init__(self):
        self.validate()

    def validate(self):
        """Raise ValueError naming the field, its value and the remedy."""
        given = bool(self.run) + bool(self.checkpoint) + bool(self.hf)
        require(
            given == 1,
            "run, checkpoint, hf",
            (self.run, self.checkpoint, self.hf),
            "give --run=DIR, --checkpoint=FILE or --hf=DIR, one of them",
        )
        require(not self.run or Path(self.run).is_dir(), "run", self.run, "no such directory")
        require(
            not self.checkpoint or Path(self.checkpoint).is_file(),
            "checkpoint",
            self.checkpoint,
            "no such file; --run=DIR takes the newest of a run",
        )
        require(self.batch_size >= 1, "batch_size", self.batch_size, "use 1 or more")
        require(self.limit >= 0, "limit", self.limit, "use 0 (all items) or more")
        require(0 <= self.seed < 2**63, "seed", self.seed, "use a whole number from 0 to below 2^63")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "use a number above 0, at most 1")


def load(cfg):
    """(model in evaluation mode, Tokens, name of the checkpoint file, output directory) of a ModelChoice."""
    device = pick_device(cfg)
    out = cfg.out and make_directory(cfg.out, "out", cfg.out)
    if cfg.hf:
        from optimoe import hf  # only these need its packages

        model = hf.load_model(cfg.hf, device, cfg.dtype, cfg.impl)
        tokens = run_tokens(cfg.tokenizer, model) if cfg.tokenizer else hf.load_tokens(cfg.hf)
        out = out or make_directory(Path(cfg.hf) / "eval", "out", cfg.out)
        return (
            model,
            tokens,
            hf.fingerprint(cfg.hf, *([Path(cfg.tokenizer) / tokenizer.FILE] if cfg.tokenizer else [])),
            out,
        )
    path = Path(cfg.checkpoint or cfg.run)
    model = checkpoint.load_model(path, device, dtype=cfg.dtype, impl=cfg.impl)
    frozen(model)
    if path.is_dir():
        path = checkpoint.find(path)[-1][1]
    out = out or make_directory(path.parent / f"eval-{checkpoint.NAME.fullmatch(path.name)[1]}", "out", cfg.out)
    return model, run_tokens(data_of(cfg), model), path.name, out


def data_of(cfg: ModelChoice) -> Path | None:
    """The data directory of the chosen run; None for other people's checkpoints."""
    if cfg.hf and not cfg.tokenizer:
        return None
    return checkpoint.training_data(cfg.run or Path(cfg.checkpoint).parent, cfg.tokenizer)


def answer_length(model, tokens: Tokens, task, items) -> int:
    """The task's MAX_NEW_TOKENS, or less where the model's seq_len is short: then what the longest prompt leaves, at least half."""
    longest = max(len(tokens.bos) + len(tokens.encode(item.prompt)) for item in items)
    return min(task.max_new_tokens, max(model.cfg.seq_len // 2, model.cfg.seq_len - longest))


def prompt_ids(model, tokens: Tokens, prompt: str, max_new_tokens: int) -> tuple[list[int], bool]:
    """(ids of bos + prompt, whether its beginning was cut off to leave room for max_new_tokens)."""
    ids, room = tokens.encode(prompt), model.cfg.seq_len - max_new_tokens - len(tokens.bos)
    return tokens.bos + ids[max(0, len(ids) - room) :], len(ids) > room


def texts(
    model, tokens: Tokens, task, prompts: list[str], streams: list[int], max_new_tokens: int, cfg
) -> tuple[list[str], list[bool]]:
    """Continuations of the prompts up to the task's stop strings, and which prompts were cut. cfg: temperature, top_p, seed, batch_size.

    The text drawn for a prompt depends on (seed, its stream) and on nothing else."""
    ids, cut = zip(*(prompt_ids(model, tokens, prompt, max_new_tokens) for prompt in prompts), strict=True)
    new = generate(
        model,
        list(ids),
        max_new_tokens,
        tokens.eos,
        cfg.temperature,
        cfg.top_p,
        cfg.seed,
        cfg.batch_size,
        tokens.n_vocab,
        task.stops,
        tokens.decode,
        streams,
    )
    return [cut_at(tokens.decode(row), task.stops) for row in new], list(cut)


def cut_at(text: str, stops) -> str:
    """The text before the first stop string."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


class Records:
    """JSON lines, one per finished item; the first line holds the settings they were made with.

    Opening a file of the same settings continues it: a line torn by a kill is dropped. Other settings raise ValueError, or with
    overwrite start anew."""

    def __init__(self, path: Path, settings: dict, overwrite: bool = False):
        self.path, self.items = path, {}
        if path.exists() and not overwrite:
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            old, *items = [parse_line(path, number, line) for number, line in enumerate(whole.splitlines(), 1)] or [{}]
            for name in settings:
                if old and old.get(name) != settings[name]:
                    raise ValueError(
                        f"{path} was made with {name}={old.get(name)!r}, not {settings[name]!r}: "
                        "give the same, use --overwrite to replace it, or write elsewhere with --out"
                    )
            if old:
                self.items = {record["id"]: record for record in items}
                os.truncate(path, len(whole))
                return
        path.write_text(json.dumps(settings) + "\n")

    def add(self, records: list[dict]) -> None:
        with open(self.path, "a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
        self.items |= {record["id"]: record for record in records}


def parse_line(path, number, line):
    try:
        return json.loads(line)
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(
            f"{path}:{number} is damaged ({error}): remove that line to compute its item again, or use --overwrite for all"
        ) from None


def fingerprint(items) -> str:
    """Of prompts and answers: records of other items are not continued."""
    return hashlib.sha256(
        json.dumps([(item.prompt, item.answer, item.choices) for item in items]).encode()
    ).hexdigest()[:16]


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


def write_json(path: Path, value) -> None:
    checkpoint.replace_file(path, json.dumps(value, indent=2) + "\n")
