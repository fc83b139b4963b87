"""Reasoning problems with worked solutions, in the manner of iGSM (arXiv 2407.20311), small enough for tiny models.

    Given: lamp is kite plus 4. kite is 5. drum is 3 times lamp. What is drum?
    Solution: lamp = kite + 4 = 5 + 4 = 9. drum = 3 * lamp = 3 * 9 = 7. Answer: 7.

(one line in the data; arithmetic modulo 10 here). A problem is a directed acyclic graph of named quantities: leaves are numbers,
every other quantity is one operation on one or two others. The statements come in shuffled order, so the solver must find what can
be computed next, look up its definition and the values of its operands, and do the arithmetic; `steps` counts the operations.
The worked solution takes one step per operation, in an order in which every operand is known before it is used.

A problem is drawn from (seed, index) alone. Training and test problems never share a template: the graph with its operations,
without names, numbers and sentence order. One fifth of all templates are for testing. Problems of a single step have only five
templates, all of which a solver must have seen, so there the numbers belong to the template.

`mano` (arXiv 2407.20311's successor, Physics of Language Models 4.1) is the solution-free counterpart: mental arithmetic on a prefix expression.
"""
from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

NOUNS = """anvil apple arrow badge banjo barrel basket bell bench blanket boot bottle brush bucket button cabin candle carpet chair clock
coat comb compass crate cup dagger desk door drum easel fan feather fence flute fork globe glove hammer harp hat helmet hook
jacket jar kettle key kite knife ladder lamp lantern lens locker mask mirror mitten nail needle oar organ paddle pencil piano pillow
pipe plate pot pump quilt rake ribbon ring robe rope rug saddle scarf shelf shoe shovel sled spoon stamp stool sword table tent
tile towel tower trunk tub vase violin wagon wheel whistle window""".split()

LEAF, ADD_C, SUB_C, MUL_C, ADD, SUB = range(6)
TEST_SHARE = 5  # one template in five is a test template


@dataclass(frozen=True)
class ReasoningConfig:
    """Which problems are drawn. A problem is a function of this, the index and the split."""
    max_steps: int = 6  # operations in the solution, uniform on 1..max_steps
    modulus: int = 10  # all arithmetic is modulo this
    distractors: int = 0  # up to this many quantities that the question does not need, uniform on 0..distractors
    share: float = 0.25  # probability that an operand is a quantity already in use, where there is one (0: trees)
    names: int = 40  # size of the pool of names
    plan: bool = False  # the solution starts by listing the needed quantities from the question backwards
    seed: int = 0

    def validate(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps}: need at least 1")
        if not 3 <= self.modulus <= 1000:
            raise ValueError(f"modulus={self.modulus}: need 3..1000")
        most = 2 * self.max_steps + 1 + self.distractors  # a sum of two new quantities at every step
        if not most <= self.names <= len(NOUNS):
            raise ValueError(f"names={self.names}: need {most} (2 * max_steps + 1 + distractors) to {len(NOUNS)}")


class Problem(NamedTuple):
    question: str  # "Given: ... What is drum? Solution:"
    solution: str  # " lamp = ... Answer: 7."
    answer: int
    steps: int
    template: int  # 32-bit hash of the structure; template % 5 == 0 is a test template


def problem(cfg: ReasoningConfig, index: int, split: str = "train", steps: int | None = None) -> Problem:
    """The index-th problem of a split ("train" or "test"); `steps` fixes the number of operations, also beyond cfg.max_steps."""
    test = {"train": False, "test": True}[split]
    rng = random.Random(((cfg.seed * 2 + test) * 1009 + (steps or 0)) << 40 | index)
    while True:
        s = steps or 1 + int(rng.random() * cfg.max_steps)
        graph, order = _draw_graph(rng.random, s, cfg)
        template = _template(graph, order)
        if (template % TEST_SHARE == 0) == test:
            return _render(rng, graph, order, template, cfg)


def _draw_graph(r, steps: int, cfg: ReasoningConfig):
    """Grow the graph backwards from the queried quantity 0: an operation only refers to quantities that are not expanded yet,
    so there are no cycles, every quantity is needed, and the reverse of the order of expansion is an order of solution."""
    m = cfg.modulus
    factors = [c for c in range(2, m) if math.gcd(c, m) == 1]  # invertible, so products do not pile up on 0
    graph = [None]  # (op, x, y): x, y are quantities or, for y of the *_C operations, a constant
    frontier, order = [0], []
    for _ in range(steps):
        node = frontier.pop(int(r() * len(frontier)))
        op = 1 + int(r() * 5)
        operands = []
        for _ in range(1 if op < ADD else 2):
            pool = [q for q in frontier if q not in operands] if frontier and r() < cfg.share else None
            if pool:
                operands.append(pool[int(r() * len(pool))])
            else:
                operands.append(len(graph))
                frontier.append(len(graph))
                graph.append(None)
        if op == MUL_C:
            second = factors[int(r() * len(factors))]
        elif op < ADD:
            second = 1 + int(r() * (m - 1))
        else:
            second = operands[1]
        graph[node] = (op, operands[0], second)
        order.append(node)
    for node in frontier:
        graph[node] = (LEAF, int(r() * m), None)
    order.reverse()
    return graph, order


