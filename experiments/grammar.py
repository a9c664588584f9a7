"""Records and sentences that say what is in them, drawn from a seeded grammar.

A record has a category, a name and two or three attributes. Categories of the held-out group never occur in training,
nor do their attributes; the ways of saying that something has an attribute are the same for all.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

REFERENCES = 4
"""Sentences with which a written one is compared."""

TRAINED: Mapping[str, Mapping[str, Sequence[str]]] = {
    "restaurant": {
        "cuisine": ("Thai", "Italian", "Mexican", "Ethiopian", "Korean"),
        "area": ("riverside", "old town", "harbour", "station quarter"),
        "price range": ("low", "moderate", "high"),
        "rating": ("two stars", "three stars", "five stars"),
    },
    "museum": {
        "subject": ("modern art", "natural history", "shipbuilding", "photography"),
        "opening year": ("1896", "1924", "1971", "2008"),
        "entrance fee": ("four euros", "nine euros", "twelve euros"),
        "architect": ("Ada Lindqvist", "Piet Vermeer", "Rosa Delgado"),
    },
    "airline": {
        "home airport": ("Oslo", "Lisbon", "Nairobi", "Osaka"),
        "fleet size": ("12 aircraft", "48 aircraft", "130 aircraft"),
        "alliance": ("Blue Sky", "North Star", "Meridian"),
        "founder": ("Ingrid Solberg", "Joao Matos", "Peter Otieno"),
    },
    "novel": {
        "author": ("Mara Quinn", "Tomas Hale", "Yuki Arai", "Leila Nasser"),
        "genre": ("mystery", "romance", "science fiction", "satire"),
        "length": ("210 pages", "345 pages", "620 pages"),
        "setting": ("Prague", "a lighthouse", "a mining town"),
    },
    "river": {
        "source": ("Lake Tarn", "the Grey Hills", "a glacier"),
        "mouth": ("the Amber Bay", "the Silver Gulf", "Lake Orla"),
        "total length": ("92 kilometres", "310 kilometres", "1,040 kilometres"),
        "main tributary": ("the Nell", "the Black Otter", "the Sirin"),
    },
    "football club": {
        "stadium": ("Mill Lane", "Kestrel Park", "the Dome"),
        "coach": ("Ana Ferreira", "Luc Moreau", "Sam Abara"),
        "league": ("the First Division", "the Northern League"),
        "nickname": ("the Herons", "the Millers", "the Foxes"),
    },
}
HELD_OUT: Mapping[str, Mapping[str, Sequence[str]]] = {
    "mountain": {
        "elevation": ("1,870 metres", "3,412 metres", "5,095 metres"),
        "first ascent": ("1857", "1902", "1934"),
        "range": ("the Kessel Alps", "the Iron Range", "the Sorata Chain"),
    },
    "spacecraft": {
        "operator": ("the Orion Agency", "Deep Field Labs", "the Pacific Consortium"),
        "launch site": ("Cape Harrow", "Kiruna", "Alcantara"),
        "payload": ("a spectrometer", "two radar antennas", "a soil probe"),
    },
    "cheese": {
        "milk": ("goat", "sheep", "buffalo"),
        "ripening time": ("six weeks", "four months", "two years"),
        "region": ("the Jura", "Galicia", "Crete"),
    },
}
_NAMES = (
    "Alba",
    "Corvo",
    "Delphine",
    "Ember",
    "Falken",
    "Gilda",
    "Harrow",
    "Isola",
    "Juno",
    "Kestrel",
    "Lumen",
    "Marlow",
)
_OPENINGS = ("{name} is {a} {category}", "Meet {name}, {a} {category}", "There is {a} {category} called {name}")
_FIRST = ("whose {key} is {value}", "with {value} as its {key}", "and its {key} is {value}")
_REST = ("Its {key} is {value}.", "The {key} is {value}.", "It has {value} as its {key}.")


@dataclass(frozen=True)
class Example:
    """A record as text, and sentences that say it; the first one is the target, all are references."""

    record: str
    sentences: tuple[str, ...]


def examples(
    count: int, seed: int, held_out: bool = False, references: int = 1, without: Collection[str] = ()
) -> tuple[Example, ...]:
    """Return examples, no two of them with the same record.

    Args:
        count: number of examples.
        seed: of all choices.
        held_out: whether categories are those that are never trained.
        references: number of sentences for each record.
        without: records that are not drawn.
    """
    draw, group = random.Random(seed), HELD_OUT if held_out else TRAINED
    seen: dict[str, Example] = {}
    while len(seen) < count:
        category = draw.choice(sorted(group))
        keys = draw.sample(sorted(group[category]), draw.choice((2, 3)))
        values = {key: draw.choice(group[category][key]) for key in keys}
        name = draw.choice(_NAMES)
        parts = [f"type: {category}", f"name: {name}", *(f"{key}: {value}" for key, value in values.items())]
        record = " | ".join(parts)
        sentences = tuple(_said(draw, category, name, values) for _ in range(references))
        if record not in without:
            seen.setdefault(record, Example(record, sentences))
    return tuple(seen.values())


def _said(draw: random.Random, category: str, name: str, values: Mapping[str, str]) -> str:
    """Return one way to say a record."""
    (key, value), *others = values.items()
    article = "an" if category[0] in "aeiou" else "a"
    opening = draw.choice(_OPENINGS).format(name=name, a=article, category=category)
    first = f"{opening} {draw.choice(_FIRST).format(key=key, value=value)}."
    return " ".join([first, *(draw.choice(_REST).format(key=k, value=v) for k, v in others)])
