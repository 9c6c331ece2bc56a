"""From logits to tokens: temperature, top-k, top-p, and inversion of the cumulative distribution by keyed noise.

A token is drawn as the first one whose cumulative probability exceeds a uniform number that depends on (seed, session,
turn, position) alone. So what a session samples does not depend on who shares its batch. Shapes: R rows, V tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentgym.errors import ConfigError, ModelError
from agentgym.seeding import uniforms
from agentgym.types import Sampling

ONE = 2**52
"""Probability 1 where probabilities are added up."""


class Drawn(NamedTuple):
    """One token per row, its log-prob under the raw model, and under the distribution it was drawn from; each [R]."""

    ids: list[int]
    logprobs: list[float]
    processed: list[float]


def check(sampling: Sampling) -> Sampling:
    """The sampler's parameters, or an error that names the one that cannot be meant."""
    if not (sampling.temperature >= 0 and 0 < sampling.top_p <= 1 and sampling.top_k >= 0 and sampling.max_tokens >= 1):
        raise ConfigError(
            "sampling needs temperature >= 0 (0 is greedy), 0 < top_p <= 1, top_k >= 0 (0 is all) and max_tokens >= 1;"
            f" got {sampling}"
        )
    return sampling


def processed_logprobs(logprobs: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """[R, V] raw log-probs -> those of the distribution drawn from, -inf where cut: temperature, top-k, top-p."""
    device = logprobs.device
    temperature = torch.tensor([s.temperature for s in samplings], device=device)[:, None]
    found = (logprobs / temperature.clamp_min(1e-6)).log_softmax(-1)
    if any(s.temperature == 0 for s in samplings):
        best = torch.full_like(found, -torch.inf).scatter(-1, logprobs.argmax(-1, keepdim=True), 0.0)
        found = torch.where(temperature == 0, best, found)
    if any(s.top_k for s in samplings):
        found = _cut_k(found, torch.tensor([s.top_k or found.shape[-1] for s in samplings], device=device))
    if any(s.top_p < 1 for s in samplings):
        found = _cut_p(found, torch.tensor([s.top_p for s in samplings], device=device))
    return found


def _cut_k(logprobs: Tensor, k: Tensor) -> Tensor:
    """Keep the k most likely tokens of each row, and ties with the last of them."""
    k = k.clamp(max=logprobs.shape[-1])
    top = logprobs.topk(int(k.max()), dim=-1).values
    least = top.gather(-1, k[:, None] - 1)
    return logprobs.masked_fill(logprobs < least, -torch.inf).log_softmax(-1)


def _cut_p(logprobs: Tensor, p: Tensor) -> Tensor:
    """Keep the smallest set of most likely tokens whose probability reaches p (Holtzman et al. 2020)."""
    ordered, order = logprobs.sort(dim=-1, descending=True)
    share = _shares(ordered)
    before = share.cumsum(-1) - share
    reached = (before >= p.double()[:, None] * ONE) & (p[:, None] < 1)
    cut = torch.zeros_like(reached).scatter(-1, order, reached)
    return logprobs.masked_fill(cut, -torch.inf).log_softmax(-1)


def invert(logprobs: Tensor, noise: NDArray[np.float64]) -> Tensor:
    """The first token whose cumulative probability exceeds the noise, never an impossible one: [R, V], [R] -> [R]."""
    cumulative = _shares(logprobs).cumsum(-1)
    total = cumulative[:, -1:]
    target = (torch.from_numpy(noise).to(logprobs.device)[:, None] * total).long()
    found = torch.searchsorted(cumulative, target.minimum(total - 1), right=True)[:, 0]
    return found.clamp(max=logprobs.shape[-1] - 1)  # without numbers it is anywhere


def _shares(logprobs: Tensor) -> Tensor:
    """Probabilities as integers, in parts of `ONE`: a GPU adds them up in one way, as it does no floats."""
    return (logprobs.double().exp() * ONE).long()


def draw(
    logits: Tensor,
    samplings: Sequence[Sampling],
    keys: Sequence[int],
    positions: Sequence[int],
    forced: Sequence[int | None] | None = None,
) -> Drawn:
    """One token per row. `keys` and `positions` (index within the reply) give the noise; a `forced` id is not drawn,
    and its second log-prob is for whoever forced it to say. `ModelError` where the logits are no numbers."""
    raw = logits.float().log_softmax(-1)
    processed = raw if all(s.plain for s in samplings) else processed_logprobs(raw, samplings)
    noise = uniforms(np.array(keys, np.uint64), np.array(positions, np.int64))
    chosen = invert(processed, noise)[:, None]
    for row, token in enumerate(forced or ()):
        if token is not None:
            chosen[row] = token
    logprobs = raw.gather(-1, chosen)[:, 0].tolist()
    if any(map(math.isnan, logprobs)):
        raise ModelError("the model's logits are not numbers (NaN); nothing can be sampled from such weights")
    same = processed is raw
    return Drawn(chosen[:, 0].tolist(), logprobs, logprobs if same else processed.gather(-1, chosen)[:, 0].tolist())
