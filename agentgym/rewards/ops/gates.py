"""A condition decides which part counts. The first term that fails it is charged for the difference."""

from __future__ import annotations

from agentgym.errors import ConfigError
from agentgym.rewards.nodes import Builder, Node, Op, Table, children, finite


def _gate(b: Builder, d: Table, slope: float | None) -> Node:
    """`then` where the term `when` is at_least (or at_most) the bound, else `otherwise`."""
    if ("at_least" in d) == ("at_most" in d):
        raise ConfigError("a gate needs 'at_least' or 'at_most', and not both")
    sign = 1.0 if "at_least" in d else -1.0
    bound = sign * finite(d["at_least" if sign > 0 else "at_most"], "the bound of a gate")
    when = b.condition(d["when"], "when", sign)
    then, otherwise = b.node(d["then"], slope), b.node(d["otherwise"], slope)
    return lambda view: then(view) if sign * when(view) >= bound else otherwise(view)


def _all_of(b: Builder, d: Table, slope: float | None) -> Node:
    """`then` where every term of `when` is at_least the bound (1), else `otherwise`: CGPO's feasible set (2409.20370).
    A judge that a task does not ask is {op = "term", name = ..., default = 1}."""
    bound = finite(d.get("at_least", 1.0), "'at_least'")
    when = [b.condition(part, "when") for part in children(d, "when")]
    then, otherwise = b.node(d["then"], slope), b.node(d["otherwise"], slope)
    return lambda view: then(view) if all(part(view) >= bound for part in when) else otherwise(view)


OPS = {
    "gate": Op(_gate, ("when", "then", "otherwise"), ("at_least", "at_most")),
    "all_of": Op(_all_of, ("when", "then", "otherwise"), ("at_least",)),
}
