"""Do more votes or reinforcement learning rescue a model that is too sparse? (The paper's Fig. 6; its answer is no.)

    python -m study.sweep votes --keep=all
    python -m study.posttrain --runs='runs/study/weights/*' --questions=1000 \\
        --steps=20 --batch_prompts=256 --mini_batch=64 --lr=1e-4
    python -m study.posttrain                                                    # a table of what is there

Every run directory (of train.py or study.execute, on data with word problems) is post-trained by grpo.py with the
same budget; fields of its configuration are flags here. With --questions=1000 GRPO asks the 1,000 problems of the
preset `votes` again; with more it has fresh ones. Before and after, on the same unseen problems of every trained
number of steps: greedy answers and whole solutions, and `samples` draws per problem with their majority vote,
coverage of the right answer, and coverage of a wholly right solution (a right answer alone is often luck). One
signed JSON line per model is appended to the results file; what is there with the same checkpoint and budget is
skipped.
"""

import dataclasses
import glob
import hashlib
import json
import math
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import grpo
from data import files, procedural, reasoning
from eval.generate import generate
from eval.tasks.reasoning import vote
from eval.votes import curves, majority, pass_at_k
from optimoe import checkpoint, config
from optimoe.config import require
from optimoe.sizes import count_params
from study import child
from study.results import append, read

ROW = tuple("checkpoint settings d_model n_experts top_k seed train_loss before after".split())  # keys of every row


@dataclass(frozen=True)
class PosttrainConfig(grpo.GRPOConfig):
    # Comparison
    runs: tuple[str, ...] = ()  # run directories or patterns like 'runs/study/weights/*'; none: only report
    results: str = "study/posttrain.jsonl"  # JSON lines, one per model and budget
    problems: int = 400  # unseen ones, in equal numbers for every trained number of steps
    samples: int = 128  # draws per problem; a power of two
    vote_temperature: float = 0.6
    vote_top_p: float = 0.95
    jobs: int = 1  # models at a time, each in a process of its own: small models leave most of a GPU idle

    def __post_init__(self):
        self.budget()  # checks grpo's fields
        for name in ("problems", "samples", "jobs"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "use 1 or more")
        require(self.samples & (self.samples - 1) == 0, "samples", self.samples, "use a power of two")
        require(
            self.task == "reasoning",
            "task",
            self.task,
            "only word problems are compared here; grpo.py and eval.votes do the others",
        )

    def budget(self, **changes):
        """The GRPOConfig in it, with some fields changed."""
        return grpo.GRPOConfig(
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(grpo.GRPOConfig)} | {"model": "-"} | changes
        )


def settings(cfg):
    """What must be equal for two rows to be comparable."""
    places = (
        "model",
        "data",
        "evaldata",
        "out_dir",
        "resume",
        "device",
        "rollout_batch",
        "micro_tokens",
        "checkpoint_every",
        "keep_checkpoints",
        "eval_every",
        "eval_questions",
        "impl",
    )
    kept = {name: value for name, value in dataclasses.asdict(cfg.budget()).items() if name not in places}
    return kept | {name: getattr(cfg, name) for name in ("problems", "samples", "vote_temperature", "vote_top_p")}


