"""Several parts become one number: extremes, products, cautious means, strict orders."""

from __future__ import annotations

import math
from collections.abc import Callable

from agentgym.errors import ConfigError, RecordError
from agentgym.rewards.nodes import Builder, Leaf, Node, Op, Table, View, children, finite


def _extreme(pick: Callable[[list[tuple[float, int]]], tuple[float, int]]) -> Callable[..., Node]:
    """The least or the greatest part; all is owed to the part that was taken (the first of equals).
    The least of an ensemble is worst-case optimisation, WCO (2310.02743)."""

    def build(b: Builder, d: Table, slope: float | None) -> Node:
        parts = [b.node(part, slope) for part in children(d)]
        me = b.choice()

        def extreme(view: View) -> float:
            if me not in view.chosen:
                before = set(view.visited)
                view.chosen[me] = pick([(part(view), i) for i, part in enumerate(parts)])[1]
                view.visited = before
            return parts[view.chosen[me]](view)

        return extreme

    return build


def _greatest(found: list[tuple[float, int]]) -> tuple[float, int]:
    return max(found, key=lambda pair: (pair[0], -pair[1]))


def _product(b: Builder, d: Table, slope: float | None) -> Node:
    """The product of the parts; a term's neutral value in it is 1."""
    parts = [b.node(part, None, neutral=1.0) for part in children(d)]
    return lambda view: math.prod(part(view) for part in parts)


def _ratio(b: Builder, d: Table, slope: float | None) -> Node:
    """of / by, a term's neutral value in `by` being 1; `otherwise` (else a refusal) where `by` is 0: a share."""
    otherwise = finite(d["otherwise"], "'otherwise'") if "otherwise" in d else None
    part, whole = b.node(d["of"], None), b.node(d["by"], None, neutral=1.0)
    if not isinstance(whole, Leaf):
        raise ConfigError(f"'by' of a ratio is a term's name; got {d['by']!r:.80}")

    def share(above: float, below: float) -> float:
        if below:
            return above / below
        if otherwise is None:
            raise RecordError(f"{d['of']!r:.40} by {d['by']!r:.40} divides by 0; say what it is with 'otherwise'")
        return otherwise

    return lambda view: share(part(view), whole(view))


def _mean_minus_variance(b: Builder, d: Table, slope: float | None) -> Node:
    """UWO (2310.02743): mean - lambda var. The paper's code uses ddof 0 for best-of-n and 1 for PPO: choose."""
    parts = [b.node(part, None) for part in children(d)]
    weight = finite(d["lambda"], "'lambda'")
    ddof: int = d.get("ddof", 0)
    if ddof not in (0, 1) or len(parts) <= ddof:
        raise ConfigError(f"'ddof' is 0 or 1 and below the number of parts ({len(parts)}); got {ddof!r}")

    def cautious(view: View) -> float:
        values = [part(view) for part in parts]
        mean = sum(values) / len(values)
        return mean - weight * sum((x - mean) ** 2 for x in values) / (len(values) - ddof)

    return cautious


def _lexicographic(b: Builder, d: Table, slope: float | None) -> Node:
    """sum_i q_i (n+1)^-i over its largest value: q_i is part i, clipped to [0, 1] and rounded down to n levels (the
    last part is not rounded), so one level of an earlier part outweighs everything after it."""
    parts = [b.node(part, None) for part in children(d)]
    levels: int = d.get("levels", 10)
    if not isinstance(levels, int) or levels < 1:
        raise ConfigError(f"'levels' of a lexicographic reward is a whole number from 1; got {levels!r:.80}")
    weights = [math.pow(levels + 1, -i) for i in range(len(parts))]
    whole = sum(weights)

    def ordered(view: View) -> float:
        clipped = [min(max(part(view), 0.0), 1.0) for part in parts]
        steps = [math.floor(x * levels + 1e-9) / levels for x in clipped[:-1]]
        return sum(w * x for w, x in zip(weights, (*steps, clipped[-1]), strict=True)) / whole

    return ordered


OPS = {
    "min": Op(_extreme(min), ("of",)),
    "max": Op(_extreme(_greatest), ("of",)),
    "product": Op(_product, ("of",)),
    "ratio": Op(_ratio, ("of", "by"), ("otherwise",)),
    "mean_minus_variance": Op(_mean_minus_variance, ("of", "lambda"), ("ddof",)),
    "lexicographic": Op(_lexicographic, ("of",), ("levels",)),
}
