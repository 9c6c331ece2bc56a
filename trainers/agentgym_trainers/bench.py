"""`agentgym bench objectives`: what loss and advantages of each method cost, beside plain GRPO and TRL's loss.

Measured is what an update adds to the model's passes: from composed rewards to a number per turn, per token, the loss
and its gradient by the log-probs. Methods take turns within a repeat, so that what else the machine does meets all, and
a ratio is one of neighbours in time. TRL's loss stands on the same numbers in its own layout, padded [B, T].
"""

from __future__ import annotations

import importlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentgym.advantages import advantages
from agentgym.bench.measure import machine, markdown, spread
from agentgym.collate import collate
from agentgym.errors import unknown
from agentgym.rewards import Composed, composer
from agentgym.types import (
    Action,
    Episode,
    Floats,
    Ids,
    Observation,
    RewardTerm,
    Task,
    TokenSpan,
    Trajectory,
    Turn,
    Turns,
)
from agentgym_trainers.forward import columns
from agentgym_trainers.methods import Declaration, declared, load, names
from agentgym_trainers.objective.aggregations import totals
from agentgym_trainers.objective.compute import loss
from agentgym_trainers.objective.declare import Distillation, Perception
from agentgym_trainers.objective.tokens import Tokens

TURNS, LENGTH, GROUP = 4, 64, 8
"""Turns of an episode, sampled tokens of a turn, members of a group."""
BASE = "grpo"


def objectives(
    tokens: int = 1_000_000,
    repeats: int = 5,
    methods: str | Sequence[str] = "",
    seed: int = 0,
    trl: bool = True,
    out: str = "",
) -> dict[str, Any]:
    """A row per method: milliseconds per million tokens, ratio to plain GRPO, peak memory of the loss.

    `methods` names some of them ("gspo,bapo"; empty: all), `out` also writes Markdown. Methods of the preference and
    candidate families have no loss of this shape and are left out.
    """
    load_ = Load.made(tokens, seed)
    works = {name: Work(declared(load(name)), load_) for name in _chosen(methods)}
    seconds = _interleaved({name: work.run for name, work in works.items()}, repeats)
    scale = 1e3 * 1e6 / len(load_.tokens.logp)
    figures = {
        "machine": {**machine(("torch", "numpy", "trl")), "threads": torch.get_num_threads()},
        "reading": "median (lowest - highest) of the repeats, milliseconds per million tokens; a ratio is taken within "
        "each repeat",
        "settings": {
            "tokens": len(load_.tokens.logp),
            "episodes": len(load_.samples),
            "repeats": repeats,
            "seed": seed,
        },
        "methods": [_row(name, work, seconds, scale) for name, work in works.items()],
    }
    if trl:
        figures["beside TRL"] = _beside(load_, repeats, scale)
    if out:
        Path(out).write_text(markdown("What objectives cost", figures), encoding="utf-8")
    return figures


def _chosen(methods: str | Sequence[str]) -> list[str]:
    """The methods asked for, plain GRPO first; all that have a loss over tokens where none is."""
    listed = methods.split(",") if isinstance(methods, str) else methods
    asked = [name.strip() for name in listed if name.strip()]
    for name in asked:
        if name not in names():
            raise unknown("objective", name, names())
    found = [n for n in asked or names() if not load(n).table.keys() & {"preference", "candidates"}]
    return [BASE, *(name for name in found if name != BASE)]


# --- what is measured -------------------------------------------------------------------------------------------