def measure(run, cfg, device):
    """Per problem: greedy and majority success, numbers of right answers and solutions among the draws; and the
    curves over 1, 2, 4 .. draws."""
    _, model, data, tokens, _ = grpo.load_start(dataclasses.replace(cfg.budget(), model=str(run)), device)
    problem_cfg = procedural.read_config(data).reasoning
    problems = [reasoning.problem(problem_cfg, i, "test", 1 + i % problem_cfg.max_steps) for i in range(cfg.problems)]
    prompts = [tokens.bos + tokens.encode(p.question) for p in problems]
    room = min(model.cfg.seq_len - max(map(len, prompts)), 2 + max(len(tokens.encode(p.solution)) for p in problems))
    options = dict(batch_size=cfg.rollout_batch, n_vocab=tokens.n_vocab)
    greedy = [tokens.decode(ids) for ids in generate(model, prompts, room, tokens.eos, **options)]
    repeated = [prompt for prompt in prompts for _ in range(cfg.samples)]
    draws = generate(model, repeated, room, tokens.eos, cfg.vote_temperature, cfg.vote_top_p, cfg.seed, **options)
    checked = [reasoning.check(p.question, text, problem_cfg.modulus) for p, text in zip(problems, greedy, strict=True)]
    found = {
        "greedy": [int(answer) for answer, _ in checked],
        "greedy_solution": [int(solution) for _, solution in checked],
        "majority": [],
        "answers": [],
        "solutions": [],
    }
    questions = []
    for i, p in enumerate(problems):
        texts = [tokens.decode(ids) for ids in draws[i * cfg.samples : (i + 1) * cfg.samples]]
        both = [reasoning.check(p.question, text, problem_cfg.modulus) for text in texts]
        questions.append({"votes": [vote(text) for text in texts], "gold": str(p.answer)})
        found["majority"].append(round(majority(questions[-1]["votes"], str(p.answer), cfg.samples), 4))
        found["answers"].append(sum(answer for answer, _ in both))
        found["solutions"].append(sum(solution for _, solution in both))
    found["curves"] = curves(questions)
    found["curves"]["solutions"] = [
        sum(pass_at_k(cfg.samples, n, k) for n in found["solutions"]) / len(problems)
        for k in found["curves"]["samples"]
    ]
    return found


def posttrain(run, cfg):
    """The row of one run directory: measured, post-trained, measured again."""
    device = torch.device(
        "cuda" if cfg.device == "cuda" or cfg.device == "auto" and torch.cuda.is_available() else "cpu"
    )
    file = checkpoint.find(run)[-1][1]
    trained = checkpoint.read(file)["config"]
    known = files.read_json(run / "results.json") if (run / "results.json").exists() else {}
    model_cfg = checkpoint.load_model(file).cfg
    digest = hashlib.sha256(json.dumps([file.name, settings(cfg)], sort_keys=True).encode()).hexdigest()[:8]
    out, clock = Path(f"{run}-grpo-{digest}"), [time.perf_counter()]
    if out.exists() and not checkpoint.find(out):
        shutil.rmtree(out)  # broken off before its first checkpoint
    before = measure(file, cfg, device)
    clock.append(time.perf_counter())
    if (
        grpo.grpo(cfg.budget(model=str(file), out_dir=str(out), resume=str(out) if out.exists() else ""), device=device)
        is None
    ):
        sys.exit(f"{out}: stopped and saved; the same command goes on from there")  # half a budget is no row
    clock.append(time.perf_counter())
    after = measure(out, cfg, device)
    clock.append(time.perf_counter())
    log = [row for row in files.read_rows(out / "metrics.jsonl")[0] if "reward" in row]
    params = count_params(model_cfg)
    return {
        "checkpoint": file.name,
        "settings": settings(cfg),
        "d_model": model_cfg.d_model,
        "n_experts": model_cfg.n_experts,
        "top_k": model_cfg.top_k,
        "seed": trained.get("seed", 0),
        "run": known.get("run"),
        "total": params.total,
        "active": params.active - params.embedding,
        "tpp": known.get("tpp"),
        "train_loss": known.get("train_loss", known.get("loss")),
        "val_loss": known.get("val_loss"),
        "before": before,
        "after": after,
        "rewards": [round(row["reward"], 4) for row in log],
        "kl": [round(row["kl"], 5) for row in log],
        "grad_norm": [float(f"{row['grad_norm']:.4g}") for row in log],
        "router_changed": [round(row["router_changed"], 5) for row in log],
        "seconds": [round(b - a, 1) for a, b in zip(clock, clock[1:], strict=False)],
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def run_missing(cfg):
    """Does what the results file lacks, one line at once for each model that is finished."""
    names = dict.fromkeys(name for part in cfg.runs for name in sorted(glob.glob(part)))  # once each, in this order
    runs = [Path(name) for name in names if "-grpo-" not in Path(name).name and checkpoint.find(name)]
    require(runs, "runs", ",".join(cfg.runs), "no directory of that name holds a checkpoint (ckpt-*.pt)")
    wanted, usual = settings(cfg), settings(PosttrainConfig())  # a row made before a field existed had its default
    rows = read(cfg.results, ROW, optional=True)
    done = {row["checkpoint"] for row in rows if {name: (usual | row["settings"])[name] for name in wanted} == wanted}
    missing = [run for run in runs if checkpoint.find(run)[-1][1].name not in done]
    print(f"{len(runs)} runs, {len(missing)} of them to do", flush=True)
    if cfg.jobs > 1 and len(missing) > 1:
        with ThreadPoolExecutor(cfg.jobs) as pool:
            failed = sum(code != 0 for code in pool.map(partial(other_process, cfg), missing))
        remedy = f"{failed} of {len(missing)} failed, see above; the same command does them again"
        require(not failed, "runs", ",".join(cfg.runs), remedy)
        return
    for run in missing:
        append(cfg.results, posttrain(run, cfg), ROW)


def other_process(cfg, run):
    """Post-train one run in a process that ends with this one. Returns its exit code."""
    fields = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in ("runs", "jobs")}
    flags = [f"--{name}={value}" for name, value in fields.items() if value != ""]
    command = child.command("study.posttrain", *flags, f"--runs={run}")
    code = subprocess.run(command, stdout=subprocess.PIPE, text=True).returncode
    print(f"{run}: {'finished' if code == 0 else 'failed'}", flush=True)
    return code


