"""The closed vocabulary of the compact surface: the grammar's words, and one word per slot, value and bucket."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property

from agentgym_envs.shopping.catalogue import NAMED_VALUES, Catalogue, Choice, Constraint
from agentgym_envs.shopping.requests import Malformed, ProblemKind

MAX_WORDS = 120
MAX_SLOTS = 30
"""Slots that one observation lists."""
HANDLES = tuple(f"r{i}" for i in range(1, 6))
CART = tuple(f"c{i}" for i in range(1, 6))
COUNTS = tuple(str(i) for i in range(21))
COMMANDS = (
    "ask", "search", "view", "compare", "attributes", "show", "add", "remove", "recommend", "checkout", "say",
)  # fmt: skip
REPLIES = (
    "want", "answer", "found", "item", "table", "slots", "cart", "error", "accept", "reject", "unsure", "change",
    "listen", "leave", "which", "budget", "voucher", "from", "one_seller", "within", "over",
)  # fmt: skip
MARKS = (";", ":", "|", "because", "any", "vague", "best", "other", "many", "sort", "page", "stock", "none")
ERRORS: dict[ProblemKind, str] = {
    "unparsable": "unknown word", "unknown_tool": "unknown word", "bad_arguments": "bad form",
    "unknown_slot": "unknown slot", "unknown_value": "unknown value", "unknown_item": "unknown item",
    "not_here": "not here", "empty_cart": "empty cart", "too_many_calls": "bad form",
}  # fmt: skip
_ERROR_WORDS = tuple(dict.fromkeys(" ".join(ERRORS.values()).split()))
RESERVED = tuple(dict.fromkeys((*COMMANDS, *REPLIES, *MARKS, *_ERROR_WORDS, *HANDLES, *CART, *COUNTS)))


class Lexicon:
    """The words of a catalogue: one per slot, value and bucket. Built once, shared by all episodes."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.slots = tuple(catalogue.columns)
        self.value_words = {n: _value_words(c) for n in self.slots if isinstance(c := catalogue.columns[n], Choice)}
        self.values = {n: {word: value for value, word in words.items()} for n, words in self.value_words.items()}

    @cached_property
    def vocabulary(self) -> list[str]:
        """Every word that can be produced or accepted, in a stable order, each once."""
        most = max((len(c.edges) for c in self.catalogue.numbers.values()), default=0)
        buckets = [f"p{i:02d}" for i in range(1, most + 1)]
        values = [word for words in self.value_words.values() for word in words.values()]
        return list(dict.fromkeys((*RESERVED, *self.slots, *buckets, *values)))

    @cached_property
    def headline(self) -> tuple[str, ...]:
        """What a list of items shows of each: brand and price, or in a catalogue without them its first two slots."""
        known = tuple(s for s in ("brand", "price") if s in self.slots)
        return known or tuple(s for s in self.slots if s != "category")[:2]

    def word(self, slot: str, value: str | float | None) -> str:
        """The word of an item's value, or of a wish's: the bucket of an edge is the edge itself."""
        if value is None:
            return "none"
        if slot in self.value_words:
            return self.value_words[slot].get(str(value), "other")
        return f"p{self.catalogue.numbers[slot].bucket(float(value)) + 1:02d}"

    def wish(self, slot: str, word: str) -> Constraint | Malformed:
        """The wish behind `slot word`."""
        if slot not in self.slots:
            return Malformed(kind="unknown_slot", detail=slot)
        if slot in self.values:
            value = self.values[slot].get(word)
            return Constraint(slot, "is", value) if value is not None else Malformed(kind="unknown_value", detail=word)
        column = self.catalogue.numbers[slot]
        at = int(word[1:]) - 1 if re.fullmatch(r"p[0-9]{2}", word) else -1
        if not 0 <= at < len(column.edges):
            return Malformed(kind="unknown_value", detail=word)
        return Constraint(slot, column.bound, float(column.edges[at]))

    def fields(self, row: int, slots: Sequence[str], joint: str = " ") -> str:
        """`slot value` of a row for each slot it has a value in."""
        read = ((slot, self.catalogue.columns[slot].read(row)) for slot in slots)
        return joint.join(f"{slot} {self.word(slot, value)}" for slot, value in read if value is not None)


def slug(text: str) -> str:
    """One word of any text: letters and digits, joined by underscores, at most 24 characters."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\W+", "_", folded).strip("_")[:24].strip("_") or "value"


def _value_words(column: Choice) -> dict[str, str]:
    """value -> word, unique within the column and never a word of the grammar."""
    taken = set(RESERVED)
    words: dict[str, str] = {}
    for value in column.values[:NAMED_VALUES]:
        base = word = slug(value)
        count = 1
        while word in taken or re.fullmatch(r"p\d\d", word):
            count += 1
            word = f"{base}_{count}"
        taken.add(word)
        words[value] = word
    return words
