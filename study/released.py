"""The paper's own checkpoints (arXiv 2508.18672): download, evaluate, keep a row, delete; then the paper's figures.

    python -m study.released --plan  # what is left: gigabytes, hours
    python -m study.released --grid=d512 --evaldata=evaldata  # the 23 models of width 512, the smallest first
    python -m study.released --family=code --limit=200

A model is one row of --results, and its records lie under --out: the same command continues after an interruption.
First it measures a model with known results (CALIBRATION) and stops if they differ. Tasks, prompts and numbers of
examples are the paper's (eval/tasks).

Training losses are not published, so figures that need them have only rows with a `train_loss`: where you know it,
write it into the row and remove the row's `crc`. The study's own rows (--own) are drawn beside the paper's.
"""

import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from eval import __main__ as evaluation
from eval import tasks
from eval.sources import Source
from model import compute_dtype
from optimoe import config, hub, sizes
from optimoe.config import check_file, make_directory, require
from optimoe.sizes import require_memory
from study import paperfigures, results

FAMILIES = {"math": ("triviaqa", "hellaswag", "gsm8k", "gsm_plus"), "code": ("humaneval", "mbpp")}
# Total parameters for 8, 16, .. 256 experts, and active ones for 2, 4, 8, 16 active experts, as in the names.
SIZES = {
    512: ("320M 520M 920M 1.7B 3.3B 6.6B", "170M 220M 320M 520M"),
    1024: ("1.1B 1.9B 3.5B 6.7B 13.2B 26.0B", "470M 670M 1.1B 1.9B"),
    2048: ("3.9B 7.1B 13.6B 26.4B 52.2B", "1.5B 2.3B 3.9B 7.1B"),
}
TOKENS = 125e9  # that each model was trained on
# Task loss of the first 200 items of the paper's gsm8k_4shot, measured by others with transformers (bfloat16).
CALIBRATION = ("math-d512-E8-k2", {"bits/token": 1.4509, "bits/byte": 0.5276})
ITEMS = 200
ROW = ("model", "limit", "tasks")  # keys of every row, the first written first


class Model(NamedTuple):
    """A published checkpoint; sizes from its name and the paper's architecture."""

    family: str
    d: int
    e: int
    k: int

    @property
    def params(self):
        return sizes.count_params(sizes.preset(f"paper-d{self.d}-e{self.e}-k{self.k}"))

    @property
    def short(self):
        return f"{self.family}-d{self.d}-E{self.e}-k{self.k}"

    @property
    def name(self):
        """On the Hugging Face hub, such as llm-jp/optimal-sparsity-math-d512-E8-k2-320M-A170M."""
        (totals, actives), e, k = SIZES[self.d], sizes.EXPERTS.index(self.e), sizes.CHOSEN.index(self.k)
        return f"llm-jp/optimal-sparsity-{self.short}-{totals.split()[e]}-A{actives.split()[k]}"


