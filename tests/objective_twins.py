"""Steps of random tokens, and slow twins of the objective's pieces: plain floats, loops over tokens, no torch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from agentgym_trainers.objective import declare
from agentgym_trainers.objective.tokens import Tokens

Row = list[float]
Nested = list[Row]
LABELS = ("", "think", "tool")


@dataclass
class Rollout:
    """One sequence: a number per token in every list."""

    logp: Row
    old: Row
    sampled: Row
    a: Row
    turn: list[int]
    segment: list[int]
    entropy: Row
    masked: Row
    reference: Row
    divergence: Row
    group: int = 0
    domain: int = 0
    reward: float = 0.0

    def __len__(self) -> int:
        return len(self.logp)

    def deltas(self) -> Row:
        return [min(max(p - q, -20.0), 20.0) for p, q in zip(self.logp, self.old, strict=True)]

    def gaps(self) -> Row:
        """log w of each token."""
        return [0.0 if math.isnan(b) else o - b for o, b in zip(self.old, self.sampled, strict=True)]


Step = list[Rollout]


def random_step(lengths: Sequence[int], seed: int, spread: float = 0.5) -> Step:
    """Sequences of these lengths with log-probs that differ by about `spread`."""
    r = random.Random(seed)
    found = []
    for index, length in enumerate(lengths):
        logp = [-r.expovariate(1.0) - 0.01 for _ in range(length)]

        def near(logp: Row = logp) -> Row:
            return [p + r.gauss(0.0, spread) for p in logp]

        turns = sorted(r.randrange(3) for _ in range(length))
        found.append(
            Rollout(
                logp=logp,
                old=near(),
                sampled=near(),
                a=[r.gauss(0.0, 1.0)] * length if r.random() < 0.5 else [r.gauss(0.0, 1.0) for _ in range(length)],
                turn=turns,
                segment=[r.randrange(3) for _ in range(length)],
                entropy=[r.uniform(0.0, 2.0) for _ in range(length)],
                masked=near(),
                reference=near(),
                divergence=[r.uniform(0.0, 1.0) for _ in range(length)],
                group=index // 2,
                domain=index // 4,
                reward=r.choice([0.0, 0.5, 1.0]),
            )
        )
    return found


def steps(least: int = 0) -> st.SearchStrategy[Step]:
    """One to six sequences of up to six tokens, empty ones among them, near the proximal policy or far from it."""
    lengths = st.lists(st.integers(least, 6), min_size=1, max_size=6)
    return st.builds(random_step, lengths, st.integers(0, 2**32), st.sampled_from([0.05, 0.5, 2.0]))


def flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [x for row in rows for x in row]


def tensors(step: Step, dtype: torch.dtype = torch.float64) -> Tokens:
    """The step as the objective sees it; `logp`, `entropy`, `masked` and `divergence` are leaves."""

    def column(name: str, leaf: bool = False) -> Tensor:
        return torch.tensor(flat([getattr(s, name) for s in step]), dtype=dtype).requires_grad_(leaf)

    owner = [i for i, s in enumerate(step) for _ in s.logp]
    return Tokens(
        logp=column("logp", True),
        old=column("old"),
        sampled=column("sampled"),
        advantages=column("a"),
        sequence=torch.tensor(owner, dtype=torch.int64),
        sequences=len(step),
        turn=torch.tensor(flat([s.turn for s in step]), dtype=torch.int64),
        segment=torch.tensor(flat([s.segment for s in step]), dtype=torch.int64),
        labels=LABELS,
        group=torch.tensor([s.group * 7919 for s in step]),
        domain=torch.tensor([s.domain * 104729 for s in step]),
        reward=torch.tensor([s.reward for s in step], dtype=dtype),
        reference=column("reference"),
        entropy=column("entropy", True),
        masked=column("masked", True),
        divergence=column("divergence", True),
    )


def row(
    deltas: Sequence[float], a: float | Sequence[float] = 1.0, *, logp: float | Sequence[float] = -1.0, **given: Any
) -> Rollout:
    """A sequence whose log-ratios are `deltas`: what the reference's examples speak of."""
    n = len(deltas)
    now = [logp] * n if isinstance(logp, int | float) else list(logp)
    old = [p - d for p, d in zip(now, deltas, strict=True)]
    blank = {"turn": [0] * n, "segment": [0] * n, "entropy": [1.0] * n, "divergence": [0.0] * n}
    copies = {name: list(now) for name in ("masked", "reference")}
    advantages = [float(a)] * n if isinstance(a, int | float) else list(a)
    return Rollout(**{"logp": now, "old": old, "sampled": list(old), "a": advantages, **blank, **copies, **given})


