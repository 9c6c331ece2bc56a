"""A small sound environment that claims everything, and one variant of it for every defect `check_env` must find."""

from __future__ import annotations

import asyncio
import copy
import random
import threading
import time
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any, ClassVar, Self

from agentgym import Action, Environment, RewardTerm, SingleAgentEnv, StepResult, Task
from agentgym.policy import Policy, Scripted
from agentgym.seeding import key, rng
from agentgym.types import Message, Observation, ToolCall, say

ITEMS = ("apple", "brush", "candle", "drum", "egg", "fan")
TOOLS: tuple[dict[str, Any], ...] = (
    {"name": "ask", "parameters": {"type": "object", "properties": {}}},
    {
        "name": "pick",
        "parameters": {
            "type": "object",
            "properties": {"item": {"type": "string", "enum": list(ITEMS)}},
            "required": ["item"],
        },
    },
)


class Clerk(SingleAgentEnv):
    """The customer wants one of six things and says which when asked; picking one ends the episode."""

    id = "clerk-v0"
    capabilities = frozenset({"replay", "fork", "ladder", "hidden_twin", "hints", "answer"})
    expected: ClassVar[str] = ""
    """The one check that must fail."""

    def __init__(self) -> None:
        self.task = Task(env=self.id)
        self.left = 0

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        for number in count():
            drawn = key(split, seed, number) >> 20
            wanted = rng(drawn, "wanted").choice(ITEMS)
            payload = {"wanted": wanted, "greeting": f"Customer {drawn % 9973} comes in."}
            yield Task(env=self.id, split=split, seed=drawn, payload=payload)

    async def begin(self, task: Task) -> Observation:
        self.task, self.left = task, 5
        return Observation(messages=(Message(role="user", content=task.payload["greeting"]),), tools=TOOLS)

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        self.left -= 1
        call = action.tool_calls[0] if action.tool_calls else None
        if call is not None and call.name == "pick":
            return self.picked(call)
        answer = self.reply(action) if call is None or call.name == "ask" else "There is no such tool."
        return say(answer), StepResult(truncated=self.left <= 0)

    def reply(self, action: Action) -> str:
        return f"I want the {self.task.payload['wanted']}." if action.tool_calls else "Pardon?"

    def picked(self, call: ToolCall) -> tuple[Observation | None, StepResult]:
        good = call.arguments.get("item") == self.task.payload["wanted"]
        terms = (RewardTerm(name="right", value=float(good)), RewardTerm(name="steps", value=-0.01 * (5 - self.left)))
        return None, StepResult(rewards=terms, terminated=True, metrics={"success": float(good)})

    def fork(self) -> Self:
        return copy.copy(self)

    def ladder(self) -> dict[str, Policy]:
        return {"random": Scripted(lambda e, a: guess(e.seed, e.task)), "oracle": Scripted(lambda e, a: know(e.task))}

    def hidden_twin(self, task: Task) -> Task:
        other = ITEMS[(ITEMS.index(task.payload["wanted"]) + 1) % len(ITEMS)]
        twin: Task = task.replace(payload={**task.payload, "wanted": other})
        return twin

    def hint(self, task: Task, level: int) -> str:
        return "Ask what is wanted."

    def answer(self, task: Task) -> str:
        return f"They want the {task.payload['wanted']}."


def guess(seed: int, task: Task) -> Any:
    item = rng(seed, task.id, "guess").choice(ITEMS)
    return lambda seen: Action(tool_calls=(ToolCall(name="pick", arguments={"item": item}),))


def know(task: Task) -> Any:
    return lambda seen: Action(tool_calls=(ToolCall(name="pick", arguments={"item": task.payload["wanted"]}),))


# --- episodes that are not what the task says ---


class GlobalRandom(Clerk):
    expected = "same_seed"

    def reply(self, action: Action) -> str:
        return f"Hm. {random.random()}"


