"""What is linear in its parts: every term keeps exactly its own share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from agentgym.errors import ConfigError
from agentgym.rewards.nodes import Builder, Node, Op, Table, finite, times


def _weighted_sum(b: Builder, d: Table, slope: float | None) -> Node:
    """bias + sum of weight x term + further parts."""
    bias = finite(d.get("bias", 0.0), "'bias'")
    of = d.get("of", {})
    if not isinstance(of, Mapping) or not (of or d.get("plus")):
        raise ConfigError(f"'of' of a weighted_sum is a table of name = weight; got {of!r:.80}")
    parts: list[tuple[float, Node]] = []
    for name, weight in of.items():
        if isinstance(weight, Mapping):
            parts.append((1.0, b.node(weight, slope)))
        else:
            w = finite(weight, f"the weight of {name!r}")
            parts.append((w, b.leaf(name, 0.0, times(slope, w))))
    parts += [(1.0, b.node(more, slope)) for more in d.get("plus", ())]
    return lambda view: bias + sum(w * part(view) for w, part in parts)


def _scale(b: Builder, d: Table, slope: float | None) -> Node:
    """offset + factor x part."""
    factor, offset = finite(d["factor"], "'factor'"), finite(d.get("offset", 0.0), "'offset'")
    part = b.node(d["of"], times(slope, factor))
    return lambda view: offset + factor * part(view)


def _relative_to_baseline(b: Builder, d: Table, slope: float | None) -> Node:
    """part - baseline: Retroformer's return of the next trial minus that of this one (2308.02151)."""
    part, baseline = b.node(d["of"], slope), b.node(d["baseline"], times(slope, -1.0))
    return lambda view: part(view) - baseline(view)


def _potential(b: Builder, d: Table, slope: float | None) -> Node:
    """Sum over turns of gamma Phi_(t+1) - Phi_t, from the terms `name.after` and `name.before`."""
    gamma = finite(d["gamma"], "'gamma'")
    before = b.leaf(f"{d['name']}.before", 0.0, times(slope, -1.0))
    after = b.leaf(f"{d['name']}.after", 0.0, times(slope, gamma))
    return lambda view: gamma * after(view) - before(view)


class Constraint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `lagrangian` holds below its target: `cost` (a term or a table; None: the term of the constraint's name).

    `agentgym.rewards.Dual` moves the multiplier: clip(multiplier + lr (mean cost - target), 0, max).
    """

    multiplier: float
    target: float = 0.0
    cost: Any = None
    lr: float = 0.1
    max: float = 5.0

    def __post_init__(self) -> None:
        for name in ("multiplier", "target", "lr", "max"):
            finite(getattr(self, name), f"{name!r} of a constraint")
        if not 0.0 <= self.multiplier <= self.max:
            raise ConfigError(f"a multiplier lies between 0 and max = {self.max}; got {self.multiplier}")


def constraints(declared: Table) -> dict[str, Constraint]:
    """The constraints of a `lagrangian` table by name."""
    found = declared["constraints"]
    if not isinstance(found, Mapping) or not found:
        raise ConfigError(f"'constraints' of a lagrangian is a table of name = {{multiplier, ...}}; got {found!r:.80}")
    try:
        return {name: msgspec.convert(table, Constraint) for name, table in found.items()}
    except msgspec.ValidationError as error:
        raise ConfigError(f"a constraint of a lagrangian: {error}; got {dict(found)!r:.120}") from error


def _lagrangian(b: Builder, d: Table, slope: float | None) -> Node:
    """utility - sum of multiplier x (cost - target)."""
    utility = b.node(d["of"], slope)
    parts = [
        (c.multiplier, c.target, b.node(name if c.cost is None else c.cost, times(slope, -c.multiplier)))
        for name, c in constraints(d).items()
    ]
    return lambda view: utility(view) - sum(m * (cost(view) - target) for m, target, cost in parts)


OPS = {
    "sum": Op(None),  # the whole ledger, without potentials and what the trainer derived
    "term": Op(None, ("name",), ("default",)),
    "weighted_sum": Op(_weighted_sum, (), ("of", "bias", "plus")),
    "scale": Op(_scale, ("of", "factor"), ("offset",)),
    "relative_to_baseline": Op(_relative_to_baseline, ("of", "baseline")),
    "potential": Op(_potential, ("name", "gamma")),
    "lagrangian": Op(_lagrangian, ("of", "constraints")),
}
