"""What an environment claims beyond the contract: replay, fork, ladder, hidden_twin, hints, answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, stdev

from agentgym.env import Environment
from agentgym.errors import ConfigError
from agentgym.policy import Policy, Scripted
from agentgym.rewards import composer
from agentgym.testing.actions import RandomActions
from agentgym.testing.drive import (
    Cast,
    Trace,
    advance,
    begin,
    difference,
    drive,
    follow,
    over,
    plain,
    rerun,
    same,
    within,
)
from agentgym.testing.report import CheckFailed, NotClaimed
from agentgym.testing.subject import Budget, Subject
from agentgym.types import Action, Episode, Task, ToolCall, decode, encode

LADDER_TASKS = (32, 64, 128, 256)
ANCHORS = ("random", "oracle")
HINT_LEVELS = 4
"""Levels asked for: more than most environments have, as a strategy may ask for more."""


# --- replay -----------------------------------------------------------------------------------------------------


async def replay(subject: Subject) -> str:
    """The recorded actions, read back from their encoded form, give the same observations, rewards and metrics."""
    subject.require("replay")
    for trace in await subject.baseline():
        read = decode(encode(trace), Trace)
        again = await rerun(subject.env, read.task, [m.actions for m in read.moves], subject.patience)
        same(read, again, "the recorded actions give another episode")
    return f"{len(subject.traces)} episodes re-executed from their records"


# --- fork -------------------------------------------------------------------------------------------------------


async def fork(subject: Subject) -> str:
    """A fork continues like the original under the same actions, and what it does otherwise stays its own."""
    subject.require("fork")
    points = 0
    for trace in await subject.baseline():
        for at in sorted({0, len(trace.moves) // 2, max(0, len(trace.moves) - 1)}):
            await _fork_at(subject, trace, at)
            points += 1
    return f"forked at {points} points of {len(subject.traces)} episodes"


async def _fork_at(subject: Subject, trace: Trace, at: int) -> None:
    """Fork after `at` steps: one twin goes astray and is closed, then original and other twin both finish the trace."""
    patience = subject.patience
    original = subject.env.spawn()
    open_ = [original]
    try:
        await begin(original, trace.task, patience)
        await follow(original, [m.actions for m in trace.moves[:at]], patience)
        astray, twin = original.fork(), original.fork()
        open_ += [astray, twin]
        await _stray(subject, astray, trace, at)
        await within(astray.close(), patience, "closing a fork")
        for who, copy in (("the original, after its fork went another way,", original), ("the fork", twin)):
            moves = await follow(copy, [m.actions for m in trace.moves[at:]], patience, start=at)
            found = trace.replace(moves=(*trace.moves[:at], *moves))
            same(trace, found, f"forked after {at} steps, {who} continues differently")
    finally:
        for copy in open_:
            await within(copy.close(), patience, "close")


async def _stray(subject: Subject, copy: Environment, trace: Trace, at: int) -> None:
    """Up to five random steps of another seed."""
    seen = trace.observations[at]
    wanderer = RandomActions(subject.env, subject.seed + 1)
    async with Cast(wanderer, Episode(task=trace.task, seed=subject.seed + 1), subject.patience) as cast:
        for step in range(at, at + 5):
            move = await advance(copy, await cast.act(seen, step), step, subject.patience)
            seen = move.result.observations
            if over(move.result) or not seen:
                return


# --- ladder -----------------------------------------------------------------------------------------------------


async def ladder(subject: Subject) -> str:
    """The rungs are in order and random is below oracle, by paired 95 % intervals over the same tasks.

    A rung may tie with the one before; it fails when it is surely worse. Random below oracle must be sure.
    """
    subject.require("ladder")
    policies = subject.env.ladder()
    missing = [name for name in ANCHORS if name not in policies]
    if missing:
        raise CheckFailed(f"the ladder has no rung {missing[0]!r}; its rungs are {', '.join(policies) or 'none'}")
    returns: dict[str, list[float]] = {name: [] for name in policies}
    budget = Budget(subject.seconds / 2)
    for count in LADDER_TASKS:
        await _extend(subject, policies, returns, count)
        low, _ = paired_interval(returns["random"], returns["oracle"])
        if low > 0 or not budget:
            break
    _ordered(returns)
    means = ", ".join(f"{name} {fmean(found):.3g}" for name, found in returns.items())
    return f"{means} over {len(returns['oracle'])} tasks; oracle - random at least {low:.3g}"


async def _extend(subject: Subject, policies: dict[str, Policy], returns: dict[str, list[float]], count: int) -> None:
    """Play the tasks up to number `count` that are not in `returns` yet, with every rung."""
    compose = composer(subject.env.reward).compose
    for task in subject.tasks(count)[len(returns["oracle"]) :]:
        for name, policy in policies.items():
            try:
                trace = await drive(
                    subject.env, task, policy, seed=subject.seed, steps=4 * subject.steps, patience=subject.patience
                )
            except CheckFailed as error:
                raise CheckFailed(f"rung {name!r}, task {task.id}: {error}") from error
            returns[name].append(compose(trace.ledger).value)


def _ordered(returns: dict[str, list[float]]) -> None:
    names = list(returns)
    for worse, better in pairwise(names):
        low, high = paired_interval(returns[worse], returns[better])
        if high < 0:
            raise CheckFailed(
                f"rung {better!r} stands above {worse!r} but returns less: {fmean(returns[better]):.4g} against "
                f"{fmean(returns[worse]):.4g}, paired 95 % interval of the difference [{low:.3g}, {high:.3g}]"
            )
    low, high = paired_interval(returns["random"], returns["oracle"])
    if low <= 0:
        raise CheckFailed(
            f"oracle is not surely better than random over {len(returns['oracle'])} tasks: paired 95 % interval of the "
            f"difference [{low:.3g}, {high:.3g}]"
        )


def paired_interval(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The 95 % t-interval of the mean of other - one, pair by pair."""
    apart = [b - a for a, b in zip(one, other, strict=True)]
    n = len(apart)
    if n < 2:
        return -math.inf, math.inf
    half = t_quantile(n - 1) * stdev(apart) / math.sqrt(n)
    return fmean(apart) - half, fmean(apart) + half


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t by its expansion at the normal (Abramowitz & Stegun 26.7.5); 1 % at 3."""
    z, v = 1.959964, freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


# --- hidden twin ------------------------------------------------------------------------------------------------


def _always(action: Action) -> Scripted:
    return Scripted(lambda episode, agent: lambda seen: action)


BLANK = {
    "silence": _always(Action()),
    "nonsense": _always(Action(text="mmh")),
    "calls of no tool": _always(Action(tool_calls=(ToolCall(name="no_such_tool"),))),
}
"""Policies that ask nothing, so nothing hidden may reach them."""


async def hidden_twin(subject: Subject) -> str:
    """A task and its twin differ in what is hidden, and whoever asks nothing sees the same of both."""
    subject.require("hidden_twin")
    tasks = subject.tasks()
    seen, twins = 0, 0
    for task in tasks:
        try:
            twin = subject.env.hidden_twin(task)
        except ConfigError as error:
            raise NotClaimed(str(error)) from error
        _differs(task, twin)
        twins += 1
        for name, policy in BLANK.items():
            seen += await _indistinct(subject, task, twin, name, policy)
    return f"{twins} twins, {seen} answers alike while nothing is asked"


def _differs(task: Task, twin: Task) -> None:
    if twin.env != task.env:
        raise CheckFailed(f"the twin of task {task.id} belongs to {twin.env!r}")
    if twin.id == task.id:
        raise CheckFailed(f"the twin of task {task.id} is the task itself")


async def _indistinct(subject: Subject, task: Task, twin: Task, name: str, policy: Policy) -> int:
    """The number of equal observations; rewards may differ, as only the learner sees them."""
    one, other = await subject.play(task, policy), await subject.play(twin, policy)
    for step, (a, b) in enumerate(zip(one.observations, other.observations, strict=False)):
        for agent in a:
            apart = difference(plain(a[agent]), plain(b[agent])) if agent in b else f"only one of them acts: {agent!r}"
            if apart:
                when = "the first observation" if not step else f"the answer to step {step - 1}"
                raise CheckFailed(f"task {task.id}: under {name}, {when} tells the twin apart: {apart}")
    return len(one.observations)


# --- hints ------------------------------------------------------------------------------------------------------


async def hints(subject: Subject) -> str:
    """Every level of every task has words, always the same, and the same for the hidden twin: they reveal nothing."""
    subject.require("hints")
    env = subject.env
    found: set[str] = set()
    twins = "hidden_twin" in env.capabilities
    for task in subject.tasks():
        for level in range(1, HINT_LEVELS + 1):
            hint = env.hint(task, level)
            where = f"task {task.id}: the hint of level {level}"
            if not isinstance(hint, str) or not hint.strip():
                raise CheckFailed(f"{where} is {hint!r}; a hint is a text that says something")
            if hint != env.hint(task, level):
                raise CheckFailed(f"{where} is another when asked for again")
            if twins and hint != env.hint(env.hidden_twin(task), level):
                raise CheckFailed(f"{where} tells the task from its hidden twin, so it gives away what is hidden")
            found.add(hint)
    return f"{len(found)} different hints" + (", none of which tells a task from its hidden twin" if twins else "")


# --- answer -----------------------------------------------------------------------------------------------------


async def answer(subject: Subject) -> str:
    """The answer of every task has words, always the same, and others for the hidden twin."""
    subject.require("answer")
    env = subject.env
    twins = "hidden_twin" in env.capabilities
    found = set()
    for task in subject.tasks():
        text, where = env.answer(task), f"task {task.id}: the answer"
        if not isinstance(text, str) or not text.strip():
            raise CheckFailed(f"{where} is {text!r}; an answer is a text that says something")
        if text != env.answer(task):
            raise CheckFailed(f"{where} is another when asked for again")
        if twins and (twin := env.hidden_twin(task)).id != task.id and text == env.answer(twin):
            raise CheckFailed(f"{where} is that of its hidden twin, so it leaves out what is hidden")
        found.add(text)
    return f"{len(found)} different answers" + (", each unlike its hidden twin's" if twins else "")
