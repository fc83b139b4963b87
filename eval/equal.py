"""The child process of eval/rewards.py: are two LaTeX expressions the same answer? One JSON pair [gold, answer] per line in, true or false out.

A process of its own because a short answer (9^9^9^9) can keep computer algebra busy forever or fill the memory: the parent kills it.
math-verify decides about equality. What is refused before are answers that are equal only because the question has been
repeated: an expression must have the outermost operation of the gold answer ("(x+1)^2" is not the expansion "x^2+2x+1", nor
"\\sqrt{12}+\\sqrt{27}" the sum "5\\sqrt{3}", nor 1.4142 a root), be about as short, state no more equations, and leave no integral or
limit to work out.
"""

import json
import re
import resource
import sys

from math_verify import LatexExtractionConfig, parse, verify


COMMANDS = re.compile(r"\\[a-zA-Z]+|!")
NOTATION = {r"\frac", r"\sqrt", r"\cdot", r"\times", r"\pi", r"\text", r"\cup", r"\infty", r"\begin", r"\end"}


def equal(gold: str, answer: str) -> bool:
    if len(answer) > 2 * len(gold) + 16 or answer.count("=") > gold.count("=") or "$" in answer:
        return False
    if set(COMMANDS.findall(answer)) - set(COMMANDS.findall(gold)) - NOTATION:
        return False
    parsed = [parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None) for text in (gold, answer)]
    if not all(parsed) or any(isinstance(options[0], str) for options in parsed):
        return False
    (ours, *_), (theirs, *_) = parsed
    return type(ours) is type(theirs) and verify(ours, theirs, timeout_seconds=None)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    for line in sys.stdin:
        try:
            print(json.dumps(bool(equal(*json.loads(line)))), flush=True)
        except Exception:  # noqa: BLE001  a parser meets anything here; the answer is then not the gold one
            print("false", flush=True)
