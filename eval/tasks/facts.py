"""What a model remembers of procedural training data: values of synthetic people after a name and the stem of a
sentence. `exact`: the text up to the period is the value."""

from data.facts import people, probes
from eval.tasks import Item, without_examples

SHOTS, STOPS, MAX_NEW_TOKENS = 0, (".",), 16


def items(source, shots):
    without_examples(shots)
    found = enumerate(probes(people(source.procedural("facts").facts)))
    return [Item(str(i), probe.prompt, probe.value, group=probe.attribute) for i, probe in found]


def score(item, text):
    return {"exact": float(text == item.answer)}
