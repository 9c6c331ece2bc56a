"""InTRO: learn to say without the answer what the policy says when it knows it. A loss with an axis of its own.

    learner = CandidateLearner(trainable, InTRO(), Optim(lr=5e-7), answer=ids_of_the_answer, total_steps=100)
    figures = learner.update(samples)

For every sampled token z_t of a correct rollout there are n candidates: z_t itself and n - 1 drawn from the policy.
Each is weighed by how much likelier it is where the answer y stands in front of the prompt, w = pi(c | x, y, z_<t) /
pi(c | x, z_<t), detached and at most `cap`; J = 1 / (|z| n) sum_t sum_c w log pi(c | x, z_<t), maximised in the mean
over rollouts. Its gradient over drawn candidates is, in expectation, that of -KL(pi(. | x, y, z_<t), pi(. | x, z_<t)).

2511.09865, as read in notes; that the answer stands in front of the whole prompt is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentgym.errors import ConfigError
from agentgym.modeling.logprobs import by_chunks, head_of, packed_hidden
from agentgym.rewards import Composed
from agentgym.seeding import key, rng, uniforms
from agentgym.types import Batch, Trajectory
from agentgym_trainers import ranks
from agentgym_trainers.candidates.declare import InTRO
from agentgym_trainers.context import with_context, without_context
from agentgym_trainers.forward import trained
from agentgym_trainers.learner import Family, Optim, Trainable, mean_figures, tokens_of
from agentgym_trainers.preference.pairs import sampled

Answer = Callable[[Trajectory], Sequence[int]]
"""The ids that tell the answer of a trajectory's task."""


# --- the objective ----------------------------------------------------------------------------------------------


def weights(conditioned: Tensor, plain: Tensor, cap: float) -> Tensor:
    """pi(c | x, y) / pi(c | x) from log-probs of one shape, detached, in [0, cap]."""
    return (conditioned - plain).detach().exp().clamp(max=cap)


def objective(logp: Tensor, weight: Tensor, lengths: Tensor) -> Tensor:
    """What each position adds to J of its rollout: [M, n] log-probs of candidates and their weights, [M] the length of
    the rollout a position belongs to -> [M]."""
    return (weight * logp).mean(-1) / lengths


def draw(logs: Tensor, uniform: Tensor) -> Tensor:
    """Tokens from log-probs [M, V] by inversion of uniforms [M, k] in [0, 1): [M, k]."""
    edges = logs.double().exp().cumsum(-1)
    return torch.searchsorted(edges, uniform * edges[:, -1:], right=True).clamp(max=logs.shape[-1] - 1)


class _Micro(NamedTuple):
    """A micro-batch without the answers and behind them, with the episode of each sequence [S] and, for each of M
    trained tokens, how many its rollout has."""

    plain: Batch
    behind: Batch
    names: list[str]
    lengths: NDArray[np.float64]

    @classmethod
    def of(cls, behind: Batch, rollouts: Sequence[Trajectory], cut: Sequence[int]) -> _Micro:
        plain = without_context(behind, cut)
        owners = np.repeat(plain.owners, np.diff(plain.bounds))[trained(plain)]
        lengths = np.asarray([sampled(t) for t in rollouts], np.float64)
        return cls(plain, behind, [rollouts[owner].episode.id for owner in plain.owners], lengths[owners])


# --- the learner ------------------------------------------------------------------------------------------------


