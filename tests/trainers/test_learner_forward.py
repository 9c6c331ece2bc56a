"""What an objective reads of the models: layers, masked observations, a teacher; and which parameters move."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from learning import CREDIT, EPISODES, REWARDS, Bare, weights

from agentgym.collate import collate
from agentgym.errors import ConfigError, ModelError
from agentgym.modeling import build
from agentgym.modeling.logprobs import (
    Head,
    chunked_divergence,
    first_layers,
    head_of,
    packed_hidden,
    token_logprobs,
)
from agentgym_trainers.forward import Blank, Forward, blanked_ids, joined, trained
from agentgym_trainers.learner import Learner, Optim
from agentgym_trainers.objective.declare import (
    Distillation,
    Layer,
    Objective,
    Perception,
    Truncate,
)

(BATCH,) = collate(EPISODES, CREDIT, max_tokens=10_000, rewards=REWARDS)
AT = torch.from_numpy(trained(BATCH))


# --- layers -----------------------------------------------------------------------------------------------------


def test_the_last_layer_is_the_model_and_a_layer_is_its_hidden_state() -> None:
    """Against transformers' own hidden states, sequence by sequence: norm and unembedding on what layer 1 gave."""
    model: Any = Bare(layers=3).model
    with torch.no_grad():
        whole = token_logprobs(model, BATCH)[0]
        assert torch.equal(token_logprobs(model, BATCH, layer=3)[0], whole)
        found = token_logprobs(model, BATCH, layer=1)[0]
        a, b = (int(x) for x in BATCH.bounds[:2])
        ids = torch.from_numpy(BATCH.ids[a:b].astype(np.int64))
        state = model.model(ids[None], output_hidden_states=True).hidden_states[1]
        logits = head_of(model).logits(model.model.norm(state)[0])
        expected = torch.log_softmax(logits, -1)[:-1].gather(-1, ids[1:, None])[:, 0]
    torch.testing.assert_close(found[a + 1 : b], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, whole)
    assert len(model.model.layers) == 3


def test_layers_that_do_not_exist_are_refused_and_the_model_stays_whole() -> None:
    model = Bare(layers=2).model
    for wrong in (0, 3):
        with pytest.raises(ModelError, match=f"no layer {wrong} in a model of 2"), first_layers(model, wrong):
            pass
    with pytest.raises(RuntimeError, match="inside"), first_layers(model, 1):
        raise RuntimeError("inside")
    assert len(model.model.layers) == 2


def test_a_source_switches_to_the_last_layer_after_its_steps() -> None:
    """Steps 1..S read layer k for old and new alike (5.16), so the ratio is one; step S + 1 reads the last layer."""
    objective = Objective(source=Layer(layer=1, steps=30))
    forward = Forward(objective, Bare().module())
    assert [forward.prepare(BATCH, step).layer for step in (0, 29, 30)] == [1, 1, None]
    early = forward.tokens(forward.prepare(BATCH, 29))
    torch.testing.assert_close(early.logp, early.old)
    late = forward.prepare(BATCH, 30).fixed
    assert torch.equal(late.old, late.sampled)
    learner = Learner(Bare(), Objective(source=Layer(layer=1, steps=1)), Optim(), total_steps=2)
    before = [p.clone() for p in learner.trainable.module().model.layers[1].parameters()]  # type: ignore
    assert learner.update(EPISODES, CREDIT)["ratio"] == pytest.approx(1.0, abs=1e-6)
    after = list(learner.trainable.module().model.layers[1].parameters())  # type: ignore
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert abs(learner.update(EPISODES, CREDIT)["ratio"] - 1.0) > 1e-3


def test_a_layer_is_not_compared_with_the_sampler() -> None:
    with pytest.raises(ConfigError, match="last layer"):
        Objective(source=Layer(layer=1), proximal="learner", behaviour=(Truncate(),))


# --- masked observations ----------------------------------------------------------------------------------------


