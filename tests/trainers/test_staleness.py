"""Mismatch and staleness told apart, and corrections wired to the recorded log-probs: from records to figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from learning import VOCABULARY, Bare, weights
from torch import Tensor

from agentgym.collate import collate
from agentgym.errors import ConfigError, RecordError
from agentgym.modeling.logprobs import token_logprobs
from agentgym.types import (
    Action,
    Episode,
    Floats,
    Ids,
    Observation,
    Task,
    TokenSpan,
    Trajectory,
    Turn,
    Turns,
    VersionRun,
)
from agentgym_trainers.learner import Learner, Optim
from agentgym_trainers.objective import declare
from agentgym_trainers.objective.compute import loss
from agentgym_trainers.objective.declare import IMITATION, Objective
from agentgym_trainers.objective.tokens import Totals

COUNT = 4
"""Sampled tokens of every trajectory here."""
OPTIM = Optim(lr=0.05, warmup=0, decay=0.0)


def record(number: int, logprobs: Any, *runs: tuple[int, int], stale: bool = False) -> Trajectory:
    """One turn of `COUNT` sampled tokens; `runs` are (start, version)."""
    ids = np.random.default_rng(number).integers(0, VOCABULARY, 3 + COUNT)
    versions = tuple(VersionRun(start=start, version=version) for start, version in runs)
    span = TokenSpan(prompt=Ids(ids[:3]), ids=Ids(ids[3:]), logprobs=Floats(logprobs), versions=versions, stale=stale)
    turns = Turns(items=(Turn(step=0, observation=Observation(), action=Action(span=span)),))
    episode = Episode(task=Task(env="x", seed=number), seed=number)
    return Trajectory(env="x", episode=episode, turns=turns, status="terminated")


@torch.no_grad()
def said(learner: Learner, number: int) -> Tensor:
    """Log-probs [COUNT] of the sampled tokens of record `number` under the weights as they are."""
    (batch,) = collate([record(number, np.zeros(COUNT))], [np.zeros(1)], max_tokens=100)
    return token_logprobs(learner.trainable.module(), batch)[0][-COUNT:]


def sampled(learner: Learner, number: int, gap: Any, version: int) -> Trajectory:
    """The record of a sampler whose log-probs lie `gap` above those of the weights as they are."""
    return record(number, (said(learner, number) + torch.as_tensor(gap)).numpy(), (0, version))


def make(objective: Objective, optim: Optim = OPTIM, **more: Any) -> Learner:
    return Learner(Bare(dtype=torch.float64), objective, optim, total_steps=10, **more)


def k3(x: Any) -> float:
    x = torch.as_tensor(x, dtype=torch.float64)
    return float((x.expm1() - x).mean())


# --- told apart -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proximal", ["sampler", "learner"])
def test_mismatch_is_of_the_weights_of_now_and_staleness_of_older_ones(proximal: Any) -> None:
    learner = make(Objective(proximal=proximal))
    played = [sampled(learner, 0, 0.1, 5), sampled(learner, 1, 0.5, 4), sampled(learner, 2, 0.5, 2)]
    found = learner.update(played, [np.ones(1)] * 3, version=5)
    assert found["mismatch"] == pytest.approx(0.1, abs=1e-6)
    assert found["staleness_kl"] == pytest.approx(k3(-0.5), abs=1e-6)
    assert found["age"] == pytest.approx(4 / 3)
    assert found["age_max"] == 3


def test_what_shows_nothing_is_no_figure() -> None:
    learner = make(Objective())
    fresh = learner.update([sampled(learner, 0, 0.1, 5)], [np.ones(1)], version=5)
    assert "mismatch" in fresh
    assert "staleness_kl" not in fresh
    old = learner.update([sampled(learner, 0, 0.1, 5)], [np.ones(1)], version=6)
    assert "staleness_kl" in old
    assert "mismatch" not in old
    nobody = learner.update([record(0, np.full(COUNT, -1.0))], [np.ones(1)], version=6)
    own = learner.update([sampled(learner, 0, 0.1, 5)], [np.ones(1)])
    assert {"mismatch", "staleness_kl", "age", "age_max"} & set(nobody) == set()
    assert own["mismatch"] == pytest.approx(0.1, abs=1e-6)
    assert own["age"] == 0
    shown = make(IMITATION).update([record(0, ())], [np.ones(1)])
    assert {"mismatch", "age"} & set(shown) == set()


def test_later_optimiser_steps_of_an_update_measure_no_mismatch() -> None:
    """The policy has moved by then; with a proximal policy of its own the learner knows where it began."""
    kinds: tuple[Any, ...] = ("sampler", "learner")
    for proximal in kinds:
        learner = make(Objective(proximal=proximal), Optim(lr=0.05, warmup=0, epochs=3))
        found = learner.update([sampled(learner, 0, 0.1, 0)], [np.ones(1)], version=0)
        assert found["mismatch"] == pytest.approx(0.1, abs=1e-6)


def test_tokens_of_weights_that_are_not_there_yet_are_refused() -> None:
    learner = make(Objective())
    with pytest.raises(RecordError, match="version 6 of the weights, and the learner is at 5"):
        learner.update([sampled(learner, 0, 0.0, 6)], [np.ones(1)], version=5)


def test_spans_on_stale_caches_are_counted() -> None:
    learner = make(Objective())
    kept = [record(n, said(learner, n), (0, 0), stale=n == 0) for n in range(4)]
    assert learner.update(kept, [np.ones(1)] * 4)["stale_cache"] == 0.25
    assert "stale_cache" not in learner.update(kept[1:], [np.ones(1)] * 3)


# --- worked out again -------------------------------------------------------------------------------------------


def moved(learner: Learner, version: int) -> None:
    """One update at `version`, on something else."""
    learner.update([sampled(learner, 9, 0.0, version)], [np.ones(1)], version=version)


def aged(learner: Learner) -> tuple[Trajectory, Tensor]:
    """A trajectory sampled by versions 0 and 1, half by each, with a mismatch of 0.01; and what they said. The learner
    is at version 2 then."""
    first = said(learner, 0)
    moved(learner, 0)
    behaviour = torch.cat([first[:2], said(learner, 0)[2:]])
    moved(learner, 1)
    return record(0, behaviour + 0.01, (0, 0), (2, 1)), behaviour


def test_the_versions_that_sampled_are_worked_out_again() -> None:
    learner = make(Objective(), remember=2)
    trajectory, behaviour = aged(learner)
    own, before = said(learner, 0), weights(learner)
    assert float((own - behaviour).abs().min()) > 1e-3
    learner.history.remember(2)  # type: ignore[union-attr]
    (batch,) = collate([trajectory], [np.ones(1)], max_tokens=100)
    fixed = learner.forward.prepare(batch, learner.steps, 2).fixed
    torch.testing.assert_close(fixed.behaviour, behaviour, rtol=0, atol=1e-12)
    assert torch.equal(weights(learner), before)
    found = learner.update([trajectory], [np.ones(1)], version=2)
    assert found["mismatch"] == pytest.approx(0.01, abs=1e-6)
    assert found["staleness_kl"] == pytest.approx(k3(own - behaviour), abs=1e-9)
    assert (found["age"], found["age_max"]) == (1.5, 2)


def test_a_version_without_an_update_has_the_weights_of_the_next() -> None:
    learner = make(Objective(), remember=3)
    moved(learner, 0)
    behaviour = said(learner, 0)
    moved(learner, 3)  # at versions 1 and 2 nothing was learnt
    found = learner.update([record(0, behaviour - 0.02, (0, 1))], [np.ones(1)], version=4)
    assert found["mismatch"] == pytest.approx(0.02, abs=1e-6)


def test_a_forgotten_version_is_refused() -> None:
    learner = make(Objective(), remember=1)
    trajectory, _ = aged(learner)
    before = weights(learner)
    with pytest.raises(RecordError, match=r"version 0 of the weights; remembered are \[1, 2\]"):
        learner.update([trajectory], [np.ones(1)], version=2)
    assert torch.equal(weights(learner), before)


def test_remembered_weights_are_part_of_the_state() -> None:
    learner, later = make(Objective(), remember=2), make(Objective(), remember=2)
    trajectory, _ = aged(learner)
    tensors, plain = learner.state()
    later.trainable.module().load_state_dict(learner.trainable.module().state_dict())
    later.restore({name: x.clone() for name, x in tensors.items()}, plain)
    found = [each.update([trajectory], [np.ones(1)], version=2) for each in (learner, later)]
    assert found[0] == found[1]
    assert torch.equal(weights(learner), weights(later))


# --- corrections ------------------------------------------------------------------------------------------------

W = [0.3, 0.9, 1.0, 2.5]


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        (declare.Truncate(), [0.3, 0.9, 1.0, 2.0]),
        (declare.Mask(low=0.5, high=5.0), [0.0, 0.9, 1.0, 2.5]),
        (declare.Mask(), [0.0, 0.9, 1.0, 0.0]),
        (declare.Clamp(), [0.5, 0.9, 1.0, 2.0]),
        (declare.Truncate(level="geometric"), [0.906413] * 4),
        (declare.Truncate(level="product"), [0.675] * 4),
    ],
)
def test_recorded_log_probs_become_weights(behaviour: Any, expected: list[float]) -> None:
    """The proximal policy is the learner's own, so that w = pi_proximal / pi_sampler; the ratio is 1 in this step."""
    learner = make(Objective(proximal="learner", behaviour=(behaviour,)))
    found = learner.update([sampled(learner, 0, -np.log(W), 0)], [np.ones(1)], version=0)
    assert found["loss"] == pytest.approx(-sum(expected) / 4, abs=1e-6)
    assert found["weight"] == pytest.approx(sum(expected) / 4, abs=1e-6)
    assert found["ess"] == pytest.approx(sum(expected) ** 2 / sum(w**2 for w in expected) / 4, abs=1e-6)
    assert found["mismatch"] == pytest.approx(np.abs(np.log(W)).mean(), abs=1e-6)
    if isinstance(behaviour, declare.Truncate) and behaviour.level == "token":
        assert found["ess"] * 4 == pytest.approx(2.98983, abs=1e-5)


