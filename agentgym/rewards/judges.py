"""Judges read a finished trajectory and add terms to its ledger: rules, monitors, reward models, another policy.

    safe = matches("safe", r"^(?!.*password)", where="all")
    right = answer("right", r"answer: (\\w+)", label="answer")
    played = await judged(mixture({"safe": safe, "right": right}), trajectories)

A judge that breaks is a fault and never a zero: it is asked again, and what persists makes the trajectory a failed one.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

from agentgym.errors import AgentGymError, ConfigError, Fault, RecordError, ToolFault, unknown
from agentgym.policy import Policy
from agentgym.rewards.compose import Composer
from agentgym.rewards.monitors import MachineJudge, Monitor
from agentgym.rewards.nodes import Declaration
from agentgym.rewards.views import with_terms
from agentgym.types import Action, Episode, Failure, Message, RewardTerm, Sampling, Task, Trajectory, iterate, say


class Judge(Protocol):
    """Whoever reads a finished trajectory."""

    async def __call__(self, trajectory: Trajectory) -> tuple[RewardTerm, ...]:
        """Terms to add; raises a `Fault` when it cannot judge."""
        ...


# --- many judges, many trajectories -----------------------------------------------------------------------------


class Mixture:
    """Several judges at once; a `Judge`. `per_task` names those that a task asks (None: all of them)."""

    def __init__(self, judges: Mapping[str, Judge], per_task: Callable[[Task], Collection[str]] | None = None) -> None:
        self.judges, self.per_task = dict(judges), per_task

    async def __call__(self, trajectory: Trajectory) -> tuple[RewardTerm, ...]:
        asked = [self.judges[name] for name in self.names(trajectory.task)]
        try:
            async with asyncio.TaskGroup() as group:
                found = [group.create_task(judge(trajectory)) for judge in asked]
        except BaseExceptionGroup as broken:
            raise broken.exceptions[0] from None
        return tuple(term for task in found for term in task.result())

    def names(self, task: Task) -> list[str]:
        """The judges of this task, in their order here. Raises `UnknownName` for one that does not exist."""
        wanted = self.judges if self.per_task is None else self.per_task(task)
        for name in wanted:
            if name not in self.judges:
                raise unknown("judge", name, self.judges)
        return [name for name in self.judges if name in wanted]


def mixture(judges: Mapping[str, Judge], per_task: Callable[[Task], Collection[str]] | None = None) -> Mixture:
    """CGPO's mixture of judges (2409.20370): their terms are what an `all_of` reads."""
    return Mixture(judges, per_task)


async def judged(
    judge: Judge, trajectories: Iterable[Trajectory], *, concurrency: int = 8, retries: int = 2
) -> list[Trajectory]:
    """The trajectories with the judge's terms in their ledgers, at most `concurrency` of them read at once.

    Failed ones are passed on. A fault, a crash or a value that is not finite is tried again `retries` times, then the
    trajectory has failed (kind "tool", or the fault's own). Raises other errors of the gym: they are a declaration's.
    """
    room = asyncio.Semaphore(concurrency)

    async def one(trajectory: Trajectory) -> Trajectory:
        async with room:
            return trajectory if trajectory.status == "failed" else await _attempt(judge, trajectory, retries)

    return list(await asyncio.gather(*map(one, trajectories)))


async def _attempt(judge: Judge, trajectory: Trajectory, retries: int) -> Trajectory:
    for _ in range(retries + 1):
        try:
            return with_terms(trajectory, _finite(await judge(trajectory)))
        except Fault as error:
            fault = error
        except AgentGymError:
            raise
        except Exception as error:
            fault = ToolFault(f"{type(error).__name__}: {error}")
    failure = Failure(
        kind=fault.kind,  # type: ignore[arg-type]
        message=f"judge: {fault}"[:2000],
        step=len(trajectory.turns),
        attempts=retries + 1,
    )
    failed: Trajectory = trajectory.replace(status="failed", failure=failure)
    return failed


def _finite(terms: Sequence[RewardTerm]) -> Sequence[RewardTerm]:
    for term in terms:
        if not math.isfinite(term.value):
            raise ToolFault(f"{term.name!r} is {term.value}; rewards are finite")
    return terms


# --- rules ------------------------------------------------------------------------------------------------------


def rule(name: str, function: Callable[[Trajectory], float]) -> Judge:
    """A judge from a plain function: one term for the episode."""

    async def judge(trajectory: Trajectory) -> tuple[RewardTerm, ...]:
        return (RewardTerm(name=name, value=float(function(trajectory)), level="episode"),)

    return judge


def said(trajectory: Trajectory) -> list[str]:
    """The text of every action."""
    return [turn.action.text for turn in iterate(trajectory.turns)]


def last(trajectory: Trajectory) -> str:
    """The text of the last action."""
    texts = said(trajectory)
    return texts[-1] if texts else ""