# ---- what the rows say


def families(rows):
    """{(d, k, settings and training as text): {E: {seed: row}}}, the last row where there are several; training:
    all fields of its study.execute.Run but those that a family varies."""
    found = {}
    for row in rows:
        training = {
            name: value
            for name, value in (row.get("run") or {}).items()
            if name not in ("n_experts", "top_k", "seed", "lr")
        }
        key = row["d_model"], row["top_k"], json.dumps([row["settings"], training], sort_keys=True)
        found.setdefault(key, {}).setdefault(row["n_experts"], {})[row["seed"]] = row
    return {key: dict(sorted(cells.items())) for key, cells in sorted(found.items())}


def report(rows):
    """A Markdown table of the models; study.verdict says what is lost to the largest E before and after each remedy."""
    measured = ("greedy", "votes", "solutions covered")
    head = ("d", "k", "replay", "E", "seeds", "training loss", *measured, *(f"{name}, GRPO" for name in measured))
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    mean = lambda seeds, when, name: 100 * np.mean([np.mean(row[when][name]) for row in seeds.values()])  # noqa: E731
    for (d, k, same), cells in families(rows).items():
        replay = "yes" if json.loads(same)[0].get("replay") else "no"
        for E, seeds in cells.items():
            losses = [row["train_loss"] for row in seeds.values() if row["train_loss"] is not None]
            cells_of = [f"{np.mean(losses) if losses else math.nan:.4f}"]
            for when in ("before", "after"):
                covered = 100 * np.mean([row[when]["curves"]["solutions"][-1] for row in seeds.values()])
                cells_of += [
                    f"{value:.1f}" for value in (mean(seeds, when, "greedy"), mean(seeds, when, "majority"), covered)
                ]
            lines.append(f"| {d} | {k} | {replay} | {E} | {len(seeds)} | {' | '.join(cells_of)} |")
    return "\n".join(lines)


def main(argv=None):
    """Returns the rows of the results file."""
    try:
        cfg = config.parse(PosttrainConfig, sys.argv[1:] if argv is None else argv, __doc__)
        if cfg.runs:
            run_missing(cfg)
        rows = read(cfg.results, ROW)
        require(rows, "results", cfg.results, "there is nothing in it; name --runs to post-train")
        print(report(rows))
        return rows
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
