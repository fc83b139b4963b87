"""What a model trained on data/procedural.py remembers, and what it can work out: the closing report of `python
train.py`.

    text, scores = report(model, "runs/x/data")

Recall is of trained facts in templates that training used too; reasoning is on problems whose templates training never
had. Everything is greedy and deterministic, seconds on a CPU for the default model.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
import torch.nn.functional as F

from data import facts, procedural, reasoning, tokenizer
from data.facts import FactsConfig
from data.procedural import prompt
from data.reasoning import ReasoningConfig
from eval.generate import any_shape, generate
from optimoe.sizes import count_params


@torch.no_grad()
@any_shape
def graded(model, enc, pairs, max_tokens: int = 2**15) -> list[tuple[float, int, bool]]:
    """(nats, tokens, right) of each answer after its question, for pairs of texts. right: greedy decoding would write
    the answer, that is, each of its tokens is the most probable one after those before it. The order of the pairs does
    not matter.
    """
    device, was_training = model.embed.weight.device, model.training
    model.eval()
    rows = [(len(start := prompt(enc, question)), start + enc.encode_ordinary(answer)) for question, answer in pairs]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][1]))  # similar lengths together
    results: list = [None] * len(rows)
    while order:
        take = max(1, max_tokens // len(rows[order[-1]][1]))
        batch, order = order[-take:], order[:-take]
        L = len(rows[batch[-1]][1])
        ids = torch.tensor([rows[i][1] + [-1] * (L - len(rows[i][1])) for i in batch]).to(device)
        starts = torch.tensor([rows[i][0] for i in batch]).to(device)
        targets = ids[:, 1:]
        scored = (torch.arange(1, L, device=device) >= starts[:, None]) & (targets >= 0)
        logits = model(ids[:, :-1].clamp(min=0)).logits[scored][:, : enc.n_vocab].float()
        row = scored.nonzero()[:, 0]
        sums = torch.zeros(3, len(batch), dtype=torch.float64, device=device)  # nats, tokens, wrong tokens
        sums[0].index_add_(0, row, F.cross_entropy(logits, targets[scored], reduction="none").double())
        sums[1].index_add_(0, row, torch.ones_like(row, dtype=torch.float64))
        sums[2].index_add_(0, row, (logits.argmax(1) != targets[scored]).double())
        for i, nats, tokens, wrong in zip(batch, *sums.tolist(), strict=True):
            results[i] = nats, int(tokens), not wrong
    model.train(was_training)
    return results


def loss_of(grades) -> float:
    """Nats per answer token: the task loss."""
    return sum(nats for nats, _, _ in grades) / sum(tokens for _, tokens, _ in grades)


def fact_recall(model, enc, cfg: FactsConfig, n_people: int = 1000) -> dict:
    """Share of values that greedy decoding completes exactly after name and stem, of the first n_people, by attribute.

    -> {"overall": share, "chance": share that the best constant answer gets, "loss": nats per token of the values,
    "people": n,
        "by_attribute": {name: {"recall", "chance"}}}
    """
    people = facts.people(cfg)[:n_people]
    probes = facts.probes(people, cfg.seed)
    grades = graded(model, enc, [(probe.prompt, probe.value + ".") for probe in probes])
    by_attribute = {}
    for k, attribute in enumerate(facts.ATTRIBUTES):
        rows = range(k, len(probes), len(facts.ATTRIBUTES))  # probes come person by person
        right = sum(grades[i][2] for i in rows)
        commonest = Counter(probes[i].value for i in rows).most_common(1)[0][1]
        by_attribute[attribute] = {"recall": right / len(rows), "chance": commonest / len(rows)}
    mean = {key: sum(row[key] for row in by_attribute.values()) / len(by_attribute) for key in ("recall", "chance")}
    return {
        "overall": mean["recall"],
        "chance": mean["chance"],
        "loss": loss_of(grades),
        "people": len(people),
        "by_attribute": by_attribute,
    }


@torch.no_grad()
@any_shape
def stored_bits(
    model, enc, cfg: FactsConfig, n_people: int = 1000, exposure: int = 10**6, batch_size: int = 64
) -> dict:
    """Information stored about all people, estimated on the first n_people, after Physics of Language Models 3.3:

        N (log2 N0 - p1 / ln 2) + N (log2 S0 - p2 / ln 2)

    p1, p2: mean summed cross-entropy in nats of the name's tokens, and of pronoun and values given the text before
    them, in new wordings. In a mixture p1 also pays for the choice of a biography among other documents: a bit or so
    per person.
    -> {"name", "values" (bits per person), "total" (bits), "possible", "per_parameter", "per_active_parameter"}
    """
    people = facts.people(cfg)[:n_people]
    device = model.embed.weight.device
    was_training = model.training
    model.eval()
    nats = torch.zeros(3, dtype=torch.float64)  # of what counts for nothing, names, values
    for start in range(0, len(people), batch_size):
        rows = [_labelled(enc, facts.segments(cfg, person, exposure)) for person in people[start : start + batch_size]]
        length = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [enc.eot_token] * (length - len(ids)) for ids, _ in rows], device=device)
        kinds = torch.tensor([kinds + [0] * (length - len(kinds)) for _, kinds in rows])
        losses = (
            F.cross_entropy(model(ids[:, :-1]).logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
            .double()
            .cpu()
        )
        nats.index_add_(0, kinds[:, 1:].flatten(), losses.flatten())
    model.train(was_training)
    name, values = (
        max(0.0, math.log2(choices) - float(nats[kind]) / len(people) / math.log(2))
        for kind, choices in ((1, cfg.name_choices), (2, cfg.value_choices))
    )
    total, params = cfg.n_people * (name + values), count_params(model.cfg)
    possible = cfg.n_people * (math.log2(cfg.name_choices / cfg.n_people) + math.log2(cfg.value_choices))
    return {
        "name": name,
        "values": values,
        "total": total,
        "possible": possible,
        "per_parameter": total / params.total,
        "per_active_parameter": total / params.active,
    }


def _labelled(enc, segments: list[str]) -> tuple[list[int], list[int]]:
    """Ids of eos and the biography; for each 1 in the name, 2 in a value or the first pronoun, else 0."""
    ids, kinds = [enc.eot_token], [0]
    for i, text in enumerate(segments):  # subject, stem, value, "." of each sentence
        kind = 1 if i == 0 else 2 if i % 4 == 2 or i == 4 else 0
        tokens = enc.encode_ordinary(text)
        ids += tokens
        kinds += [kind] * len(tokens)
    return ids, kinds


def reasoning_accuracy(
    model, enc, cfg: ReasoningConfig, steps=None, n: int = 50, split: str = "test", batch_size: int = 256
) -> dict:
    """Greedy solutions of n problems for each number of steps (default: 1 to two more than in training, as far as
    seq_len allows).

    -> {steps: {"answer": share of right answers, "solution": share of right solutions, "chance": that of the best
    constant answer}}
    """
    problems = []
    for s in steps or range(1, cfg.max_steps + 3):
        group = [reasoning.problem(cfg, i, split, s) for i in range(n)]
        if (
            steps is None
            and max(len(enc.encode_ordinary(p.question + p.solution)) for p in group) + 4 > model.cfg.seq_len
        ):
            break
        problems += group
    found = solve(model, enc, problems, batch_size)
    rows = {}
    for p, text in zip(problems, found, strict=True):
        rows.setdefault(p.steps, []).append((p, *reasoning.check(p.question, text, cfg.modulus)))
    return {
        s: {
            "answer": sum(answer for _, answer, _ in group) / len(group),
            "solution": sum(full for *_, full in group) / len(group),
            "chance": Counter(p.answer for p, *_ in group).most_common(1)[0][1] / len(group),
        }
        for s, group in rows.items()
    }


def solve(model, enc, problems, batch_size: int = 256) -> list[str]:
    """The greedy continuation of each question, up to eos or the end of the model's window."""
    prompts = [prompt(enc, p.question) for p in problems]
    room = max(len(enc.encode_ordinary(p.solution)) for p in problems) + 2
    room = min(room, model.cfg.seq_len - max(map(len, prompts)))
    return [
        enc.decode(ids)
        for ids in generate(model, prompts, room, [enc.eot_token], batch_size=batch_size, n_vocab=enc.n_vocab)
    ]


