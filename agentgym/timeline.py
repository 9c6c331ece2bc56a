"""Who did what when: a run's timeline as inline SVG, and the shares of its wall time.

A line of metrics.jsonl that ends an update may hold an entry `timeline`, in seconds since the epoch:

    {"learner": [[what, start, stop], ...], "units": [[number, oldest version, began, ended], ...]}

with `what` one of `LAPS`. Lines without it are none of a timeline's; a run without any has none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from agentgym.figures import percent
from agentgym.html import table
from agentgym.store import Run
from agentgym.types import Trajectory, iterate

LAPS = ("waiting", "learning", "publishing", "saving", "evaluating")
"""What the learner's side does."""
ZOOM = 30
"""Updates of the detailed chart."""
MOST_UPDATES, MOST_UNITS, LANES = 150, 500, 40
"""What a chart draws at most; of more, several updates together, every so many-th unit, and the first lanes."""
MOST_EPISODES = 2000
"""Episodes whose seconds are added up for the shares; of more, every so many-th is."""
WIDTH, LEFT, STEP = 960, 64, 4
PAUSE = 60.0
"""Seconds between two updates from which on the run was not there: it was stopped, and resumed later."""

STYLE = """
.agentgym .strip{width:100%;height:auto;background:var(--card);border:1px solid var(--line);border-radius:10px;
margin:6px 0}
.agentgym .strip .waiting{fill:var(--line)}.agentgym .strip .learning{fill:var(--blue)}
.agentgym .strip .publishing{fill:var(--amber)}.agentgym .strip .saving{fill:var(--soft)}
.agentgym .strip .evaluating{fill:var(--green)}
.agentgym .strip .s0{fill:var(--blue)}.agentgym .strip .s1{fill:var(--green)}
.agentgym .strip .s2{fill:var(--amber)}.agentgym .strip .s3{fill:var(--red)}
.agentgym .key{display:flex;flex-wrap:wrap;gap:4px 14px;color:var(--soft);font-size:12.5px}
.agentgym .key svg.strip{width:10px;height:10px;margin:0 5px 0 0;border:0;border-radius:2px}
"""


class Lap(NamedTuple):
    """What the learner's side did from `start` to `stop`."""

    what: str
    start: float
    stop: float


class Bar(NamedTuple):
    """A unit of play, from its beginning to its end, and by how many updates it was late when it was learnt from."""

    start: float
    stop: float
    staleness: int


Moment = TypeVar("Moment", Lap, Bar)


class Update(NamedTuple):
    """The timeline of one update."""

    step: int
    laps: list[Lap]
    bars: list[Bar]


def timeline(run: Run) -> str:
    """Charts and table, or nothing for a run that recorded none."""
    updates = read(run.metrics)
    if not updates:
        return ""
    near = _strip(f"the last {len(updates[-ZOOM:])} updates", updates[-ZOOM:])
    whole = _strip(f"updates {updates[0].step} to {updates[-1].step}", updates) if len(updates) > ZOOM else ""
    return f"<style>{STYLE}</style>{_key()}{near}{whole}{_table(updates, run)}"


def _table(updates: Sequence[Update], run: Run) -> str:
    learner, play = shares(updates, run)
    begin, end = _span(updates)
    parts = [("learner", learner, end - begin), ("episodes", play, sum(play.values()))]
    rows = [
        (f"{side}: {what}", f"{seconds:.1f}", percent(seconds / whole if whole else None))
        for side, held, whole in parts
        for what, seconds in held.items()
    ]
    at_once = sum(play.values()) / (end - begin)
    note = (
        f"of {end - begin:.1f} s of the learner, and of the seconds of all episodes; {at_once:.1f} at once on average"
    )
    return f'{table(("", "seconds", "share"), rows)}<p class="soft">Shares are {note}.</p>'


def read(metrics: Iterable[Mapping[str, Any]]) -> list[Update]:
    """The updates that recorded a timeline, in their order."""
    return list(_closed(_update(line) for line in metrics if line.get("timeline", {}).get("learner")))


def _closed(updates: Iterable[Update]) -> Iterator[Update]:
    """With the pauses between two lives of a run taken out."""
    shift, end = 0.0, None
    for update in updates:
        gap = update.laps[0].start - end if end is not None else 0.0
        end = update.laps[-1].stop
        shift += gap if gap > PAUSE else 0.0
        yield Update(update.step, [_earlier(x, shift) for x in update.laps], [_earlier(x, shift) for x in update.bars])


def _earlier(moment: Moment, seconds: float) -> Moment:
    return moment._replace(start=moment.start - seconds, stop=moment.stop - seconds)


def _update(line: Mapping[str, Any]) -> Update:
    held, step = line["timeline"], int(line.get("step", 0))
    laps = [Lap(str(what), start, stop) for what, start, stop in held.get("learner", ())]
    bars = [Bar(began, ended, max(0, step - 1 - oldest)) for _, oldest, began, ended in held.get("units", ())]
    return Update(step, laps, bars)


