"""A run over several environments: who plays, which reward counts, at which scale, and how the shares move.

    env = make_env(config)                     # the environment, or the mixture of config.mixture
    composers = reward_of(config, env)         # composers.of(trajectory)
    domains = Domains(config, env)
    samples = domains.scaled(samples)          # before credit is given
    figures = domains.update(samples)          # after an update: the shares of the tasks that come next

Of a run without a mixture `Domains` says and changes nothing.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from agentgym import registry
from agentgym.env import Environment
from agentgym.errors import ConfigError
from agentgym.mixture import DOMAIN, MIXTURE, Composers, Mixture, check_weights, domain_of
from agentgym.rewards import check_gamma, composer, multipliers
from agentgym_trainers.strategies import Sample

if TYPE_CHECKING:
    from agentgym_trainers.config import Component, Config, Curriculum

UNSEEN = 0.5
"""Success of a domain of which nothing is known yet: the most is to be learnt there."""
SPREADLESS = 1e-9
"""A standard deviation below this, relative to the mean, is none."""


# --- what a run is made of --------------------------------------------------------------------------------------


def components(config: Config) -> dict[str, Component]:
    """The components of the run's mixture by the name of their domain."""
    return {part.name or str(part.env.get("id", "")): part for part in config.mixture}


def make_env(config: Config) -> Environment:
    """The run's environment. Raises as `registry.make` does, and as `Mixture` for members that do not go together."""
    if config.env.get("id") != MIXTURE:
        return registry.make(**config.env)
    parts = components(config)
    members = {name: registry.make(**part.env) for name, part in parts.items()}
    return Mixture(members, {name: part.weight for name, part in parts.items()})


def reward_of(config: Config, env: Environment) -> Composers:
    """The composer of each episode: the component's declaration, else the run's, else the environment's.

    `ConfigError` where declarations differ and one has a constraint: its multiplier moves by the mean cost of all that
    is played, which then has no one meaning.
    """
    if not isinstance(env, Mixture):
        return Composers(config.reward or env.reward)
    declared = {name: part.reward or config.reward or env.rewards[name] for name, part in components(config).items()}
    first = next(iter(declared.values()))
    if all(other == first for other in declared.values()):
        return Composers(first)
    for name, declaration in declared.items():
        if multipliers(declaration):
            raise ConfigError(
                f"the reward of {name} has a constraint, whose multiplier belongs to a run with one declared reward; "
                "declare it once as [reward], for all components"
            )
    return Composers(Environment.reward, declared)


# --- what a run learns of its domains ---------------------------------------------------------------------------


class Spread(NamedTuple):
    """Number, mean and sum of squared deviations of all values so far (Welford; batches by Chan, Golub, LeVeque)."""

    size: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def joined(self, values: Sequence[float]) -> Spread:
        """With these values besides."""
        found = np.asarray(values, np.float64)
        size, apart = self.size + len(found), float(found.mean()) - self.mean
        squares = float(((found - found.mean()) ** 2).sum()) + apart**2 * self.size * len(found) / size
        return Spread(size, self.mean + apart * len(found) / size, self.squares + squares)

    @property
    def scale(self) -> float:
        """One over the standard deviation; 1 where there is none: before two values, or with all of them equal."""
        std = math.sqrt(self.squares / self.size) if self.size else 0.0
        return 1.0 / std if std > SPREADLESS * max(1.0, abs(self.mean)) else 1.0


