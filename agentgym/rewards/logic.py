"""Formulas of linear temporal logic over finite traces (LTLf): reading them, and pushing negation down to the atoms.

    !a  a & b  a | b  a -> b  a <-> b
    X a      strong next: there is a next step, and a holds there
    N a      weak next: a holds at the next step if there is one (also written WX)
    F a      some time from now on          G a      at every step from now on
    a U b    b some time, and a until then  a W b    the same, or a for ever
    a R b    b up to and including the first a, or for ever (a M b: and a has to come)

All pairs associate to the right. Binding, loosest first: <->, ->, |, &, the temporal pairs, what stands before one
formula. An atom is a word of letters, digits, "_" and "."; `true` and `false` are formulas.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import NamedTuple

from agentgym.errors import ConfigError

_TOKEN = re.compile(r"\s*(<->|->|&&?|\|\|?|[!()]|[A-Za-z_][\w.]*)")
_UNARY = {"!": "!", "X": "X", "N": "N", "WX": "N", "F": "F", "G": "G"}
_LEVELS = (("<->",), ("->",), ("|",), ("&",), ("U", "W", "R", "M"))
_RESERVED = {"X", "N", "WX", "F", "G", "U", "W", "R", "M"}


class Formula(NamedTuple):
    """A node: `op` is a word of the language above, "atom" (with `name`), "true" or "false"."""

    op: str
    parts: tuple[Formula, ...] = ()
    name: str = ""


TRUE, FALSE = Formula("true"), Formula("false")


def parse(text: str) -> Formula:
    """The formula of a text. Raises `ConfigError` that says where it breaks off."""
    return _Parser(text).whole()


class _Parser:
    """Recursive descent over the levels of binding."""

    def __init__(self, text: str) -> None:
        self.text, self.tokens, self.at = text, self._split(text), 0

    @staticmethod
    def _split(text: str) -> list[str]:
        found, at = [], 0
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if match is None:
                raise ConfigError(f"{text!r} is no formula: {text[at:].strip()[:20]!r} cannot be read")
            found.append({"&&": "&", "||": "|"}.get(match[1], match[1]))
            at = match.end()
        return found

    @property
    def next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1]

    def whole(self) -> Formula:
        found = self.pair(0)
        if self.next:
            raise self.broken("the end")
        return found

    def pair(self, level: int) -> Formula:
        """One level of binary operators; all of them may be read from the right."""
        if level == len(_LEVELS):
            return self.unary()
        left = self.pair(level + 1)
        if self.next not in _LEVELS[level]:
            return left
        return Formula(self.take(), (left, self.pair(level)))

    def unary(self) -> Formula:
        if self.next in _UNARY:
            return Formula(_UNARY[self.take()], (self.unary(),))
        if self.next == "(":
            self.take()
            inner = self.pair(0)
            if self.next != ")":
                raise self.broken("')'")
            self.take()
            return inner
        if not self.next or not re.match(r"[A-Za-z_]", self.next) or self.next in _RESERVED:
            raise self.broken("an atom, '!', a temporal operator or '('")
        word = self.take()
        return Formula(word) if word in ("true", "false") else Formula("atom", name=word)

    def broken(self, wanted: str) -> ConfigError:
        found = repr(self.next) if self.next else "nothing more"
        read = " ".join(self.tokens[: self.at])
        return ConfigError(f"{self.text!r} is no formula: {wanted} should come after {read!r}, and there is {found}")


def atoms(formula: Formula) -> frozenset[str]:
    """The names of the atoms."""
    if formula.op == "atom":
        return frozenset((formula.name,))
    return frozenset[str]().union(*map(atoms, formula.parts))


def holds(formula: Formula, letter: Collection[str]) -> bool:
    """Whether a formula without temporal operators is true where exactly these atoms are; `ConfigError` for others."""
    if formula.op in ("atom", "true", "false"):
        return formula.op == "true" or formula.name in letter
    if formula.op not in ("!", "&", "|", "->", "<->"):
        raise ConfigError(f"a guard speaks of one step only; {formula.op!r} is temporal")
    truth = [holds(part, letter) for part in formula.parts]
    if formula.op == "!":
        return not truth[0]
    a, b = truth
    return {"&": a and b, "|": a or b, "->": not a or b, "<->": a == b}[formula.op]


_DUAL = {"&": "|", "|": "&", "X": "N", "N": "X", "U": "R", "R": "U", "true": "false", "false": "true"}


def normal(formula: Formula, positive: bool = True) -> Formula:
    """The same in atoms, negated atoms ("!"), true, false, &, |, X, N, U and R; its negation unless `positive`."""
    op, parts = formula.op, formula.parts
    if op == "!":
        return normal(parts[0], not positive)
    if op == "atom":
        return formula if positive else Formula("!", (formula,))
    if op in _SHORT:
        return normal(_SHORT[op](*parts), positive)
    return Formula(op if positive else _DUAL[op], tuple(normal(part, positive) for part in parts))


def _equal(a: Formula, b: Formula) -> Formula:
    return Formula("&", (Formula("->", (a, b)), Formula("->", (b, a))))


_SHORT: dict[str, Callable[..., Formula]] = {
    "->": lambda a, b: Formula("|", (Formula("!", (a,)), b)),
    "<->": _equal,
    "F": lambda a: Formula("U", (TRUE, a)),
    "G": lambda a: Formula("R", (FALSE, a)),
    "W": lambda a, b: Formula("R", (b, Formula("|", (a, b)))),
    "M": lambda a, b: Formula("U", (b, Formula("&", (a, b)))),
}
