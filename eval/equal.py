r"""Are two mathematical answers equal, and does an answer have the form that was asked for?

    equal(r"\frac{x}{2}", "0.5x")                              # True: math-verify decides
    right("Expand $x(x+1)$.", "x^2+x", "x(x+1)")               # False: equal in value, but not what was asked for
    number(r"\$1{,}250.50").value                              # Fraction(2501, 2)

Plain numbers are compared here, exactly. Everything else goes to math-verify in a process of its own (`serve`), because
a short answer such as 9^9^9^9 can keep computer algebra busy forever or fill the memory: that process is killed after
some seconds. The library reads "5 million" and "5 or 7" as 5, ignores the bases of numbers and the case of letters, and
rounds decimals; `clean` and `equal` say these things in a way that it understands, or refuse.

For rewards equality is not enough: the question itself, with "+0" behind it, equals the answer of every "expand",
"simplify" and "factor". So a number must be written as a number, in lowest terms, and any other answer must consist of
the same symbols as the gold answer, each as often (`symbols`). Their order is free, and so are parentheses, signs of
multiplication and ways to write a fraction, as long as the value is right.
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
import threading
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

LONGEST = 200  # characters of an answer
SCALES = dict(dozen=12, hundred=100, thousand=10**3, million=10**6, billion=10**9, trillion=10**12)
SCALE = f"(?:{'|'.join(SCALES)})s?(?![a-z])"

_SPACE = r"(?:\s|~|\\[,;:! ]){0,8}"
_PLAIN = (  # 1250, 1,250.50, 1{,}250, 12,34,567, .5, 1e3
    r"(?:\d{1,3}(?:(?:,|\{,\})\d{2,3}){0,50}(?:,|\{,\})\d{3}(?!\d)(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?[1-9]\d{0,2}(?!\d))?"
)
_ARGUMENT = r"\s?(?:\{\s?(-?\d+)\s?\}|(\d))"
NUMBER = (
    rf"([-+]?){_SPACE}\\?[$€£¥]?{_SPACE}(-?)"
    rf"(?:(\d+)?{_SPACE}\\frac{_ARGUMENT}{_ARGUMENT}|(\d+)\s{{1,4}}(\d+)/(\d+)|({_PLAIN})(?:\s?/\s?(\d+))?)"
)
_UNIT = rf"{_SPACE}\\text\s?\{{(?!\s*{SCALE})[^{{}}\d]*\}}(?:\^\{{?\d\}}?)?$"
_ASSIGNED = re.compile(r"(?:^|(?<=,))\s*[a-zA-Z](?:_\{?\w\}?)?(?:\([a-z]\))?\s*(?:=|\\in(?![a-z]))")
_TOKEN = re.compile(r"\\text\s?\{([^{}]*)\}|(\\[a-zA-Z]+|\\.|\d+|\S)", re.ASCII)
_UNICODE = str.maketrans(
    {"−": "-", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "·": r"\cdot ", "×": r"\times "}
)
_FREE = {*"(){}+*~.", *(rf"\{name}" for name in (*",;:! {}", "cdot", "times", "quad"))}
_GUARDED = re.compile(rf"_\{{?(\w+)|({SCALE})")  # bases of numbers, and scale words that are not behind plain digits


class Number(NamedTuple):
    value: Fraction
    kind: str  # "integer", "decimal", "fraction" or "mixed"
    reduced: bool  # false for 6/4


def clean(text: str) -> str:
    """LaTeX in one notation. Scale words become factors, "or" and "and" commas; a unit at the end is dropped."""
    text = text.strip().rstrip(". ").translate(_UNICODE)
    text = re.sub(r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![a-zA-Z])", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\frac(?:\s+|(?=\d))(\w)\s*(\w)", r"\\frac{\1}{\2}", text, flags=re.ASCII)
    text = re.sub(r"\\([lg])eq(?![a-z])", r"\\\1e", text)
    text = re.sub(r"\\(?:mbox|text(?:bf|it|rm|normal)|math(?:rm|bf))\s*\{", r"\\text{", text)
    text = re.sub(r"\\text\s?\{\s*,?\s*(?:and|or)(?![a-z])([^{}]*)\}", r",\1", text)
    text = re.sub(r"(?<=\d)\s?(?:\{,\}|,\s?\\!|\\[,!])\s?(?=\d{3}(?!\d))", "", text)
    scaled = rf"({_PLAIN}){_SPACE}(\\text\s?\{{\s*)?({SCALE})"
    text = re.sub(scaled, lambda found: _scaled(found[1], found[3]) + (found[2] or ""), text)
    text = re.sub(r"\\text\s?\{\s*\}|\^\{?\\circ\}?|\\?%|\\\$", "", text)
    return re.sub(rf"(?<=\S){_UNIT}", "", text).strip()


def _scaled(digits, word):
    return plain(_decimal(digits) * SCALES[word.removesuffix("s")])


def _decimal(digits):
    return Fraction(re.sub(r"[,{}]", "", digits))


def number(text: str) -> Number | None:
    """What a text that is nothing but one number, perhaps with a unit, means; None for anything else."""
    if len(text) > LONGEST:
        return None
    found = re.fullmatch(NUMBER, _ASSIGNED.sub("", clean(text)), re.ASCII)
    return _number(found.groups()) if found else None


def _number(groups) -> Number | None:
    sign, minus, whole, over, over1, under, under1, whole_, over_, under_, digits, slash = groups
    over, under, whole = over or over1 or over_, under or under1 or under_ or slash, whole or whole_
    if digits:
        top, kind = _decimal(digits), "fraction" if slash else "decimal" if "." in digits else "integer"
    else:
        top, kind = Fraction(over), "mixed" if whole else "fraction"
    bottom = int(under or 1)
    if bottom <= 0 or sign and minus:
        return None
    value = int(whole or 0) + top / bottom
    reduced = not under or bottom > 1 and top.denominator == 1 and math.gcd(int(top), bottom) == 1
    return Number(-value if "-" in (sign, minus) else value, kind, reduced)


def find_number(text: str, marker: str) -> Fraction | None:
    """The first number behind the marker, a regular expression; None without one, or where it goes on (3^2, 1/x)."""
    scale = rf"(?:{_SPACE}(?:\\text\s?\{{\s?)?({SCALE}))?"
    goes_on = r"[\d^({]|[.,]\d|/(?!\s?[a-z]{2})|\\frac|[eE][-+]?\d|\s?[*/^]\s?\d"
    pattern = rf"(?:{marker})[\s:$*=]{{0,20}}({NUMBER}){scale}(?!{goes_on})"
    found = re.search(pattern, re.sub(r"\\[dtc]frac", r"\\frac", text.translate(_UNICODE)), re.ASCII)
    if not found or len(found[1]) > LONGEST:
        return None
    value = _number(found.groups()[1:-1])
    return value and value.value * SCALES.get((found[found.re.groups] or "").removesuffix("s"), 1)


def plain(value: Fraction) -> str:
    """A number in its one canonical form: an integer, a decimal that ends, or a fraction."""
    twos = fives = 0
    rest = value.denominator
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    places = max(twos, fives)
    if rest > 1 or not places:
        return str(value)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' * (value < 0)}{digits[:-places]}.{digits[-places:]}"


def canonical(text: str) -> str:
    """For votes: numbers by value, everything else by its cleaned text without spaces."""
    found = number(text)
    return plain(found.value) if found else re.sub(r"\s", "", _ASSIGNED.sub("", clean(text)))


def words(text: str) -> str:
    """The words of an answer, in lower case but for single letters, if it is text only; else ""."""
    if re.sub(r"\\text\s?\{[^{}]*\}|[\s().]", "", text):
        return ""
    return _spelled(text)


def _spelled(text):
    found = re.findall(r"[a-zA-Z0-9]+", re.sub(r"\\text\s?\{", " ", text))
    return " ".join(word if len(word) == 1 else word.lower() for word in found)


def exact(text: str) -> str:
    """Decimals as fractions, which computer algebra does not round."""

    def fraction(found):
        value = Fraction(found[0])
        return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"

    text = re.sub(
        r"(?<![a-zA-Z\\])i(?![a-zA-Z])", " i ", text
    )  # the library knows the imaginary unit when it stands alone
    return re.sub(r"(?<![\d.])\d*\.\d+(?![\d.]|\\overline)", fraction, text, flags=re.ASCII)


def symbols(text: str) -> list[str]:
    """What an expression is made of, in order: numbers, letters, commands; without what is free (see the top)."""
    text = re.sub(r"\\frac\s?(\d)", r"\\frac{\1}", exact(clean(text)))
    text = re.sub(r"\\frac\s?\{\s?(-?)1\s?\}|(?<![\d}.])1\s?/", r"\1/", text).replace(r"\frac", "/")  # 1/2 x is x/2
    text = re.sub(r"\{[bp]matrix\}", "{matrix}", text)
    found = (match[2] or match[1].lower() for match in _TOKEN.finditer(text))
    return [token for token in found if token not in _FREE]


def equal(gold: str, answer: str, seconds: float = 5) -> bool:
    """Whether two answers are equal, whatever they say. ValueError where math-verify is needed and missing."""
    if len(answer) > 2 * len(gold) + LONGEST:
        return False
    gold, answer = clean(gold), clean(answer)
    if gold == answer or not gold or not answer:
        return gold == answer != ""
    wanted, said = number(gold), number(answer)
    if wanted and said:
        return wanted.value == said.value
    if words(gold):
        return words(gold) == _spelled(answer)
    letters = [set(re.findall(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])", text)) for text in (gold, answer)]
    swapped = {letter.swapcase() for letter in letters[1] - letters[0]}
    if swapped & letters[0] - letters[1] or sorted(_GUARDED.findall(gold)) != sorted(_GUARDED.findall(answer)):
        return False
    with _lock:
        return _ask(exact(gold), exact(answer), seconds)


def right(question: str, gold: str, answer: str) -> bool:
    """Whether an answer earns a reward: equal to the gold one and in its form, whatever it says."""
    if not gold or len(answer) > LONGEST or "$" in clean(answer).lstrip("-$"):
        return False
    wanted, said = number(gold), number(answer)
    if wanted:
        copied = said and said.kind != wanted.kind and re.sub(r"\s", "", answer) in re.sub(r"\s", "", question)
        return bool(said and said.reduced and not copied and said.value == wanted.value)
    gold, answer = clean(gold), clean(answer)
    if words(gold):
        return words(gold) == _spelled(answer)
    if bool(_ASSIGNED.match(gold)) != bool(_ASSIGNED.match(answer)):  # "x = 5" and "5"
        gold, answer = _ASSIGNED.sub("", gold), _ASSIGNED.sub("", answer)
    ours, theirs = symbols(gold), symbols(answer)
    grouping = gold.count("(") + sum(1 + (token == "/") for token in ours if token in "/^" or len(token) > 1)
    if sorted(ours) != sorted(theirs) or answer.count("(") > grouping:
        return False
    if re.search(r"\border\b", question) and ours != theirs:
        return False
    copied = re.sub(r"\s", "", answer) in re.sub(r"\s", "", clean(question)) and ours != theirs
    return not copied and equal(gold, answer)


def need_library():
    """ValueError where math-verify is missing."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("comparing expressions needs math-verify: pip install 'optimoe[rl]'")


