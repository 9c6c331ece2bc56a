"""The torch engine against `generate` of transformers and vLLM: `agentgym bench engine [--set sizes=0.6M,3M,25M]`.

Sessions of several turns on a random Qwen3-class model. Turn k of session i adds a prompt and samples a reply whose
lengths are drawn once from (seed, i, k) and are the same for everybody, so the context grows alike. Only sampled
tokens of these lengths count as tokens. Rounds alternate between the contestants, so that a loaded machine shifts all.

    engine             sessions act on their own, cache kept between turns, log-probs of every token recorded
    engine, no reuse   the same, but each turn begins without a cache
    generate           one batch a turn over whole conversations, left-padded; it runs until the longest reply is whole
    generate + cache   the same with the `DynamicCache` of the turn before; only new prompts are prefilled
    vllm               with `vllm_python`, the interpreter of an environment that has vLLM: `VllmEngine` in a process
                       of its own, sessions as for `engine`, with and without its prefix cache

`generate` records no log-probs here. `lengths="equal"` gives all sessions the same lengths in a turn: its best case.
"""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from subprocess import PIPE
from time import perf_counter
from typing import IO, Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from agentgym.bench.measure import machine, markdown, spread
from agentgym.errors import ConfigError, EngineFault, unknown
from agentgym.modeling import build
from agentgym.modeling.renderer import Renderer
from agentgym.modeling.tokenizer import closed_vocabulary
from agentgym.types import Episode, Sampling, Task, say
from agentgym_policies.torch_engine import TorchEngine

SIZES: dict[str, dict[str, int]] = {
    "0.6M": {"hidden": 128, "layers": 3},
    "3M": {"hidden": 256, "layers": 4},
    "25M": {"hidden": 512, "layers": 8, "heads": 8, "kv_heads": 4},
}
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

    @property
    def length(self) -> int:
        """Tokens that no session exceeds: marks and role names of a turn are at most eight."""
        prompts = sum(max(len(text.split()) + 8 for text in turn) for turn in zip(*self.prompts, strict=True))
        return prompts + int(self.replies.max(0).sum())


class Endless(Renderer):
    """Replies end by their length alone."""

    end_ids = frozenset()


Play = Callable[[Any, Renderer, Schedule], None]


def engine(
    sizes: str | Sequence[str] = "3M",
    sessions: int = 64,
    turns: int = 8,
    lengths: str = "drawn",
    threads: int = 1,
    rounds: int = 3,
    seed: int = 0,
    vllm_python: str = "",
    out: str = "",
) -> dict[str, Any]:
    """Sampled tokens per second of each contestant on each size of model, and ratios within each round.

    `sizes` are those of `SIZES`. `out` also writes Markdown.
    """
    if min(sessions, turns, rounds, threads) < 1:
        raise ConfigError("sessions, turns, rounds and threads are at least 1")
    torch.set_num_threads(threads)
    plan, found = Schedule(sessions, turns, lengths, seed), machine(("torch", "transformers", "agentgym-suite"))
    rows = []
    for size in sizes.split(",") if isinstance(sizes, str) else sizes:
        if size not in SIZES:
            raise unknown("size", size, SIZES)
        rows += _race(size, plan, threads, rounds, vllm_python, found)
    figures = {
        "machine": found,
        "settings": {
            "sessions": sessions,
            "turns": turns,
            "lengths": lengths,
            "sampled tokens": plan.tokens,
            "threads": threads,
            "rounds": rounds,
            "seed": seed,
        },
        "tokens per second": rows,
    }
    if out:
        Path(out).write_text(markdown("Torch engine against generate and vLLM", figures), encoding="utf-8")
    return figures


