"""Reasoning problems with worked solutions, in the manner of iGSM (arXiv 2407.20311) but small enough for tiny models.

    Given: drum has 3 times lamp. kite is 5. lamp adds owl to kite. owl is 4. What is drum? Solution:
     Plan: drum lamp kite. kite is 5. lamp adds owl 4 to 5 is 9. drum has 3 times 9 is 7. Answer: 7.

This one is modulo 10. A problem is a directed acyclic graph of named quantities: leaves are numbers, every other
quantity is one operation on one or two others, and `steps` counts the operations. The statements come in random order.
The plan goes back from the question to known numbers. Then one sentence calculates each operation.

A problem is a function of (config, index, split). Its template is the graph with its operations, without names and,
except in problems of one step, without numbers. One template in five is for tests, the others are for training.

What must be looked up (a definition, operand or value) belongs to the name just written, because induction heads look
up what followed a name: three layers learn this in minutes, but not "lamp = kite + owl = 5 + 4 = 9".

`mano` makes mental arithmetic: prefix expressions, answered without steps (Physics of Language Models 4.1).
"""

import math
import random
import re
from dataclasses import dataclass
from functools import cache
from operator import add, mul, sub
from typing import NamedTuple
from zlib import crc32

from data.facts import require_ranges
from optimoe.config import require

NOUNS = """anvil apple arrow badge banjo barrel basket bell bench blanket boot bottle brush bucket button cabin candle
carpet chair clock coat comb compass crate cup dagger desk door drum easel fan feather fence flute fork globe glove
hammer harp hat helmet hook jacket jar kettle key kite knife ladder lamp lantern lens locker mask mirror mitten nail
needle oar organ paddle pencil piano pillow pipe plate pot pump quilt rake ribbon ring robe rope rug saddle scarf shelf
shoe shovel sled spoon stamp stool sword table tent tile towel tower trunk tub vase violin wagon wheel whistle
window""".split()

LEAF, MUL_C, ADD = 0, 3, 4  # the second operand of operations 1 to 3 is a number, of 4 and 5 a quantity
# What the text says, by operation: lamp VERB y PREPOSITION x.
WORDS = (("is", ""), ("adds", "to"), ("takes", "from"), ("has", "times"), ("adds", "to"), ("takes", "from"))
MEANING = {"adds": add, "takes": sub, "has": mul, "+": add, "-": sub, "*": mul}  # of x, y
SHARED = 0.25  # probability that a second operand is a quantity used elsewhere too, if there is one
TEST_SHARE = 5  # one template in five


