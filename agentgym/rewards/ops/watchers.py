"""Objectives over the whole episode inside a declaration: `of` may read the terms that a monitor or machine makes."""

from __future__ import annotations

from agentgym.rewards.monitors import MachineJudge, Monitor
from agentgym.rewards.nodes import Builder, Node, Op, Table


def _monitor(b: Builder, d: Table, slope: float | None) -> Node:
    """`of` (default NAME.accepted) with the terms of a formula over labels of turns in the ledger (2310.11840)."""
    watching = Monitor(d["name"], d["formula"], d["labels"])
    b.watchers.append(watching)
    return b.node(d.get("of", watching.names[0]), slope)


def _machine(b: Builder, d: Table, slope: float | None) -> Node:
    """`of` (default NAME) with the term of a reward machine over labels of turns in the ledger (2310.11840)."""
    machine = {key: d[key] for key in ("start", "edges", "terminal") if key in d}
    b.watchers.append(MachineJudge(d["name"], machine, d["labels"]))
    return b.node(d.get("of", d["name"]), slope)


OPS = {
    "monitor": Op(_monitor, ("name", "formula", "labels"), ("of",)),
    "machine": Op(_machine, ("name", "start", "edges", "labels"), ("terminal", "of")),
}
