"""The simulated user: deterministic, seeded, and the only path from hidden wishes to what an agent sees.

It answers with dialogue acts, typed data that rewards and tests read; surfaces put them into words. Random numbers are
keyed by (task seed, purpose, need, slot), never streamed. Answers never contain a product's id.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from agentgym.seeding import share
from agentgym_envs.shopping.catalogue import Catalogue, Constraint, words
from agentgym_envs.shopping.tasks import Brief

ActKind = Literal["INFORM", "NO_PREF", "VAGUE", "REJECT", "ACCEPT", "UNSURE", "CHANGE", "LEAVE", "LISTEN"]
ANSWERS_PER_TURN = 2
MAX_TEXT = 4000
"""Characters of a message the user reads."""


class Act(msgspec.Struct, frozen=True, kw_only=True):
    """What the user does. `need` counts from 0; `position` (from 1) is the shown item spoken of."""

    kind: ActKind
    need: int = 0
    slot: str = ""
    wish: Constraint | None = None
    position: int = 0


@dataclass(slots=True)
class Mind:
    """What the user still keeps back. Small and copyable: a fork copies it.

    `wishes[need]` are the hard wishes that hold now, visible ones first; `told[need]` the slots whose wish the agent
    has been given; `met` the (need, slot) pairs asked before.
    """

    seed: int
    wishes: list[tuple[Constraint, ...]]
    told: list[set[str]]
    patience: int
    rejections: int
    met: set[tuple[int, str]] = field(default_factory=set)
    vague: set[tuple[int, str]] = field(default_factory=set)
    revealing: int = 0
    duplicates: int = 0
    indifferent: int = 0
    useless: int = 0

    def known(self, need: int) -> tuple[Constraint, ...]:
        """The hard wishes the agent has been told (K_t)."""
        return tuple(w for w in self.wishes[need] if w.slot in self.told[need])


def fresh_mind(brief: Brief, seed: int) -> Mind:
    return Mind(
        seed=seed,
        wishes=[n.visible + n.hidden for n in brief.needs],
        told=[{c.slot for c in n.visible} for n in brief.needs],
        patience=brief.patience,
        rejections=brief.rejections,
        met={(i, c.slot) for i, n in enumerate(brief.needs) for c in n.visible},
        vague={(i, slot) for i, n in enumerate(brief.needs) for slot in n.hints},
    )


def answer(mind: Mind, brief: Brief, catalogue: Catalogue, need: int, slots: Iterable[str]) -> list[Act]:
    """Answer at most two of the asked slots, in the order asked; each slot's wish is news only once."""
    asked = list(dict.fromkeys(slots))[:ANSWERS_PER_TURN]
    before = (mind.revealing, mind.indifferent, len(mind.vague))
    acts = [_answer_one(mind, brief, catalogue, need, slot) for slot in asked]
    if before == (mind.revealing, mind.indifferent, len(mind.vague)):
        _lose_patience(mind)
    return acts or [Act(kind="LISTEN", need=need)]


def _answer_one(mind: Mind, brief: Brief, catalogue: Catalogue, need: int, slot: str) -> Act:
    wish = next((w for w in (*mind.wishes[need], *brief.needs[need].soft) if w.slot == slot), None)
    pair = (need, slot)
    again = pair in mind.met
    mind.duplicates += again
    if wish is None:
        mind.indifferent += not again
        mind.met.add(pair)
        return Act(kind="NO_PREF", need=need, slot=slot)
    if not again and _is_vague(mind, brief, catalogue, need, wish):
        mind.vague.add(pair)
        return Act(kind="VAGUE", need=need, slot=slot)
    _tell(mind, need, slot)
    return Act(kind="INFORM", need=need, slot=slot, wish=wish)


