"""Foreign catalogues: every delimiter, number format and defect, and tasks on whatever columns there are."""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shopping_files import FOREIGN, WORDS, delimited, foreign, rows

from agentgym import make
from agentgym.errors import DataError, UnknownName
from agentgym_envs.shopping.catalogue import Catalogue, Choice
from agentgym_envs.shopping.cells import amount, decimal_mark, numbers, parse
from agentgym_envs.shopping.load import read


@pytest.mark.parametrize("mark", [",", ";", "\t", "|", "#"])
def test_every_delimiter_is_read_given_or_found(tmp_path: Path, mark: str) -> None:
    path = delimited(tmp_path / "shop.csv", rows(), mark)
    found, given_ = read(path), read(path, delimiter=mark)
    assert len(found) == 60
    assert found.fingerprint == given_.fingerprint
    assert set(found.columns) >= {"brand", "price", "grip", "weight"}
    weight = found.numbers["weight"]
    assert (weight.slot.unit, weight.slot.better, weight.read(2)) == ("kg", "low", 1.0)


def test_json_lines_with_nested_values(tmp_path: Path) -> None:
    path = tmp_path / "shop.jsonl"
    objects = [
        {
            "id": i,
            "title": row["name"],
            "offer": {"price": {"value": 5 + i % 7, "currency": "EUR"}},
            "specs": {"grip": row["grip"], "sizes": ["s", "m"]},
            "tags": ["tool", WORDS[i % 2]],
            "sold": i % 2 == 0,
        }
        for i, row in enumerate(rows())
    ]
    path.write_text("\n".join(json.dumps(o) for o in objects) + "\nbroken {line\n")
    shop = read(str(path), columns={"price": "offer.price.value"})
    assert shop.report.dropped == {"no JSON object": 1}
    assert shop.numbers["price"].read(3) == 8.0
    grip, sold = shop.columns["specs_grip"], shop.columns["sold"]
    assert isinstance(grip, Choice)
    assert isinstance(sold, Choice)
    assert set(grip.values) == {"wood", "rubber", "steel"}
    assert set(sold.values) == {"yes", "no"}


def test_category_paths_stock_words_and_models(tmp_path: Path) -> None:
    table = rows()
    for i, row in enumerate(table):
        row["category"] = f"Tools > {'Hand' if i % 2 else 'Power'} > Rare{i}"
        row |= {"availability": "in stock", "model": f"m{i // 2}"}
    table[0]["availability"] = "Out of Stock"
    shop = read(delimited(tmp_path / "a.csv", table))
    category = shop.columns["category"]
    assert isinstance(category, Choice)
    assert set(category.values) == {"Hand", "Power"}
    assert (shop.stock[0], shop.stock[1]) == (0, 1)
    assert shop.models[:4] == ("m0", "m0", "m1", "m1")


# --- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mark", "value", "unit"),
    [
        ("$1,299.00", ".", 1299.0, "$"),
        ("1.299,00 EUR", ",", 1299.0, "eur"),
        ("1 299,50 kr", ",", 1299.5, "kr"),
        ("1’299.00 CHF", ".", 1299.0, "chf"),
        ("€ 12", ".", 12.0, "€"),
        ("12 oz", ".", 12.0, "oz"),
        ("1.5kg", ".", 1.5, "kg"),
        ("-4", ".", -4.0, ""),
        ("1e3", ".", 1000.0, ""),
        (".5 l", ".", 0.5, "l"),
        ('15.6"', ".", 15.6, '"'),
        ("EUR 1.000.000", ",", 1e6, "eur"),
    ],
)
def test_numbers_as_shops_write_them(text: str, mark: str, value: float, unit: str) -> None:
    found = amount(text)
    assert found is not None
    assert found.unit == unit
    assert parse(found.digits, mark) == value


@pytest.mark.parametrize("text", ["abc", "10-20", "3 x 4", "1/2", "n/a", "", "12 34 ab 5", "v1.2.3a4"])
def test_what_is_no_number_is_none(text: str) -> None:
    assert amount(text) is None


@pytest.mark.parametrize(
    ("column", "price", "values"),
    [
        (["1.299,00 €", "15,50 €"], True, [1299.0, 15.5]),
        (["1,299.00", "15.50"], True, [1299.0, 15.5]),
        (["1.299", "2.450"], True, [1299.0, 2450.0]),
        (["1.299", "2.450"], False, [1.299, 2.45]),
        (["1,299", "20"], True, [1299.0, 20.0]),
        (["4,5", "3,8"], False, [4.5, 3.8]),
        (["500 g", "1.5 kg", "2 kg"], False, [0.5, 1.5, 2.0]),
        (["$5", "£6", "$7"], True, [5.0, None, 7.0]),
        (["5", "$6", "USD 7", "nan", "1e999"], True, [5.0, 6.0, 7.0, None, None]),
    ],
)
def test_a_whole_column_decides_marks_and_units(column: list[str], price: bool, values: list[float | None]) -> None:
    assert numbers(column, price).values == values


@given(st.lists(st.floats(0.01, 1e6).map(lambda v: round(v, 2)), min_size=2, max_size=8), st.booleans())
def test_both_conventions_read_back(prices: list[float], continental: bool) -> None:
    texts = [f"{p:,.2f}" for p in prices]
    if continental:
        texts = [t.translate(str.maketrans(",.", ".,")) for t in texts]
    assert numbers(texts, price=True).values == prices


