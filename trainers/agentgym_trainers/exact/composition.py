"""What is certified: the tables of a method, or a Python file of your own that replaces steps of the pipeline.

    composition = load("grpo")            # a method by name, a TOML file, or tables
    composition = load("mine.py")

A Python file may hold any of these, and the pipeline calls them instead of its own step:

    composition = {"method": "grpo", "whiten": "turns", ...}    # tables laid over a method; empty: the defaults
    retry(trajectory) -> bool             # play this episode again, with fresh noise, up to `attempts` times in all
    admit(trajectories) -> list           # what is learnt from, of one step; failed ones are still among them
    reward(trajectory) -> float           # the return of an admitted trajectory
    advantages(samples) -> list           # one array [turns] per (trajectory, composed reward) of a step
    loss(objective, tokens, totals) -> Tensor    # objective/tokens.py says what it sees
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import msgspec

from agentgym.advantages import PassAtK, Risk, Term
from agentgym.errors import ConfigError, DataError, unknown
from agentgym_trainers import methods
from agentgym_trainers.objective import declare
from agentgym_trainers.objective.declare import Objective
from agentgym_trainers.strategies import declare as strategies
from agentgym_trainers.strategies.declare import Strategy

HOOKS = ("retry", "admit", "reward", "advantages", "loss")
ATTEMPTS = 8
"""Times that an episode is played where a file's `retry` goes on asking for it, unless it sets `attempts`."""
SECTIONS = (*methods.Declaration.__struct_fields__, "method", "rollout")


@dataclass(frozen=True, kw_only=True)
class Composition:
    """A method, ready to be pushed through the pipeline. `reward` empty: the world's own.

    refused   why the declaration is refused when a run loads it, "" where it is not
    gaps      what of it the exact worlds cannot show; asides is what was set aside because it is another goal
    """

    name: str
    reward: dict[str, Any]
    strategy: Strategy
    advantage: tuple[Term, ...]
    whiten: Any
    objective: Objective
    drop_equal: bool = False
    hooks: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    attempts: int = ATTEMPTS
    refused: str = ""
    outside: str = ""
    gaps: tuple[str, ...] = ()
    asides: tuple[str, ...] = ()


def load(source: str | Path | Mapping[str, Any]) -> Composition:
    """A composition by a method's name, from a .toml or .py file, or from tables.

    Raises `UnknownName` and `ConfigError` as a run would, but for combinations that are refused by a rule: those are
    loaded past the rule, with its reason in `refused`, so that what they would have done can be measured.
    """
    if isinstance(source, Mapping):
        return _composed("tables", source)
    path = Path(source)
    if path.suffix == ".py":
        module = _module(path)
        return _composed(path.stem, getattr(module, "composition", {}), _hooks(path, module), _attempts(module))
    method = methods.load(str(source))
    return _composed(method.name, method.table)


