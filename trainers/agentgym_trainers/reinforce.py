"""The reinforcement of a run: who plays, what it is worth, who is owed it, who learns, and what all of them remember.

    initial = frozen if needs_initial(config, derived) else None
    rollouts = player(config, env, engine, renderer, initial)      # one half, in this process or another
    phase = Reinforcement(config, env, model, initial)             # the other half
    learned = phase.learn(await rollouts.play(unit), version)

`state` and `restore` carry the learning half through a checkpoint.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from agentgym.advantages import AdvantageState, advantages, critic_targets
from agentgym.env import Environment, require
from agentgym.modeling import build
from agentgym.modeling.flops import peak_of, utilisation
from agentgym.modeling.renderer import Renderer
from agentgym.rewards import derived
from agentgym.types import Trajectory
from agentgym_trainers import language, ranks, remote, sft, strategies
from agentgym_trainers.candidates.learner import CandidateLearner
from agentgym_trainers.config import Config
from agentgym_trainers.critic import Critic
from agentgym_trainers.figures import Figures
from agentgym_trainers.language import LanguageModel
from agentgym_trainers.learner import Learner
from agentgym_trainers.mixtures import Domains, reward_of
from agentgym_trainers.objective.declare import IMITATION, Distillation
from agentgym_trainers.preference import build as build_pairs
from agentgym_trainers.preference.learner import PairLearner
from agentgym_trainers.rollouts import Buffer, Group, Played, Rollouts, Sample, best_of

CRITIC = "critic."
"""Begins the names of the critic's tensors."""
Values = list[NDArray[np.float64]]


def needs_initial(config: Config, derived: Collection[str] = ()) -> bool:
    """Whether the policy as it was before reinforcement takes part; `derived` are the terms that the reward reads."""
    reads = {"policy_gradient": config.objective.needs_reference, "preference": config.preference.needs_reference}
    return reads.get(config.run.algorithm, False) or plays_initial(config) or "policy.kl" in derived


def plays_initial(config: Config) -> bool:
    """Whether it plays: all along, or where the strategy has it."""
    return config.run.algorithm == "best_of_n" or strategies.needs_reference(config.strategy)


def refuse(config: Config, env: Environment) -> None:
    """Raises `ConfigError` where environment or machine lack what this reinforcement asks; before anything is paid."""
    if config.run.processes == 2:
        remote.refuse(config)
    strategies.make(config.strategy, env, group_size=config.rollout.group_size)
    if config.run.algorithm == "candidates":
        require(env, "answer", "run.algorithm = 'candidates'")


def player(config: Config, env: Environment, engine: Any, renderer: Renderer, initial: Any) -> Rollouts:
    """The rollout side. `initial` is the frozen module from before reinforcement, where it plays."""
    before = language.engine(config, initial, renderer, shared=True) if plays_initial(config) else None
    learning: Any = before if config.run.algorithm == "best_of_n" else engine
    return Rollouts(config, env, learning, reference=before)


class Learned(NamedTuple):
    """An update's figures, and its samples as they were rewarded in the end."""

    figures: Figures
    samples: list[Sample]


