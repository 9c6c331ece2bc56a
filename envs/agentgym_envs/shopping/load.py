"""A catalogue from anybody's file: find the columns, parse the numbers, say what was dropped and why.

Some columns have a role: id, title, brand, price, description, and category, stock and model where there are such.
Those not named in the map are found by common names. Every other column becomes an attribute: a number where its cells
parse, a choice where its values are few, else text that is searched.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec
import numpy as np

from agentgym.errors import DataError, unknown
from agentgym_envs.shopping import cells, files
from agentgym_envs.shopping.catalogue import Catalogue, Column, Number, Slot, choice, number, words

ROLES: dict[str, tuple[str, ...]] = {
    "title": ("title", "name", "product_name", "product_title", "item_name", "product"),
    "brand": ("brand", "manufacturer", "maker", "vendor", "brand_name", "company", "store", "author", "publisher"),
    "price": ("price", "sale_price", "list_price", "current_price", "price_eur", "price_usd", "amount", "cost"),
    "description": ("description", "desc", "long_description", "full_description", "summary", "about", "text"),
    "id": ("id", "sku", "product_id", "asin", "item_id", "uid", "ean", "gtin", "code"),
    "category": ("category", "categories", "product_category", "main_category", "department", "product_type", "genre"),
    "stock": ("stock", "quantity", "in_stock", "inventory", "availability", "available"),
    "model": ("model", "parent_asin", "group_id", "item_group_id", "parent_id"),
}
_IDENTIFIERS = re.compile(
    r"(?:^|_)(?:id|ids|sku|ean|upc|gtin|asin|isbn|mpn|url|uri|link|image|images|img|photo)(?:_|$)"
)
_LOW_IS_BETTER = {
    "price", "preis", "prix", "precio", "cost", "fee", "shipping", "delivery", "weight", "gewicht", "poids", "peso",
    "noise", "consumption", "latency", "age", "sugar", "salt", "calories", "rank",
}  # fmt: skip
_GONE = {"0", "no", "false", "out of stock", "out_of_stock", "outofstock", "unavailable", "sold out", "none"}
_GRAMMAR = ("item", "sort", "page", "because", "best", "any", "vague")
MAX_CHOICES = 400
MAX_WORD = 40
MAX_SLOTS = 16
"""Slots a user may have wishes about; what columns there are beyond is searched as text."""
TOPIC_SHARE = (0.01, 0.5)
MIN_TOPIC = 10
REST = "general"
"""The topic of titles without a telling word."""
_STOP = frozenset(("the", "and", "for", "with", "from", "new", "set", "pack", "plus", "full", "version", "der", "die"))


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What the loader did: rows read and kept, rows dropped and prices unknown by reason, and remarks."""

    path: str
    rows: int
    kept: int
    dropped: dict[str, int] = {}
    unknown_prices: dict[str, int] = {}
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        lost = ", ".join(f"{n} {why}" for why, n in self.dropped.items()) or "none"
        unpriced = ", ".join(f"{n} {why}" for why, n in self.unknown_prices.items()) or "none"
        head = f"{self.path}: {self.kept} of {self.rows} rows; dropped: {lost}; without a price: {unpriced}"
        return "; ".join((head, *self.remarks))


def read(
    path: str,
    *,
    delimiter: str = "",
    columns: dict[str, str] | None = None,
    encoding: str = "",
    quote: str = '"',
    buckets: int = 12,
) -> Catalogue:
    """Read a catalogue. `columns` maps roles to the file's names, e.g. {"title": "name", "brand": "manufacturer"}."""
    table = files.table(Path(path), delimiter, encoding, quote)
    loader = _Loader(path, table, _roles(path, table.header, columns or {}), buckets)
    return loader.catalogue()


def _roles(path: str, header: list[str], columns: dict[str, str]) -> dict[str, int]:
    """Role -> position of its column. A mapped column must exist; others are found by common names."""
    for role, name in columns.items():
        if role not in ROLES:
            raise unknown("role of a column", role, ROLES)
        if name not in header:
            raise DataError(f"{path}: {unknown('column', name, header)}; mapped as {role}")
    names = {_slug(h): i for i, h in reversed(list(enumerate(header)))}
    found = {role: header.index(name) for role, name in columns.items()}
    taken = set(found.values())
    for role, common in ROLES.items():
        at = next((names[n] for n in common if n in names and names[n] not in taken), None)
        if role not in found and at is not None:
            found[role] = at
            taken.add(at)
    if "title" not in found:
        raise DataError(f"{path}: no column looks like a title; map one with columns.title: {', '.join(header[:12])}")
    return found