# --- ratios -----------------------------------------------------------------------------------------------------


@dataclass
class Ratio:
    """Parts by [part][sequence][token], and what they combine to."""

    logs: list[Nested]
    rho: Nested
    weight: Nested = field(default_factory=list)


def mean(xs: Sequence[float]) -> float:
    return sum(xs) / len(xs) if xs else 0.0


def _one(logs: Nested) -> Ratio:
    return Ratio([logs], [[math.exp(min(max(x, -20.0), 20.0)) for x in log] for log in logs])


def _each(of: Callable[[Row], Row]) -> Callable[[Any, Step], Ratio]:
    return lambda d, step: _one([of(s.deltas()) for s in step])


def _turn(d: declare.TurnProduct, step: Step) -> Ratio:
    return _one(
        [[sum(x for x, k in zip(s.deltas(), s.turn, strict=True) if k == turn) for turn in s.turn] for s in step]
    )


def _prefix_min(d: declare.PrefixMin, step: Step) -> Ratio:
    logs = []
    for s in step:
        deltas, found = s.deltas(), []
        for t in range(len(deltas)):
            before = deltas[: t + 1] if d.inclusive else deltas[:t]
            least = min(before) if before else 0.0
            if d.cap_one:
                least = min(least, 0.0)
            found.append(least if d.inclusive else least + deltas[t])
        logs.append(found)
    return _one(logs)


def _mix(d: declare.Mix, step: Step) -> Ratio:
    token, whole = [s.deltas() for s in step], [[min(mean(s.deltas()), 10.0)] * len(s) for s in step]
    top = max([h for s in step for h in s.entropy], default=0.0)
    weight = [[h / top if d.by == "entropy" else d.weight for h in s.entropy] for s in step]
    rho = [
        [v * math.exp(x) + (1 - v) * math.exp(y) for v, x, y in zip(*rows, strict=True)]
        for rows in zip(weight, token, whole, strict=True)
    ]
    return Ratio([token, whole], rho, weight)


def _levels(d: declare.Levels, step: Step) -> Ratio:
    def around(level: str, s: Rollout) -> float:
        if level == "trajectory":
            return mean(s.deltas())
        key = "domain" if level == "domain" else "group"
        return mean(flat([o.deltas() for o in step if getattr(o, key) == getattr(s, key)]))

    levels = [[s.deltas() if level == "token" else [around(level, s)] * len(s) for s in step] for level in d.levels]
    logs = [levels[0]]
    for outer, inner in pairwise(levels):
        logs.append([[y - x for x, y in zip(*rows, strict=True)] for rows in zip(outer, inner, strict=True)])
    return Ratio(logs, _one(levels[-1]).rho)


RATIOS: dict[type, Callable[[Any, Step], Ratio]] = {
    declare.NoRatio: _each(lambda x: [0.0] * len(x)),
    declare.Token: _each(lambda x: x),
    declare.TurnProduct: _turn,
    declare.Geometric: _each(lambda x: [min(mean(x), 10.0)] * len(x)),
    declare.SequenceProduct: _each(lambda x: [sum(x)] * len(x)),
    declare.PrefixProduct: _each(lambda x: [sum(x[: t + 1]) for t in range(len(x))]),
    declare.PrefixMin: _prefix_min,
    declare.Mix: _mix,
    declare.Levels: _levels,
}


def ratio(declared: Any, step: Step) -> Ratio:
    return RATIOS[type(declared)](declared, step)


# --- gates ------------------------------------------------------------------------------------------------------


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


@dataclass
class At:
    """One token: its ratio, advantage and log-probs; the ratio's parts; and its sequence."""

    rho: float
    a: float
    logp: float
    old: float
    parts: Row
    weight: float
    rhos: Row
    deltas: Row
    all_a: Row
    index: int


