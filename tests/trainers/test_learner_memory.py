"""At a vocabulary of 150,000, peak memory does not grow with vocabulary times tokens, however the model is read."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd.profiler import profile

from agentgym.modeling import build, logprobs
from agentgym.types import Batch
from agentgym_trainers.forward import Forward
from agentgym_trainers.objective.declare import Distillation, Entropy, Layer, Objective, Perception

VOCABULARY, FEW, MANY, ROWS = 150_000, 48, 128, 10
OBJECTIVES = {
    "plain": Objective(),
    "entropy": Objective(regularisers=(Entropy(),)),
    "layer": Objective(source=Layer(layer=1), proximal="learner"),
    "masked": Objective(regularisers=(Perception(),)),
    "teacher": Objective(regularisers=(Distillation(),)),
}


@functools.cache
def model(seed: int) -> Any:
    return build.tiny(VOCABULARY, hidden=8, layers=2, heads=1, kv_heads=1, seed=seed)


def batch(tokens: int) -> Batch:
    """Sequences of 16 tokens, all but the first of each trained."""
    positions = np.tile(np.arange(16), tokens // 16)
    return Batch(
        ids=np.random.default_rng(0).integers(0, VOCABULARY, tokens).astype(np.int32),
        positions=positions.astype(np.int32),
        bounds=np.arange(0, tokens + 1, 16),
        mask=(positions > 0).astype(np.float32),
        advantages=np.ones(tokens, np.float32),
        logprobs=np.zeros(tokens, np.float32),
        versions=np.zeros(tokens, np.int32),
        turns=np.zeros(tokens, np.int32),
        owners=np.arange(tokens // 16, dtype=np.int32),
        segments=np.zeros(tokens, np.int16),
    )


def peak(objective: Objective, tokens: int) -> int:
    """Bytes of tensors that exist at once, at most, in a forward and a backward pass over so many tokens."""
    policy = model(0)
    policy.zero_grad()
    forward = Forward(objective, policy, teacher=model(1))
    with profile(profile_memory=True) as seen:
        found = forward.tokens(forward.prepare(batch(tokens), 0))
        leaves = (found.logp, found.entropy, found.masked, found.divergence)
        torch.stack([x.sum() for x in leaves if x is not None and x.requires_grad]).sum().backward()
    results: Any = seen.kineto_results
    moved = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in moved))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_memory_does_not_grow_with_vocabulary_times_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of ten rows, so that few tokens are enough to have several."""
    monkeypatch.setattr(logprobs, "LOGITS", ROWS * VOCABULARY)
    few, many = (peak(OBJECTIVES[name], tokens) for tokens in (FEW, MANY))
    assert few > 4 * ROWS * VOCABULARY, "at least one chunk of logits was seen"
    assert many - few < 0.1 * 4 * VOCABULARY * (MANY - FEW)