class _Loader:
    """One reading of one file."""

    def __init__(self, path: str, table: files.Table, roles: dict[str, int], buckets: int) -> None:
        self.path, self.table, self.roles, self.buckets = path, table, roles, buckets
        self.dropped = dict(table.dropped)
        self.unpriced: Counter[str] = Counter()
        self.remarks: list[str] = []
        self.rows = self._usable()
        self.searched: list[list[str]] = []

    def catalogue(self) -> Catalogue:
        """The whole catalogue; `DataError` where nothing usable is left."""
        price, currency = self._price()
        self.columns: dict[str, Column] = {}
        self._add_category()
        if "brand" in self.roles:
            self._keep(choice(Slot(name="brand", words=("maker", "manufacturer", "brands")), self._cells("brand")))
        if any(v is not None for v in price):
            words_ = ("budget", "cost", "costs", "expensive", "spend")
            self._keep(number(Slot(name="price", unit=currency, words=words_), price, self.buckets))
        self._add_attributes()
        if not self.columns:
            raise DataError(
                f"{self.path}: no attribute to ask about{self._lost_prices()}: map brand or price, or add columns with "
                "values"
            )
        ids = self._ids()
        return Catalogue(
            ids=ids,
            titles=tuple(self._cells("title")),
            descriptions=tuple(self._cells("description")),
            models=tuple(m or i for m, i in zip(self._cells("model"), ids, strict=True)),
            stock=self._stock(),
            columns=self.columns,
            texts=tuple(" ".join(parts) for parts in zip(*self.searched, strict=True)) if self.searched else (),
            currency=currency,
            report=self._report(),
        )

    def _lost_prices(self) -> str:
        """Why no price could be used, where there is a price column."""
        lost = ", ".join(f"{n} {why}" for why, n in self.unpriced.items())
        return f" (prices that cannot be used: {lost})" if lost else ""

    def _report(self) -> Report:
        read = len(self.table.rows) + sum(self.table.dropped.values())
        return Report(
            path=self.path,
            rows=read,
            kept=len(self.rows),
            dropped=self.dropped,
            unknown_prices=dict(self.unpriced),
            remarks=tuple(self.remarks),
        )

    def _usable(self) -> list[list[str]]:
        """Rows with a title and an id of their own."""
        rows, seen = [], set()
        for row in self.table.rows:
            id = row[self.roles["id"]] if "id" in self.roles else ""
            if not row[self.roles["title"]]:
                self._drop("no title")
            elif id and id in seen:
                self._drop("id seen before")
            else:
                seen.add(id)
                rows.append(row)
        if not rows:
            reasons = ", ".join(f"{n} {why}" for why, n in self.dropped.items()) or "the file has only a header"
            raise DataError(f"{self.path}: no usable rows ({reasons}); check delimiter, quote and the column map")
        return rows

    def _drop(self, why: str) -> None:
        self.dropped[why] = self.dropped.get(why, 0) + 1

    def _cells(self, role: str) -> list[str]:
        """The texts of a role; empty ones where the file has no such column."""
        at = self.roles.get(role)
        return [row[at] for row in self.rows] if at is not None else [""] * len(self.rows)

    def _keep(self, column: Column) -> None:
        """Keep a column that tells at least two values apart."""
        if column.distinct(np.arange(len(self.rows))) > 1:
            self.columns[column.slot.name] = column

    def _ids(self) -> tuple[str, ...]:
        return tuple(id or f"row{i + 1}" for i, id in enumerate(self._cells("id")))

    def _price(self) -> tuple[list[float | None], str]:
        """Prices in the most frequent currency; zero, negative, unreadable and foreign ones are unknown."""
        texts = self._cells("price")
        found = cells.numbers(texts, price=True)
        self.unpriced["missing"] = sum(not t for t in texts)
        self.unpriced["unreadable"] = found.odd
        self.unpriced["in another currency"] = found.foreign
        self.unpriced["zero"] = sum(v == 0 for v in found.values if v is not None)
        self.unpriced["negative"] = sum(v < 0 for v in found.values if v is not None)
        self.unpriced = +self.unpriced
        return [v if v is not None and v > 0 else None for v in found.values], found.unit

    def _stock(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Stock from numbers or words; 1 where nothing is said. If nothing at all were in stock, all is."""
        texts = self._cells("stock")
        counts = cells.numbers(texts).values
        stock = np.array([_count(t, n) for t, n in zip(texts, counts, strict=True)], np.int64)
        if not stock.any():
            self.remarks.append("the stock column leaves nothing to sell and is ignored")
            stock[:] = 1
        return stock

    # --- category and attributes --------------------------------------------------------------------------------

    def _add_category(self) -> None:
        """The category column, or a topic read off the titles."""
        slot = Slot(name="category", words=("category",))
        if "category" in self.roles:
            self._keep(choice(slot, _levels(self._cells("category"))))
        if "category" not in self.columns:
            self.remarks.append("no category column: the topic word of the title stands for it")
            brands = {w for brand in set(self._cells("brand")) for w in words(brand)}
            self._keep(choice(slot, _topics(self._cells("title"), brands)))

    def _add_attributes(self) -> None:
        """Every column without a role: the fullest become attributes, in the order of the file, others are searched."""
        found: list[Column] = []
        for at, label in enumerate(self.table.header):
            if at not in self.roles.values():
                texts = [row[at] for row in self.rows]
                name = _free(_slug(label), {*self.columns, *(c.slot.name for c in found)})
                column = self._attribute(name, label, texts)
                if column is not None:
                    found.append(column)
                if not (isinstance(column, Number) or _IDENTIFIERS.search(name)):
                    self.searched.append(texts)
        fullest = sorted(found, key=lambda c: -round(float(c.present.mean()), 1))[: MAX_SLOTS - len(self.columns)]
        for column in found:
            if column in fullest:
                self._keep(column)

    def _attribute(self, name: str, label: str, texts: list[str]) -> Column | None:
        """A number or choice column, or None for what is neither."""
        filled = [t for t in texts if t]
        kinds = len({t.casefold() for t in filled})
        if kinds < 2 or _IDENTIFIERS.search(name):
            return None
        found = cells.numbers(texts)
        if found.odd + found.foreign <= 0.1 * len(filled) and _measures(found.values, kinds):
            low = not _LOW_IS_BETTER.isdisjoint(name.split("_"))
            slot = Slot(name=name, label=label, better="low" if low else "high", unit=found.unit)
            return number(slot, found.values, self.buckets)
        few = kinds <= min(MAX_CHOICES, max(12, len(filled) // 3))
        short = np.mean([len(t) for t in filled]) <= MAX_WORD
        return choice(Slot(name=name, label=label), _one_case(texts)) if few and short else None


def _measures(values: Sequence[float | None], kinds: int) -> bool:
    """Whether numbers measure something: not a running number, whole and different in every row."""
    known = [v for v in values if v is not None]
    whole = all(float(v).is_integer() for v in known)
    return kinds > 2 and not (whole and len(known) > 50 and len(set(known)) == len(known))


def _count(text: str, number_: float | None) -> int:
    if number_ is not None:
        return max(int(number_), 0)
    return 0 if text.casefold() in _GONE else 1


def _one_case(texts: list[str]) -> list[str | None]:
    """Values that differ only in case or space are one value: the spelling seen most."""
    counts = Counter(t for t in texts if t)
    best: dict[str, str] = {}
    for text in sorted(counts, key=lambda t: (-counts[t], t)):
        best.setdefault(" ".join(text.casefold().split()), text)
    return [best[" ".join(t.casefold().split())] if t else None for t in texts]


def _levels(texts: list[str]) -> list[str | None]:
    """Of category paths ("A > B > C", "A | B") the deepest level that still has enough items."""
    paths = [[p.strip() for p in re.split(r"\s*(?:>|›|»|\||/)\s*", t) if p.strip()] for t in texts]
    counts = Counter(level for path in paths for level in path)
    return [next((p for p in reversed(path) if counts[p] >= MIN_TOPIC), path[0] if path else None) for path in paths]


def _topics(titles: list[str], brands: set[str]) -> list[str | None]:
    """For each title its most frequent telling word: no brand, no number, in some but not in most of the titles."""
    documents = [[w for w in dict.fromkeys(words(t)) if len(w) > 2 and not re.search(r"\d", w)] for t in titles]
    counts = Counter(w for d in documents for w in d)
    low, high = max(MIN_TOPIC, TOPIC_SHARE[0] * len(titles)), max(TOPIC_SHARE[1] * len(titles), MIN_TOPIC)
    telling = {w for w, n in counts.items() if low <= n <= high and w not in brands and w not in _STOP}
    return [max((w for w in d if w in telling), key=lambda w: (counts[w], w), default=REST) for d in documents]


def _slug(label: str) -> str:
    """A slot name: one lower-case word."""
    return re.sub(r"\W+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", label).lower()).strip("_") or "column"


def _free(name: str, taken: Collection[str]) -> str:
    """The name, or the name with a number where it is taken, a role, or a word of the compact grammar."""
    used = {*taken, *ROLES, *_GRAMMAR}
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, 10_000))) if n not in used)
