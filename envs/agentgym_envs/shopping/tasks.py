"""Tasks: what a user wants, read off a real product of the catalogue.

A task holds its whole content in the payload, as plain data: needs with visible, hidden and soft wishes, the budget, a
change of mind. Wishes are true of the target, so something feasible always exists; a draw is kept if at least eight
items match what is said at the start and at most a quarter of them match everything (compare: one of the four named).
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from random import Random

import msgspec
import numpy as np

from agentgym.errors import ConfigError, DataError, unknown
from agentgym.seeding import key, rng, share
from agentgym.types import Task
from agentgym_envs.shopping.catalogue import Catalogue, Choice, Constraint, Rows
from agentgym_envs.shopping.config import Config, Intent

SPLITS = ("train", "val", "test")
MIN_VISIBLE = 8
TRIES = 90
BUNDLE_TURNS = 8
"""Search, show and add two things, check out, and ask once."""
WEIGHTS = (1.0, 0.75, 0.5)


def split_of(model: str) -> str:
    """train, val or test (70 / 10 / 20) by the hash of the model: no seed moves a product to another split."""
    at = share("split", model)
    return "train" if at < 0.7 else "val" if at < 0.8 else "test"


class Need(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing to buy. `hints` are hidden slots the user says matter, without a value; `best` is a number slot in
    which the answer must be best; `among` are the ids the user asks to compare."""

    target: str
    visible: tuple[Constraint, ...] = ()
    hidden: tuple[Constraint, ...] = ()
    soft: tuple[Constraint, ...] = ()
    hints: tuple[str, ...] = ()
    best: str = ""
    among: tuple[str, ...] = ()

    @property
    def category(self) -> str:
        return next((str(c.value) for c in self.visible if c.slot == "category"), "")


class Purse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a bundle may cost. `level` and `threshold` are edges of the price per item; both count times the items.

    A voucher takes `percent` off when the total reaches the threshold.
    """

    items: int
    level: float
    percent: int = 0
    threshold: float = 0.0
    one_seller: bool = False

    def after_voucher(self, total: float) -> float:
        return total * (1.0 - self.percent / 100.0) if total >= self.threshold * self.items else total

    def covers(self, total: float) -> bool:
        return self.after_voucher(total) <= self.level * self.items + 1e-9


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """At the end of `turn` (1 is the first) the user wants this instead."""

    turn: int
    need: int
    wish: Constraint


class Brief(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The payload of a task, typed."""

    intent: Intent
    catalogue: str
    needs: tuple[Need, ...]
    budget: int
    purse: Purse | None = None
    change: Change | None = None
    vague: float = 0.0
    patience: int = 4
    rejections: int = 1
    errors_allowed: int = 2


def brief_of(task: Task, catalogue: Catalogue) -> Brief:
    """The typed payload; refuses a task made on another catalogue or a payload that is none."""
    try:
        brief = msgspec.convert(task.payload, Brief)
    except msgspec.ValidationError as error:
        raise ConfigError(f"not a task of shopping-v0: {error}; draw one with env.tasks(split, seed)") from None
    if brief.catalogue != catalogue.fingerprint:
        raise ConfigError(
            f"the task was drawn on catalogue {brief.catalogue}, this environment holds {catalogue.fingerprint}; "
            "make it with the same catalogue, size, seed and buckets"
        )
    return brief


def pack(brief: Brief, *, split: str, seed: int) -> Task:
    """A brief as a task record."""
    hidden = sum(len(need.hidden) for need in brief.needs)
    payload = msgspec.to_builtins(brief)
    labels: dict[str, str] = {"intent": brief.intent}
    return Task(env="shopping-v0", split=split, seed=seed, difficulty=float(hidden), payload=payload, labels=labels)


