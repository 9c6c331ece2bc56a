"""Numbers as shops write them: "$1,299.00", "1.299,00 EUR", "12 oz", "1.5 kg", "4,5".

What a separator means is decided for a whole column, because "1,299" alone can mean either.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_NUMBER = re.compile(
    r"""^\s*(?P<before>[^\d\s.,+\-()]{0,12})\s*
        (?P<number>[+-]?\d[\d.,'’\u00a0\u202f\ ]*(?:[eE][+-]?\d+)?|[+-]?\.\d+)
        \s*(?P<after>[^\d\s][^\d]{0,15})?\s*$""",
    re.VERBOSE,
)
CURRENCIES = {
    "$": "usd", "us$": "usd", "usd": "usd", "€": "eur", "eur": "eur", "euro": "eur", "euros": "eur", "£": "gbp",
    "gbp": "gbp", "¥": "jpy", "jpy": "jpy", "yen": "jpy", "chf": "chf", "fr.": "chf", "kr": "sek", "sek": "sek",
    "nok": "nok", "dkk": "dkk", "zł": "pln", "zl": "pln", "pln": "pln", "₹": "inr", "inr": "inr", "rs": "inr",
    "rs.": "inr", "cad": "cad", "c$": "cad", "aud": "aud", "a$": "aud", "cny": "cny", "rmb": "cny", "₽": "rub",
    "rub": "rub", "r$": "brl", "brl": "brl", "₩": "krw", "krw": "krw", "czk": "czk", "kč": "czk", "huf": "huf",
    "ft": "huf", "₺": "try", "try": "try", "₪": "ils", "ils": "ils", "zar": "zar", "mxn": "mxn", "sgd": "sgd",
    "hk$": "hkd", "hkd": "hkd",
}  # fmt: skip
UNITS = {
    "mg": ("mass", 1e-3), "g": ("mass", 1.0), "gr": ("mass", 1.0), "gram": ("mass", 1.0), "grams": ("mass", 1.0),
    "kg": ("mass", 1e3), "kgs": ("mass", 1e3), "oz": ("mass", 28.349523125), "ounce": ("mass", 28.349523125),
    "ounces": ("mass", 28.349523125), "lb": ("mass", 453.59237), "lbs": ("mass", 453.59237),
    "pound": ("mass", 453.59237), "pounds": ("mass", 453.59237),
    "mm": ("length", 1.0), "cm": ("length", 10.0), "m": ("length", 1e3), "in": ("length", 25.4),
    "inch": ("length", 25.4), "inches": ("length", 25.4), '"': ("length", 25.4), "ft": ("length", 304.8),
    "ml": ("volume", 1.0), "cl": ("volume", 10.0), "dl": ("volume", 100.0), "l": ("volume", 1e3),
    "litre": ("volume", 1e3), "liter": ("volume", 1e3), "fl oz": ("volume", 29.5735295625),
    "kb": ("data", 1e-3), "mb": ("data", 1.0), "gb": ("data", 1e3), "tb": ("data", 1e6),
    "w": ("power", 1.0), "kw": ("power", 1e3), "watt": ("power", 1.0), "watts": ("power", 1.0),
    "min": ("time", 1.0), "h": ("time", 60.0), "hours": ("time", 60.0), "hrs": ("time", 60.0),
    "mah": ("charge", 1.0), "ah": ("charge", 1e3), "hz": ("rate", 1.0), "khz": ("rate", 1e3), "mhz": ("rate", 1e6),
    "ghz": ("rate", 1e9),
}  # fmt: skip


_ABOUT = {"from", "ab", "about", "approx", "approx.", "ca", "ca.", "circa", "only", "nur", "~", "≈", "+"}
_MINUS = {"-", "−", "–"}


class Amount(NamedTuple):
    """A number as it stands in a cell: digits not yet interpreted, and its unit or currency, lower-cased."""

    digits: str
    unit: str


class Numbers(NamedTuple):
    """A column of numbers in one unit; None where a cell is empty or could not be read.

    `odd` counts cells that are no numbers, `foreign` those in a unit or currency that cannot be converted.
    """

    values: list[float | None]
    unit: str
    odd: int
    foreign: int


def amount(cell: str) -> Amount | None:
    """A cell as a number with at most one unit before or after it."""
    match = _NUMBER.match(cell) if len(cell) <= 60 else None
    if match is None:
        return None
    before, after = (match["before"] or "").strip().lower(), (match["after"] or "").strip().lower()
    if before and before not in CURRENCIES and before not in _ABOUT and before not in _MINUS:
        return None
    unit = after or (before if before in CURRENCIES else "")
    digits = re.sub(r"['’\u00a0\u202f ]", "", match["number"])
    return Amount(("-" if before in _MINUS else "") + digits, unit.rstrip("."))


def decimal_mark(amounts: Iterable[Amount], price: bool = False) -> str:
    """ "." or ",": what these digits use before the decimals.

    Both marks in one cell: the last one. One mark: decimals unless three digits follow; where all cells of a price
    column with a dot have exactly three digits behind it ("1.299"), the dot groups thousands.
    """
    votes = Counter[str]()
    grouped = dotted = 0
    for digits, _ in amounts:
        dot, comma = digits.rfind("."), digits.rfind(",")
        if dot >= 0 and comma >= 0:
            votes["." if dot > comma else ","] += 4
        elif digits.count(",") == 1 and not re.search(r",\d{3}$", digits):
            votes[","] += 1
        elif digits.count(".") > 1:
            votes[","] += 4
        elif dot >= 0:
            dotted += 1
            grouped += bool(re.fullmatch(r"[+-]?[1-9]\d{0,2}\.\d{3}", digits))
            votes["."] += not re.search(r"\.\d{3}$", digits)
    if price and dotted > 1 and grouped == dotted and not votes["."]:
        return ","
    return "," if votes[","] > votes["."] else "."


def parse(digits: str, mark: str) -> float | None:
    """The digits under a decimal mark; None for what is no finite number."""
    plain = digits.replace("." if mark == "," else ",", "").replace(",", ".")
    try:
        value = float(plain)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def numbers(cells: Sequence[str], price: bool = False) -> Numbers:
    """A whole column: one decimal mark, one unit (the most frequent), others converted where the dimension fits."""
    read = [amount(cell) if cell else None for cell in cells]
    known = [a for a in read if a is not None]
    mark = decimal_mark(known, price)
    table = CURRENCIES if price else {}
    units = Counter(table.get(a.unit, a.unit) for a in known if a.unit)
    unit = min(units, key=lambda u: (-units[u], u)) if units else ""
    values: list[float | None] = []
    odd = foreign = 0
    for cell, found in zip(cells, read, strict=True):
        value = parse(found.digits, mark) if found is not None else None
        odd += bool(cell) and value is None
        if value is not None and found is not None and (own := table.get(found.unit, found.unit)) not in ("", unit):
            value = _converted(value, own, unit)
            foreign += value is None
        values.append(value)
    return Numbers(values, unit, odd, foreign)


def _converted(value: float, own: str, unit: str) -> float | None:
    """Into the column's unit; None where there is no way (two currencies, grams and metres)."""
    a, b = UNITS.get(own), UNITS.get(unit)
    return round(value * a[1] / b[1], 9) if a and b and a[0] == b[0] else None
