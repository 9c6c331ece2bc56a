"""The enumerable worlds, the tabular model and the enumerated estimate, each against another way to know the same."""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np
import pytest
import torch

from agentgym.advantages import advantages
from agentgym.modeling.logprobs import token_logprobs
from agentgym.policy import Scripted
from agentgym.rollout import Runner, episodes
from agentgym.types import Action, Observation, Sampling, WeightsVersion
from agentgym_trainers.exact.bigram import Model
from agentgym_trainers.exact.composition import load
from agentgym_trainers.exact.estimate import Lab, gradient
from agentgym_trainers.exact.mdp import MDP, environment, log_policy
from agentgym_trainers.exact.worlds import FAULTY, SCALES, STALE, STOPPING, TOOL, WORLDS
from agentgym_trainers.learner import Learner, Optim

SUM = {"ratio": {"kind": "none"}, "gate": {"kind": "none"}, "aggregation": {"kind": "seq_mean_token_sum"}}
GRPO = {"objective": {"aggregation": {"kind": "seq_mean_token_mean"}}}
RLOO = {"advantage": [{"centre": "leave_one_out", "scale": "none"}], "objective": SUM}


def somewhere(mdp: MDP, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, 0.7, mdp.legal.shape)


def tasks(mdp: MDP, count: int) -> list:
    stream = environment(mdp).tasks()
    return [next(stream) for _ in range(count)]


# --- worlds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mdp", WORLDS.values(), ids=WORLDS)
def test_paths_are_all_there_is(mdp: MDP) -> None:
    chances = mdp.chances(log_policy(somewhere(mdp), mdp.legal))
    for prompt in range(len(mdp.prompts)):
        assert sum(c for c, path in zip(chances, mdp.paths, strict=True) if path.prompt == prompt) == pytest.approx(1)
    assert len({path[:3] for path in mdp.paths}) == len(mdp.paths) <= 8


@pytest.mark.parametrize("mdp", WORLDS.values(), ids=WORLDS)
def test_dynamic_programming_agrees_with_the_list_of_paths(mdp: MDP) -> None:
    logs = log_policy(somewhere(mdp), mdp.legal)
    truth = [0.0 if path.failed else mdp.record(path).metrics["truth"] for path in mdp.paths]
    listed = float(mdp.intended(logs) @ truth) / len(mdp.prompts)
    assert mdp.mean(mdp.value(logs)) == pytest.approx(listed, abs=1e-12)


@pytest.mark.parametrize("mdp", WORLDS.values(), ids=WORLDS)
def test_the_optimal_policy_has_the_best_value_and_no_path_has_more(mdp: MDP) -> None:
    surely = 40.0 * np.eye(len(mdp.actions))[mdp.optimal()]
    assert mdp.value(log_policy(surely, mdp.legal)) == pytest.approx(mdp.best(), abs=1e-12)
    for path in mdp.paths:
        start = mdp.states.index(mdp.prompts[path.prompt])
        assert path.failed or mdp.record(path).metrics["truth"] <= mdp.best()[start] + 1e-12


def test_known_optima() -> None:
    assert {name: round(mdp.mean(mdp.best()), 9) for name, mdp in WORLDS.items()} == {
        "stopping": 1.0,
        "scales": 0.55,
        "tool": 1.0,
        "faulty": 1.0,
        "stale": 1.0,
    }


@pytest.mark.parametrize("mdp", [STOPPING, SCALES, TOOL], ids=lambda mdp: mdp.name)
async def test_the_runner_records_what_the_list_says(mdp: MDP) -> None:
    for path in mdp.paths:
        steps = iter(path.decisions)

        def act(observation: Observation, steps=steps) -> Action:  # type: ignore[no-untyped-def]
            state, action = next(steps)
            assert observation.messages[-1].text == mdp.states[state]
            return mdp.reply(state, action, 0.0)

        runner = Runner(environment(mdp), Scripted(lambda episode, agent, act=act: act))  # type: ignore[misc]
        (played,) = await runner.collect(episodes([mdp.task(path.prompt)]))
        listed = mdp.record(path)
        assert played.content().turns == listed.turns
        assert (played.status, played.metrics, played.labels) == (listed.status, listed.metrics, listed.labels)


async def test_an_environment_that_breaks_is_a_failure_and_not_a_return() -> None:
    theta = np.zeros(FAULTY.legal.shape)
    theta[:, FAULTY.actions.index("risky")] = 30.0
    runner = Runner(environment(FAULTY), Model(FAULTY, theta).engine, retries=0)
    found = await runner.collect(episodes(tasks(FAULTY, 200)))
    failed = [t for t in found if t.status == "failed"]
    assert 60 < len(failed) < 140
    listed = next(FAULTY.record(path) for path in FAULTY.paths if path.failed)
    assert all(len(t.turns) == len(listed.turns) == 1 for t in failed)