class Maker:
    """Draws tasks from a catalogue. Immutable; shared by all episodes."""

    def __init__(self, catalogue: Catalogue, config: Config) -> None:
        self.catalogue, self.config = catalogue, config
        self.pools: dict[str, list[int]] = {split: [] for split in SPLITS}
        for row in catalogue.sold.tolist():
            self.pools[split_of(catalogue.models[row])].append(row)
        self.intents = tuple(i for i in config.intents if _carries(catalogue, config, i))
        self._carried: dict[str, tuple[Intent, ...]] = {}
        if not self.intents:
            raise ConfigError(
                f"nothing here for the intents {', '.join(config.intents)}: bundle needs prices and "
                f"{BUNDLE_TURNS} turns, consult a number column; add 'single'"
            )

    def stream(self, split: str, seed: int) -> Iterator[Task]:
        """Endless; the same (split, seed) gives the same tasks."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        number = 0
        while True:
            yield self.draw(split, seed, number)
            number += 1

    def draw(self, split: str, seed: int, number: int) -> Task:
        """Task `number` of the stream; `DataError` when the catalogue cannot carry one after many tries."""
        if not self.pools[split]:
            raise DataError(f"no product in stock falls into the split {split!r}; the catalogue is too small for it")
        intents = list(self.carried(split))
        rng(seed, "intent", split, number).shuffle(intents)
        for intent in intents:
            brief = self.attempt(intent, split, seed, number)
            if brief is not None:
                return pack(brief, split=split, seed=key(seed, "user", split, number) >> 24)
        raise DataError(
            f"no task of {', '.join(self.intents)} in {TRIES} tries on {len(self.catalogue)} products with the slots "
            f"{', '.join(self.catalogue.columns)}: at least {MIN_VISIBLE} items must match what is said at first and "
            "at most a quarter of those everything; map more columns, or choose other intents"
        )

    def carried(self, split: str) -> tuple[Intent, ...]:
        """The intents of which at least one of two probes can be drawn in this split."""
        if split not in self._carried:
            found = (i for i in self.intents if any(self.attempt(i, split, 0, -n) is not None for n in (1, 2)))
            self._carried[split] = tuple(found)
        return self._carried[split]

    def attempt(self, intent: Intent, split: str, seed: int, number: int) -> Brief | None:
        """The first draw of this intent that is accepted."""
        for attempt in range(TRIES):
            g = rng(seed, "task", intent, split, number, attempt)
            brief = _Draw(self.catalogue, self.config, intent, g, attempt).brief(self.pools[split])
            if brief is not None:
                return brief
        return None


def _carries(catalogue: Catalogue, config: Config, intent: Intent) -> bool:
    if intent == "bundle":
        return "price" in catalogue.numbers and (not config.max_turns or config.max_turns >= BUNDLE_TURNS)
    return bool(catalogue.numbers) if intent == "consult" else True


class _Draw:
    """One attempt. Later attempts say less at the start and hide more, so that poor catalogues carry tasks too."""

    def __init__(self, catalogue: Catalogue, config: Config, intent: Intent, g: Random, attempt: int) -> None:
        self.catalogue, self.config, self.intent, self.g = catalogue, config, intent, g
        self.relaxed = 3 * attempt // TRIES

    def brief(self, pool: list[int]) -> Brief | None:
        """A whole task, or None where this draw does not fit."""
        first = self.need(self.g.choice(pool), frozenset(pool) if self.intent == "consult" else pool)
        if first is None:
            return None
        needs: tuple[Need, ...] = (first,)
        purse: Purse | None = None
        if self.intent == "bundle":
            second = self.second(first)
            if second is None:
                return None
            needs = (first, second)
            purse = self.purse(needs)
            if purse is None:
                return None
        c = self.config
        hidden = sum(len(n.hidden) for n in needs)
        budget = c.max_turns or 4 + 2 * hidden + (4 if self.intent == "bundle" else 0)
        return Brief(
            intent=self.intent,
            catalogue=self.catalogue.fingerprint,
            needs=needs,
            budget=budget,
            purse=purse,
            change=self.change(needs) if self.g.random() < c.change_of_mind else None,
            vague=c.vague,
            patience=c.patience,
            rejections=c.rejections,
            errors_allowed=c.errors_allowed,
        )

    def need(self, row: int, pool: Container[int]) -> Need | None:
        """Wishes that are true of this row, if enough items match at first and few enough in the end."""
        wishes = {name: wish for name in self.catalogue.columns if (wish := self.catalogue.columns[name].wish(row))}
        named = ["category"] if self.relaxed == 2 else []
        open_slots = [n for n in (*named, *self.catalogue.schema(self.catalogue.category(row))) if n in wishes]
        best = self.superlative(open_slots)
        open_slots = [n for n in open_slots if n != best]
        hidden = self.hide(open_slots, len(open_slots))
        if not hidden:
            return None
        said = self.say([n for n in open_slots if n not in hidden], "category" in wishes)
        soft = [n for n in open_slots if n not in hidden and n not in said and n in self.catalogue.numbers]
        need = Need(
            target=self.catalogue.ids[row],
            visible=tuple(wishes[n] for n in said),
            hidden=tuple(_weighted(wishes[n], self.g) for n in hidden),
            soft=tuple(Constraint(n, "prefer") for n in self.g.sample(soft, min(self.config.soft, len(soft)))),
            hints=tuple(hidden[:1]) if self.intent == "fuzzy" else (),
            best=best,
        )
        return self.named(need, row) if self.intent == "compare" else self.accepted(need, pool)

    def hide(self, slots: list[str], most: int) -> list[str]:
        """Hidden slots, brand and price three times as likely as others (so that it pays to know what to ask)."""
        low, high = self.config.hidden
        wanted = most if self.relaxed == 2 else self.g.randint(low, high)
        ranked = sorted(slots, key=lambda n: self.g.random() ** (1 / 3 if n in ("brand", "price") else 1), reverse=True)
        return ranked[:wanted]

    def say(self, slots: list[str], category: bool) -> list[str]:
        """Slots said at the start: the category, and a few others unless earlier draws found too little."""
        low, high = self.config.visible
        extra = 0 if self.relaxed else self.g.randint(low, high) + (self.intent == "multi")
        head = ["category"] if category and self.relaxed < 2 else []
        return head + self.g.sample(slots, min(extra, len(slots)))

    def superlative(self, slots: list[str]) -> str:
        """Consult asks for the best in a number slot among what fits."""
        numeric = [n for n in slots if n in self.catalogue.numbers]
        return self.g.choice(numeric) if self.intent == "consult" and numeric else ""

    def accepted(self, need: Need, pool: Container[int]) -> Need | None:
        """The acceptance rule; the target of a superlative is the best itself, if it belongs to the split."""
        matching, feasible = visible_rows(self.catalogue, need), feasible_rows(self.catalogue, need, need.hidden)
        if len(matching) < MIN_VISIBLE or not 1 <= len(feasible) <= len(matching) / 4:
            return None
        if not need.best:
            return need
        target = next((r for r in feasible.tolist() if r in pool), None)
        return None if target is None else msgspec.structs.replace(need, target=self.catalogue.ids[target])

    def named(self, need: Need, row: int) -> Need | None:
        """Compare: the target and three others that match what is said, of which only the target matches everything."""
        matching = visible_rows(self.catalogue, need)
        right = set(self.catalogue.within(matching, need.hidden).tolist())
        wrong = [int(r) for r in matching if int(r) not in right]
        if len(wrong) < 3:
            return None
        rows = [row, *self.g.sample(wrong, 3)]
        self.g.shuffle(rows)
        return msgspec.structs.replace(need, among=tuple(self.catalogue.ids[r] for r in rows))

    def second(self, first: Need) -> Need | None:
        """Another thing of another category, from any product: the split belongs to the first."""
        rows = self.catalogue.sold
        for _ in range(8):
            row = int(self.g.choice(rows))
            if self.catalogue.category(row) != first.category or not first.category:
                need = self.need(row, rows)
                if need is not None and need.target != first.target:
                    return need
        return None

    def purse(self, needs: tuple[Need, ...]) -> Purse | None:
        """A budget the targets meet, with a voucher in half the cases; one seller where the targets share it."""
        rows = [self.catalogue.row_of[n.target] for n in needs]
        price = self.catalogue.numbers["price"]
        total = float(price.values[rows].sum())
        if not np.isfinite(total):
            return None
        each = total / len(rows)
        sellers = self.catalogue.columns.get("seller")
        shared = isinstance(sellers, Choice) and bool(sellers.codes[rows[0]] == sellers.codes[rows[1]] >= 0)
        percent, threshold = 0, 0.0
        if self.g.random() < 0.5:
            percent, threshold = self.g.choice((10, 20)), float(price.edges[max(price.bucket(each) - 2, 0)])
        bare = Purse(items=len(rows), level=0.0, percent=percent, threshold=threshold, one_seller=shared)
        spent = bare.after_voucher(total) / len(rows)
        return msgspec.structs.replace(bare, level=float(price.edges[price.bucket(spent)]))

    def change(self, needs: tuple[Need, ...]) -> Change | None:
        """Another value for one hidden wish, from a product that still fits the rest (not where a budget or a list
        of four leaves no room)."""
        if self.intent in ("bundle", "compare"):
            return None
        at, need = 0, needs[0]
        old = self.g.choice(need.hidden)
        rest = [c for c in need.hidden if c is not old]
        wishes = {self.catalogue.columns[old.slot].wish(int(r)) for r in self.alternatives(need, rest)}
        news = sorted((w for w in wishes if w is not None and w.value != old.value), key=lambda w: str(w.value))
        if not news:
            return None
        wish = Constraint(old.slot, old.op, self.g.choice(news).value, old.weight)
        return Change(turn=self.g.randint(1, 3), need=at, wish=wish)

    def alternatives(self, need: Need, rest: list[Constraint]) -> Rows:
        return self.catalogue.within(visible_rows(self.catalogue, need), rest)


def _weighted(wish: Constraint, g: Random) -> Constraint:
    return Constraint(wish.slot, wish.op, wish.value, g.choice(WEIGHTS))


def visible_rows(catalogue: Catalogue, need: Need) -> Rows:
    """Rows in stock that match what is said at the start (V)."""
    if need.among:
        return np.array([catalogue.row_of[id] for id in need.among if id in catalogue.row_of], np.int64)
    return catalogue.within(catalogue.rows_of(need.category), (c for c in need.visible if c.slot != "category"))


def feasible_rows(catalogue: Catalogue, need: Need, wishes: tuple[Constraint, ...], rows: Rows | None = None) -> Rows:
    """Rows that match these wishes too, and are best where the user asks for the best (F for all hidden wishes)."""
    rows = catalogue.within(visible_rows(catalogue, need) if rows is None else rows, wishes)
    if need.best and len(rows):
        merit = catalogue.numbers[need.best].merit(rows)
        rows = rows[merit == merit.max()]
    return rows


def hidden_twin(catalogue: Catalogue, task: Task) -> Task:
    """The same task with other values behind the same hidden slots, read off another product that matches at first."""
    brief = brief_of(task, catalogue)
    needs = tuple(_other(catalogue, need, rng(task.seed, "twin", i)) for i, need in enumerate(brief.needs))
    change = brief.change
    if change is not None:
        swapped = next((c for c in needs[change.need].hidden if c.slot == change.wish.slot), change.wish)
        old = next(c for c in brief.needs[change.need].hidden if c.slot == change.wish.slot)
        change = msgspec.structs.replace(change, wish=old if swapped.value != old.value else change.wish)
    twin = msgspec.structs.replace(brief, needs=needs, change=change)
    return pack(twin, split=task.split, seed=task.seed)


def _other(catalogue: Catalogue, need: Need, g: Random) -> Need:
    """The need with the wishes of another row: of one that has a value in every hidden slot, if there is such a row."""
    rows = visible_rows(catalogue, need).tolist()
    g.shuffle(rows)
    best, most = need, 0
    for row in rows:
        found = {c.slot: w for c in need.hidden if (w := catalogue.columns[c.slot].wish(row)) is not None}
        hidden = tuple(Constraint(c.slot, c.op, found.get(c.slot, c).value, c.weight) for c in need.hidden)
        if len(found) > most and hidden != need.hidden:
            best, most = msgspec.structs.replace(need, target=catalogue.ids[row], hidden=hidden), len(found)
        if most == len(need.hidden):
            break
    return best
