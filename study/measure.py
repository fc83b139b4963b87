"""The measurements of a model of the study. Nothing is generated: one forward pass shows whether greedy decoding would
write an answer.

Every kind of run gives "facts" (memory) and, where it has questions, "problems" (reasoning, never trained):
{"loss": nats per token of the answers, share of right ones, ...}.
"""

import math

import numpy as np
import torch

from data import procedural, reasoning, shards, tokenizer, twohop
from eval import probes


def flat(directory, split):
    """All tokens of a split of a data directory, in memory."""
    return np.concatenate([np.asarray(shard) for shard in shards.open_shards(directory, split)])


@torch.no_grad()
def validation_loss(model, directory, seq_len, device):
    """Mean cross-entropy over the first 256 validation windows, in nats per token."""
    model.eval()
    tokens = flat(directory, "val")
    n = max(1, min(256, (len(tokens) - 1) // seq_len))
    ids = torch.from_numpy(np.resize(tokens, n * seq_len + 1).astype(np.int64)).to(device)  # a short split is repeated
    windows = (part.view(n, seq_len).split(64) for part in (ids[:-1], ids[1:]))
    return sum(float(model(x, y).loss) * len(x) for x, y in zip(*windows, strict=True)) / n


def mixture(model, directory, n, final):
    """Measures a model trained on data/procedural.py, with n items per kind. final: bits and longer problems too."""
    cfg, enc = procedural.read_config(directory), tokenizer.load(directory)
    most = cfg.reasoning.max_steps
    facts = probes.fact_recall(model, enc, cfg.facts, 5 * n)
    facts["by_attribute"] = {name: row["recall"] for name, row in facts["by_attribute"].items()}
    problems = probes.solutions_written(model, enc, cfg.reasoning, range(1, (most * 3 // 2 if final else most) + 1), n)
    shares = problems["accuracy"].items()
    known, beyond = ([share for s, share in shares if (s <= most) == trained] for trained in (True, False))
    seen = [reasoning.problem(cfg.reasoning, i) for i in range(min(4 * n, cfg.n_problems))]
    seen = probes.graded(model, enc, [(p.question, p.solution) for p in seen])
    mano = probes.mano_accuracy(model, enc, cfg.reasoning, 2 * n)
    within = [right for length, right in mano["accuracy"].items() if length <= cfg.reasoning.mano_length]
    solutions = {
        "loss": problems["loss"],
        "loss_seen": probes.loss_of(seen),
        "accuracy": sum(known) / len(known),
        "accuracy_seen": probes.share(seen),
        "beyond": sum(beyond) / len(beyond) if beyond else None,
        "by_steps": {str(s): share for s, share in shares},
    }
    mano["by_length"] = {str(length): right for length, right in mano["accuracy"].items()}
    mano["accuracy"] = sum(within) / max(1, len(within))
    bits = probes.stored_bits(model, enc, cfg.facts, 5 * n) if final else None
    return {"facts": facts, "bits": bits, "problems": solutions, "mano": mano}


def hops(model, directory, n, final):
    """Measures a model trained on data/twohop.py: facts, and two-hop questions that were trained or never trained."""
    cfg, enc = twohop.read_config(directory), tokenizer.load(directory)
    n_facts = cfg.entities * max(1, cfg.relations)
    grade = lambda kind, numbers: probes.graded(model, enc, twohop.texts(cfg, kind, numbers))

    known = grade("fact", np.linspace(0, n_facts - 1, min(n_facts, 20 * n)).astype(int))
    choices = cfg.entities if cfg.relations else cfg.names**2
    facts = {"overall": probes.share(known), "chance": 1 / choices}
    facts |= {"loss": probes.loss_of(known), "people": len(known)}
    found = {"facts": facts}
    if final:
        missing = sum(nats for nats, *_ in known) / len(known) / math.log(2)
        each, possible = max(0.0, math.log2(choices) - missing), n_facts * math.log2(choices)
        found["bits"] = {"values": each, "total": n_facts * each, "possible": possible}
    if cfg.composed:
        order = twohop.asked(cfg)
        unseen = grade("composed", order[cfg.composed :][: 10 * n])
        seen = grade("composed", order[: min(cfg.composed, 10 * n)])
        losses = {"loss": probes.loss_of(unseen), "loss_seen": probes.loss_of(seen)}
        shares = {"accuracy": probes.share(unseen), "accuracy_seen": probes.share(seen), "chance": 1 / choices}
        found["problems"] = losses | shares
    return found


def everything(run, directory, model, device, n, final):
    """All measurements of a model at one point of its training. n: their size, halved before the end."""
    measure = mixture if run.kind == "mixture" else hops
    with torch.compiler.set_stance("force_eager"):  # the compiled parts are for the shapes of training
        val_loss = validation_loss(model, directory, run.seq_len, device)
        return {"val_loss": val_loss, **measure(model, directory, n if final else n // 2 or 1, final)}
