"""What else can be an environment: any gymnasium id, a class whose methods are tools, a prompt with a verifier.

agentgym.make("gym:CartPole-v1")
agentgym.register("notes-v0", Notes)          # a class with reset(**row) and public methods
agentgym.register("sum-v0", problem)          # problem(seed) -> (prompt, verify)
agentgym.register("quiz-v0", verified(rows, verify))
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Annotated, Any, Self, get_type_hints

import msgspec
import numpy as np

from agentgym.env import Environment, SingleAgentEnv
from agentgym.errors import ConfigError, EnvironmentFault, Fault, MissingExtra, ToolFault, UnknownName, unknown
from agentgym.registry import check_keywords
from agentgym.seeding import key
from agentgym.types import (
    Action,
    Array,
    Level,
    Message,
    Observation,
    RewardTerm,
    StepResult,
    Task,
    ToolCall,
    terms,
    utf8,
)

Row = Mapping[str, Any]
Rows = Sequence[Row] | Mapping[str, Sequence[Row]] | Callable[[str, int], Iterable[Row]]
"""What tasks are made from: a sequence (every split), a mapping by split, or a function of (split, seed)."""
Score = float | Mapping[str, float]
MISTAKES = (ValueError, TypeError, LookupError, ArithmeticError)
"""What a tool method raises when it was used wrongly: told to the agent. Anything else is a `ToolFault`."""


def adapt(id: str, target: Callable[..., Any], config: Mapping[str, Any]) -> Environment:
    """Make the environment a registered thing stands for: call it, and wrap an accepted shape.

    `config` is passed on; a tool class may be given `rows` besides. A keyword nobody takes is an `UnknownName`.
    """
    tools = inspect.isclass(target) and not issubclass(target, Environment) and hasattr(target, "reset")
    own = {name: value for name, value in config.items() if name != "rows"} if tools else config
    check_keywords(f"setting of {id}", target, own)
    if tools:
        return ToolEnv(id, functools.partial(target, **own), config.get("rows", getattr(target, "rows", None)))
    if inspect.isfunction(target) and _needs_seed(target):
        return Verified(id, functools.partial(target, **config))
    built = target(**config)
    if not isinstance(built, Environment):
        raise ConfigError(
            f"{id} is registered as {getattr(target, '__name__', target)}, which made {type(built).__name__}; it must "
            "make an Environment, be a class with reset(**row) and tools as public methods, or a function of a seed "
            "that returns (prompt, verify)"
        )
    if not built.__dict__.get("id"):
        built.__dict__["id"] = id
    return built


def _needs_seed(target: Callable[..., Any]) -> bool:
    found = inspect.signature(target).parameters.get("seed")
    return found is not None and found.default is inspect.Parameter.empty


# --- gymnasium --------------------------------------------------------------------------------------------------


class GymEnv(SingleAgentEnv):
    """Any gymnasium environment, stored as columns. The reward term is `reward`; `is_success` in info becomes success.

    An action is an array of the action space: Discrete, Box, MultiDiscrete or MultiBinary. A Box action outside its
    bounds is clipped. Any other illegal action (no array, another shape, not finite, out of range, not whole) is a
    policy's mistake: the episode terminates with the term `invalid` of value `invalid` and the metric invalid = 1.
    Dict and Tuple observations are flattened in gymnasium's order. `info["action_mask"]` becomes the action mask.
    Steps run on the event loop: wrap what computes for more than a millisecond a step.
    """

    version = "1"
    capabilities = frozenset({"replay"})
    numeric = True

    def __init__(self, gym_id: str, *, invalid: float = -1.0, **config: Any) -> None:
        self.__dict__["id"] = f"gym:{gym_id}"
        self.gym_id, self.invalid, self.config = gym_id, invalid, config
        self.live: Any = None
        probe = self._make()
        self.observation_space, self.action_space = probe.observation_space, probe.action_space
        probe.close()
        self.legal = legality(self.action_space, self.id)

    def _make(self) -> Any:
        try:
            import gymnasium
        except ModuleNotFoundError as error:
            raise MissingExtra(self.id, "gym") from error
        try:
            return gymnasium.make(self.gym_id, disable_env_checker=True, **self.config)
        except gymnasium.error.UnregisteredEnv as error:
            raise UnknownName(f"gymnasium has no {self.gym_id!r}: {error}") from error
        except (gymnasium.error.Error, TypeError) as error:
            raise ConfigError(f"gymnasium cannot make {self.gym_id!r} with {self.config}: {error}") from error

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        return (Task(env=self.id, split=split, seed=key(self.id, split, seed, n) >> 33) for n in count())

    async def begin(self, task: Task) -> Observation:
        self.live = self._make()
        seen, info = self.live.reset(seed=task.seed, options=task.payload or None)
        return self._observe(seen, info)

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        if self.live is None:
            raise ConfigError(f"{self.id}: no episode is running: await env.reset(task) before another step")
        legal = self.legal(action.array)
        if legal is None:
            await self.close()
            wrong = RewardTerm(name="invalid", value=self.invalid)
            return None, StepResult(rewards=(wrong,), terminated=True, metrics={"invalid": 1.0})
        seen, reward, terminated, truncated, info = self.live.step(legal)
        success = info.get("is_success", info.get("success"))
        result = StepResult(
            rewards=(RewardTerm(name="reward", value=float(reward)),),
            terminated=bool(terminated),
            truncated=bool(truncated),
            metrics={} if success is None else {"success": float(success)},
            info=info,
        )
        if terminated or truncated:
            await self.close()
        return (None if terminated else self._observe(seen, info)), result

    async def close(self) -> None:
        live, self.live = self.live, None
        if live is not None:
            live.close()

    def spawn(self) -> Self:
        fresh = copy.copy(self)
        fresh.live = None
        return fresh

    def _observe(self, seen: Any, info: Mapping[str, Any]) -> Observation:
        if isinstance(seen, dict | tuple):
            from gymnasium.spaces import flatten

            seen = flatten(self.observation_space, seen)
        mask = info.get("action_mask")
        return Observation(array=Array.of(seen), action_mask=None if mask is None else Array.of(mask))


Legality = Callable[[Array | None], Any]
"""From an action's array to what gymnasium's `step` takes, or None where it is illegal."""


def legality(space: Any, id: str) -> Legality:
    """The check for an action space; an unsupported one is refused when the environment is made."""
    checks = {"Discrete": _discrete, "Box": _box, "MultiDiscrete": _multi_discrete, "MultiBinary": _multi_binary}
    kind = type(space).__name__
    if kind not in checks:
        raise ConfigError(f"{id} has the action space {space}; supported are {', '.join(checks)}")
    return functools.partial(_checked, functools.partial(checks[kind], space))


def _checked(check: Callable[[Any], Any], array: Array | None) -> Any:
    """None for no array, for one whose bytes do not fit its shape, and for numbers that are not finite."""
    try:
        values = None if array is None else array.numpy()
        return None if values is None or not np.isfinite(values).all() else check(values)
    except (ValueError, TypeError):
        return None


def _discrete(space: Any, values: Any) -> int | None:
    if values.size != 1:
        return None
    value = values.reshape(()).item()
    start = int(space.start)
    return int(value) if value == int(value) and start <= value < start + int(space.n) else None


def _box(space: Any, values: Any) -> Any:
    if values.shape != space.shape or values.dtype.kind not in "fiub":
        return None
    return np.clip(values, space.low, space.high).astype(space.dtype)


def _multi_discrete(space: Any, values: Any) -> Any:
    whole = values.astype(np.int64)
    start = getattr(space, "start", 0)
    legal = values.shape == space.shape and (whole == values).all()
    return whole if legal and ((whole >= start) & (whole < start + space.nvec)).all() else None


def _multi_binary(space: Any, values: Any) -> Any:
    legal = values.shape == space.shape and np.isin(values, (0, 1)).all()
    return values.astype(space.dtype) if legal else None


# --- a class with tools -----------------------------------------------------------------------------------------


class Tool:
    """A public method as a tool: its JSON schema from the signature and docstring, and its checked arguments."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.name = method.__name__
        hints = get_type_hints(method)
        parameters = [p for name, p in inspect.signature(method).parameters.items() if name != "self"]
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY) for p in parameters):
            raise ConfigError(f"tool {self.name}: *args, **kwargs and positional-only parameters have no JSON schema")
        summary, described = docstring(method)
        fields = [_field(p, hints.get(p.name, Any), described.get(p.name)) for p in parameters]
        self.arguments = msgspec.defstruct(self.name, fields, forbid_unknown_fields=True, kw_only=True)
        self.schema = {
            "type": "function",
            "function": {"name": self.name, "description": summary, "parameters": _schema_of(self.arguments)},
        }

    async def call(self, owner: Any, arguments: Mapping[str, Any]) -> Any:
        """The method's answer; raises one of `MISTAKES` for a wrong use (a schema violation is a ValueError)."""
        given = msgspec.convert(arguments, self.arguments, strict=False)
        answer = getattr(owner, self.name)(**{f: getattr(given, f) for f in given.__struct_fields__})
        return await answer if inspect.isawaitable(answer) else answer


