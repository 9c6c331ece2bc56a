"""`agentgym play`: a person is the policy. Lines may also come through a pipe."""

from __future__ import annotations

import asyncio
import json
import math
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from agentgym import presets
from agentgym.cli.environments import make, nth_task, settings_of
from agentgym.cli.output import out, table
from agentgym.errors import EngineFault
from agentgym.figures import figure
from agentgym.policy import Scripted
from agentgym.rewards import composer
from agentgym.rollout import Limits, Runner, episodes
from agentgym.types import Action, Array, Episode, Message, Observation, ToolCall, Trajectory

HELP = 'say something, or call a tool: name key=value ..., name words, or {"name": ..., "arguments": {...}}'


def run_play(options: Namespace) -> int:
    """Exit code 1 when the episode did not come to an end of its own."""
    env = make(options.id, settings_of(options, "env")["env"])
    task = nth_task(env, options.split, options.seed, options.task)
    out().print(f"{env.id}, task {options.task} of {options.split!r}. {HELP}", style="dim", markup=False)
    patient = Limits(turn_seconds=math.inf, episode_seconds=math.inf)
    runner = Runner(env, Scripted(Person), concurrency=1, limits=patient, retries=0)
    (played,) = asyncio.run(runner.collect(episodes([task], seed=options.seed)))
    _sum_up(played, env.reward)
    if options.html:
        from agentgym.html import trajectory_page

        Path(options.html).write_text(trajectory_page(played), encoding="utf-8")
    return 1 if played.failure else 0


class Person:
    """What one agent's person needs: the tools they were told of, to tell a call from a sentence."""

    def __init__(self, episode: Episode, agent: str) -> None:
        self.agent = agent
        self.tools: dict[str, dict[str, Any]] = {}

    def __call__(self, observation: Observation) -> Action:
        self.tools.update(tools_of(observation))
        _show(observation, self.agent)
        while True:
            try:
                return read_action(_line(f"{self.agent}> "), observation, self.tools)
            except ValueError as error:
                out().print(f"  {error}", style="yellow", markup=False)


def _line(prompt: str) -> str:
    """One line from the person. Ctrl-C ends the episode at once, although an event loop is running."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.stdout.write(prompt)
        sys.stdout.flush()
        line = sys.stdin.readline()
    finally:
        signal.signal(signal.SIGINT, before)
    if not line:
        raise EngineFault("standard input ended before the episode did")
    if not sys.stdin.isatty():
        sys.stdout.write(line)
    return line.strip()


def tools_of(observation: Observation) -> dict[str, dict[str, Any]]:
    """Tool name -> its schema, from either usual shape (bare, or inside {"type": "function", ...})."""
    found = (tool.get("function", tool) for tool in observation.tools)
    return {str(tool["name"]): tool for tool in found if "name" in tool}


def read_action(line: str, observation: Observation, tools: Mapping[str, dict[str, Any]]) -> Action:
    """A typed line as an action; `ValueError` where it cannot be one."""
    if observation.array is not None:
        return Action(array=Array.of(json.loads(line)))
    if line.startswith(("{", "[")):
        return Action(text=line, tool_calls=tuple(_calls(json.loads(line))))
    word = line.partition(" ")[0]
    if word in tools:
        return Action(text=line, tool_calls=(_compact(line, tools[word]),))
    return Action(text=line)


def _calls(found: Any) -> Iterable[ToolCall]:
    for call in found if isinstance(found, list) else [found]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError('a call looks like {"name": "search", "arguments": {...}}')
        yield ToolCall(name=call["name"], arguments=call.get("arguments", {}))


def _compact(line: str, tool: Mapping[str, Any]) -> ToolCall:
    """`name key=value ...`; words without a key are joined and go to the tool's first parameter."""
    name, *words = shlex.split(line)
    parameters = list(tool.get("parameters", {}).get("properties", {}))
    arguments: dict[str, Any] = {}
    loose: list[str] = []
    for word in words:
        key, separator, text = word.partition("=")
        if separator and key in parameters:
            arguments[key] = presets.read_value(text)
        else:
            loose.append(word)
    if loose and parameters:
        arguments.setdefault(parameters[0], presets.read_value(" ".join(loose)))
    return ToolCall(name=name, arguments=arguments)


def _show(observation: Observation, agent: str) -> None:
    for tool in tools_of(observation).values():
        keys = ", ".join(tool.get("parameters", {}).get("properties", {}))
        out().print(f"  {tool['name']}({keys})  {tool.get('description', '')}", style="dim", markup=False)
    for message in observation.messages:
        out().print(_spoken(message), markup=False)
    if observation.array is not None:
        out().print(f"{agent} sees {observation.array.numpy().tolist()}", markup=False)
    if observation.action_mask is not None:
        legal = observation.action_mask.numpy().nonzero()[0].tolist()
        out().print(f"legal: {legal}", style="dim", markup=False)


def _spoken(message: Message) -> str:
    return f"{message.name or message.role}: {message.text}"


def _sum_up(played: Trajectory, reward: Mapping[str, Any]) -> None:
    if played.failure:
        out().print(f"left early: {played.failure.message}", style="yellow", markup=False)
        return
    rows = [(term.turn, term.name, term.value) for term in played.rewards if term.value]
    out().print("", table("rewards", ("turn", "name", "value"), rows), markup=False)
    figures = {"return": composer(dict(reward)).trajectory(played).value, **played.metrics}
    told = ", ".join(f"{key} {figure(value)}" for key, value in figures.items())
    out().print(f"{played.status}: {told}", style="bold", markup=False)
