"""Composites of the literature as ready declarations. Each function gives a plain table; in a TOML file the same is

    [reward]
    op = "composite"
    name = "uwo"
    of = ["rm.0", "rm.1", "rm.2"]
    weight = 0.1
    ddof = 1

Its docstring names the terms that the environment or a judge has to bring, each 0 or 1 unless another range is said.
ChatShopBuddy's hierarchical reward stands with its shop (`agentgym_envs.shopping`): it is that environment's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agentgym.errors import ConfigError, unknown

Table = dict[str, Any]


def _weighted(*plus: Any, **of: float) -> Table:
    return {"op": "weighted_sum", "of": of, "plus": list(plus)}


def _scaled(of: Any, factor: float) -> Table:
    return {"op": "scale", "of": of, "factor": factor}


# --- tasks with their own scale -----------------------------------------------------------------------------------


def text2vis(format: float = 0.0) -> Table:
    """RL-Text2Vis (2601.04582), as in the released script: 0.5 answer + 0.25 code + 0.25 visual.

    answer = 0.6 match + 0.4 [match >= 0.999]; code = 0.5 executed + 0.5 intent; visual, of code that ran, 1 where both
    judge scores are >= 4, 0.5 where both are >= 3, 0.25 where one is. The script has a format reward beside it: give it
    the weight 1 for the sum that it trains on. There a judge that failed scores 0; here it is a fault.

    match [0, 1], executed, intent, readability [1, 5], correctness [1, 5], and with `format` format
    """
    scores = ["readability", "correctness"]
    levels = [
        {"op": "steps", "of": {"op": "min", "of": scores}, "levels": [[3, 0.5], [4, 1]]},
        {"op": "steps", "of": {"op": "max", "of": scores}, "levels": [[3, 0.25]]},
    ]
    visual = {
        "op": "gate",
        "when": "executed",
        "at_least": 1,
        "then": _scaled({"op": "max", "of": levels}, 0.25),
        "otherwise": 0,
    }
    exact = {"op": "steps", "of": "match", "levels": [[0.999, 0.2]]}
    parts = {"match": 0.3, "executed": 0.125, "intent": 0.125}
    return _weighted(exact, visual, **parts, **({"format": format} if format else {}))


def globe() -> Table:
    """GLOBE (2506.14674): accuracy + 0.5 localisability + 0.2 visual + format; accuracy is 1 for city and country, 0.2
    for the country alone.

    country, city, localisable [0, 1] (a judge's p(yes) / (p(yes) + p(no))), entities [0, 1] (share matched), format
    """
    found = {"op": "gate", "when": "city", "at_least": 1, "then": 1, "otherwise": 0.2}
    accuracy = {"op": "gate", "when": "country", "at_least": 1, "then": found, "otherwise": 0}
    return _weighted(accuracy, localisable=0.5, entities=0.2, format=1.0)


def crpo() -> Table:
    """Clinical-R1 (2512.00601), as in the released rules of the 3B model: 10 accuracy + format + 0.5 english.

    The rewards for faithfulness and comprehensiveness that the paper's abstract names are not in that code, and so are
    not here. `agentgym.rewards.judges.choice` gives these terms:
    accuracy (1, 0, -0.5 for no letter, -count for another number of boxes than one), format (0, 1, 1.5), english [0, 1]
    """
    return _weighted(accuracy=10.0, format=1.0, english=0.5)


def etcon() -> Table:
    """EtCon's consolidation (repository RlinL/EtCon), as in the released reward: 0 without format, else 0.05 format +
    0.7 correctness + 0.15 cleanliness + 0.1 consistency; correctness is 1 for the exact answer, 0.75 for its words
    among others, 0.4 to 0.6 for a similarity from 0.85 to 1 (there rounded to two places).

    format [0, 1], exact, subset, similarity [0, 1] (may be absent), cleanliness [0, 1], consistency [0, 1]
    """
    similarity = {"op": "term", "name": "similarity", "default": 0.0}
    alike = {
        "op": "product",
        "of": [
            {"op": "steps", "of": similarity, "levels": [[0.85, 1]]},
            {"op": "curve", "of": similarity, "points": [[0.85, 0.4], [1, 0.6]]},
        ],
    }
    correct = {"op": "max", "of": ["exact", _scaled("subset", 0.75), alike]}
    parts = _weighted(_scaled(correct, 0.7), format=0.05, cleanliness=0.15, consistency=0.1)
    return {"op": "gate", "when": "format", "at_most": 0, "then": 0, "otherwise": parts}


def classwise(hit: float = 1.0, miss: float = -2.0, false_alarm: float = -1.0) -> Table:
    """Class-wise asymmetric reward of air-quality forecasting: a missed alarm is dearer than a false one. The amounts
    are a reconstruction.

    hit, miss, false_alarm (counts)
    """
    return _weighted(hit=hit, miss=miss, false_alarm=false_alarm)


def rlir() -> Table:
    """RLIR (2509.23958): the share of actions that an inverse-dynamics model recovers. A reconstruction.

    recovered, actions (counts)
    """
    return {"op": "ratio", "of": "recovered", "by": "actions"}


def retroformer() -> Table:
    """Retroformer (2308.02151): the return of the trial after a reflection minus that of the trial before it.

    next, now
    """
    return {"op": "relative_to_baseline", "of": "next", "baseline": "now"}


# --- several models of what is wanted -------------------------------------------------------------------------------


def wco(of: Sequence[str]) -> Table:
    """Worst-case optimisation over an ensemble of reward models (2310.02743): the least score."""
    return {"op": "min", "of": list(of)}


def uwo(of: Sequence[str], weight: float, ddof: int) -> Table:
    """Uncertainty-weighted optimisation (2310.02743): mean - weight x variance. The released code has weight 0.5 and
    ddof 0 for best-of-n, 0.1 and ddof 1 for PPO."""
    return {"op": "mean_minus_variance", "of": list(of), "lambda": weight, "ddof": ddof}


def rluf(love: float, helpful: float, safe: float) -> Table:
    """RLUF (2505.14946): P[Love] of a user's reaction beside helpfulness and safety. The weights are yours: the paper's
    are not known.

    love [0, 1], helpful, safe
    """
    return _weighted(love=love, helpful=helpful, safe=safe)


def heads(of: Sequence[str], weights: Sequence[float] = ()) -> Table:
    """Multi-objective GRPO (2503.21819): a weighted sum of regression heads; equal weights are a reconstruction. To
    normalise each head by itself instead, use the advantage key "component" (GDPO)."""
    chosen = list(weights) or [1.0 / len(of)] * len(of)
    if len(chosen) != len(of):
        raise ConfigError(f"one weight for each of the heads {list(of)}; got {chosen}")
    return _weighted(**dict(zip(of, chosen, strict=True)))


# --- constraints ----------------------------------------------------------------------------------------------------


def _calibrated(reward: str, baseline: str) -> Table:
    return {"op": "calibrated", "of": reward, "baseline": baseline}


def _feasible(judges: Sequence[str], then: Table) -> Table:
    return {"op": "all_of", "when": list(judges), "then": then, "otherwise": 0}


def crpg(judges: Sequence[str], kl_max: float, reward: str = "reward", baseline: str = "baseline") -> Table:
    """CGPO's CRPG (2409.20370): R_calib where every judge is satisfied, else 0, times max(1 - KL / kl_max, 0).

    The judges (1 = satisfied), `reward` and the same model's score `baseline` of the reference answer, policy.kl
    """
    left = {"op": "clip", "of": {"op": "scale", "of": "policy.kl", "factor": -1 / kl_max, "offset": 1.0}, "low": 0.0}
    return {"op": "product", "of": [_feasible(judges, _calibrated(reward, baseline)), left]}


def crraft(judges: Sequence[str], kl_max: float, reward: str = "reward", baseline: str = "baseline") -> Table:
    """CGPO's CRRAFT (2409.20370): R_calib where every judge is satisfied and KL <= kl_max, else 0; the best of a group
    is then imitated with that weight (advantage transform "best").

    The judges (1 = satisfied), `reward` and the same model's score `baseline` of the reference answer, policy.kl
    """
    near = {"op": "gate", "when": "policy.kl", "at_most": kl_max, "then": _calibrated(reward, baseline), "otherwise": 0}
    return _feasible(judges, near)


def violations(weight: float, utility: str = "utility", violation: str = "violation", at_least: float = 1.0) -> Table:
    """HarmonyGuard (2508.04010) as a gate: utility - weight x [violation >= at_least]. A reconstruction.

    `utility`, `violation` (a count, a severity, or a monitor's NAME.violated)
    """
    charged = {"op": "steps", "of": violation, "levels": [[at_least, -weight]]}
    return {"op": "weighted_sum", "of": {utility: 1.0}, "plus": [charged]}


def constrained(target: float, utility: str = "utility", violation: str = "violation", **options: float) -> Table:
    """HarmonyGuard (2508.04010) as a Lagrangian: utility - multiplier x (violation - target). A reconstruction.
    `options` are those of a constraint: multiplier (0), lr, max; `agentgym.rewards.Dual` moves the multiplier.

    `utility`, `violation`
    """
    constraint = {"multiplier": 0.0, **options, "target": target}
    return {"op": "lagrangian", "of": utility, "constraints": {violation: constraint}}


# --- how much thought, how many looks -------------------------------------------------------------------------------


def degrpo(short: float = 1.0, think: float = 0.5, wrong: float = -1.0) -> Table:
    """Thinkless (2505.13379): a right answer is worth more without a long thought; a wrong one is -1 either way.

    correct, think (1 where the control token chose to think)
    """
    right = {"op": "gate", "when": "think", "at_least": 1, "then": think, "otherwise": short}
    return {"op": "gate", "when": "correct", "at_least": 1, "then": right, "otherwise": wrong}


def adaptthink(delta: float = 0.05) -> Table:
    """AdaptThink (2505.13417): correct + delta without thinking; the reference policy's accuracy on the task is the
    advantage's given baseline.

    correct, nothinking
    """
    return _weighted(correct=1.0, nothinking=delta)


def dtpo_outcome() -> Table:
    """AdaptVision's outcome reward (2512.03794): accuracy, x 0.9 where the tool was used, + 0.5 format.

    The released trainer also lowers right answers without the tool to accuracy - 0.1 in groups where they are rare:
    that is a fact of the group, not of the trajectory, and is not here.
    accuracy, tool, format
    """
    answered = {
        "op": "gate",
        "when": "tool",
        "at_least": 1,
        "then": _scaled("accuracy", 0.9),
        "otherwise": "accuracy",
    }
    return _weighted(answered, format=0.5)


def dtpo_tool() -> Table:
    """AdaptVision's tool reward (2512.03794): 0.1 where a judge finds the crop useful - 0.2 x its share of the image.

    tool, useful, area [0, 1] (the last two only where the tool was used)
    """
    looked = _weighted(useful=0.1, area=-0.2)
    return {"op": "gate", "when": "tool", "at_least": 1, "then": looked, "otherwise": 0}


def dtpo() -> Table:
    """Outcome plus tool: the trajectory's figure. DTPO's two advantages read the parts as terms of their own, which
    `agentgym.rewards.judges.Computed` makes of the two tables.

    accuracy, tool, format, useful, area
    """
    return _weighted(dtpo_outcome(), dtpo_tool())


COMPOSITES: dict[str, Callable[..., Table]] = {
    f.__name__: f
    for f in (
        *(text2vis, globe, crpo, etcon, classwise, rlir, retroformer),
        *(wco, uwo, rluf, heads),
        *(crpg, crraft, violations, constrained),
        *(degrpo, adaptthink, dtpo_outcome, dtpo_tool, dtpo),
    )
}
"""Every composite by the name that a table calls it."""


def expanded(declared: Any) -> Any:
    """A declaration with every {"op": "composite", "name": ..., options} replaced by what it stands for."""
    if isinstance(declared, (list, tuple)):
        return [expanded(part) for part in declared]
    if not isinstance(declared, Mapping):
        return declared
    if declared.get("op") != "composite":
        return {key: expanded(part) for key, part in declared.items()}
    options = {key: value for key, value in declared.items() if key not in ("op", "name")}
    name = str(declared.get("name"))
    if name not in COMPOSITES:
        raise unknown("composite", name, COMPOSITES)
    try:
        inspect.signature(COMPOSITES[name]).bind(**options)
    except TypeError as error:
        takes = inspect.signature(COMPOSITES[name])
        raise ConfigError(f"composite {name!r}: {error}; it takes {takes}".replace(" -> 'Table'", "")) from error
    return COMPOSITES[name](**options)
