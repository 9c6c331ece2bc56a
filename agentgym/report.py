"""A run's page: what came out, the curves, the ladder beside it, examples with the credit of each turn, failures.

It is made from the run folder alone and opens without a network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from agentgym import charts, registry
from agentgym.errors import AgentGymError
from agentgym.figures import percent, ranked
from agentgym.html import chip, page, safe, table, trajectory_body
from agentgym.mixture import part_of
from agentgym.shards import Entry
from agentgym.store import Run, load_run, write_atomic
from agentgym.timeline import timeline
from agentgym.types import Trajectory

EXAMPLES = 4
"""Episodes shown whole."""
LADDER = "ladder/"
"""Begins the names of reference policies among the evaluations."""
DOMAIN = "domain/"
"""Begins the names of figures by domain."""
SHOWN = 9
"""Curves of a phase that are shown at once."""
CLOCKS = ("step", "phase", "time", "seconds", "elapsed", "kind")
"""Figures of a metrics line that say when, not what."""


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write `report.html` into the run's folder (or to `out`); returns where it is."""
    path = Path(out) if out else Path(folder) / "report.html"
    write_atomic(path, run_html(load_run(folder)).encode())
    return path


def run_html(run: Run) -> str:
    """The page of a run, finished or not."""
    parts = [
        _head(run),
        _section("On held-out tasks", _results(run)),
        _section("Curves", _curves(run.metrics)),
        _section("Timeline", timeline(run)),
        _section("Episodes", _examples(run)),
        _section("Failures", _failures(run)),
        _section("Config", _config(run.config)),
    ]
    style = f"<style>{charts.STYLE}</style>"
    return page(f"run {run.path.name}", style + "".join(parts))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{safe(title)}</h2>{body}</section>" if body else ""


def _head(run: Run) -> str:
    env = run.config.get("env", {})
    name = env.get("id", "") if isinstance(env, Mapping) else str(env)
    facts = [name, f"{len(run)} episodes", f"{len(run.metrics)} metric lines", f"{len(run.checkpoints)} checkpoints"]
    chips = "".join(chip(fact) for fact in facts if fact)
    return f'<h1>{safe(run.path.resolve().name)}</h1><div class="head">{chips}</div>{_hero(run)}'


def _hero(run: Run) -> str:
    """Success before and after, once both are known."""
    own = [figures for name, figures in evaluations(run) if not name.startswith(LADDER)]
    known = [figures for figures in own if figures.get("success") is not None]
    if len(known) < 2:
        return ""
    before, after = known[0]["success"], known[-1]["success"]
    said = f"success on held-out tasks, {100 * (after - before):+.1f} points"
    return f'<p class="hero">{percent(before)} → {percent(after)}<small>{said}</small></p>'


# --- results ----------------------------------------------------------------------------------------------------


def evaluations(run: Run) -> list[tuple[str, Mapping[str, Any]]]:
    """(name, figures) of every evaluation that the run holds, in the order made.

    They are the lines of metrics.jsonl with an `evaluation`: the fields of `agentgym.evaluation.Evaluation`, whose
    `policy` is the name; `success_valid`, where there is one, is the success among valid episodes.
    """
    lines = (line["evaluation"] for line in run.metrics if isinstance(line.get("evaluation"), Mapping))
    return [(str(found.get("policy", "")), found) for found in lines]


def _results(run: Run) -> str:
    found = evaluations(run)
    if not found:
        return ""
    own = {i for i, (name, _) in enumerate(found) if not name.startswith(LADDER)}
    columns = ("policy", "success", "95 %", "if valid", "return", "± se", "turns", "episodes", "failed")
    return table(columns, [_result(name, figures) for name, figures in found], strong=own) + _by_label(found)


def _result(name: str, found: Mapping[str, Any]) -> tuple[Any, ...]:
    episodes = found.get("episodes") or 0
    return (
        name.removeprefix(LADDER),
        percent(found.get("success")),
        " – ".join(percent(end) for end in found.get("success_interval") or ()),
        percent(found.get("success_valid")),
        found.get("return_mean"),
        found.get("return_se"),
        found.get("turns", 0) / episodes if episodes else None,
        episodes,
        sum((found.get("failures") or {}).values()),
    )


