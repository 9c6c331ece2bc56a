"""The critic: what it reads, its clipped loss, that it learns values, and that it goes on after a save."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from learning import EPISODES, Bare

from agentgym.collate import collate
from agentgym.errors import ConfigError
from agentgym.modeling.logprobs import packed_hidden
from agentgym.types import Action, Observation, Turn, Turns
from agentgym_trainers.critic import Critic, CriticConfig, value_loss


def test_the_value_loss_of_the_reference() -> None:
    """3.2: V 1.2, V_old .5, R 0, clip .5 -> .72; without a clip 0.5 (V - R)^2; never below the unclipped one."""
    v, old, r = (torch.tensor([x], dtype=torch.float64) for x in (1.2, 0.5, 0.0))
    assert value_loss(v, old, r, 0.5).item() == pytest.approx(0.72)
    assert value_loss(v, old, r, 0.0).item() == pytest.approx(0.72)
    g = np.random.default_rng(0)
    values, olds, returns = (torch.tensor(g.normal(size=50)) for _ in range(3))

    def slow(v: float, o: float, r: float) -> float:
        clipped = min(max(v, o - 0.3), o + 0.3)
        return 0.5 * max((v - r) ** 2, (clipped - r) ** 2)

    expected = [slow(*x) for x in zip(values.tolist(), olds.tolist(), returns.tolist(), strict=True)]
    assert value_loss(values, olds, returns, 0.3).tolist() == pytest.approx(expected)


def test_a_value_that_moved_far_enough_gets_no_gradient() -> None:
    v = torch.tensor([1.0, 0.1], requires_grad=True)
    value_loss(v, torch.zeros(2), torch.tensor([2.0, 2.0]), 0.3).sum().backward()
    assert v.grad is not None
    assert v.grad.tolist() == pytest.approx([0.0, -1.9])


def test_a_state_is_what_stands_before_the_first_sampled_token_of_a_turn() -> None:
    """One state a turn with tokens, however the micro-batches are cut; other turns are worth 0."""
    shown = EPISODES[5].replace(
        turns=Turns(items=(Turn(step=0, observation=Observation(), action=Action(text="x")), *EPISODES[5].turns))
    )
    trainable = Bare()
    states = Critic(trainable, CriticConfig(), micro_tokens=24).read([*EPISODES[:5], shown])
    assert len(states.hidden) == sum(len(t.turns) for t in EPISODES[:5]) + 3
    assert [len(v) for v in states.per_turn] == [*(len(t.turns) for t in EPISODES[:5]), 4]
    (batch,) = collate([shown], [np.zeros(4)], max_tokens=100)
    hidden = packed_hidden(trainable.module(), batch.ids, batch.positions, batch.bounds)
    firsts = [int(np.flatnonzero((batch.turns == turn) & (batch.mask > 0))[0]) for turn in (1, 2, 3)]
    mine = torch.from_numpy(states.owners == 5)
    assert states.turns[mine.numpy()].tolist() == [1, 2, 3]
    torch.testing.assert_close(states.hidden[mine], hidden[torch.tensor(firsts) - 1].detach())
    assert not states.hidden.requires_grad


def learnt(critic: Critic, updates: int) -> list[dict[str, float]]:
    returns = [np.linspace(0.0, 1.0, len(t.turns)) + n / 9 for n, t in enumerate(EPISODES)]
    return [critic.update(critic.read(EPISODES), returns) for _ in range(updates)]


def test_it_learns_what_turns_are_worth_and_leaves_the_policy_alone() -> None:
    trainable = Bare()
    before = [p.clone() for p in trainable.module().parameters()]
    critic = Critic(trainable, CriticConfig(lr=0.5), micro_tokens=64)
    assert all((v == 0).all() for v in critic.read(EPISODES).per_turn)
    figures = learnt(critic, 40)
    assert figures[0]["value_explained"] == pytest.approx(0.0, abs=1e-9)
    assert figures[-1]["value_explained"] > 0.8
    assert figures[-1]["value_loss"] < 0.1 * figures[0]["value_loss"]
    assert all(torch.equal(a, b) for a, b in zip(before, trainable.module().parameters(), strict=True))
    assert critic.update(critic.read([]), []) == {}


def test_it_goes_on_where_it_was() -> None:
    whole, first, second = (Critic(Bare(), CriticConfig(), micro_tokens=64) for _ in range(3))
    learnt(first, 2)
    second.restore({name: x.clone() for name, x in first.state().items()})
    learnt(whole, 4)
    learnt(second, 2)
    assert all(torch.equal(x, second.state()[name]) for name, x in whole.state().items())


@pytest.mark.parametrize(
    "wrong", [{"lr": 0.0}, {"lr": float("inf")}, {"clip": -1.0}, {"clip": float("nan")}, {"epochs": 0}]
)
def test_a_critic_that_cannot_be_meant_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="critic"):
        CriticConfig(**wrong)
