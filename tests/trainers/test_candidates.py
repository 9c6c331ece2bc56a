"""InTRO: numbers, a twin that walks token by token, gradients, draws, and a policy that learns from hindsight."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from learning import EPISODES, VOCABULARY, Bare
from learning import weights as parameters
from torch import Tensor

from agentgym.collate import collate
from agentgym.errors import ConfigError
from agentgym.modeling import logprobs
from agentgym.rewards import Composed
from agentgym.types import Action, Episode, Failure, Ids, Observation, Task, TokenSpan, Trajectory, Turn, Turns
from agentgym_trainers.candidates import InTRO
from agentgym_trainers.candidates.learner import CandidateLearner, draw, objective, weights
from agentgym_trainers.context import with_context
from agentgym_trainers.learner import Learner, Optim
from agentgym_trainers.objective.declare import IMITATION


def answer(t: Trajectory) -> list[int]:
    """As many tokens as the task's number says, so that contexts are of unlike lengths."""
    return [(t.task.seed + i) % VOCABULARY for i in range(1 + t.task.seed)]


PLAIN = InTRO()


def learner(declared: InTRO = PLAIN, total: int = 1, **optim: Any) -> CandidateLearner:
    options = {"lr": 1e-2, "warmup": 0, "clip": 0.0, **optim}
    return CandidateLearner(Bare(dtype=torch.float64), declared, Optim(**options), answer=answer, total_steps=total)


def worth(*values: float | None) -> list[tuple[Trajectory, Composed | None]]:
    pairs = zip(EPISODES, values, strict=False)
    return [(t, None if v is None else Composed(v, 0.0, ())) for t, v in pairs]


SAMPLES = worth(1.0, 0.0, 2.0, 1.0, None, 1.0, 1.0)
CORRECT = [EPISODES[i] for i in (0, 2, 3, 5, 6)]


def gradient(found: CandidateLearner) -> Tensor:
    return torch.cat([p.grad.flatten() for p in found.learner.parameters if p.grad is not None])


# --- the objective ----------------------------------------------------------------------------------------------


def test_numbers_of_the_reference() -> None:
    found = weights(torch.tensor([-1.0, -3.0, 0.0]), torch.tensor([-1.5, -1.0, -9.0]), 200.0)
    assert found.tolist() == pytest.approx([1.648721, 0.135335, 200.0], abs=1e-6)


def test_the_objective_is_its_definition() -> None:
    g = np.random.default_rng(0)
    logp, plain = (torch.from_numpy(g.normal(-2.0, 1.0, (6, 3))) for _ in range(2))
    weight, owner = weights(logp, plain, 2.0), [0, 0, 1, 1, 1, 2]
    lengths = torch.tensor([2.0, 2.0, 3.0, 3.0, 3.0, 1.0])
    found = objective(logp, weight, lengths)
    for rollout in range(3):
        mine = [i for i in range(6) if owner[i] == rollout]
        ratios = [[min(math.exp(logp[i, c] - plain[i, c]), 2.0) for c in range(3)] for i in mine]
        slow = sum(r * float(logp[i, c]) for i, row in zip(mine, ratios, strict=True) for c, r in enumerate(row))
        assert float(found[mine].sum()) == pytest.approx(slow / (len(mine) * 3), rel=1e-9)


def test_gradients_by_finite_differences() -> None:
    logp = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight, lengths = torch.rand(4, 3, dtype=torch.float64), torch.tensor([4.0, 4.0, 4.0, 4.0])
    assert torch.autograd.gradcheck(lambda x: objective(x, weight, lengths).sum(), (logp,))


def test_drawn_candidates_pull_to_the_policy_that_knows() -> None:
    """Every token with its probability: the gradient is that of -KL(with the answer, without); weights are detached."""
    g = torch.Generator().manual_seed(0)
    logits, told = torch.randn(5, generator=g, dtype=torch.float64), torch.randn(5, generator=g, dtype=torch.float64)
    logits.requires_grad_()
    logp, conditioned = logits.log_softmax(-1), told.log_softmax(-1)
    weight = weights(conditioned, logp, 200.0)
    assert not weight.requires_grad
    expected = (logp.detach().exp() * weight * logp).sum()
    kl = (conditioned.exp() * (conditioned - logp)).sum()
    one, other = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (expected, -kl))
    torch.testing.assert_close(one, other)