class CandidateLearner(Family):
    """A learner with candidates. Optimiser, masters, ranks and state are those of `Learner`; see there.

    `answer` gives the context tokens of a trajectory. The unembedding runs in chunks, here on both prompts.
    """

    def __init__(
        self,
        trainable: Trainable,
        declared: InTRO,
        optim: Optim,
        *,
        answer: Answer,
        total_steps: int,
        seed: int = 0,
        temperature: float = 1.0,
    ) -> None:
        self.declared, self.answer = declared, answer
        super().__init__(trainable, optim, total_steps=total_steps, seed=seed, temperature=temperature)

    def update(self, samples: Sequence[tuple[Trajectory, Composed | None]]) -> dict[str, float]:
        """Every optimiser step that the correct ones of these samples pay for; the mean of their figures. Every rank is
        given the same samples, and takes its share.

        objective   J, mean over rollouts
        weight      mean weight of a candidate, weight_max the largest, capped the share at the cap
        nll         of the sampled tokens
        """
        learner = self.learner
        correct = [t for t, composed in samples if self._correct(t, composed)]
        order = list(range(len(correct)))
        rng(learner.seed, "rollouts", learner.updates).shuffle(order)
        parts = [part.tolist() for part in np.array_split(np.asarray(order, int), learner.optim.minibatches)]
        steps = [self._step([correct[i] for i in part]) for _ in range(learner.optim.epochs) for part in parts]
        learner.updates += 1
        return mean_figures([figures for figures in steps if figures])

    def _correct(self, trajectory: Trajectory, composed: Composed | None) -> bool:
        done = trajectory.status != "failed" and composed is not None and composed.value >= self.declared.threshold
        return done and sampled(trajectory) > 0

    # --- one step ---

    def _step(self, rollouts: Sequence[Trajectory]) -> dict[str, float]:
        """One optimiser step; how it is cut into micro-batches and over ranks changes nothing."""
        count, tokens = len(rollouts), sum(map(sampled, rollouts))
        if not count:
            return {}
        self.learner.clear()
        mine = [rollouts[i] for i in ranks.share(list(map(tokens_of, rollouts)))]
        sums = ranks.gather([self._backward(micro, count) for micro in self._micros(mine)])
        figures = _figures([part for mine in sums for part in mine], count, tokens, self.declared.candidates)
        return {**figures, "grad_norm": self.learner.move()}

    def _micros(self, rollouts: Sequence[Trajectory]) -> list[_Micro]:
        """Packed behind the answers, which then come off again."""
        contexts = [self._context(t) for t in rollouts]
        longer = [with_context(t, ids) for t, ids in zip(rollouts, contexts, strict=True)]
        ones, size = [np.ones(len(t.turns)) for t in rollouts], self.learner.optim.micro_tokens
        batches = self.learner.trainable.collate(longer, ones, max_tokens=size, behaviour=False)
        return [_Micro.of(batch, rollouts, [len(ids) for ids in contexts]) for batch in batches]

    def _context(self, trajectory: Trajectory) -> NDArray[np.int32]:
        ids = np.asarray(self.answer(trajectory), np.int32)
        if not len(ids):
            raise ConfigError(f"the answer of {trajectory.episode.id} has no token: no prompt tells it")
        return ids

    def _backward(self, micro: _Micro, count: int) -> dict[str, float]:
        """Leaves the gradient of a micro-batch with the parameters; its sums for the figures."""
        hidden = self._hidden(micro.plain)
        ids, weight = self._candidates(micro, hidden)
        logp = self._logprobs(hidden, ids)
        value = objective(logp, weight, torch.from_numpy(micro.lengths).to(logp)).sum()
        (-value / count).backward(inputs=self.learner.parameters)
        return {
            "objective": float(value.detach()),
            "weight": float(weight.sum()),
            "weight_max": float(weight.max()),
            "capped": float((weight >= self.declared.cap).sum()),
            "nll": -float(logp[:, 0].detach().sum()),
        }

    @torch.no_grad()
    def _candidates(self, micro: _Micro, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and weights of the candidates of every trained token [M, n], the sampled one first."""
        head, temperature = head_of(self._module()), self.learner.forward.temperature
        at = trained(micro.plain)
        noise = torch.from_numpy(self._noise(micro)[at]).to(hidden.device)
        said = torch.from_numpy(micro.plain.ids[at].astype(np.int64)).to(hidden.device)

        def one(hidden: Tensor, shown: Tensor, said: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            before, after = (torch.log_softmax(head.logits(h) / temperature, -1) for h in (hidden, shown))
            ids = torch.cat([said[:, None], draw(before, noise)], 1)
            return ids, weights(after.gather(-1, ids), before.gather(-1, ids), self.declared.cap)

        ids, weight = zip(*by_chunks(one, head, None, hidden, self._hidden(micro.behind), said, noise), strict=True)
        return torch.cat(ids), torch.cat(weight)

    def _noise(self, micro: _Micro) -> NDArray[np.float64]:
        """One uniform for each further candidate of each token [N, n - 1], keyed by episode, content and step."""
        step, seed, count = self.learner.steps, self.learner.seed, self.declared.candidates - 1
        texts = (micro.plain.ids[a:b].tobytes() for a, b in pairwise(micro.plain.bounds))
        keys = [key(seed, "candidates", step, name, text) for name, text in zip(micro.names, texts, strict=True)]
        rows = np.repeat(np.asarray(keys, np.uint64), np.diff(micro.plain.bounds))
        places = micro.plain.positions[:, None].astype(np.int64) * count + np.arange(count)
        return uniforms(np.broadcast_to(rows[:, None], places.shape), places)

    def _logprobs(self, hidden: Tensor, ids: Tensor) -> Tensor:
        head, temperature = head_of(self._module()), self.learner.forward.temperature

        def one(hidden: Tensor, ids: Tensor) -> Tensor:
            logits = head.logits(hidden) / temperature
            return logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)

        return torch.cat(by_chunks(one, head, None, hidden, ids))

    def _hidden(self, batch: Batch) -> Tensor:
        """The hidden states that predict the trained tokens [M, hidden]."""
        hidden = packed_hidden(self._module(), batch.ids, batch.positions, batch.bounds)
        return hidden[torch.from_numpy(trained(batch) - 1).to(hidden.device)]

    def _module(self) -> Any:
        return self.learner.trainable.module()


def _figures(sums: Sequence[dict[str, float]], rollouts: int, tokens: int, candidates: int) -> dict[str, float]:
    per = {"objective": rollouts, "nll": tokens, "weight": tokens * candidates, "capped": tokens * candidates}
    found = {name: sum(part[name] for part in sums) / count for name, count in per.items()}
    most = max(part["weight_max"] for part in sums)
    return {
        **found,
        "weight_max": most,
        "loss": -found["objective"],
        "rollouts": float(rollouts),
        "tokens": float(tokens),
    }