class HashOrder(Clerk):
    expected = "two_processes"

    async def begin(self, task: Task) -> Observation:
        await super().begin(task)
        return say(" or ".join(set(ITEMS))).replace(tools=TOOLS)


class SharedState(Clerk):
    expected = "concurrency"

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[str, str] = {}

    async def begin(self, task: Task) -> Observation:
        self.memory["greeting"] = task.payload["greeting"]
        return await super().begin(task)

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        seen, result = await super().act(action)
        return (say(self.memory["greeting"]), result) if seen is not None else (None, result)


class SeedIgnored(Clerk):
    expected = "different_seeds"

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        return super().tasks(split, 0)


class SplitsOverlap(Clerk):
    expected = "tasks"

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        return (task.replace(split=split) for task in super().tasks("train", seed))


class StreamOfTheMoment(Clerk):
    expected = "tasks"

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        fixed = super().tasks(split, seed)
        for number, task in enumerate(fixed):
            yield task if number != 50 else task.replace(seed=random.getrandbits(40))


class KindOfPayload(Clerk):
    """Acts on what the disk does not keep: a tuple comes back as a list."""

    expected = "replay"

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        return (t.replace(payload={**t.payload, "shelf": ITEMS}) for t in super().tasks(split, seed))

    async def begin(self, task: Task) -> Observation:
        seen = await super().begin(task)
        return seen.replace(anchor=type(task.payload["shelf"]).__name__)


# --- rules of a step ---


class StrangeRole(Clerk):
    expected = "records"

    async def begin(self, task: Task) -> Observation:
        seen = await super().begin(task)
        return seen.replace(messages=(Message(role="narrator", content="Once."), *seen.messages))  # type: ignore[arg-type]


class NotANumber(Clerk):
    expected = "attribution"

    def picked(self, call: ToolCall) -> tuple[Observation | None, StepResult]:
        seen, result = super().picked(call)
        return seen, result.replace(rewards=(RewardTerm(name="right", value=float("nan")),))


class BlamesTheLegal(Clerk):
    expected = "legal_actions"

    def picked(self, call: ToolCall) -> tuple[Observation | None, StepResult]:
        seen, result = super().picked(call)
        return seen, result.replace(metrics={"invalid": 1.0})


# --- strange actions ---


class RaisesOnGarbage(Clerk):
    expected = "garbage_actions"

    def picked(self, call: ToolCall) -> tuple[Observation | None, StepResult]:
        ITEMS.index(call.arguments["item"])
        return super().picked(call)


class HangsOnGarbage(Clerk):
    expected = "garbage_actions"

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        if "\x00" in action.text:
            await asyncio.get_running_loop().create_future()
        return await super().act(action)


class BlocksOnGarbage(Clerk):
    expected = "garbage_actions"

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        if "\x00" in action.text:
            time.sleep(12)  # noqa: ASYNC251 - the defect
        return await super().act(action)


class EchoesSurrogates(Clerk):
    expected = "garbage_actions"

    def reply(self, action: Action) -> str:
        return super().reply(action) if action.tool_calls else f"What is {action.text[:40]}?"


class RepeatsAsSystem(Clerk):
    expected = "injection"

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        seen, result = await super().act(action)
        if seen is not None and action.text.isprintable() is False and "system" in action.text:
            text = action.text.encode(errors="ignore").decode().split("system")[1]
            seen = seen.replace(messages=(Message(role="system", content=text),))
        return seen, result


class NeverOver(Clerk):
    expected = "after_end"

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        seen, result = await super().act(action)
        over = self.left == 0 or self.task is FINISHED
        if result.terminated:
            self.task = FINISHED
        return (say("Anything else?"), StepResult()) if over and seen is None else (seen, result)


FINISHED = Task(env="clerk-v0", payload={"wanted": "", "greeting": ""})

# --- leaks ---


class LeavesTasks(Clerk):
    expected = "close"

    async def begin(self, task: Task) -> Observation:
        self.background = asyncio.create_task(asyncio.sleep(3600))
        return await super().begin(task)


