"""What a model trained on data/procedural.py remembers, and what it can work out: the closing report of
`python train.py`.

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
def costs(model, n_vocab: int, rows: list[tuple[list[int], list[int]]], max_tokens: int = 2**15) -> torch.Tensor:
    """(rows, 3, 3) float64: the nats, tokens and wrong tokens of each kind, 0, 1 or 2, in rows of (ids, kinds of ids).
    Wrong is a token that is not the most probable one after those before it. Tokens of kind 0 are not scored."""
    device, was_training = model.embed.weight.device, model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))  # similar lengths together
    results = torch.zeros(len(rows), 3, 3, dtype=torch.float64)
    while order:
        take = max(1, max_tokens // len(rows[order[-1]][0]))
        batch, order = order[-take:], order[:-take]
        L = len(rows[batch[-1]][0])
        ids, kinds = (torch.tensor([rows[i][j] + [0] * (L - len(rows[i][j])) for i in batch]) for j in (0, 1))
        ids, kinds = ids.to(device), kinds[:, 1:].to(device)
        scored = kinds > 0
        logits = model(ids[:, :-1]).logits[scored][:, :n_vocab].float()
        wanted, where = ids[:, 1:][scored], scored.nonzero()[:, 0] * 3 + kinds[scored]
        nats, wrong = F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(1) != wanted
        sums = torch.zeros(len(batch) * 3, 3, dtype=torch.float64, device=device)
        sums.index_add_(0, where, torch.stack([nats.double(), torch.ones_like(nats).double(), wrong.double()], 1))
        results[batch] = sums.view(-1, 3, 3).cpu()
    model.train(was_training)
    return results


def graded(model, enc, pairs, max_tokens: int = 2**15) -> list[tuple[float, int, bool]]:
    """(nats, tokens, right) of each answer after its question, for pairs of texts. right: greedy decoding would write
    the answer. The order of the pairs does not matter."""
    rows = []
    for question, answer in pairs:
        start, new = prompt(enc, question), enc.encode_ordinary(answer)
        rows.append((start + new, [0] * len(start) + [1] * len(new)))
    found = costs(model, enc.n_vocab, rows, max_tokens)[:, 1].tolist()
    return [(nats, int(tokens), not wrong) for nats, tokens, wrong in found]


def loss_of(grades) -> float:
    """Nats per answer token: the task loss."""
    return sum(nats for nats, _, _ in grades) / sum(tokens for _, tokens, _ in grades)


def fact_recall(model, enc, cfg: FactsConfig, n_people: int = 1000) -> dict:
    """Share of values that greedy decoding completes exactly after name and stem, of the first n_people, by attribute.

    -> {"overall": share, "chance": share that the best constant answer gets, "loss": nats per token of the values,
    "people": n, "by_attribute": {name: {"recall", "chance"}}}
    """
    people = facts.people(cfg)[:n_people]
    probes = facts.probes(people, cfg.seed)
    grades = graded(model, enc, [(probe.prompt, probe.value + ".") for probe in probes])
    by_attribute = {}
    for k, attribute in enumerate(facts.ATTRIBUTES):
        rows = range(k, len(probes), len(facts.ATTRIBUTES))  # probes come person by person
        recall = sum(grades[i][2] for i in rows) / len(rows)
        by_attribute[attribute] = {"recall": recall, "chance": _commonest(probes[i].value for i in rows)}
    recall, chance = (
        sum(row[key] for row in by_attribute.values()) / len(by_attribute) for key in ("recall", "chance")
    )
    counts = {"loss": loss_of(grades), "people": len(people)}
    return {"overall": recall, "chance": chance, **counts, "by_attribute": by_attribute}


def _commonest(values) -> float:
    """Share of the commonest of these values: what the best constant answer gets."""
    values = list(values)
    return Counter(values).most_common(1)[0][1] / len(values)


def stored_bits(model, enc, cfg: FactsConfig, n_people: int = 1000, exposure: int = 10**6) -> dict:
    """Information stored about all people, estimated on the first n_people, after Physics of Language Models 3.3:

        N (log2 N0 - p1 / ln 2) + N (log2 S0 - p2 / ln 2)

    p1, p2: mean summed cross-entropy in nats of the name's tokens, and of pronoun and values given the text before
    them, in new wordings. In a mixture p1 also pays for the choice of a biography among other documents: a bit or so
    per person.
    -> {"name", "values" (bits per person), "total" (bits), "possible", "per_parameter", "per_active_parameter"}
    """
    people = facts.people(cfg)[:n_people]
    nats = costs(model, enc.n_vocab, [_labelled(enc, facts.segments(cfg, person, exposure)) for person in people])
    name, values = (
        max(0.0, math.log2(choices) - float(nats[:, kind, 0].mean()) / math.log(2))
        for kind, choices in ((1, cfg.name_choices), (2, cfg.value_choices))
    )
    total, params = cfg.n_people * (name + values), count_params(model.cfg)
    possible = cfg.n_people * (math.log2(cfg.name_choices / cfg.n_people) + math.log2(cfg.value_choices))
    per = {"per_parameter": total / params.total, "per_active_parameter": total / params.active}
    return {"name": name, "values": values, "total": total, "possible": possible, **per}


def _labelled(enc, segments: list[str]) -> tuple[list[int], list[int]]:
    """Ids of eos and the biography; for each 1 in the name, 2 in a value or the first pronoun, else 0."""
    ids, kinds = [enc.eot_token], [0]
    for i, text in enumerate(segments):  # subject, stem, value, "." of each sentence
        kind = 1 if i == 0 else 2 if i % 4 == 2 or i == 4 else 0
        tokens = enc.encode_ordinary(text)
        ids += tokens
        kinds += [kind] * len(tokens)
    return ids, kinds


def _problems(enc, cfg: ReasoningConfig, steps, n: int, split: str, always: int, room: int) -> dict:
    """{steps: n problems}, up to the first number of steps above `always` with a problem of more than `room` tokens."""
    found = {}
    for s in steps:
        group = [reasoning.problem(cfg, i, split, s) for i in range(n)]
        if s > always and max(len(prompt(enc, p.question + p.solution)) for p in group) > room:
            break
        found[s] = group
    return found


def reasoning_accuracy(
    model, enc, cfg: ReasoningConfig, steps=None, n: int = 50, split: str = "test", batch_size: int = 256
) -> dict:
    """Greedy solutions of n problems for each number of steps (default: 1 to two more than in training, as far as
    seq_len allows).

    -> {steps: {"answer": share of right answers, "solution": share of right solutions, "chance": that of the best
    constant answer}}
    """
    wanted, always = steps or range(1, cfg.max_steps + 3), max(steps) if steps else 0
    groups = _problems(enc, cfg, wanted, n, split, always, model.cfg.seq_len - 3)
    problems = [p for group in groups.values() for p in group]
    prompts = [prompt(enc, p.question) for p in problems]
    room = max(len(enc.encode_ordinary(p.solution)) for p in problems) + 2
    room = min(room, model.cfg.seq_len - max(map(len, prompts)))
    written = generate(model, prompts, room, [enc.eot_token], batch_size=batch_size, n_vocab=enc.n_vocab)
    checked = (
        reasoning.check(p.question, enc.decode(new), cfg.modulus) for p, new in zip(problems, written, strict=True)
    )
    rows = {}
    for s, group in groups.items():
        answers, solutions = zip(*(next(checked) for _ in group), strict=True)
        shares = {"answer": sum(answers) / len(group), "solution": sum(solutions) / len(group)}
        rows[s] = shares | {"chance": _commonest(p.answer for p in group)}
    return rows


def solutions_written(model, enc, cfg: ReasoningConfig, steps, n: int, split: str = "test") -> dict:
    """Whole solutions of n problems of each number of steps, without generating them: right is one that greedy decoding
    would write token for token, which one forward pass tells. A problem has no other solution, so
    this is the "solution" of `reasoning_accuracy` at a fraction of its time, but for solutions that are right after a
    wrong plan. Untrained steps that do not fit the model's window are left out.

    -> {"loss": nats per token of the trained numbers of steps, "accuracy": {steps: share}}
    """
    groups = _problems(enc, cfg, steps, n, split, cfg.max_steps, model.cfg.seq_len)
    grades = iter(graded(model, enc, [(p.question, p.solution) for group in groups.values() for p in group]))
    by_steps = {s: [next(grades) for _ in group] for s, group in groups.items()}
    known = [grade for s, group in by_steps.items() if s <= cfg.max_steps for grade in group]
    return {"loss": loss_of(known), "accuracy": {s: _share(group) for s, group in by_steps.items()}}


def _share(grades) -> float:
    return sum(right for *_, right in grades) / len(grades)


def mano_accuracy(model, enc, cfg: ReasoningConfig, n: int = 200) -> dict:
    """Right answers to n expressions of each length that training never had, from 2 operations to two more than it had:
    nothing is written down between question and answer.

    -> {"loss": nats per answer of trained lengths, "accuracy": {length: share}, "chance": share of the best constant
    answer among trained lengths; products make 0 the commonest}
    """
    lengths = range(2, cfg.mano_length + 3)
    problems = [reasoning.mano(cfg, i, "test", length) for length in lengths for i in range(n)]
    grades = graded(model, enc, [(p.question, p.solution.removesuffix(".")) for p in problems])
    known = n * max(0, cfg.mano_length - 1) or len(problems)  # lengths that training had come first
    return {
        "loss": sum(nats for nats, *_ in grades[:known]) / known,
        "accuracy": {length: _share(grades[i * n : (i + 1) * n]) for i, length in enumerate(lengths)},
        "chance": _commonest(p.answer for p in problems[:known]),
    }


def report(model, data_dir, n_people: int = 200, n_problems: int = 50) -> tuple[str, dict]:
    """(table and two samples for people to read, everything as a dict for results.json)."""
    cfg, enc = procedural.read_config(data_dir), tokenizer.load(data_dir)
    lines, scores, samples = [], {}, []

    def table(title, first, columns, rows):
        lines.extend(["", title, f"{first:<16}" + "".join(f"{column:>10}" for column in columns)])
        lines.extend(f"{name:<16}" + "".join(f"{row[column]:>10.1%}" for column in columns) for name, row in rows)

    def trained(rows, most):
        return [(f"{s}" if s <= most else f"{s} (untrained)", row) for s, row in rows.items()]

    if cfg.exposures:
        recall, bits = fact_recall(model, enc, cfg.facts, n_people), stored_bits(model, enc, cfg.facts, n_people)
        scores |= {"facts": recall, "bits": bits}
        title = f"facts remembered about {cfg.facts.n_people:,} people, each seen {cfg.exposures} times"
        overall = {"recall": recall["overall"], "chance": recall["chance"]}
        table(title, "", ("recall", "chance"), [*recall["by_attribute"].items(), ("overall", overall)])
        per = f"{bits['per_parameter']:.4f} per parameter, {bits['per_active_parameter']:.4f} per active parameter"
        lines.append(f"{bits['total']:,.0f} of {bits['possible']:,.0f} bits stored: {per}")
        samples.append(facts.people(cfg.facts)[0].name)
    if cfg.n_problems:
        accuracy = scores["reasoning"] = reasoning_accuracy(model, enc, cfg.reasoning, n=n_problems)
        rows = trained(accuracy, cfg.reasoning.max_steps)
        table("reasoning on unseen templates", "steps", ("answer", "solution", "chance"), rows)
        samples.append(reasoning.problem(cfg.reasoning, n_problems, "test", min(3, cfg.reasoning.max_steps)).question)
    if cfg.n_mano:
        mano = scores["mano"] = mano_accuracy(model, enc, cfg.reasoning, n_problems)
        rows = {s: {"answer": right, "chance": mano["chance"]} for s, right in mano["accuracy"].items()}
        rows = trained(rows, cfg.reasoning.mano_length)
        table("mental arithmetic, without any steps", "operations", ("answer", "chance"), rows)
    prompts = [prompt(enc, text) for text in samples]
    room = min(96, model.cfg.seq_len - max(map(len, prompts), default=0))
    written = generate(model, prompts, room, [enc.eot_token], n_vocab=enc.n_vocab)
    scores["samples"] = [{"prompt": text, "text": enc.decode(new)} for text, new in zip(samples, written, strict=True)]
    lines += [f"\nprompt: {sample['prompt']}\nsample:{sample['text']}" for sample in scores["samples"]]
    return "\n".join(lines), scores
