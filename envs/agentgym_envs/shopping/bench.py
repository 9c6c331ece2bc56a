"""`agentgym bench shopping`: what the environment costs, in CPU time, on a big synthetic catalogue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np

from agentgym.types import AGENT, Action, Episode, Task
from agentgym_envs.shopping.catalogue import Catalogue, Constraint
from agentgym_envs.shopping.config import config
from agentgym_envs.shopping.env import ShoppingEnv, World
from agentgym_envs.shopping.search import Index
from agentgym_envs.shopping.synthetic import synthetic

LADDER = ("never_ask", "ask_all", "oracle")


def shopping(
    products: int = 20_000, episodes: int = 300, searches: int = 1000, surface: str = "compact", seed: int = 0
) -> dict[str, Any]:
    """CPU milliseconds of load, reset, step and search (p50 and p99), and the peak memory of the process in MiB.

    Resets and steps are those of scripted episodes; the time of the policies themselves is left out. One thread.
    """
    before = _memory()
    start = time.process_time()
    catalogue = synthetic(products, seed)
    built = time.process_time()
    index = Index(catalogue, text=True)
    indexed = time.process_time()
    env = ShoppingEnv(World(config({"surface": surface, "size": products, "seed": seed}), catalogue, index))
    resets, steps = asyncio.run(_episodes(env, list(islice(env.tasks("test", seed), episodes))))
    return {
        "products": products,
        "surface": surface,
        "steps": len(steps),
        "catalogue_ms": round(1e3 * (built - start), 1),
        "index_ms": round(1e3 * (indexed - built), 1),
        "memory_mib": round(_memory(), 1),
        "memory_added_mib": round(_memory() - before, 1),
        "cpu_ms": [_row("reset", resets), _row("step", steps), *_searches(catalogue, index, searches)],
    }


def _memory() -> float:
    """Peak resident memory of this process, MiB (Linux counts in KiB); 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _row(what: str, seconds: list[float]) -> dict[str, Any]:
    p50, p99 = (1e3 * np.percentile(seconds, q) for q in (50, 99))
    return {"what": what, "count": len(seconds), "p50": round(float(p50), 4), "p99": round(float(p99), 4)}


async def _episodes(env: ShoppingEnv, tasks: list[Task]) -> tuple[list[float], list[float]]:
    """Every task under each of three policies; seconds of each reset and each step."""
    policies = env.ladder()
    resets: list[float] = []
    steps: list[float] = []
    for task in tasks:
        for name in LADDER:
            async with policies[name].session(Episode(task=task), AGENT) as session:
                start = time.process_time()
                seen = await env.reset(task)
                resets.append(time.process_time() - start)
                while seen:
                    action: Action = await session.act(seen[AGENT])
                    start = time.process_time()
                    result = await env.step({AGENT: action})
                    steps.append(time.process_time() - start)
                    seen = result.observations
    return resets, steps


def _searches(catalogue: Catalogue, index: Index, count: int) -> list[dict[str, Any]]:
    """Four title words; the same with a price filter; structured filters alone."""
    rows = np.random.default_rng(0).integers(0, len(catalogue), count)
    texts = [" ".join(catalogue.titles[row].split()[:4]) for row in rows]
    price = catalogue.numbers["price"].edges
    cheap = (Constraint("price", "max", float(price[len(price) // 2])),)
    kinds: list[tuple[str, Callable[[int], Any]]] = [
        ("search, 4 words", lambda i: index.search(texts[i])),
        ("search, 4 words and a price", lambda i: index.search(texts[i], cheap)),
        ("search, 3 filters", lambda i: index.search("", _filters(catalogue, int(rows[i])))),
    ]
    return [_row(name, [_timed(work, i) for i in range(count)]) for name, work in kinds]


def _filters(catalogue: Catalogue, row: int) -> tuple[Constraint, ...]:
    wishes = (catalogue.columns[name].wish(row) for name in ("category", "brand", "price"))
    return tuple(w for w in wishes if w is not None)


def _timed(work: Callable[[int], Any], i: int) -> float:
    start = time.process_time()
    work(i)
    return time.process_time() - start