async def test_a_reply_that_is_no_action_is_an_outcome() -> None:
    runner = Runner(environment(TOOL), Scripted(lambda e, a: lambda o: Action(text="nonsense")))
    (found,) = await runner.collect(episodes(tasks(TOOL, 1)))
    assert found.status == "terminated"
    assert found.metrics == {"truth": 0.0, "success": 0.0}


async def test_the_tabular_policy_samples_its_table() -> None:
    theta = somewhere(SCALES)
    model = Model(SCALES, theta)
    found = await Runner(environment(SCALES), model.engine).collect(episodes(tasks(SCALES, 2000)))
    seen = Counter((t.labels["prompt"], t.turns[0].action.text) for t in found)
    policy = np.exp(log_policy(theta, SCALES.legal))
    for s, state in enumerate(SCALES.states):
        for a, action in enumerate(SCALES.actions):
            p = policy[s, a]
            assert seen[state, action] / 1000 == pytest.approx(p, abs=4 * (p * (1 - p) / 1000) ** 0.5)
    first = found[0].turns[0].action
    s, a = SCALES.states.index(found[0].labels["prompt"]), SCALES.actions.index(first.text)
    assert first.span.logprobs[0] == pytest.approx(np.log(policy[s, a]), abs=1e-6)


async def test_at_temperature_zero_the_best_action_is_taken() -> None:
    theta = somewhere(SCALES, 3)
    runner = Runner(environment(SCALES), Model(SCALES, theta).engine, sampling=Sampling(temperature=0.0))
    found = await runner.collect(episodes(tasks(SCALES, 8)))
    best = {word: SCALES.actions[theta[s].argmax()] for s, word in enumerate(SCALES.states)}
    assert all(t.turns[0].action.text == best[t.labels["prompt"]] for t in found)


# --- the model --------------------------------------------------------------------------------------------------


def batch_of(model: Model, mdp: MDP):  # type: ignore[no-untyped-def]
    records = [mdp.record(path, group="g", member=i) for i, path in enumerate(mdp.paths)]
    (batch,) = model.collate(records, [np.ones(len(t.turns)) for t in records], max_tokens=1000)
    return batch


@pytest.mark.parametrize("layers", [1, 2])
def test_log_probs_of_the_bigram_are_those_of_its_table(layers: int) -> None:
    model = Model(TOOL, somewhere(TOOL), layers=layers)
    with torch.no_grad():
        for layer in model.bigram.base_model.layers[:-1]:
            layer.table.normal_(generator=torch.Generator().manual_seed(0))
    batch = batch_of(model, TOOL)
    logp, entropy = token_logprobs(model.bigram, batch)
    logs = log_policy(model.theta(), TOOL.legal)
    at = np.flatnonzero(batch.mask)
    states, actions = batch.ids[at - 1], batch.ids[at] - len(TOOL.states)
    assert logp.detach().numpy()[at] == pytest.approx(logs[states, actions], abs=1e-5)
    expected = -(np.exp(logs) * logs).sum(-1)[states]
    assert entropy.detach().numpy()[at] == pytest.approx(expected, abs=1e-5)


def test_hidden_states_of_a_layer_are_those_below_it() -> None:
    model = Model(STOPPING, somewhere(STOPPING), layers=2)
    final, states = model.bigram.base_model(torch.tensor([[0, 1]]), output_hidden_states=True)
    assert len(states) == 3
    assert torch.equal(final, states[-1])
    assert torch.equal(states[1][0, 0, 3:5], torch.zeros(2))  # the first table is empty
    assert not torch.equal(final, states[1])


# --- the estimate -----------------------------------------------------------------------------------------------


def learnt(model: Model, objective, found, values) -> np.ndarray:  # type: ignore[no-untyped-def]
    """-gradient of the loss, as the learner finds it."""
    learner = Learner(model, objective, Optim(lr=1e-12, clip=0.0, warmup=0), total_steps=1)
    seen: list[np.ndarray] = []
    table = model.bigram.base_model.layers[-1].table
    table.register_post_accumulate_grad_hook(lambda _: seen.append(model.gradient()))
    learner.update(found, values)  # gives the gradient back once the step is taken
    return -seen[-1]


@pytest.mark.parametrize("tables", [GRPO, RLOO], ids=["grpo", "rloo"])
def test_the_learner_finds_the_gradient_of_a_listed_step(tables: dict) -> None:
    composition, theta = load(tables), somewhere(TOOL)
    lab, logs = Lab(composition, TOOL, members=3), log_policy(theta, TOOL.legal)
    for step in lab.steps[::5]:
        (found,) = gradient(lab.coefficients(logs, logs, [step]), logs).sum((1, 2))
        records = [TOOL.record(TOOL.paths[p], group="0", member=m) for m, p in enumerate(step[0])]
        drawn = [_with_logprobs(t, logs) for t in records]
        values = advantages([(t, TOOL.composer.trajectory(t)) for t in drawn], composition.advantage)
        assert learnt(Model(TOOL, theta), composition.objective, drawn, values) == pytest.approx(found, abs=1e-5)


