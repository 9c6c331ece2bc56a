"""Search inside the process: BM25 over an inverted index of numpy arrays, and structured filters as masks.

The order is deterministic on every platform: scores are rounded, ties go by row. Text from an agent is only ever
tokenised, never parsed as a query language.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from agentgym_envs.shopping.catalogue import Catalogue, Constraint, Number, Rows, words

K1, B = 1.2, 0.75
"""BM25's usual saturation and length normalisation (Robertson and Zaragoza 2009)."""
MAX_QUERY_TERMS = 32


class Hits(NamedTuple):
    """How many items match, and the rows of the page asked for, best first."""

    total: int
    rows: Rows


class SearchBackend(Protocol):
    """Anything that ranks a catalogue: the numpy index below, or an engine of your own."""

    def search(
        self,
        text: str = "",
        filters: Sequence[Constraint] = (),
        *,
        sort: str = "",
        in_stock: bool = True,
        start: int = 0,
        count: int = 5,
    ) -> Hits:
        """Matches `start` to `start + count` in a deterministic order. Empty text matches all."""
        ...


class Index:
    """The numpy index. Built once per process, read-only afterwards; the text side now (`text`) or on first use."""

    def __init__(self, catalogue: Catalogue, text: bool = False) -> None:
        self.catalogue = catalogue
        self._postings = _build(_documents(catalogue)) if text else None

    @property
    def postings(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """term -> (rows, BM25 contributions)."""
        if self._postings is None:
            self._postings = _build(_documents(self.catalogue))
        return self._postings

    def scores(self, text: str) -> NDArray[np.float32]:
        """BM25 of every row, rounded to four decimals: [N] float32."""
        total = np.zeros(len(self.catalogue), np.float32)
        for term in sorted(set(words(text)[:MAX_QUERY_TERMS])):
            if term in self.postings:
                rows, weights = self.postings[term]
                total[rows] += weights
        return np.round(total, 4)

    def search(
        self,
        text: str = "",
        filters: Sequence[Constraint] = (),
        *,
        sort: str = "",
        in_stock: bool = True,
        start: int = 0,
        count: int = 5,
    ) -> Hits:
        """Matches by score, or by the merit of the number slot `sort`; ties by row."""
        keep: NDArray[np.bool_] | None = self.catalogue.in_stock if in_stock else None
        for f in filters:
            mask = self.catalogue.mask(f)
            keep = mask if keep is None else keep & mask
        scores = self.scores(text) if words(text) else None
        if scores is not None:
            keep = scores > 0 if keep is None else keep & (scores > 0)
        rows = np.arange(len(self.catalogue)) if keep is None else np.flatnonzero(keep)
        column = self.catalogue.columns.get(sort)
        stop = start + count
        if isinstance(column, Number):
            return Hits(len(rows), _top(rows, column.merit(rows), stop)[start:])
        return Hits(len(rows), rows[start:stop] if scores is None else _top(rows, scores[rows], stop)[start:])


def _top(rows: Rows, scores: NDArray[np.floating[Any]], count: int) -> Rows:
    """The best `count` rows by score; ties by row."""
    if len(rows) > 4 * count:
        near = scores >= np.partition(scores, -count)[-count]
        rows, scores = rows[near], scores[near]
    return rows[np.argsort(-scores, kind="stable")][:count]


def _documents(catalogue: Catalogue) -> list[list[str]]:
    extra = catalogue.texts or ("",) * len(catalogue)
    return [words(" ".join(t)) for t in zip(catalogue.titles, catalogue.descriptions, extra, strict=True)]


def _build(documents: list[list[str]]) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """BM25 weights at index time: idf * tf (k1 + 1) / (tf + k1 (1 - b + b len / mean len))."""
    mean = max(sum(map(len, documents)) / max(len(documents), 1), 1.0)
    raw: dict[str, list[tuple[int, float]]] = {}
    for row, document in enumerate(documents):
        norm = K1 * (1.0 - B + B * len(document) / mean)
        for term, count in Counter(document).items():
            raw.setdefault(term, []).append((row, count * (K1 + 1.0) / (count + norm)))
    built = {}
    for term, hits in raw.items():
        idf = math.log(1.0 + (len(documents) - len(hits) + 0.5) / (len(hits) + 0.5))
        rows, weights = zip(*hits, strict=True)
        built[term] = (np.array(rows, np.int64), np.array([idf * w for w in weights], np.float32))
    return built