def _field(parameter: inspect.Parameter, hint: Any, description: str | None) -> Any:
    kind = Annotated[hint, msgspec.Meta(description=description)] if description else hint
    if parameter.default is inspect.Parameter.empty:
        return (parameter.name, kind)
    default = parameter.default
    mutable = isinstance(default, list | dict | set)
    return (
        parameter.name,
        kind,
        msgspec.field(default_factory=functools.partial(copy.copy, default)) if mutable else default,
    )


def _schema_of(arguments: type[msgspec.Struct]) -> dict[str, Any]:
    """The object schema itself, with "$defs" only where a parameter's type has a name of its own."""
    whole = msgspec.json.schema(arguments)
    own: dict[str, Any] = whole["$defs"].pop(arguments.__name__)
    own.pop("title", None)
    return {**own, "$defs": whole["$defs"]} if whole["$defs"] else own


def docstring(method: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """(summary, {parameter: description}) of a docstring with an "Args:" section, Google style."""
    text = inspect.getdoc(method) or ""
    summary, _, rest = text.partition("\nArgs:\n")
    section = re.split(r"\n\S", rest, maxsplit=1)[0]
    found = re.findall(r"^\s+(\w+)(?: \([^)]*\))?:\s*(.*(?:\n(?!\s+\w+(?: \([^)]*\))?:)\s+.+)*)", section, re.M)
    return summary.strip(), {name: " ".join(described.split()) for name, described in found}


def tools_of(kind: type) -> dict[str, Tool]:
    """The public methods that a class declares itself, without `reset`, `close` and `get_reward`."""
    reserved = {"reset", "close", "get_reward", "rows"}
    methods = inspect.getmembers(kind, inspect.isfunction)
    return {name: Tool(method) for name, method in methods if not name.startswith("_") and name not in reserved}


class ToolEnv(SingleAgentEnv):
    """A class with `reset(**row)` and public methods as tools, one instance per episode (the shape TRL uses).

    `reset` may return the first words; a "prompt" in the row (text, or messages as mappings) goes before them. Tool
    calls are answered one message each; a wrong call is answered with an error and counted in the metric
    invalid_calls. The episode ends with a reply without tool calls, or when the instance sets `done`; then
    `get_reward()` (a number, or numbers by name), where it exists, is the episode's reward. Without rows there is one
    task per seed, and `reset(seed=...)` gets it where it asks for one.
    """

    version = "1"
    capabilities = frozenset({"replay"})

    def __init__(self, id: str, factory: Callable[[], Any], rows: Rows | None = None) -> None:
        self.__dict__["id"] = id
        self.factory, self.rows = factory, rows
        kind: Any = factory.func if isinstance(factory, functools.partial) else factory
        self.tools = tools_of(kind)
        if not self.tools:
            raise ConfigError(f"{id}: {kind.__name__} has no public method besides reset: no tool to act with")
        self.seeded = "seed" in inspect.signature(kind.reset).parameters
        self.instance: Any = None
        self.wrong = 0

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        return tasks_of(self.id, self.rows, split, seed)

    async def begin(self, task: Task) -> Observation:
        self.instance, self.wrong = self.factory(), 0
        row = {"seed": task.seed, **task.payload} if self.seeded else dict(task.payload)
        answer = self.instance.reset(**row)
        answer = await answer if inspect.isawaitable(answer) else answer
        messages = (*as_messages(task.payload.get("prompt")), *as_messages(answer))
        return Observation(messages=messages, tools=tuple(tool.schema for tool in self.tools.values()))

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        answers = tuple([await self._answer(call) for call in action.tool_calls])
        if answers and not getattr(self.instance, "done", False):
            return Observation(messages=answers), StepResult()
        score = self.instance.get_reward() if hasattr(self.instance, "get_reward") else {}
        score = await score if inspect.isawaitable(score) else score
        rewards = score_terms(score, "episode")
        return None, StepResult(rewards=rewards, terminated=True, metrics={"invalid_calls": float(self.wrong)})

    async def _answer(self, call: ToolCall) -> Message:
        try:
            if call.name not in self.tools:
                raise unknown("tool", call.name, self.tools)
            content = as_text(await self.tools[call.name].call(self.instance, call.arguments))
        except Fault:
            raise
        except MISTAKES as error:
            self.wrong += 1
            content = f"error: {error}"
        except Exception as error:
            raise ToolFault(f"{call.name} raised {type(error).__name__}: {error}") from error
        return Message(role="tool", content=utf8(content), tool_call_id=utf8(call.id), name=utf8(call.name))

    async def close(self) -> None:
        instance, self.instance = self.instance, None
        if hasattr(instance, "close"):
            closing = instance.close()
            if inspect.isawaitable(closing):
                await closing


# --- a prompt with a verifier -----------------------------------------------------------------------------------

Verify = Callable[[str], Any]
Problem = Callable[..., tuple[Any, Verify]]


class Verified(SingleAgentEnv):
    """A single turn: `problem(seed=...)` or `problem(row=...)` returns the prompt and a verifier of the reply.

    The verifier returns a number (term `reward`) or numbers by name, and may be async; what it raises is a fault.
    The metric success is 1 when the number, or the one named "success", is at least 1.
    """

    version = "1"
    capabilities = frozenset({"replay"})

    def __init__(self, id: str, problem: Problem, rows: Rows | None = None) -> None:
        self.__dict__["id"] = id
        self.problem, self.rows = problem, rows
        self.verify: Verify | None = None

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        return tasks_of(self.id, self.rows, split, seed)

    async def begin(self, task: Task) -> Observation:
        given = {"seed": task.seed} if self.rows is None else {"row": task.payload}
        prompt, self.verify = self.problem(**given)
        return Observation(messages=as_messages(prompt))

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        assert self.verify is not None
        score = self.verify(action.text)
        score = await score if inspect.isawaitable(score) else score
        found = score_terms(score, "episode")
        solved = {t.name: t.value for t in found}.get("success", found[0].value if found else 0.0)
        return None, StepResult(rewards=found, terminated=True, metrics={"success": float(solved >= 1.0)})


def verified(rows: Rows, verify: Callable[[str, Row], Any]) -> Callable[[], Environment]:
    """Something to register: rows with a "prompt", and a verifier of (reply, row)."""
    return functools.partial(Verified, "", functools.partial(_row_problem, verify), rows)


def _row_problem(verify: Callable[[str, Row], Any], row: Row) -> tuple[Any, Verify]:
    if "prompt" not in row:
        raise EnvironmentFault(f"a row needs a 'prompt'; this one has {', '.join(row) or 'nothing'}")
    return row["prompt"], lambda text: verify(text, row)


# --- shared -----------------------------------------------------------------------------------------------------


def tasks_of(id: str, rows: Rows | None, split: str, seed: int) -> Iterator[Task]:
    """A task per row in order, or without rows an endless stream of seeds."""
    if rows is None:
        return (Task(env=id, split=split, seed=key(id, split, seed, n) >> 33) for n in count())
    if isinstance(rows, Mapping) and split not in rows:
        raise unknown(f"split of {id}", split, rows)
    found = rows(split, seed) if callable(rows) else rows[split] if isinstance(rows, Mapping) else rows
    return (Task(env=id, split=split, seed=n, payload=dict(row)) for n, row in enumerate(found))


def score_terms(score: Any, level: Level) -> tuple[RewardTerm, ...]:
    """Reward terms from what a verifier or `get_reward` returned; an `EnvironmentFault` for anything else."""
    try:
        named = {"reward": float(score)} if not isinstance(score, Mapping) else {n: float(v) for n, v in score.items()}
    except (TypeError, ValueError) as error:
        raise EnvironmentFault(f"a reward is a number, or numbers by name; got {score!r:.80}") from error
    return terms(named, level)


def as_text(answer: Any) -> str:
    """Text as it is, nothing as nothing, everything else as JSON."""
    if answer is None or isinstance(answer, str):
        return answer or ""
    return msgspec.json.encode(answer, enc_hook=str).decode()


def as_messages(prompt: Any) -> tuple[Message, ...]:
    """Messages from text (the user's), from mappings with role and content, or from nothing."""
    if not prompt:
        return ()
    if isinstance(prompt, str):
        return (Message(role="user", content=prompt),)
    try:
        return msgspec.convert(list(prompt), tuple[Message, ...], from_attributes=True)
    except (msgspec.ValidationError, TypeError) as error:
        raise EnvironmentFault(f"a prompt is text or messages with role and content; {error}") from error