def _ppo(rho: float, a: float, low: float, high: float) -> float:
    return min(rho * a, clip(rho, 1 - low, 1 + high) * a)


def _clip(g: declare.Clip, x: At) -> float:
    found = _ppo(x.rho, x.a, g.low, g.high)
    return max(found, g.dual * x.a) if g.dual and x.a < 0 else found


def _soft(g: declare.Soft, x: At) -> float:
    tau = g.positive if x.a > 0 else g.negative
    return 4 / tau / (1 + math.exp(-tau * (x.rho - 1))) * x.a


def _divergence(g: declare.Divergence, x: At) -> float:
    p, q = math.exp(x.logp), math.exp(x.old)
    change = p - q
    if g.form == "kl":
        rest = [max(1 - y, 0.0) + 1e-8 for y in (p, q)]
        change = math.copysign(1.0, change) * (q * math.log(q / p) + rest[1] * math.log(rest[1] / rest[0]))
    if not (change <= g.high if x.a > 0 else change >= -g.low):
        return 0.0
    return x.rho * x.a if g.weight == "ratio" else min(x.rho, g.cap) * x.a * x.logp


def _log_clip(g: declare.LogClip, x: At) -> float:
    held = [min(d, g.high) if a > 0 else max(d, -g.low) for d, a in zip(x.deltas, x.all_a, strict=True)]
    return math.exp(mean(held)) * x.a


def _gamma_weight(g: declare.GammaWeight, x: At) -> float:
    k, lam = g.positive if x.a >= 0 else g.negative
    w = max(x.rho, 1e-8)
    return w**k * math.exp(lam * (1 - w)) * x.a * x.logp


def _levels_clip(g: declare.LevelsClip, x: At) -> float:
    held = 0.0
    for part, budget in zip(x.parts[:-1], g.budgets[:-1], strict=True):
        held += clip(part, -budget, budget)
    last = sum(x.parts) - held if g.variant == "A" else x.parts[-1]
    found = math.exp(held + clip(last, -g.budgets[-1], g.budgets[-1])) * x.a
    return min(found, x.rho * x.a) if g.pessimistic else found


def _variation_budget(g: declare.VariationBudget, x: At) -> float:
    room = len(x.rhos) * g.delta
    for index, rho in enumerate(x.rhos):
        if index != x.index:
            room -= abs(rho - 1)
    room = max(room, 0.0)
    return (1 + clip(x.rho - 1, -room, room)) * x.a


def _branch_clip(g: declare.BranchClip, x: At) -> float:
    found = 0.0
    for v, log, (low, high) in zip((x.weight, 1 - x.weight), x.parts, (g.token, g.sequence), strict=True):
        rho = math.exp(log)
        found += v * (_ppo(rho, x.a, low, high) if g.pessimistic else clip(rho, 1 - low, 1 + high) * x.a)
    return found


GATES: dict[type, Callable[[Any, At], float]] = {
    declare.NoGate: lambda g, x: x.rho * x.a,
    declare.Clip: _clip,
    declare.Detached: lambda g, x: clip(x.rho, 1 - g.low, 1 + g.high) * x.a * x.logp,
    declare.Soft: _soft,
    declare.Quadratic: lambda g, x: x.rho * x.a - g.coef * (x.rho - 1) ** 2,
    declare.SquaredLog: lambda g, x: x.a * x.logp - 0.5 * g.beta * math.log(x.rho) ** 2,
    declare.Divergence: _divergence,
    declare.LogClip: _log_clip,
    declare.GammaWeight: _gamma_weight,
    declare.LevelsClip: _levels_clip,
    declare.VariationBudget: _variation_budget,
    declare.BranchClip: _branch_clip,
}


def gate(declared: Any, found: Ratio, step: Step) -> Nested:
    """The objective of every token."""
    return [
        [
            GATES[type(declared)](
                declared,
                At(
                    rho=found.rho[i][t],
                    a=s.a[t],
                    logp=s.logp[t],
                    old=s.old[t],
                    parts=[log[i][t] for log in found.logs],
                    weight=found.weight[i][t] if found.weight else 1.0,
                    rhos=found.rho[i],
                    deltas=s.deltas(),
                    all_a=s.a,
                    index=t,
                ),
            )
            for t in range(len(s))
        ]
        for i, s in enumerate(step)
    ]


