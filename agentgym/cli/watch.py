"""What a terminal shows of training while it runs: a few lines below the bar, from the figures of the last steps.

watch = Watch()
watch.see({"return": 0.4, "staleness": 0.8, "engine_running": 24.0, ...})
console.print(watch)                            # a line for each row whose figures there are
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from rich.table import Table

from agentgym.figures import figure

WIDTH = 32
"""Steps of a sparkline, or spans of steps where there were more."""
CURVES = ("return", "success")
BLOCKS = "▁▂▃▄▅▆▇█"

ROWS: Mapping[str, Mapping[str, str]] = {
    "staleness": {"staleness": "mean {}", "staleness_max": "max {}"},
    "units": {"units_running": "{} running", "units_ready": "{} ready"},
    "engine": {"engine_running": "{} running", "engine_waiting": "{} waiting", "engine_cache": "cache {}"},
    "tokens/s": {"sampled_per_second": "{} sampled", "learn_tokens_per_second": "{} learnt", "mfu": "MFU {}"},
    "seconds": {f"seconds_{what}": f"{{}} {what}" for what in ("waiting", "learning", "publishing", "saving")},
    "episodes": {"consumed": "{} consumed", "failed": "{} failed"},
}
"""Row -> figure -> how it is said."""
SHARES = ("mfu", "engine_cache")
"""Figures that are said in percent."""
DROPPED = "dropped."
"""Begins the figures that count what was dropped, by reason."""


class Watch:
    """The figures of the last step, and the curves so far."""

    def __init__(self) -> None:
        self.last: Mapping[str, float] = {}
        self.curves: dict[str, list[float]] = {name: [] for name in CURVES}

    def see(self, figures: Mapping[str, float]) -> None:
        """A step is done."""
        self.last = figures
        for name, curve in self.curves.items():
            if math.isfinite(value := figures.get(name, math.nan)):
                curve.append(value)

    def __rich__(self) -> Table:
        drawn = Table.grid(padding=(0, 2))
        drawn.add_column(style="dim")
        for name, said in self.rows():
            drawn.add_row(name, said)
        return drawn

    def rows(self) -> Iterator[tuple[str, str]]:
        """(name, what is said), of what is known."""
        for name, curve in self.curves.items():
            if len(curve) > 1:
                yield name, f"{sparkline(curve)} {figure(curve[-1])}"
        for name, row in ROWS.items():
            said = [text.format(_said(key, self.last[key])) for key, text in row.items() if key in self.last]
            if name == "episodes":
                said += self._dropped()
            if said:
                yield name, ", ".join(said)

    def _dropped(self) -> list[str]:
        """Counts by reason; what never happened is not said."""
        found = {name.removeprefix(DROPPED): n for name, n in self.last.items() if name.startswith(DROPPED) and n}
        return [f"{n:,.0f} dropped ({reason})" for reason, n in found.items()]


def _said(name: str, value: float) -> str:
    if name in SHARES:
        return f"{100 * value:.3g} %"
    return f"{value:,.0f}" if value >= 1000 or value.is_integer() else f"{value:.3g}"


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """A curve in one line of text: of more than `width` values, the means of as many equal spans."""
    cuts = [len(values) * i // width for i in range(width + 1)] if len(values) > width else range(len(values) + 1)
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)