def _template(graph, order) -> int:
    """Hash of the structure below quantity 0, unrolled into a tree: equal for isomorphic graphs, so no structure is on both sides."""
    numbers = len(order) == 1
    key = [x if op == LEAF and numbers else 0 for op, x, _ in graph]
    for node in order:
        op, x, y = graph[node]
        a, b = key[x], (key[y] if op >= ADD else y if numbers else 0)
        if op == ADD and a > b:
            a, b = b, a
        key[node] = crc32(b"%d %d %d" % (op, a, b))
    return key[0]


def _render(rng, graph, order, template: int, cfg: ReasoningConfig) -> Problem:
    r, m, steps = rng.random, cfg.modulus, len(order)
    for _ in range(int(r() * (cfg.distractors + 1))):  # never operands of what is needed
        x, y = int(r() * len(graph)), int(r() * len(graph))
        op = int(r() * 6)
        if op >= ADD and x == y:
            op = LEAF
        graph.append((op, int(r() * m), None) if op == LEAF else (op, x, y if op >= ADD else 2 + int(r() * (m - 2))))
    name = rng.sample(NOUNS[:cfg.names], len(graph))
    value = [x for _, x, _ in graph]
    written = []
    for node in order:
        op, x, y = graph[node]
        n, a, va = name[node], name[x], value[x]
        if op == ADD_C:
            v = (va + y) % m
            written.append(f" {n} = {a} + {y} = {va} + {y} = {v}.")
        elif op == SUB_C:
            v = (va - y) % m
            written.append(f" {n} = {a} - {y} = {va} - {y} = {v}.")
        elif op == MUL_C:
            v = (va * y) % m
            written.append(f" {n} = {y} * {a} = {y} * {va} = {v}.")
        else:
            b, vb = name[y], value[y]
            v, sign = ((va + vb) % m, "+") if op == ADD else ((va - vb) % m, "-")
            written.append(f" {n} = {a} {sign} {b} = {va} {sign} {vb} = {v}.")
        value[node] = v
    said = []
    for n, (op, x, y) in zip(name, graph):
        if op == LEAF:
            said.append(f" {n} is {x}.")
        elif op == ADD_C:
            said.append(f" {n} is {name[x]} plus {y}.")
        elif op == SUB_C:
            said.append(f" {n} is {name[x]} minus {y}.")
        elif op == MUL_C:
            said.append(f" {n} is {y} times {name[x]}.")
        else:
            said.append(f" {n} is {name[x]} {'plus' if op == ADD else 'minus'} {name[y]}.")
    rng.shuffle(said)
    return Problem(f"Given:{''.join(said)} What is {name[0]}? Solution:", f"{''.join(written)} Answer: {value[0]}.", value[0], steps, template)


_STATEMENT = re.compile(r" (\w+) is (?:(\w+) (plus|minus|times) )?(\w+)\.")
_STEP = re.compile(r" (\w+) = (\w+) ([-+*]) (\w+) = (\d+) ([-+*]) (\d+) = (\d+)\.")
_ANSWER = re.compile(r" Answer: (\d+)\.$")
_SIGN = {"plus": "+", "minus": "-", "times": "*"}


def check(question: str, solution: str, modulus: int) -> tuple[bool, bool]:
    """(answer right, whole solution right), judged from the text of the question alone, in any valid order of the steps.

    The solution is right if every step copies the definition of a quantity, uses operands that are known by then with their
    values and is computed correctly, if no quantity is computed twice, and if the stated answer is the queried quantity's value.
    """
    *statements, query = question.removeprefix("Given:").removesuffix("? Solution:").split(" What is ")
    defined = {name: (x, _SIGN.get(op), y) for name, x, op, y in _STATEMENT.findall(statements[0])}
    truth: dict[str, int] = {}

    def value(word: str) -> int:
        if word.isdigit():
            return int(word)
        if word not in truth:
            x, op, y = defined[word]
            truth[word] = value(y) if op is None else _apply(value(x), op, value(y), modulus)
        return truth[word]

    stated = _ANSWER.search(solution)
    right = stated is not None and int(stated[1]) == value(query)
    steps = _STEP.findall(solution)
    if not right or "".join(" {} = {} {} {} = {} {} {} = {}.".format(*s) for s in steps) + stated[0] != solution:
        return right, False
    known = {name: int(y) for name, (_, op, y) in defined.items() if op is None}
    for name, x, op, y, vx, op2, vy, v in steps:
        copied = name not in known and defined.get(name) == (x, op, y) and op2 == op
        operands = all(int(seen) == (int(word) if word.isdigit() else known.get(word, -1)) for word, seen in ((x, vx), (y, vy)))
        if not (copied and operands and int(v) == _apply(int(vx), op, int(vy), modulus)):
            return right, False
        known[name] = int(v)
    return right, known.get(query) == int(stated[1])


def _apply(x: int, op: str, y: int, modulus: int) -> int:
    return (x + y if op == "+" else x - y if op == "-" else x * y) % modulus