class LeavesThreads(Clerk):
    expected = "close"

    async def begin(self, task: Task) -> Observation:
        threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
        return await super().begin(task)


class StaysReferenced(Clerk):
    expected = "close"
    instances: ClassVar[list[Clerk]] = []

    async def begin(self, task: Task) -> Observation:
        self.instances.append(self)
        return await super().begin(task)


class KeepsTranscripts(Clerk):
    expected = "memory"
    transcripts: ClassVar[list[str]] = []

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        self.transcripts.append("." * 8192 + action.text)
        return await super().act(action)


# --- claims ---


class ForkSharesState(Clerk):
    expected = "fork"

    async def begin(self, task: Task) -> Observation:
        self.counter = [0]
        return await super().begin(task)

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        self.counter[0] += 1
        seen, result = await super().act(action)
        return seen if seen is None else seen.replace(anchor=str(self.counter[0])), result


class LadderUpsideDown(Clerk):
    expected = "ladder"

    def ladder(self) -> dict[str, Policy]:
        found = super().ladder()
        return {"random": found["oracle"], "oracle": found["random"]}


class TwinTells(Clerk):
    expected = "hidden_twin"

    def reply(self, action: Action) -> str:
        return (
            super().reply(action)
            if action.tool_calls
            else f"Pardon? It has {len(self.task.payload['wanted'])} letters."
        )

    def hidden_twin(self, task: Task) -> Task:
        twin: Task = task.replace(
            payload={**task.payload, "wanted": "egg" if len(task.payload["wanted"]) > 3 else "apple"}
        )
        return twin


class TwinIsTheTask(Clerk):
    expected = "hidden_twin"

    def hidden_twin(self, task: Task) -> Task:
        return task


class HintRevealsTheAnswer(Clerk):
    expected = "hints"

    def hint(self, task: Task, level: int) -> str:
        return f"It begins with {task.payload['wanted'][0]}." if level > 2 else "Ask what is wanted."


class HintOfAnotherMood(Clerk):
    expected = "hints"

    def hint(self, task: Task, level: int) -> str:
        return f"Ask {random.random()} times."


class HintWithoutWords(Clerk):
    expected = "hints"

    def hint(self, task: Task, level: int) -> str:
        return "" if level > 3 else "Ask."


class AnswerWithoutWords(Clerk):
    expected = "answer"

    def answer(self, task: Task) -> str:
        return " "


class AnswerOfAnotherMood(Clerk):
    expected = "answer"

    def answer(self, task: Task) -> str:
        return f"{super().answer(task)} {random.random()}"


class AnswerThatIsNone(Clerk):
    expected = "answer"

    def answer(self, task: Task) -> str:
        return "What they say when asked."


BROKEN = [c for c in list(globals().values()) if isinstance(c, type) and issubclass(c, Clerk) and c is not Clerk]


PAIR = ("left", "right")


class Duel(Environment):
    """Two agents at once, three rounds; not broken. Each is told what the other said in the round before."""

    id = "duel-v0"
    capabilities = frozenset({"replay"})

    def __init__(self) -> None:
        self.round = 0

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        return (Task(env=self.id, split=split, seed=key(split, seed, n) >> 20) for n in count())

    async def reset(self, task: Task) -> dict[str, Observation]:
        self.round = 0
        return {name: say(f"{name}, round 0 of duel {task.seed}") for name in PAIR}

    async def step(self, actions: Mapping[str, Action]) -> StepResult:
        self.round += 1
        lengths = {name: len(action.text) for name, action in actions.items()}
        rewards = tuple(RewardTerm(name="long", value=lengths[n] / 100, agent=n, level="agent") for n in lengths)
        told = zip(PAIR, PAIR[::-1], strict=True)
        seen = {n: say(f"round {self.round}: the other said {lengths[other]}") for n, other in told}
        return StepResult(observations=seen, rewards=rewards, truncated=self.round >= 3)
