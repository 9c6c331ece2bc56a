"""Reward models: the losses by hand, and really trained on preferences made on the spot, with held-out figures."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from making import trajectory

from agentgym.errors import ConfigError, ModelError
from agentgym.modeling import build
from agentgym.modeling.tokenizer import closed_vocabulary
from agentgym.rewards import composer, composites
from agentgym.rewards.judges import declared, judged
from agentgym.types import Action, Task, Trajectory, Turns
from agentgym_trainers.reward_models import (
    Backbone,
    Pairs,
    Ratings,
    Reactions,
    RewardModel,
    Training,
    accuracy,
    against,
    calibration,
    ensemble,
    feedback,
    heads,
    joined,
)
from agentgym_trainers.reward_models.examples import bradley_terry

VOCABULARY, SEEN, LENGTH = 24, 16, 8
WORDS = [f"w{i}" for i in range(VOCABULARY)]
SMALL = Backbone(hidden=16, layers=1, heads=2, kv_heads=1)
QUICK = Training(steps=50, batch=32, lr=1e-2)


@pytest.fixture(scope="module")
def tokenizer():
    return closed_vocabulary([*WORDS, "assistant:"])


class World(NamedTuple):
    """Every word has a true utility; pairs are compared with Bradley-Terry noise and hold the first `SEEN` words."""

    rng: np.random.Generator
    utility: np.ndarray

    @classmethod
    def make(cls, seed: int) -> World:
        rng = np.random.default_rng(seed)
        return cls(rng, rng.normal(size=VOCABULARY))

    def rows(self, count: int, low: int = 0, high: int = SEEN) -> np.ndarray:
        return self.rng.integers(low, high, (count, LENGTH))

    def gold(self, rows: np.ndarray) -> np.ndarray:
        return self.utility[rows].sum(-1)

    def pairs(self, count: int, noise: bool = True) -> Pairs:
        a, b = self.rows(count), self.rows(count)
        margin = self.gold(a) - self.gold(b)
        first = self.rng.random(count) < 1 / (1 + np.exp(-margin)) if noise else margin > 0
        return Pairs(texts(np.where(first[:, None], a, b)), texts(np.where(first[:, None], b, a)))


def texts(rows: np.ndarray) -> list[str]:
    return [" ".join(WORDS[i] for i in row) for row in rows]


def episode(text: str, **payload: str) -> Trajectory:
    base = trajectory([{}])
    turn = base.turns[0].replace(action=Action(text=text))
    changed = base.episode.replace(task=Task(env="test-v0", payload=payload))
    return base.replace(turns=Turns(items=(turn,)), episode=changed)


# --- losses and figures -------------------------------------------------------------------------------------------


def test_bradley_terry_by_hand() -> None:
    assert float(bradley_terry(torch.tensor([[2.0]]), torch.tensor([[0.5]]))) == pytest.approx(0.201413, abs=1e-6)


def test_labels_that_are_missing_cost_nothing() -> None:
    examples = Ratings(["a", "b"], [[1.0, None], [None, 0.5]])
    scores = torch.tensor([[0.0, 9.0], [9.0, 0.0]], requires_grad=True)
    loss = examples.loss(scores, [0, 1])
    loss.backward()
    assert loss.item() == pytest.approx((1.0 + 0.25) / 2)
    assert scores.grad is not None
    assert scores.grad.tolist() == [[-1.0, 0.0], [0.0, -0.5]]
    unknown = Ratings(["a"], [[None, None]]).loss(torch.ones(1, 2, requires_grad=True), [0])
    assert unknown.item() == 0.0


def test_calibration_by_hand() -> None:
    found = calibration([0.1, 0.1, 0.9, 0.9], [0, 1, 1, 1])
    assert found.error == pytest.approx(0.5 * 0.4 + 0.5 * 0.1)
    assert found.brier == pytest.approx((0.01 + 0.81 + 0.01 + 0.01) / 4)
    assert found.bins == (pytest.approx((0.1, 0.5, 2)), pytest.approx((0.9, 1.0, 2)))
    assert calibration([1.0], [1]).error == 0.0
    assert accuracy([1, 2, 3], [0, 2, 4]) == 0.5


# --- trained ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tokenizer):
    worlds = [World.make(seed) for seed in (0, 1, 2)]
    models = [ensemble(tokenizer, 4, backbone=SMALL, seed=seed) for seed in (0, 1, 2)]
    for world, model in zip(worlds, models, strict=True):
        model.fit(world.pairs(150), QUICK)
    return worlds, models


def test_every_member_orders_held_out_pairs(trained) -> None:
    for world, model in zip(*trained, strict=True):
        held_out = world.pairs(200, noise=False)
        scores = model.scores(held_out.texts)
        assert min(accuracy(scores[:200, k], scores[200:, k]) for k in range(4)) > 0.65


def test_members_disagree_more_about_what_they_have_not_seen(trained) -> None:
    for world, model in zip(*trained, strict=True):
        seen, unseen = world.rows(200), world.rows(200, SEEN, VOCABULARY)
        assert model.scores(texts(unseen)).var(1).mean() > 1.5 * model.scores(texts(seen)).var(1).mean()


def test_cautious_ensembles_are_over_optimised_less_than_one_model(trained) -> None:
    """Best of 64, with words that no pair held: the true utility of what is chosen, over three worlds of 40 prompts.

    The plain mean of the ensemble does as well here; what the test shows is the gain over a single reward model.
    """
    names = [f"rm.{k}" for k in range(4)]
    declared = {
        "wco": composer(composites.wco(names)),
        "uwo": composer(composites.uwo(names, 0.5, 0)),
        **{name: composer(name) for name in names},
    }
    delivered: dict[str, list[float]] = {name: [] for name in declared}
    for world, model in zip(*trained, strict=True):
        rows = world.rows(40 * 64, 0, VOCABULARY)
        true = world.gold(rows).reshape(40, 64)
        ledgers = model.score([episode(t) for t in texts(rows)])
        for name, made in declared.items():
            proxy = np.asarray([made.compose(terms).value for terms in ledgers]).reshape(40, 64)
            delivered[name].append(float(true[np.arange(40), proxy.argmax(1)].mean()))
    single = np.mean([delivered[name] for name in names])
    assert np.mean(delivered["wco"]) > single + 0.2
    assert np.mean(delivered["uwo"]) > single + 0.2


def test_probabilities_of_love_come_true(tokenizer) -> None:
    world = World.make(3)
    rows = world.rows(700)
    loved = (world.rng.random(700) < 1 / (1 + np.exp(-world.gold(rows)))).tolist()
    model = feedback(tokenizer, backbone=SMALL)
    model.fit(Reactions(texts(rows[:400]), loved[:400]), QUICK)
    p = model.scores(texts(rows[400:]))[:, 0]
    found = calibration(p, loved[400:])
    base = calibration(np.full(300, np.mean(loved[:400])), loved[400:])
    assert ((p > 0) & (p < 1)).all()
    assert found.brier < 0.8 * base.brier
    assert found.error < 0.15


def test_heads_learn_their_own_labels_from_what_was_rated(tokenizer) -> None:
    world = World.make(4)
    rows, other = world.rows(500), World.make(5).utility
    labels = np.stack([world.gold(rows), other[rows].sum(1)], 1)
    labels = (labels - labels.mean(0)) / labels.std(0)
    asked = world.rng.random((400, 2)) < 0.7
    given = [[float(x) if a else None for x, a in zip(*pair, strict=True)] for pair in zip(labels, asked, strict=False)]
    model = heads(tokenizer, ("safe", "helpful"), backbone=SMALL)
    model.fit(Ratings(texts(rows[:400]), given), Training(steps=80, batch=32, lr=1e-2))
    found = model.scores(texts(rows[400:]))
    matched = np.corrcoef(found.T, labels[400:].T)[:2, 2:]
    assert min(matched[0, 0], matched[1, 1]) > 0.7
    assert [t.name for t in model.score([episode("w1 w2")])[0]] == ["safe", "helpful"]


def test_a_reward_against_a_reference_prefers_the_same_policy(tokenizer) -> None:
    rng = np.random.default_rng(0)

    def drawn(policy: int) -> str:
        """Three words in four from the policy's own six."""
        own, free = rng.integers(0, 6, LENGTH) + 6 * policy, rng.integers(0, VOCABULARY, LENGTH)
        return texts(np.where(rng.random(LENGTH) < 0.75, own, free)[None])[0]

    def pairs(count: int) -> Pairs:
        found = []
        for _ in range(count):
            policy, other = rng.permutation(4)[:2]
            reference = drawn(policy)
            found.append((joined(reference, drawn(policy)), joined(reference, drawn(other))))
        chosen, rejected = zip(*found, strict=True)
        return Pairs(chosen, rejected)

    model = against(tokenizer, lambda t: t.task.payload["reference"], backbone=Backbone(hidden=16, heads=2, kv_heads=1))
    model.fit(pairs(400), Training(steps=100, batch=32, lr=1e-2))
    held_out = pairs(100)
    scores = model.scores(held_out.texts)[:, 0]
    assert accuracy(scores[:100], scores[100:]) > 0.8
    same, other = (episode("w6 w7 w8 w9", reference=said) for said in ("w7 w6 w10 w9", "w20 w19 w22 w23"))
    alike, unlike = (terms[0].value for terms in model.score([same, other]))
    assert alike > unlike


