"""From pairs of trajectories to moved weights.

    learner = PairLearner(trainable, Preference(loss=DPO(beta=0.1)), Optim(lr=5e-4), total_steps=120, reference=frozen)
    figures = learner.update(build(samples, declared).pairs)

A loss reads one number of a trajectory, the sum of its sampled tokens' log-probs. So every trajectory of a step goes
through the model once, in however many pairs it stands, and micro-batches may be cut anywhere: the derivative by the
sums is found first, then that of the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agentgym.errors import ConfigError
from agentgym.seeding import rng
from agentgym.types import Batch, Trajectory
from agentgym_trainers import ranks
from agentgym_trainers.context import with_context
from agentgym_trainers.forward import trained
from agentgym_trainers.learner import Family, Optim, Trainable, mean_figures, tokens_of
from agentgym_trainers.objective.regularisers import KLS
from agentgym_trainers.objective.tokens import pool
from agentgym_trainers.preference.declare import Preference
from agentgym_trainers.preference.losses import CHOSEN, REJECTED, Sums, gap, log_ratio, pair_loss
from agentgym_trainers.preference.pairs import Pair


class _Step(NamedTuple):
    """The P pairs of one optimiser step over R different trajectories: `rows` [2 or 6, P] are their places, `zero` [R]
    the sum of nothing; `fixed` is what of `Sums` stays as it is during the update, `reference` the log-probs of each
    batch's tokens under the reference."""

    batches: list[Batch]
    rows: Tensor
    zero: Tensor
    fixed: dict[str, Tensor]
    reference: list[Tensor]


class _Total(NamedTuple):
    """Counts of an optimiser step over all ranks; `chosen` are the tokens of chosen trajectories, by pair."""

    pairs: int
    tokens: int
    chosen: int


