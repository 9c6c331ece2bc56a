"""The options of `shopping-v0`."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from agentgym.errors import ConfigError, unknown

Intent = Literal["single", "multi", "fuzzy", "bundle", "compare", "consult"]
INTENTS: tuple[Intent, ...] = ("single", "multi", "fuzzy", "bundle", "compare", "consult")


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What an environment is made with.

    surface         "full": JSON tools and natural text; "compact": a closed vocabulary for small models
    catalogue       a csv or JSONL file; empty = the synthetic catalogue of `size` items from `seed`
    delimiter, columns, encoding, quote    how to read the file (see `load.read`); empty = found out
    slots           the slots that exist besides the category; empty = all the catalogue has
    buckets         quantile edges per number slot
    intents         what users come for, drawn uniformly among those that catalogue and time can carry (a bundle needs
                    prices and eight turns, consult a number column)
    hidden          fewest and most wishes the user keeps back
    visible         fewest and most wishes said at the start besides the category
    soft            soft wishes (better is better) per need
    max_turns       the user's time: tool calls and messages together; 0 = 4 + 2 per hidden wish (more for bundles)
    vague           chance that the first answer about a number slot is vague and needs a second question
    patience        useless questions until the user leaves
    change_of_mind  chance that the user changes one hidden wish on the way
    rejections      how often a shown item is rejected with the reason
    errors_allowed  malformed calls until the episode ends as invalid
    results         items per page (the compact surface has handles for five)
    latency         seconds that every answer of user or shop takes
    """

    surface: Literal["full", "compact"] = "full"
    catalogue: str = ""
    delimiter: str = ""
    columns: dict[str, str] = {}
    encoding: str = ""
    quote: str = '"'
    size: int = 1000
    seed: int = 0
    slots: tuple[str, ...] = ()
    buckets: int = 12
    intents: tuple[Intent, ...] = INTENTS
    hidden: tuple[int, int] = (2, 3)
    visible: tuple[int, int] = (0, 1)
    soft: int = 1
    max_turns: int = 0
    vague: float = 0.1
    patience: int = 4
    change_of_mind: float = 0.0
    rejections: int = 1
    errors_allowed: int = 2
    results: int = 5
    latency: float = 0.0


def config(options: dict[str, Any]) -> Config:
    """Check options; a misspelt key names the nearest, a wrong value says what was expected."""
    for name in options:
        if name not in Config.__struct_fields__:
            raise unknown("option of shopping-v0", name, Config.__struct_fields__)
    try:
        found = msgspec.convert(options, Config, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"shopping-v0: {error}") from None
    _check(found)
    return found


def _check(c: Config) -> None:
    ranges: dict[str, tuple[float, float]] = {
        "size": (20, 10_000_000), "buckets": (2, 99), "soft": (0, 3), "max_turns": (0, 1000), "vague": (0, 1),
        "patience": (1, 1000), "change_of_mind": (0, 1), "rejections": (0, 100), "errors_allowed": (0, 1000),
        "results": (1, 5), "latency": (0, 60),
    }  # fmt: skip
    for name, (low, high) in ranges.items():
        if not low <= getattr(c, name) <= high:
            raise ConfigError(f"shopping-v0: {name} = {getattr(c, name)} is outside {low} .. {high}")
    for name, low in (("hidden", 1), ("visible", 0)):
        first, last = getattr(c, name)
        if not low <= first <= last:
            raise ConfigError(f"shopping-v0: {name} = [{first}, {last}] must be {low} <= fewest <= most")
    if not c.intents:
        raise ConfigError(f"shopping-v0: intents is empty; choose among {', '.join(INTENTS)}")
