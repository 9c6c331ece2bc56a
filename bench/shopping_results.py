"""The figures of docs/results/shopping.md: five seeds, five ways to learn from one warm start each.

    python bench/shopping_results.py                    # about 50 minutes on 2 quiet cores, two cells at once
    python bench/shopping_results.py --seeds 2 --out runs/quick

Every cell is a run folder of its own under --out; what is finished is not done again, what was interrupted goes on.
The methods share warm start, tasks and sampling noise, and differ in what they learn from. The imitating ones learn
from an eighth of the episodes, so an update of theirs is cheaper: they get `MORE` times the updates, about the same
seconds.
"""

from __future__ import annotations

import argparse
import math
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import msgspec

import agentgym
from agentgym.presets import merge, parse_settings, read_preset
from agentgym.store import load_run

PRESET = "shopping/laptop"
ROOT = Path(__file__).resolve().parents[1]
PHI: dict[str, Any] = {"op": "potential", "name": "phi", "gamma": 1.0}
OUTCOME: dict[str, Any] = {"op": "term", "name": "hard", "default": 0.0}
METHODS = {
    "imitation": "continued imitation (best of 8)",
    "expert": "expert iteration (best of 8, on policy)",
    "outcome": "GRPO, outcome only",
    "turn": "+ turn-level credit",
    "hrm": "+ hierarchical reward (the preset)",
}
EPISODES = 400
FIRST_TASKS = 1000
"""Seed s is judged on the test tasks of seed FIRST_TASKS + s; the preset was tuned on those of seed 0."""
FRESH = "fresh.json"
MORE = 2.4
"""Updates of an imitating method for each of the others': measured, so that a cell costs the same processor time."""
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t, two-sided 95 %, by number of seeds."""


def declare(table: dict[str, Any], method: str) -> None:
    """Write the sections in which a method differs from the preset; its advantages are the preset's, whole or in part.

    They replace what the preset says: two declarations of a reward do not merge.
    """
    algorithms = {"imitation": "best_of_n", "expert": "expert_iteration"}
    table["run"]["algorithm"] = algorithms.get(method, "policy_gradient")
    if method in algorithms:
        table["reward"] = {}
        table["run"]["steps"] = round(MORE * table["run"]["steps"])
    elif method == "outcome":
        table["reward"], table["advantage"] = OUTCOME, table["advantage"][:1]
    elif method == "turn":
        table["reward"] = {"op": "weighted_sum", "plus": [OUTCOME, PHI]}


def table_of(out: Path, method: str, seed: int, quick: list[str]) -> dict[str, Any]:
    """The config of a cell: the warm start trains no further, the others start from its weights."""
    table = read_preset(PRESET)
    table["run"] |= {"seed": seed, "threads": 1}
    table["eval"] = {**table["eval"], "ladder": False}
    if method == "warm":
        table["run"]["steps"] = 0
        table["eval"]["ladder"] = seed == 0
    else:
        declare(table, method)
        table["warmup"]["steps"] = table["sft"]["steps"] = 0
        table["model"]["path"] = str(weights(out / f"warm-{seed}"))
    return merge(table, parse_settings(quick))


def weights(run: Path) -> Path:
    """The model of a run's last checkpoint."""
    return Path(load_run(run).checkpoints[-1].path).resolve() / "model"


def train(out: Path, method: str, seed: int, quick: list[str]) -> None:
    """One cell, in this process; goes on where it stopped."""
    from agentgym_trainers.config import from_table
    from agentgym_trainers.loop import PolicyGradient

    folder = out / f"{method}-{seed}"
    if (folder / "config.toml").is_file():
        PolicyGradient.train(None, folder, resume=True)
    else:
        PolicyGradient.train(from_table(table_of(out, method, seed, quick)), folder)


def start(out: Path, method: str, seed: int, quick: list[str]) -> None:
    """One cell, in a process of its own."""
    print(f"{method}-{seed} ...", flush=True)
    command = [sys.executable, __file__, "--out", str(out), "--cell", method, str(seed)]
    subprocess.run([*command, *(word for setting in quick for word in ("--set", setting))], check=True)