# --- keeping ------------------------------------------------------------------------------------------------------


def test_a_saved_model_scores_the_same_and_judges(trained, tmp_path: Path) -> None:
    model = trained[1][0]
    model.save(tmp_path / "raters")
    again = RewardModel.load(tmp_path / "raters")
    some = texts(trained[0][0].rows(5))
    assert again.scores(some) == pytest.approx(model.scores(some), abs=1e-6)
    judge = declared(
        [{"kind": "custom", "target": "agentgym_trainers.reward_models:judge", "path": str(tmp_path / "raters")}]
    )
    (found,) = asyncio.run(judged(judge, [episode(some[0])]))
    said = [t.value for t in found.rewards]
    assert said == pytest.approx(model.scores([f"assistant: {some[0]}"])[0], abs=1e-6)
    with pytest.raises(ModelError, match="no reward model"):
        RewardModel.load(tmp_path)


def test_training_depends_on_its_seed_alone(tokenizer) -> None:
    def run(seed: int) -> np.ndarray:
        torch.manual_seed(np.random.default_rng().integers(1 << 30))
        model = ensemble(tokenizer, 2, backbone=SMALL, seed=seed)
        model.fit(World.make(0).pairs(20), Training(steps=5, batch=8))
        return model.scores(["w1 w2 w3", "w4"])

    assert run(1) == pytest.approx(run(1), abs=0)
    assert run(1) != pytest.approx(run(2), abs=1e-3)