def matches(name: str, pattern: str, where: Literal["last", "any", "all"] = "last") -> Judge:
    """1 where the regular expression is found in the last action, in any, or in all of them; else 0."""
    expression = _expression(pattern)

    def found(trajectory: Trajectory) -> float:
        hits = [expression.search(text) is not None for text in said(trajectory)]
        return bool(hits) and {"last": hits[-1], "any": any(hits), "all": all(hits)}[where]

    if where not in ("last", "any", "all"):
        raise unknown("place of a match", where, ("last", "any", "all"))
    return rule(name, found)


def answer(name: str, pattern: str, label: str) -> Judge:
    """1 where the pattern's last group 1 in the last action is the trajectory's label, without regard to case and
    white space; else 0. A trajectory without the label is refused."""
    expression = _expression(pattern)
    if expression.groups < 1:
        raise ConfigError(f"{pattern!r} has no group that holds the answer; put it into brackets")

    def right(trajectory: Trajectory) -> float:
        wanted = _label(trajectory, label)
        found = [m[1] for m in expression.finditer(last(trajectory))]
        return bool(found) and _plain(found[-1]) == _plain(wanted)

    return rule(name, right)


def choice(label: str) -> Judge:
    """The rules of Clinical-R1's released reward (2512.00601) as terms of the last action, for `composites.crpo`:

    accuracy  1 or 0 for the letter in \\boxed{}, -0.5 where that is no letter, -1 where the box cannot be read; for n
              boxes instead of one, -n (so a reply without a box loses nothing)
    format    1 for <think>..</think><answer>..</answer>, 1.5 with one box and other text in the answer; else 0
    english   the share of characters that are ASCII letters, digits, common punctuation, blanks or line breaks
    """

    async def judge(trajectory: Trajectory) -> tuple[RewardTerm, ...]:
        text, wanted = last(trajectory).strip(), _label(trajectory, label)
        amounts = {"accuracy": _boxed(text, wanted), "format": _framed(text), "english": _english(text)}
        return tuple(RewardTerm(name=n, value=v, level="episode") for n, v in amounts.items())

    return judge


def _boxed(text: str, wanted: str) -> float:
    count = text.count("\\boxed")
    if count != 1:
        return float(-count)
    found = re.search(r"\\boxed\{(.*?)\}", text)
    if found is None:
        return -1.0
    return float(found[1] == wanted) if re.fullmatch("[A-Z]", found[1]) else -0.5


def _framed(text: str) -> float:
    found = re.search(r"^<think>.*?</think>\s*<answer>(.*?)</answer>$", text, re.DOTALL)
    if found is None:
        return 0.0
    boxes = re.findall(r"\\boxed\{.*?\}", found[1])
    return 1.5 if len(boxes) == 1 and boxes[0] != found[1].strip() else 1.0


def _english(text: str) -> float:
    return len(re.findall(r"[ -~\n]", text)) / len(text) if text else 0.0


