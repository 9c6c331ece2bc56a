"""`check_policy`: what every policy must hold, in the company of one environment."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import msgspec
import numpy as np

from agentgym.env import Environment
from agentgym.errors import AgentGymError
from agentgym.policy import Policy, Scripted
from agentgym.registry import make
from agentgym.testing.drive import Cast, Trace, difference, drive, plain
from agentgym.testing.report import CheckFailed, CheckReport, Item, NotClaimed, describe, run_checks
from agentgym.testing.subject import Settings, Subject
from agentgym.types import Action, Episode, Task, TokenSpan, decode, encode

LEASES = 8


class Played(Subject):
    """A policy under test, and the environment it is tested in."""

    def __init__(self, policy: Policy, env: Environment, settings: Settings, deterministic: bool) -> None:
        super().__init__(env, settings)
        self.tested, self.deterministic = policy, deterministic

    async def episode(self, task: Task, seed: int | None = None) -> Trace:
        seed = self.seed if seed is None else seed
        return await drive(self.env, task, self.tested, seed=seed, steps=self.steps, patience=self.patience)

    async def baseline(self) -> list[Trace]:
        if not self.traces:
            self.traces = [await self.episode(task) for task in self.tasks()]
        return self.traces

    def claims_determinism(self) -> None:
        if not self.deterministic:
            raise NotClaimed("the policy does not say `deterministic = True`")


def check_policy(
    policy: Policy,
    env: Environment | str,
    *,
    episodes: int = 4,
    seed: int = 0,
    deterministic: bool | None = None,
    seconds: float = 60.0,
    patience: float = 20.0,
    steps: int = 32,
) -> CheckReport:
    """Test a policy against the contract of `Policy`, on the first tasks of an environment that itself is sound.

    `deterministic`: the same episode key gives the same actions; by default what the policy's attribute of that name
    says, and true for `Scripted`. `patience` is the deadline in seconds of one act, `seconds` the one of a whole check.
    """
    built = make(env) if isinstance(env, str) else env
    if deterministic is None:
        deterministic = bool(getattr(policy, "deterministic", isinstance(policy, Scripted)))
    settings = Settings(episodes=episodes, seed=seed, seconds=seconds, patience=patience, steps=steps)
    played = Played(policy, built, settings, deterministic)
    return run_checks(f"{type(policy).__name__} in {played.name}", played, ITEMS, seconds)


async def acts(p: Played) -> str:
    """It is a policy, and answers observations with actions that can be recorded."""
    if not isinstance(p.tested, Policy):
        raise CheckFailed(f"{type(p.tested).__name__} has no method session(episode, agent)")
    for trace in await p.baseline():
        for step, move in enumerate(trace.moves):
            for agent, action in move.actions.items():
                _recordable(action, f"task {trace.task.id}: step {step}: the action of {agent!r}")
    return f"{sum(len(t.moves) for t in p.traces)} actions in {len(p.traces)} episodes"


def _recordable(action: Action, where: str) -> None:
    if not isinstance(action, Action):
        raise CheckFailed(f"{where} is {type(action).__name__}, not an Action")
    try:
        decode(encode(action), Action)
    except (msgspec.ValidationError, TypeError, ValueError, OverflowError) as error:
        raise CheckFailed(f"{where} cannot be recorded: {describe(error)}") from error


async def same_key(p: Played) -> str:
    """The same episode key gives the same actions."""
    p.claims_determinism()
    for trace in await p.baseline():
        _alike(trace, await p.episode(trace.task), "played twice under one key, it acts differently")
    return f"{len(p.traces)} episodes twice the same"


async def independent(p: Played) -> str:
    """Sessions side by side act as each does alone; where that is not claimed they must at least all get through."""
    traces = await p.baseline()
    found = await asyncio.gather(*(p.episode(t.task) for t in traces))
    if p.deterministic:
        for alone, beside in zip(traces, found, strict=True):
            _alike(alone, beside, "beside other sessions it acts differently")
    return f"{len(found)} sessions side by side"


def _alike(one: Trace, other: Trace, what: str) -> None:
    """Equal actions, apart from what names a call rather than decides it."""
    for step, (a, b) in enumerate(zip(one.moves, other.moves, strict=False)):
        for agent in a.actions:
            apart = difference(_bare(a.actions[agent]), _bare(b.actions[agent]))
            if apart:
                raise CheckFailed(f"task {one.task.id}: {what}: at step {step}, {agent!r}, {apart}")
    if len(one.moves) != len(other.moves):
        raise CheckFailed(f"task {one.task.id}: {what}: {len(one.moves)} steps and {len(other.moves)}")


def _bare(action: Action) -> Any:
    span = None if action.span is None else TokenSpan(prompt=action.span.prompt, ids=action.span.ids)
    return plain(action.replace(span=span, logprob=None, value=None))


async def spans(p: Played) -> str:
    """Every token span is consistent in itself, and the first of an episode holds a prompt."""
    count = 0
    for trace in await p.baseline():
        for agent in {a for move in trace.moves for a in move.actions}:
            turns = [m.actions[agent].span for m in trace.moves if agent in m.actions]
            for step, span in enumerate(turns):
                if span is not None:
                    sound_span(span, f"task {trace.task.id}: turn {step} of {agent!r}", first=step == 0)
                    count += 1
    if not count:
        raise NotClaimed("no action carries a token span")
    return f"{count} spans"


def sound_span(span: TokenSpan, where: str, *, first: bool = False) -> None:
    """`CheckFailed` unless lengths, log-probs, version runs and segments of a span fit together."""
    total = len(span.ids)
    if first and not len(span.prompt):
        raise CheckFailed(f"{where}: the first span has an empty prompt")
    if len(span.logprobs) != total:
        raise CheckFailed(f"{where}: {total} sampled ids, but {len(span.logprobs)} log-probs")
    if len(span.sampled_logprobs) not in (0, total):
        raise CheckFailed(f"{where}: {total} sampled ids, but {len(span.sampled_logprobs)} sampled log-probs")
    for name, values in (("logprobs", span.logprobs), ("sampled_logprobs", span.sampled_logprobs)):
        bad = np.flatnonzero(~(np.isfinite(values.numpy()) & (values.numpy() <= 1e-5)))
        if bad.size:
            raise CheckFailed(f"{where}: {name}[{bad[0]}] = {values[int(bad[0])]} is not a finite number <= 0")
    if total and (min(span.ids) < 0 or (len(span.prompt) and min(span.prompt) < 0)):
        raise CheckFailed(f"{where}: a negative token id")
    starts = [run.start for run in span.versions]
    if total and (not starts or starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= total):
        raise CheckFailed(f"{where}: version runs start at {starts}; they must cover the {total} ids from 0 on")
    for segment in span.segments:
        if not 0 <= segment.start <= segment.stop <= total:
            raise CheckFailed(f"{where}: segment {segment.label!r} [{segment.start}, {segment.stop}) of {total} ids")


async def released(p: Played) -> str:
    """Leaving a session releases it, and so does cancelling whoever holds it, in the middle of an act too."""
    task, free = p.tasks()[0], getattr(p.tested, "free_slots", None)
    alive = [await _lease(p, task, n) for n in range(LEASES)]
    for number in range(LEASES):
        await _cancelled(p, task, number)
    gc.collect()
    kept = sum(ref is not None and ref() is not None for ref in alive)
    if kept > 1:
        raise CheckFailed(f"{kept} of {LEASES} sessions are still referenced after they were left")
    await _settled(p, free)
    _counted(p.tested, free)
    trace = await p.episode(task)
    if p.deterministic:
        _alike((await p.baseline())[0], trace, f"after {LEASES} cancelled sessions it acts differently")
    return f"{LEASES} sessions left and {LEASES} cancelled; it goes on as before"


async def _settled(p: Played, free: Any) -> None:
    """Wait, as long as patience lasts, for an engine that frees its slots behind our back."""
    for _ in range(int(100 * p.patience)):
        if not isinstance(free, int) or getattr(p.tested, "free_slots", free) >= free:
            return
        await asyncio.sleep(0.01)


def _counted(policy: Any, free: Any) -> None:
    """What the policy itself counts, where it does: `opened` and `closed` sessions, `free_slots`."""
    opened, closed, left = (getattr(policy, name, None) for name in ("opened", "closed", "free_slots"))
    if isinstance(opened, int) and opened != closed:
        raise CheckFailed(f"{opened} sessions were opened and {closed} closed")
    if isinstance(left, int) and left < free:
        raise CheckFailed(f"{free} slots were free, and {left} are after {LEASES} left and {LEASES} cancelled sessions")


async def _lease(p: Played, task: Task, number: int) -> weakref.ref[Any] | None:
    """Open a session, act once, leave it."""
    copy = p.env.spawn()
    try:
        seen = await copy.reset(task)
        async with Cast(p.tested, Episode(task=task, seed=p.seed, member=number), p.patience) as cast:
            await cast.act(seen, 0)
            session = next(iter(cast.sessions.values()))
    finally:
        await copy.close()
    del cast
    try:
        return weakref.ref(session)
    except TypeError:
        return None


async def _cancelled(p: Played, task: Task, number: int) -> None:
    """Cancel a session a few turns of the loop after it began to act."""
    job = asyncio.create_task(_lease(p, task, number))
    for _ in range(number + 1):
        await asyncio.sleep(0)
    job.cancel()
    try:
        async with asyncio.timeout(p.patience):
            await asyncio.gather(job, return_exceptions=True)
    except TimeoutError as error:
        raise CheckFailed(f"a cancelled session does not let go within {p.patience:g} s") from error


async def fresh(p: Played) -> str:
    """A fresh session knows nothing of others: its first action is the one it takes in an empty house."""
    p.claims_determinism()
    first = (await p.baseline())[0]
    for trace in p.traces[1:]:
        await p.episode(trace.task, seed=p.seed + 1)
    _alike(first, await p.episode(first.task), "after other episodes it acts differently")
    return f"unmoved by {len(p.traces) - 1} other episodes"


async def after_close(p: Played) -> str:
    """A session that was left refuses to act."""
    task = p.tasks()[0]
    copy = p.env.spawn()
    try:
        seen = await copy.reset(task)
        async with Cast(p.tested, Episode(task=task, seed=p.seed), p.patience) as cast:
            await cast.act(seen, 0)
            agent, session = next(iter(cast.sessions.items()))
        return await _refused(p, session.act(seen[agent]))
    finally:
        await copy.close()


async def _refused(p: Played, late: Any) -> str:
    try:
        async with asyncio.timeout(p.patience):
            await late
    except TimeoutError as error:
        raise CheckFailed(f"an act after the session was left takes longer than {p.patience:g} s") from error
    except (AgentGymError, RuntimeError) as error:
        return f"refused ({type(error).__name__})"
    except Exception as error:
        raise CheckFailed(f"an act after the session was left is not refused, it breaks: {describe(error)}") from error
    raise CheckFailed("an act after the session was left is answered as if nothing had happened")


async def closes(p: Played) -> str:
    """A policy that holds something of the event loop (`aclose`) lets go of it, and does not mind doing so twice."""
    if not hasattr(p.tested, "aclose"):
        raise NotClaimed("the policy has no method aclose()")
    for _ in range(2):
        await p.tested.aclose()
    return "closed twice"


ITEMS = (
    Item("acts", acts),
    Item("same_key", same_key, ("acts",)),
    Item("independent", independent, ("acts", "same_key")),
    Item("fresh", fresh, ("acts", "same_key")),
    Item("spans", spans, ("acts",)),
    Item("after_close", after_close, ("acts",)),
    Item("released", released, ("acts", "same_key")),
    Item("closes", closes),
)
