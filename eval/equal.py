"""The child process of eval/rewards.py: are two LaTeX expressions the same answer? One JSON pair [gold, answer] per line in, true or false out.

A process of its own because a short answer (9^9^9^9) can keep computer algebra busy forever or fill the memory: the parent kills it.
math-verify decides about equality. What is refused before are answers that are equal only because the question has been
repeated: an expression must have the outermost operation of the gold answer ("(x+1)^2" is not the expansion "x^2+2x+1", nor
"\\sqrt{12}+\\sqrt{27}" the sum "5\\sqrt{3}", nor 1.4142 a root), be about as short, state no more equations, and leave no integral,
limit, or arithmetic on plain numbers ("(3, 17 \\cdot 23)") to work out that the gold answer does not leave.
"""

import json
import re
import resource
import signal
import sys

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Add, Mul, Pow, preorder_traversal

SUBSCRIPTS = re.compile(r"_\{?(\w+)")  # bases of numbers, which math-verify ignores
COMMANDS = re.compile(r"\\[a-zA-Z]+|!")
NOTATION = {r"\frac", r"\sqrt", r"\cdot", r"\times", r"\pi", r"\text", r"\cup", r"\infty", r"\begin", r"\end"}


def equal(gold: str, answer: str) -> bool:
    if len(answer) > 2 * len(gold) + 16 or answer.count("=") > gold.count("=") or "$" in answer:
        return False
    if set(COMMANDS.findall(answer)) - set(COMMANDS.findall(gold)) - NOTATION:
        return False
    if sorted(SUBSCRIPTS.findall(answer)) != sorted(SUBSCRIPTS.findall(gold)):
        return False
    parsed = [parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None) for text in (gold, answer)]
    if not all(parsed) or any(isinstance(options[0], str) for options in parsed):
        return False
    (ours, *_), (theirs, *_) = parsed
    return type(ours) is type(theirs) and undone(theirs) <= undone(ours) and verify(ours, theirs, timeout_seconds=None)


def undone(expression) -> int:
    """How many sums, products and powers of plain numbers are in it, at any depth; a sign is no product, a root no power."""
    count = 0
    for node in preorder_traversal(expression):
        numbers = [arg for arg in getattr(node, "args", ()) if arg.is_Number]
        if isinstance(node, Mul):
            numbers = [number for number in numbers if number != -1]
        if isinstance(node, (Add, Mul)) or isinstance(node, Pow) and node.exp.is_Integer and node.exp > 0:
            count += len(numbers) > 1
    return count


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    for number in (signal.SIGINT, signal.SIGTERM):  # these are for the parent: grpo.py finishes its step
        signal.signal(number, signal.SIG_IGN)
    for line in sys.stdin:
        signal.alarm(60)  # ends this process where the parent, which waits for less, is gone
        try:
            print(json.dumps(bool(equal(*json.loads(line)))), flush=True)
        except Exception:  # noqa: BLE001  a parser meets anything here; the answer is then not the gold one
            print("false", flush=True)
        signal.alarm(0)
