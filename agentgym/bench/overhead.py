"""What the runner costs: `agentgym bench overhead [--json] [--set out=FILE.md]`, five minutes where all is installed.

Three questions, each beside a bare asyncio loop in the same run, so that a loaded machine shifts both:

1. CPU microseconds per turn above the bare loop, with an instant policy and everything recorded.
2. How long the event loop is held with 16,000 episodes and latencies of seconds with a heavy tail.
3. Wall time against the list schedule of the very latencies drawn: no lockstep means close to 100 %.

The bare loop is `n` coroutines that sleep and pass strings of the same length; it knows no records, environments,
deadlines or files. Everything else runs with real ones: 30 sampled ids and log-probs a turn, reward terms, both
deadlines armed, every trajectory appended to a run folder as it ends.

Two more tables stand beside other frameworks that are installed: on text alone, and with the policy behind HTTP.
"""

from __future__ import annotations

import asyncio
import heapq
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time
from typing import Any

import numpy as np

from agentgym.bench.endpoint import ENDPOINT_PEERS
from agentgym.bench.measure import cost, machine, markdown, spread
from agentgym.bench.peers import OBSERVATION, PEERS, Peer
from agentgym.bench.stub import REPLY
from agentgym.rollout import Limits, Runner, episodes
from agentgym.store import RunFolder
from agentgym.testing.fakes import LATENCIES, CountingEnv, SimulatedPolicy
from agentgym.types import AGENT, Episode

TURNS = 8
INSTANT = ((64, 3000), (256, 3000), (1024, 4000))
"""(episodes at once, episodes) with an instant policy."""
SCHEDULES = ((256, 0.02, 16), (1024, 0.2, 3))
"""(episodes at once, mean latency in seconds, episodes per slot)."""


def overhead(
    seed: int = 0, repeats: int = 3, out: str = "", peers: bool = True, seconds: float = 12.0
) -> dict[str, Any]:
    """All tables. `seconds` is how long each loop-lag run lasts; `out` also writes them as Markdown."""
    figures = {
        "machine": machine(("msgspec", "numpy", *PEERS, "aiohttp", "verifiers")),
        "reading": "median (lowest - highest) of the repeats; a load above the number of cores slows the wall clock of "
        "every row, the bare ones least, and CPU time by shared caches",
        "settings": {"seed": seed, "repeats": repeats, "turns an episode": TURNS, "tokens a turn": 30},
        "cpu a turn, instant policy": [instant(n, count, repeats, seed) for n, count in INSTANT],
        "loop lag, 16,000 at once": lags(16_000, seconds, seed),
        "list schedule": [schedule(n, mean, rounds, repeats, seed) for n, mean, rounds in SCHEDULES],
    }
    if peers:
        figures["beside others, text only, instant policy"] = peer_rows(PEERS, repeats)
        figures["beside others, the policy behind a loopback endpoint"] = peer_rows(ENDPOINT_PEERS, repeats)
    if out:
        Path(out).write_text(markdown("What the runner costs", figures), encoding="utf-8")
    return figures


# --- the two loops ----------------------------------------------------------------------------------------------


async def bare(n: int, asked: Iterable[Episode], delay: Callable[..., float]) -> None:
    """`n` coroutines, each one episode after the other: sleep, take a reply, make an observation."""
    source = iter(asked)

    async def play() -> None:
        for episode in source:
            seen = OBSERVATION
            for turn in range(TURNS):
                await asyncio.sleep(delay(episode, turn=turn))
                seen = seen[:110] + REPLY

    await asyncio.gather(*(play() for _ in range(n)))


async def full(n: int, asked: Iterable[Episode], policy: SimulatedPolicy) -> None:
    """The runner with everything on, shards written to a temporary folder."""
    limits = Limits(turn_seconds=120, episode_seconds=1200, max_turns=2 * TURNS)
    runner = Runner(CountingEnv(TURNS), policy, concurrency=n, limits=limits)
    with (
        tempfile.TemporaryDirectory() as folder,
        RunFolder.create(Path(folder) / "run", {"bench": "overhead"}) as store,
    ):
        async with aclosing(runner.run(asked)) as stream:
            async for trajectory in stream:
                store.append(trajectory)


def drawn(count: int, seed: int) -> list[Episode]:
    return list(islice(episodes(CountingEnv(TURNS).tasks(seed=seed), 8, seed), count))


# --- 1: CPU -----------------------------------------------------------------------------------------------------


def instant(n: int, count: int, repeats: int, seed: int = 0) -> dict[str, Any]:
    """One row; the two loops take turns, so that what else the machine does meets both."""
    asked, policy = drawn(count, seed), SimulatedPolicy(0.0, seed=seed)
    pairs = [
        (cost(lambda: bare(n, asked, lambda episode, turn: 0.0)), cost(lambda: full(n, asked, policy)))
        for _ in range(repeats)
    ]
    scale = 1e6 / (count * TURNS)
    return {
        "at once": n,
        "turns": count * TURNS,
        "bare us": spread([b.cpu * scale for b, _ in pairs]),
        "agentgym us": spread([f.cpu * scale for _, f in pairs]),
        "above bare us": spread([(f.cpu - b.cpu) * scale for b, f in pairs]),
        "turns/s": round(median(count * TURNS / f.wall for _, f in pairs)),
    }