def _by_label(found: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Success by label (intent, domain): a table per label, a column per policy."""
    labels = sorted({label for _, figures in found for label in figures.get("by_label", {})})
    return "".join(_label_table(label, found) for label in labels)


def _label_table(label: str, found: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    parts = [(name.removeprefix(LADDER), figures.get("by_label", {}).get(label, {})) for name, figures in found]
    values = sorted({value for _, by_value in parts for value in by_value})
    rows = [(value, *(percent(by_value.get(value, {}).get("success")) for _, by_value in parts)) for value in values]
    return f"<details><summary>success by {safe(label)}</summary>{table((label, *dict(parts)), rows)}</details>"


# --- curves -----------------------------------------------------------------------------------------------------


Curves = dict[str, dict[str, list[tuple[float, float]]]]


def curves(metrics: Sequence[Mapping[str, Any]]) -> Curves:
    """phase -> name -> points over `step` (or the line's number): figures that two lines of a phase hold."""
    found: Curves = {}
    for number, line in enumerate(metrics):
        series = found.setdefault(str(line.get("phase", "")), {})
        for name, value in line.items():
            if name not in CLOCKS and isinstance(value, int | float) and not isinstance(value, bool):
                series.setdefault(name, []).append((float(line.get("step", number)), float(value)))
    long = {phase: {name: points for name, points in held.items() if len(points) > 1} for phase, held in found.items()}
    return {phase: held for phase, held in long.items() if held}


def _curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The last phase first and open; flat curves and what matters less behind a click."""
    return "".join(_phase(phase, held, n == 0) for n, (phase, held) in enumerate(reversed(curves(metrics).items())))


def _phase(phase: str, held: Mapping[str, charts.Points], is_open: bool) -> str:
    names = [name for name in ranked(held) if not name.startswith(DOMAIN)]
    moving = [name for name in names if len({y for _, y in held[name]}) > 1]
    rest = [name for name in names if name not in moving[:SHOWN]]
    more = f"<details><summary>{len(rest)} more</summary>{_grid(rest, held)}</details>" if rest else ""
    flag = " open" if is_open else ""
    title = f"<summary>{safe(phase)}</summary>" if phase else "<summary>all steps</summary>"
    return f"<details{flag}>{title}{_grid(moving[:SHOWN], held)}{_domains(held)}{more}</details>"


def _domains(held: Mapping[str, charts.Points]) -> str:
    """A chart for each figure that is told by domain ("domain/NAME/figure"), with a line for each domain."""
    found: dict[str, dict[str, charts.Points]] = {}
    for name, points in held.items():
        if name.startswith(DOMAIN):
            domain, _, figure = name.removeprefix(DOMAIN).rpartition("/")
            found.setdefault(figure, {})[domain] = points
    drawn = "".join(charts.chart_of(f"{figure} by domain", found[figure]) for figure in ranked(found))
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _grid(names: Sequence[str], held: Mapping[str, charts.Points]) -> str:
    return f'<div class="charts">{"".join(charts.chart(name, held[name]) for name in names)}</div>'


# --- episodes ---------------------------------------------------------------------------------------------------


def _examples(run: Run) -> str:
    return "".join(_example(run, t, why, is_open=n == 0) for n, (t, why) in enumerate(_chosen(run)))


def _example(run: Run, trajectory: Trajectory, why: str, is_open: bool) -> str:
    title = f"{why}: {trajectory.episode.id}"
    body = trajectory_body(trajectory, declared_reward(run.config, trajectory))
    return f"<details{' open' if is_open else ''}><summary>{safe(title)}</summary>{body}</details>"


def _chosen(run: Run) -> Iterator[tuple[Trajectory, str]]:
    """The best, the median and the worst of the last step, and the best of the first."""
    valued = [e for e in run.index if e.value is not None]
    if not valued:
        return
    first, last = (sorted((e for e in valued if e.step == end.step), key=_value) for end in (valued[0], valued[-1]))
    picks = [(last[-1], "best of the last step"), (last[len(last) // 2], "median of the last step")]
    picks += [(last[0], "worst of the last step"), (first[-1], "best of the first step")]
    seen: set[tuple[int, int]] = set()
    for entry, why in picks[:EXAMPLES]:
        if (entry.shard, entry.offset) not in seen:
            seen.add((entry.shard, entry.offset))
            yield find(run, entry), why


def _value(entry: Entry) -> float:
    return entry.value if entry.value is not None else 0.0


def find(run: Run, entry: Entry) -> Trajectory:
    """The trajectory of an index entry."""
    same = (e for e in run.index if e.episode == entry.episode and e.step == entry.step)
    position = list(same).index(entry)
    held = (t for t in run.trajectories(step=entry.step, group=entry.group) if t.episode.id == entry.episode)
    return next(t for n, t in enumerate(held) if n == position)


def declared_reward(config: Mapping[str, Any], trajectory: Trajectory) -> Mapping[str, Any] | None:
    """The composer that the run used for this episode: that of its component of a mixture, else the run's own, else the
    environment's; None where none can be had."""
    part = part_of(config, trajectory)
    for held in (part, config):
        if isinstance(held.get("reward"), Mapping) and "op" in held["reward"]:
            own: Mapping[str, Any] = held["reward"]
            return own
    env = part.get("env", {})
    try:
        declared = getattr(registry.load(env["id"] if isinstance(env, Mapping) else env), "reward", None)
    except (AgentGymError, KeyError):
        return None
    return declared if isinstance(declared, Mapping) else None


# --- failures and config ----------------------------------------------------------------------------------------


def _failures(run: Run) -> str:
    """Failed episodes by kind: in no mean, in no baseline."""
    held = [t.failure for t in run.trajectories(status="failed") if t.failure]
    if not held:
        return '<p class="soft">None.</p>'
    kinds = Counter(failure.kind for failure in held)
    latest = {failure.kind: failure.message for failure in held}
    return table(("kind", "episodes", "latest"), [(kind, n, latest[kind][:160]) for kind, n in kinds.most_common()])


def _config(config: Mapping[str, Any]) -> str:
    return f"<details><summary>config.toml</summary><pre>{safe(tomli_w.dumps(dict(config)))}</pre></details>"
