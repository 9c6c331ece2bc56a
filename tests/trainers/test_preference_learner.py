"""The learner over pairs: how a step is cut changes nothing, margins grow, and who is compared with whom."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from learning import EPISODES, Bare, weights

from agentgym.collate import collate
from agentgym.errors import ConfigError
from agentgym.modeling.logprobs import token_logprobs
from agentgym.types import Columns, Draft, Ids, TokenSpan, Trajectory, Turns
from agentgym_trainers import ranks
from agentgym_trainers.context import with_context, without_context
from agentgym_trainers.learner import Optim
from agentgym_trainers.preference import Pair, Preference
from agentgym_trainers.preference.declare import CODPO, DNO, DPO, INPO, RPO, SRPO, Judged, Loss
from agentgym_trainers.preference.learner import PairLearner
from agentgym_trainers.preference.losses import Sums, pair_loss

PAIRS = [Pair(a, b, 1.0, (0.8, 0.3)) for a, b in itertools.combinations(EPISODES[:4], 2)]
"""Four trajectories in six pairs."""
LOSSES = [
    Preference(loss=DPO(beta=0.3)),
    Preference(loss=DPO(beta=0.3, against="previous")),
    Preference(loss=RPO(beta=0.3, eta=0.5)),
    Preference(loss=INPO(eta=0.5, tau=0.2)),
    Preference(loss=DNO(eta=0.5)),
    Preference(loss=SRPO(beta=0.3)),
    Preference(loss=CODPO(beta=0.3, sft=0.5), pairs=Judged(constraints=("safe",))),
]


def learner(declared: Preference = LOSSES[0], total: int = 1, **optim: Any) -> PairLearner:
    options = {"lr": 1e-2, "warmup": 0, **optim}
    reference = Bare(1, dtype=torch.float64).module()
    return PairLearner(Bare(dtype=torch.float64), declared, Optim(**options), total_steps=total, reference=reference)


def gradient(found: PairLearner) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in found.learner.parameters if p.grad is not None])


@pytest.mark.parametrize("declared", LOSSES, ids=lambda p: p.loss.kind)
def test_micro_batches_do_not_change_a_step(declared: Preference) -> None:
    whole, cut = learner(declared, clip=0.0), learner(declared, clip=0.0, micro_tokens=52)
    figures = [x.update(PAIRS) for x in (whole, cut)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-9)
    assert figures[0]["pairs"] == 6
    torch.testing.assert_close(gradient(whole), gradient(cut), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weights(whole.learner), weights(cut.learner), rtol=1e-6, atol=1e-9)


def summed(module: Any, t: Trajectory) -> torch.Tensor:
    """The log-prob of all sampled tokens of a trajectory, on its own."""
    (batch,) = collate([t], [np.ones(len(t.turns))], max_tokens=10_000, behaviour=False)
    return (token_logprobs(module, batch, masked_only=True)[0] * torch.from_numpy(batch.mask)).sum()


def ids(t: Trajectory) -> list[int]:
    return collate([t], [np.ones(len(t.turns))], max_tokens=10_000, behaviour=False)[0].ids.tolist()


@pytest.mark.parametrize("declared", LOSSES, ids=lambda p: p.loss.kind)
def test_a_step_is_the_mean_of_its_pairs_one_by_one(declared: Preference) -> None:
    """Trajectory by trajectory through the model, pair by pair through the loss, backward through everything."""
    subject = learner(declared, clip=0.0)
    policy, old, reference = (Bare(seed, dtype=torch.float64).module() for seed in (0, 0, 1))
    chosen = [sum(len(span.ids) for _, span in p.chosen.spans) for p in PAIRS]
    losses = []
    for p, tokens in zip(PAIRS, chosen, strict=True):
        both = [p.chosen, p.rejected]
        if declared.conditional:
            order = [(p.chosen, p.rejected), (p.rejected, p.rejected), (p.rejected, p.chosen), (p.chosen, p.chosen)]
            both += [with_context(t, ids(behind)) for t, behind in order]
        sums = [torch.stack([summed(m, t) for t in both])[:, None] for m in (policy, reference, old)]
        counted = torch.tensor([[float(tokens)], [1.0]])
        rates = torch.tensor([[0.8], [0.3]], dtype=torch.float64)
        fixed = {"reference": sums[1].detach(), "previous": sums[2].detach(), "rates": rates}
        losses.append(pair_loss(declared.loss, Sums(policy=sums[0], tokens=counted, per_pair=np.mean(chosen), **fixed)))
    value = torch.stack(losses).mean()
    value.backward()
    found = subject.update(PAIRS)
    assert found["loss"] == pytest.approx(value.item(), rel=1e-6)
    expected = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient(subject), expected, rtol=1e-4, atol=1e-6)  # its norms round to float32


@pytest.mark.parametrize("declared", LOSSES, ids=lambda p: p.loss.kind)
def test_margins_grow(declared: Preference) -> None:
    subject = learner(declared, total=25)
    pairs = [PAIRS[0], Pair(EPISODES[5], EPISODES[6], 2.0, (0.9, 0.1))]
    before = margins(subject, pairs)
    figures = [subject.update(pairs) for _ in range(25)]
    assert subject.steps == 25
    if declared.conditional:  # a regression, to margins that it sets itself
        assert figures[-1]["loss"] < 0.05 * figures[0]["loss"]
        return
    assert min(after - b for after, b in zip(margins(subject, pairs), before, strict=True)) > 1.0
    if not declared.needs_previous:  # else the loss is another one in every update
        assert figures[-1]["loss"] < figures[0]["loss"]
        assert figures[-1]["margin"] > figures[0]["margin"] + 1.0
        assert figures[-1]["accuracy"] == 1.0


@torch.no_grad()
def margins(subject: PairLearner, pairs: list[Pair]) -> list[float]:
    module = subject.learner.trainable.module()
    return [float(summed(module, p.chosen) - summed(module, p.rejected)) for p in pairs]


def test_likelihood_terms_hold_the_chosen_up() -> None:
    plain, held = (learner(Preference(loss=loss), total=20) for loss in (DPO(beta=1.0), RPO(beta=1.0, eta=1.0)))
    nll = [[x.update(PAIRS[:1])["nll"] for _ in range(20)][-1] for x in (plain, held)]
    assert nll[1] < nll[0] - 0.5


def test_the_previous_policy_is_that_of_the_update() -> None:
    """The first step of an update begins at no distance from it, the later ones do not; the next update anew."""
    subject = learner(Preference(loss=DNO(eta=0.5)), total=8, epochs=2)
    first = learner(Preference(loss=DNO(eta=0.5)), total=8)
    assert first.update(PAIRS)["margin"] == pytest.approx(0.0, abs=1e-12)
    assert first.update(PAIRS)["margin"] == pytest.approx(0.0, abs=1e-12)
    assert subject.update(PAIRS)["margin"] > 0.01


def test_epochs_and_minibatches_are_optimiser_steps_and_state_goes_on() -> None:
    whole = learner(total=8, epochs=2, minibatches=2)
    half = learner(total=8, epochs=2, minibatches=2)
    figures = [x.update(PAIRS) for x in (whole, half)]
    assert figures[0] == figures[1]
    assert (whole.steps, figures[0]["pairs"]) == (4, 3)
    tensors, plain = half.state()
    again = learner(total=8, epochs=2, minibatches=2)
    again.learner.trainable.module().load_state_dict(half.learner.trainable.module().state_dict())
    again.restore({name: value.clone() for name, value in tensors.items()}, plain)
    assert again.update(PAIRS) == whole.update(PAIRS)
    assert torch.equal(weights(again.learner), weights(whole.learner))


def test_nothing_to_learn_moves_nothing() -> None:
    subject = learner()
    before = weights(subject.learner)
    assert subject.update([]) == {}
    assert torch.equal(weights(subject.learner), before)


def test_a_missing_reference_is_refused() -> None:
    with pytest.raises(ConfigError, match="compares with a reference"):
        PairLearner(Bare(), Preference(), Optim(), total_steps=1)
    PairLearner(Bare(), Preference(loss=DNO()), Optim(), total_steps=1)


@pytest.mark.parametrize("loss", [DPO(beta=0.3), RPO(beta=0.3, eta=0.5)])
def test_ranks_divide_by_the_pairs_of_all(monkeypatch: pytest.MonkeyPatch, loss: Loss) -> None:
    """Two ranks with four and two of the pairs: their gradients sum to those of one process with all six."""
    declared = Preference(loss=loss)
    whole = learner(declared, clip=0.0)
    whole.update(PAIRS)
    counts = [tuple(seen) for seen in _totals(monkeypatch, declared)]
    parts = []
    for mine in (PAIRS[:4], PAIRS[4:]):
        subject = learner(declared, clip=0.0)
        monkeypatch.setattr(ranks, "gather", lambda x: [type(x)(*c) for c in counts] if isinstance(x, tuple) else [x])
        subject.update(mine)
        parts.append(gradient(subject))
    torch.testing.assert_close(parts[0] + parts[1], gradient(whole), rtol=1e-4, atol=1e-6)


def _totals(monkeypatch: pytest.MonkeyPatch, declared: Preference) -> list[Any]:
    seen: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "gather", lambda x: [seen.append(x), x][1:] if isinstance(x, tuple) else [x])
        for mine in (PAIRS[:4], PAIRS[4:]):
            learner(declared).update(mine)
    return seen


# --- contexts ---------------------------------------------------------------------------------------------------


def branched() -> Trajectory:
    """Two turns, a rejected draft, and a third turn on a branch that forked from the first."""
    t = EPISODES[5]
    first, second, third = t.turns.items  # type: ignore[union-attr]
    draft = Draft(by="agent", action=second.action)
    second = second.replace(drafts=(draft,), action=second.action.replace(span=_moved(second, prompt=Ids([4]))))
    length = len(first.action.span.prompt) + len(first.action.span.ids)
    third = third.replace(action=third.action.replace(span=_moved(third, branch=1, parent=(0, length))))
    return t.replace(turns=Turns(items=(first, second, third)))


def _moved(turn: Any, **fields: Any) -> TokenSpan:
    moved: TokenSpan = turn.action.span.replace(**fields)
    return moved


@pytest.mark.parametrize("t", [*EPISODES[:3], branched()])
def test_a_context_stands_in_front_of_every_sequence_and_comes_off_again(t: Trajectory) -> None:
    many = [EPISODES[0], t]
    ones = [np.ones(len(x.turns)) for x in many]
    contexts = [[7, 8], [9, 9, 9]]
    longer = [with_context(x, c) for x, c in zip(many, contexts, strict=True)]
    (plain,), (behind,) = (collate(x, ones, max_tokens=10_000) for x in (many, longer))
    for s, owner in enumerate(behind.owners):
        found = behind.ids[behind.bounds[s] :][: len(contexts[owner])]
        assert found.tolist() == contexts[owner]
    bare = without_context(behind, [len(c) for c in contexts])
    rows = {
        (o, tuple(b.ids[i:j]))
        for b in (plain, bare)
        for o, i, j in zip(b.owners, b.bounds[:-1], b.bounds[1:], strict=True)
    }
    assert len(rows) == len(plain.owners) == len(bare.owners)
    assert bare.mask.sum() == plain.mask.sum() == behind.mask.sum()
    assert sorted(bare.positions) == sorted(plain.positions)
    assert sorted(bare.logprobs) == sorted(plain.logprobs)


def test_a_hinted_prompt_keeps_its_context_either_way() -> None:
    t = EPISODES[0]
    hinted = t.turns[0].replace(
        action=t.turns[0].action.replace(span=_moved(t.turns[0], context="hinted", unhinted=Ids([3])))
    )
    span = with_context(t.replace(turns=Turns(items=(hinted,))), [7]).turns[0].action.span
    assert span is not None
    assert (span.prompt[0], list(span.unhinted)) == (7, [7, 3])


def test_columns_have_no_context() -> None:
    with pytest.raises(ConfigError, match="holds arrays"):
        with_context(EPISODES[0].replace(turns=Columns(agents={})), [1])