def test_scores_do_not_depend_on_what_is_scored_beside_them(trained) -> None:
    model, some = trained[1][0], ["w1 w2 w3", "w4", "", "w1 w2 w3 w4 w5 w6 w7 w8 w9"]
    assert model.scores(some) == pytest.approx(np.concatenate([model.scores([t]) for t in some]), abs=1e-5)
    assert model.scores([]).shape == (0, 4)


def test_pairs_are_standardised_so_that_members_compare(trained) -> None:
    world, model = World.make(0), trained[1][0]
    scores = model.scores(world.pairs(150).texts)
    assert scores.mean(0) == pytest.approx(np.zeros(4), abs=1e-4)
    assert scores.std(0) == pytest.approx(np.ones(4), abs=1e-4)


def test_any_hub_folder_can_be_the_backbone(tokenizer, tmp_path: Path) -> None:
    base = build.tiny(len(tokenizer), hidden=16, layers=1, heads=2, kv_heads=1)
    build.save(base, tokenizer, tmp_path / "base")
    model = feedback(tokenizer, backbone=Backbone(path=str(tmp_path / "base")))
    assert model.scores(["w1"]).shape == (1, 1)


def test_examples_that_do_not_match_are_refused(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 texts and 2 rejected texts"):
        Pairs(["a"], ["b", "c"])
    with pytest.raises(ConfigError, match="0 texts"):
        Reactions([], [])
    with pytest.raises(ConfigError, match=r"labels of shape \(1, 1\)"):
        heads(tokenizer, ("a", "b"), backbone=SMALL).fit(Ratings(["w1"], [[1.0]]), Training(steps=1))
    with pytest.raises(ConfigError, match="2 probabilities and 1 outcomes"):
        calibration([0.5, 0.5], [1])
    against(tokenizer, lambda t: "", backbone=SMALL).save(tmp_path / "polar")
    with pytest.raises(ConfigError, match="scores against a reference"):
        RewardModel.load(tmp_path / "polar")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda tok: Ratings(["a", "b"], [[1.0], [float("inf")]]), "finite number, or None"),
        (lambda tok: Ratings(["a", "b"], [[1.0], [1.0, 2.0]]), "as many labels"),
        (lambda tok: Training(steps=0), "at least 1"),
        (lambda tok: Training(lr=float("inf")), "lr is positive"),
        (lambda tok: feedback(tok, backbone=SMALL).fit(Pairs(["w1"], ["w2"])), "fit it to Reactions"),
        (lambda tok: heads(tok, ("a", "b"), backbone=SMALL).fit(Reactions(["w1"], [True])), "2 heads"),
        (lambda tok: ensemble(tok, 0), "at least one member"),
        (lambda tok: heads(tok, ()), "at least one"),
        (lambda tok: calibration([1.5], [1]), "from 0 to 1"),
        (lambda tok: calibration([float("nan")], [1]), "from 0 to 1"),
        (lambda tok: accuracy([], []), "at least one"),
    ],
)
def test_what_a_reward_model_cannot_learn_from_is_refused(tokenizer, wrong, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        wrong(tokenizer)


def test_pairs_of_equal_texts_leave_the_scale_alone(tokenizer) -> None:
    model = ensemble(tokenizer, 1, backbone=SMALL)
    model.fit(Pairs(["w1"], ["w1"]), Training(steps=1))
    assert np.abs(model.scores(["w1", "w2 w3"])).max() < 100.0
