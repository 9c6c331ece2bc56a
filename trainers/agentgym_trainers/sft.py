"""The warm start: random sequences to copy, then a teacher's episodes to imitate.

Demonstrations are played through the normal runner and rendered through the normal renderer, so that their ids are
exactly those the engine sees and samples later on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import accumulate
from typing import Any

import numpy as np

from agentgym.env import Environment, task_list
from agentgym.errors import ConfigError, unknown
from agentgym.modeling.renderer import Renderer
from agentgym.policy import Policy, Session
from agentgym.rollout import Runner, episodes
from agentgym.seeding import key, rng, share
from agentgym.types import Batch, Episode, Ids, TokenSpan, Trajectory, Turns, iterate
from agentgym_trainers.config import Config, WarmupConfig

# --- copy warm-up -----------------------------------------------------------------------------------------------


def copy_batch(config: WarmupConfig, vocabulary: Sequence[int], seed: int, step: int) -> Batch:
    """`batch` packed sequences of different random tokens, repeated; all but the first time is trained on."""
    g = np.random.default_rng(key(seed, "warm-up", step))
    low, high = config.length
    most = min(high, len(vocabulary))
    said = [g.permutation(vocabulary)[: g.integers(min(low, most), most + 1)] for _ in range(config.batch)]
    lengths = [len(x) * config.copies for x in said]
    total = sum(lengths)
    return Batch(
        ids=np.concatenate([np.tile(x, config.copies) for x in said]).astype(np.int32),
        positions=np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        bounds=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        mask=np.concatenate([np.arange(n) >= n // config.copies for n in lengths]).astype(np.float32),
        advantages=np.ones(total, np.float32),
        logprobs=np.zeros(total, np.float32),
        versions=np.full(total, -1, np.int32),
        turns=np.zeros(total, np.int32),
        owners=np.arange(len(said), dtype=np.int32),
        segments=np.zeros(total, np.int16),
    )


def plain_tokens(tokenizer: Any) -> list[int]:
    """Every id that is no special token."""
    special = set(tokenizer.all_special_ids)
    return [i for i in range(len(tokenizer)) if i not in special]


# --- demonstrations ---------------------------------------------------------------------------------------------


class Mixture:
    """A policy that plays each episode by one of several, drawn by weight and keyed by the episode."""

    def __init__(self, policies: Mapping[str, Policy], weights: Mapping[str, float]) -> None:
        if not weights or min(weights.values()) <= 0:
            raise ConfigError(f"a mixture names at least one policy, with weights above 0; got {dict(weights)}")
        for name in weights:
            if name not in policies:
                raise unknown("teacher", name, policies)
        self.policies = [policies[name] for name in weights]
        self.edges = list(accumulate(weight / sum(weights.values()) for weight in weights.values()))

    def session(self, episode: Episode, agent: str) -> AbstractAsyncContextManager[Session]:
        drawn = share(episode.seed, episode.member, "mixture")
        index = next((i for i, edge in enumerate(self.edges) if drawn < edge), len(self.edges) - 1)
        return self.policies[index].session(episode, agent)


def teacher(config: Config, env: Environment) -> Mixture:
    """The teacher of the config, out of the environment's demonstrations or its ladder."""
    known = env.demonstrations() if hasattr(env, "demonstrations") else env.ladder()
    return Mixture(known, config.sft.teacher)


async def demonstrate(config: Config, env: Environment, count: int) -> list[Trajectory]:
    """`count` episodes of the teacher on training tasks; failed ones are left out."""
    tasks = task_list(env, "train", key(config.run.seed, "demonstrations") >> 33, count)
    runner = Runner(env, teacher(config, env), concurrency=64, limits=config.rollout.limits)
    found = await runner.collect(episodes(tasks, seed=config.run.seed))
    return [t for t in found if t.status != "failed"]


def with_spans(renderer: Renderer, trajectory: Trajectory) -> Trajectory:
    """The episode as if a model had sampled it: every action gets its token span, without log-probs."""
    conversations: dict[str, Any] = {}
    turns = []
    for turn in iterate(trajectory.turns):
        conversation = conversations.setdefault(turn.agent, renderer.conversation())
        prompt = conversation.observe(turn.observation.messages, turn.observation.tools)
        ids = renderer.ids_of(turn.action)
        suffix = conversation.reply(ids)
        span = TokenSpan(
            prompt=Ids(prompt.ids), ids=Ids(ids), suffix=Ids(suffix), branch=prompt.branch, parent=prompt.parent
        )
        turns.append(turn.replace(action=turn.action.replace(span=span)))
    shown: Trajectory = trajectory.replace(turns=Turns(items=tuple(turns)))
    return shown


def batch_of(demonstrations: Sequence[Trajectory], size: int, seed: int, step: int) -> list[Trajectory]:
    """The demonstrations of one step: each epoch takes all of them once, in a keyed random order."""
    count = len(demonstrations)
    places = range(step * size, (step + 1) * size)
    orders = {epoch: _order(count, seed, epoch) for epoch in {p // count for p in places}}
    return [demonstrations[orders[p // count][p % count]] for p in places]


def _order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    rng(seed, "demonstrations", epoch).shuffle(order)
    return order


def ones(trajectories: Sequence[Trajectory]) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """Advantage one for every turn: imitation."""
    return [np.ones(len(t.turns)) for t in trajectories]
