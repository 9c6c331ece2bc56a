"""What a run may not say, each refusal with its reason and the way out: what no single section can see. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from agentgym.errors import AgentGymError, ConfigError
from agentgym.rewards import check_gamma, composer, judges
from agentgym_trainers import mixtures
from agentgym_trainers.objective.custom import resolve
from agentgym_trainers.objective.declare import Discriminative, Distillation, Layer
from agentgym_trainers.strategies.declare import Contrastive, DynamicFilter, ForcedMode

if TYPE_CHECKING:
    from agentgym_trainers.config import Config


def check(config: Config) -> None:
    """Refuse sections that cannot be meant together: `ConfigError`."""
    for rule in _RULES:
        rule(config)


# --- numbers ----------------------------------------------------------------------------------------------------

_LEAST = {
    **dict.fromkeys(("rollout.tasks_per_step", "rollout.group_size", "rollout.slots", "rollout.concurrency"), 1),
    **dict.fromkeys(("run.checkpoint_every", "run.keep", "warmup.batch", "warmup.copies"), 1),
    **dict.fromkeys(("sft.batch", "sft.demonstrations", "eval.attempts", "sampling.max_tokens"), 1),
    **dict.fromkeys(("run.steps", "run.threads", "warmup.steps", "sft.steps", "eval.episodes", "eval.every"), 0),
    **dict.fromkeys(("rollout.retries", "rollout.max_length", "sampling.top_k"), 0),
    **dict.fromkeys(("rollout.max_staleness", "rollout.threads"), 0),
}


def _counts(config: Config) -> None:
    if not isinstance(config.env.get("id"), str):
        raise ConfigError('env.id is missing: write [env] id = "shopping-v0" (see `agentgym list`)')
    for path, least in _LEAST.items():
        section, name = path.split(".")
        found = getattr(getattr(config, section), name)
        if found < least:
            raise ConfigError(f"{path} is at least {least}; got {found}")
    if not 1 <= config.warmup.length[0] <= config.warmup.length[1]:
        raise ConfigError(f"warmup.length is (least, most), from 1; got {config.warmup.length}")


def _sampling(config: Config) -> None:
    s = config.sampling
    if not (0 <= s.temperature < math.inf and 0 < s.top_p <= 1):
        raise ConfigError(f"sampling.temperature is at least 0 and top_p in (0, 1]; got {s.temperature}, {s.top_p}")
    if s.temperature == 0 and config.run.steps:
        raise ConfigError(
            "sampling.temperature = 0 draws nothing: a group has one member many times, and no log-prob to learn by; "
            "set it above 0, or run.steps = 0"
        )


def _overlap(config: Config) -> None:
    """What an engine that samples while the learner moves, or elsewhere, cannot be combined with."""
    r, run = config.rollout, config.run
    if run.processes == 2 and r.engine.startswith("vllm"):
        raise ConfigError(
            f"rollout.engine = {r.engine!r} samples in a process of its own already; set run.processes = 1"
        )
    if r.max_staleness == 0:
        for name, off in (("stale_caches", False), ("behaviour", "recorded")):
            if getattr(r, name) != off:
                raise ConfigError(
                    f"rollout.{name} = {getattr(r, name)!r} is about weights that change under a reply, and with "
                    "rollout.max_staleness = 0 none do; raise that, or drop this"
                )
    elif run.algorithm == "best_of_n":
        raise ConfigError("best_of_n samples from the warm start all along: set rollout.max_staleness = 0")
    elif run.deterministic:
        raise ConfigError(
            "run.deterministic with rollout.max_staleness > 0: there, which weights sample a reply is a matter of "
            "timing; set the one to false or the other to 0"
        )


# --- who learns from what ---------------------------------------------------------------------------------------


def _groups(config: Config) -> None:
    algorithm, strategy = config.run.algorithm, config.strategy
    size = strategy.sample if isinstance(strategy, Contrastive) else config.rollout.group_size
    if size > 1:
        return
    if algorithm == "preference":
        raise ConfigError("a group of one has no pair: set rollout.group_size above 1")
    if config.rollout.drop_equal:
        raise ConfigError("a group of one is always equal, so rollout.drop_equal would leave out everything; drop it")
    compared = [t for t in config.advantage if t.centre not in ("none", "given") or t.transform is not None]
    if algorithm == "policy_gradient" and any("prompt" in t.parts and t.singleton == "zero" for t in compared):
        raise ConfigError("a group of one has no baseline: set rollout.group_size above 1, or an advantage key 'batch'")


def _equal(config: Config) -> None:
    """Groups of equal returns are left out because they teach nothing: true of terms that compare within a prompt."""
    filtered = isinstance(config.strategy, DynamicFilter)
    if not (filtered or config.rollout.drop_equal) or config.run.algorithm != "policy_gradient":
        return
    if not any({"prompt", "bundle"} & set(term.parts) for term in config.advantage):
        raise ConfigError(
            f"{'strategy dynamic_filter' if filtered else 'rollout.drop_equal'} leaves out groups of equal returns, "
            "and these advantages learn from them: none of them compares within a prompt. Drop it, or use an advantage "
            "key 'prompt'"
        )


def _read(config: Config) -> None:
    """Sections that say something and that nobody would read."""
    algorithm, fields = config.run.algorithm, {f.name: f.default for f in msgspec.structs.fields(config)}
    families = ("preference", "candidates")
    for name in families if algorithm in ("policy_gradient", *families) else ():
        if algorithm != name and getattr(config, name) != fields[name]:
            raise ConfigError(
                f"[{name}] is read where run.algorithm = {name!r}, and it is {algorithm!r}; set one of them"
            )
    if config.critic != fields["critic"] and config.gae is None:
        raise ConfigError("[critic] is at work where an advantage has credit = 'gae', and none has; drop it")
    if isinstance(config.objective.contrast, Discriminative) and config.advantage != fields["advantage"]:
        raise ConfigError("a discriminative contrast replaces the advantages, so [[advantage]] is not read; drop it")
    if sum(term.credit == "gae" for term in config.advantage) > 1:
        raise ConfigError("a run has one critic, so one advantage has credit = 'gae'")


def _off_policy(config: Config) -> None:
    """Samples that were not drawn from the policy they train need the sampler's log-probs in the loss."""
    forced = isinstance(config.strategy, ForcedMode)
    if config.run.algorithm != "policy_gradient" or not (
        forced or getattr(config.strategy, "context", "sampled") == "original"
    ):
        return
    if not (config.objective.reads_sampler or config.objective.needs_sampler):
        why = "begins replies for the policy" if forced else "trains hinted samples without their hint"
        raise ConfigError(
            f"strategy {config.strategy.kind!r} {why}, so they are off-policy, and this objective never looks at the "
            "sampler's log-probs: set objective.proximal = 'sampler' with a ratio, or a behaviour correction"
            + ("" if forced else ", or strategy.context = 'sampled'")
        )