def bounds(d: declare.Adaptive, rhos: Row, advantages: Row) -> tuple[float, float]:
    """BAPO, as it is told: look at every token for every pair of bounds."""

    def enough(low: float, high: float) -> bool:
        positive = negative = 0.0
        for rho, a in zip(rhos, advantages, strict=True):
            if a > 0 and (d.count == "value" or rho <= high):
                positive += min(rho, high) * a
            if a < 0 and (d.count == "value" or rho >= low):
                negative += max(rho, low) * -a
        return positive >= d.target * (negative + (positive if d.balance == "share" else 0.0))

    low, high = d.low[0], d.high[0]
    while not enough(low, high):
        if low < d.low[1] - 1e-9:
            low = min(low + d.step[0], d.low[1])
        elif high < d.high[1] - 1e-9:
            high = min(high + d.step[1], d.high[1])
        else:
            break
    return low, high


# --- the sampler's mismatch -------------------------------------------------------------------------------------


def _pooled(level: str, s: Rollout) -> Row:
    logs = s.gaps()
    if level == "geometric":
        logs = [mean(logs)] * len(logs)
    if level == "product":
        logs = [sum(logs)] * len(logs)
    return [math.exp(clip(x, -20.0, 20.0)) for x in logs]


def _reject(b: declare.Reject, s: Rollout) -> Row:
    found = [kl(b.form, g) for g in s.gaps()]
    over: dict[str, Callable[[Row], float]] = {"sum": sum, "mean": mean, "max": max}
    if b.over != "token" and found:
        found = [over[b.over](found)] * len(found)
    return [0.0 if x > b.bound else 1.0 for x in found]


def _off_policy(b: declare.OffPolicyMask, s: Rollout) -> Row:
    drift = mean([0.0 if math.isnan(q) else q - p for p, q in zip(s.logp, s.sampled, strict=True)])
    return [0.0 if a < 0 and drift > b.threshold else 1.0 for a in s.a]


def kl(form: str, gap: float) -> float:
    held = clip(gap, -10.0, 10.0)
    return {"k1": -gap, "k2": gap * gap / 2, "k3": math.exp(held) - held - 1}[form]


BEHAVIOURS: dict[type, Callable[[Any, Rollout], Row]] = {
    declare.Truncate: lambda b, s: [min(w, b.cap) for w in _pooled(b.level, s)],
    declare.Mask: lambda b, s: [w if b.low <= w <= b.high else 0.0 for w in _pooled(b.level, s)],
    declare.Clamp: lambda b, s: [clip(w, b.low, b.high) for w in _pooled(b.level, s)],
    declare.Veto: lambda b, s: [0.0 if any(math.exp(g) < b.floor for g in s.gaps()) else 1.0] * len(s),
    declare.Reject: _reject,
    declare.OffPolicyMask: _off_policy,
}


def weights(declared: Sequence[Any], step: Step) -> Nested:
    found = [[1.0] * len(s) for s in step]
    for b in declared:
        if isinstance(b, declare.Normalise):
            average = mean(flat(found))
            found = [[w / average if average else w for w in ws] for ws in found]
        else:
            more = [BEHAVIOURS[type(b)](b, s) for s in step]
            found = [[x * y for x, y in zip(*rows, strict=True)] for rows in zip(found, more, strict=True)]
    return found


# --- aggregation ------------------------------------------------------------------------------------------------


def part_of(d: declare.Segments, s: Rollout, t: int) -> str:
    if d.by == "first":
        return "first" if t == 0 else "rest"
    if d.by == "turn":
        return "last" if s.turn[t] == max(s.turn) else "earlier"
    return LABELS[s.segment[t]]


def _segments(d: declare.Segments, xs: Nested, step: Step) -> float:
    held: dict[str, Row] = {}
    for s, row_ in zip(step, xs, strict=True):
        for t, x in enumerate(row_):
            held.setdefault(part_of(d, s, t), []).append(x)
    return sum(d.weights.get(name, 1.0) * mean(values) for name, values in held.items())


