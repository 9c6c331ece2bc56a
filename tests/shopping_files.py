"""Catalogue files for the shopping tests: small shops, and one without categories as found in the wild."""

from __future__ import annotations

from pathlib import Path
from typing import Any

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "catalogue_software.csv"
WORDS = ("alpha", "beta", "gamma", "delta", "omega")


def rows(count: int = 60) -> list[dict[str, Any]]:
    """A small shop of hammers and saws."""
    return [
        {
            "sku": f"X{i}",
            "name": f"{WORDS[i % 5]} {'hammer' if i % 2 else 'saw'} {i}",
            "maker": WORDS[i % 5],
            "price": f"{10 + 7 * (i % 11)}.50",
            "grip": ("wood", "rubber", "steel")[i % 3],
            "weight": f"{0.5 + 0.25 * (i % 9)} kg",
        }
        for i in range(count)
    ]


def delimited(path: Path, table: list[dict[str, Any]], mark: str = ",", encoding: str = "utf-8") -> str:
    lines = [mark.join(table[0]), *(mark.join(str(v) for v in row.values()) for row in table)]
    path.write_bytes(("\n".join(lines) + "\n").encode(encoding))
    return str(path)


FOREIGN = ("stand-in", *(("real",) if REAL.exists() else ()))
"""The real catalogue takes part where it lies beside the checkout; its likeness always does."""


def stand_in(folder: Path) -> str:
    """A `#`-separated shop without categories, as the real one: unknown prices, many makers, quotes in the text."""
    lines = ["id#title#description#manufacturer#price"]
    for i in range(300):
        kind = ("suite", "studio", "upgrade", "server")[i % 4]
        price = 0.0 if i % 6 == 0 else 9.99 + (i * 37) % 400
        lines.append(
            f'{i}#{WORDS[i % 5]} {kind} "{i}"#a {kind}, with #'.rstrip("#") + f"#{WORDS[i % 5]} {i % 7} inc#{price}"
        )
    path = folder / "stand_in.csv"
    path.write_text("\n".join(lines))
    return str(path)


def foreign(kind: str, folder: Path) -> dict[str, Any]:
    """Options of an environment on a foreign catalogue."""
    path = str(REAL) if kind == "real" else stand_in(folder)
    columns = {"title": "title", "brand": "manufacturer", "price": "price", "description": "description", "id": "id"}
    return {"catalogue": path, "delimiter": "#", "columns": columns}
