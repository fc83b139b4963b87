"""Do more votes or reinforcement learning rescue a model that is too sparse? (The paper's Fig. 6; its answer is no.)

    python -m study.sweep votes --keep
    python -m study.posttrain --runs='runs/study/weights/*' --questions=250 \\
        --steps=20 --batch_prompts=256 --mini_batch=64 --lr=1e-4

Every run directory with word problems is post-trained by grpo.py, whose fields are flags here, with the same budget.
With --questions=250 GRPO asks the 250 problems of the preset `votes` again; with more it has fresh ones. Before and
after, the same unseen problems are answered greedily and by the majority of `samples` draws each. One signed JSON line
per model is appended to the results file, which several processes may share; models already there with the same
checkpoint and budget are skipped.
"""

import dataclasses
import glob
import hashlib
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import grpo
from data import files, procedural, reasoning
from eval.generate import check_sampling, generate
from eval.tasks.reasoning import vote
from eval.votes import majority
from optimoe import checkpoint, config
from optimoe.config import check_file, check_range, require
from optimoe.load import pick_device
from study.results import append, read

ROW = tuple("checkpoint settings d_model n_experts top_k seed train_loss before after".split())  # keys of every row
PLACES = {  # fields of grpo.py that change no result
    *"model data evaldata out_dir resume device rollout_batch micro_tokens checkpoint_every keep_checkpoints".split(),
    *"eval_every eval_questions impl curves log".split(),
}


