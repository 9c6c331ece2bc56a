"""A seeded synthetic catalogue: twelve departments, models with variants, stock, correlated prices and ratings.

Every model is drawn from a key of its own, so a catalogue is the same in any process, and the first thousand items of a
bigger catalogue are those of the smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from random import Random

import msgspec
import numpy as np

from agentgym.seeding import rng
from agentgym_envs.shopping.catalogue import Catalogue, Column, Slot, choice, number

COLORS = ("black", "white", "red", "blue", "green", "grey", "yellow", "brown")
SELLERS = ("northshop", "cityware", "plaza", "outpost", "harbour")
MAKERS = (
    ("acme", "borealis", "cobalt", "dynamo", "everest", "fulcrum"),
    ("gable", "helix", "ionic", "juniper", "kestrel", "lumen"),
    ("meridian", "nimbus", "orchid", "pioneer", "quartz", "ridge"),
)


class Department(msgspec.Struct, frozen=True):
    """What a kind of product is like: typical price, which makers, and its own attributes."""

    price: float
    makers: int
    choices: dict[str, tuple[str, ...]]
    numbers: tuple[str, ...]
    words: tuple[str, ...]


NUMBERS = {
    "weight": Slot(name="weight", better="low", unit="kg", words=("heavy", "weigh", "weighs")),
    "capacity": Slot(name="capacity", better="high", unit="l", words=("volume", "litres", "liters")),
    "battery": Slot(name="battery", better="high", unit="h", words=("runtime",)),
    "power": Slot(name="power", better="high", unit="w", words=("watts",)),
    "noise": Slot(name="noise", better="low", unit="db", words=("loud", "quiet", "silent")),
    "warranty": Slot(name="warranty", better="high", unit="years", words=("guarantee",)),
}
RANGES = {"weight": (0.2, 9.0), "capacity": (2.0, 60.0), "battery": (3.0, 48.0), "power": (10.0, 900.0)}
RANGES |= {"noise": (18.0, 70.0), "warranty": (1.0, 6.0)}

_FABRIC = ("cotton", "wool", "nylon", "leather")
_SOLID = ("steel", "wood", "plastic", "glass")
_STYLE = ("classic", "modern", "retro", "sport")
_FIT = ("small", "medium", "large")

DEPARTMENTS: dict[str, Department] = {
    "laptop": Department(260.0, 0, {"system": ("linux", "windows", "chromeos")}, ("battery", "weight"), ("notebook",)),
    "phone": Department(190.0, 0, {"system": ("android", "ios", "linux")}, ("battery", "weight"), ("smartphone",)),
    "headphones": Department(110.0, 0, {"style": _STYLE}, ("battery", "weight"), ("headset", "earphones")),
    "camera": Department(230.0, 0, {"style": _STYLE}, ("battery", "warranty"), ("photo",)),
    "jacket": Department(100.0, 1, {"material": _FABRIC, "fit": _FIT}, ("weight",), ("coat",)),
    "shoes": Department(85.0, 1, {"material": _FABRIC, "fit": _FIT}, ("weight",), ("sneakers", "boots")),
    "backpack": Department(75.0, 1, {"material": _FABRIC, "style": _STYLE}, ("capacity", "weight"), ("rucksack",)),
    "tent": Department(160.0, 1, {"material": _FABRIC, "fit": _FIT}, ("weight", "warranty"), ("shelter",)),
    "kettle": Department(60.0, 2, {"material": _SOLID}, ("capacity", "power"), ("boiler",)),
    "blender": Department(90.0, 2, {"material": _SOLID}, ("power", "noise"), ("mixer",)),
    "lamp": Department(70.0, 2, {"material": _SOLID, "style": _STYLE}, ("power",), ("light",)),
    "vacuum": Department(170.0, 2, {"style": _STYLE}, ("noise", "power"), ("hoover", "cleaner")),
}
FILLER = ("everyday", "durable", "compact", "smart", "premium", "handy", "robust", "elegant", "trusted", "practical")

SLOTS = {
    "category": Slot(name="category", words=("category",)),
    "brand": Slot(name="brand", words=("brands", "maker", "manufacturer")),
    "price": Slot(name="price", better="low", unit="eur", words=("budget", "cost", "costs", "expensive", "spend")),
    "color": Slot(name="color", words=("colour", "colors", "colours")),
    "rating": Slot(name="rating", better="high", unit="stars", words=("ratings", "reviews", "stars")),
    "seller": Slot(name="seller", words=("shop", "store")),
    "system": Slot(name="system", words=("os",)),
    "material": Slot(name="material", words=("fabric",)),
    "style": Slot(name="style", words=("design",)),
    "fit": Slot(name="fit", words=("size", "sizes")),
} | NUMBERS


class _Item(msgspec.Struct):
    id: str
    model: str
    title: str
    description: str
    stock: int
    choices: dict[str, str]
    numbers: dict[str, float]


@lru_cache(maxsize=8)
def synthetic(size: int = 1000, seed: int = 0, buckets: int = 12) -> Catalogue:
    """`size` sellable items; the same (size, seed, buckets) gives an equal catalogue in any process."""
    items: list[_Item] = []
    model = 0
    while len(items) < size:
        items += _variants(seed, model)
        model += 1
    return _assemble(items[:size], buckets)


def _variants(seed: int, model: int) -> Iterator[_Item]:
    """One model in one to three colours, each with a price and stock of its own."""
    g = rng(seed, "model", model)
    name = list(DEPARTMENTS)[model % len(DEPARTMENTS)]
    kind = DEPARTMENTS[name]
    rank = g.randrange(6)
    brand = MAKERS[kind.makers][rank]
    own = {slot: g.choice(values) for slot, values in kind.choices.items()}
    measures = {slot: _measure(g, slot) for slot in kind.numbers}
    merit = g.gauss(0.0, 1.0)
    price = kind.price * (0.6 + 0.22 * rank) * math.exp(0.12 * merit + g.gauss(0.0, 0.45))
    rating = min(5.0, max(1.0, 3.4 + 0.5 * merit + 0.08 * rank + g.gauss(0.0, 0.4)))
    words = g.sample(FILLER, 3)
    code = f"{brand[0]}{kind.price:.0f}-{model}"
    for v, color in enumerate(g.sample(COLORS, g.choice((1, 2, 2, 3)))):
        seller = g.choice(SELLERS)
        yield _Item(
            id=f"P{model:05d}{'abc'[v]}",
            model=f"P{model:05d}",
            title=f"{brand} {words[0]} {name} {code} {color}",
            description=f"{' '.join(words)} {name}, {' '.join(own.values())}, also called {g.choice(kind.words)}",
            stock=0 if g.random() < 0.12 else g.randint(1, 40),
            choices={"category": name, "brand": brand, "color": color, "seller": seller, **own},
            numbers={"price": _tidy(price * g.choice((1.0, 1.0, 1.06))), "rating": round(rating, 1), **measures},
        )


def _measure(g: Random, slot: str) -> float:
    low, high = RANGES[slot]
    value = low * (high / low) ** g.random()
    return float(round(value)) if slot in ("warranty", "noise", "power") else round(value, 1)


def _tidy(price: float) -> float:
    """A price as shops write it: x.99."""
    return round(max(price, 5.0)) - 0.01


def _assemble(items: list[_Item], buckets: int) -> Catalogue:
    numeric = ("price", "rating", *NUMBERS)
    columns: dict[str, Column] = {}
    for name, slot in SLOTS.items():
        if name in numeric:
            columns[name] = number(slot, [item.numbers.get(name) for item in items], buckets)
        else:
            columns[name] = choice(slot, [item.choices.get(name) for item in items])
    return Catalogue(
        ids=tuple(item.id for item in items),
        titles=tuple(item.title for item in items),
        descriptions=tuple(item.description for item in items),
        models=tuple(item.model for item in items),
        stock=np.array([item.stock for item in items], np.int64),
        columns={name: c for name, c in columns.items() if c.present.any()},
        currency="eur",
    )
