"""The torch engine against transformers' `generate`: `agentgym bench engine [--json] [--set sessions=64]`.

Sessions of several turns on a random Qwen3-class model. Turn k of session i adds a prompt and samples a reply whose
lengths are drawn once from (seed, i, k) and are the same for everybody, so the context grows alike. Only sampled
tokens of these lengths count as tokens. Rounds alternate between the contestants, so that a loaded machine shifts all.

    engine             sessions act on their own, cache kept between turns, log-probs of every token recorded
    generate           one batch a turn over whole conversations, left-padded; it runs until the longest reply is whole
    generate + cache   the same with the `DynamicCache` of the turn before; only new prompts are prefilled

`generate` records no log-probs here. `lengths="equal"` gives all sessions the same lengths in a turn: its best case.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from agentgym.bench.measure import machine, markdown, spread
from agentgym.errors import ConfigError, unknown
from agentgym.modeling import build
from agentgym.modeling.renderer import Renderer
from agentgym.modeling.tokenizer import closed_vocabulary
from agentgym.types import Episode, Sampling, Task, say
from agentgym_policies.torch_engine import TorchEngine

WORDS = 290
PROMPT, REPLY = (8, 40), (8, 56)
"""Words of a prompt, tokens of a reply: uniform, bounds included."""


class Schedule:
    """Prompts [sessions][turns] (text) and reply lengths [sessions, turns], drawn once."""

    def __init__(self, sessions: int, turns: int, lengths: str, seed: int) -> None:
        if lengths not in ("drawn", "equal"):
            raise unknown("distribution of lengths", lengths, ("drawn", "equal"))
        rng = np.random.default_rng(seed)
        shape = (sessions if lengths == "drawn" else 1, turns)
        prompts = np.broadcast_to(rng.integers(*PROMPT, shape, endpoint=True), (sessions, turns))
        self.replies = np.broadcast_to(rng.integers(*REPLY, shape, endpoint=True), (sessions, turns)).copy()
        self.prompts = [[" ".join(f"w{w}" for w in rng.integers(0, WORDS, n)) for n in row] for row in prompts]
        self.sessions, self.turns, self.tokens = sessions, turns, int(self.replies.sum())


class Endless(Renderer):
    """Replies end by their length alone."""

    end_ids = frozenset()


def engine(
    sessions: int = 64,
    turns: int = 8,
    hidden: int = 256,
    layers: int = 4,
    lengths: str = "drawn",
    threads: int = 1,
    rounds: int = 3,
    seed: int = 0,
    out: str = "",
) -> dict[str, Any]:
    """Sampled tokens per second of each contestant, and ratios within each round. `out` also writes Markdown."""
    if min(sessions, turns, rounds, threads) < 1:
        raise ConfigError("sessions, turns, rounds and threads are at least 1")
    torch.set_num_threads(threads)
    tokenizer = closed_vocabulary(f"w{i}" for i in range(WORDS))
    model = build.tiny(len(tokenizer), hidden=hidden, layers=layers, seed=seed)
    plan, renderer = Schedule(sessions, turns, lengths, seed), Endless(tokenizer)
    rates: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(rounds):
        for name, play in CONTESTANTS.items():
            began = perf_counter()
            play(model, renderer, plan)
            rates[name].append(plan.tokens / (perf_counter() - began))
    figures = {
        "machine": machine(("torch", "transformers", "agentgym-suite")),
        "settings": {
            "sessions": sessions,
            "turns": turns,
            "parameters": build.parameters(model),
            "lengths": lengths,
            "sampled tokens": plan.tokens,
            "threads": threads,
            "rounds": rounds,
            "seed": seed,
        },
        "tokens per second": [_row(name, rates) for name in CONTESTANTS],
    }
    if out:
        Path(out).write_text(markdown("Torch engine against generate", figures), encoding="utf-8")
    return figures


def _row(name: str, rates: dict[str, list[float]]) -> dict[str, Any]:
    ratios = [ours / theirs for ours, theirs in zip(rates["engine"], rates[name], strict=True)]
    return {
        "contestant": name,
        "tokens/s": spread(rates[name], 0),
        "engine is faster by": spread(ratios, 2),
        "ratio": round(median(ratios), 3),
    }


def _engine(model: Any, renderer: Renderer, plan: Schedule) -> None:
    length = sum(max(len(t.split()) + 8 for t in turn) for turn in zip(*plan.prompts, strict=True))
    contender = TorchEngine(model, renderer, slots=plan.sessions, max_length=length + int(plan.replies.max(0).sum()))

    async def play(i: int) -> None:
        async with contender.session(Episode(task=Task(env="bench"), seed=i), "agent") as session:
            for prompt, n in zip(plan.prompts[i], plan.replies[i].tolist(), strict=True):
                action = await session.act(say(prompt), Sampling(max_tokens=n))
                assert len(getattr(action.span, "logprobs", ())) == n

    async def everyone() -> None:
        await asyncio.gather(*(play(i) for i in range(plan.sessions)))

    asyncio.run(everyone())
    contender.close()


class LengthReached(StoppingCriteria):
    """A row is done once its own reply has its length."""

    def __init__(self, start: int, replies: NDArray[np.int64]) -> None:
        self.stop = start + torch.from_numpy(replies)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.stop <= input_ids.shape[1]


def _left_padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask


def _sample(model: Any, ids: torch.Tensor, mask: torch.Tensor, replies: NDArray[np.int64], cache: Any) -> torch.Tensor:
    """All sampled columns [B, longest reply]."""
    found: torch.Tensor = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        do_sample=True,
        top_k=0,
        max_new_tokens=int(replies.max()),
        stopping_criteria=StoppingCriteriaList([LengthReached(ids.shape[1], replies)]),
        pad_token_id=0,
        eos_token_id=None,
    )
    return found[:, ids.shape[1] :]


def _generate(model: Any, renderer: Renderer, plan: Schedule) -> None:
    conversations = [renderer.conversation() for _ in range(plan.sessions)]
    for turn in range(plan.turns):
        for conversation, prompts in zip(conversations, plan.prompts, strict=True):
            conversation.observe(say(prompts[turn]).messages)
        ids, mask = _left_padded([c.ids for c in conversations], 0)
        sampled = _sample(model, ids, mask, plan.replies[:, turn], None)
        for conversation, row, n in zip(conversations, sampled.tolist(), plan.replies[:, turn].tolist(), strict=True):
            conversation.reply(row[:n])


def _generate_cached(model: Any, renderer: Renderer, plan: Schedule) -> None:
    """Rows that ended early leave holes in the cache, which the mask hides."""
    conversations = [renderer.conversation() for _ in range(plan.sessions)]
    cache = DynamicCache(config=model.config)
    ids = mask = torch.zeros(plan.sessions, 0, dtype=torch.int64)
    pending: list[list[int]] = [[] for _ in conversations]
    for turn in range(plan.turns):
        for added, conversation, prompts in zip(pending, conversations, plan.prompts, strict=True):
            added += conversation.observe(say(prompts[turn]).messages).ids
        new_ids, new_mask = _left_padded(pending, 0)
        ids, mask = torch.cat([ids, new_ids], 1), torch.cat([mask, new_mask], 1)
        replies = plan.replies[:, turn]
        sampled = _sample(model, ids, mask, replies, cache)
        real = torch.arange(sampled.shape[1]) < torch.from_numpy(replies)[:, None]
        ids, mask = torch.cat([ids, sampled], 1), torch.cat([mask, real.long()], 1)
        pending = [
            conversation.reply(row[:n])
            for conversation, row, n in zip(conversations, sampled.tolist(), replies.tolist(), strict=True)
        ]


CONTESTANTS: dict[str, Callable[[Any, Renderer, Schedule], None]] = {
    "engine": _engine,
    "generate": _generate,
    "generate + cache": _generate_cached,
}