# --- 2: loop lag ------------------------------------------------------------------------------------------------


def lags(n: int, seconds: float, seed: int) -> list[dict[str, Any]]:
    """Latencies of 2 s in the mean with a heavy tail, from a cold start; cut off after `seconds`."""
    asked, rows = drawn(n, seed) * 9, []
    for name in ("lognormal", "pareto"):
        policy = SimulatedPolicy(LATENCIES[name](2.0), seed=seed)
        loops = {
            "bare": partial(bare, n, asked, partial(policy.delay, agent=AGENT)),
            "agentgym": partial(full, n, asked, policy),
        }
        rows += [
            {"latency": f"{name}, mean 2 s", "loop": what, **asyncio.run(lag(loops[what], seconds))} for what in loops
        ]
    return rows


async def lag(work: Callable[[], Any], seconds: float, tick: float = 0.005) -> dict[str, float]:
    """Milliseconds by which a 5 ms sleep comes late while `work` runs on the same loop.

    "p99 cpu ms" is what this thread computed between two ticks: on a machine that others use too it shows how long
    the loop was held by the work itself, and not by waiting for a processor.
    """
    late, held = [], []
    task = asyncio.ensure_future(work())
    end = perf_counter() + seconds
    while (before := perf_counter()) < end and not task.done():
        cpu = thread_time()
        await asyncio.sleep(tick)
        late.append(perf_counter() - before - tick)
        held.append(thread_time() - cpu)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    p50, p99, most = _milliseconds(late, 50, 99, 100)
    (cpu_p99,) = _milliseconds(held, 99)
    busy = round(100 * sum(held) / seconds)
    return {"p50 ms": p50, "p99 ms": p99, "max ms": most, "p99 cpu ms": cpu_p99, "cpu %": busy, "samples": len(late)}


def _milliseconds(seconds: Sequence[float], *percentiles: int) -> list[float]:
    return [round(float(p), 1) for p in np.percentile(np.array(seconds) * 1e3, percentiles)]


# --- 3: list schedule -------------------------------------------------------------------------------------------


def makespan(durations: Sequence[float], n: int) -> float:
    """Seconds of the list schedule: each job in order goes to the slot that is free first (Graham 1966)."""
    free = [0.0] * n
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def schedule(n: int, mean: float, rounds: int, repeats: int, seed: int = 0, name: str = "lognormal") -> dict[str, Any]:
    """One row: the list-schedule makespan of the drawn latencies as a share of the wall time they took."""
    asked, policy = drawn(n * rounds, seed), SimulatedPolicy(LATENCIES[name](mean), seed=seed)
    ideal = makespan([sum(policy.delay(e, AGENT, t) for t in range(TURNS)) for e in asked], n)
    pairs = [
        (cost(lambda: bare(n, asked, partial(policy.delay, agent=AGENT))), cost(lambda: full(n, asked, policy)))
        for _ in range(repeats)
    ]
    scale = 1e6 / (len(asked) * TURNS)
    return {
        "at once": n,
        "latency": f"{name}, mean {mean * 1e3:g} ms",
        "ideal s": round(ideal, 2),
        "bare %": spread([100 * ideal / b.wall for b, _ in pairs]),
        "agentgym %": spread([100 * ideal / f.wall for _, f in pairs]),
        "above bare us": spread([(f.cpu - b.cpu) * scale for b, f in pairs]),
    }


# --- others -----------------------------------------------------------------------------------------------------


def peer_rows(peers: Mapping[str, Peer], repeats: int) -> list[dict[str, Any]]:
    """The same episodes through other frameworks' own loops; one that is not installed has a row that says so."""
    return [row for name, peer in peers.items() for row in _measured(name, peer, repeats)]


def _measured(name: str, peer: Peer, repeats: int) -> list[dict[str, Any]]:
    try:
        peer.run(1, 1, TURNS)  # what is imported or compiled late is nobody's turn
    except ImportError as error:
        return [_row(name, "-", "not installed", "-", f"{error.name or error}")]
    rows = []
    for n in peer.at_once:
        costs = [peer.run(n, peer.rounds, TURNS) for _ in range(repeats)]
        turns = n * peer.rounds * TURNS
        rate = round(median(turns / c.wall for c in costs))
        rows.append(_row(name, n, spread([c.cpu * 1e6 / turns for c in costs]), rate, peer.unlike))
    return rows


def _row(name: str, n: int | str, cpu: str, rate: int | str, unlike: str) -> dict[str, Any]:
    return {"framework": name, "at once": n, "cpu us a turn": cpu, "turns/s": rate, "not alike": unlike}