def test_draws_follow_the_distribution() -> None:
    p = torch.tensor([[0.0, 0.5, 0.2, 0.3, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    grid = (torch.arange(1000, dtype=torch.float64) / 1000).expand(2, -1)
    drawn = draw(p.log(), grid)
    assert torch.bincount(drawn[0], minlength=5).tolist() == [0, 500, 200, 300, 0]
    assert drawn[1].unique().tolist() == [0]
    assert draw(p.log(), torch.full((2, 1), 1 - 2**-53, dtype=torch.float64))[1].item() == 0


# --- the learner ------------------------------------------------------------------------------------------------


def slow(module: Any, declared: InTRO, drawn: dict[tuple[str, int], list[int]]) -> Tensor:
    """J token by token: every prefix through the model on its own, with the answer in front and without."""
    total = torch.zeros((), dtype=torch.float64)
    for t in CORRECT:
        (plain,) = collate([t], [np.ones(len(t.turns))], max_tokens=10_000, behaviour=False)
        at, mine = np.flatnonzero(plain.mask), torch.zeros((), dtype=torch.float64)
        for place in at.tolist():
            prefix = plain.ids[:place].tolist()
            with torch.no_grad():
                told = last(module, answer(t) + prefix)
            logp = last(module, prefix)
            for c in drawn[t.episode.id, place]:
                weight = min(math.exp(told[c].item() - logp[c].item()), declared.cap)
                mine = mine + weight * logp[c]
        total = total + mine / (len(at) * declared.candidates)
    return total / len(CORRECT)


def last(module: Any, ids: list[int]) -> Tensor:
    found: Tensor = module(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
    return found


@pytest.mark.parametrize("declared", [InTRO(candidates=3), InTRO(candidates=1, cap=0.9)])
def test_a_step_is_token_by_token(monkeypatch: pytest.MonkeyPatch, declared: InTRO) -> None:
    subject, drawn = learner(declared), {}
    inner = subject._candidates

    def seen(micro: Any, hidden: Any) -> Any:
        ids, weight = inner(micro, hidden)
        at = np.flatnonzero(micro.plain.mask)
        sequence = np.repeat(np.arange(len(micro.names)), np.diff(micro.plain.bounds))[at]
        for place, s, row in zip(micro.plain.positions[at].tolist(), sequence, ids.tolist(), strict=True):
            drawn[micro.names[s], place] = row
        return ids, weight

    monkeypatch.setattr(subject, "_candidates", seen)
    found = subject.update(SAMPLES)
    module = Bare(dtype=torch.float64).module()
    value = slow(module, declared, drawn)
    (-value).backward()
    assert found["objective"] == pytest.approx(value.item(), rel=1e-5)
    assert found["rollouts"] == len(CORRECT)
    assert all(row[0] == token for row, token in _first(drawn))
    expected = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient(subject), expected, rtol=1e-4, atol=1e-6)  # its norms round to float32


def _first(drawn: dict[tuple[str, int], list[int]]) -> list[tuple[list[int], int]]:
    """The candidates of every trained token beside the token that was sampled."""
    found = []
    for t in CORRECT:
        (plain,) = collate([t], [np.ones(len(t.turns))], max_tokens=10_000, behaviour=False)
        found += [(drawn[t.episode.id, p], int(plain.ids[p])) for p in np.flatnonzero(plain.mask).tolist()]
    assert len(found) == len(drawn)
    return found


def test_micro_batches_and_chunks_do_not_change_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = learner(), learner(micro_tokens=40)
    figures = [whole.update(SAMPLES)]
    monkeypatch.setattr(logprobs, "LOGITS", 3 * VOCABULARY)
    figures.append(cut.update(SAMPLES))
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)
    torch.testing.assert_close(gradient(whole), gradient(cut), rtol=1e-5, atol=1e-8)


def test_no_more_logits_than_allowed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    inner = logprobs.Head.logits
    monkeypatch.setattr(logprobs, "LOGITS", 4 * VOCABULARY)
    monkeypatch.setattr(
        logprobs.Head, "logits", lambda head, hidden: [rows.append(len(hidden)), inner(head, hidden)][1]
    )
    learner().update(SAMPLES)
    assert max(rows) == 4


def test_only_correct_rollouts_count() -> None:
    failed = EPISODES[7].replace(status="failed", failure=Failure(kind="tool"))
    noise = [*SAMPLES, (failed, None), (EPISODES[8], Composed(0.99, 0.0, ()))]
    one, other = learner(), learner()
    assert one.update(SAMPLES) == other.update(noise)
    assert torch.equal(parameters(one.learner), parameters(other.learner))
    idle = learner()
    before = parameters(idle.learner)
    assert idle.update(worth(0.0, 0.5)) == {}
    assert torch.equal(parameters(idle.learner), before)


def test_an_answer_must_be_there_and_numbers_meant() -> None:
    silent = CandidateLearner(Bare(), InTRO(), Optim(), answer=lambda t: [], total_steps=1)
    with pytest.raises(ConfigError, match="has no token"):
        silent.update(SAMPLES)
    for wrong in ({"candidates": 0}, {"cap": 0.0}, {"threshold": math.nan}):
        with pytest.raises(ConfigError, match="at least 1, cap is positive"):
            InTRO(**wrong)  # type: ignore[arg-type]


def test_state_goes_on() -> None:
    whole, half = learner(total=4, epochs=2), learner(total=4, epochs=2)
    for x in (whole, half):
        x.update(SAMPLES)
    tensors, plain = half.state()
    again = learner(total=4, epochs=2)
    again.learner.trainable.module().load_state_dict(half.learner.trainable.module().state_dict())
    again.restore({name: value.clone() for name, value in tensors.items()}, plain)
    assert again.update(SAMPLES) == whole.update(SAMPLES)
    assert again.steps == whole.steps == 4


# --- learning ---------------------------------------------------------------------------------------------------

QUESTIONS, KNOWN = 4, 10
"""Questions are ids 1..4; the right reply to question q is id 10 + q."""


def asked(question: int, reply: int, member: int = 0) -> Trajectory:
    span = TokenSpan(prompt=Ids([0, question]), ids=Ids([reply]))
    turn = Turn(step=0, observation=Observation(), action=Action(span=span))
    episode = Episode(task=Task(env="qa-v0", seed=question), member=member)
    return Trajectory(env="qa-v0", episode=episode, turns=Turns(items=(turn,)), status="terminated")


def knows(module: Any) -> float:
    """The mean probability of the right reply, nothing told."""
    with torch.no_grad():
        return float(np.mean([last(module, [0, q])[KNOWN + q].exp() for q in range(1, 1 + QUESTIONS)]))


def test_a_policy_learns_what_it_says_when_it_knows_the_answer() -> None:
    """It repeats a reply that it is told, and guesses otherwise: one in four. Hindsight teaches it the replies."""
    replies = [KNOWN + q for q in range(1, 1 + QUESTIONS)]
    model = Bare()
    guess = [asked(q, r) for q in range(1, 1 + QUESTIONS) for r in replies]
    told = [with_context(t, [t.turns[0].action.span.ids[0]]) for t in guess]  # type: ignore[union-attr]
    warm = Learner(model, IMITATION, Optim(lr=1e-2, warmup=5), total_steps=120)
    ones = [np.ones(1)] * len(guess)
    (batch,) = model.collate([*guess, *told], [*ones, *ones], max_tokens=10_000, behaviour=False)
    for _ in range(120):
        warm.step([batch])
    assert knows(model.module()) == pytest.approx(0.25, abs=0.05)
    subject = CandidateLearner(
        model, InTRO(), Optim(lr=3e-3, warmup=0), answer=lambda t: [KNOWN + t.task.seed], total_steps=40
    )
    right = [(asked(q, KNOWN + q), Composed(1.0, 0.0, ())) for q in range(1, 1 + QUESTIONS)]
    figures = [subject.update(right) for _ in range(40)]
    assert knows(model.module()) > 0.9
    assert figures[0]["weight_max"] > 3.0 > figures[-1]["weight"]