@dataclass(frozen=True)
class ReleasedConfig:
    family: Literal["math", "code"] = "math"  # 65 models for mathematics, or those for code
    grid: tuple[str, ...] = ()  # only these: widths (d512), numbers (E8, k2) or both (d512-E8-k2); empty: all
    results: str = "study/released.jsonl"  # a row for each evaluated model
    out: str = "runs/released"  # directory of the records of each item, and of the figures
    own: str = "study/results.jsonl"  # rows of study.sweep, for the same figures; empty: none
    evaldata: str = ""  # folder of evaluation sets, see eval/sources.py; empty: $OPTIMOE_EVALDATA, else ./evaldata
    limit: int = 0  # only this many items of each task, the first ones; 0: all
    batch_size: int = 64  # sequences generated at a time
    keep: bool = False  # keep the weights of evaluated models; those that were there before stay anyway
    calibrate: bool = True  # measure the known model first, and stop where it differs by more than 1 %
    plan: bool = False  # only print what is left, and draw the figures
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA, float32 on CPU

    def __post_init__(self):
        require(self.limit >= 0, "limit", self.limit, "use 0 (all items) or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "use 1 or more")
        require(models(self), "grid", ",".join(self.grid), "no model fits; write d512, E8, k2 or d512-E8-k2")

    @property
    def torch_device(self):
        cuda = self.device != "cpu" and torch.cuda.is_available()
        require(cuda or self.device != "cuda", "device", self.device, "no CUDA device is visible; use --device=cpu")
        return torch.device("cuda" if cuda else "cpu")


def models(cfg):
    """Those that --grid names, the cheapest first."""
    wanted = [set(part.split("-")) for part in cfg.grid]
    every = sorted((Model(cfg.family, *shape) for shape in sizes.GRID), key=lambda model: model.params[:2])
    parts = lambda model: set(model.short.split("-")[1:])
    return [model for model in every if not wanted or any(want <= parts(model) for want in wanted)]


def read_rows(path):
    """{short name: its latest row}"""
    return {row["model"]: row for row in results.read(path, ROW, optional=True)}


def finished(row, cfg):
    return row is not None and (row["limit"] == 0 or 0 < cfg.limit <= row["limit"])


def evaluate(model, cfg, names, limit, accuracy=True, where=""):
    """Runs eval in this process: ({task: its results}, seconds; None if it continued earlier records)."""
    hub.folder(model.name, "hf")
    out = Path(cfg.out) / (model.short + where)
    fresh, began = not list(out.glob("*.jsonl")), time.perf_counter()
    flags = [f"--hf={model.name}", f"--tasks={','.join(names)}", f"--out={out}", f"--limit={limit}"]
    flags += [f"--{name}={getattr(cfg, name)}" for name in ("evaldata", "device", "dtype", "batch_size")]
    flags.append(f"--accuracy={accuracy}")
    done = evaluation.main(flags)["tasks"]
    torch.cuda.empty_cache()  # for the next model
    return {name: done[name] for name in names}, time.perf_counter() - began if fresh else None


def calibrate(cfg, rows):
    """ValueError where the known model does not give its known results. Its row is kept, so this happens once."""
    short, known = CALIBRATION
    if f"{short} calibration" in rows or cfg.family != "math":
        return
    (model,) = (m for m in models(ReleasedConfig()) if m.short == short)
    print(f"calibration: {model.name}, the first {ITEMS} items of gsm8k with 4 examples", flush=True)
    with fetched(model, cfg, cfg.keep or model in models(cfg)):
        found, _ = evaluate(model, cfg, ["gsm8k"], ITEMS, accuracy=False, where="-calibration")
    for metric, value in known.items():
        mean = found["gsm8k"]["metrics"][metric]["mean"]
        print(f"  {metric}: {mean:.4f}, known {value:.4f} ({mean / value - 1:+.2%})", flush=True)
        if abs(mean / value - 1) > 0.01:
            raise ValueError(
                f"calibration: {metric} of {short} is {mean:.4f} and should be {value:.4f}. Check gsm8k's test.jsonl "
                "(1,319 items) and train.jsonl (7,473: the examples come from it), the tokenizer (99,574 pieces, <s> "
                "in front), and --dtype (known in bfloat16); --calibrate=false skips this"
            )
    results.append(cfg.results, {"model": f"{short} calibration", "limit": ITEMS, "tasks": found}, ROW)


@contextlib.contextmanager
def fetched(model, cfg, keep):
    """Context that needs the weights of a model; at its end, weights that this program downloaded are deleted.

    A note beside the records says that they are ours, so that after an interruption a later command deletes them."""
    note = Path(cfg.out) / model.short / "downloaded"
    if not hub.place(model.name).exists():
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
    yield
    if note.exists() and not keep:
        hub.forget(model.name)
        note.unlink()


def measure(model, cfg):
    """Download, evaluate and delete one model, and write its row."""
    with fetched(model, cfg, cfg.keep):
        done, seconds = evaluate(model, cfg, FAMILIES[cfg.family], cfg.limit)
        total, active, _ = model.params
        row = {"model": model.short, "name": model.name, "d_model": model.d, "n_experts": model.e, "top_k": model.k}
        row |= {"params": total, "active": active, "tpp": TOKENS / total, "limit": cfg.limit, "seconds": seconds}
        device = torch.cuda.get_device_name() if cfg.torch_device.type == "cuda" else "CPU"
        results.append(cfg.results, row | {"device": device, "tasks": done}, ROW)


# ---- what is left


def gigabytes(model, cfg):
    """Size of its weights on the device."""
    return compute_dtype(cfg, cfg.torch_device).itemsize * model.params.total / 1e9


def left(cfg, rows):
    """(models to evaluate, models too large for this device)"""
    todo = [model for model in models(cfg) if not finished(rows.get(model.short), cfg)]
    large = []
    for model in todo:
        try:
            require_memory(model.short, gigabytes(model, cfg) * 1e9 / 0.9, cfg.torch_device, "")
        except ValueError:
            large.append(model)
    return [model for model in todo if model not in large], large


def plan(cfg, rows):
    """What is left, in words: models, gigabytes, hours."""
    todo, large = left(cfg, rows)
    size = sum(2 * model.params.total for model in todo if not hub.place(model.name).exists()) / 1e9
    text = f"{len(models(cfg)) - len(todo) - len(large)} models are done, {len(todo)} are left: "
    text += f"{size:,.1f} GB to download, {estimate(todo, cfg, rows)}"
    if large:
        shapes = dict.fromkeys(f"d{model.d}-E{model.e} ({gigabytes(model, cfg):.0f} GB)" for model in large)
        text += f"\nleft out, they need several GPUs or one with more memory than this device: {', '.join(shapes)}"
    return text


def estimate(todo, cfg, rows):
    """Hours, from the seconds of models that were measured with the same limit. Time grows with the active parameters
    at most, so the measured model of the next smaller number, scaled, is an upper bound."""
    timed = [row for row in rows.values() if row.get("seconds") and row["limit"] == cfg.limit]
    seen = sorted((row["active"], row["seconds"]) for row in timed)
    if not todo:
        return "no time"
    if not seen:
        return "hours unknown until the first model is measured"
    hours = 0.0
    for model in todo:
        active, seconds = max((pair for pair in seen if pair[0] <= model.params.active), default=seen[0])
        hours += seconds * max(1.0, model.params.active / active) / 3600
    return f"about {hours:,.1f} hours on this device (from {len(seen)} measured)"


def main(argv=None):
    cfg = config.parse(ReleasedConfig, argv, __doc__)
    rows, failed = read_rows(cfg.results), {}
    print(plan(cfg, rows), flush=True)
    todo, _ = left(cfg, rows)
    if todo and not cfg.plan:
        check_file(cfg.results, "results")  # before the first download
        make_directory(cfg.out, "out", cfg.out)
        source = Source(cfg.evaldata or None)
        for name in FAMILIES[cfg.family]:  # find all data first
            task = tasks.load(name)
            task.items(source, task.shots)
        if cfg.calibrate:
            calibrate(cfg, rows)
        for model in todo:
            print(f"\n{model.name}", flush=True)
            try:
                measure(model, cfg)
            except (ValueError, OSError, torch.OutOfMemoryError) as error:  # other models may still work
                failed[model.short] = str(error).partition("\n")[0]
                print(f"error: {failed[model.short]}", flush=True)
            rows = read_rows(cfg.results)
            print(plan(cfg, rows), flush=True)
    paperfigures.draw(rows, cfg.own, cfg.out, cfg.family)
    if failed:
        reasons = "".join(f"\n  {name}: {why}" for name, why in failed.items())
        what = f"{len(failed)} of {len(todo)} models were not evaluated"
        sys.exit(f"error: {what}; the same command tries them again{reasons}")


if __name__ == "__main__":
    config.command_line(main, "stopped; the same command continues from here")
