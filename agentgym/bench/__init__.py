"""Benchmarks of the core. `agentgym bench` lists every room's; each is a function from keyword settings to figures.

A room adds its own through the entry point group `agentgym.benches`: a list of `Spec` whose target is a function that
returns a mapping of figures (values, mappings, or lists of rows that are mappings with the same keys).
"""

from __future__ import annotations

from agentgym.registry import Spec

BENCHES = [
    Spec(
        id="overhead",
        target="agentgym.bench.overhead:overhead",
        summary="what a turn costs above a bare asyncio loop, loop lag, and how full the slots are",
    ),
]
