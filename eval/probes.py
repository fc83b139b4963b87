"""What a model trained on data/procedural.py remembers, and what it can work out: for train.py and the study.

    text, scores = report(model, "runs/x/data")

Facts are those of training; problems have templates that training never had. Answers are not generated, except two
samples: one forward pass tells whether greedy decoding would write an answer.
"""

import math
from collections import Counter

import torch

from data import facts, procedural, reasoning, tokenizer
from data.facts import FactsConfig
from data.procedural import prompt
from data.reasoning import ReasoningConfig
from eval.generate import generate
from eval.taskloss import token_costs
from optimoe.sizes import count_params


def graded(model, enc, pairs, max_tokens: int | None = None) -> list[tuple[float, int, bool]]:
    """(nats, tokens, right) of each (question, answer). right: greedy decoding would write the answer."""
    ids = [(prompt(enc, question), enc.encode_ordinary(answer)) for question, answer in pairs]
    costs = token_costs(model, ids, max_tokens, enc.n_vocab)
    return [(float(nats.sum()), len(nats), bool(best.all())) for nats, best in costs]


def loss_of(grades) -> float:
    """Nats per answer token: the task loss."""
    return sum(nats for nats, _, _ in grades) / sum(tokens for _, tokens, _ in grades)


def share(grades) -> float:
    return sum(right for *_, right in grades) / len(grades)


def commonest(values) -> float:
    """Share of the commonest of these values: what the best constant answer gets."""
    counts = Counter(values)
    return max(counts.values()) / counts.total()


def fact_recall(model, enc, cfg: FactsConfig, n_people: int = 1000) -> dict:
    """For the first n_people: the share of values that greedy decoding writes after a name and the stem of a sentence.
    "chance" is the share of the best constant answer; "loss" is in nats per token of the values."""
    people = facts.people(cfg)[:n_people]
    probes = facts.probes(people, cfg.seed)
    grades = graded(model, enc, [(probe.prompt, probe.value + ".") for probe in probes])
    by_attribute, n = {}, len(facts.ATTRIBUTES)
    for k, attribute in enumerate(facts.ATTRIBUTES):  # probes come person by person
        chance = commonest(probe.value for probe in probes[k::n])
        by_attribute[attribute] = {"recall": share(grades[k::n]), "chance": chance}
    overall, chance = (sum(row[key] for row in by_attribute.values()) / n for key in ("recall", "chance"))
    counts = {"loss": loss_of(grades), "people": len(people)}
    return {"overall": overall, "chance": chance, **counts, "by_attribute": by_attribute}


def stored_bits(model, enc, cfg: FactsConfig, n_people: int = 1000) -> dict:
    """Information stored about all people, estimated on the first n_people, after Physics of Language Models 3.3:

        N (log2 N0 - p1 / ln 2) + N (log2 S0 - p2 / ln 2)

    p1, p2: mean nats of the name, and of pronoun and values given the text before them, in new wordings. Bits are
    per person for "name" and "values", else of all. In a mixture p1 includes the choice of a biography."""
    people, pairs, kinds = facts.people(cfg)[:n_people], [], []
    for person in people:
        pairs.append(([enc.eot_token], []))
        for i, text in enumerate(facts.segments(cfg, person, 10**6)):  # subject, stem, value, "." of each sentence
            tokens = enc.encode_ordinary(text)
            pairs[-1][1].extend(tokens)
            kinds += ["name" if i == 0 else "value" if i % 4 == 2 or i == 4 else ""] * len(tokens)
    nats = torch.cat([costs for costs, _ in token_costs(model, pairs, n_vocab=enc.n_vocab)])

    def bits(kind, choices):
        spent = float(nats[torch.tensor([k == kind for k in kinds])].sum()) / len(people)
        return max(0.0, math.log2(choices) - spent / math.log(2))

    name, values = bits("name", cfg.name_choices), bits("value", cfg.value_choices)
    total, params = cfg.n_people * (name + values), count_params(model.cfg)
    possible = cfg.n_people * (math.log2(cfg.name_choices / cfg.n_people) + math.log2(cfg.value_choices))
    per = {"per_parameter": total / params.total, "per_active_parameter": total / params.active}
    return {"name": name, "values": values, "total": total, "possible": possible, **per}


def solved(model, enc, draw, sizes, trained: int, n: int) -> dict:
    """The share of n unseen problems draw(i, size) of each size whose whole solution greedy decoding would write.
    Untrained sizes that do not fit the model's window are left out. "loss" (nats per token) and "chance" (the share of
    the best constant answer) are over trained sizes."""
    grades, answers = {}, []
    for size in sizes:
        problems = [draw(i, size) for i in range(n)]
        longest = max(len(prompt(enc, p.question + p.solution)) for p in problems)
        if size > trained and longest > model.cfg.seq_len:
            break
        grades[size] = graded(model, enc, [(p.question, p.solution) for p in problems])
        answers += [p.answer for p in problems if size <= trained]
    known = [grade for size, group in grades.items() if size <= trained for grade in group]
    accuracy = {size: share(group) for size, group in grades.items()}
    return {"loss": loss_of(known), "accuracy": accuracy, "chance": commonest(answers)}