def _module(path: Path) -> ModuleType:
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a method's name, or a .toml or .py file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _hooks(path: Path, module: ModuleType) -> Mapping[str, Callable[..., Any]]:
    """The functions of the file that are steps of the pipeline; others are its own affair."""
    own = {name: f for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
    found = {name: own[name] for name in HOOKS if name in own}
    if not found and not hasattr(module, "composition"):
        raise ConfigError(f"{path} replaces nothing: define one of {', '.join(HOOKS)}, or a table `composition`")
    return found


def _attempts(module: ModuleType) -> int:
    found: int = getattr(module, "attempts", ATTEMPTS)
    if not isinstance(found, int) or found < 1:
        raise ConfigError(f"attempts is a whole number from 1; got {found!r}")
    return found


def _composed(
    name: str,
    tables: Mapping[str, Any],
    hooks: Mapping[str, Callable[..., Any]] | None = None,
    attempts: int = ATTEMPTS,
) -> Composition:
    tables = {**methods.load(tables["method"]).table, **tables} if "method" in tables else dict(tables)
    for section in tables:
        if section not in SECTIONS:
            raise unknown(f"section of {name!r}:", section, SECTIONS)
    objective, refused = objective_of(tables.get("objective", {}))
    strategy: Strategy = _converted(tables.get("strategy", {"kind": "plain"}), Strategy)
    terms = _terms(tables.get("advantage", ({},)))
    return Composition(
        name=name,
        reward=tables.get("reward", {}),
        strategy=strategy,
        advantage=terms,
        whiten=tables.get("whiten", "none"),
        objective=msgspec.structs.replace(objective, regularisers=(), controllers=()) if not refused else objective,
        drop_equal=bool(tables.get("rollout", {}).get("drop_equal", False)),
        hooks=hooks or {},
        attempts=attempts,
        refused=refused,
        outside=_outside(tables),
        gaps=tuple(_gaps(tables, strategy, objective)),
        asides=tuple(_asides(objective, terms)),
    )


def _terms(tables: Any) -> tuple[Term, ...]:
    """The advantage's terms; what they warn of is what the certificate measures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: tuple[Term, ...] = _converted(tables, tuple[Term, ...])
    return found


def _converted(table: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(table, kind, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{error}".replace("`", "")) from error


def objective_of(table: Mapping[str, Any]) -> tuple[Objective, str]:
    """The objective of a table and why it is refused (""). A refused one is built axis by axis, past the rules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return msgspec.convert(table, Objective, strict=True), ""
        except msgspec.ValidationError as error:
            if not isinstance(error.__cause__, ConfigError):
                raise ConfigError(f"objective: {error}".replace("`", "")) from error
            reason = str(error.__cause__)
    kinds, found = get_type_hints(Objective), msgspec.structs.replace(Objective())
    for axis, value in table.items():
        msgspec.structs.force_setattr(found, axis, _converted(value, kinds[axis]))
    for axis in ("regularisers", "controllers"):
        msgspec.structs.force_setattr(found, axis, ())
    return found, reason


# --- what cannot be shown ---------------------------------------------------------------------------------------

HINTED = strategies.HintLevels | strategies.Prefix | strategies.HintedRejection | strategies.ForcedMode
SECOND_FORWARD = declare.Perception | declare.Distillation


def _outside(tables: Mapping[str, Any]) -> str:
    """Why nothing of it can be certified, or ""."""
    for section in ("preference", "candidates"):
        if tables.get(section):
            return f"its loss is of another family ([{section}]), not an estimate of the gradient of a return"
    return ""


def _gaps(tables: Mapping[str, Any], strategy: Strategy, objective: Objective) -> Iterator[str]:
    if tables.get("judge"):
        yield "the judges: nobody judged the episodes"
    if isinstance(strategy, HINTED):
        yield f"the strategy {strategy.kind!r}: the worlds have no hints, so episodes were played without any"
    if isinstance(objective.source, declare.Layer):
        yield "log-probs from a layer below the last: another policy's gradient; measured with the last layer's"
    for r in objective.regularisers:
        if isinstance(r, SECOND_FORWARD):
            yield f"the regulariser {r.kind!r}: it needs a second forward pass"
        if isinstance(r, declare.Sft | declare.Custom):
            yield f"the regulariser {r.kind!r}: a gradient of its own, left out"


def _asides(objective: Objective, terms: Sequence[Term]) -> Iterator[str]:
    goals = (declare.Kl, declare.KlHinge, declare.Entropy, declare.EntropyBand)
    if any(isinstance(r, goals) for r in objective.regularisers):
        yield "KL and entropy terms are set aside: they change the goal, not the estimate of its gradient"
    if objective.controllers:
        yield "controllers stand at their first value"
    if any(term.gamma < 1 for term in terms if not term.whole):
        yield "credit is discounted, and measured against the return that is not"
    if any(term.credit == "gae" for term in terms):
        yield "the critic knows the exact values"
    if any(part.startswith("label:") for term in terms for part in term.parts):
        yield "members take the values of the label in turn"
    if any(isinstance(term.transform, Risk) for term in terms):
        yield "quantiles are those of the step itself; the goal is a risk measure, and not the mean return"
    if any(isinstance(term.transform, PassAtK) for term in terms):
        yield "the goal is the best of a group, and not the mean return"
