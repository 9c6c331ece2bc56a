"""Writers of the golden run folders in tests/core/golden: one for every schema of the records so far.

    python tests/golden_runs.py     writes the folders that are not there yet

A golden folder is written once, by the code of its day, and never again. `trajectories` is what all must read as.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from agentgym.shards import Entry, frame, start_of_shard
from agentgym.store import RunFolder
from agentgym.types import (
    Action,
    Array,
    Column,
    Columns,
    Draft,
    Episode,
    Failure,
    Floats,
    Ids,
    Image,
    MediaRef,
    Message,
    Observation,
    RewardTerm,
    Sampling,
    Segment,
    Task,
    Text,
    Timing,
    TokenSpan,
    ToolCall,
    Trajectory,
    Turn,
    Turns,
    VersionRun,
    say,
)

GOLDEN = Path(__file__).parent / "core" / "golden"
CONFIG = {"env": {"id": "golden-v0"}, "seed": 7}
TASK = Task(env="golden-v0", seed=7, payload={"goal": "ein Gruß"}, labels={"intent": "single"})


def simple() -> list[Trajectory]:
    """What schema 0 could say: one agent, text, rewards by name, an end or none."""
    found = []
    for member, (reward, done) in enumerate(((1.0, True), (0.0, False))):
        span = TokenSpan(prompt=Ids([1, 2]), ids=Ids([3, 4]), logprobs=Floats([-0.5, -0.25]))
        ledger = (RewardTerm(name="answer", value=reward, turn=0), RewardTerm(name="cost", value=-0.125, turn=0))
        turn = Turn(step=0, observation=say("grüß mich"), action=Action(text="hallo", span=span), rewards=ledger)
        found.append(
            Trajectory(
                env="golden-v0",
                episode=Episode(task=TASK, seed=40 + member, group="g1"),
                turns=Turns(items=(turn,)),
                status="terminated" if done else "truncated",
                metrics={"success": reward},
            )
        )
    broken = Trajectory(
        env="golden-v0",
        episode=Episode(task=TASK, seed=42, group="g1"),
        status="failed",
        failure=Failure(kind="tool", message="the shop is closed"),
    )
    return [*found, broken]


def rich() -> list[Trajectory]:
    """Every record of schema 1 at least once."""
    span = TokenSpan(
        prompt=Ids([1, 2]),
        ids=Ids([3, 4, 5]),
        suffix=Ids([6]),
        logprobs=Floats([-0.5, -0.25, -1.0]),
        sampled_logprobs=Floats([-0.375, -0.125, -0.75]),
        versions=(VersionRun(start=0, version=3), VersionRun(start=2, version=4)),
        segments=(Segment(label="think", start=0, stop=2),),
        sampling=Sampling(temperature=0.5, stop=("</s>",)),
        finish="stop",
        branch=1,
        parent=(0, 2),
        call_id="c1",
        media=(MediaRef(hash="ab12", grid=(1, 2, 2), start=1, length=4),),
        context="hinted",
    )
    seen = Message(role="user", content=(Text(text="look"), Image(media=MediaRef(hash="ab12"))))
    call = ToolCall(name="search", arguments={"query": "red", "page": 1}, id="t1")
    turn = Turn(
        step=0,
        agent="buyer",
        observation=Observation(messages=(seen,), tools=({"name": "search"},), anchor="s0"),
        action=Action(text="find", tool_calls=(call,), span=span),
        drafts=(Draft(by="buyer", action=Action(text="steal"), reason="policy"),),
        rewards=(RewardTerm(name="tool", value=0.5, level="segment", turn=0, agent="buyer", segment=(0, 2)),
                 RewardTerm(name="phi.drift", value=-0.25, turn=0, cause="world")),
        timing=Timing(start=0.5, policy=0.25, environment=0.125),
    )  # fmt: skip
    language = Trajectory(
        env="golden-v0",
        env_version="3",
        episode=Episode(task=TASK, seed=1, member=2, group="g2"),
        turns=Turns(items=(turn,)),
        status="truncated",
        final={"buyer": say("time is up")},
        labels={"hint": "none"},
        seconds=1.5,
        code_version="0.1.0",
    )
    column = Column(
        steps=Ids([0, 1]),
        observations=Array.of([[0.5, 1.0], [1.5, 2.0]]),
        actions=Array.of([1, 0]),
        masks=Array.of([[True, True], [False, True]]),
        rewards={"reward": Floats([1.0, 0.5])},
        logprobs=Floats([-0.5, -0.25]),
        values=Floats([0.5, 0.25]),
        states=Array.of([[0.0], [1.0]]),
    )
    numeric = Trajectory(
        env="golden-v0",
        episode=Episode(task=TASK, seed=2),
        turns=Columns(agents={"left": column, "right": column}),
        status="terminated",
        metrics={"success": 1.0},
    )
    return [language, numeric]


def old(t: Trajectory) -> dict[str, object]:
    """A trajectory as schema 0 wrote it: task and seed in the open, `done`, a bare list of turns, rewards by name."""
    turns = [
        {
            "observation": {"messages": [{"role": "user", "content": turn.observation.messages[0].text}]},
            "action": {
                "text": turn.action.text,
                "span": {"prompt": turn.action.span.prompt.data, "ids": turn.action.span.ids.data,
                         "logprobs": turn.action.span.logprobs.data},
            },
            "rewards": {term.name: term.value for term in turn.rewards},
        }
        for turn in t.turns.items
    ]  # fmt: skip
    failure = {"failure": {"kind": t.failure.kind, "message": t.failure.message}} if t.failure else {}
    task = msgspec.to_builtins(t.task)
    return {"env": t.env, "task": task, "seed": t.episode.seed, "group": t.episode.group, "turns": turns,
            "done": t.status == "terminated", "metrics": dict(t.metrics), **failure}  # fmt: skip


def write_0(path: Path) -> None:
    (path / "trajectories").mkdir(parents=True)
    (path / "config.toml").write_text('seed = 7\n\n[env]\nid = "golden-v0"\n')
    data, lines = start_of_shard(0), []
    for i, t in enumerate(simple()):
        record = frame(msgspec.msgpack.encode(old(t)), i, float(i))
        lines.append(Entry(shard=0, offset=len(data), length=len(record), episode=t.episode.id, group=t.episode.group,
                           status=t.status, value=float(i), step=i))  # fmt: skip
        data += record
    (path / "trajectories" / "000000.shard").write_bytes(data)
    index = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
    (path / "trajectories" / "index.jsonl").write_bytes(index)


def write_2(path: Path) -> None:
    with RunFolder.create(path, CONFIG) as run:
        for i, t in enumerate([*simple(), *rich()]):
            run.append(t, step=i, value=float(i))
        run.log({"step": 1, "loss": 0.5})
        with run.checkpoint(1, {"updates": 1}) as folder:
            (folder / "weights.txt").write_text("here\n")


WRITERS = {0: write_0, 2: write_2}  # that of schema 1 was the code of its day

if __name__ == "__main__":
    for schema, write in WRITERS.items():
        if not (GOLDEN / f"schema-{schema}").exists():
            write(GOLDEN / f"schema-{schema}")