AGGREGATIONS: dict[type, Callable[[Any, Nested, Step], float]] = {
    declare.TokenMean: lambda d, xs, step: mean(flat(xs)),
    declare.SeqMeanTokenMean: lambda d, xs, step: mean([mean(x) for x in xs]),
    declare.SeqMeanTokenSum: lambda d, xs, step: mean([sum(x) for x in xs]),
    declare.ConstNorm: lambda d, xs, step: mean([sum(x) / d.horizon for x in xs]),
    declare.TokenSum: lambda d, xs, step: sum(flat(xs)),
    declare.Segments: _segments,
}


def aggregate(declared: Any, xs: Nested, step: Step) -> float:
    return AGGREGATIONS[type(declared)](declared, xs, step)


# --- regularisers and contrast ----------------------------------------------------------------------------------


def _against(name: str, s: Rollout) -> Row:
    return {"reference": s.reference, "old": s.old, "sampler": s.sampled}[name]


def _kl_hinge(r: declare.KlHinge, step: Step) -> Nested:
    kls = [[kl("k3", q - p) for p, q in zip(s.logp, _against(r.against, s), strict=True)] for s in step]
    hinge = max(mean(flat(kls)) - r.bound, 0.0)
    return [[r.coef * hinge * x for x in row_] for row_ in kls]


def _perception(r: declare.Perception, s: Rollout) -> Row:
    found = []
    for p, m in zip(s.logp, s.masked, strict=True):
        gap = clip(m - p if r.form == "code" else p - m, -10.0, 10.0)
        found.append(-r.coef * (math.exp(gap) - gap - 1) + r.clean * -p + r.masked * -m)
    return found


PENALTIES: dict[type, Callable[[Any, Rollout], Row]] = {
    declare.Kl: lambda r, s: [
        r.coef * kl(r.form[:2], q - p) for p, q in zip(s.logp, _against(r.against, s), strict=True)
    ],
    declare.Entropy: lambda r, s: [-r.coef * h for h in s.entropy],
    declare.EntropyBand: lambda r, s: [r.coef * (max(r.low - h, 0.0) + max(h - r.high, 0.0)) for h in s.entropy],
    declare.Perception: _perception,
    declare.Distillation: lambda r, s: [r.coef * d if s.reward >= r.threshold else 0.0 for d in s.divergence],
    declare.Sft: lambda r, s: [-r.coef * p if s.reward >= r.threshold else 0.0 for p in s.logp],
}


def penalty(declared: Any, step: Step) -> Nested:
    if isinstance(declared, declare.KlHinge):
        return _kl_hinge(declared, step)
    return [PENALTIES[type(declared)](declared, s) for s in step]


def discriminative(d: declare.Discriminative, step: Step) -> Nested:
    """DRPO's weights, group by group."""
    found = [0.0] * len(step)
    for group in {s.group for s in step}:
        members = [i for i, s in enumerate(step) if s.group == group and len(s) and not math.isnan(s.reward)]
        right = [i for i in members if step[i].reward > d.threshold]
        wrong = [i for i in members if step[i].reward <= d.threshold]
        if not right or not wrong:
            continue
        short = {i: math.exp((1 - len(step[i]) / d.max_length) / d.length_temperature) for i in right}
        likely = {i: math.exp(mean(step[i].logp) / d.tau) for i in wrong}
        for i in right:
            found[i] = short[i] / sum(short.values())
        for i in wrong:
            found[i] = -likely[i] / sum(likely.values())
    return [[x] * len(s) for x, s in zip(found, step, strict=True)]


def loss(o: declare.Objective, step: Step) -> float:
    """The whole composition."""
    found = ratio(o.ratio, step)
    declared = o.gate
    if isinstance(declared, declare.Clip) and declared.adaptive:
        low, high = bounds(declared.adaptive, flat(found.rho), flat([s.a for s in step]))
        declared = declare.Clip(low=1 - low, high=high - 1, dual=declared.dual)
    gains, w = gate(declared, found, step), weights(o.behaviour, step)
    gained = [[x * y for x, y in zip(*rows, strict=True)] for rows in zip(w, gains, strict=True)]
    value = -aggregate(o.aggregation, gained, step)
    return value + sum(aggregate(o.aggregation, penalty(r, step), step) for r in o.regularisers)
