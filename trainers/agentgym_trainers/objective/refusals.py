"""What an objective may not say, each refusal with its reason. Kinds are named as the tables name them. No torch."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from agentgym.errors import ConfigError, unknown
from agentgym_trainers.objective.paths import get, put

if TYPE_CHECKING:
    from agentgym_trainers.objective.declare import Objective


def check(o: Objective) -> None:
    """Refuse choices that cannot be meant, alone or together: `ConfigError`, `UnknownName` for a part's name."""
    for rule in _RULES:
        rule(o)


# --- numbers ----------------------------------------------------------------------------------------------------

_REWARDS = {"sft.threshold", "distillation.threshold", "discriminative.threshold"}
"""Options that are compared with a reward, so that they may be negative."""

_POSITIVE = {
    "soft.positive",
    "soft.negative",
    "discriminative.tau",
    "discriminative.length_temperature",
    "discriminative.max_length",
    "const_norm.horizon",
    "layer.layer",
    "layer.steps",
    "perception.share",
    "clip.adaptive.step",
}

_SHARES = {
    "clip.low",
    "detached.low",
    "mix.weight",
    "perception.share",
    "distillation.beta",
}


def _numbers(o: Any) -> None:
    contrast = () if o.contrast is None else (o.contrast,)
    for kind in (o.source, o.ratio, o.gate, *o.behaviour, o.aggregation, *o.regularisers, *contrast):
        for path, x in _leaves(kind, kind.kind):
            least = -math.inf if path in _REWARDS else 0.0
            if not (math.isfinite(x) and x >= least):
                raise ConfigError(f"{path} is a finite number{'' if path in _REWARDS else ' from 0'}; got {x}")
            if path in _POSITIVE and x == 0:
                raise ConfigError(f"{path} is above 0; got {x}")
            if path in _SHARES and x > 1:
                raise ConfigError(f"{path} is at most 1; got {x}")


def _leaves(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """The numbers in a table, with their dotted path; a custom function's own options are its own affair."""
    if isinstance(value, msgspec.Struct):
        value = {name: x for name, x in msgspec.structs.asdict(value).items() if name != "options"}
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}")
    elif isinstance(value, tuple):
        for inner in value:
            yield from _leaves(inner, path)
    elif isinstance(value, int | float):
        yield path, value


def _clip(o: Any) -> None:
    gate = o.gate
    if gate.kind == "clip" and 0 < gate.dual <= 1:
        raise ConfigError(
            f"a dual clip is above 1 (0 = off), or it would hold back the policy on the spot; got {gate.dual}"
        )
    if gate.kind == "branch_clip" and max(gate.token[0], gate.sequence[0]) > 1:
        raise ConfigError(f"a lower bound is at most 1; got {gate.token}, {gate.sequence}")
    if gate.kind == "clip" and gate.adaptive is not None:
        _adaptive(gate)


_FINE = 1000
"""Steps between the bounds of an adaptive clip: each one is tried on the whole step."""


def _adaptive(gate: Any) -> None:
    a = gate.adaptive
    if not (a.low[0] <= a.low[1] <= 1 <= a.high[0] <= a.high[1]):
        raise ConfigError(f"adaptive bounds of the ratio ascend and leave 1 between them; got {a.low}, {a.high}")
    if any((end - start) / step > _FINE for (start, end), step in zip((a.low, a.high), a.step, strict=True)):
        raise ConfigError(f"adaptive bounds go to their ends in at most {_FINE} steps; got adaptive.step = {a.step}")
    if a.balance == "share" and a.target > 1:
        raise ConfigError(f"a share is at most 1; got adaptive.target = {a.target}")
    if (gate.low, gate.high) != (0.2, 0.2):
        raise ConfigError(
            f"adaptive finds the bounds, so low = {gate.low} and high = {gate.high} are not read; drop them"
        )


def _bands(o: Any) -> None:
    """Where sampler and learner agree, w is 1 and a correction leaves the token as it is."""
    for b in o.behaviour:
        low, high = getattr(b, "low", 0.0), getattr(b, "high", getattr(b, "cap", math.inf))
        if b.kind in ("truncate", "mask", "clamp") and not low <= 1 <= high:
            raise ConfigError(
                f"{b.kind!r} keeps w between {low} and {high} and so leaves out 1, where sampler and learner agree; "
                "its bounds lie on both sides of 1"
            )
        if b.kind == "veto" and b.floor >= 1:
            raise ConfigError(f"a veto with floor = {b.floor} drops every sequence; a floor lies far below 1")


# --- ratio and gate ---------------------------------------------------------------------------------------------

_GATES = {
    "levels_clip": ("levels",),
    "branch_clip": ("mix",),
    "log_clip": ("token",),
    "variation_budget": ("token",),
    "divergence": ("token",),
    "gamma_weight": ("sequence_product", "sequence", "token"),
}
"""Gates that act on the parts of a ratio, and the ratios that have such parts."""