@dataclass(frozen=True)
class ReasoningConfig:
    """Which problems are drawn."""

    max_steps: int = 6  # operations in the solution, uniform on 1..max_steps
    modulus: int = 10  # all arithmetic is modulo this
    names: int = 40  # size of the pool of names
    mano_length: int = 4  # operations in a `mano` expression, uniform on 1..mano_length
    seed: int = 0

    def validate(self):
        ranges = {"modulus": (3, 1000), "mano_length": (1, 200), "max_steps": (1, (len(NOUNS) - 1) // 2)}
        require_ranges(self, ranges | {"names": (2 * self.max_steps + 1, len(NOUNS))})  # as many as a problem may need


class Problem(NamedTuple):
    question: str  # "Given: ... What is drum? Solution:"
    solution: str  # " Plan: ... Answer: 7."
    answer: int
    steps: int
    template: int  # 32-bit hash of the structure


def problem(cfg, index, split="train", steps=None):
    """Problem number `index` of split "train" or "test"; `steps` sets its operations, even above max_steps."""
    test = {"train": False, "test": True}[split]
    rng = random.Random(((cfg.seed * 2 + test) * 1009 + (steps or 0)) << 40 | index)
    while True:
        graph, order = _draw_graph(rng.random, steps or 1 + int(rng.random() * cfg.max_steps), cfg.modulus)
        template = _template(graph, order)
        if (template % TEST_SHARE == 0) == test:
            return _render(rng, graph, order, template, cfg)


def _draw_graph(r, steps, m):
    """(graph, order): quantities as (op, x, y), and those with an operation in an order of solution. 0 is asked for.

    The graph grows backwards from the question: operations refer only to quantities that are expanded later or are
    leaves. So there are no cycles, every quantity is needed, and the reverse of the order of expansion solves it."""
    graph = [None]  # LEAF: x is the number; otherwise x is a quantity, and y a quantity or a number
    frontier, order, shared = [0], [], []

    def new():
        graph.append(None)
        return len(graph) - 1

    for _ in range(steps):
        r()  # not used; without it every seed would give other problems
        node, op, x, y = frontier.pop(), 1 + int(r() * 5), new(), None
        if op == MUL_C:
            while y is None or math.gcd(y, m) != 1:  # invertible, so products do not pile up on 0
                y = 2 + int(r() * (m - 2))
        elif op < ADD:
            y = 1 + int(r() * (m - 1))
        elif r() < SHARED:
            shared.append((len(order), node))
        else:
            frontier.append(y := new())
        frontier.append(x)
        graph[node] = (op, x, y)
        order.append(node)
    for at, node in shared:  # only now it is known which quantities are solved before each of these
        op, x, _ = graph[node]
        if others := [q for q in order[at + 1 :] + frontier if q != x]:
            y = others[int(r() * len(others))]
        else:
            frontier.append(y := new())
        graph[node] = (op, x, y)
    for node in frontier:
        graph[node] = (LEAF, int(r() * m), None)
    order.reverse()
    return graph, order


def _template(graph, order):
    """Hash of how quantity 0 is computed: the graph as a tree, in which the order of a sum does not matter."""
    numbers = len(order) == 1
    key = [x if op == LEAF and numbers else 0 for op, x, _ in graph]
    for node in order:
        op, x, y = graph[node]
        a, b = key[x], (key[y] if op >= ADD else y if numbers else 0)
        a, b = sorted((a, b)) if op == ADD else (a, b)
        key[node] = crc32(b"%d %d %d" % (op, a, b))
    return key[0]


def _render(rng, graph, order, template, cfg):
    rng.random()  # see _draw_graph
    name = rng.sample(NOUNS[: max(cfg.names, len(graph))], len(graph))
    value = [x for _, x, _ in graph]
    first = last = graph[order[0]][1]  # last: the quantity of the sentence before
    sentences = [f" {name[first]} is {value[first]}."]
    for node in order:
        op, x, y = graph[node]
        verb, preposition = WORDS[op]
        operand, value_y = (f"{name[y]} {value[y]}", value[y]) if op >= ADD else (y, y)
        value[node] = MEANING[verb](value[x], value_y) % cfg.modulus
        named = "" if x == last else name[x] + " "
        sentences.append(f" {name[node]} {verb} {operand} {preposition} {named}{value[x]} is {value[node]}.")
        last = node
    statements = []
    for n, (op, x, y) in zip(name, graph, strict=True):
        verb, preposition = WORDS[op]
        operand = name[y] if op >= ADD else y
        statements.append(f" {n} is {x}." if op == LEAF else f" {n} {verb} {operand} {preposition} {name[x]}.")
    rng.shuffle(statements)
    plan = " ".join(name[q] for q in [*reversed(order), first])
    question = f"Given:{''.join(statements)} What is {name[0]}? Solution:"
    solution = f" Plan: {plan}.{''.join(sentences)} Answer: {value[0]}."
    return Problem(question, solution, value[0], len(order), template)


_STATEMENT = re.compile(r" (\w+) (is|adds|takes|has) (\w+)(?: (to|from|times) ([a-z]+))?\.")
_PLAN = re.compile(r"(?: Plan:(?: [a-z]+)+\.)?")
_ANSWER = re.compile(r" Answer: (\d{1,9})\.\Z", re.ASCII)  # no more digits: int() of thousands raises


def check(question, solution, modulus):
    """(answer right, whole solution right), judged from the question's text alone.

    A solution is right if it computes the quantity asked for, and each sentence gives the number of a leaf, or computes
    a new quantity by its definition from operands that are known by then. The plan is not judged."""
    statements, _, query = question.removesuffix("? Solution:").partition(" What is ")
    defined = {name: (verb, y, preposition, x) for name, verb, y, preposition, x in _STATEMENT.findall(statements)}

    @cache
    def value(word):
        if word.isdigit():
            return int(word)
        verb, y, _, x = defined[word]
        return int(y) if verb == "is" else MEANING[verb](value(x), value(y)) % modulus

    stated = _ANSWER.search(solution)
    if stated is None or int(stated[1]) != value(query):
        return False, False
    allowed = {}  # sentence: (its quantity, the quantities that must be known before)
    for name, (verb, y, preposition, x) in defined.items():
        if verb == "is":
            allowed[f" {name} is {y}"] = name, set()
        else:
            operand = y if y.isdigit() else f"{y} {value(y)}"
            for named in ("", f"{x} "):
                sentence = f" {name} {verb} {operand} {preposition} {named}{value(x)} is {value(name)}"
                allowed[sentence] = name, {x, y} & defined.keys()
    known = {name for name, needs in allowed.values() if not needs}
    *sentences, rest = solution[_PLAN.match(solution).end() : stated.start()].split(".")
    for sentence in sentences:
        name, needs = allowed.get(sentence, ("", {""}))
        if not needs <= known or (needs and name in known):
            return True, False
        known.add(name)
    return True, not rest and query in known


def mano(cfg, index, split="train", length=None):
    """Question "Mano: - 3 + 4 5 =", solution " 4.": a prefix expression of `length` operations.

    The two splits share no expression; those of one operation are all for training."""
    test = {"train": False, "test": True}[split]
    require(not test or length is None or length >= 2, "length", length, "tests have 2 operations or more")
    rng = random.Random(((cfg.seed * 2 + test) * 1009 + (length or 0)) << 40 | 1 << 39 | index)
    while True:
        n = length or 1 + test + int(rng.random() * (cfg.mano_length - test))
        text, value = _expression(rng.random, n, cfg.modulus)
        template = crc32(text.encode())
        if (template % TEST_SHARE == 0 and n > 1) == test:
            return Problem(f"Mano:{text} =", f" {value}.", value, n, template)


def _expression(r, length, modulus):
    if length == 0:
        value = int(r() * modulus)
        return f" {value}", value
    left, sign = int(r() * length), "+-*"[int(r() * 3)]
    text_x, x = _expression(r, left, modulus)
    text_y, y = _expression(r, length - 1 - left, modulus)
    return f" {sign}{text_x}{text_y}", MEANING[sign](x, y) % modulus


def vocabulary(cfg):
    """Every piece of text in problems and expressions, for a word tokenizer."""
    digits = [str(d) for d in range(10)]
    words = NOUNS[: cfg.names] + "is adds to takes from has times What Solution Plan Answer + - * =".split() + digits
    return [" " + word for word in words] + digits + ["Given", "Mano", ".", ":", "?"]