def _race(
    size: str, plan: Schedule, threads: int, rounds: int, vllm_python: str, found: dict[str, str]
) -> list[dict[str, Any]]:
    """A row per contestant. What vLLM says of its versions joins what was `found`."""
    tokenizer = closed_vocabulary(f"w{i}" for i in range(WORDS))
    model, renderer = build.tiny(len(tokenizer), **SIZES[size]), Endless(tokenizer)
    with ExitStack() as stack:
        contestants = dict(CONTESTANTS)
        for name in ("vllm", "vllm, no reuse") if vllm_python else ():
            there = _vllm(vllm_python, model, renderer, plan, threads, reuse=name == "vllm")
            contestants[name], versions = stack.enter_context(there)
            found |= versions
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(rounds):
            for name, play in contestants.items():
                began = perf_counter()
                play(model, renderer, plan)
                rates[name].append(plan.tokens / (perf_counter() - began))
    about = {"model": size, "parameters": build.parameters(model)}
    return [about | _row(name, rates) for name in contestants]


def _row(name: str, rates: dict[str, list[float]]) -> dict[str, Any]:
    ratios = [ours / theirs for ours, theirs in zip(rates["engine"], rates[name], strict=True)]
    return {
        "contestant": name,
        "tokens/s": spread(rates[name], 0),
        "engine is faster by": spread(ratios, 2),
        "ratio": round(median(ratios), 3),
    }


def play_sessions(engine: Any, plan: Schedule, *, reuse: bool = True) -> None:
    """The plan, each session at its own pace. Without `reuse`, a turn ends with the session's cache given back."""

    async def play(i: int) -> None:
        async with engine.session(Episode(task=Task(env="bench"), seed=i), "agent") as session:
            for prompt, n in zip(plan.prompts[i], plan.replies[i].tolist(), strict=True):
                action = await session.act(say(prompt), Sampling(max_tokens=n))
                assert len(getattr(action.span, "logprobs", ())) == n
                if not reuse:
                    session.release()

    async def everyone() -> None:
        await asyncio.gather(*(play(i) for i in range(plan.sessions)))

    asyncio.run(everyone())


def _engine(model: Any, renderer: Renderer, plan: Schedule, *, reuse: bool = True) -> None:
    contender = TorchEngine(
        model, renderer, slots=plan.sessions, max_length=plan.length, threads=torch.get_num_threads()
    )
    play_sessions(contender, plan, reuse=reuse)
    contender.close()


@contextmanager
def _vllm(
    python: str, model: Any, renderer: Renderer, plan: Schedule, threads: int, *, reuse: bool
) -> Iterator[tuple[Play, dict[str, str]]]:
    """vLLM in another interpreter, told and answering in lines of JSON: how to play a round there, and its versions."""
    with (
        tempfile.TemporaryDirectory(prefix="agentgym-bench-") as folder,
        Path(folder, "log").open("w+", encoding="utf-8") as log,
        subprocess.Popen(
            [python, "-m", "agentgym_policies.bench_vllm"], stdin=PIPE, stdout=PIPE, stderr=log, text=True
        ) as process,  # the end of its input ends it
    ):
        path = build.save(model, renderer.tokenizer, Path(folder) / "model")
        told = {"path": str(path), "threads": threads, "reuse": reuse, "length": plan.length}
        versions = _ask(process, log, {**told, "prompts": plan.prompts, "replies": plan.replies.tolist()})

        def play(*_: object) -> None:
            _ask(process, log, {})

        yield play, versions


def _ask(process: subprocess.Popen[str], log: IO[str], what: dict[str, Any]) -> dict[str, str]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(msgspec.json.encode(what).decode() + "\n")
        process.stdin.flush()
        return msgspec.json.decode(process.stdout.readline(), type=dict[str, str])
    except (OSError, msgspec.DecodeError) as error:
        log.seek(0)
        raise EngineFault(f"vLLM's side of the benchmark ended: {log.read()[-2000:]}") from error


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


CONTESTANTS: dict[str, Play] = {
    "engine": _engine,
    "engine, no reuse": partial(_engine, reuse=False),
    "generate": _generate,
    "generate + cache": _generate_cached,
}