def _with_logprobs(t, logs):  # type: ignore[no-untyped-def]
    """The record as this policy would have sampled it."""
    turns = []
    for turn in t.turns.items:
        state, action = turn.action.span.prompt[0], turn.action.span.ids[0] - len(TOOL.states)
        turns.append(turn.replace(action=TOOL.reply(state, action, float(logs[state, action]))))
    return t.replace(turns=t.turns.replace(items=tuple(turns)))


def test_sampled_updates_average_to_the_listed_expectation() -> None:
    """Runner, composer, advantages and learner, 400 groups: every entry within four standard errors."""
    composition, theta = load(RLOO), somewhere(STOPPING)
    expected = Lab(composition, STOPPING, members=4).estimate(theta)
    model = Model(STOPPING, theta)
    asyncio.run(model.publish(WeightsVersion(number=0)))
    found = Runner(environment(STOPPING), model.engine).run_sync(episodes(tasks(STOPPING, 400), 4))
    groups = [found[i : i + 4] for i in range(0, len(found), 4)]
    steps = []
    for group in groups:
        values = advantages([(t, STOPPING.composer.trajectory(t)) for t in group], composition.advantage)
        steps.append(learnt(model, composition.objective, group, values))
    mean, error = np.mean(steps, 0), np.std(steps, 0) / np.sqrt(len(steps))
    listed = expected.expected.sum((0, 1))
    assert np.abs(listed).max() > 3 * error.max()  # the test could fail
    assert (np.abs(mean - listed) <= 4 * error + 1e-6).all()
    trace = float(np.var(steps, 0).sum())
    assert trace == pytest.approx(expected.trace, rel=0.2)


def test_the_true_gradient_is_the_slope_of_the_value() -> None:
    lab, theta = Lab(load(RLOO), TOOL, members=2), somewhere(TOOL)
    found = lab.true(log_policy(theta, TOOL.legal)).sum((0, 1))
    for s, a in np.ndindex(*theta.shape):
        moved = [theta.copy(), theta.copy()]
        moved[0][s, a] += 1e-5
        moved[1][s, a] -= 1e-5
        up, down = (lab.value(log_policy(x, TOOL.legal)) for x in moved)
        assert found[s, a] == pytest.approx((up - down) / 2e-5, abs=1e-8)


@pytest.mark.parametrize("mdp", WORLDS.values(), ids=WORLDS)
def test_probabilities_of_the_steps_sum_to_one(mdp: MDP) -> None:
    lab = Lab(load(GRPO), mdp, members=2)
    assert lab.probabilities(log_policy(somewhere(mdp), mdp.legal)).sum() == pytest.approx(1, abs=1e-12)


def test_sets_of_members_and_full_tuples_agree() -> None:
    sets, tuples = Lab(load(GRPO), STALE, members=3), Lab(load(GRPO), STALE, members=3)
    tuples.__dict__["shape"] = (1, 1, 1)
    assert (len(sets.steps), len(tuples.steps)) == (10, 27)
    a, b = sets.estimate(somewhere(STALE)), tuples.estimate(somewhere(STALE))
    assert a.expected == pytest.approx(b.expected, abs=1e-12)
    assert a.trace == pytest.approx(b.trace, abs=1e-12)


def test_members_under_different_labels_are_not_exchanged() -> None:
    lab = Lab(load({"advantage": [{"key": ["prompt", "label:half"]}]}), STALE, members=4)
    assert lab.shape == (2, 2)
    assert lab.probabilities(log_policy(somewhere(STALE), STALE.legal)).sum() == pytest.approx(1, abs=1e-12)


def test_retries_with_the_same_noise_leave_the_policys_choices_as_they_are() -> None:
    logs = log_policy(somewhere(FAULTY), FAULTY.legal)
    risky = [path.decisions[0][1] == FAULTY.actions.index("risky") for path in FAULTY.paths]
    failed = np.asarray([path.failed for path in FAULTY.paths])
    for retries in (0, 2, 5):
        chances = Lab(load(RLOO), FAULTY, members=2, retries=retries).chances(logs)
        assert chances[risky].sum() == pytest.approx(np.exp(logs[0, 1]), abs=1e-12)
        assert chances[failed].sum() == pytest.approx(np.exp(logs[0, 1]) * 0.5 ** (retries + 1), abs=1e-12)
