"""The synthetic catalogue, its constraints and splits, and search against a brute-force BM25."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from agentgym_envs.shopping.catalogue import Catalogue, Choice, Constraint, Number, Slot, choice, number, words
from agentgym_envs.shopping.search import K1, B, Index
from agentgym_envs.shopping.synthetic import DEPARTMENTS, synthetic
from agentgym_envs.shopping.tasks import split_of


@pytest.fixture(scope="module")
def shop() -> Catalogue:
    return synthetic(1000)


def test_the_catalogue_is_the_same_in_another_process(shop: Catalogue) -> None:
    code = "from agentgym_envs.shopping.synthetic import synthetic; print(synthetic(1000).fingerprint)"
    for hash_seed in ("1", "77"):
        other = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**__import__("os").environ, "PYTHONHASHSEED": hash_seed},
        )
        assert other.stdout.strip() == shop.fingerprint
    assert synthetic(1000, 1).fingerprint != shop.fingerprint


def test_a_bigger_catalogue_begins_with_the_smaller_one(shop: Catalogue) -> None:
    big = synthetic(2000)
    assert (len(shop), len(big)) == (1000, 2000)
    assert big.ids[:1000] == shop.ids


def test_twelve_departments_with_variants_stock_and_correlated_prices(shop: Catalogue) -> None:
    category, price, rating = shop.columns["category"], shop.numbers["price"], shop.numbers["rating"]
    assert isinstance(category, Choice)
    assert set(category.values) == set(DEPARTMENTS)
    assert 0.05 < np.mean(~shop.in_stock) < 0.2
    variants = Counter(shop.models)
    assert set(variants.values()) >= {1, 2, 3}
    same = [i for i in range(999) if shop.models[i] == shop.models[i + 1]]
    assert all(abs(math.log(price.values[i] / price.values[i + 1])) < 0.35 for i in same)
    log_price = np.log(price.values)
    assert np.corrcoef(log_price, rating.values)[0, 1] > 0.05
    means = [log_price[category.codes == code].mean() for code in range(12)]
    assert max(means) - min(means) > 0.8


def test_number_edges_are_values_that_occur_and_bound_every_row() -> None:
    cells = [float(x) for x in (3, 1, 4, 1, 5, 9, 2, 6)]
    low = number(Slot(name="price", better="low"), cells, 4)
    assert low.edges.tolist() == [2.0, 4.0, 6.0, 9.0]
    high = number(Slot(name="rating", better="high"), cells, 4)
    assert high.edges.tolist() == [1.0, 3.0, 5.0]
    assert [low.bucket(v) for v in (1, 2, 3, 9)] == [0, 0, 1, 3]
    assert [high.bucket(v) for v in (1, 2.5, 3, 9)] == [0, 0, 1, 2]


def test_every_wish_is_true_of_its_row_and_an_unknown_value_satisfies_nothing(shop: Catalogue) -> None:
    for row in range(0, 1000, 37):
        for column in shop.columns.values():
            wish = column.wish(row)
            if wish is not None:
                assert shop.satisfies(row, wish)
    partly = Number(Slot(name="x"), np.array([np.nan, 1.0]), np.array([1.0]))
    assert partly.holds(np.array([0, 1]), "max", 5.0).tolist() == [False, True]
    assert partly.wish(0) is None
    named = choice(Slot(name="y"), [None, "a", "b", "a"])
    assert named.values == ("a", "b")
    assert named.holds(slice(None), "is", "nothing").tolist() == [False] * 4


def test_splits_go_by_the_model_and_no_seed_moves_one(shop: Catalogue) -> None:
    shares = Counter(split_of(f"M{i}") for i in range(20_000))
    assert [round(shares[s] / 20_000, 2) for s in ("train", "val", "test")] == [0.7, 0.1, 0.2]
    assert split_of(shop.models[3]) == split_of(shop.models[3])


# --- search -----------------------------------------------------------------------------------------------------


def brute_force(shop: Catalogue, query: str) -> list[float]:
    """BM25 by its definition, document by document."""
    documents = [words(f"{t} {d}") for t, d in zip(shop.titles, shop.descriptions, strict=True)]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for term in set(words(query)):
            df = sum(term in d for d in documents)
            tf = document.count(term)
            idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
            score += idf * tf * (K1 + 1) / (tf + K1 * (1 - B + B * len(document) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("query", ["red laptop", "Acme DURABLE tent!", "sneakers leather 12", "nothing-of-this xyzzy"])
def test_search_equals_brute_force(query: str) -> None:
    small = synthetic(120)
    expected = brute_force(small, query)
    hits = Index(small).search(query, in_stock=False, count=120)
    assert hits.total == sum(s > 0 for s in expected)
    assert [round(expected[r], 2) for r in hits.rows] == sorted((round(s, 2) for s in expected if s > 0), reverse=True)


def test_ties_go_by_row_and_pages_join_up(shop: Catalogue) -> None:
    index = Index(shop)
    for text, sort in (("", ""), ("durable", ""), ("", "rating"), ("tent", "price")):
        whole = index.search(text, sort=sort, count=1000).rows.tolist()
        pages = [r for start in range(0, 60, 5) for r in index.search(text, sort=sort, start=start).rows.tolist()]
        assert pages == whole[:60]
    assert index.search("", count=1000).rows.tolist() == shop.sold.tolist()


def test_filters_are_exact_and_sorting_puts_the_better_end_first(shop: Catalogue) -> None:
    price = shop.numbers["price"]
    wish = (Constraint("category", "is", "tent"), Constraint("price", "max", float(price.edges[4])))
    hits = Index(shop).search("", wish, sort="price", count=1000)
    brute = [r for r in shop.sold if shop.category(r) == "tent" and price.values[r] <= price.edges[4]]
    assert sorted(hits.rows.tolist()) == brute
    assert np.all(np.diff(price.values[hits.rows]) >= 0)


@pytest.mark.parametrize("text", ['a"b', "field:x AND", "(", "", " \x00 ", "+-^~*", "e" * 100_000, "\ud800"])
def test_no_text_breaks_the_search(shop: Catalogue, text: str) -> None:
    assert Index(shop).search(text).total >= 0