@pytest.mark.parametrize(("proximal", "expected"), [("learner", 1.465683), ("sampler", 1.2)])
def test_decoupled_from_records(proximal: Any, expected: float) -> None:
    """AReaL: sampler, proximal and current policy at -1, -0.8, -0.6 with A = 1: w = e^0.2 times the clipped e^0.2.
    Coupled, the ratio e^0.4 against the sampler is clipped and nothing multiplies it."""
    corrections = (declare.Truncate(cap=5.0),) if proximal == "learner" else ()
    learner = make(Objective(proximal=proximal, behaviour=corrections))
    (batch,) = collate([sampled(learner, 0, -0.2, 0)], [np.ones(1)], max_tokens=100)
    batch.mask[:-1] = 0.0
    micro = learner.forward.prepare(batch, 0, 0)
    likelier(learner, 0.2)
    value, _ = loss(learner.objective, learner.forward.tokens(micro), Totals(1, 1))
    assert float(value.detach()) == pytest.approx(-expected, abs=1e-6)


def likelier(learner: Learner, by: float) -> None:
    """Move the unembedding up the gradient until the last sampled token of record 0 has `by` more log-prob."""
    head: Tensor = learner.trainable.module().get_output_embeddings().weight  # type: ignore[operator]
    aim, step = float(said(learner, 0)[-1]) + by, 0.01
    (batch,) = collate([record(0, np.zeros(COUNT))], [np.zeros(1)], max_tokens=100)
    while step > 1e-12:
        kept = head.detach().clone()
        (slope,) = torch.autograd.grad(token_logprobs(learner.trainable.module(), batch)[0][-1], head)
        with torch.no_grad():
            head.add_(slope, alpha=step)
            if float(said(learner, 0)[-1]) > aim:
                head.copy_(kept)
                step /= 2


def test_a_double_correction_is_refused() -> None:
    with pytest.raises(ConfigError, match="twice"):
        Objective(proximal="sampler", behaviour=(declare.Truncate(),))