def test_observations_are_blanked_and_nothing_else() -> None:
    blank = Blank(token=19, kept=(3,))
    everything = blanked_ids(BATCH, 1.0, blank, seed=1)
    seen = (BATCH.turns < 0) & (BATCH.positions > 0) & (BATCH.ids != 3)
    assert (everything[seen] == 19).all()
    assert (everything[~seen] == BATCH.ids[~seen]).all()
    assert (blanked_ids(BATCH, 0.0, blank, seed=1) == BATCH.ids).all()
    drawn = [blanked_ids(BATCH, 0.6, Blank(token=-1), seed=s) == -1 for s in range(60)]
    free = (BATCH.turns < 0) & (BATCH.positions > 0)
    assert np.mean(np.stack(drawn)[:, free]) == pytest.approx(0.6, abs=0.03)


def test_what_is_blanked_does_not_depend_on_the_cut() -> None:
    def by_text(max_tokens: int, seed: int) -> set[tuple[bytes, bytes]]:
        found = set()
        for batch in collate(EPISODES, CREDIT, max_tokens=max_tokens):
            ids = blanked_ids(batch, 0.5, Blank(), seed)
            spans = zip(batch.bounds[:-1], batch.bounds[1:], strict=True)
            found |= {(batch.ids[a:b].tobytes(), ids[a:b].tobytes()) for a, b in spans}
        return found

    assert by_text(10_000, 4) == by_text(24, 4) != by_text(24, 5)


def test_the_masked_policy_is_the_policy_on_blanked_ids() -> None:
    """It carries gradient (5.17), and equals a plain pass over the blanked sequences."""
    model = Bare().module()
    forward = Forward(Objective(regularisers=(Perception(share=0.5),)), model, seed=3, blank=Blank(token=2))
    micro = forward.prepare(BATCH, 0)
    tokens = forward.tokens(micro)
    assert micro.blanked is not None
    assert tokens.masked is not None
    hidden = packed_hidden(model, micro.blanked, BATCH.positions, BATCH.bounds)[AT - 1]
    targets = torch.from_numpy(BATCH.ids[trained(BATCH)].astype(np.int64))
    expected = torch.log_softmax(head_of(model).logits(hidden), -1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(tokens.masked, expected)
    assert tokens.masked.requires_grad
    assert not torch.allclose(tokens.masked, tokens.logp)
    again = forward.prepare(BATCH, 0).blanked
    assert again is not None
    assert (again == micro.blanked).all()
    assert (forward.prepare(BATCH, 1).blanked != micro.blanked).any()


# --- a teacher --------------------------------------------------------------------------------------------------


def slow_divergence(policy: torch.Tensor, teacher: torch.Tensor, beta: float) -> float:
    """The definition, over probabilities, term by term."""
    p, q = torch.softmax(teacher, -1).tolist(), torch.softmax(policy, -1).tolist()

    def kl(x: list[float], y: list[float]) -> float:
        return sum(a * np.log(a / b) for a, b in zip(x, y, strict=True))

    if beta in (0.0, 1.0):
        return kl(p, q) if beta == 0.0 else kl(q, p)
    middle = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * kl(p, middle) + (1 - beta) * kl(q, middle)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("chunk", [2, None])
def test_divergence_from_a_teacher(beta: float, chunk: int | None) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, taught = (torch.randn(5, n, generator=g, dtype=torch.float64) for n in (4, 3))
    heads = [Head(torch.randn(7, n, generator=g, dtype=torch.float64)) for n in (4, 3)]
    hidden.requires_grad_()

    def of(x: torch.Tensor) -> torch.Tensor:
        return chunked_divergence(x, heads[0], taught, heads[1], beta=beta, temperature=0.7, chunk=chunk)

    logits = heads[0].logits(hidden) / 0.7, heads[1].logits(taught) / 0.7
    expected = [slow_divergence(a, b, beta) for a, b in zip(*logits, strict=True)]
    assert of(hidden).tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.autograd.gradcheck(of, (hidden,))


def test_divergence_from_a_teacher_is_that_of_trl() -> None:
    """The sum over the vocabulary of trl's per-entry generalised Jensen-Shannon divergence."""
    trl = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="the extra [compare]")
    g = torch.Generator().manual_seed(0)
    hidden, taught, weight = (
        torch.randn(6, 4, generator=g),
        torch.randn(6, 4, generator=g),
        torch.randn(9, 4, generator=g),
    )
    for beta in (0.0, 0.3, 1.0):
        ours = chunked_divergence(hidden, Head(weight), taught, Head(weight), beta=beta, temperature=2.0)
        theirs = trl.GKDTrainer.generalized_jsd_loss(
            (hidden @ weight.T)[None], (taught @ weight.T)[None], beta=beta, temperature=2.0, reduction="sum"
        )
        assert float(ours.sum()) == pytest.approx(float(theirs), rel=1e-5)