def judge(out: Path, method: str, seed: int) -> None:
    """Judge what a cell learned on tasks that nothing was tuned on, other ones for each seed: fresh.json."""
    folder = out / f"{method}-{seed}"
    if (folder / FRESH).is_file():
        return
    command = [sys.executable, "-m", "agentgym.cli", "eval", "shopping-v0", "--policy", str(folder), "--json"]
    command += ["--split", "test", "--episodes", str(EPISODES), "--seed", str(FIRST_TASKS + seed)]
    done = subprocess.run(command, check=True, capture_output=True)
    (folder / FRESH).write_bytes(done.stdout)


def run_all(out: Path, seeds: int, jobs: int, quick: list[str]) -> None:
    cells = [(m, s) for s in range(seeds) for m in METHODS]
    first = [("warm", s) for s in range(seeds)]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda cell: start(out, *cell, quick), first))
        list(pool.map(lambda cell: start(out, *cell, quick), cells))
        list(pool.map(lambda cell: judge(out, *cell), first + cells))


# --- the page ---------------------------------------------------------------------------------------------------


def summary(out: Path, method: str, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode((out / f"{method}-{seed}" / "summary.json").read_bytes())
    return found


def fresh(out: Path, method: str, seed: int) -> dict[str, Any]:
    """A cell's figures on its fresh tasks; success implies validity, so success among valid episodes is their ratio."""
    found: dict[str, Any] = msgspec.json.decode((out / f"{method}-{seed}" / FRESH).read_bytes())
    return found | {"success_valid": found["success"] / found["metrics"]["valid"]}


def interval(values: list[float]) -> str:
    """Mean and 95 % interval over seeds, in points."""
    if len(values) < 2:
        return f"{100 * values[0]:+.1f}"
    half = T[len(values)] * stdev(values) / math.sqrt(len(values))
    return f"{100 * mean(values):+.1f} [{100 * (mean(values) - half):+.1f}, {100 * (mean(values) + half):+.1f}]"


def gains(out: Path, method: str, seeds: int, name: str) -> list[float]:
    """After minus the warm start on the same tasks, seed by seed."""
    return [fresh(out, method, seed)[name] - fresh(out, "warm", seed)[name] for seed in range(seeds)]


def over(out: Path, method: str, other: str, seeds: int) -> str:
    """The gain over another method's, seed by seed."""
    both = zip(gains(out, method, seeds, "success"), gains(out, other, seeds, "success"), strict=True)
    return "" if method == other else interval([a - b for a, b in both])


def rows(out: Path, seeds: int) -> list[str]:
    lines = [
        "| method | success after | gain, points [95 %] | gain among valid episodes | over continued imitation "
        "| over expert iteration | valid | seconds of learning |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for method, title in METHODS.items():
        after = [fresh(out, method, seed) for seed in range(seeds)]
        seconds = [summary(out, method, seed)["seconds"]["rl"] for seed in range(seeds)]
        cells = [
            title,
            f"{100 * mean(a['success'] for a in after):.1f} %",
            interval(gains(out, method, seeds, "success")),
            interval(gains(out, method, seeds, "success_valid")),
            over(out, method, "imitation", seeds),
            over(out, method, "expert", seeds),
            f"{100 * mean(a['metrics']['valid'] for a in after):.1f} %",
            f"{mean(seconds):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def seed_rows(out: Path, seeds: int) -> list[str]:
    lines = [f"| seed | warm start (valid) | {' | '.join(METHODS.values())} |", f"|---|---|{'---|' * len(METHODS)}"]
    for seed in range(seeds):
        warm = fresh(out, "warm", seed)
        after = [f"{100 * fresh(out, m, seed)['success']:.1f}" for m in METHODS]
        first = f"{100 * warm['success']:.1f} ({100 * warm['metrics']['valid']:.1f})"
        lines.append(f"| {seed} | {first} | {' | '.join(after)} |")
    return lines


def ladder_rows(out: Path) -> list[str]:
    found = summary(out, "warm", 0)["ladder"]
    lines = ["| reference policy | success | return |", "|---|---|---|"]
    return lines + [f"| {n} | {100 * e['success']:.1f} % | {e['return_mean']:.3f} |" for n, e in found.items()]


def write_page(out: Path, seeds: int, page: Path) -> None:
    """docs/results/shopping.md and its plot."""
    import numpy
    import torch
    import transformers

    minutes = [sum(summary(out, m, s)["seconds"].values()) / 60 for s in range(seeds) for m in METHODS]
    warm = [sum(summary(out, "warm", s)["seconds"].values()) / 60 for s in range(seeds)]
    steps = summary(out, "hrm", 0)["steps"]
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (agentgym, torch, transformers, numpy))
    plot(out, seeds, page.with_suffix(".svg"))
    text = f"""# Shopping: what reinforcement adds to a warm start

Written by `python bench/shopping_results.py`; preset `{PRESET}`, {seeds} seeds, {steps} updates each,
{summary(out, "hrm", 0)["parameters"]:,} parameters. Success is strict: every hard wish of the user holds. It is
measured on {EPISODES} tasks with held-out target products, sampled at temperature 1: other tasks for each seed, none of
which was looked at while the preset was tuned. Each seed has one warm start, which all its cells begin from; their
tasks and sampling noise are the same. Intervals are Student's over seeds, differences are taken seed by seed.

{chr(10).join(rows(out, seeds))}

Seed by seed, success in percent:

{chr(10).join(seed_rows(out, seeds))}

For comparison, on the held-out tasks that the preset was tuned on:

{chr(10).join(ladder_rows(out))}

![return and success of the rollouts over updates]({page.with_suffix(".svg").name})

The rewards are our reconstruction of a hierarchical reward (the paper's weights are not public). "Outcome only" learns
from the strict success alone; "+ turn-level credit" adds the return-to-go of the potential shaping, with a baseline per
task and state; "+ hierarchical reward" replaces the outcome by the gated reward. Continued imitation trains on the best
member of each group of eight by the hierarchical reward, where it succeeded, all sampled from the warm start; expert
iteration does the same with groups sampled from the policy as it learns. The imitating arms train on an eighth of the
episodes, so they get {MORE} times the updates (and samples), about the same processor time, at the same learning rate.

How to read it: the warm start's teacher asks in 30 % of its episodes, about one random slot at a time, and stops asking
once it has learned one thing. Every method that samples from the policy as it learns finds out that asking pays, and
none goes on asking after the first useful answer, which nobody ever showed it: `ask_all` marks that headroom. Over
outcome-only GRPO, turn-level credit adds {over(out, "turn", "outcome", seeds)} points of strict success and the
hierarchical reward with it {over(out, "hrm", "outcome", seeds)}: episodes this short need no finer credit.

A warm start took {mean(warm):.1f} minutes and a cell {mean(minutes):.1f} on one thread, two at once, on
{platform.machine()}, {platform.system()}, Python {platform.python_version()}, {versions}.
"""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")


def plot(out: Path, seeds: int, path: Path) -> None:
    """Success of the rollouts over updates: mean over seeds, smoothed over five updates, and the range."""
    import matplotlib as mpl
    import numpy as np

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "agentgym"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6))
    for method, title in METHODS.items():
        series = [
            [line["success"] for line in load_run(out / f"{method}-{seed}").metrics if line.get("phase") == "rl"]
            for seed in range(seeds)
        ]
        smooth = np.array([np.convolve(s, np.ones(5) / 5, mode="valid") for s in series])
        x = np.arange(smooth.shape[1]) + 5
        axes.plot(x, 100 * smooth.mean(0), label=title)
        axes.fill_between(x, 100 * smooth.min(0), 100 * smooth.max(0), alpha=0.12)
    axes.set(xlabel="update", ylabel="success of the rollouts, %")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="cells at once, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/shopping-results"))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "shopping.md")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="a.b=value")
    parser.add_argument("--cell", nargs=2, metavar=("METHOD", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        train(options.out, options.cell[0], int(options.cell[1]), options.settings)
        return
    run_all(options.out, options.seeds, options.jobs, options.settings)
    write_page(options.out, options.seeds, options.page)
    print(options.page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
