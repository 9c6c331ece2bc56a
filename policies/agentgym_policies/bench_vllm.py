"""vLLM's side of `agentgym bench engine`, run by an interpreter that has vLLM; lines of JSON in, lines of JSON out.

The first line holds the model's folder and the plan, and is answered with versions once vLLM serves. Each line after it
asks for one round, and is answered when that is played. The end of the input ends it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from importlib import import_module
from typing import Any, TextIO

import msgspec
import numpy as np

from agentgym.modeling import tokenizer
from agentgym_policies.bench import Endless, Schedule, play_sessions
from agentgym_policies.vllm_engine import VllmEngine


class Told(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line. `replies` [sessions][turns] are tokens, `length` bounds a session."""

    path: str
    threads: int
    reuse: bool
    length: int
    prompts: list[list[str]]
    replies: list[list[int]]

    def plan(self) -> Schedule:
        plan = Schedule(len(self.prompts), len(self.prompts[0]), "drawn", 0)
        plan.prompts, plan.replies = self.prompts, np.array(self.replies)
        return plan


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    told = msgspec.json.decode(sys.stdin.readline(), type=Told)
    plan, renderer = told.plan(), Endless(tokenizer.load(told.path))
    options: dict[str, Any] = {"enable_prefix_caching": told.reuse}
    engine = VllmEngine(
        told.path, renderer, slots=plan.sessions, max_length=told.length, threads=told.threads, **options
    )
    try:
        _answer(answers, {f"{name} (vllm)": str(import_module(name).__version__) for name in ("vllm", "torch")})
        for _ in sys.stdin:
            play_sessions(engine, plan)
            asyncio.run(engine._guarded(engine._llm.reset_prefix_cache()))  # the next round begins like this one
            _answer(answers, {})
    finally:
        engine.close()


def _answer(answers: TextIO, what: dict[str, str]) -> None:
    answers.write(msgspec.json.encode(what).decode() + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