class PairLearner(Family):
    """A learner whose loss is over pairs. Optimiser, masters, ranks and state are those of `Learner`.

    `reference` is the frozen module that most losses compare with; see `Learner` for the other arguments. Raises
    `ConfigError` where it is missing.
    """

    def __init__(
        self,
        trainable: Trainable,
        declared: Preference,
        optim: Optim,
        *,
        total_steps: int,
        seed: int = 0,
        temperature: float = 1.0,
        reference: nn.Module | None = None,
    ) -> None:
        if declared.needs_reference and reference is None:
            raise ConfigError(f"the loss {declared.loss.kind!r} compares with a reference; pass the frozen module")
        self.declared = declared
        self.reference = reference if declared.needs_reference else None
        super().__init__(trainable, optim, total_steps=total_steps, seed=seed, temperature=temperature)

    def update(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """Every optimiser step that these pairs pay for, epochs x minibatches; the mean of their figures. Every rank is
        given the same pairs, and takes its share.

        margin, accuracy   mean of log-ratio(chosen) - log-ratio(rejected) in nats; share of pairs where it is positive
        chosen, rejected   mean log-ratio to the reference, or to the previous policy where there is none
        nll                of the chosen, per token
        """
        learner = self.learner
        order = list(range(len(pairs)))
        rng(learner.seed, "pairs", learner.updates).shuffle(order)
        parts = np.array_split(np.asarray(order, int), learner.optim.minibatches)
        steps = [self._prepare(self._share([pairs[i] for i in part])) for part in parts]
        figures = [self._step(step) for _ in range(learner.optim.epochs) for step in steps]
        learner.updates += 1
        return mean_figures([found for found in figures if found])

    # --- what stays fixed ---

    @staticmethod
    def _share(pairs: Sequence[Pair]) -> list[Pair]:
        """This rank's, all of a prompt together: one rank reads a trajectory, in however many pairs it stands."""
        prompts: dict[Any, list[Pair]] = {}
        for pair in pairs:
            prompts.setdefault(pair.chosen.prompt, []).append(pair)
        held = list(prompts.values())
        sizes = [sum(tokens_of(p.chosen) + tokens_of(p.rejected) for p in group) for group in held]
        return [pair for i in ranks.share(sizes) for pair in held[i]]

    @torch.no_grad()
    def _prepare(self, pairs: Sequence[Pair]) -> _Step:
        trajectories, places = self._places(pairs)
        batches = self._collate(trajectories)
        rows = torch.from_numpy(places).to(self.learner.parameters[0].device)
        zero = torch.zeros(len(trajectories), dtype=torch.float64, device=rows.device)
        fixed = {
            "tokens": _summed(zero, batches, [zero.new_ones(len(trained(b))) for b in batches])[rows],
            "rates": zero.new_tensor([pair.rates for pair in pairs]).reshape(-1, 2).T,
        }
        reference = [] if self.reference is None else self._logprobs(self.reference, batches)
        if self.reference is not None:
            fixed["reference"] = _summed(zero, batches, reference)[rows]
        if self.declared.needs_previous:
            fixed["previous"] = _summed(zero, batches, self._logprobs(self._module(), batches))[rows]
        return _Step(batches, rows, zero, fixed, reference)

    def _places(self, pairs: Sequence[Pair]) -> tuple[list[Trajectory], NDArray[np.int64]]:
        """The different trajectories of these pairs, and the place of each pair's among them."""
        known: dict[tuple[int, int], int] = {}
        found: list[Trajectory] = []

        def place(t: Trajectory, behind: Trajectory | None = None) -> int:
            key = (id(t), id(behind))
            if key not in known:
                known[key] = len(found)
                found.append(t if behind is None else with_context(t, self._ids(behind)))
            return known[key]

        def of(good: Trajectory, bad: Trajectory) -> list[int]:
            further = [(good, bad), (bad, bad), (bad, good), (good, good)] if self.declared.conditional else []
            return [place(good), place(bad), *(place(t, behind) for t, behind in further)]

        rows = np.asarray([of(pair.chosen, pair.rejected) for pair in pairs], np.int64)
        return found, rows.reshape(-1, 6 if self.declared.conditional else 2).T

    def _collate(self, trajectories: Sequence[Trajectory], max_tokens: int = 0) -> list[Batch]:
        ones = [np.ones(len(t.turns)) for t in trajectories]
        size = max_tokens or self.learner.optim.micro_tokens
        return self.learner.trainable.collate(trajectories, ones, max_tokens=size, behaviour=False)

    def _ids(self, trajectory: Trajectory) -> NDArray[np.int32]:
        """Its longest token sequence."""
        (batch,) = self._collate([trajectory], max_tokens=2**62)
        return batch.ids[: batch.bounds[1]]

    def _module(self) -> nn.Module:
        return self.learner.trainable.module()

    def _logprobs(self, module: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
        return [self.learner.forward.logprobs(module, batch) for batch in batches]

    # --- one step ---

    def _step(self, step: _Step) -> dict[str, float]:
        total = _total(step)
        if not total.pairs:
            return {}
        self.learner.clear()
        sums = self._backward(step, total)
        held = ranks.gather(sums)
        figures = {name: sum(part[name] for part in held) / getattr(total, _PER[name]) for name in sums}
        return {**figures, "tokens": float(total.tokens), "pairs": float(total.pairs), "grad_norm": self.learner.move()}

    def _backward(self, step: _Step, total: _Total) -> dict[str, float]:
        """Leaves the gradient of the step with the parameters; this rank's sums for its figures."""
        whole, inputs = len(step.batches) == 1, self.learner.parameters
        with torch.set_grad_enabled(whole):
            logps = self._logprobs(self._module(), step.batches)
        policy = _summed(step.zero, step.batches, logps)
        policy = policy if whole else policy.requires_grad_()
        sums = Sums(policy=policy[step.rows], per_pair=total.chosen / total.pairs, **step.fixed)
        value = pair_loss(self.declared.loss, sums).sum() / total.pairs
        if whole:
            value.backward(inputs=inputs)
        else:
            (slopes,) = torch.autograd.grad(value, policy)
            for batch in step.batches:
                part = _summed(step.zero, [batch], self._logprobs(self._module(), [batch]))
                torch.autograd.backward(part, slopes, inputs=inputs)
        return {"loss": float(value.detach()) * total.pairs, **_sums(sums, step.reference, logps)}


_PER = {
    **dict.fromkeys(("loss", "margin", "accuracy", "chosen", "rejected"), "pairs"),
    "nll": "chosen",
    "kl_reference": "tokens",
}
"""What each sum is divided by."""


@torch.no_grad()
def _sums(s: Sums, reference: Sequence[Tensor], logps: Sequence[Tensor]) -> dict[str, float]:
    ratio = log_ratio(s, "previous" if s.reference is None else "reference")
    found = {
        "margin": gap(ratio).sum(),
        "accuracy": (gap(ratio) > 0).sum(),
        "chosen": ratio[CHOSEN].sum(),
        "rejected": ratio[REJECTED].sum(),
        "nll": -s.policy[CHOSEN].sum(),
    }
    sums = {name: float(value) for name, value in found.items()}
    if s.reference is not None:
        gaps = (other - logp for other, logp in zip(reference, logps, strict=True))
        sums["kl_reference"] = sum(float(KLS["k3"](x).sum()) for x in gaps)
    return sums


def _total(step: _Step) -> _Total:
    tokens, chosen = sum(len(trained(b)) for b in step.batches), step.fixed["tokens"][CHOSEN]
    held = ranks.gather(_Total(len(chosen), tokens, int(chosen.sum())))
    return _Total(*(sum(counts) for counts in zip(*held, strict=True)))


def _summed(zero: Tensor, batches: Sequence[Batch], logps: Sequence[Tensor]) -> Tensor:
    """Log-probs of the trained tokens of each batch -> their sums by trajectory [R], in float64."""
    found = zero.clone()
    for batch, logp in zip(batches, logps, strict=True):
        owners = np.repeat(batch.owners, np.diff(batch.bounds))[trained(batch)].astype(np.int64)
        found = found + pool(logp.double(), torch.from_numpy(owners).to(logp.device), len(zero), mean=False)
    return found
