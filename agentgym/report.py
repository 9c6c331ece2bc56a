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
from agentgym.shards import Entry
from agentgym.store import Run, load_run, write_atomic
from agentgym.types import Trajectory

EXAMPLES = 4
"""Episodes shown whole."""
LADDER = "ladder/"
"""Begins the names of reference policies among the evaluations."""
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


def _phase(phase: str, held: Mapping[str, Sequence[tuple[float, float]]], is_open: bool) -> str:
    moving = [name for name in ranked(held) if len({y for _, y in held[name]}) > 1]
    rest = [name for name in ranked(held) if name not in moving[:SHOWN]]
    more = f"<details><summary>{len(rest)} more</summary>{_grid(rest, held)}</details>" if rest else ""
    flag = " open" if is_open else ""
    title = f"<summary>{safe(phase)}</summary>" if phase else "<summary>all steps</summary>"
    return f"<details{flag}>{title}{_grid(moving[:SHOWN], held)}{more}</details>"


def _grid(names: Sequence[str], held: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    return f'<div class="charts">{"".join(charts.chart(name, held[name]) for name in names)}</div>'


# --- episodes ---------------------------------------------------------------------------------------------------


def _examples(run: Run) -> str:
    reward = declared_reward(run.config)
    return "".join(_example(t, why, reward, is_open=n == 0) for n, (t, why) in enumerate(_chosen(run)))


def _example(trajectory: Trajectory, why: str, reward: Mapping[str, Any] | None, is_open: bool) -> str:
    title = f"{why}: {trajectory.episode.id}"
    flag = " open" if is_open else ""
    return f"<details{flag}><summary>{safe(title)}</summary>{trajectory_body(trajectory, reward)}</details>"


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


def declared_reward(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The composer that the run used: its own `reward`, else the environment's; None where neither can be had."""
    if isinstance(config.get("reward"), Mapping) and "op" in config["reward"]:
        own: Mapping[str, Any] = config["reward"]
        return own
    env = config.get("env", {})
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