def test_distillation_pulls_towards_the_teacher_on_its_own_tokens() -> None:
    teacher = Bare(seed=5).module()
    with pytest.raises(ConfigError, match=r"model\.teacher"):
        Learner(Bare(), Objective(regularisers=(Distillation(),)), Optim(), total_steps=1)
    objective = Objective(regularisers=(Distillation(coef=1.0, beta=0.0, threshold=1.0),))
    learner = Learner(Bare(), objective, Optim(lr=1e-2, warmup=0), total_steps=20, teacher=teacher)
    flat = [np.zeros(len(t.turns)) for t in EPISODES]
    seen = [learner.update(EPISODES, flat, [1.0] * len(EPISODES))["divergence"] for _ in range(20)]
    assert seen[-1] < 0.5 * seen[0]
    still = Learner(Bare(), objective, Optim(lr=1e-2, warmup=0), total_steps=20, teacher=teacher)
    start = weights(still).clone()
    still.update(EPISODES, flat, [0.5] * len(EPISODES))
    assert torch.equal(weights(still), start)


def test_a_teacher_with_another_vocabulary_is_refused() -> None:
    other = build.tiny(21, hidden=16, layers=1, heads=2, kv_heads=1)
    learner = Learner(Bare(), Objective(regularisers=(Distillation(),)), Optim(), total_steps=1, teacher=other)
    with pytest.raises(ModelError, match="20 and 21 logits"):
        learner.update(EPISODES, CREDIT, REWARDS)


# --- a step as one, and what moves ------------------------------------------------------------------------------


def test_joined_tokens_are_those_of_one_batch() -> None:
    """Sequences are renumbered and labels matched by name."""
    forward = Forward(Objective(), Bare().module())
    whole = forward.prepare(BATCH, 0).fixed
    parts = collate(EPISODES[:4], CREDIT[:4], max_tokens=24, rewards=REWARDS[:4])
    parts += collate(EPISODES[4:], CREDIT[4:], max_tokens=24, rewards=REWARDS[4:])
    for part in parts[::2]:
        part.labels = ("answer", "control", "")
        part.segments = np.asarray([2, 1, 0], np.int16)[part.segments]
    found = joined([forward.prepare(part, 0).fixed for part in parts])
    assert found.sequences == whole.sequences == len(EPISODES)
    assert torch.equal(found.sequence, torch.sort(found.sequence).values)

    def rows(t: Any) -> list[tuple[Any, ...]]:
        named = [t.labels[i] for i in t.segment.tolist()]
        facts = [x[t.sequence].tolist() for x in (t.group, t.domain, t.reward)]
        return sorted(zip(t.sampled.tolist(), t.advantages.tolist(), t.turn.tolist(), named, *facts, strict=True))

    assert rows(found) == rows(whole)


def test_no_gradient_takes_memory_between_updates() -> None:
    trainable = Bare()
    trainable.module().bfloat16()
    learner = Learner(trainable, Objective(), Optim(), total_steps=1)
    assert learner.update(EPISODES, CREDIT)["grad_norm"] > 0
    assert all(p.grad is None for p in (*learner.parameters, *learner.masters))


def test_only_the_parameters_that_are_named_move() -> None:
    trainable = Bare()
    before = {name: p.clone() for name, p in trainable.module().named_parameters()}
    reached = set()
    for name, p in trainable.module().named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: reached.add(name))
    learner = Learner(trainable, Objective(), Optim(only=r"layers\.1\.mlp"), total_steps=1)
    learner.update(EPISODES, CREDIT)
    moved = {name for name, p in trainable.module().named_parameters() if not torch.equal(p, before[name])}
    assert moved == reached == {name for name in before if "layers.1.mlp" in name}
    with pytest.raises(ConfigError, match=r"optim.only = 'layer.9' finds no parameter; .*embed_tokens"):
        Learner(trainable, Objective(), Optim(only="layer.9"), total_steps=1)