# --- shares -----------------------------------------------------------------------------------------------------


def shares(updates: Sequence[Update], run: Run) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the learner by what it did, and of all episodes, which run beside each other, by what they did.

    Generation and environment are what turns say; seconds of an episode that neither names (composing, waiting to
    begin a turn) are the rest. Of long runs a sample of the updates is read and scaled up.
    """
    learner = seconds_of(lap for update in updates for lap in update.laps)
    return learner, _played(run, [update.step for update in updates])


def seconds_of(laps: Iterable[Lap]) -> dict[str, float]:
    """Seconds by what was done."""
    spent: dict[str, float] = defaultdict(float)
    for lap in laps:
        spent[lap.what] += lap.stop - lap.start
    return spent


def _played(run: Run, steps: Sequence[int]) -> dict[str, float]:
    chosen = steps[:: -(-len(run) // MOST_EPISODES) or 1]
    scale = len(steps) / len(chosen)
    generation = environment = whole = 0.0
    for trajectory in run.trajectories(step=set(chosen)):
        policy, world = _timed(trajectory)
        generation, environment = generation + scale * policy, environment + scale * world
        whole += scale * max(trajectory.seconds, policy + world)
    return {
        "generation": generation,
        "environment": environment,
        "reward and rest": whole - generation - environment,
    }


def _timed(trajectory: Trajectory) -> tuple[float, float]:
    timings = [turn.timing for turn in iterate(trajectory.turns) if turn.timing is not None]
    return sum(t.policy for t in timings), sum(t.environment for t in timings)


# --- the strip --------------------------------------------------------------------------------------------------


def _strip(title: str, updates: Sequence[Update]) -> str:
    """The learner's lane, and below it the units, each in the first lane that is free."""
    begin, end = _span(updates)
    laps = "".join(
        _rect(lap.what, lap.start - begin, lap.stop - begin, end - begin, 26, 14) for lap in _merged(updates)
    )
    lanes = list(_lanes(_thinned([bar for update in updates for bar in update.bars], MOST_UNITS)))
    units = "".join(
        _rect(f"s{min(bar.staleness, 3)}", bar.start - begin, bar.stop - begin, end - begin, 48 + lane * STEP, STEP - 1)
        for lane, bar in lanes
    )
    height = 54 + STEP * max((lane + 1 for lane, _ in lanes), default=0)
    return (
        f'<svg class="strip" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="timeline of {title}">'
        f'<text class="t" x="12" y="17">{title}</text>'
        f'<text x="{WIDTH - 12}" y="17" text-anchor="end">{end - begin:.1f} s</text>'
        f'<text x="12" y="37">learner</text><text x="12" y="56">units</text>{laps}{units}</svg>'
    )


def _span(updates: Sequence[Update]) -> tuple[float, float]:
    """From the first lap to the last; units may have begun before."""
    return updates[0].laps[0].start, max(update.laps[-1].stop for update in updates)


def _merged(updates: Sequence[Update]) -> Iterator[Lap]:
    """The laps, or where there are too many to see, those of several updates in one, as long."""
    size = -(-len(updates) // MOST_UPDATES)
    for at in range(0, len(updates), size):
        spent = seconds_of(lap for update in updates[at : at + size] for lap in update.laps)
        now = updates[at].laps[0].start
        for what, seconds in spent.items():
            yield Lap(what, now, now := now + seconds)


def _lanes(bars: Iterable[Bar]) -> Iterator[tuple[int, Bar]]:
    """Each bar with the number of its lane; those that find none are left out."""
    free = [0.0] * LANES
    for bar in sorted(bars):
        lane = next((n for n, until in enumerate(free) if until <= bar.start), None)
        if lane is not None:
            free[lane] = bar.stop
            yield lane, bar


def _thinned(bars: Sequence[Bar], most: int) -> Sequence[Bar]:
    return bars[:: -(-len(bars) // most) or 1]


def _rect(kind: str, start: float, stop: float, whole: float, y: int, height: int) -> str:
    """A bar; what lies before the beginning of the drawing is cut off."""
    per_second = (WIDTH - LEFT - 12) / max(whole, 1e-9)
    x, width = LEFT + max(0.0, start) * per_second, (stop - max(0.0, start)) * per_second
    shown = f'<rect class="{kind}" x="{x:.1f}" y="{y}" width="{max(width, 0.3):.1f}" height="{height}"/>'
    return shown if stop > 0 else ""


def _key() -> str:
    """What the colours mean."""
    named = {what: what for what in LAPS} | {
        f"s{n}": f"unit, {n}{'+' if n == 3 else ''} updates late" for n in range(4)
    }
    swatch = '<svg class="strip" viewBox="0 0 10 10"><rect class="{}" width="10" height="10"/></svg>'
    return f'<div class="key">{"".join(f"<span>{swatch.format(k)}{text}</span>" for k, text in named.items())}</div>'