_LEVELS = ("domain", "prompt", "trajectory", "token")


def _gate_fits(o: Any) -> None:
    ratio, gate = o.ratio.kind, o.gate.kind
    if ratio == "none" and gate not in ("none", "custom"):
        raise ConfigError(
            f"gate {gate!r} has no ratio to act on (ratio = 'none'); set gate.kind = 'none', or another ratio"
        )
    if gate in _GATES and ratio not in (*_GATES[gate], "custom"):
        names = " or ".join(map(repr, _GATES[gate]))
        raise ConfigError(f"gate {gate!r} acts on the parts of ratio {names}, not of {ratio!r}")
    if ratio == "levels" and gate not in ("levels_clip", "none", "custom"):
        raise ConfigError(
            f"gate {gate!r} sees only what the levels sum to, which is the token's ratio; set gate.kind = "
            "'levels_clip' with a budget for each level, or ratio.kind = 'token'"
        )


def _levels(o: Any) -> None:
    ratio, gate = o.ratio, o.gate
    if ratio.kind == "mix" and ratio.by == "entropy" and ratio.weight != 0.5:
        raise ConfigError(f"a mix by entropy does not read weight = {ratio.weight}; drop it, or set by = 'constant'")
    if ratio.kind != "levels":
        return
    ranks = [_LEVELS.index(level) for level in ratio.levels]
    if ranks != sorted(set(ranks)) or not ranks or ratio.levels[-1] != "token":
        raise ConfigError(f"levels go from the outermost to 'token', each once, out of {_LEVELS}; got {ratio.levels}")
    if gate.kind == "levels_clip" and len(gate.budgets) != len(ratio.levels):
        raise ConfigError(f"one budget for each of the {len(ratio.levels)} levels; got {gate.budgets}")


def _sequence_bounds(o: Any) -> None:
    gate = o.gate
    if o.ratio.kind != "sequence" or gate.kind != "clip":
        return
    low, high = gate.low, gate.high
    if gate.adaptive is not None:
        low, high = round(1 - gate.adaptive.low[1], 9), round(gate.adaptive.high[0] - 1, 9)
    if max(low, high) >= 0.2:
        raise ConfigError(
            f"a sequence ratio moves by thousandths: clip bounds {low:g}, {high:g} are those of tokens and never bind. "
            "GSPO uses low = 3e-4, high = 4e-4; for a sequence gate without clipping say gate.kind = 'none'"
        )
    if max(low, high) > 0.05:
        warnings.warn(
            f"a sequence ratio moves by thousandths: clip bounds {low:g}, {high:g} hardly ever bind (GSPO: 3e-4, 4e-4)",
            stacklevel=4,
        )


# --- the sampler's mismatch -------------------------------------------------------------------------------------


def _corrects_once(o: Any) -> None:
    weighing = [b.kind for b in o.behaviour if b.kind in ("truncate", "mask", "clamp")]
    if o.proximal == "sampler" and weighing and o.ratio.kind != "none":
        raise ConfigError(
            f"behaviour = {weighing[0]!r} with proximal = 'sampler' corrects twice: the ratio is taken against the "
            "sampler already. Set proximal = 'learner', or ratio.kind = 'none', or drop the correction"
        )
    if len(weighing) > 1:
        raise ConfigError(f"the corrections {' and '.join(map(repr, weighing))} both weigh by w; keep one of them")


def _compares_something(o: Any) -> None:
    idle = [b.kind for b in o.behaviour if b.kind in ("veto", "reject")]
    if o.proximal == "sampler" and idle and o.ratio.kind != "none":
        raise ConfigError(
            f"behaviour = {idle[0]!r} compares the proximal policy with the sampler, which are the same with "
            "proximal = 'sampler': it would never act. Set proximal = 'learner'"
        )
    if o.behaviour and o.behaviour[0].kind == "normalise":
        raise ConfigError(
            "'normalise' divides the weights of the corrections before it, and there is none; put it last"
        )


# --- aggregation, regularisers, contrast, controllers -----------------------------------------------------------

_PARTS = {"first": ("first", "rest"), "turn": ("earlier", "last")}


def _segments(o: Any) -> None:
    aggregation = o.aggregation
    if aggregation.kind != "segments" or aggregation.by == "label":
        return
    for name in aggregation.weights:
        if name not in _PARTS[aggregation.by]:
            raise unknown(f"part by {aggregation.by!r}", name, _PARTS[aggregation.by])


def _regularisers(o: Any) -> None:
    kinds = [r.kind for r in o.regularisers]
    for kind in ("perception", "distillation"):
        if kinds.count(kind) > 1:
            raise ConfigError(f"two {kind!r} regularisers would read the same second forward pass; keep one of them")
    for r in o.regularisers:
        if r.kind == "entropy_band" and r.low > r.high:
            raise ConfigError(f"an entropy band has low <= high; got {r}")