def _expression(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is no regular expression: {error}") from error


def _label(trajectory: Trajectory, label: str) -> str:
    if label not in trajectory.labels:
        raise RecordError(f"{trajectory.episode.id} has no label {label!r}; it has {sorted(trajectory.labels)}")
    return trajectory.labels[label]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


class Computed:
    """A term computed from those already there by a declaration of its own; a `Judge`. So a composed part (DTPO's
    outcome, its tool reward) becomes a line that an advantage can name. `turn` counts from the end where negative."""

    def __init__(self, name: str, declaration: Declaration, turn: int = -1) -> None:
        self.name, self.composer, self.turn = name, Composer(declaration), turn

    async def __call__(self, trajectory: Trajectory) -> tuple[RewardTerm, ...]:
        at = self.turn + len(trajectory.turns) if self.turn < 0 else self.turn
        return (RewardTerm(name=self.name, value=self.composer.trajectory(trajectory).value, turn=at),)


# --- another policy as judge ------------------------------------------------------------------------------------


def transcript(trajectory: Trajectory) -> str:
    """The episode as text: every message and action under its role, tool calls as JSON."""
    lines = []
    for turn in iterate(trajectory.turns):
        said = (*turn.observation.messages, Message(role="assistant", content=turn.action.text))
        lines += [f"{message.role}: {message.text}" for message in said if message.text]
        lines += [f"assistant calls {c.name} {json.dumps(c.arguments)}" for c in turn.action.tool_calls]
    return "\n".join(lines)


def score(low: float, high: float, pattern: str = r"-?\d+(?:\.\d+)?") -> Callable[[Action], float | None]:
    """Reads the last number of a reply; None where there is none from `low` to `high`."""
    expression = _expression(pattern)

    def read(action: Action) -> float | None:
        found = expression.findall(action.text)
        value = float(found[-1]) if found else math.nan
        return value if low <= value <= high else None

    return read


def yes(action: Action) -> float | None:
    """1 or 0 for a reply that begins with yes or no; None for another one."""
    found = re.match(r"\W*(yes|no)\b", action.text.casefold())
    return None if found is None else float(found[1] == "yes")


def yes_probability(action: Action) -> float | None:
    """p(yes), with p of the reply's first token: p after "yes", 1 - p after "no", as if there were only these two.

    Raises `ConfigError` for a policy that records no log-probs.
    """
    verdict = yes(action)
    if verdict is None:
        return None
    if action.span is None or not len(action.span.logprobs):
        raise ConfigError("this policy records no log-probs; read its replies with `yes` instead")
    p = math.exp(min(action.span.logprobs[0], 0.0))
    return p if verdict else 1.0 - p


class Asked:
    """Another policy reads the episode and its reply becomes a term; a `Judge`.

    template  what it is asked; {transcript}, {answer} (the last action), {task} (the payload as JSON) and the
              trajectory's labels are filled in
    read      the number in a reply, or None: `score(1, 5)`, `yes`, `yes_probability`, or a function of your own
    again     said after a reply that cannot be read; after `tries` replies it is a fault
    """

    def __init__(
        self,
        name: str,
        policy: Policy,
        template: str,
        read: Callable[[Action], float | None],
        *,
        sampling: Sampling | None = None,
        tries: int = 2,
        again: str = "Answer in the form that was asked for, with nothing else.",
    ) -> None:
        self.name, self.policy, self.template, self.read = name, policy, template, read
        self.sampling, self.tries, self.again = sampling, tries, again

    async def __call__(self, trajectory: Trajectory) -> tuple[RewardTerm, ...]:
        episode = trajectory.episode
        key = Episode(task=trajectory.task, seed=episode.seed, member=episode.member, group=f"judge {self.name}")
        question = self.question(trajectory)
        async with self.policy.session(key, "judge") as session:
            for _ in range(self.tries):
                reply = await session.act(say(question), self.sampling)
                value = self.read(reply)
                if value is not None:
                    return (RewardTerm(name=self.name, value=value, level="episode"),)
                question = self.again
        raise ToolFault(f"{self.name!r} gave {self.tries} replies that cannot be read, the last one {reply.text!r:.80}")

    def question(self, trajectory: Trajectory) -> str:
        """The template, filled in. Raises `ConfigError` for a name that this trajectory has not."""
        known = {
            **trajectory.labels,
            "transcript": transcript(trajectory),
            "answer": last(trajectory),
            "task": json.dumps(trajectory.task.payload, default=str),
        }
        try:
            return self.template.format_map(known)
        except KeyError as error:
            raise ConfigError(f"the judge's template asks for {error}; there is {', '.join(sorted(known))}") from error


# --- judges as tables -------------------------------------------------------------------------------------------


def _custom(target: str, **options: Any) -> Judge:
    """A judge of your own: "module:function" is called with the other keys and gives the judge."""
    module, _, function = target.partition(":")
    try:
        made: Judge = getattr(importlib.import_module(module), function)(**options)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f'a custom judge\'s target is "module:function"; {target!r}: {error}') from error
    return made


def _machine(name: str, labels: Mapping[str, Any], **machine: Any) -> Judge:
    return MachineJudge(name, machine, labels)


KINDS: dict[str, Callable[..., Judge]] = {
    "matches": matches,
    "answer": answer,
    "choice": choice,
    "computed": Computed,
    "monitor": Monitor,
    "machine": _machine,
    "custom": _custom,
}


def declared(tables: Iterable[Mapping[str, Any]]) -> Mixture:
    """Judges from tables, as a TOML file's [[judge]] holds them: `kind`, and what that kind takes. `tasks` (label =
    value) keeps a judge to the tasks with those labels."""
    judges: dict[str, Judge] = {}
    tasks: dict[str, Mapping[str, str]] = {}
    for number, table in enumerate(tables):
        options = {key: value for key, value in table.items() if key not in ("kind", "tasks")}
        name = str(table.get("name", number))
        if name in judges:
            raise ConfigError(f"two judges are called {name!r}")
        judges[name], tasks[name] = _made(str(table.get("kind")), options), table.get("tasks", {})
        if not isinstance(tasks[name], Mapping):
            raise ConfigError(f"judge {name!r}: write tasks = {{label = value}}; got {tasks[name]!r}")

    def per_task(task: Task) -> list[str]:
        return [n for n, wanted in tasks.items() if all(task.labels.get(k) == v for k, v in wanted.items())]

    return Mixture(judges, per_task)


def _made(kind: str, options: Mapping[str, Any]) -> Judge:
    if kind not in KINDS:
        raise unknown("kind of judge", kind, KINDS)
    try:
        inspect.signature(KINDS[kind]).bind(**options)
        return KINDS[kind](**options)
    except TypeError as error:
        raise ConfigError(f"judge of kind {kind!r}: {error}") from error
