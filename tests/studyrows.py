"""A small run, and rows of results files with made-up measurements, for the tests of the study."""

import dataclasses
import random

from optimoe.sizes import count_params, flops_per_token
from study import execute as run
from study.execute import Run, key

TINY = Run(
    d_model=32,
    n_layers=1,
    n_experts=4,
    top_k=2,
    d_expert=32,
    tokens=40 * 4 * 96,
    lr=1e-2,
    batch=4,
    seq_len=96,
    people=20,
    max_steps=2,
    mano_length=2,
    modulus=5,
    data_tokens=2**14,
)


def fake(config, effect):
    """A row with made-up measurements: effect(run, tpp) -> (loss of facts, loss of solutions, training loss).

    Its noise is the run's own, whatever other tests have made before."""
    cfg, rng = run.train_config(config, 1344), random.Random(key(config))
    params = count_params(cfg)
    memory, reason, loss = effect(config, config.tokens / params.total)

    def point(share):
        noise = lambda: rng.gauss(0, 0.002)
        later = loss + 0.5 * (1 - share)
        a, b = memory / share + noise(), reason / share + noise()
        return {
            "train_loss": later + noise(),
            "val_loss": later,
            "facts": {"overall": max(0, 1 - a / 2), "loss": a},
            "problems": {"accuracy": max(0.0, 1 - b), "loss": b},
            "mano": {"accuracy": max(0.0, 1 - b), "loss": later},
        }

    return {
        "key": key(config),
        "run": dataclasses.asdict(config),
        "lr": cfg.lr,
        "diverged": False,
        "tokens": config.tokens,
        "jobs": 1,
        "tpp": config.tokens / params.total,
        "params": params._asdict(),
        "flops": config.tokens * flops_per_token(cfg),
        "points": [point(0.5)],
        **point(1.0),
        "seconds": 10.0,
        "train_seconds": 8.0,
        "tokens_per_s": config.tokens / 8,
        "device": "NVIDIA fake",
        "bits": {"per_parameter": memory, "per_active_parameter": memory, "total": memory, "possible": 1},
    }


def grid(effect, experts=(8, 16, 32, 64, 128, 256), ks=(2, 8), rates=(3e-3, 6e-3, 1.2e-2), seeds=3, **fields):
    """Rows of every (E, k, rate, seed); effect as in `fake`."""
    return [
        fake(Run(n_experts=e, top_k=k, lr=rate, seed=seed, **fields), effect)
        for k in ks
        for e in experts
        for rate in rates
        for seed in range(seeds)
    ]


def finished(preset, effect):
    """Rows of all that a preset asks for until it has nothing more to ask."""
    rows = []
    while todo := [r for r in dict.fromkeys(preset(rows)) if key(r) not in {row["key"] for row in rows}]:
        rows += [fake(r, effect) for r in todo]
    return rows
