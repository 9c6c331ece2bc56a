"""The answer of a task: what the user keeps back of each need, and a product that satisfies it.

    answer brand acme ; price p05 | found brand acme price p04
    answer item 2 color red | found brand nova price p02        (of several needs)
    change color blue | found brand acme price p03              (what the user will want later)

For training alone. The compact surface's words are the ones its agent already reads; the full surface has sentences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from agentgym_envs.shopping.catalogue import Catalogue, Constraint
from agentgym_envs.shopping.lexicon import Lexicon
from agentgym_envs.shopping.phrases import Phrases
from agentgym_envs.shopping.tasks import Brief, Need, feasible_rows


class Part(NamedTuple):
    """What is wanted of need `number` (0 where there is but one) from the end of `turn` on, and a row that has it."""

    number: int
    turn: int
    wishes: tuple[Constraint, ...]
    row: int


def answer(brief: Brief, lexicon: Lexicon, surface: str) -> str:
    """The text of the answer on this surface."""
    parts = _parts(brief, lexicon.catalogue)
    if surface == "compact":
        return " | ".join(_words(part, lexicon) for part in parts)
    return " ".join(_sentence(part, lexicon.catalogue) for part in parts)


def _parts(brief: Brief, catalogue: Catalogue) -> Iterator[Part]:
    many, change = len(brief.needs) > 1, brief.change
    for i, need in enumerate(brief.needs):
        yield Part(many * (i + 1), 0, (*need.hidden, *need.soft), catalogue.row_of[need.target])
    if change is not None:
        row = _changed(catalogue, brief.needs[change.need], change.wish)
        yield Part(many * (change.need + 1), change.turn, (change.wish,), row)


def _changed(catalogue: Catalogue, need: Need, wish: Constraint) -> int:
    """A row for the need after the change: its target where that still does."""
    hidden = tuple(wish if c.slot == wish.slot else c for c in need.hidden)
    rows = feasible_rows(catalogue, need, hidden).tolist()
    target = catalogue.row_of[need.target]
    return target if target in rows or not rows else int(rows[0])


def _words(part: Part, lexicon: Lexicon) -> str:
    said = (f"{c.slot} {'best' if c.op == 'prefer' else lexicon.word(c.slot, c.value)}" for c in part.wishes)
    lead = ("change " if part.turn else "answer ") + (f"item {part.number} " if part.number else "")
    return f"{lead}{' ; '.join(said)} | found {lexicon.fields(part.row, lexicon.headline)}"


def _sentence(part: Part, catalogue: Catalogue) -> str:
    phrases = Phrases(catalogue, 0)
    said = (f"the best {c.slot}" if c.op == "prefer" else phrases.wish(c) for c in part.wishes)
    what = f"Of item {part.number} the customer" if part.number else "The customer"
    when = f" after turn {part.turn}" if part.turn else ""
    return f"{what} wants{when}: {', '.join(said)}. The product {catalogue.ids[part.row]} is right."
