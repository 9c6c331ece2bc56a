"""Simulated parts: keyed latencies, slots, versions in mid-reply; the benchmark on them, beside what must hold."""

from __future__ import annotations

import asyncio
import time
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import Fault, UnknownName
from agentgym.rollout import Runner, episodes
from agentgym.testing import check_policy
from agentgym.testing.fakes import CountingEnv, constant, pareto
from agentgym.types import AGENT, Episode, Task, VersionRun, WeightsVersion, say
from agentgym_trainers.overlap import Case, bound, floor, overlap, run
from agentgym_trainers.rollouts import Unit
from agentgym_trainers.simulated import SimulatedEngine, SimulatedLearner, SimulatedPlayer

EPISODE = Episode(task=Task(env="counting-v0"))


def test_the_engine_is_a_policy() -> None:
    check_policy(SimulatedEngine(0.0, slots=4), CountingEnv()).raise_for_failures()


async def test_slots_are_what_is_sampled_at_once() -> None:
    engine = SimulatedEngine(0.1, slots=2)
    playing = asyncio.ensure_future(Runner(CountingEnv(1), engine).collect(islice(episodes(CountingEnv(1).tasks()), 5)))
    await asyncio.sleep(0.03)
    load = engine.load()
    assert (load.running, load.waiting, load.slots, load.full) == (2, 3, 2, True)
    assert len(await playing) == 5
    assert engine.load().running == 0


async def test_a_publish_in_mid_reply_is_in_the_span() -> None:
    engine = SimulatedEngine(0.1, tokens=100, slots=1)
    async with engine.session(EPISODE, AGENT) as session:
        reply = asyncio.ensure_future(session.act(say("go")))
        await asyncio.sleep(0.05)
        await engine.publish(WeightsVersion(number=3))
        first, after = (await reply).span, (await session.act(say("on"))).span
    assert first is not None
    assert after is not None
    assert [r.version for r in first.versions] == [0, 3]
    assert 20 <= first.versions[1].start <= 80
    assert after.versions == (VersionRun(start=0, version=3),)


def _unit(number: int, version: int = 0) -> Unit:
    return Unit(number=number, version=version, tasks=(EPISODE.task,), step=0)


async def test_units_last_what_was_drawn_and_hold_real_records() -> None:
    player = SimulatedPlayer(pareto(0.01), group=4, tokens=7, failed={1}, raises={2})
    assert player.seconds(5) == SimulatedPlayer(pareto(0.01), group=4).seconds(5) != player.seconds(6)
    began = time.perf_counter()
    played = await player.play(_unit(5, version=3))
    assert time.perf_counter() - began >= player.seconds(5)
    assert played.oldest(9) == 3
    assert [s.value for s in played.handed] == [4.0] * 4
    assert [s.reward for s in (await player.play(_unit(1))).handed] == [None] * 4
    with pytest.raises(Fault, match="unit 2"):
        await player.play(_unit(2))
    assert player.running == 0


@pytest.mark.parametrize("busy", [False, True])
async def test_a_learner_leaves_the_loop_alone(busy: bool) -> None:
    learner = SimulatedLearner(0.1, busy=busy)
    began, ticks = time.perf_counter(), 0
    step = asyncio.ensure_future(learner.learn(0))
    while not step.done():
        await asyncio.sleep(0.005)
        ticks += 1
    assert time.perf_counter() - began >= 0.1
    assert ticks > 3


# --- bench async ------------------------------------------------------------------------------------------------


def test_the_bound_by_hand() -> None:
    """Units of 1 s, one at a time, steps of 1 s: in turns that is 2 s an update, side by side 1 s and one to fill."""
    cases = [Case(updates=5, batch=1, places=1, max_staleness=n) for n in (0, 1)]
    assert [bound(case, lambda n: 1.0, lambda n: 1.0) for case in cases] == [10.0, 6.0]
    assert floor(cases[0], lambda n: 1.0, lambda n: 1.0) == 5.0


@given(batch=st.integers(1, 5), places=st.integers(1, 9), seed=st.integers(0, 99))
def test_more_staleness_never_takes_less_than_the_floor(batch: int, places: int, seed: int) -> None:
    player, learner = SimulatedPlayer(pareto(1.0), group=2, seed=seed), SimulatedLearner(constant(1.5))
    cases = [Case(updates=20, batch=batch, places=places, max_staleness=n) for n in (0, 2)]
    synchronous, asynchronous = (bound(case, player.seconds, learner.seconds) for case in cases)
    assert floor(cases[0], player.seconds, learner.seconds) - 1e-9 <= asynchronous <= synchronous + 1e-9


def test_the_real_pipeline_keeps_close_to_the_bound() -> None:
    case = Case(updates=12, batch=4, places=6, max_staleness=2)
    player, learner = SimulatedPlayer(pareto(0.02), group=2), SimulatedLearner(0.02)
    found = run(case, player, learner)
    least = bound(case, player.seconds, learner.seconds)
    assert least <= found.seconds < 3 * least
    assert 1 <= found.staleness <= 2
    assert found.counts["taken"] == 48 == found.counts["begun"]
    assert found.counts["dropped"] == found.counts["cancelled"] == 0


def test_the_benchmark_reports() -> None:
    figures = overlap(updates=4, batch=2, group=2, places=3, scale=0.1, staleness=(1,), repeats=1)
    assert [r["max_staleness"] for r in figures["by max_staleness"]] == [0, 1]
    assert [r["dropped"] for r in figures["by max_staleness"]] == [0, 0]
    assert figures["by max_staleness"][0]["speed-up"] == "1.00 (1.00 - 1.00)"
    with pytest.raises(UnknownName, match="lognormal"):
        overlap(latency="lognorm")