def test_an_ambiguous_column_falls_to_the_dot() -> None:
    read_ = [a for t in ("1.5", "2.25") if (a := amount(t))]
    assert decimal_mark(read_) == "."
    assert decimal_mark([]) == "."


# --- what is dropped --------------------------------------------------------------------------------------------


def test_every_loss_is_counted_by_reason(tmp_path: Path) -> None:
    table = rows()
    for at, price in enumerate(["", "0", "-3", "inf", "call us", "£5"]):
        table[at]["price"] = price
    for row in table[6:]:
        row["price"] = "$" + row["price"]
    table[10]["sku"] = table[9]["sku"]
    table[11]["name"] = ""
    path = delimited(tmp_path / "a.csv", table)
    Path(path).write_text(Path(path).read_text() + "only,three,fields\n")
    report = read(path).report
    assert (report.rows, report.kept) == (61, 58)
    assert report.dropped == {"wrong number of fields": 1, "id seen before": 1, "no title": 1}
    assert report.unknown_prices == {
        "missing": 1, "zero": 1, "negative": 1, "unreadable": 2, "in another currency": 1,
    }  # fmt: skip
    assert "58 of 61 rows" in str(report)


def test_a_stray_quote_swallows_no_rows(tmp_path: Path) -> None:
    table = rows()
    table[5]["name"] = '"17 inch saw'
    assert len(read(delimited(tmp_path / "a.csv", table))) == 60
    table[9]["name"] = '"15 inch saw'
    assert len(read(delimited(tmp_path / "two.csv", table))) == 60
    quoted = tmp_path / "b.csv"
    quoted.write_text("name,maker\n" + "".join(f'"a, ""big"" saw\nno {i}",{WORDS[i % 5]}\n' for i in range(40)))
    shop = read(str(quoted))
    assert len(shop) == 40
    assert shop.titles[3] == 'a, "big" saw\nno 3'


def test_encodings(tmp_path: Path) -> None:
    table = [{**r, "name": f"säge {i}"} for i, r in enumerate(rows())]
    latin = delimited(tmp_path / "latin.csv", table, encoding="latin-1")
    with pytest.raises(DataError, match=r"0xe4 in line 2 is not utf-8.*encoding='latin-1'"):
        read(latin)
    expected = tuple(r["name"] for r in table)
    assert read(latin, encoding="latin-1").titles == expected
    assert read(delimited(tmp_path / "16.csv", table, encoding="utf-16")).titles == expected
    assert read(delimited(tmp_path / "bom.csv", table, encoding="utf-8-sig")).titles == expected
    with pytest.raises(DataError, match="no encoding 'latin-0'"):
        read(latin, encoding="latin-0")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "empty"),
        ("name,price\n", {}, "only a header"),
        ("name;price\nsaw;3\n", {"delimiter": ","}, r"only one column .*delimiter=';'"),
        ("name\nsaw\n", {}, "only one column"),
        ("name,price\nsaw,3\n", {"delimiter": "::"}, "one character"),
        ("name,price\nsaw,3\n", {"columns": {"title": "nam"}}, "did you mean 'name'"),
        ("a,b\n1,2\n", {}, r"columns\.title: a, b"),
        ("name,price\nsaw,0\nsaw,0\n", {}, "no attribute"),
        ("name,price\nsaw,nan\naxe,inf\nbit,-5\n", {}, "prices that cannot be used: .*"),
        ("name,price\n,3\n,4\n", {}, "2 no title"),
        ("[1, 2", {}, "JSON"),
    ],
)
def test_one_clear_error_each(tmp_path: Path, text: str, options: dict[str, Any], message: str) -> None:
    path = tmp_path / ("a.json" if text.startswith("[") else "a.csv")
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read(str(path), **options)


def test_a_missing_file_names_its_neighbours_and_a_wrong_role_the_nearest(tmp_path: Path) -> None:
    path = delimited(tmp_path / "shop.csv", rows())
    with pytest.raises(DataError, match=r"no catalogue file .*holds: shop\.csv"):
        read(str(tmp_path / "shp.csv"))
    with pytest.raises(DataError, match="cannot be read"):
        read(str(tmp_path))
    with pytest.raises(UnknownName, match="did you mean 'brand'"):
        read(path, columns={"brnd": "maker"})


@given(st.binary(max_size=400))
def test_no_bytes_escape_the_one_error(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.csv"
        path.write_bytes(data)
        with suppress(DataError):
            assert len(read(str(path))) > 0


# --- tasks on foreign columns -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_catalogue_carries_every_intent_in_every_split(kind: str, tmp_path: Path) -> None:
    env = make("shopping-v0", **foreign(kind, tmp_path))
    catalogue: Catalogue = env.catalogue  # type: ignore[attr-defined]
    assert catalogue.report.unknown_prices["zero"] > 0
    assert {"category", "brand", "price"} <= set(catalogue.columns)
    for split in ("train", "val", "test"):
        tasks = list(islice(env.tasks(split, 0), 40))
        assert {t.labels["intent"] for t in tasks} == {"single", "multi", "fuzzy", "bundle", "compare", "consult"}


def test_a_catalogue_too_poor_for_a_task_says_so(tmp_path: Path) -> None:
    path = delimited(tmp_path / "tiny.csv", rows(3))
    env = make("shopping-v0", catalogue=path)
    with pytest.raises(DataError, match=r"no task of single.*on 3 products"):
        list(islice(env.tasks("train", 0), 5))
