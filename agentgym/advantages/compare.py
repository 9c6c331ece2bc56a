"""Scores compared within their groups: centred, transformed, scaled; and bundles of prompts compared as one.

P trajectories, U units.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from agentgym.advantages import groups
from agentgym.advantages.declare import Best, Risk, Term
from agentgym.advantages.table import Bools, Ints, Real, Table
from agentgym.advantages.transforms import AdvantageState, transformed


class Scores(NamedTuple):
    """Scores and what they are compared by: [U] each.

    group numbers the groups, from 0 without gaps; owner the trajectories; run orders units for the centre "others";
    tokens and weight say how much a unit counts in a length-weighted and in a plain mean; given is its own baseline.
    """

    x: Real
    group: Ints
    owner: Ints
    run: Ints
    tokens: Real
    weight: Real
    given: Real


def compared(term: Term, s: Scores, state: AdvantageState, name: str) -> Real:
    """Centre and scale: [U]. `name` is the term's in the state."""
    centred = _centred(term, s, state, name)
    if term.scale == "std":
        spread = groups.deviation(s.x, s.group, s.weight, term.ddof)
        centred = centred / np.where(spread > 0, spread + term.eps, 1.0)[s.group]
    centred = np.where(_alone(term, s, centred), s.x if term.singleton == "keep" else 0.0, centred)
    if term.scale == "active":
        return centred * (len(s.x) / max(int((s.x != 0).sum()), 1))
    if term.scale in ("batch", "tokens"):
        weights = s.tokens if term.scale == "tokens" else np.ones_like(s.x)
        return groups.whiten(centred, weights, term.ddof, term.eps)
    return centred


def _centred(term: Term, s: Scores, state: AdvantageState, name: str) -> Real:
    """Scores less their baseline, or what a transform makes of them; NaN where "others" finds nobody: [U]."""
    if term.transform is not None:
        return transformed(term.transform, s.x, s.group, state, name)
    if term.centre in ("none", "given"):
        return s.x - s.given
    if term.centre == "others":
        return s.x - groups.others(s.x, s.group, s.owner, s.run)
    weights = s.tokens if term.centre == "length_weighted" else s.weight
    centred = s.x - groups.mean(s.x, s.group, weights)[s.group]
    if term.centre == "leave_one_out":
        n = groups.sizes(s.group)[s.group]
        centred = centred * n / np.maximum(n - 1, 1)
    return centred


def _alone(term: Term, s: Scores, centred: Real) -> Bools:
    """Units with nothing to be compared with: [U]."""
    if term.centre == "others":
        return np.isnan(centred)
    transform = term.transform
    unary = transform is None and term.centre in ("none", "given")
    if unary or isinstance(transform, Best) or (isinstance(transform, Risk) and transform.track):
        return np.zeros(len(centred), bool)
    alone: Bools = groups.sizes(s.group)[s.group] == 1
    return alone


# --- bundles ----------------------------------------------------------------------------------------------------


def bundled(term: Term, table: Table, x: Real, state: AdvantageState, name: str) -> Real:
    """Scores of trajectories compared as bundles of prompts: [P].

    The k-th unit of a bundle sums the k-th members of its prompts, in the order of the step, without replacement;
    members to whom another prompt of the bundle has no counterpart get 0. Tracked quantiles are those of full bundles:
    what a step's last bundle lacks in prompts is no reward of zero, so it is compared as if full, and scaled back.
    """
    bundle, place = table.prompt // term.bundle, _places(table.prompt)
    prompts = np.unique(table.prompt) // term.bundle
    fewest = groups.extremes(groups.sizes(table.prompt), prompts)[0]
    kept = np.flatnonzero(place < fewest[bundle])
    unit = groups.joint(bundle[kept], place[kept])
    summed = _summed(table, x, bundle, kept, unit)
    tracked = isinstance(term.transform, Risk) and term.transform.track
    full = term.bundle / groups.sizes(prompts)[summed.group] if tracked else np.ones_like(summed.x)
    found = np.zeros(table.size)
    found[kept] = (compared(term, summed._replace(x=summed.x * full), state, name) / full)[unit]
    if term.credit == "share":
        ahead = x - groups.mean(x, table.prompt, np.ones_like(x))[table.prompt]
        found[kept] *= _parts(ahead[kept], unit)
    return found


def _summed(table: Table, x: Real, bundle: Ints, kept: Ints, unit: Ints) -> Scores:
    """The units of bundles: [U]."""
    _, first = np.unique(unit, return_index=True)
    tokens = groups.total(table.owner, table.tokens, table.size)
    score = groups.total(unit, x[kept], len(first))
    return Scores(
        x=score,
        group=groups.joint(bundle[kept][first]),
        owner=np.arange(len(first)),
        run=np.arange(len(first)),
        tokens=groups.total(unit, tokens[kept], len(first)),
        weight=np.ones_like(score),
        given=np.zeros_like(score),
    )


def _places(prompt: Ints) -> Ints:
    """The place of each trajectory among those of its prompt: [P]."""
    order = np.argsort(prompt, kind="stable")
    found = np.empty_like(prompt)
    found[order] = np.arange(len(prompt)) - np.searchsorted(prompt[order], prompt[order])
    return found


def _parts(ahead: Real, unit: Ints) -> Real:
    """The part of each member in its unit's value, in proportion to `ahead`; equal parts where these cancel."""
    size = len(np.unique(unit))
    total = groups.total(unit, ahead, size)[unit]
    cancel = np.abs(total) <= 1e-6
    return np.where(cancel, 1.0 / groups.sizes(unit)[unit], ahead / np.where(cancel, 1.0, total))
