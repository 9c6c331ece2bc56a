"""What every step must hold: valid records, a ledger that adds up, legal actions that count as legal."""

from __future__ import annotations

import math
import re

import msgspec
import numpy as np

from agentgym.rewards import composer
from agentgym.testing.drive import Trace
from agentgym.testing.report import CheckFailed, Skipped, describe
from agentgym.testing.subject import Subject, rungs
from agentgym.types import Observation, StepResult, decode, encode

INVALID = re.compile(r"(^|[._])invalid([._]|$)")
TOLERANCE = 1e-9


async def runs(subject: Subject) -> str:
    """One random episode begins, takes actions, and is closed, each call within its deadline."""
    tasks = subject.tasks(1)
    if not tasks:
        raise CheckFailed("the split 'train' holds no task")
    trace = await subject.play(tasks[0], subject.policy())
    if not trace.first:
        raise CheckFailed(f"reset to task {tasks[0].id} gave nobody an observation: nobody can act first")
    return f"{len(trace.moves)} steps, {'to its end' if trace.ended else 'cut there'}"


async def records(subject: Subject) -> str:
    """Every observation and result is a valid record that survives encoding."""
    traces = await subject.baseline()
    for trace in traces:
        for agent, seen in trace.first.items():
            sound(seen, f"task {trace.task.id}: first observation of {agent!r}", subject.env.numeric)
        for step, move in enumerate(trace.moves):
            sound_result(move.result, f"task {trace.task.id}: step {step}", subject.env.numeric)
    return f"{sum(len(t.observations) for t in traces)} results encode and decode to themselves"


def sound_result(result: StepResult, where: str, numeric: bool = False) -> None:
    """`CheckFailed` unless this is a valid result of a step."""
    if not isinstance(result, StepResult):
        raise CheckFailed(f"{where} answered {type(result).__name__}, not a StepResult")
    _survives(result.replace(info={}), StepResult, where)
    if not (result.observations or result.terminated or result.truncated):
        raise CheckFailed(f"{where} ended nothing and gave nobody an observation: nobody can act next")
    for agent, seen in result.observations.items():
        sound(seen, f"{where}: observation of {agent!r}", numeric)


def sound(seen: Observation, where: str, numeric: bool = False) -> None:
    """`CheckFailed` unless this is a valid observation."""
    if not isinstance(seen, Observation):
        raise CheckFailed(f"{where} is {type(seen).__name__}, not an Observation")
    _survives(seen, Observation, where)
    if numeric and seen.array is None:
        raise CheckFailed(f"{where} has no array, although the environment says numeric = True")
    if seen.array is None and not seen.messages:
        raise CheckFailed(f"{where} is empty: neither messages nor an array")
    if seen.action_mask is not None and not np.any(seen.action_mask.numpy()):
        raise CheckFailed(f"{where}: the action mask allows nothing")


def _survives(record: Observation | StepResult, kind: type[Observation] | type[StepResult], where: str) -> None:
    try:
        data = encode(record, strict=True)
        again = encode(decode(data, kind))
    except (msgspec.ValidationError, TypeError, UnicodeEncodeError, OverflowError, ValueError) as error:
        raise CheckFailed(f"{where} cannot be recorded: {describe(error)}") from error
    if data != again:
        raise CheckFailed(f"{where} does not come back from the disk as it went there")


async def attribution(subject: Subject) -> str:
    """The declared composer turns every ledger into a finite number that its shares add up to."""
    compose = composer(subject.env.reward).compose
    for trace in await subject.baseline():
        _finite(trace)
        found = compose(trace.ledger)
        total = found.base + math.fsum(found.shares)
        where = f"task {trace.task.id}"
        if not math.isfinite(found.value):
            raise CheckFailed(f"{where}: the ledger composes to {found.value}")
        if abs(total - found.value) > TOLERANCE * max(1.0, abs(found.value)):
            raise CheckFailed(f"{where}: base + shares = {total!r}, but the composed value is {found.value!r}")
    names = sorted({term.name for trace in subject.traces for term in trace.ledger})
    return f"{len(subject.traces)} ledgers reconcile ({', '.join(names) or 'all empty'})"


def _finite(trace: Trace) -> None:
    for step, move in enumerate(trace.moves):
        for term in move.result.rewards:
            if not math.isfinite(term.value):
                raise CheckFailed(f"task {trace.task.id}: step {step}: the reward term {term.name!r} is {term.value}")


async def legal_actions(subject: Subject) -> str:
    """Reference policies, and draws from the action mask or space, are never counted as invalid."""
    numeric = subject.env.numeric or hasattr(subject.env, "action_space")
    if not (numeric or rungs(subject.env)):
        raise Skipped("neither an action mask or space nor a ladder says which actions are legal")
    policy, checked = subject.policy(), 0
    for trace in await subject.baseline():
        if policy.of(trace.task) is policy.rungs[0] and not numeric:
            continue
        checked += 1
        for step, move in enumerate(trace.moves):
            blamed = [t.name for t in move.result.rewards if t.value and INVALID.search(t.name)]
            blamed += [m for m, v in move.result.metrics.items() if v and INVALID.search(m)]
            if blamed:
                raise CheckFailed(f"task {trace.task.id}: step {step}: a legal action was counted as {blamed[0]!r}")
    return f"{checked} episodes of legal actions"