def mano_accuracy(model, enc, cfg: ReasoningConfig, n: int = 200) -> dict:
    """Right answers to n expressions of each length that training never had, from 2 operations to two more than it had:
    nothing is written down between question and answer.

    -> {"loss": nats per answer of trained lengths, "accuracy": {length: share}, "chance": share of the best constant
    answer among trained
        lengths; products make 0 the commonest}
    """
    lengths = range(2, cfg.mano_length + 3)
    problems = [reasoning.mano(cfg, i, "test", length) for length in lengths for i in range(n)]
    grades = graded(model, enc, [(p.question, p.solution.removesuffix(".")) for p in problems])
    known = [i for i, p in enumerate(problems) if p.steps <= cfg.mano_length] or range(len(problems))
    commonest = Counter(problems[i].answer for i in known).most_common(1)[0][1]
    accuracy = {
        length: sum(right for p, (_, _, right) in zip(problems, grades, strict=True) if p.steps == length) / n
        for length in lengths
    }
    return {
        "loss": sum(grades[i][0] for i in known) / len(known),
        "accuracy": accuracy,
        "chance": commonest / len(known),
    }


def solutions_written(model, enc, cfg: ReasoningConfig, steps, n: int, split: str = "test") -> dict:
    """Whole solutions of n problems of each number of steps, without generating them: right is one that greedy decoding
    would write token for token, which one forward pass tells. A problem has no other solution, so
    this is the "solution" of `reasoning_accuracy` at a fraction of its time, but for solutions that are right after a
    wrong plan. Untrained steps that do not fit the model's window are left out.

    -> {"loss": nats per token of the trained numbers of steps, "accuracy": {steps: share}}
    """
    problems = []
    for s in steps:
        group = [reasoning.problem(cfg, i, split, s) for i in range(n)]
        if s > cfg.max_steps and max(len(prompt(enc, p.question + p.solution)) for p in group) > model.cfg.seq_len:
            break
        problems += group
    grades = graded(model, enc, [(p.question, p.solution) for p in problems])
    right = {}
    for p, (_, _, whole) in zip(problems, grades, strict=True):
        right.setdefault(p.steps, []).append(whole)
    return {
        "loss": loss_of([grade for p, grade in zip(problems, grades, strict=True) if p.steps <= cfg.max_steps]),
        "accuracy": {s: sum(group) / n for s, group in right.items()},
    }