class Domains:
    """What moves with the updates of a run over a mixture: success and reward spread of each domain.

    `state` is plain data; the shares follow from it.
    """

    def __init__(self, config: Config, env: Environment) -> None:
        self.curriculum = config.curriculum
        self.mixture = env if isinstance(env, Mixture) else None
        self.scales = {name: part.scale for name, part in components(config).items()}
        self.spreads = {name: Spread() for name, scale in self.scales.items() if scale == "std"}
        self.seen: dict[str, tuple[float, float]] = {}
        """Successes and episodes of each domain, older ones fading."""

    def scaled(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples of an update with rewards at their domain's scale: value, base and shares alike, so that they
        still add up. A running standard deviation is that of all rewards so far, these included; failures have none.
        """
        values = _by_domain((s, s.value) for s in samples)
        self.spreads |= {name: known.joined(values[name]) for name, known in self.spreads.items() if name in values}
        return [_times(sample, self.scale(domain_of(sample.trajectory))) for sample in samples]

    def scale(self, name: str) -> float:
        """What the rewards of a domain are multiplied by now."""
        declared = self.scales.get(name, 1.0)
        return self.spreads[name].scale if declared == "std" else float(declared)

    def update(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Move the shares by how the episodes of an update went. A failed one is neither success nor its absence."""
        if self.mixture is None:
            return {}
        decay = self.curriculum.decay
        for name, held in _by_domain((s, s.success) for s in samples).items():
            solved, played = self.seen.get(name, (0.0, 0.0))
            self.seen[name] = (decay * solved + sum(held), decay * played + len(held))
        self._share()
        moved = {} if self.curriculum.kind == "fixed" else {"weight": self.mixture.weights}
        told = {**moved, "scale": {name: self.scale(name) for name in self.spreads}}
        return {f"{DOMAIN}/{name}/{figure}": x for figure, held in told.items() for name, x in held.items()}

    @property
    def success(self) -> dict[str, float]:
        """Running success of the domains that were seen."""
        return {name: solved / played for name, (solved, played) in self.seen.items()}

    def _share(self) -> None:
        if self.mixture is not None:
            self.mixture.weights = shares(self.curriculum, self.mixture.shares, self.success)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        held: dict[str, Mapping[str, tuple[float, ...]]] = {"seen": self.seen, "spreads": self.spreads}
        return {figure: {name: list(x) for name, x in found.items()} for figure, found in held.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.seen = {name: (x[0], x[1]) for name, x in state["seen"].items()}
        self.spreads = {name: Spread(*x) for name, x in state["spreads"].items()}
        self._share()


def shares(curriculum: Curriculum, declared: Mapping[str, float], success: Mapping[str, float]) -> dict[str, float]:
    """The shares of the moment, by declared shares (which add up to 1) and running success; they add up to 1.

    `floor` of each declared share stays; the rest goes where most is to be learnt, or where success is least. Where
    nothing is left to learn by that measure, the declared shares stand.
    """
    if curriculum.kind == "fixed":
        return dict(declared)
    rates = {name: success.get(name, UNSEEN) for name in declared}
    drawn = {name: share * (1.0 - rates[name]) for name, share in declared.items()}
    if curriculum.kind == "learnable":
        drawn = {name: share * rates[name] for name, share in drawn.items()}
    total, floor = sum(drawn.values()), curriculum.floor
    if total <= 0.0:
        return dict(declared)
    return {name: floor * share + (1.0 - floor) * drawn[name] / total for name, share in declared.items()}


def _by_domain(figures: Iterable[tuple[Sample, float | None]]) -> dict[str, list[float]]:
    """The figures of each domain; a failed episode has none."""
    found: dict[str, list[float]] = defaultdict(list)
    for sample, figure in figures:
        if figure is not None:
            found[domain_of(sample.trajectory)].append(figure)
    return dict(found)


def _times(sample: Sample, factor: float) -> Sample:
    if sample.reward is None or factor == 1.0:
        return sample
    r = sample.reward
    shares = tuple(factor * x for x in r.shares)
    return sample._replace(reward=r._replace(value=factor * r.value, base=factor * r.base, shares=shares))


# --- refusals ---------------------------------------------------------------------------------------------------


def refuse(config: Config) -> None:
    """Raises `ConfigError` for a mixture that cannot be meant."""
    mixed = config.env.get("id") == MIXTURE
    if not mixed and config.mixture:
        raise ConfigError(
            f"[[mixture]] is played where env.id = {MIXTURE!r}, and it is {config.env.get('id')!r}; set one of them"
        )
    if not mixed and config.curriculum != type(config.curriculum)():
        raise ConfigError(f"[curriculum] moves the shares of a mixture, and env.id is no {MIXTURE!r}; drop it")
    if mixed:
        _refuse_parts(config)
        _refuse_rewards(config)
        _refuse_curriculum(config.curriculum)


def _refuse_parts(config: Config) -> None:
    if not config.mixture:
        raise ConfigError(f"env.id = {MIXTURE!r} plays the components of [[mixture]], and there is none")
    if len(config.env) > 1:
        raise ConfigError(
            f"env.{next(n for n in config.env if n != 'id')}: a mixture has no settings of its own; say it in each "
            "[mixture.env] that it is meant for"
        )
    for number, part in enumerate(config.mixture):
        if not isinstance(part.env.get("id"), str) or part.env["id"] == MIXTURE:
            raise ConfigError(
                f"mixture[{number}].env.id names an environment of the catalogue; got {part.env.get('id')!r}"
            )
        if part.scale != "std" and not 0 < part.scale < math.inf:
            raise ConfigError(f"mixture[{number}].scale is above 0 and finite, or 'std'; got {part.scale}")
    name, times = Counter(part.name or part.env["id"] for part in config.mixture).most_common(1)[0]
    if times > 1:
        raise ConfigError(f"{times} components of the mixture are called {name!r}; give each a name of its own")
    check_weights({name: part.weight for name, part in components(config).items()})


def _refuse_rewards(config: Config) -> None:
    for part in config.mixture:
        if part.reward:
            composer(part.reward)
        for term in config.advantage if part.reward else ():
            if term.credit == "return_to_go":
                check_gamma(part.reward, term.gamma)


def _refuse_curriculum(found: Curriculum) -> None:
    if not (0 <= found.floor <= 1 and 0 <= found.decay < 1):
        raise ConfigError(f"curriculum.floor is in [0, 1] and decay in [0, 1); got {found.floor} and {found.decay}")
