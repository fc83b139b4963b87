"""What a model remembers of its procedural training data: the values of synthetic people (data/facts.py), from name and
stem.

One item for each person and attribute. `exact`: the text up to the period is the value. No examples; there is nothing
to generalise.
"""

from data.facts import FactsConfig, people, probes
from eval.tasks import Item

SHOTS, STOPS, MAX_NEW_TOKENS = 0, (".",), 16


def items(source, shots):
    cfg = FactsConfig(**source.procedural("facts"))
    return [
        Item(str(i), probe.prompt, probe.value, group=probe.attribute) for i, probe in enumerate(probes(people(cfg)))
    ]


def score(item, text):
    return {"exact": float(text == item.answer)}