_child, _lock = None, threading.Lock()


def _ask(gold, answer, seconds):
    """Ask the process that serves; it is started at the first question and after every one that took too long."""
    global _child
    if _child is None or _child.poll() is not None:
        need_library()
        _child = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        seconds += 60  # for the imports
    try:
        _child.stdin.write(json.dumps([gold, answer]) + "\n")
        _child.stdin.flush()
        if select.select([_child.stdout], [], [], seconds)[0]:
            return _child.stdout.readline() == "true\n"
    except BrokenPipeError:
        pass
    _child.kill()
    _child.communicate()
    return False


def serve():
    """The child: one JSON pair [gold, answer] per line in, true or false out."""
    from math_verify import LatexExtractionConfig, parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    for name in (signal.SIGINT, signal.SIGTERM):  # these are for the parent: grpo.py finishes its step
        signal.signal(name, signal.SIG_IGN)
    for line in sys.stdin:
        signal.alarm(60)  # ends this process where the parent, which waits for less, is gone
        try:
            ours, theirs = (
                parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None) for text in json.loads(line)
            )
            same = bool(ours and theirs) and verify(ours, theirs, timeout_seconds=None)
        except Exception:  # a parser meets anything here; the answer is then not the gold one
            same = False
        print(json.dumps(bool(same)), flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    serve()
