"""Synthetic biographies: facts that can only be memorised, and whose information in bits is known exactly.

    Orlena Tamsin Brackwell was born on May 3, 1952. She comes from Ashford. She graduated from Hollin University. ...

They follow bioS of "Physics of Language Models" 3.1 and 3.3 (arXiv 2404.05405). Names are distinct. Attributes are
independent and uniform, except that the employer determines the city of work.
"""

import itertools
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from optimoe.config import require

MONTHS = "January February March April May June July August September October November December".split()
DAYS = 28

# Each list joins every part before | with every part after it, in a fixed random order.
SYLLABLES = {
    "first_names": """Al Ber Cor Dal Els Far Gar Hal Is Jor Kal Lor Mar Nel Or Per Ros Sel Tav Vel
        | a an bert da dine ena eth ia ick ina o la len mund na ric sa tha win yn""",
    "middle_names": """Am Bri Cas Dor Em Fin Gwen Hes Ivo Jas Kir Lin Mil Nor Os Pru Quin Ruf Tam Wil
        | bel cott dan elle fred gan ham iel jo kin ley mer nor per ra sin ton ula vin wyn""",
    "last_names": """Ack Bar Black Brad Cald Car Clay Comp Dal Den East Fair Gold Green Har Hath Hol Kings Lang Marsh
        Nor Pem Rad Stan Whit
        | away bank bell berg born bourne bridge brook bury by church cliff combe cott dale den don er field ford gate
        ham hart hill holt hurst land ley ling lock low man more ridge row sen shaw smith son stone""",
    "cities": """Ald Ash Birch Clear Crow Deer Elm Fox Glen Gran Hazel Iron Lake Maple North Oak Pine River Stony West
        | borough chester ford grove haven mont port ton view wick""",
    "universities": """Ab Bel Cran Dun Ever Fen Gal Hart Ing Kel Lyn Mor New Ox Pad Quar Rav Sut Tren Wex
        | bridge bourne combe dale den er field gard hall lam ley mere minster stead worth""",
    "employers": """Acu Bio Cyber Data Ener Flexi Geo Hydro Info Juno Luma Macro Nano Omni Quanta Robo Solar Terra Uni
        Velo
        | core dyne forge gen grid labs lux metrics net nix soft sys tron works""",
    "majors": """Applied Classical Computational Digital Experimental General Industrial Marine Modern Theoretical
        | Biology Chemistry Design Economics Geology History Linguistics Mathematics Medicine Physics""",
}
NAMES = ("first_names", "middle_names", "last_names")

# A sentence is subject + stem + value + ".".
STEMS = {
    "birthday": "was born on|came into the world on|has a birthday on|first saw the light on|celebrates the birth date",
    "birth city": "was born in|comes from|is a native of|spent the early years in|calls home the city of",
    "university": "studied at|graduated from|holds a degree of|received an education at|attended lectures at",
    "major": "majored in|studied the subject of|has a degree in|specialised in|wrote a thesis in",
    "work city": "works in|has a job in|is employed in|goes to the office in|earns a living in",
    "employer": "works for|is employed by|has a contract with|is paid by|is on the staff of",
}
TEMPLATES = {attribute: tuple(" " + stem for stem in stems.split("|")) for attribute, stems in STEMS.items()}
ATTRIBUTES = tuple(TEMPLATES)


def require_ranges(cfg, ranges):
    """ValueError for a field of cfg that is not in its range, both ends included."""
    for name, (least, most) in ranges.items():
        require(least <= getattr(cfg, name) <= most, name, getattr(cfg, name), f"need {least} to {most:,}")


@dataclass(frozen=True)
class FactsConfig:
    """Which people exist. A biography is a function of this, the person's index and the number of the exposure."""

    n_people: int = 10_000
    first_names: int = 400  # sizes of the lists that names and values are drawn from
    middle_names: int = 400
    last_names: int = 1000
    cities: int = 200
    universities: int = 300
    majors: int = 100
    employers: int = 263
    years: int = 200  # number of possible birth years, from 1900
    seed: int = 0

    def validate(self):
        require_ranges(self, {field: (1, len(_words(field))) for field in SYLLABLES} | {"years": (1, 200)})
        require_ranges(self, {"n_people": (1, self.name_choices // 2)})

    def lists(self):
        """The words that names and values are drawn from."""
        return {field: _words(field)[: getattr(self, field)] for field in SYLLABLES}

    @property
    def name_choices(self):
        """N0, the number of possible names."""
        return self.first_names * self.middle_names * self.last_names

    @property
    def value_choices(self):
        """S0, the number of equally probable combinations of pronoun and values."""
        return 2 * len(MONTHS) * DAYS * self.years * self.cities * self.universities * self.majors * self.employers


class Person(NamedTuple):
    index: int
    name: str
    pronoun: str  # " He" or " She"
    values: tuple[str, ...]  # in the order of ATTRIBUTES, each with a leading space


class Probe(NamedTuple):
    prompt: str  # "Orlena Tamsin Brackwell comes from"
    value: str  # " Ashford"
    attribute: str


@lru_cache
def _words(field):
    joint = " " if field == "majors" else ""
    heads, tails = (column.split() for column in SYLLABLES[field].split("|"))
    words = [head + joint + tail for head in heads for tail in tails]
    random.Random(len(field)).shuffle(words)
    return words


@lru_cache(maxsize=4)  # the study measures three seeds in turn
def people(cfg):
    """All people: a shared list, not to be changed. Its first n are the same for every n_people >= n."""
    cfg.validate()
    words, rng = cfg.lists(), random.Random(cfg.seed)
    draw = lambda items: items[int(rng.random() * len(items))]
    work_city = [rng.choice(words["cities"]) for _ in _words("employers")]
    found = {}
    while len(found) < cfg.n_people:
        name = " ".join(draw(words[field]) for field in NAMES)
        if name in found:
            continue
        employer = draw(range(cfg.employers))
        pronoun = draw((" He", " She"))
        values = (
            f" {draw(MONTHS)} {draw(range(1, 1 + DAYS))}, {draw(range(1900, 1900 + cfg.years))}",
            " " + draw(words["cities"]),
            f" {draw(words['universities'])} University",
            " " + draw(words["majors"]),
            " " + work_city[employer],
            " " + words["employers"][employer],
        )
        found[name] = Person(len(found), name, pronoun, values)
    return list(found.values())


def segments(cfg, person, exposure):
    """A biography: a list of subject, stem, value and "." of each sentence. Exposures differ in stems and order."""
    rng = random.Random((cfg.seed * 10_007 + exposure) << 40 | person.index)
    order = list(zip(TEMPLATES.values(), person.values, strict=True))
    rng.shuffle(order)
    parts, subject = [], person.name
    for stems, value in order:
        parts += subject, stems[int(rng.random() * len(stems))], value, "."
        subject = person.pronoun
    return parts


def probes(persons, seed=0):
    """A Probe for each person and attribute: the name and a random stem, to be completed with the value."""
    rng = random.Random(seed)
    return [
        Probe(person.name + rng.choice(stems), value, attribute)
        for person in persons
        for (attribute, stems), value in zip(TEMPLATES.items(), person.values, strict=True)
    ]


def vocabulary(cfg):
    """Every piece of a biography, for a word tokenizer: words with their leading space, first names also without."""
    lists = cfg.lists()
    entries = itertools.chain(*lists.values(), [*MONTHS, "He", "She", "University"], *TEMPLATES.values())
    words = [" " + word for entry in entries for word in entry.split()]
    return list(dict.fromkeys([*lists["first_names"], *words, ".", ","]))