def _is_vague(mind: Mind, brief: Brief, catalogue: Catalogue, need: int, wish: Constraint) -> bool:
    """A hard number wish may be put vaguely, once."""
    numeric = wish.op in ("max", "min") and (need, wish.slot) not in mind.vague
    return numeric and share(mind.seed, "vague", need, wish.slot) < brief.vague


def _tell(mind: Mind, need: int, slot: str) -> None:
    mind.revealing += (need, slot) not in mind.met
    mind.met.add((need, slot))
    mind.told[need].add(slot)


def _lose_patience(mind: Mind) -> None:
    mind.useless += 1
    mind.patience -= 1


def listen(mind: Mind, brief: Brief, catalogue: Catalogue, need: int, text: str) -> list[Act]:
    """Free text: questions about slots are answered like structured ones; anything else tells nothing."""
    return answer(mind, brief, catalogue, need, slots_asked(text, catalogue))


def react(mind: Mind, catalogue: Catalogue, needs: Sequence[int], rows: Sequence[int]) -> list[Act]:
    """To shown items: accept one that fits, reject with the most important reason (so often), or stay unsure."""
    return [_react_one(mind, catalogue, n, row, at + 1) for at, (n, row) in enumerate(zip(needs, rows, strict=True))]


def _react_one(mind: Mind, catalogue: Catalogue, need: int, row: int, position: int) -> Act:
    broken = [w for w in mind.wishes[need] if not catalogue.satisfies(row, w)]
    if not broken and catalogue.in_stock[row]:
        return Act(kind="ACCEPT", need=need, position=position)
    if not broken or mind.rejections <= 0:
        return Act(kind="UNSURE", need=need, position=position)
    mind.rejections -= 1
    worst = max(broken, key=lambda w: w.weight)
    _tell(mind, need, worst.slot)
    return Act(kind="REJECT", need=need, slot=worst.slot, wish=worst, position=position)


def change_mind(mind: Mind, brief: Brief, turn: int) -> list[Act]:
    """At the keyed turn one hidden wish is replaced, and the user says so."""
    change = brief.change
    if change is None or change.turn != turn:
        return []
    old = mind.wishes[change.need]
    mind.wishes[change.need] = tuple(change.wish if w.slot == change.wish.slot else w for w in old)
    mind.told[change.need].add(change.wish.slot)
    mind.met.add((change.need, change.wish.slot))
    return [Act(kind="CHANGE", need=change.need, slot=change.wish.slot, wish=change.wish)]


# --- free text --------------------------------------------------------------------------------------------------

_SENTENCE_END = re.compile(r"(?<=[.!?\n])")
_REQUEST = re.compile(
    r"\s*(?:please\s+|so\s+|and\s+|ok(?:ay)?,?\s+|great,?\s+)*"
    r"(?:what|which|how|do|does|are|is|any|who|where|should|would|could|can|tell me|let me know|may i ask|describe)\b",
    re.IGNORECASE,
)


def slots_asked(text: str, catalogue: Catalogue) -> list[str]:
    """Slots whose name or synonym occurs as whole words inside a question or request, in order of occurrence."""
    found: list[str] = []
    for sentence in _SENTENCE_END.split(text[:MAX_TEXT]):
        if sentence.strip().endswith("?") or _REQUEST.match(sentence):
            found += _named(words(sentence), catalogue.spoken)
    return list(dict.fromkeys(found))


def _named(sentence: list[str], names: Mapping[str, str]) -> Iterator[str]:
    """Slots named by up to three words in a row."""
    for start in range(len(sentence)):
        for length in (3, 2, 1):
            slot = names.get(" ".join(sentence[start : start + length]))
            if slot is not None:
                yield slot
                break


def need_of(mind: Mind, catalogue: Catalogue, row: int) -> int:
    """Which need the user takes an item for: the one whose wishes it meets best, the first of equals."""
    shares = [sum(catalogue.satisfies(row, w) for w in wishes) / (len(wishes) or 1) for wishes in mind.wishes]
    return shares.index(max(shares))
