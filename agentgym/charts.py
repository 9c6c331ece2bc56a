"""Curves as inline SVG: they take the page's colours, and need neither a script nor a font."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 310, 150
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 26, 20

STYLE = """
.agentgym .charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));gap:12px}
.agentgym .charts svg{width:100%;height:auto;background:var(--card);border:1px solid var(--line);border-radius:10px}
.agentgym svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
.agentgym svg text.t{font-size:12.5px;font-weight:600;fill:var(--ink)}
.agentgym svg text.v{font-size:12.5px;fill:var(--blue);font-weight:600}
.agentgym svg .axis{stroke:var(--line);stroke-width:1}
.agentgym svg .raw{fill:none;stroke:var(--blue);stroke-width:1.2;opacity:.3}
.agentgym svg .line{fill:none;stroke:var(--blue);stroke-width:2;stroke-linejoin:round}
.agentgym svg .dot{fill:var(--blue)}
"""

Points = Sequence[tuple[float, float]]


def chart(title: str, points: Points) -> str:
    """One curve: what was measured, faint, and its running mean; the last value beside the title."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not finite:
        return ""
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    low, high = _span(ys)
    smooth = list(zip(xs, running_mean(ys), strict=True))
    place = _Scale(xs, low, high)
    marks = "".join(_grid(y, place) for y in ticks(low, high))
    raw = _path(finite, place, "raw") if len(finite) > 12 else ""
    end = place(*smooth[-1])
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'<text class="t" x="12" y="17">{escape(title)}</text>'
        f'<text class="v" x="{WIDTH - RIGHT}" y="17" text-anchor="end">{ys[-1]:.4g}</text>{marks}'
        f'<text x="{LEFT}" y="{HEIGHT - 6}">{min(xs):.6g}</text>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{max(xs):.6g}</text>'
        f'{raw}{_path(smooth, place, "line")}<circle class="dot" cx="{end[0]:.1f}" cy="{end[1]:.1f}" r="3"/></svg>'
    )


def running_mean(values: Sequence[float]) -> list[float]:
    """Over a window of a twentieth of the curve, at least one value; the window looks back only."""
    window = max(1, len(values) // 20)
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - window) : i + 1])]


def _span(ys: Sequence[float]) -> tuple[float, float]:
    """The range of the vertical axis; a flat curve gets room around it."""
    low, high = min(ys), max(ys)
    return (low, high) if high - low > 1e-12 * max(abs(low), abs(high), 1e-300) else (low - 0.5, high + 0.5)


class _Scale:
    """From a point of the data to a point of the drawing."""

    def __init__(self, xs: Sequence[float], low: float, high: float) -> None:
        self.x0, self.across = min(xs), (max(xs) - min(xs)) or 1.0
        self.y0, self.up = low, high - low

    def __call__(self, x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * (x - self.x0) / self.across,
            TOP + (HEIGHT - TOP - BOTTOM) * (1 - (y - self.y0) / self.up),
        )


def ticks(low: float, high: float) -> list[float]:
    """Two to five round numbers within the range, a step of 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next((unit for unit in (5, 2, 1) if unit * power <= rough), 1)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _grid(y: float, place: _Scale) -> str:
    height = place(place.x0, y)[1]
    return (
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
        f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{y:.6g}</text>'
    )


def _path(points: Points, place: _Scale, kind: str) -> str:
    where = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
    return f'<polyline class="{kind}" points="{where}"/>'
