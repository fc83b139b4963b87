r"""MATH-500 (arXiv 2103.03874, 2305.20050): competition problems, worked solutions with the answer in \boxed{}. 500 items.

The harness's "Problem: / Solution:" form. Four examples from the rest of the MATH test set (where only the 500 are there, from
the other items), which end in \boxed{}. The answer is the last \boxed{}, else what follows "answer is", else what
stands between the first and the last dollar sign; it is right when equal to the gold one after `canonical`: notation (fractions,
roots, spacing, units, thousands) does not count, and 0.5 is \frac{1}{2}, but x+1 is not 1+x.
"""

import re
from fractions import Fraction

from eval.tasks import Item, examples

SHOTS, STOPS, MAX_NEW_TOKENS = 4, ("Problem:",), 1024


def items(source, shots):
    rows = source.rows("math500/test")
    problems = {row["problem"] for row in rows}
    others = (
        [row for row in source.first("math/test", "math500/test") if row["problem"] not in problems] if shots else []
    )
    prefixes = examples(
        rows, others or rows, shots, lambda row: f"Problem:\n{row['problem']}\n\nSolution: {row['solution']}"
    )
    return [
        Item(
            str(i),
            f"{prefix}Problem:\n{row['problem']}\n\nSolution:",
            " " + row["solution"],
            group=f"level {row['level']}",
        )
        for i, (prefix, row) in enumerate(zip(prefixes, rows, strict=True))
    ]


def score(item, text):
    return {"accuracy": float(canonical(extract(text)) == canonical(extract(item.answer)))}


def vote(text):
    return canonical(extract(text)) or None


def extract(text):
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start >= 0:
        begin = text.index("{", start) + 1
        depth = 1
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if not depth:
                return text[begin:end]
    bare = re.search(r"\\boxed\s+([^\s$]+)", text)  # \boxed 2
    if bare:
        return bare[1]
    said = re.findall(r"answer is:?\s*(.+?)(?:\.\s|\.?$)", text, re.MULTILINE)
    if said:
        return said[-1]
    return text[text.index("$") + 1 : text.rindex("$")] if text.count("$") > 1 else ""


def canonical(answer):
    s = answer.strip().rstrip(".")
    s = re.sub(r"\\(left|right|displaystyle|[!,;: ])(?![a-z])|\^\{?\\circ\}?|\\?[$%]|~", "", s)
    s = re.sub(
        r"\\text\{\s[^}]*\}(?:\^\{?\d\}?)?$|\\(?:mbox|text|textbf|mathrm|textit)\{([^}]*)\}", r"\1", s
    )  # a trailing unit; other text
    s = re.sub(r"^[a-zA-Z]\w?\s*(=|\\in)\s*", "", s)
    s = re.sub(r"\s+", "", s).replace("dfrac", "frac").replace("tfrac", "frac").replace("cfrac", "frac")
    s = re.sub(r"\\sqrt([^{\[])", r"\\sqrt{\1}", s)
    s = re.sub(r"\\frac(\w)(\w)", r"\\frac{\1}{\2}", s)
    s = re.sub(r"\\frac(\w)\{", r"\\frac{\1}{", s)
    s = re.sub(r"\\frac(\{[^{}]*\})(\w)", r"\\frac\1{\2}", s)
    if re.fullmatch(r"-?\d{1,3}(,(\\!)?\d{3})+(\.\d+)?", s):
        s = s.replace(",", "")
    number = re.fullmatch(r"(-?)(?:\\frac\{(-?\d+)\}\{(\d+)\}|(\d+)/(\d+)|(\d*\.?\d+))", s)
    if number:
        sign, over, under, a, b, plain = number.groups()
        if int(under or b or 1):
            value = Fraction(plain) if plain else Fraction(int(over or a), int(under or b))
            return str(-value if sign else value)
    return s
