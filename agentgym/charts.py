"""Curves as inline SVG: they take the page's colours, and need neither a script nor a font."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
.agentgym svg .line{fill:none;stroke:var(--c,var(--blue));stroke-width:2;stroke-linejoin:round}
.agentgym svg .dot{fill:var(--c,var(--blue))}
.agentgym svg text.l{font-size:12px;fill:var(--ink)}
"""
COLOURS = ("blue", "green", "amber", "red", "soft")
"""Of lines in one chart, in turn."""
LEGEND = 16
"""Height of a line's entry below its chart."""

Points = Sequence[tuple[float, float]]


def chart(title: str, points: Points) -> str:
    """One curve: what was measured, faint, and its running mean; the last value beside the title."""
    found = finite(points)
    if not found:
        return ""
    place = _Scale(found)
    raw = _path(found, place, "raw") if len(found) > 12 else ""
    last = f'<text class="v" x="{WIDTH - RIGHT}" y="17" text-anchor="end">{found[-1][1]:.4g}</text>'
    return _drawing(title, last + place.grid() + raw + _line(found, place))


def chart_of(title: str, named: Mapping[str, Points]) -> str:
    """Several curves by name on common axes: their running means, and below them the names with the last values."""
    held = {name: found for name, points in named.items() if (found := finite(points))}
    if not held:
        return ""
    place = _Scale([point for found in held.values() for point in found])
    drawn = "".join(
        f'<g style="--c:var(--{COLOURS[n % len(COLOURS)]})">{_line(found, place)}{_entry(n, name, found[-1][1])}</g>'
        for n, (name, found) in enumerate(held.items())
    )
    return _drawing(title, place.grid() + drawn, HEIGHT + LEGEND * len(held))


def finite(points: Points) -> Points:
    """Those of the points that can be drawn."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _drawing(title: str, body: str, height: int = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f'<text class="t" x="12" y="17">{escape(title)}</text>{body}</svg>'
    )


def _line(points: Points, place: _Scale) -> str:
    """The running mean, with a dot at its end."""
    smooth = [(x, mean) for (x, _), mean in zip(points, running_mean([y for _, y in points]), strict=True)]
    end = place(*smooth[-1])
    return f'{_path(smooth, place, "line")}<circle class="dot" cx="{end[0]:.1f}" cy="{end[1]:.1f}" r="3"/>'


def _entry(number: int, name: str, last: float) -> str:
    """A line's entry in the legend."""
    y = HEIGHT + LEGEND * number
    return (
        f'<circle class="dot" cx="16" cy="{y + 4}" r="4"/><text class="l" x="26" y="{y + 8}">{escape(name)}</text>'
        f'<text class="l" x="{WIDTH - RIGHT}" y="{y + 8}" text-anchor="end">{last:.4g}</text>'
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

    def __init__(self, points: Points) -> None:
        xs = [x for x, _ in points]
        self.low, self.high = _span([y for _, y in points])
        self.x0, self.x1 = min(xs), max(xs)

    def __call__(self, x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * (x - self.x0) / ((self.x1 - self.x0) or 1.0),
            TOP + (HEIGHT - TOP - BOTTOM) * (1 - (y - self.low) / (self.high - self.low)),
        )

    def grid(self) -> str:
        """Horizontal lines at round numbers, and both ends of the horizontal axis."""
        ends = (
            f'<text x="{LEFT}" y="{HEIGHT - 6}">{self.x0:.6g}</text>'
            f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{self.x1:.6g}</text>'
        )
        return "".join(_grid(y, self) for y in ticks(self.low, self.high)) + ends


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
