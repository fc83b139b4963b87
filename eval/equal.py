r"""Are two mathematical answers equal, and does an answer have the form that was asked for?

    equal(r"\frac{x}{2}", "0.5x")  # True: math-verify decides
    right("Expand $x(x+1)$.", "x^2+x", "x(x+1)")  # False: equal in value, but not what was asked for
    number(r"\$1{,}250.50").value  # Fraction(2501, 2)

Plain numbers are compared here, exactly. All else goes to math-verify, in a process that is killed after some seconds,
because the library computes 9^9^9^9 forever. The library also reads "5 million" and "5 or 7" as 5, ignores bases and
case, and rounds decimals; `clean`, `exact` and `equal` rewrite such answers or refuse them.

`right` asks for more, because in every "expand" and "factor" the question itself equals the answer. A number must be in
lowest terms; any other answer must have the symbols of the gold one, each equally often (`symbols`).
"""

import importlib.util
import json
import math
import re
import resource
import select
import signal
import subprocess
import sys
from collections import namedtuple
from fractions import Fraction

LONGEST = 200  # characters of an answer
SCALES = dict(dozen=12, hundred=100, thousand=10**3, million=10**6, billion=10**9, trillion=10**12)
SCALE = f"({'|'.join(SCALES)})s?(?![a-z])"
PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d\d?(?!\d))?"  # 1250, 1,250.5, .5, 1e3
NUMBER = rf"([-+]?\s?[$€£]?|[$€£]-)\s?(?:(\d+)\s+(?=\d+/))?({PLAIN})(?:/(\d+))?"  # also 5/2 and 2 1/2
SIGNS = {"−": "-", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "·": r"\cdot ", "×": r"\times "}
CLEAN = [
    (r"\\(?:left|right)(?![a-zA-Z])", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\([lg])eq(?![a-zA-Z])", r"\\\1e"),
    (r"\\frac\s*(\w)\s*(\w)", r"\\frac{\1}{\2}"),
    (r"\\(?:mbox|text(?:bf|it|rm)|mathrm)\s*\{", r"\\text{"),
    (r"\\text\{\s*(?:and|or)(?![a-z])([^{}]*)\}", r",\1"),
    (r"(?<=\d)(?:\{,\}|,?\\[,!])(?=\d{3}(?!\d))", ""),
    (
        rf"({PLAIN})\s*(\\text\{{\s*)?{SCALE}",
        lambda found: str(_value(found[1]) * SCALES[found[3]]) + (found[2] or ""),
    ),
    (r"\\text\{\s*\}|\^\{?\\circ\}?|\\?%|\\(?=\$)", ""),
    (rf"(?<=\S)(?:\s|~|\\,)*\\text\{{(?!\s*{SCALE})[^{{}}\d]*\}}(?:\^\d)?$", ""),  # a unit at the end
]
ASSIGNED = re.compile(r"(?:^|(?<=,))\s*[a-zA-Z]\s*=")
TOKEN = re.compile(r"\\text\{([^{}]*)\}|(\\[a-zA-Z]+|\\.|\d+|\S)", re.ASCII)
FREE = {*"(){}+*~.", r"\,", r"\;", r"\:", r"\!", r"\ ", r"\cdot", r"\times"}
UNREDUCED = "6/4"
Number = namedtuple("Number", "value kind")  # a Fraction, and how it is written: "5", "5.0", "5/2" or UNREDUCED


def clean(text: str) -> str:
    """LaTeX in one notation: scale words are multiplied out, "or" and "and" are commas, no unit is at the end."""
    text = text.strip().rstrip(". ").translate(str.maketrans(SIGNS))
    for pattern, new in CLEAN:
        text = re.sub(pattern, new, text)
    return text.strip()


def _value(digits):
    return Fraction(digits.replace(",", ""))


def _fractions(text):
    r"""\frac{1}{2} and (1)/(2) as 1/2."""
    return re.sub(r"\\frac\{\s*(-?\d+)\s*\}\{\s*(\d+)\s*\}|(?<!\d)\((-?\d+)\)/\((\d+)\)", r" \1\3/\2\4", text)


def number(text: str) -> Number | None:
    """A text that is one number, perhaps with a unit; None for anything else."""
    found = len(text) <= LONGEST and re.fullmatch(NUMBER, _fractions(ASSIGNED.sub("", clean(text))).strip(), re.ASCII)
    return _number(found) if found else None


def _number(found) -> Number | None:
    sign, whole, top, bottom = found.groups()
    if bottom and not int(bottom):
        return None
    value = int(whole or 0) + _value(top) / int(bottom or 1)
    kind = "5.0" if "." in top else "5"
    if bottom:
        kind = "5/2" if int(bottom) > 1 and top.isdigit() and math.gcd(int(top), int(bottom)) == 1 else UNREDUCED
    return Number(-value if "-" in sign else value, kind)


def find_number(text: str, marker: str) -> Fraction | None:
    """The first number after the marker (a pattern); None without one, or if it is part of more, as in 3^2 and 1/x."""
    goes_on = r"[\d^(]|[.,]\d|/(?!\s?[a-z]{2})|\\frac|e[-+]?\d|\s?[*/^]\s?\d"
    for marked in re.finditer(rf"(?:{marker})[\s:$*=]{{0,20}}", text):
        behind = _fractions(clean(text[marked.end() : marked.end() + LONGEST + 1].partition("\n")[0])).strip()
        found = re.match(rf"{NUMBER}(?!{goes_on})", behind, re.ASCII)
        value = _number(found) if found and len(found[0]) <= LONGEST else None
        if value:
            return value.value
    return None


def canonical(text: str) -> str:
    """For votes: the value of a number, else the text, cleaned if it is as short as an answer."""
    found = number(text)
    cleaned = ASSIGNED.sub("", clean(text)) if len(text) <= LONGEST else text
    return str(found.value) if found else re.sub(r"\s", "", cleaned)


def words(text: str) -> list[str]:
    """The words of a text, in lower case except single letters: (A) and (a) differ."""
    found = re.findall(r"[a-zA-Z0-9]+", text.replace(r"\text", " "))
    return [word if len(word) == 1 else word.lower() for word in found]


def exact(text: str) -> str:
    """Decimals as fractions, which computer algebra does not round."""
    fraction = lambda found: r"\frac{%d}{%d}" % Fraction(found[0]).as_integer_ratio()  # noqa: UP031  LaTeX braces
    return re.sub(r"(?<![\d.])\d*\.\d+(?![\d.])", fraction, text, flags=re.ASCII)


def symbols(text: str) -> list[str]:
    """Numbers, letters and commands of a cleaned expression, in order, without what is FREE."""
    text = re.sub(r"\\frac\{(-?)1\}|(?<![\d}.])1\s?/", r"\1/", exact(text)).replace(r"\frac", "/")  # 1/2 x is x/2
    found = (match[2] or match[1].lower() for match in TOKEN.finditer(text))
    return [token for token in found if token not in FREE]


def equal(gold: str, answer: str, seconds: float = 5) -> bool:
    """Whether two answers are equal. ValueError where math-verify is needed and missing."""
    if len(answer) > 2 * len(gold) + LONGEST:
        return False
    gold, answer = clean(gold), clean(answer)
    if gold == answer or not gold or not answer:
        return gold == answer != ""
    wanted, said = number(gold), number(answer)
    if wanted and said:
        return wanted.value == said.value
    if not re.sub(r"\\text\{[^{}]*\}|[\s().]", "", gold):
        return words(gold) == words(answer)
    ours, theirs = (set(re.findall(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])", text)) for text in (gold, answer))
    bases = [re.findall(r"_\{?(\w+)", text) for text in (gold, answer)]
    if any(letter.swapcase() in ours ^ theirs for letter in ours ^ theirs) or bases[0] != bases[1]:
        return False
    return _ask(exact(gold), exact(answer), seconds)


def right(question: str, gold: str, answer: str) -> bool:
    """Whether an answer earns a reward: equal to the gold one and in its form."""
    if len(answer) > LONGEST or "$" in clean(answer).lstrip("-$"):
        return False
    wanted, said, copied = number(gold), number(answer), _bare(answer) in _bare(question)
    if wanted:
        form = said and said.kind != UNREDUCED and not (copied and said.kind != wanted.kind)
        return bool(form) and equal(gold, answer)
    gold, answer = clean(gold), clean(answer)
    if bool(ASSIGNED.match(gold)) != bool(ASSIGNED.match(answer)):  # "x = 5" and "5"
        gold, answer = ASSIGNED.sub("", gold), ASSIGNED.sub("", answer)
    ours, theirs = symbols(gold), symbols(answer)
    if ours != theirs and (copied or re.search(r"\border\b", question)):
        return False
    grouped = answer.count("(") > sum(map(gold.count, "({^"))
    textual = not re.sub(r"\\text\{[^{}]*\}", "", gold)
    if not textual and (sorted(ours) != sorted(theirs) or grouped):
        return False
    return equal(gold, answer)


def _bare(text):
    return re.sub(r"\s", "", clean(text))


def need_library():
    """ValueError where math-verify is missing."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("comparing expressions needs math-verify: pip install -e '.[rl]'")


_child = None


def _ask(gold, answer, seconds):
    """Ask the child process, which is started for the first question and after every one that took too long."""
    global _child
    if _child is None or _child.poll() is not None:
        need_library()
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        _child = subprocess.Popen([sys.executable, "-P", __file__], text=True, **pipes)
        seconds += 60  # for the imports
    try:
        print(json.dumps([gold, answer]), file=_child.stdin, flush=True)
        if select.select([_child.stdout], [], [], seconds)[0]:
            return _child.stdout.readline() == "True\n"
    except BrokenPipeError:
        pass
    _child.kill()
    _child.communicate()
    return False


def serve():
    """The child: one JSON pair [gold, answer] per line in, True or False out."""
    from math_verify import LatexExtractionConfig, parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    for name in (signal.SIGINT, signal.SIGTERM):  # grpo.py finishes its step
        signal.signal(name, signal.SIG_IGN)
    for line in sys.stdin:
        signal.alarm(60)  # the parent waits for less, unless it is gone
        try:
            read = [parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None) for text in json.loads(line)]
            same = all(read) and verify(*read, timeout_seconds=None)
        except Exception:  # an answer can be anything
            same = False
        print(bool(same), flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    serve()
