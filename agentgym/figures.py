"""Figures in words, the same in the terminal and on a page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

FIRST = ("success", "return", "valid", "entropy", "nll", "loss", "sampled_per_second")
"""Figures of a training step that a reader looks at first."""
NUMERIC = set("0123456789.,%e+-−– ")
"""What the cells of a column of numbers, shares and intervals are made of."""


def figure(value: Any) -> str:
    """A number with four digits that matter, a flag as yes or no, nothing for None, the rest as it is."""
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def percent(share: float | None) -> str:
    """A share in percent; nothing where it is not known."""
    return "" if share is None else f"{100 * share:.1f} %"


def looks_numeric(cells: list[str]) -> bool:
    """Whether a table's column is to be aligned to the right."""
    return any(cells) and all(not cell or (cell[0] in "-+−0123456789" and set(cell) <= NUMERIC) for cell in cells)


def ranked(names: Iterable[str]) -> list[str]:
    """Names in the order in which they matter."""
    rank = {name: place for place, name in enumerate(FIRST)}
    return sorted(names, key=lambda name: rank.get(name, len(rank)))
