"""What is for sale: a table of products by column, with the constraints one can put on it.

A row is a sellable item (a sku); `models` groups the variants of one product, and splits go by it. Every attribute is
a column: a choice among values, or a number with quantile edges. Hidden numeric wishes lie on those edges, so that a
surface that speaks in buckets loses nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from agentgym.errors import unknown
from agentgym.seeding import digest

Rows = NDArray[np.int64]
Op = Literal["is", "max", "min", "prefer"]

NAMED_VALUES = 600
"""How many values of a choice column can be wished for: the most frequent ones."""
_CACHED_MASKS = 512


_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """Lower-cased words; everything else separates."""
    return _WORD.findall(text.lower())


class Constraint(msgspec.Struct, frozen=True, array_like=True):
    """A wish about one slot. `prefer` has no value: better is better, nothing is wrong (a soft wish)."""

    slot: str
    op: Op
    value: str | float = ""
    weight: float = 1.0


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """An attribute by its one-word name. `better` says which way a number is wished for; `words` are its synonyms."""

    name: str
    label: str = ""
    better: Literal["low", "high"] = "low"
    unit: str = ""
    words: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Choice:
    """A column of values by code: codes [N] int32, -1 where unknown; `values` from most to least frequent."""

    slot: Slot
    codes: NDArray[np.int32]
    values: tuple[str, ...]

    @cached_property
    def code_of(self) -> dict[str, int]:
        return {value: code for code, value in enumerate(self.values)}

    @cached_property
    def folded(self) -> dict[str, str]:
        """Case-folded value -> value; the more frequent of equals."""
        return {value.casefold(): value for value in reversed(self.values)}

    @property
    def present(self) -> NDArray[np.bool_]:
        return np.asarray(self.codes >= 0)

    def holds(self, rows: Rows | slice, op: Op, value: str | float) -> NDArray[np.bool_]:
        """Which of these rows satisfy it."""
        return np.asarray(self.codes[rows] == self.code_of.get(str(value), -2))

    def read(self, row: int) -> str | None:
        code = int(self.codes[row])
        return None if code < 0 else self.values[code]

    def wish(self, row: int) -> Constraint | None:
        """What a user who wants this row would say of this slot."""
        code = int(self.codes[row])
        return Constraint(self.slot.name, "is", self.values[code]) if 0 <= code < NAMED_VALUES else None

    def distinct(self, rows: Rows) -> int:
        """How many known values these rows show."""
        return len(np.unique(self.codes[rows][self.codes[rows] >= 0]))


@dataclass(frozen=True, eq=False)
class Number:
    """A column of numbers [N] float64, nan where unknown, with ascending quantile edges [<= buckets]."""

    slot: Slot
    values: NDArray[np.float64]
    edges: NDArray[np.float64]

    @property
    def present(self) -> NDArray[np.bool_]:
        return np.isfinite(self.values)

    @property
    def bound(self) -> Op:
        return "max" if self.slot.better == "low" else "min"

    def holds(self, rows: Rows | slice, op: Op, value: str | float) -> NDArray[np.bool_]:
        """Which of these rows satisfy it; an unknown value satisfies nothing."""
        limit = float(value)
        return np.asarray(self.values[rows] <= limit if op == "max" else self.values[rows] >= limit)

    def read(self, row: int) -> float | None:
        value = float(self.values[row])
        return value if np.isfinite(value) else None

    def bucket(self, value: float) -> int:
        """The tightest edge that still holds for this value: the lowest above it, or the highest below it."""
        last = len(self.edges) - 1
        if self.slot.better == "low":
            return min(int(np.searchsorted(self.edges, value, "left")), last)
        return max(int(np.searchsorted(self.edges, value, "right")) - 1, 0)

    def wish(self, row: int) -> Constraint | None:
        """What a user who wants this row would say of this slot: the tightest edge."""
        value = self.read(row)
        return None if value is None else Constraint(self.slot.name, self.bound, float(self.edges[self.bucket(value)]))

    def distinct(self, rows: Rows) -> int:
        """How many known values these rows show."""
        return len(np.unique(self.values[rows][np.isfinite(self.values[rows])]))

    def merit(self, rows: Rows) -> NDArray[np.float64]:
        """Higher is better: the values, turned where low is wished for; unknown is worst."""
        sign = -1.0 if self.slot.better == "low" else 1.0
        return np.nan_to_num(sign * self.values[rows], nan=-np.inf)


Column = Choice | Number


def choice(slot: Slot, cells: Sequence[str | None]) -> Choice:
    """A choice column from texts; the most frequent value gets code 0, ties in the order of the alphabet."""
    counts: dict[str, int] = {}
    for cell in cells:
        if cell:
            counts[cell] = counts.get(cell, 0) + 1
    values = tuple(sorted(counts, key=lambda v: (-counts[v], v)))
    code = {value: i for i, value in enumerate(values)}
    return Choice(slot, np.array([code[c] if c else -1 for c in cells], np.int32), values)


def number(slot: Slot, cells: Sequence[float | None], buckets: int) -> Number:
    """A number column with at most `buckets` quantile edges, each a value that occurs."""
    values = np.array([np.nan if c is None else c for c in cells], np.float64)
    known = values[np.isfinite(values)]
    steps = np.arange(buckets)
    at, method = ((steps + 1) / buckets, "higher") if slot.better == "low" else (steps / buckets, "lower")
    edges = np.unique(np.quantile(known, at, method=method)) if len(known) else np.zeros(0)  # type: ignore[call-overload]
    return Number(slot, values, edges)


class Product(msgspec.Struct, frozen=True, kw_only=True):
    """One row, read out."""

    id: str
    title: str
    description: str = ""
    model: str = ""
    stock: int = 1
    attributes: dict[str, str | float] = {}


@dataclass(eq=False)
class Catalogue:
    """Immutable after construction and shared by every episode of the process.

    `columns` are in the order they are shown: category, brand and price first. `texts` is what is searched besides
    title and description. `report` says what a loader dropped and why.
    """

    ids: tuple[str, ...]
    titles: tuple[str, ...]
    descriptions: tuple[str, ...]
    models: tuple[str, ...]
    stock: NDArray[np.int64]
    columns: dict[str, Column]
    texts: tuple[str, ...] = ()
    currency: str = ""
    report: Any = None
    _masks: dict[Constraint, NDArray[np.bool_]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def row_of(self) -> dict[str, int]:
        return {id: row for row, id in enumerate(self.ids)}

    @cached_property
    def spoken(self) -> dict[str, str]:
        """How people name the slots: words joined by spaces -> slot. A slot's own name goes before synonyms."""
        synonyms = ((word, n) for n, c in self.columns.items() for word in (c.slot.label, *c.slot.words))
        names = {" ".join(words(word)): name for word, name in synonyms}
        return names | {" ".join(words(name)): name for name in self.columns}

    @cached_property
    def fingerprint(self) -> str:
        """Equal catalogues have equal fingerprints in any process."""
        parts: list[str | bytes] = ["\x1f".join(self.ids), "\x1f".join(self.titles), self.stock.tobytes()]
        for name, column in self.columns.items():
            if isinstance(column, Choice):
                parts += [name, column.codes.tobytes(), repr(column.values)]
            else:
                parts += [name, column.values.tobytes(), column.edges.tobytes()]
        return digest(*parts).hex()

    @cached_property
    def in_stock(self) -> NDArray[np.bool_]:
        return np.asarray(self.stock > 0)

    @cached_property
    def sold(self) -> Rows:
        """Rows in stock."""
        return np.flatnonzero(self.in_stock)

    @cached_property
    def numbers(self) -> dict[str, Number]:
        return {name: c for name, c in self.columns.items() if isinstance(c, Number)}

    def mask(self, constraint: Constraint) -> NDArray[np.bool_]:
        """Which rows satisfy it: [N] bool, cached; do not write into it."""
        key = Constraint(constraint.slot, constraint.op, constraint.value)
        found = self._masks.get(key)
        if found is None:
            if len(self._masks) >= _CACHED_MASKS:
                self._masks.pop(next(iter(self._masks)))
            found = self._masks[key] = self.columns[key.slot].holds(slice(None), key.op, key.value)
        return found

    def within(self, rows: Rows, constraints: Iterable[Constraint]) -> Rows:
        """Those of `rows` that satisfy every constraint; soft wishes exclude nothing."""
        for c in constraints:
            if c.op != "prefer":
                rows = rows[self.columns[c.slot].holds(rows, c.op, c.value)]
        return rows

    def satisfies(self, row: int, constraint: Constraint) -> bool:
        return bool(len(self.within(np.array([row]), (constraint,))))

    def category(self, row: int) -> str:
        column = self.columns.get("category")
        found = column.read(row) if column is not None else None
        return found if isinstance(found, str) else ""

    def rows_of(self, category: str) -> Rows:
        """Rows in stock of one category; of the whole catalogue for an empty or unknown one."""
        column = self.columns.get("category")
        if not isinstance(column, Choice) or category not in column.code_of:
            return self.sold
        return np.flatnonzero(self.mask(Constraint("category", "is", category)) & self.in_stock)

    @cached_property
    def _schemas(self) -> dict[str, tuple[str, ...]]:
        return {}

    def schema(self, category: str) -> tuple[str, ...]:
        """The slots in which the items of a category differ, in the order of `columns`; of all items for ""."""
        if category not in self._schemas:
            rows = self.rows_of(category)
            self._schemas[category] = tuple(n for n, c in self.columns.items() if c.distinct(rows) > 1)
        return self._schemas[category]

    def keep(self, slots: Sequence[str]) -> Catalogue:
        """The same items with these slots alone (and the category): what nobody can ask for, search or wish."""
        for name in slots:
            if name not in self.columns:
                raise unknown("slot of this catalogue", name, self.columns)
        columns = {n: c for n, c in self.columns.items() if n in slots or n == "category"}
        return replace(self, columns=columns, _masks={})

    def product(self, row: int) -> Product:
        """One row, read out; unknown values are left out."""
        read = {name: column.read(row) for name, column in self.columns.items()}
        return Product(
            id=self.ids[row],
            title=self.titles[row],
            description=self.descriptions[row],
            model=self.models[row],
            stock=int(self.stock[row]),
            attributes={name: value for name, value in read.items() if value is not None},
        )
