"""The configuration of a training run: what a preset holds, checked key by key.

    config = resolve("shopping/laptop", ["run.seed=1", "rollout.group_size=16"])

Every key of every section is a field below, with its default; a misspelt one is an error that names the nearest.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import msgspec

from agentgym import registry
from agentgym.advantages import Term
from agentgym.env import Environment
from agentgym.errors import ConfigError, unknown
from agentgym.modeling.lora import Lora
from agentgym.presets import Table, merge, parse_settings, read_preset, read_toml
from agentgym.rollout import Limits
from agentgym.types import Sampling
from agentgym_trainers import methods
from agentgym_trainers.candidates.declare import InTRO
from agentgym_trainers.critic import CriticConfig
from agentgym_trainers.learner import Optim
from agentgym_trainers.objective.declare import IMITATION, Clip, Objective, Struct
from agentgym_trainers.preference.declare import Preference
from agentgym_trainers.refusals import check
from agentgym_trainers.strategies.declare import Plain, Strategy

Algorithm = Literal["policy_gradient", "preference", "candidates", "best_of_n", "expert_iteration"]


class RunConfig(Struct, frozen=True, kw_only=True):
    """algorithm         "policy_gradient"; "preference", learning from pairs as [preference] declares; "candidates",
                         from correct episodes and answers that the environment knows, as [candidates] declares; or one
                         of the baselines that tell reinforcement from more imitation: "best_of_n" imitates the best
                         member of each group, all sampled from the warm start; "expert_iteration" does the same with
                         groups sampled from the policy as it learns
    steps             updates after the warm start
    deterministic     bit-identical weights on one machine and set of versions; slower
    threads           of torch in the learner; 0 = leave as it is
    cores             CPU cores that the learner is pinned to; empty = none in particular
    processes         2: rollouts live in a process of their own, and get the weights through shared memory
    checkpoint_every  updates between checkpoints; `keep` of them stay
    sinks             where figures go besides the run's folder: "tensorboard", "wandb"
    """

    seed: int = 0
    algorithm: Algorithm = "policy_gradient"
    steps: int = 60
    deterministic: bool = False
    threads: int = 0
    cores: tuple[int, ...] = ()
    processes: Literal[1, 2] = 1
    checkpoint_every: int = 10
    keep: int = 2
    sinks: tuple[Literal["tensorboard", "wandb"], ...] = ()


class ModelConfig(Struct, frozen=True, kw_only=True):
    """A folder in hub format (`path`), or with an empty path a model made here.

    tokenizer   of a model made here: "closed" (a token per word of the environment's vocabulary) or "bpe"
    vocabulary  size of a "bpe" tokenizer
    init        standard deviation of the first weights; tiny models learn faster from more than the usual 0.02
    history     what to do where the chat template rewrites earlier turns: append, branch, refuse
    template    replaces the tokenizer's chat template ("chatml" or Jinja text); "" keeps it
    teacher     folder of the model that a distillation learns from, with the same tokenizer
    lora        train adapters instead of the weights; see `modeling.lora.Lora`
    checkpointing  recompute activations of a layer in the backward pass: memory for a third more time
    compile     run the layers through torch.compile; needs a C++ compiler on the CPU
    """

    path: str = ""
    tokenizer: Literal["closed", "bpe"] = "closed"
    vocabulary: int = 2048
    hidden: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    init: float = 0.08
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    history: Literal["append", "branch", "refuse"] = "append"
    template: str = ""
    teacher: str = ""
    lora: Lora | None = None
    checkpointing: bool = False
    compile: bool = False


class WarmupConfig(Struct, frozen=True, kw_only=True):
    """Copy warm-up: `length` different random tokens of the vocabulary, said `copies` times; the first time is given.

    It forms the heads that copy, which a tiny model does not find from demonstrations alone.
    """

    steps: int = 0
    batch: int = 32
    length: tuple[int, int] = (6, 20)
    copies: int = 3
    optim: Optim = Optim(lr=3e-3, warmup=30, decay=0.5)


class SftConfig(Struct, frozen=True, kw_only=True):
    """Supervised warm start on `demonstrations` episodes of the teacher: names of the environment's ladder and the
    share of episodes each plays. With advantage one, so that `objective` is maximum likelihood unless it says more:
    one with a ratio against proximal = "learner" keeps each of the optim.epochs x minibatches near where it began."""

    steps: int = 0
    batch: int = 32
    demonstrations: int = 2000
    teacher: dict[str, float] = msgspec.field(default_factory=lambda: {"teacher": 1.0})
    optim: Optim = Optim(lr=2e-3, warmup=30, decay=0.7)
    objective: Objective = IMITATION


class RolloutConfig(Struct, frozen=True, kw_only=True):
    """One update plays `tasks_per_step` tasks, `group_size` times each.

    max_staleness      0: rollouts and learning take turns. More: they overlap, and no trajectory is learnt from whose
                       oldest token was sampled by weights more than so many updates behind
    unit               what is played and handed over at once: the groups of an "update" or one "group"; "" = by
                       max_staleness
    engine             policy of the catalogue that samples, with its own `engine_options`
    stale_caches       at new weights keep the live caches of replies under way, and mark their spans `stale`
    behaviour          "recomputed": the learner keeps the weights of the last max_staleness updates and computes the
                       log-probs of the version that sampled, so that mismatch and staleness can be told apart exactly
    threads, cores     of torch in the engine, and the CPU cores that it is pinned to
    slots, max_length  of the engine: sequences decoded together, tokens a sequence may have (0 = the engine's default)
    drop_equal         leave out groups whose returns are all equal (and refill nothing: see strategy "dynamic_filter")
    limits             deadlines in seconds and the runner's own turn budget; see `rollout.Limits`
    """

    tasks_per_step: int = 16
    group_size: int = 8
    concurrency: int = 256
    slots: int = 64
    max_length: int = 0
    retries: int = 2
    drop_equal: bool = False
    max_staleness: int = 0
    unit: Literal["", "update", "group"] = ""
    engine: str = "torch"
    engine_options: dict[str, Any] = msgspec.field(default_factory=dict)
    stale_caches: bool = False
    behaviour: Literal["recorded", "recomputed"] = "recorded"
    threads: int = 0
    cores: tuple[int, ...] = ()
    limits: Limits = Limits()


class Component(Struct, frozen=True, kw_only=True):
    """One environment of a mixture.

    env      `id` and the environment's own settings, as in [env]
    name     domain of its tasks in labels, figures and advantages; "" = the environment's id
    weight   its share of the tasks, relative to the others
    reward   a composer declaration of its own; empty = the environment's
    scale    its composed rewards are multiplied by this; "std" divides them by their running standard deviation
    """

    env: dict[str, Any]
    name: str = ""
    weight: float = 1.0
    reward: dict[str, Any] = msgspec.field(default_factory=dict)
    scale: float | Literal["std"] = 1.0


class Curriculum(Struct, frozen=True, kw_only=True):
    """How the shares of a mixture's components move with what was seen.

    kind   "fixed": as declared; "learnable": share times success (1 - success), where most is to be learnt; "weakest":
           share times (1 - success)
    floor  no component falls below this share of its declared weight; `decay` of the running success per update
    """

    kind: Literal["fixed", "learnable", "weakest"] = "fixed"
    floor: float = 0.2
    decay: float = 0.9


class EvalConfig(Struct, frozen=True, kw_only=True):
    """Before and after, on held-out tasks; `every` updates in between as well (0 = never), `ladder` beside it."""

    split: str = "test"
    episodes: int = 200
    attempts: int = 1
    seed: int = 0
    every: int = 0
    ladder: bool = True


class Config(Struct, frozen=True, kw_only=True):
    """A run. `env` holds an `id` and the environment's own settings, or with "mixture" for an id the run plays the
    components of `mixture` by their weights, as `curriculum` moves them; `reward` a composer declaration, empty for the
    environment's own ("environment" inside it stands for that); `judge` the judges that add terms to a finished
    trajectory before its reward is composed (`rewards.judges`); `advantage` the summed terms; `whiten` as in
    `advantages.advantages`. `method` names the method of the catalogue (or the TOML file) whose sections `resolve` laid
    under the run's own; `critic` is at work where an advantage has credit "gae", `preference` and `candidates`
    where run.algorithm says so.
    """

    env: dict[str, Any]
    mixture: tuple[Component, ...] = ()
    curriculum: Curriculum = Curriculum()
    method: str = ""
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    warmup: WarmupConfig = WarmupConfig()
    sft: SftConfig = SftConfig()
    rollout: RolloutConfig = RolloutConfig()
    sampling: Sampling = Sampling(max_tokens=32)
    strategy: Strategy = Plain()
    judge: tuple[dict[str, Any], ...] = ()
    reward: dict[str, Any] = msgspec.field(default_factory=dict)
    advantage: tuple[Term, ...] = (Term(),)
    whiten: Literal["none", "trajectories", "turns", "tokens"] = "none"
    objective: Objective = Objective(gate=Clip(high=0.28))
    preference: Preference = Preference()
    candidates: InTRO = InTRO()
    critic: CriticConfig = CriticConfig()
    optim: Optim = Optim()
    eval: EvalConfig = EvalConfig()

    @property
    def gae(self) -> Term | None:
        """The term that has a critic learn, if any."""
        return next((term for term in self.advantage if term.credit == "gae"), None)

    def table(self) -> dict[str, Any]:
        """As plain tables, for a TOML file."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


def resolve(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Config:
    """A preset's id, a TOML file or a table, with `["a.b=value"]` laid over it, checked.

    Either may name a `method`: what it says of its axes then replaces what lay there before, and whoever names it may
    change single keys of it. Raises `ConfigError` for a key that does not exist (naming its path and the nearest one),
    a value of the wrong kind, and combinations that cannot be meant.
    """
    if isinstance(source, Path):
        source = read_toml(source)
    table: Table = {}
    for layer in (read_preset(source) if isinstance(source, str) else source, parse_settings(overrides)):
        if layer.get("method"):
            _lay_method(table, str(layer["method"]))
        merge(table, layer)
    return from_table(table)


AXES = ("strategy", "advantage", "whiten", "objective", "critic", "preference", "candidates")
"""Sections that a method replaces whole, also those that it leaves at their defaults."""


def _lay_method(table: Table, name: str) -> None:
    """The method in place of what stands on its axes; its reward and judges, if it has any, in place of those that are
    there; its optimiser settings over them."""
    method = methods.load(name).table
    for axis in AXES:
        table.pop(axis, None)
    if "reward" in method:
        table.pop("reward", None)
    merge(table, {"objective": {}, **deepcopy(method)})
    algorithm = next((family for family in ("preference", "candidates") if family in method), "policy_gradient")
    merge(table, {"run": {"algorithm": algorithm}})


def from_table(table: Mapping[str, Any]) -> Config:
    """A checked config from plain tables; "environment" inside `reward` becomes the environment's own declaration.

    A `method` is a name here and no more: `resolve` lays its sections.
    """
    _check_keys(table, Config, "")
    table = {**table, **_rewards(table)}
    try:
        config = msgspec.convert(table, Config, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{error}".replace(" - at `$.", " (at ").replace("`", ")")) from error
    check(config)
    return config


def _rewards(table: Mapping[str, Any]) -> Table:
    """The sections with rewards, "environment" filled in: the run's; or those of a mixture's components, each its own
    or else the run's, which stay the run's where all are equal."""
    reward, parts = table.get("reward", {}), table.get("mixture")
    if not isinstance(parts, list | tuple) or not all(isinstance(part, Mapping) for part in parts) or not parts:
        return {"reward": _filled(reward, table.get("env", {}))}
    filled = [_filled(part.get("reward") or reward, part.get("env", {})) for part in parts]
    if all(other == filled[0] for other in filled):
        return {"reward": filled[0], "mixture": [{**part, "reward": {}} for part in parts]}
    return {"reward": {}, "mixture": [{**part, "reward": own} for part, own in zip(parts, filled, strict=True)]}


def _filled(declaration: Any, env: Mapping[str, Any]) -> Any:
    """The declaration with the environment's own one in place of the word "environment"."""
    if declaration == "environment":
        return getattr(registry.load(str(env.get("id"))), "reward", Environment.reward)
    if isinstance(declaration, Mapping):
        return {name: _filled(part, env) for name, part in declaration.items()}
    return [_filled(part, env) for part in declaration] if isinstance(declaration, list | tuple) else declaration


def _check_keys(value: Any, kind: Any, path: str) -> None:
    """Walk a table beside the types; the first key without a field, or kind without a class, is an error."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = _member(value, [k for k in typing.get_args(kind) if _is_struct(k)], path)
    if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_keys(item, typing.get_args(kind)[0], f"{path}[{index}]")
    elif isinstance(value, Mapping) and (dataclasses.is_dataclass(kind) or _is_struct(kind)):
        fields = typing.get_type_hints(kind)
        known = [name for name in fields if not name.startswith("__")]
        for key, inner in value.items():
            where = f"{path}.{key}" if path else str(key)
            if key == getattr(getattr(kind, "__struct_config__", None), "tag_field", None):
                continue
            if key not in known:
                raise ConfigError(f"{where}: {unknown('setting', str(key), known)}")
            _check_keys(inner, fields[key], where)


def _member(value: Any, kinds: Sequence[Any], path: str) -> Any:
    """The class of a union that this table is meant for: the only one, or the one that its `kind` names."""
    if not isinstance(value, Mapping) or len(kinds) < 2:
        return kinds[0] if kinds else None
    named = {kind.__struct_config__.tag: kind for kind in kinds}
    if "kind" not in value:
        raise ConfigError(f"{path}: say which kind it is; there are {', '.join(sorted(named))}")
    if value["kind"] not in named:
        raise ConfigError(f"{path}.kind: {unknown('kind', str(value['kind']), named)}")
    return named[value["kind"]]


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)