def solutions_written(model, enc, cfg: ReasoningConfig, steps, n: int) -> dict:
    """`solved` for word problems of these numbers of steps. Each solution can be written in one way only."""
    return solved(model, enc, lambda i, s: reasoning.problem(cfg, i, "test", s), steps, cfg.max_steps, n)


def fits_grpo(data_dir, seq_len: int) -> bool:
    """Whether grpo.py can ask a model with this seq_len about some word problem of the data: questions may take half of
    it, and the solution must fit too."""
    cfg, enc = procedural.read_config(data_dir).reasoning, tokenizer.load(data_dir)

    def fits(problem):
        whole = len(prompt(enc, problem.question + problem.solution))
        return len(prompt(enc, problem.question)) <= seq_len // 2 and whole <= seq_len

    return all(any(fits(reasoning.problem(cfg, i, split, 1)) for i in range(100)) for split in ("train", "test"))


def mano_accuracy(model, enc, cfg: ReasoningConfig, n: int = 200) -> dict:
    """`solved` for expressions of up to two operations more than in training. Only the answer is written,
    no steps. Products make 0 the commonest answer."""

    def draw(i, length):
        problem = reasoning.mano(cfg, i, "test", length)
        return problem._replace(solution=problem.solution.removesuffix("."))

    return solved(model, enc, draw, range(2, cfg.mano_length + 3), max(cfg.mano_length, 2), n)


def table(title, first, rows, trained=None):
    """Lines of a table of {name: {column: share}}; numbers above `trained` are marked."""
    width = max(16, *(len(str(name)) + 1 for name in rows))
    columns = {column: max(10, len(column) + 1) for column in next(iter(rows.values()))}
    yield from ("", title, first.ljust(width) + "".join(column.rjust(columns[column]) for column in columns))
    for name, row in rows.items():
        mark = " (untrained)" if trained and name > trained else ""
        yield f"{name}{mark}".ljust(width) + "".join(f"{row[column]:>{columns[column]}.1%}" for column in columns)


def report(model, data_dir, n_people: int = 200, n_problems: int = 50) -> tuple[str, dict]:
    """(tables and two samples for people to read, everything as a dict for results.json)."""
    cfg, enc = procedural.read_config(data_dir), tokenizer.load(data_dir)
    lines, scores, asked, most = [], {}, [], cfg.reasoning.max_steps
    if cfg.exposures:
        recall, bits = fact_recall(model, enc, cfg.facts, n_people), stored_bits(model, enc, cfg.facts, n_people)
        scores |= {"facts": recall, "bits": bits}
        title = f"facts remembered about {cfg.facts.n_people:,} people, each seen {cfg.exposures} times"
        overall = {"recall": recall["overall"], "chance": recall["chance"]}
        lines += table(title, "", recall["by_attribute"] | {"overall": overall})
        per = f"{bits['per_parameter']:.4f} per parameter, {bits['per_active_parameter']:.4f} per active parameter"
        lines.append(f"{bits['total']:,.0f} of {bits['possible']:,.0f} bits stored: {per}")
        asked.append(facts.people(cfg.facts)[0].name)
    if cfg.n_problems:
        found = solutions_written(model, enc, cfg.reasoning, range(1, most + 3), n_problems)
        rows = {s: {"solution": right, "chance": found["chance"]} for s, right in found["accuracy"].items()}
        lines += table("reasoning on unseen templates", "steps", rows, most)
        scores["reasoning"] = rows
        asked.append(reasoning.problem(cfg.reasoning, n_problems, "test", min(3, most)).question)
    if cfg.n_mano:
        mano = scores["mano"] = mano_accuracy(model, enc, cfg.reasoning, n_problems)
        rows = {s: {"answer": right, "chance": mano["chance"]} for s, right in mano["accuracy"].items()}
        lines += table("mental arithmetic, without any steps", "operations", rows, cfg.reasoning.mano_length)
    seq_len = model.cfg.seq_len
    asked = asked if seq_len > 1 else []  # else there is no room for another token
    prompts = [prompt(enc, text) for text in asked]
    room = min(96, max(seq_len // 2, seq_len - max(map(len, prompts), default=0)))
    prompts = [ids[max(0, len(ids) + room - seq_len) :] for ids in prompts]
    written = generate(model, prompts, room, [enc.eot_token], n_vocab=enc.n_vocab)
    scores["samples"] = [{"prompt": text, "text": enc.decode(new)} for text, new in zip(asked, written, strict=True)]
    lines += [f"\nprompt: {sample['prompt']}\nsample:{sample['text']}" for sample in scores["samples"]]
    return "\n".join(lines), scores