def _contrast(o: Any) -> None:
    if o.contrast is None or o.contrast.kind != "discriminative":
        return
    found = (o.ratio.kind, o.gate.kind, o.aggregation.kind)
    if found[:2] != ("none", "none") or found[2] not in ("seq_mean_token_mean", "custom"):
        raise ConfigError(
            "a discriminative contrast weighs mean log-probs of sequences: it goes with ratio 'none', gate 'none' and "
            f"aggregation 'seq_mean_token_mean'; got {', '.join(map(repr, found))}"
        )


def _controllers(o: Any) -> None:
    names = [controller.of for controller in o.controllers]
    if len(set(names)) < len(names):
        raise ConfigError(f"two controllers move the same number; got {names}")
    for c in o.controllers:
        if not all(math.isfinite(x) for _, x in _leaves(c, "")):
            raise ConfigError(f"the numbers of a controller are finite; got {c}")
        if c.kind == "schedule" and (c.steps < 1 or (c.form != "linear" and min(c.start, c.end) <= 0)):
            raise ConfigError(f"a schedule has steps >= 1, and one that is not linear goes between positives; got {c}")
        if c.kind == "adaptive" and min(c.target, c.horizon) <= 0:
            raise ConfigError(f"an adaptive coefficient has a target and a horizon above 0; got {c}")
        if c.kind == "dual" and min(c.lr, c.max) <= 0:
            raise ConfigError(f"a dual controller has lr and max above 0; got {c}")
        _goes(o, c)
        _watches(o, c)


def _goes(o: Any, c: Any) -> None:
    """A number that can be moved, to values that it may have."""
    now, (axis, *_, option) = get(o, c.of), c.of.split(".")
    if axis in ("source", "controllers") or (axis == "regularisers" and option in ("share", "beta")):
        raise ConfigError(f"{c.of!r} is read when the run begins, so that no controller moves it; drop the controller")
    if c.kind == "adaptive" and now == 0:
        raise ConfigError(f"an adaptive controller multiplies, so {c.of!r} = 0 would stay 0; begin above 0")
    ends = {"schedule": ("start", "end"), "dual": ("max",)}.get(c.kind, ())
    alone = msgspec.structs.replace(o, controllers=())
    for value in (now, *(getattr(c, end) for end in ends), *((0.0,) if c.kind == "dual" else ())):
        try:
            put(alone, c.of, value)
        except ConfigError as error:
            raise ConfigError(f"controller {c.kind!r} may bring {c.of!r} to {value:g}: {error}") from error


FIGURES = (
    *("loss", "grad_norm", "tokens", "nll", "entropy", "kl"),
    *("ratio", "ratio_max", "ratio_variance", "clipped", "clipped_up", "clipped_down"),
)
"""Figures that every step has; `figures_of` adds those of an objective."""


def figures_of(o: Any) -> tuple[str, ...]:
    """The figures that a step of this objective has, for controllers to watch."""
    there = {
        "kl_reference": o.needs_reference,
        "divergence": any(r.kind == "distillation" for r in o.regularisers),
        "weight": bool(o.behaviour),
        "ess": bool(o.behaviour),
        "bound_low": o.gate.kind == "clip" and o.gate.adaptive is not None,
        "bound_high": o.gate.kind == "clip" and o.gate.adaptive is not None,
    }
    return (*FIGURES, *(name for name, is_there in there.items() if is_there), *(c.of for c in o.controllers))


def _watches(o: Any, c: Any) -> None:
    if c.kind != "schedule" and c.watch not in figures_of(o):
        raise unknown("figure to watch", c.watch, figures_of(o), f"controller {c.kind!r} of {c.of!r}")


def _layer(o: Any) -> None:
    read = [b.kind for b in o.behaviour] + [r.kind for r in o.regularisers if getattr(r, "against", "") == "sampler"]
    if o.source.kind == "layer" and read:
        raise ConfigError(
            f"{read[0]!r} compares the policy with the sampler, whose log-probs are of the last layer, and source = "
            "'layer' reads another one; drop the correction, or compare with 'old' or 'reference'"
        )


_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def _targets(o: Any) -> None:
    for choice in (o.ratio, o.gate, *o.behaviour, o.aggregation, *o.regularisers, o.contrast):
        target = getattr(choice, "target", None)
        if isinstance(target, str) and not _TARGET.fullmatch(target):
            raise ConfigError(f"target is 'package.module:function'; got {target!r}")


_RULES = (
    _numbers,
    _clip,
    _bands,
    _gate_fits,
    _levels,
    _sequence_bounds,
    _corrects_once,
    _compares_something,
    _segments,
    _regularisers,
    _contrast,
    _controllers,
    _layer,
    _targets,
)