class Load(NamedTuple):
    """Episodes with their composed rewards and a critic's values, and their tokens as a learner would have them."""

    samples: list[tuple[Trajectory, Composed]]
    values: list[NDArray[np.float64]]
    tokens: Tokens

    @classmethod
    def made(cls, tokens: int, seed: int) -> Load:
        g = np.random.default_rng(seed)
        episodes = max(tokens // (TURNS * LENGTH) // GROUP, 1) * GROUP
        played = [_episode(g, n // GROUP, n % GROUP) for n in range(episodes)]
        compose = composer({"op": "sum"}, debug=False)
        samples = [(t, compose.trajectory(t)) for t in played]
        values = [np.zeros(TURNS)] * episodes
        (batch,) = collate(played, values, max_tokens=10**12, rewards=[c.value for _, c in samples])
        return cls(samples, values, columns(batch, torch.zeros(())))


def _episode(g: np.random.Generator, group: int, member: int) -> Trajectory:
    turns = []
    for k in range(TURNS):
        amounts = {"tool": g.normal(), "action": g.normal(), "outcome": float(k == TURNS - 1) * g.normal()}
        span = TokenSpan(prompt=Ids([1]), ids=Ids(g.integers(0, 9, LENGTH)), logprobs=Floats(g.normal(-1, 0.1, LENGTH)))
        rewards = tuple(RewardTerm(name=name, value=value, turn=k) for name, value in amounts.items())
        seen = Observation(anchor=f"s{g.integers(3)}")
        turns.append(Turn(step=k, observation=seen, action=Action(span=span), rewards=rewards))
    return Trajectory(
        env="bench",
        episode=Episode(task=Task(env="bench", seed=group), member=member, group=f"g{group}"),
        turns=Turns(items=tuple(turns)),
        status="terminated",
        metrics={"greedy": 0.4, "reference": 0.6},
        labels={
            "experience": ("with", "without")[member % 2],
            "guided": ("yes", "no")[member % 2],
            "domain": f"d{group % 4}",
        },
    )


@dataclass(frozen=True)
class Work:
    """One method's advantages and loss on a load."""

    method: Declaration
    load: Load

    def run(self) -> None:
        self.differentiate(self.credit())

    def credit(self) -> Tensor:
        """The advantage of every token [M]."""
        m, load_ = self.method, self.load
        found = advantages(load_.samples, m.advantage, whiten=m.whiten, values=load_.values)
        return torch.from_numpy(np.repeat(np.concatenate(found), LENGTH).astype(np.float32))

    def differentiate(self, credit: Tensor) -> None:
        """The loss and its gradient by every column that carries one."""
        t = self.load.tokens
        entropy, masked, divergence = (t.logp.clone().requires_grad_() for _ in range(3))
        beside = replace(t, entropy=entropy, masked=masked, divergence=divergence, reference=t.logp)
        given = replace(beside, advantages=credit, old=t.logp - 0.01, logp=t.logp.clone().requires_grad_())
        found, _ = loss(self.method.objective, given, totals(self.method.objective.aggregation, given))
        found.backward()

    @property
    def second_forward(self) -> bool:
        """Whether the model is run once more for it, which this benchmark does not measure."""
        o = self.method.objective
        return o.needs_reference or any(isinstance(r, Perception | Distillation) for r in o.regularisers)


def _row(name: str, work: Work, seconds: dict[str, list[float]], scale: float) -> dict[str, Any]:
    own, base = seconds[name], seconds[BASE]
    credit = work.credit()
    parts = _interleaved({"credit": lambda: work.credit(), "loss": lambda: work.differentiate(credit)}, 1)
    return {
        "method": name,
        "ms per M tokens": spread([s * scale for s in own]),
        "x grpo": spread([a / b for a, b in zip(own, base, strict=True)], 2),
        "of it advantages": f"{parts['credit'][0] / (parts['credit'][0] + parts['loss'][0]):.0%}",
        "peak MB of the loss": round(peak(lambda: work.differentiate(credit)) / 1e6),
        "second forward": "yes" if work.second_forward else "",
    }


def _interleaved(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repeat; each repeat runs all of them once, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def peak(work: Callable[[], Any]) -> int:
    """The most bytes of tensors that were alive at once, by torch's own account of its allocations."""
    with (
        _silence(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found,
    ):
        work()
    held = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@contextmanager
def _silence() -> Iterator[None]:
    """Without what the profiler writes to the process's standard error whatever its log level."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# --- TRL --------------------------------------------------------------------------------------------------------

OURS, THEIRS = "ours", "TRL"
UNLIKE = (
    "the same log-probs and advantages through GRPOTrainer._compute_loss of the installed TRL and through our loss, "
    "gradient included, advantages and the model's passes excluded. TRL's tensors are padded [B, T]; the episodes here "
    "are of equal length, so nothing is padded, which is its best case. Both compute their figures (clipped share, KL)"
)


def _beside(load_: Load, repeats: int, scale: float) -> dict[str, Any]:
    """Our GRPO loss and TRL's, taking turns; without TRL only that it is missing."""
    try:
        theirs = _Theirs(load_)
    except ImportError:
        return {"TRL": "not installed (extra [compare])"}
    work = Work(declared(load(BASE)), load_)
    credit = work.credit()
    runs = {OURS: lambda: work.differentiate(credit), THEIRS: lambda: theirs.differentiate(credit)}
    seconds = _interleaved(runs, repeats)
    found: dict[str, Any] = {f"{name}, ms per M tokens": spread([x * scale for x in seconds[name]]) for name in runs}
    found["ours / TRL"] = spread([a / b for a, b in zip(seconds[OURS], seconds[THEIRS], strict=True)], 2)
    found |= {f"{name}, peak MB": round(peak(run) / 1e6) for name, run in runs.items()}
    return {**found, "reading": UNLIKE}


class _Theirs:
    """TRL's own loss, called on an object that has what it reads and no model."""

    def __init__(self, load_: Load) -> None:
        trainer: Any = importlib.import_module("trl").GRPOTrainer
        self.t, self.shape = load_.tokens, (load_.tokens.sequences, TURNS * LENGTH)
        self.bare = object.__new__(trainer)
        self.bare.__dict__ |= {
            **{"top_entropy_quantile": 1.0, "aux_loss_enabled": False, "off_policy_mask_threshold": None},
            **{"importance_sampling_level": "token", "loss_type": "grpo", "beta": 0.001, "use_vllm": False},
            **{"epsilon_low": 0.2, "epsilon_high": 0.2, "vllm_importance_sampling_correction": False},
            **{"current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False},
            "model": SimpleNamespace(training=True),
            "args": SimpleNamespace(delta=None, use_bias_correction_kl=False),
            "accelerator": SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
            "_metrics": defaultdict(lambda: defaultdict(list)),
        }

    def differentiate(self, credit: Tensor) -> None:
        """The same as `Work.differentiate` of plain GRPO."""
        logp = self.t.logp.clone().requires_grad_()
        seen = (logp.view(self.shape), logp.detach().view(self.shape), None)
        self.bare._get_per_token_logps_and_entropies = lambda *_, **__: seen
        ones = torch.ones(self.shape, dtype=torch.long)
        given = {
            **{"prompt_ids": ones[:, :1], "prompt_mask": ones[:, :1], "completion_ids": ones, "completion_mask": ones},
            "advantages": credit.view(self.shape),
            "old_per_token_logps": (self.t.logp - 0.01).view(self.shape),
            "ref_per_token_logps": self.t.logp.view(self.shape),
        }
        self.bare._compute_loss(None, given).backward()
