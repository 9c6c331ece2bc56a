"""One part, bent: clipped, squashed, stepped, or read off a curve."""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import pairwise
from typing import Any

from agentgym.errors import ConfigError, RecordError
from agentgym.rewards.nodes import Builder, Node, Op, Table, children, finite


def _power(b: Builder, d: Table, slope: float | None) -> Node:
    """scale x part ^ exponent."""
    part = b.node(d["of"], None)
    exponent = finite(d["exponent"], "'exponent'")
    factor = finite(d.get("scale", 1.0), "'scale'")
    if exponent <= 0:
        raise ConfigError(f"'exponent' is above 0; got {exponent}")

    def powered(x: float) -> float:
        if x < 0 and not exponent.is_integer():
            raise RecordError(f"{x} to the power of {exponent} is no real number; keep {d['of']!r:.40} at 0 or above")
        return float(factor * x**exponent)

    return lambda view: powered(part(view))


def _clip(b: Builder, d: Table, slope: float | None) -> Node:
    """The part, not below `low` and not above `high` (one of them, or both)."""
    if "low" not in d and "high" not in d:
        raise ConfigError("a clip needs 'low' or 'high', or both")
    low = finite(d["low"], "'low'") if "low" in d else -math.inf
    high = finite(d["high"], "'high'") if "high" in d else math.inf
    if low > high:
        raise ConfigError(f"'low' of a clip is not above 'high'; got {low} and {high}")
    part = b.node(d["of"], None)
    return lambda view: min(max(part(view), low), high)


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def _sigmoid(b: Builder, d: Table, slope: float | None) -> Node:
    """1 / (1 + exp(-part)): a logit as a probability, such as RLUF's P[Love] (2505.14946)."""
    part = b.node(d["of"], None)
    return lambda view: sigmoid(part(view))


def _calibrated(b: Builder, d: Table, slope: float | None) -> Node:
    """sigmoid(part - baseline): CGPO's R_calib, baseline the score of a reference answer (2409.20370)."""
    part, baseline = b.node(d["of"], None), b.node(d["baseline"], None)
    return lambda view: sigmoid(part(view) - baseline(view))


def _pairs(declared: Table, key: str) -> list[tuple[float, float]]:
    """[[x, y], ...] with rising x, or `ConfigError`."""
    what = f"{key!r} of {declared['op']!r}"
    found: list[tuple[float, float]] = []
    for pair in children(declared, key):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ConfigError(f"{what} is a list of [x, value] pairs; got {pair!r:.80}")
        found.append((finite(pair[0], what), finite(pair[1], what)))
    if any(a[0] >= b[0] for a, b in pairwise(found)):
        raise ConfigError(f"{what} goes from the lowest x to the highest, each once; got {found}")
    return found


def _steps(b: Builder, d: Table, slope: float | None) -> Node:
    """Levels of a score: the value of the highest threshold that the part reaches, below all of them `otherwise`."""
    pairs = _pairs(d, "levels")
    edges = [x for x, _ in pairs]
    values = [finite(d.get("otherwise", 0.0), "'otherwise'"), *(y for _, y in pairs)]
    part = b.node(d["of"], None)
    return lambda view: values[bisect_right(edges, part(view))]


def _line(b: Builder, of: Any, points: list[tuple[float, float]]) -> Node:
    """Linear between points, constant outside of them."""
    part = b.node(of, None)
    xs = [x for x, _ in points]

    def read(x: float) -> float:
        i = bisect_right(xs, x)
        if i in (0, len(points)):
            return points[min(i, len(points) - 1)][1]
        (x0, y0), (x1, y1) = points[i - 1], points[i]
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)

    return lambda view: read(part(view))


def _curve(b: Builder, d: Table, slope: float | None) -> Node:
    """Piecewise linear through `points`, constant outside of them."""
    return _line(b, d["of"], _pairs(d, "points"))


def _length_shape(b: Builder, d: Table, slope: float | None) -> Node:
    """G2RPO's trapezoid over a length (2604.08539): 0, rising from low to start, `height` (1) until end, falling to
    high. The published thresholds are not known."""
    low, start, end, high = (finite(d[key], f"{key!r}") for key in ("low", "start", "end", "high"))
    if not low < start <= end < high:
        raise ConfigError(f"a trapezoid needs low < start <= end < high; got {low}, {start}, {end}, {high}")
    height = finite(d.get("height", 1.0), "'height'")
    corners = {low: 0.0, start: height, end: height, high: 0.0}
    return _line(b, d.get("of", "policy.tokens"), list(corners.items()))


def _overlong(b: Builder, d: Table, slope: float | None) -> Node:
    """DAPO's soft penalty (2503.14476): 0 up to max - cache sampled tokens, falling to -1 at max, -1 beyond."""
    longest, cache = finite(d["max"], "'max'"), finite(d["cache"], "'cache'")
    if not 0 < cache <= longest:
        raise ConfigError(f"'cache' of an overlong penalty lies between 0 and max = {longest}; got {cache}")
    return _line(b, d.get("of", "policy.tokens"), [(longest - cache, 0.0), (longest, -1.0)])


OPS = {
    "power": Op(_power, ("of", "exponent"), ("scale",)),
    "clip": Op(_clip, ("of",), ("low", "high")),
    "sigmoid": Op(_sigmoid, ("of",)),
    "calibrated": Op(_calibrated, ("of", "baseline")),
    "steps": Op(_steps, ("of", "levels"), ("otherwise",)),
    "curve": Op(_curve, ("of", "points")),
    "length_shape": Op(_length_shape, ("low", "start", "end", "high"), ("of", "height")),
    "overlong": Op(_overlong, ("max", "cache"), ("of",)),
}