@dataclass(frozen=True)
class PosttrainConfig(grpo.GRPOConfig):
    # Comparison
    runs: tuple[str, ...] = ()  # run directories or patterns like 'runs/study/weights/*'
    results: str = "study/posttrain.jsonl"  # JSON lines, one per model and budget
    problems: int = 400  # unseen problems, equally many of each trained number of steps
    samples: int = 128  # draws per problem; a power of two
    vote_temperature: float = 0.6
    vote_top_p: float = 0.95

    def __post_init__(self):
        self.budget()  # checks grpo's fields
        check_range(self, "problems samples", 1)
        sampling = self.rollout_batch, self.vote_temperature, self.vote_top_p
        check_sampling(*sampling, prefix="vote_", greedy="greedy votes are all equal")
        require(self.samples & (self.samples - 1) == 0, "samples", self.samples, "use a power of two")
        for name in ("model", "out_dir", "resume"):
            remedy = "every model of --runs has a run of its own, which goes on by itself; leave it out"
            require(not getattr(self, name), name, getattr(self, name), remedy)
        remedy = "only word problems are compared here; grpo.py and eval.votes do the others"
        require(self.task == "reasoning", "task", self.task, remedy)

    def budget(self, **changes):
        """Its fields as a GRPOConfig, some of them changed."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(grpo.GRPOConfig)}
        return grpo.GRPOConfig(**fields | {"model": "-"} | changes)


def settings(cfg):
    """The fields that must be equal for two rows to be comparable."""
    kept = {name: value for name, value in dataclasses.asdict(cfg.budget()).items() if name not in PLACES}
    return kept | {name: getattr(cfg, name) for name in ("problems", "samples", "vote_temperature", "vote_top_p")}


def measure(run, cfg, device):
    """Per problem: greedy success, success of the majority of the draws, and right answers among the draws."""
    _, model, data, tokens, _ = grpo.load_start(dataclasses.replace(cfg.budget(), model=str(run)), device)
    problem_cfg = procedural.read_config(data).reasoning
    problems = [reasoning.problem(problem_cfg, i, "test", 1 + i % problem_cfg.max_steps) for i in range(cfg.problems)]
    prompts = [tokens.bos + tokens.encode(p.question) for p in problems]
    room = min(model.cfg.seq_len - max(map(len, prompts)), 2 + max(len(tokens.encode(p.solution)) for p in problems))
    options = dict(batch_size=cfg.rollout_batch, n_vocab=tokens.n_vocab)

    def draw(n, *sampling):
        """n texts for every problem."""
        repeated = [prompt for prompt in prompts for _ in range(n)]
        texts = [tokens.decode(ids) for ids in generate(model, repeated, room, tokens.eos, *sampling, **options)]
        return [texts[i : i + n] for i in range(0, len(texts), n)]

    right = lambda p, texts: sum(reasoning.check(p.question, text, problem_cfg.modulus)[0] for text in texts)
    greedy = list(zip(problems, draw(1), strict=True))
    drawn = list(zip(problems, draw(cfg.samples, cfg.vote_temperature, cfg.vote_top_p, cfg.seed), strict=True))
    return {
        "greedy": [right(*each) for each in greedy],
        "majority": [round(majority(list(map(vote, texts)), str(p.answer), cfg.samples), 4) for p, texts in drawn],
        "answers": [right(*each) for each in drawn],
    }


def posttrain(run, cfg):
    """The row of one run directory: measured, post-trained, measured again."""
    device = pick_device(cfg)
    file = checkpoint.find(run)[-1][1]
    trained, model_cfg = checkpoint.read(file)["config"], checkpoint.load_model(file).cfg
    known = files.read_json(run / "results.json") if (run / "results.json").exists() else {}
    digest = hashlib.sha256(json.dumps([file.name, settings(cfg)], sort_keys=True).encode()).hexdigest()[:8]
    out, clock = Path(f"{run}-grpo-{digest}"), [time.perf_counter()]
    if out.exists() and not checkpoint.find(out):
        shutil.rmtree(out)  # broken off before its first checkpoint
    before = measure(file, cfg, device)
    clock.append(time.perf_counter())
    budget = cfg.budget(model=str(file), out_dir=str(out), resume=str(out) if out.exists() else "")
    if grpo.grpo(budget, device=device) is None:  # stopped by a signal: no row
        sys.exit(f"{out}: stopped and saved; the same command continues from there")
    clock.append(time.perf_counter())
    after = measure(out, cfg, device)
    clock.append(time.perf_counter())
    log = [row for row in files.read_rows(out / "metrics.jsonl")[0] if "reward" in row]
    return {
        "checkpoint": file.name,
        "settings": settings(cfg),
        **{name: getattr(model_cfg, name) for name in ("d_model", "n_experts", "top_k")},
        "seed": trained.get("seed", 0),
        "train_loss": known.get("train_loss", known.get("loss")),
        **{name: known.get(name) for name in ("run", "tpp", "val_loss")},
        "before": before,
        "after": after,
        "rewards": [round(row["reward"], 4) for row in log],
        **{name: [float(f"{row[name]:.4g}") for row in log] for name in ("kl", "grad_norm", "router_changed")},
        "seconds": [round(b - a, 1) for a, b in zip(clock, clock[1:], strict=False)],
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def main(argv=None):
    """Post-train the models that the results file lacks. Returns its rows."""
    cfg = config.parse(PosttrainConfig, argv, __doc__)
    names = dict.fromkeys(name for part in cfg.runs for name in sorted(glob.glob(part)))  # once each, in this order
    runs = [Path(name) for name in names if "-grpo-" not in Path(name).name and checkpoint.find(name)]
    require(runs, "runs", ",".join(cfg.runs), "no directory of that name holds a checkpoint (ckpt-*.pt)")
    wanted, usual = settings(cfg), settings(PosttrainConfig())  # a row made before a field existed had its default
    rows = read(cfg.results, ROW, optional=True)
    done = {row["checkpoint"] for row in rows if {name: (usual | row["settings"])[name] for name in wanted} == wanted}
    missing = [run for run in runs if checkpoint.find(run)[-1][1].name not in done]
    print(f"{len(runs)} runs, {len(missing)} of them to do", flush=True)
    check_file(cfg.results, "results")
    for run in missing:
        append(cfg.results, posttrain(run, cfg), ROW)
    return read(cfg.results, ROW)


def families(rows):
    """{(d, k, settings and training as text): {E: {seed: row}}}, the last row where there are several. Training is all
    fields of its study.execute.Run but those that a family varies."""
    varied, found = ("n_experts", "top_k", "seed", "lr"), {}
    for row in rows:
        training = {name: value for name, value in (row.get("run") or {}).items() if name not in varied}
        key = row["d_model"], row["top_k"], json.dumps([row["settings"], training], sort_keys=True)
        found.setdefault(key, {}).setdefault(row["n_experts"], {})[row["seed"]] = row
    return {key: dict(sorted(cells.items())) for key, cells in sorted(found.items())}


if __name__ == "__main__":
    config.command_line(main)