def _trained(steps: int, most: int) -> str:
    return f"{steps}" if steps <= most else f"{steps} (untrained)"


def report(model, data_dir, n_people: int = 200, n_problems: int = 50) -> tuple[str, dict]:
    """(table and two samples for people to read, everything as a dict for results.json)."""
    cfg, enc = procedural.read_config(data_dir), tokenizer.load(data_dir)
    lines, scores, samples = [], {}, []
    if cfg.exposures:
        recall, bits = fact_recall(model, enc, cfg.facts, n_people), stored_bits(model, enc, cfg.facts, n_people)
        scores |= {"facts": recall, "bits": bits}
        lines += [
            "",
            f"facts remembered about {cfg.facts.n_people:,} people, each seen {cfg.exposures} times",
            f"{'':<16}{'recall':>8}{'chance':>8}",
        ]
        lines += [
            f"{name:<16}{row['recall']:>8.1%}{row['chance']:>8.1%}" for name, row in recall["by_attribute"].items()
        ]
        lines += [
            f"{'overall':<16}{recall['overall']:>8.1%}{recall['chance']:>8.1%}",
            f"{bits['total']:,.0f} of {bits['possible']:,.0f} bits stored: {bits['per_parameter']:.4f} per parameter, "
            f"{bits['per_active_parameter']:.4f} per active parameter",
        ]
        person = facts.people(cfg.facts)[0]
        samples.append(person.name)
    if cfg.n_problems:
        accuracy = reasoning_accuracy(model, enc, cfg.reasoning, n=n_problems)
        scores["reasoning"] = accuracy
        lines += ["", "reasoning on unseen templates", f"{'steps':<16}{'answer':>8}{'solution':>10}{'chance':>8}"]
        for s, row in accuracy.items():
            steps = _trained(s, cfg.reasoning.max_steps)
            lines.append(f"{steps:<16}{row['answer']:>8.1%}{row['solution']:>10.1%}{row['chance']:>8.1%}")
        samples.append(reasoning.problem(cfg.reasoning, n_problems, "test", min(3, cfg.reasoning.max_steps)).question)
    if cfg.n_mano:
        mano = scores["mano"] = mano_accuracy(model, enc, cfg.reasoning, n_problems)
        lines += ["", "mental arithmetic, without any steps", f"{'operations':<16}{'answer':>8}{'chance':>8}"]
        lines += [
            f"{_trained(s, cfg.reasoning.mano_length):<16}{right:>8.1%}{mano['chance']:>8.1%}"
            for s, right in mano["accuracy"].items()
        ]
    prompts = [prompt(enc, text) for text in samples]
    room = min(96, model.cfg.seq_len - max(map(len, prompts), default=0))
    scores["samples"] = []
    for text, ids in zip(samples, generate(model, prompts, room, [enc.eot_token], n_vocab=enc.n_vocab), strict=True):
        new = enc.decode(ids)
        scores["samples"].append({"prompt": text, "text": new})
        lines += ["", f"prompt: {text}", f"sample:{new}"]
    return "\n".join(lines), scores