# --- objectives -------------------------------------------------------------------------------------------------


def _objective(config: Config) -> None:
    o, model = config.objective, config.model
    if o.find(Distillation) and not model.teacher:
        raise ConfigError("distillation needs a teacher: set model.teacher to the folder of a model in hub format")
    if isinstance(o.source, Layer) and not model.path and o.source.layer > model.layers:
        raise ConfigError(
            f"objective.source reads layer {o.source.layer} of a model of {model.layers} layers; set source.layer to "
            f"at most {model.layers}"
        )
    for custom in (*o.customs, *config.sft.objective.customs):
        resolve(custom.target)


def _imitation(config: Config) -> None:
    warm = config.sft.objective
    if warm.needs_sampler or warm.needs_reference or warm.find(Distillation):
        raise ConfigError(
            "demonstrations bring no log-probs of a sampler, no reference and no teacher: set sft.objective.proximal "
            "to 'learner', and drop behaviour corrections, KL and distillation"
        )
    if warm.needs_reward:
        raise ConfigError(
            "demonstrations bring no rewards: drop the contrast and the 'sft' regulariser of sft.objective"
        )


def _reward(config: Config) -> None:
    judges.declared(config.judge)
    if config.reward:
        composer(config.reward)
    for term in config.advantage:
        if term.credit == "return_to_go":
            _gamma(config.reward, term.gamma)


def _gamma(reward: Mapping[str, Any], gamma: float) -> None:
    try:
        check_gamma(reward, gamma)
    except AgentGymError as error:
        raise ConfigError(f"advantage.gamma: {error}") from error


_RULES = (
    *(_counts, _sampling, _overlap, _groups, _equal, _read, _off_policy, _objective, _imitation, _reward),
    mixtures.refuse,
)