class Reinforcement:
    """The learning half of a reinforcement phase. `initial` is the policy as it was before it, frozen, where it takes
    part (`needs_initial`). `counts` go on from there: what became of the trajectories, by name."""

    def __init__(
        self,
        config: Config,
        env: Environment,
        model: LanguageModel,
        initial: Any = None,
        counts: Counter[str] | None = None,
    ) -> None:
        refuse(config, env)
        self.config, self.env, self.model, self.initial = config, env, model, initial
        self.composers = reward_of(config, env)
        self.multipliers = self.composers.multipliers
        self.domains = Domains(config, env)
        never = config.run.algorithm == "best_of_n"  # its episodes are all of the warm start, and none is too old
        self.buffer = Buffer(math.inf if never else config.rollout.max_staleness, config.rollout.drop_equal, counts)
        self.learner = self._learner()
        self.critic = Critic(model, config.critic, micro_tokens=config.optim.micro_tokens) if config.gae else None
        self.credit = AdvantageState()
        self.computes = hasattr(model.module(), "get_input_embeddings")  # a table of probabilities only looks up
        if self.computes:
            peak_of(model.module())  # before anybody plays beside it

    def _learner(self) -> Learner | PairLearner | CandidateLearner:
        config, run, optim = self.config, self.config.run, self.config.optim
        shared: dict[str, Any] = {
            "total_steps": run.steps * optim.epochs * optim.minibatches,
            "seed": run.seed,
            "temperature": config.sampling.temperature,
        }
        if run.algorithm == "candidates":
            return CandidateLearner(self.model, config.candidates, optim, answer=self._answer, **shared)
        shared["reference"] = self.initial
        if run.algorithm == "preference":
            return PairLearner(self.model, config.preference, optim, **shared)
        objective = config.objective if run.algorithm == "policy_gradient" else IMITATION
        teacher = None
        if objective.find(Distillation):
            found = config.model
            teacher = build.load(found.teacher, device=found.device, dtype=found.dtype).requires_grad_(False)
        remember = config.rollout.max_staleness if config.rollout.behaviour == "recomputed" else None
        return Learner(
            self.model, objective, optim, **shared, teacher=teacher, blank=self.model.blank, remember=remember
        )

    def _answer(self, trajectory: Trajectory) -> list[int]:
        """The ids of what the environment knows to be the answer, as plain text."""
        return self.model.renderer.encode(self.env.answer(trajectory.task))

    # --- learning ---

    def learn(self, played: Sequence[Played], version: int) -> Learned:
        """Credit for what is admitted at this version of the weights, then every optimiser step of the update."""
        groups = self._rewarded([group for unit in played for group in unit.groups])
        samples = self.domains.scaled(self.buffer.take(groups, version))
        self.buffer.counts["aside"] += sum(len(unit.aside) for unit in played)
        began = time.perf_counter()
        found = self._update(samples, version) if samples else {}
        found |= self._speed(samples, time.perf_counter() - began) if samples else {}
        everyone = [sample for group in groups for sample in group]
        return Learned({**found, **self._price(everyone), **self.domains.update(everyone)}, everyone)

    def _speed(self, samples: Sequence[Sample], seconds: float) -> Figures:
        """Tokens a second, and the share of what the machine could have computed."""
        if not self.computes:
            return {}
        learnt = [s.trajectory for s in samples if s.train]
        epochs, count = self.config.optim.epochs, ranks.count()
        return utilisation(self.model.module(), learnt, seconds, epochs=epochs, ranks=count)

    def _rewarded(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with what only the models know in their rewards: `policy.kl`, of the policy as it is now."""
        if "policy.kl" not in self.composers.derived:
            return list(groups)
        good = [s.trajectory for group in groups for s in group if s.reward is not None]
        learner = self.learner if isinstance(self.learner, Learner) else self.learner.learner
        gaps = iter(learner.log_ratios(good, self.initial))
        return [[s if s.reward is None else self._behind(s, next(gaps)) for s in group] for group in groups]

    def _behind(self, sample: Sample, gap: NDArray[np.float64]) -> Sample:
        extra = derived(sample.trajectory, gap.tolist())
        return sample._replace(reward=self.composers.of(sample.trajectory).trajectory(sample.trajectory, extra=extra))

    def _update(self, samples: Sequence[Sample], version: int) -> Figures:
        if isinstance(self.learner, PairLearner):
            found = build_pairs([(s.trajectory, s.reward) for s in samples if s.train], self.config.preference)
            self.buffer.counts.update(found.counts)
            return self.learner.update(found.pairs)
        if isinstance(self.learner, CandidateLearner):
            return self.learner.update([(s.trajectory, s.reward) for s in samples if s.train])
        if self.config.run.algorithm != "policy_gradient":
            best = best_of([s for s in samples if s.train])
            return self.learner.update(best, sft.ones(best), version=version) if best else {}
        credit, figures = self._credit(samples)
        kept = [(s.trajectory, a, s.value) for s, a in zip(samples, credit, strict=True) if s.train]
        if not kept:
            return figures
        return {**self.learner.update(*map(list, zip(*kept, strict=True)), version=version), **figures}

    def _credit(self, samples: Sequence[Sample]) -> tuple[Values, Figures]:
        """The advantages, by the critic's values where a term reads them; and the critic's figures, who learns too."""
        held, config = [(s.trajectory, s.reward) for s in samples], self.config
        if self.critic is None or config.gae is None:
            return advantages(held, config.advantage, whiten=config.whiten, state=self.credit), {}
        states = self.critic.read([s.trajectory for s in samples])
        values = states.per_turn
        credit = advantages(held, config.advantage, whiten=config.whiten, state=self.credit, values=values)
        return credit, self.critic.update(states, critic_targets(held, config.gae, values=values))

    def _price(self, samples: Sequence[Sample]) -> Figures:
        """Move the reward's multipliers by what its constraints cost, in groups that are left out too."""
        if not self.multipliers.state():
            return {}
        ledgers = [(*s.trajectory.rewards, *s.reward.extra) for s in samples if s.reward]
        moved = self.multipliers.update(self.multipliers.costs(ledgers))
        return {f"multiplier.{name}": value for name, value in moved.items()}

    # --- state ---

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values: all that an interrupted phase needs besides the weights."""
        tensors, plain = self.learner.state()
        critic = {CRITIC + name: x for name, x in self.critic.state().items()} if self.critic else {}
        rest = {
            "credit": self.credit.state_dict(),
            "multipliers": self.multipliers.state(),
            "domains": self.domains.state(),
        }
        return {**tensors, **critic}, {**plain, **rest}

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """The inverse of `state`, on a phase made in the same way."""
        held = {name.removeprefix(CRITIC): x for name, x in tensors.items() if name.startswith(CRITIC)}
        if self.critic:
            self.critic.restore(held)
        own = {name: x for name, x in tensors.items() if not name.startswith(CRITIC)}
        self.learner.restore(own, dict(plain))
        self.credit.load_state_dict(plain["credit"])
        self.multipliers.restore(plain["multipliers"])
        self.domains.restore(plain["domains"])
